"""Truncated back-propagation through time: the gradient of a long sequence, window by window.

BPTT(h; h') of Williams & Peng (1990, "An efficient gradient-based algorithm for on-line training of
recurrent network trajectories", Neural Computation 2:490-501) with h' = k1 and h = k2: every k1
steps, the losses of the last k1 steps go back through at most k2 steps. Window i has the losses of
the steps i·k1 ≤ t < e_i = (i + 1)·k1 and begins at s_i = max(0, e_i - k2). Its gradient is that of

    L_i = Σ_(i·k1 ≤ t < e_i) ⟨dy_t, y_t⟩    with the state before step s_i, of all layers, constant;

the truncated gradient is the sum over i. A row's windows follow from its own steps alone, so that
its gradient depends neither on the other rows nor on padding.

Nothing of the activations is kept between the passes. The forward pass is that of inference; the
backward pass goes through the windows in the order of time, runs each forward from the state that
the one before it left and then back. So memory is that of the input and of one window, and the time
k2/k1 forward and backward passes, and an inference (two where k2 > k1: the states at s_i).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import _check, _device
from fastrnn._cells import Network
from fastrnn._params import Array

__all__ = ["Windows", "forward", "pair"]

State = Any  # h (L·D, B, H); for an LSTM the pair (h, c)


def pair(tbptt: Any) -> tuple[int, int]:
    """(k1, k2) with 1 ≤ k1 ≤ k2.

    Raises:
        TypeError: Not a pair of integers.
        ValueError: Other values.
    """
    expected = "two integers (k1, k2), 1 <= k1 <= k2"
    if not isinstance(tbptt, (tuple, list)):
        raise TypeError(f"tbptt: expected {expected}, got {type(tbptt).__name__}")
    if len(tbptt) != 2:
        raise ValueError(f"tbptt: expected {expected}, got {len(tbptt)} items")
    k1, k2 = (_check.size(f"tbptt[{i}]", value) for i, value in enumerate(tbptt))
    if k2 < k1:
        raise ValueError(
            f"tbptt: expected {expected}, got ({k1}, {k2}): losses go back at least to the "
            "beginning of their own window"
        )
    return k1, k2


def forward(
    network: Network,
    packed: Any,
    x: Any,
    state: State,
    lengths: npt.ArrayLike | None,
    offsets: Array | None,
    reset: Any,
    batch_first: bool,
    threads: int | None,
    dropout: float,
    checkpoint_every: int,
    tbptt: Any,
) -> tuple[Array, State, Windows]:
    """The forward pass, and what takes the place of the kernels' tape; the arguments are theirs.

    Raises:
        TypeError, ValueError: ``tbptt`` is not a pair or does not go with the other options.
    """
    k1, k2 = pair(tbptt)
    if checkpoint_every > 0:
        raise ValueError(
            "checkpoint_every: expected None with tbptt, which keeps no activations, "
            f"got {checkpoint_every}"
        )
    if network.num_directions == 2:
        raise ValueError(
            f"tbptt: expected None for a bidirectional layer, got ({k1}, {k2}): its reverse "
            "direction starts at the end of the sequence, so a window has no state to start from"
        )
    if dropout > 0 and network.num_layers > 1:
        raise ValueError(
            f"tbptt: expected None with dropout between layers, got ({k1}, {k2}): the windows "
            "would drop other elements than the whole sequence; put nn.Dropout between layers "
            "of their own"
        )
    y, final = packed.forward(x, state, lengths, offsets, reset, batch_first, threads)
    time_axis = 1 if y.ndim == 3 and batch_first else 0
    if offsets is not None:
        ends = np.diff(offsets)
    elif lengths is not None:
        ends = np.array(lengths, np.int64)
    else:
        ends = np.full(y.shape[1 - time_axis] if y.ndim == 3 else 1, y.shape[time_axis])
    integers = _device.is_array(x) and x.dtype in ("int32", "int64")
    call = _Call(
        network=network,
        packed=packed,
        x=np.array(x) if integers else _device.copied(x),
        state=_map(lambda array: None if array is None else _device.copied(array), state),
        offsets=None if offsets is None else np.array(offsets, np.int64),
        ends=ends,
        reset=None if reset is None else np.array(reset),
        batch_first=batch_first,
        time_axis=time_axis,
        y_shape=y.shape,
        y_dtype=_device.dtype_of(y),
        batched=_arrays(final)[0].ndim == 3,
        k1=k1,
        k2=k2,
    )
    return y, final, Windows(call)


class Windows:
    """The tape of a truncated forward pass, with the members of the kernels' tape."""

    __slots__ = ("_kept",)

    def __init__(self, call: _Call) -> None:
        self._kept = [call]  # none once it was used

    @property
    def consumed(self) -> bool:
        """Whether ``backward`` was called."""
        return not self._kept

    @property
    def nbytes(self) -> int:
        """Bytes held between the passes."""
        return sum(call.nbytes for call in self._kept)

    def backward(
        self, dy: npt.ArrayLike | None, dstate: State, into: list[Array], threads: int | None
    ) -> tuple[Array | None, State]:
        """Adds the parameters' gradients to ``into`` and returns (dx or None, dstate)."""
        for call in self._kept.copy():
            if dy is not None:
                dy = _check.float_array("dy", dy, call.y_dtype, call.y_shape)
            dfinal = call.check(dstate, into, threads)
            try:
                self._kept.pop()  # atomic, unlike a test and an assignment
            except IndexError:
                break
            return call.backward(dy, dfinal, into, threads)
        raise RuntimeError("tape: expected one that was not used yet; backward uses it up")


