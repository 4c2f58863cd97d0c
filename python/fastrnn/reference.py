"""The specification of fastrnn in plain NumPy: what every fast path computes, written to be read.

Forward pass and exact back-propagation through time (Werbos 1990, "Backpropagation through time:
what it does and how to do it") for the recurrent layers RNN, LSTM and GRU with every option of the
library. The compiled kernels are tested against this file, so it prefers the obvious to the fast:
loops over time are loops, each cell is one function forward and one function backward, and nothing
but NumPy is imported.

Read it from top to bottom: the cells (one time step), one direction of one layer (the loop over
time), the stack (directions, layers, dropout), the arguments (layouts, lengths, resets, weights by
name), the public functions.

Dimensions, here and everywhere in fastrnn::

    T  time steps      B  batch rows      I  input features     H  hidden units
    G  gates           L  layers          D  directions, 1 or 2
    S  arrays that make up a state: 1 (h) for RNN and GRU, 2 (h and c) for LSTM

``d<name>`` is the gradient of a scalar loss with respect to ``<name>`` and has its shape.
Everything is computed in the dtype of the weights; float64 is the oracle. Subnormal numbers are
kept here, while the compiled kernels flush them to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Gradients",
    "Tape",
    "dropout_mask",
    "gru",
    "gru_backward",
    "gru_forward",
    "lstm",
    "lstm_backward",
    "lstm_forward",
    "rnn",
    "rnn_backward",
    "rnn_forward",
    "splitmix64",
]

Array = NDArray[Any]
State = Any  # h, or (h, c) for LSTM, in the caller's layout


class Weights(NamedTuple):
    """The parameters of one direction of one layer (or their gradients)."""

    ih: Array  # (G*H, I): applied to the input
    hh: Array  # (G*H, H): applied to the previous h
    b_ih: Array  # (G*H,): zeros in a layer without bias
    b_hh: Array  # (G*H,)


# --------------------------------------------------------------------------------------------------
# Activations. Their derivatives are written in terms of their output y, because that is what the
# forward pass keeps.
# --------------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)); exp may overflow to Inf, which gives the correct 0."""
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))


def relu(x: Array) -> Array:
    """max(x, 0); NaN stays NaN."""
    return np.asarray(np.maximum(x, 0))


def d_sigmoid(y: Array) -> Array:
    """sigmoid'(x) = y (1 - y) where y = sigmoid(x)."""
    return np.asarray(y * (1 - y))


def d_tanh(y: Array) -> Array:
    """tanh'(x) = 1 - y^2 where y = tanh(x)."""
    return np.asarray(1 - y * y)


def d_relu(y: Array) -> Array:
    """relu'(x) = 1 where x > 0, else 0 (0 at the kink, as in PyTorch)."""
    return np.asarray(y > 0, y.dtype)


# --------------------------------------------------------------------------------------------------
# Cells. One time step of B rows, forward and backward:
#
#   step(x, state, w)               -> new state, saved   what backward needs
#   step_backward(dnew, saved, w)   -> dx, dstate, dw     gradients of step's three arguments
#
# x is (B, I); a state is (S, B, H); saved is a tuple that only the cell looks into.
#
# Every gate applies an activation to its pre-activation a = x W_ih^T + b_ih + h W_hh^T + b_hh. With
# da known,
#
#   dx = da W_ih     dW_ih = da^T x
#   dh = da W_hh     dW_hh = da^T h     db_ih = db_hh = da summed over the rows
# --------------------------------------------------------------------------------------------------


def affine_backward(
    da_ih: Array, da_hh: Array, x: Array, h: Array, w: Weights
) -> tuple[Array, Array, Weights]:
    """Gradients of x, h and w from those of x W_ih^T + b_ih and h W_hh^T + b_hh, each (B, G*H)."""
    dw = Weights(da_ih.T @ x, da_hh.T @ h, da_ih.sum(axis=0), da_hh.sum(axis=0))
    return da_ih @ w.ih, da_hh @ w.hh, dw


# --- RNN (Elman 1990, "Finding structure in time"; PyTorch's torch.nn.RNN) ---
#
#   h' = f(W_ih x + b_ih + W_hh h + b_hh)         f = tanh, relu or sigmoid
#
# Backward:   da = dh' * f'(a), where f' is a function of h' = f(a).


