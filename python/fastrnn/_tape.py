"""Running a network: inference, the forward pass of training, and the tape that goes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import _check, _core, _device, _ragged, _tbptt, _vocabulary
from fastrnn._cells import Network
from fastrnn._params import Array, Gradients, accumulators

__all__ = ["Tape", "forward", "infer", "infer_packed"]

State = Any  # h (L·D, B, H); for an LSTM the pair (h, c)


class Tape:
    """What a forward pass keeps for its backward pass.

    Nothing of it is in the layer: any number of tapes may be alive at once. It holds private copies
    of the weights and of the input, so that changing either afterwards does not change the
    gradient; with ``checkpoint_every`` the input is read again, and a changed one is a
    RuntimeError.

    Attributes:
        dropout_key: The key of the dropout masks between layers, or None without dropout.
    """

    __slots__ = ("_compacted", "_form", "_network", "_offsets", "_port", "_tape", "dropout_key")

    def __init__(
        self,
        network: Network,
        tape: _core.Tape | _tbptt.Windows,
        dropout_key: int | None,
        offsets: Array | None,
        form: _ragged.Form,
        port: _device.Port,
        compacted: tuple[Network, Array] | None,
    ) -> None:
        self._network = network
        self._tape = tape
        self._offsets = offsets  # of a ragged batch
        self._form = form  # the form of x
        self._port = port
        self._compacted = compacted  # of a large vocabulary: what ran, over which tokens
        self.dropout_key = dropout_key

    @property
    def family(self) -> str:
        """The layer's family: ``"rnn"``, ``"lstm"`` or ``"gru"``."""
        return self._network.family

    @property
    def nbytes(self) -> int:
        """Bytes that the tape holds, 0 once it was used."""
        return self._tape.nbytes

    def backward(
        self,
        dy: npt.ArrayLike | None,
        dstate: State = None,
        *,
        into: dict[str, Array] | None = None,
        threads: int | None = None,
    ) -> Gradients[State]:
        """Exact back-propagation through time (Werbos 1990). Uses the tape up.

        After a forward pass with ``tbptt`` it is truncated instead (``fastrnn._tbptt``).

        Args:
            dy: Gradient of the output, in its form, shape and dtype; None for zeros.
            dstate: Gradient of the final state, in the state's form; None for zeros.
            into: A dict like ``Gradients.params`` to add the parameters' gradients to.
            threads: At most this many threads; the bits do not depend on it.

        Returns:
            ``Gradients``: ``x`` in the input's form and shape (None for integer input), ``state``
            in the state's form, ``params`` by name. Accurate to 5e-6 (float32) or 1e-12 (float64)
            of each array's largest element.

        Raises:
            RuntimeError: The tape was used before; or x, needed again, was changed.
            TypeError, ValueError: An argument does not fit; the tape stays usable.
        """
        if self._tape.consumed:
            raise RuntimeError("tape: expected one that was not used yet; backward uses it up")
        network, port = self._network, self._port
        tape = self._tape
        # New gradients that one pass of the CPU's kernels makes need no zeros to be added to.
        fresh = into is None and self._compacted is None and isinstance(tape, _core.Tape)
        grads = accumulators(network.shapes(), network.dtype, into, network.device, fresh=fresh)
        dy = _ragged.values_of("dy", dy, self._offsets, port)
        dstate = port.take_state("dstate", dstate)
        part = grads
        if self._compacted is not None:
            part = _vocabulary.parts(self._compacted[0], grads)
        ordered = [part[name] for name in network.shapes()]  # ``into`` may have any order
        if isinstance(tape, _core.Tape):
            dx, dinitial = tape.backward(dy, dstate, ordered, threads, fresh)
        else:
            dx, dinitial = tape.backward(dy, dstate, ordered, threads)
        if self._compacted is not None:
            _vocabulary.add_columns(grads, part, self._compacted[1], threads)
        dx = None if dx is None else self._form(dx)
        return Gradients(dx, port.give_state(dinitial), grads)


def infer(
    network: Network,
    weights: Mapping[str, Array],
    x: Any,
    state: State,
    lengths: npt.ArrayLike | None,
    reset: Any,
    batch_first: bool,
    threads: int | None,
) -> tuple[Any, State]:
    """Inference, of every layer and function: packs the weights and runs."""
    port = _device.port(network.device, _ragged.sample(x))
    values, offsets, form = _ragged.split(x, port)
    reset = _ragged.values_of("reset", reset, offsets, port)
    state = port.take_state("state", state)
    network, weights, values, _ = _vocabulary.compact(network, weights, values, threads)
    packed = network.pack(weights, threads, values)
    y, final = packed.forward(values, state, lengths, offsets, reset, batch_first, threads)
    return form(y), port.give_state(final)


def infer_packed(
    device: str,
    packed: Any,
    x: Any,
    state: State,
    lengths: npt.ArrayLike | None,
    reset: Any,
    batch_first: bool,
    threads: int | None,
) -> tuple[Any, State]:
    """Inference of a frozen network."""
    port = _device.port(device, _ragged.sample(x))
    values, offsets, form = _ragged.split(x, port)
    reset = _ragged.values_of("reset", reset, offsets, port)
    state = port.take_state("state", state)
    y, final = packed.forward(values, state, lengths, offsets, reset, batch_first, threads)
    return form(y), port.give_state(final)


def forward(
    network: Network,
    weights: Mapping[str, Array],
    x: Any,
    state: State,
    *,
    lengths: npt.ArrayLike | None,
    reset: Any,
    batch_first: bool,
    threads: int | None,
    dropout: float,
    dropout_key: int | None,
    checkpoint_every: int | None,
    tbptt: tuple[int, int] | None,
) -> tuple[Any, State, Tape]:
    """The training forward pass of every layer and of ``functional.*_forward``."""
    every = 0 if checkpoint_every is None else _check.size("checkpoint_every", checkpoint_every)
    port = _device.port(network.device, _ragged.sample(x))
    values, offsets, form = _ragged.split(x, port)
    small, weights, values, columns = _vocabulary.compact(network, weights, values, threads)
    packed = small.pack(weights, threads, values)
    call = (
        values,
        port.take_state("state", state),
        lengths,
        offsets,
        _ragged.values_of("reset", reset, offsets, port),
        batch_first,
        threads,
    )
    tape: _core.Tape | _tbptt.Windows
    if tbptt is None:
        y, final, tape = packed.forward_training(*call, dropout, dropout_key or 0, every)
    else:
        y, final, tape = _tbptt.forward(small, packed, *call, dropout, every, tbptt)
    compacted = None if columns is None else (small, columns)
    kept = Tape(network, tape, dropout_key, offsets, form, port, compacted)
    return form(y), port.give_state(final), kept


def draw_key(rng: np.random.Generator) -> int:
    """A fresh dropout key."""
    return int(rng.integers(2**64, dtype=np.uint64))