@dataclass(frozen=True)
class _Window:
    """Some steps of the rows."""

    where: Any  # indexes them in x, y and reset
    steps: Array  # their numbers, to broadcast with y[where]
    lengths: Array | None
    offsets: Array | None


@dataclass(frozen=True)
class _Call:
    """A forward call, in private copies."""

    network: Network
    packed: Any
    x: Array  # integers on the CPU, wherever the network is
    state: State
    offsets: Array | None
    ends: Array  # (B,) the steps of each row
    reset: Array | None
    batch_first: bool
    time_axis: int
    y_shape: tuple[int, ...]
    y_dtype: str
    batched: bool
    k1: int
    k2: int

    @property
    def nbytes(self) -> int:
        arrays = [self.x, self.reset, *_arrays(self.state)]
        return sum(array.nbytes for array in arrays if array is not None)

    def check(self, dstate: State, into: list[Array], threads: int | None) -> State:
        """``dstate`` as arrays (None for zeros), once the arguments are found fit."""
        # By the backward pass of a window without steps, which adds nothing to the gradients and
        # hands that of the final state through.
        nothing = self._window(0, 0, np.zeros_like(self.ends))
        _, _, tape = self._train(nothing, self.state, threads)
        _, dfinal = tape.backward(None, dstate, into, threads)
        return None if dstate is None else dfinal

    def backward(
        self, dy: Array | None, dfinal: State, into: list[Array], threads: int | None
    ) -> tuple[Array | None, State]:
        """Through all windows, in the order of time."""
        k1, k2, ends = self.k1, self.k2, self.ends
        longest = int(ends.max(initial=0))
        dx: Any = None
        if "float" in _device.dtype_of(self.x):
            dx = _device.zeros(self.x.shape, self.network.dtype, self.network.device)
        dinitial = self._zeros() if dfinal is None else self._rows(dfinal, ends == 0)
        state = self.state
        for first in range(0, longest, k1):  # step of the window's losses
            begin, stop = max(0, first + k1 - k2), min(first + k1, longest)
            going_on = ends > first
            ending = going_on & (ends <= first + k1)
            final = None
            if dy is not None or (dfinal is not None and ending.any()):
                counts = np.where(going_on, np.minimum(ends, stop) - begin, 0)
                window = self._window(begin, stop, counts)
                _, final, tape = self._train(window, state, threads)
                losses = None if dy is None else _device.picked(dy, window.where)
                if losses is not None and begin < first:  # those before are other windows'
                    losses = _device.masked(window.steps >= first, losses)
                dx_here, dstate = tape.backward(losses, self._rows(dfinal, ending), into, threads)
                if dx is not None:
                    _device.add_at(dx, window.where, dx_here)
                if begin == 0:
                    for total, part in zip(_arrays(dinitial), _arrays(dstate), strict=True):
                        _device.add_at(total, (), part)
            upcoming = max(0, first + 2 * k1 - k2)  # where the next window begins
            if stop < longest and upcoming > begin:
                if final is None or upcoming < stop:
                    counts = np.clip(ends - begin, 0, upcoming - begin)
                    window = self._window(begin, upcoming, counts)
                    _, final = self.packed.forward(*self._arguments(window, state, threads))
                state = final
        return None if dx is None else _device.cast(dx, self.x), dinitial

    def _train(self, window: _Window, state: State, threads: int | None) -> Any:
        return self.packed.forward_training(*self._arguments(window, state, threads), 0.0, 0, 0)

    def _arguments(
        self, window: _Window, state: State, threads: int | None
    ) -> tuple[Any, State, Any, Any, Any, bool, int | None]:
        reset = None if self.reset is None else self.reset[window.where]
        x, offsets = _device.picked(self.x, window.where), window.offsets
        if self.network.device == "cuda":
            x = _device.device_array(x)
        return x, state, window.lengths, offsets, reset, self.batch_first, threads

    def _window(self, begin: int, stop: int, counts: Array) -> _Window:
        """The first ``counts[b]`` of the steps ``begin``, …, ``stop`` - 1 of every row."""
        if self.offsets is None:
            where = (slice(None),) * self.time_axis + (slice(begin, stop),)
            steps = np.arange(begin, stop)
            shape = [1] * len(self.y_shape)
            shape[self.time_axis] = steps.size
            full = bool((counts == steps.size).all())
            return _Window(where, steps.reshape(shape), None if full else counts, None)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        steps = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts) + begin
        return _Window(np.repeat(self.offsets[:-1], counts) + steps, steps[:, None], None, offsets)

    def _rows(self, state: State, rows: Array) -> State:
        """``state`` in the given rows, zeros in the others; None stays None."""
        mask = rows[:, None] if self.batched else rows
        return _map(lambda array: _device.masked(mask, array), state)

    def _zeros(self) -> State:
        batch = (self.ends.size,) if self.batched else ()
        shape = (self.network.num_layers, *batch, self.network.hidden_size)
        zeros = [_device.zeros(shape, self.network.dtype, self.network.device) for _ in range(2)]
        return tuple(zeros) if self.network.family == "lstm" else zeros[0]


def _arrays(state: State) -> list[Any]:
    return list(state) if isinstance(state, (tuple, list)) else [state]


def _map(function: Callable[[Any], Any], state: State) -> State:
    """``function`` of each array of a state; None stays None."""
    if state is None:
        return None
    return tuple(map(function, state)) if isinstance(state, (tuple, list)) else function(state)