def rnn_step(
    x: Array, state: Array, w: Weights, f: Callable[[Array], Array]
) -> tuple[Array, tuple[Array, ...]]:
    """One step of the RNN cell."""
    (h,) = state
    h_new = f(x @ w.ih.T + w.b_ih + h @ w.hh.T + w.b_hh)
    return np.stack([h_new]), (x, h, h_new)


def rnn_step_backward(
    dnew: Array, saved: tuple[Array, ...], w: Weights, df: Callable[[Array], Array]
) -> tuple[Array, Array, Weights]:
    """The gradients of x, the state and w in one step."""
    x, h, h_new = saved
    (dh_new,) = dnew
    da = dh_new * df(h_new)
    dx, dh, dw = affine_backward(da, da, x, h, w)
    return dx, np.stack([dh]), dw


# --- LSTM (Hochreiter & Schmidhuber 1997, "Long short-term memory", with the forget gate of Gers,
#     Schmidhuber & Cummins 2000, "Learning to forget: continual prediction with LSTM"; no
#     peepholes; PyTorch's torch.nn.LSTM) ---
#
#   i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o)     rows of the weights: i, f, g, o
#   g  = tanh(a_g)
#   c' = f * c + i * g
#   h' = o * tanh(c')
#
# Backward: c' reaches the loss directly (dc' of the next step) and through h':
#
#   do  = dh' * tanh(c')
#   dc' = dc' + dh' * o * (1 - tanh(c')^2)
#   di = dc' * g      df = dc' * c      dg = dc' * i      dc = dc' * f
#   da = d(gate) * activation'(gate)


def lstm_step(x: Array, state: Array, w: Weights) -> tuple[Array, tuple[Array, ...]]:
    """One step of the LSTM cell."""
    h, c = state
    a_i, a_f, a_g, a_o = np.split(x @ w.ih.T + w.b_ih + h @ w.hh.T + w.b_hh, 4, axis=1)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
    c_new = f * c + i * g
    tanh_c = np.tanh(c_new)
    h_new = o * tanh_c
    return np.stack([h_new, c_new]), (x, h, c, i, f, g, o, tanh_c)


def lstm_step_backward(
    dnew: Array, saved: tuple[Array, ...], w: Weights
) -> tuple[Array, Array, Weights]:
    """The gradients of x, the state and w in one step."""
    x, h, c, i, f, g, o, tanh_c = saved
    dh_new, dc_new = dnew
    do = dh_new * tanh_c
    dc_new = dc_new + dh_new * o * d_tanh(tanh_c)
    di, df, dg, dc = dc_new * g, dc_new * c, dc_new * i, dc_new * f
    da = np.concatenate(
        [di * d_sigmoid(i), df * d_sigmoid(f), dg * d_tanh(g), do * d_sigmoid(o)], axis=1
    )
    dx, dh, dw = affine_backward(da, da, x, h, w)
    return dx, np.stack([dh, dc]), dw


# --- GRU, reset_after=True (PyTorch's torch.nn.GRU and cuDNN: the reset gate scales W_hn h + b_hn;
#     the gate comes after the product) ---
#
#   r, z = sigmoid(a_r), sigmoid(a_z)                      rows of the weights: r, z, n
#   q  = W_hn h + b_hn
#   n  = tanh(W_in x + b_in + r * q)
#   h' = (1 - z) * n + z * h
#
# Backward:
#
#   dn = dh' * (1 - z)         dz = dh' * (h - n)         da_n = dn * (1 - n^2)
#   dr = da_n * q              dq = da_n * r
#   dh = dh' * z + [da_r, da_z, dq] W_hh
#
# Gates r and z add x W_ih^T + b_ih and h W_hh^T + b_hh, so both receive da; in gate n the input
# half receives da_n and the hidden half dq.


def gru_step(x: Array, state: Array, w: Weights) -> tuple[Array, tuple[Array, ...]]:
    """One step of the GRU cell, reset gate after the product."""
    (h,) = state
    x_r, x_z, x_n = np.split(x @ w.ih.T + w.b_ih, 3, axis=1)
    h_r, h_z, q = np.split(h @ w.hh.T + w.b_hh, 3, axis=1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * q)
    h_new = (1 - z) * n + z * h
    return np.stack([h_new]), (x, h, r, z, n, q)


