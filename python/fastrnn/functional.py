"""The recurrent layers as functions of their weights: no classes, nothing kept between calls.

``weights`` is a dict with PyTorch's parameter names (``weight_ih_l0``, ``weight_hh_l0``,
``bias_ih_l0``, ``bias_hh_l0``, …, ``_reverse`` for the second direction); layers, directions and
biases follow from the names, sizes and dtype from the arrays. All other arguments, results,
accuracy and errors are those of ``fastrnn.RNN``, ``fastrnn.LSTM`` and ``fastrnn.GRU``.

    y, (h, c) = functional.lstm(x, weights)
    y, (h, c), tape = functional.lstm_forward(x, weights)
    grads = functional.lstm_backward(tape, dy)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from fastrnn import _check, _tape
from fastrnn._cells import Family, infer, variant_of
from fastrnn._params import Array, Gradients
from fastrnn._tape import Tape

__all__ = [
    "gru",
    "gru_backward",
    "gru_forward",
    "lstm",
    "lstm_backward",
    "lstm_forward",
    "rnn",
    "rnn_backward",
    "rnn_forward",
]

State = Any
Weights = Mapping[str, npt.ArrayLike]


def rnn(
    x: Any,
    weights: Weights,
    state: State = None,
    *,
    nonlinearity: str = "tanh",
    lengths: npt.ArrayLike | None = None,
    reset: Any = None,
    batch_first: bool = False,
    threads: int | None = None,
) -> tuple[Any, State]:
    """Inference of simple recurrent layers (Elman 1990): (y, h)."""
    variant = variant_of("rnn", nonlinearity=nonlinearity)
    return _infer("rnn", variant, x, weights, state, lengths, reset, batch_first, threads)


def lstm(
    x: Any,
    weights: Weights,
    state: State = None,
    *,
    lengths: npt.ArrayLike | None = None,
    reset: Any = None,
    batch_first: bool = False,
    threads: int | None = None,
) -> tuple[Any, State]:
    """Inference of LSTM layers (Hochreiter & Schmidhuber 1997): (y, (h, c))."""
    return _infer("lstm", "", x, weights, state, lengths, reset, batch_first, threads)


def gru(
    x: Any,
    weights: Weights,
    state: State = None,
    *,
    reset_after: bool = True,
    lengths: npt.ArrayLike | None = None,
    reset: Any = None,
    batch_first: bool = False,
    threads: int | None = None,
) -> tuple[Any, State]:
    """Inference of GRU layers (Cho et al. 2014): (y, h)."""
    variant = variant_of("gru", reset_after=reset_after)
    return _infer("gru", variant, x, weights, state, lengths, reset, batch_first, threads)


def rnn_forward(
    x: Any,
    weights: Weights,
    state: State = None,
    *,
    nonlinearity: str = "tanh",
    **options: Any,
) -> tuple[Any, State, Tape]:
    """Training forward pass of simple recurrent layers: (y, h, tape).

    Options: lengths, reset, batch_first, threads, dropout, dropout_key, checkpoint_every, tbptt.
    """
    variant = variant_of("rnn", nonlinearity=nonlinearity)
    return _forward("rnn", variant, x, weights, state, **options)


def lstm_forward(
    x: Any, weights: Weights, state: State = None, **options: Any
) -> tuple[Any, State, Tape]:
    """Training forward pass of LSTM layers: (y, (h, c), tape). Options as for ``rnn_forward``."""
    return _forward("lstm", "", x, weights, state, **options)


def gru_forward(
    x: Any,
    weights: Weights,
    state: State = None,
    *,
    reset_after: bool = True,
    **options: Any,
) -> tuple[Any, State, Tape]:
    """Training forward pass of GRU layers: (y, h, tape). Options as for ``rnn_forward``."""
    variant = variant_of("gru", reset_after=reset_after)
    return _forward("gru", variant, x, weights, state, **options)


def rnn_backward(
    tape: Tape,
    dy: npt.ArrayLike | None,
    dstate: State = None,
    *,
    into: dict[str, Array] | None = None,
    threads: int | None = None,
) -> Gradients[State]:
    """Back-propagation through the ``rnn_forward`` that made ``tape``: ``Tape.backward``.

    Raises:
        RuntimeError: Another family's tape, or one that was used before.
    """
    return _own_tape("rnn", tape).backward(dy, dstate, into=into, threads=threads)


def lstm_backward(
    tape: Tape,
    dy: npt.ArrayLike | None,
    dstate: State = None,
    *,
    into: dict[str, Array] | None = None,
    threads: int | None = None,
) -> Gradients[State]:
    """Back-propagation through the ``lstm_forward`` that made ``tape``, as ``rnn_backward``."""
    return _own_tape("lstm", tape).backward(dy, dstate, into=into, threads=threads)


def gru_backward(
    tape: Tape,
    dy: npt.ArrayLike | None,
    dstate: State = None,
    *,
    into: dict[str, Array] | None = None,
    threads: int | None = None,
) -> Gradients[State]:
    """Back-propagation through the ``gru_forward`` that made ``tape``, as ``rnn_backward``."""
    return _own_tape("gru", tape).backward(dy, dstate, into=into, threads=threads)


def _own_tape(family: Family, tape: Tape) -> Tape:
    if not isinstance(tape, Tape):
        raise TypeError(f"tape: expected what {family}_forward returned, got {type(tape).__name__}")
    if tape.family != family:
        raise RuntimeError(
            f"tape: expected one of {family}_forward, got one of {tape.family}_forward"
        )
    return tape


def _infer(
    family: Family,
    variant: str,
    x: Any,
    weights: Weights,
    state: State,
    lengths: npt.ArrayLike | None,
    reset: Any,
    batch_first: bool,
    threads: int | None,
) -> tuple[Any, State]:
    network, arrays = infer(family, variant, weights)
    first = _check.flag("batch_first", batch_first)
    return _tape.infer(network, arrays, x, state, lengths, reset, first, threads)


def _forward(
    family: Family,
    variant: str,
    x: Any,
    weights: Weights,
    state: State,
    *,
    lengths: npt.ArrayLike | None = None,
    reset: Any = None,
    batch_first: bool = False,
    threads: int | None = None,
    dropout: float = 0.0,
    dropout_key: int | None = None,
    checkpoint_every: int | None = None,
    tbptt: tuple[int, int] | None = None,
) -> tuple[Any, State, Tape]:
    network, arrays = infer(family, variant, weights)
    p = _check.probability("dropout", dropout)
    key: int | None = None
    if p > 0 and network.num_layers > 1:
        if dropout_key is None:
            raise ValueError("dropout_key: expected an integer where dropout > 0, got None")
        key = _check.key("dropout_key", dropout_key)
    return _tape.forward(
        network,
        arrays,
        x,
        state,
        lengths=lengths,
        reset=reset,
        batch_first=_check.flag("batch_first", batch_first),
        threads=threads,
        dropout=p,
        dropout_key=key,
        checkpoint_every=checkpoint_every,
        tbptt=tbptt,
    )