def gru_step_backward(
    dnew: Array, saved: tuple[Array, ...], w: Weights
) -> tuple[Array, Array, Weights]:
    """The gradients of x, the state and w in one step."""
    x, h, r, z, n, q = saved
    (dh_new,) = dnew
    da_n = dh_new * (1 - z) * d_tanh(n)
    da_r = da_n * q * d_sigmoid(r)
    da_z = dh_new * (h - n) * d_sigmoid(z)
    da_ih = np.concatenate([da_r, da_z, da_n], axis=1)
    da_hh = np.concatenate([da_r, da_z, da_n * r], axis=1)
    dx, dh, dw = affine_backward(da_ih, da_hh, x, h, w)
    return dx, np.stack([dh + dh_new * z]), dw


# --- GRU, reset_after=False (Cho et al. 2014, "Learning phrase representations using RNN
#     encoder-decoder for statistical machine translation", equations 5 to 8, here with biases: the
#     reset gate scales h; the gate comes before the product) ---
#
#   r, z = sigmoid(a_r), sigmoid(a_z)                      equations 5 and 6
#   m  = r * h
#   n  = tanh(W_in x + b_in + W_hn m + b_hn)               equation 8
#   h' = (1 - z) * n + z * h                               equation 7
#
# Backward: dn, dz and da_n as above, then through m:
#
#   dm = da_n W_hn        dr = dm * h        dh = dh' * z + dm * r + [da_r, da_z] [W_hr; W_hz]
#   dW_hn = da_n^T m


def gru_reset_before_step(x: Array, state: Array, w: Weights) -> tuple[Array, tuple[Array, ...]]:
    """One step of the GRU cell, reset gate before the product."""
    (h,) = state
    rz = 2 * h.shape[1]  # the rows of r and z come first, those of n after them
    x_r, x_z, x_n = np.split(x @ w.ih.T + w.b_ih, 3, axis=1)
    h_r, h_z = np.split(h @ w.hh[:rz].T + w.b_hh[:rz], 2, axis=1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    m = r * h
    n = np.tanh(x_n + m @ w.hh[rz:].T + w.b_hh[rz:])
    h_new = (1 - z) * n + z * h
    return np.stack([h_new]), (x, h, r, z, n, m)


def gru_reset_before_step_backward(
    dnew: Array, saved: tuple[Array, ...], w: Weights
) -> tuple[Array, Array, Weights]:
    """The gradients of x, the state and w in one step."""
    x, h, r, z, n, m = saved
    (dh_new,) = dnew
    rz = 2 * h.shape[1]
    da_n = dh_new * (1 - z) * d_tanh(n)
    dm = da_n @ w.hh[rz:]
    da_r = dm * h * d_sigmoid(r)
    da_z = dh_new * (h - n) * d_sigmoid(z)
    da_rz = np.concatenate([da_r, da_z], axis=1)
    da = np.concatenate([da_rz, da_n], axis=1)
    dh = dh_new * z + dm * r + da_rz @ w.hh[:rz]
    dw_hh = np.concatenate([da_rz.T @ h, da_n.T @ m])
    return da @ w.ih, np.stack([dh]), Weights(da.T @ x, dw_hh, da.sum(axis=0), da.sum(axis=0))


class Cell(NamedTuple):
    """A recurrent cell: its sizes and the two functions above."""

    gates: int  # G
    states: int  # S
    step: Callable[[Array, Array, Weights], tuple[Array, tuple[Array, ...]]]
    step_backward: Callable[[Array, tuple[Array, ...], Weights], tuple[Array, Array, Weights]]


def rnn_cell(f: Callable[[Array], Array], df: Callable[[Array], Array]) -> Cell:
    """The RNN cell with nonlinearity f, whose derivative df is a function of f's output."""
    return Cell(1, 1, partial(rnn_step, f=f), partial(rnn_step_backward, df=df))


RNN_CELLS = {
    "tanh": rnn_cell(np.tanh, d_tanh),
    "relu": rnn_cell(relu, d_relu),
    "sigmoid": rnn_cell(sigmoid, d_sigmoid),
}
LSTM_CELL = Cell(4, 2, lstm_step, lstm_step_backward)
GRU_CELLS = {
    True: Cell(3, 1, gru_step, gru_step_backward),
    False: Cell(3, 1, gru_reset_before_step, gru_reset_before_step_backward),
}


# --------------------------------------------------------------------------------------------------
# One direction of one layer.
#
# `active` (T, B) says which steps lie within their row's length. A row takes part in active steps
# only: elsewhere its state waits, its output is 0 and its input is never read (so that NaN in the
# padding does no harm). The forward direction therefore stops at each row's own end, and the
# reverse direction starts there.
#
# `drop` (T, B) says where the state is set to zero before the step, because a new sequence begins
# there.
# --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What backward needs of one time step."""

    t: int
    rows: Array  # the rows that took part, as indices
    dropped: Array  # the rows whose state was set to zero before the step, as indices
    saved: tuple[Array, ...]  # the cell's own


def state_drops(reset: Array, active: Array, reverse: bool) -> Array:
    """Where a direction drops its state before a step, (T, B) bool.

    ``reset[t]`` puts a border between steps t - 1 and t. The forward direction crosses it when it
    comes to step t, the reverse direction when it comes to step t - 1. Flags past a row's length
    mean nothing.
    """
    reset = reset & active
    if not reverse:
        return reset
    drop = np.zeros_like(reset)
    drop[:-1] = reset[1:]
    return drop


def direction_forward(
    cell: Cell, x: Array, w: Weights, state: Array, active: Array, drop: Array, reverse: bool
) -> tuple[Array, Array, list[Step]]:
    """Runs x (T, B, I) from state (S, B, H).

    Returns y (T, B, H), the final state (S, B, H) and the steps in the order they were taken.
    """
    state = state.copy()
    y = np.zeros((*x.shape[:2], state.shape[2]), x.dtype)
    tape: list[Step] = []
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        rows, dropped = np.flatnonzero(active[t]), np.flatnonzero(drop[t])
        state[:, dropped] = 0
        state[:, rows], saved = cell.step(x[t, rows], state[:, rows], w)
        y[t, rows] = state[0, rows]
        tape.append(Step(t, rows, dropped, saved))
    return y, state, tape


def direction_backward(
    cell: Cell, tape: list[Step], w: Weights, dy: Array, dstate: Array
) -> tuple[Array, Array, Weights]:
    """The gradients of x, the initial state and w, given dy (T, B, H) and dstate (S, B, H).

    The steps in the opposite order. When the loop comes to a step, ``dstate`` is the gradient of
    the state after it, as far as the steps taken later and the final state use that state; y[t] is
    the h of the same state, so dy[t] joins in.
    """
    dx = np.zeros((*dy.shape[:2], w.ih.shape[1]), dy.dtype)
    dstate = dstate.copy()
    dw = Weights(*(np.zeros_like(array) for array in w))
    for t, rows, dropped, saved in reversed(tape):
        dstate[0, rows] += dy[t, rows]
        dx[t, rows], dstate[:, rows], dw_t = cell.step_backward(dstate[:, rows], saved, w)
        dstate[:, dropped] = 0  # nothing before a dropped state matters
        for total, part in zip(dw, dw_t, strict=True):
            total += part
    return dx, dstate, dw


# --------------------------------------------------------------------------------------------------
# Dropout between layers (Zaremba, Sutskever & Vinyals 2014, "Recurrent neural network
# regularization": only on the connections that are not recurrent). The mask comes from a counter,
# not from a stream of random numbers, so any thread can compute any element of it.
# --------------------------------------------------------------------------------------------------


def splitmix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output of the generator SplitMix64 for each of an array of states.

    Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", with the constants
    of Stafford's mix 13. All arithmetic is modulo 2^64, as NumPy's arrays do it.
    """
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def dropout_mask(
    key: int, layer: int, shape: tuple[int, int, int], p: float
) -> NDArray[np.float64]:
    """The factors on the input of `layer` (1 or later): 0 with probability p, else 1 / (1 - p).

    shape is that of the layer's input, (T, B, D*H). Element e (row-major) is kept if its 53-bit
    uniform number ``(splitmix64(splitmix64(key + layer) + e) >> 11) * 2^-53`` is at least p.
    """
    layer_key = splitmix64(np.array([(key + layer) % 2**64], np.uint64))
    counter = np.arange(np.prod(shape, dtype=int), dtype=np.uint64)
    uniform = (splitmix64(layer_key + counter) >> np.uint64(11)) * 2.0**-53
    return np.where(uniform >= p, 1 / (1 - p), 0.0).reshape(shape)


# --------------------------------------------------------------------------------------------------
# The stack of layers and directions. Entry k = l * D + d of the weights and of the states is
# direction d of layer l.
# --------------------------------------------------------------------------------------------------


class Tape(NamedTuple):
    """What backward needs of a forward pass.

    It holds copies: weights and x may change in between. Backward may run on it any number of times
    (a tape of the compiled library serves once).
    """

    cell: Cell
    weights: list[Weights]  # L*D entries
    names: list[list[str]]  # L*D entries: the caller's names of those
    steps: list[list[Step]]  # L*D entries: the steps in the order in which they were taken
    masks: list[Array | None]  # L entries: dropout on the layer's input
    shape: tuple[int, int, int]  # T, B, D
    batched: bool
    batch_first: bool
    one_hot: bool


def stack_forward(
    cell: Cell,
    x: Array,
    weights: list[Weights],
    state: Array,
    active: Array,
    reset: Array,
    masks: list[Array | None],
) -> tuple[Array, Array, list[list[Step]]]:
    """Runs x (T, B, I) from state (S, L*D, B, H).

    Returns y (T, B, D*H), the final state (S, L*D, B, H) and the tapes of the L*D directions.
    """
    directions = len(weights) // len(masks)
    final = np.empty_like(state)
    tapes = []
    for layer, mask in enumerate(masks):
        if mask is not None:
            x = x * mask
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            reverse = direction == 1
            drop = state_drops(reset, active, reverse)
            y, final[:, k], tape = direction_forward(
                cell, x, weights[k], state[:, k], active, drop, reverse
            )
            outputs.append(y)
            tapes.append(tape)
        x = np.concatenate(outputs, axis=2)
    return x, final, tapes


def stack_backward(tape: Tape, dy: Array, dstate: Array) -> tuple[Array, Array, list[Weights]]:
    """The gradients of x, the initial state and the weights.

    dy is (T, B, D*H), dstate (S, L*D, B, H).
    """
    directions = tape.shape[2]
    dinitial = np.empty_like(dstate)
    dweights: dict[int, Weights] = {}
    for layer in reversed(range(len(tape.masks))):
        parts = []  # of the input's gradient, one for each direction that reads it
        for direction, dy_direction in enumerate(np.split(dy, directions, axis=2)):
            k = layer * directions + direction
            dx, dinitial[:, k], dweights[k] = direction_backward(
                tape.cell, tape.steps[k], tape.weights[k], dy_direction, dstate[:, k]
            )
            parts.append(dx)
        mask = tape.masks[layer]
        dx = np.sum(parts, axis=0)
        dy = dx if mask is None else dx * mask
    return dy, dinitial, [dweights[k] for k in range(len(tape.weights))]


# --------------------------------------------------------------------------------------------------
# Arguments: from the caller's layouts and names to the ones above, and back.
# --------------------------------------------------------------------------------------------------


def read_weights(
    weights: Mapping[str, Array], gates: int
) -> tuple[list[Weights], list[list[str]], int]:
    """Reads PyTorch's names, from which layers, directions and bias follow.

    Returns L*D copies, their names (without biases where there are none), and D.
    """
    if "weight_ih_l0" not in weights or "weight_hh_l0" not in weights:
        raise ValueError(
            f"weights: expected names with weight_ih_l0 and weight_hh_l0, got {sorted(weights)}"
        )
    layers = 1
    while f"weight_ih_l{layers}" in weights:
        layers += 1
    suffixes = ["", "_reverse"] if "weight_ih_l0_reverse" in weights else [""]
    kinds = ["weight_ih", "weight_hh"]
    if "bias_ih_l0" in weights:
        kinds += ["bias_ih", "bias_hh"]
    places = [f"l{layer}{suffix}" for layer in range(layers) for suffix in suffixes]
    names = [[f"{kind}_{place}" for kind in kinds] for place in places]
    expected = {name for group in names for name in group}
    if set(weights) != expected:
        raise ValueError(f"weights: expected the names {sorted(expected)}, got {sorted(weights)}")

    dtype, hidden_size = weights["weight_hh_l0"].dtype, weights["weight_hh_l0"].shape[-1]
    rows = gates * hidden_size
    result = []
    for k, group in enumerate(names):
        first_layer = k < len(suffixes)
        inputs = weights["weight_ih_l0"].shape[-1] if first_layer else len(suffixes) * hidden_size
        shapes = [(rows, inputs), (rows, hidden_size), (rows,), (rows,)]
        arrays = [np.zeros(shape, dtype) for shape in shapes]
        for array, name, shape in zip(arrays, group, shapes, strict=False):
            given = weights[name]
            if given.shape != shape:
                raise ValueError(f"weights[{name!r}]: expected shape {shape}, got {given.shape}")
            if given.dtype != dtype:
                raise TypeError(f"weights[{name!r}]: expected {dtype}, got {given.dtype}")
            array[...] = given
        result.append(Weights(*arrays))
    return result, names, len(suffixes)


def time_major(array: Array, batched: bool, batch_first: bool) -> Array:
    """From the caller's layout, (T, B, …), (B, T, …) or (T, …), to (T, B, …)."""
    if not batched:
        return array[:, None]
    return np.swapaxes(array, 0, 1) if batch_first else array


def caller_layout(array: Array, batched: bool, batch_first: bool) -> Array:
    """The way back from :func:`time_major`."""
    if not batched:
        return array[:, 0]
    return np.swapaxes(array, 0, 1) if batch_first else array


def read_input(
    x: ArrayLike, input_size: int, dtype: Any, batch_first: bool
) -> tuple[Array, bool, bool]:
    """Returns x as (T, B, I), whether it was batched, and whether it was integers (one-hot)."""
    x = np.asarray(x)
    one_hot = bool(np.issubdtype(x.dtype, np.integer))
    if not one_hot and x.dtype != dtype:
        raise TypeError(
            f"x: expected integers or {dtype} as the weights, got {x.dtype}; "
            f"convert with x.astype({str(dtype)!r})"
        )
    if x.ndim not in ((1, 2) if one_hot else (2, 3)):
        raise ValueError(f"x: expected a sequence or a batch of sequences, got shape {x.shape}")
    batched = x.ndim == (2 if one_hot else 3)
    x = time_major(x, batched, batch_first)
    if one_hot:
        if np.any((x < 0) | (x >= input_size)):
            raise ValueError(
                f"x: expected integers in [0, {input_size}), got {x.min()} to {x.max()}"
            )
        x = np.eye(input_size, dtype=dtype)[x]
    if x.shape[2] != input_size:
        raise ValueError(f"x: expected {input_size} features as in weight_ih_l0, got {x.shape[2]}")
    return x, batched, one_hot


def read_state(
    name: str, state: State, cell: Cell, shape: tuple[int, int, int], dtype: Any, batched: bool
) -> Array:
    """Returns a state or its gradient as (S, L*D, B, H), zeros for None; shape is (L*D, B, H)."""
    if state is None:
        return np.zeros((cell.states, *shape), dtype)
    if cell.states == 2 and (not isinstance(state, Sequence) or len(state) != 2):
        raise ValueError(f"{name}: expected a pair (h, c), got {type(state).__name__}")
    arrays = [np.asarray(array) for array in (state if cell.states == 2 else [state])]
    expected = shape if batched else (shape[0], shape[2])
    for array in arrays:
        if array.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {array.shape}")
        if array.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as the weights, got {array.dtype}")
    return np.stack(arrays).reshape(cell.states, *shape)


def write_state(state: Array, batched: bool) -> State:
    """From (S, L*D, B, H) to the caller's form: h, or (h, c) for LSTM."""
    arrays = tuple(array if batched else array[:, 0] for array in state)
    return arrays if len(arrays) == 2 else arrays[0]


def read_lengths(lengths: ArrayLike | None, steps: int, batch: int, batched: bool) -> Array:
    """Returns which steps lie within their row's length, (T, B) bool."""
    if lengths is None:
        return np.ones((steps, batch), bool)
    lengths = np.asarray(lengths)
    if not batched:
        raise ValueError("lengths: expected None for an unbatched sequence, got an array")
    if not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != (batch,) or np.any((lengths < 0) | (lengths > steps)):
        raise ValueError(f"lengths: expected {batch} integers from 0 to {steps}, got {lengths}")
    return np.asarray(np.arange(steps)[:, None] < lengths)


def read_reset(
    reset: ArrayLike | None, steps: int, batch: int, batched: bool, batch_first: bool
) -> Array:
    """Returns at which steps a new sequence begins, (T, B) bool."""
    if reset is None:
        return np.zeros((steps, batch), bool)
    reset = np.asarray(reset)
    if reset.dtype != bool:
        raise TypeError(f"reset: expected bool, got {reset.dtype}")
    expected = ((batch, steps) if batch_first else (steps, batch)) if batched else (steps,)
    if reset.shape != expected:
        raise ValueError(f"reset: expected shape {expected}, got {reset.shape}")
    return time_major(reset, batched, batch_first)


def read_dropout(
    p: float, key: int | None, shape: tuple[int, int, int], layers: int, dtype: Any
) -> list[Array | None]:
    """Returns the mask on each layer's input, None in the first; shape is that of the others."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {p}")
    if p == 0 or layers == 1:
        return [None] * layers
    if key is None:
        raise ValueError("dropout_key: expected an integer in [0, 2**64) for dropout, got None")
    masks = [dropout_mask(int(key), layer, shape, p).astype(dtype) for layer in range(1, layers)]
    return [None, *masks]


# --------------------------------------------------------------------------------------------------
# The public functions.
# --------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """The gradients of a loss with respect to everything that went in."""

    x: Array | None  # like x; None for integer input
    state: State  # like the state, also where that was the default zeros
    params: dict[str, Array]  # the names and shapes of the weights


def forward(
    cell: Cell,
    x: ArrayLike,
    weights: Mapping[str, Array],
    state: State,
    lengths: ArrayLike | None,
    reset: ArrayLike | None,
    batch_first: bool,
    dropout: float,
    dropout_key: int | None,
) -> tuple[Array, State, Tape]:
    """The forward pass of every cell; see :func:`lstm_forward` for the arguments."""
    stack, names, directions = read_weights(weights, cell.gates)
    layers = len(stack) // directions
    dtype, hidden_size, input_size = stack[0].hh.dtype, stack[0].hh.shape[1], stack[0].ih.shape[1]

    x, batched, one_hot = read_input(x, input_size, dtype, batch_first)
    T, B = x.shape[:2]
    active = read_lengths(lengths, T, B, batched)
    starts = read_reset(reset, T, B, batched, batch_first)
    initial = read_state("state", state, cell, (len(stack), B, hidden_size), dtype, batched)
    masks = read_dropout(dropout, dropout_key, (T, B, directions * hidden_size), layers, dtype)

    y, final, steps = stack_forward(cell, x, stack, initial, active, starts, masks)
    shape = (T, B, directions)
    tape = Tape(cell, stack, names, steps, masks, shape, batched, batch_first, one_hot)
    return caller_layout(y, batched, batch_first), write_state(final, batched), tape


def backward(tape: Tape, dy: ArrayLike | None, dstate: State = None) -> Gradients:
    """Exact back-propagation through time, under the names rnn_, lstm_ and gru_backward.

    Args:
        tape: from one of the ``*_forward`` functions.
        dy: gradient of y, in its shape and dtype, or None for zeros. Not read past a row's length.
        dstate: gradient of the final state, in its form, or None for zeros.

    Returns:
        The :class:`Gradients` of the loss <dy, y> + <dstate, final state>.

    Raises:
        ValueError: a shape that is not that of the forward pass.
        TypeError: a dtype that is not that of the weights.
    """
    T, B, directions = tape.shape
    dtype, hidden_size = tape.weights[0].hh.dtype, tape.weights[0].hh.shape[1]
    steps_dy = np.zeros((T, B, directions * hidden_size), dtype)
    caller_dy = caller_layout(steps_dy, tape.batched, tape.batch_first)  # a view
    if dy is not None:
        dy = np.asarray(dy)
        if dy.shape != caller_dy.shape:
            raise ValueError(f"dy: expected shape {caller_dy.shape}, got {dy.shape}")
        if dy.dtype != dtype:
            raise TypeError(f"dy: expected {dtype} as the weights, got {dy.dtype}")
        caller_dy[...] = dy
    state_shape = (len(tape.weights), B, hidden_size)
    dfinal = read_state("dstate", dstate, tape.cell, state_shape, dtype, tape.batched)

    dx, dinitial, dweights = stack_backward(tape, steps_dy, dfinal)
    params: dict[str, Array] = {}
    for group, dw in zip(tape.names, dweights, strict=True):
        params.update(zip(group, dw, strict=False))  # without bias there are two names only
    caller_dx = None if tape.one_hot else caller_layout(dx, tape.batched, tape.batch_first)
    return Gradients(caller_dx, write_state(dinitial, tape.batched), params)


rnn_backward = backward
lstm_backward = backward
gru_backward = backward


def rnn_forward(
    x: ArrayLike,
    weights: Mapping[str, Array],
    state: State = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    batch_first: bool = False,
    nonlinearity: str = "tanh",
    dropout: float = 0.0,
    dropout_key: int | None = None,
) -> tuple[Array, State, Tape]:
    """:func:`lstm_forward` for the RNN cell, whose state is h alone.

    nonlinearity is "tanh", "relu" or "sigmoid".
    """
    if nonlinearity not in RNN_CELLS:
        raise ValueError(f"nonlinearity: expected one of {list(RNN_CELLS)}, got {nonlinearity!r}")
    cell = RNN_CELLS[nonlinearity]
    return forward(cell, x, weights, state, lengths, reset, batch_first, dropout, dropout_key)


def lstm_forward(
    x: ArrayLike,
    weights: Mapping[str, Array],
    state: State = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    batch_first: bool = False,
    dropout: float = 0.0,
    dropout_key: int | None = None,
) -> tuple[Array, State, Tape]:
    """The forward pass of a stack of LSTM layers, with a tape for :func:`lstm_backward`.

    Args:
        x: the input, in the dtype of the weights: (T, B, I), with batch_first (B, T, I), or
            unbatched (T, I). Integers of shape (T, B), (B, T) or (T,) stand for one-hot rows.
        weights: arrays by PyTorch's names: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, H), bias_ih_l0
            and bias_hh_l0 (G*H,), then the same with _reverse for the second direction and l1, l2,
            … for the layers above, whose weight_ih is (G*H, D*H). Layers, directions and bias are
            inferred from the names.
        state: the initial state, (h, c), each (L*D, B, H), unbatched (L*D, H); None means zeros.
        lengths: (B,) integers from 0 to T, or None for T each.
        reset: bool in the layout of x without its features: a new sequence begins at this step, so
            that no direction carries its state over the border before it. At the first step this
            drops the initial state of the forward direction. Flags past a row's length mean
            nothing.
        batch_first: the layout of x, reset and y. States are never batch-first.
        dropout: probability with which an element of the input of layers 1, 2, … is set to zero;
            the others are divided by 1 - dropout.
        dropout_key: integer in [0, 2**64) from which the masks follow, see :func:`dropout_mask`.

    Returns:
        y (T, B, D*H) in the layout of x, 0 past a row's length; the final state, that after each
        row's last step (for the reverse direction, after step 0), in the form of ``state``; the
        tape.

    Raises:
        ValueError: a name, shape or value that does not fit.
        TypeError: a dtype that does not fit.
    """
    return forward(LSTM_CELL, x, weights, state, lengths, reset, batch_first, dropout, dropout_key)


def gru_forward(
    x: ArrayLike,
    weights: Mapping[str, Array],
    state: State = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    batch_first: bool = False,
    reset_after: bool = True,
    dropout: float = 0.0,
    dropout_key: int | None = None,
) -> tuple[Array, State, Tape]:
    """:func:`lstm_forward` for the GRU cell, whose state is h alone.

    reset_after=True is PyTorch's form, False that of Cho et al. 2014.
    """
    cell = GRU_CELLS[bool(reset_after)]
    return forward(cell, x, weights, state, lengths, reset, batch_first, dropout, dropout_key)


def rnn(
    x: ArrayLike, weights: Mapping[str, Array], state: State = None, **options: Any
) -> tuple[Array, State]:
    """Returns y and the final state; arguments as :func:`rnn_forward`."""
    return rnn_forward(x, weights, state, **options)[:2]


def lstm(
    x: ArrayLike, weights: Mapping[str, Array], state: State = None, **options: Any
) -> tuple[Array, State]:
    """Returns y and the final state; arguments as :func:`lstm_forward`."""
    return lstm_forward(x, weights, state, **options)[:2]


def gru(
    x: ArrayLike, weights: Mapping[str, Array], state: State = None, **options: Any
) -> tuple[Array, State]:
    """Returns y and the final state; arguments as :func:`gru_forward`."""
    return gru_forward(x, weights, state, **options)[:2]
