"""Plain NumPy as a careful user writes it: one product for all steps wherever there is one.

That is the input's product before the loop and those of the weight gradients after it; in the loop
remain the recurrent product and the gates, for all rows at once.
"""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import CHARACTERS, DROPOUT, INFERENCE, STEP, Array, Case, Problem
from benchmarks.peers import Job

NAME = "NumPy"


def _version() -> str:
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{np.__version__} ({blas['name']} {blas['version']})"
    except (TypeError, KeyError):  # before 1.26
        return str(np.__version__)


def _thread_setter() -> Callable[[int], Any] | None:
    """The function of the OpenBLAS in NumPy's wheel that sets its number of threads."""
    folder = os.path.dirname(np.__file__)
    for pattern in ("../numpy.libs/*openblas*", ".dylibs/*openblas*"):
        for path in glob.glob(os.path.join(folder, pattern)):
            library = ctypes.CDLL(path)
            for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
                if hasattr(library, name):
                    return getattr(library, name)  # type: ignore[no-any-return]
    return None


VERSION = _version()
_set_threads = _thread_setter()
THREADS = _set_threads is not None


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# Each cell: forward(a_x, w_hh, b_hh, state) with a_x (T, B, G*H) the input's part of the
# pre-activations, biases included (GRU: without b_hh), → y (T, B, H), state, saved. And
# backward(dy, w_hh, saved) → da_x, da_h (T, B, G*H): the gradients of the input's and of the
# recurrent part of the pre-activations.


def rnn(a_x: Array, w_hh: Array, b_hh: Array, state: list[Array]) -> Any:
    (h,) = state
    y = np.empty((*a_x.shape[:2], h.shape[1]), h.dtype)
    for t in range(len(a_x)):
        h = np.tanh(a_x[t] + h @ w_hh.T, out=y[t])
    return y, [h], (y,)


def rnn_backward(dy: Array, w_hh: Array, saved: Any) -> tuple[Array, Array]:
    (y,) = saved
    da, dh = np.empty_like(dy), np.zeros_like(dy[0])
    for t in reversed(range(len(dy))):
        np.multiply(dy[t] + dh, 1 - y[t] * y[t], out=da[t])
        dh = da[t] @ w_hh
    return da, da


def lstm(a_x: Array, w_hh: Array, b_hh: Array, state: list[Array]) -> Any:
    h, c = state
    H = h.shape[1]
    y = np.empty((*a_x.shape[:2], H), h.dtype)
    gates, cells, tanhs = [], [c], []
    for t in range(len(a_x)):
        a = a_x[t] + h @ w_hh.T
        i_f, g, o = sigmoid(a[:, : 2 * H]), np.tanh(a[:, 2 * H : 3 * H]), sigmoid(a[:, 3 * H :])
        c = i_f[:, H:] * c + i_f[:, :H] * g
        tanh_c = np.tanh(c)
        h = np.multiply(o, tanh_c, out=y[t])
        gates.append((i_f, g, o))
        cells.append(c)
        tanhs.append(tanh_c)
    return y, [h, c], (gates, cells, tanhs)


def lstm_backward(dy: Array, w_hh: Array, saved: Any) -> tuple[Array, Array]:
    gates, cells, tanhs = saved
    T, B, H = dy.shape
    da = np.empty((T, B, 4 * H), dy.dtype)
    dh = dc = np.zeros_like(dy[0])
    for t in reversed(range(T)):
        (i_f, g, o), tanh_c = gates[t], tanhs[t]
        i, f = i_f[:, :H], i_f[:, H:]
        dh = dh + dy[t]
        dc = dc + dh * o * (1 - tanh_c * tanh_c)
        da[t, :, :H] = dc * g * i * (1 - i)
        da[t, :, H : 2 * H] = dc * cells[t] * f * (1 - f)
        da[t, :, 2 * H : 3 * H] = dc * i * (1 - g * g)
        da[t, :, 3 * H :] = dh * tanh_c * o * (1 - o)
        dc = dc * f
        dh = da[t] @ w_hh
    return da, da


def gru(a_x: Array, w_hh: Array, b_hh: Array, state: list[Array]) -> Any:
    (h,) = state
    H = h.shape[1]
    y = np.empty((*a_x.shape[:2], H), h.dtype)
    saved = []
    for t in range(len(a_x)):
        a_h = h @ w_hh.T + b_hh
        r_z = sigmoid(a_x[t, :, : 2 * H] + a_h[:, : 2 * H])
        q = a_h[:, 2 * H :]
        n = np.tanh(a_x[t, :, 2 * H :] + r_z[:, :H] * q)
        saved.append((h, r_z, n, q))
        h = np.add(n, r_z[:, H:] * (h - n), out=y[t])
    return y, [h], saved


def gru_backward(dy: Array, w_hh: Array, saved: Any) -> tuple[Array, Array]:
    T, B, H = dy.shape
    da_x, da_h = np.empty((T, B, 3 * H), dy.dtype), np.empty((T, B, 3 * H), dy.dtype)
    dh = np.zeros_like(dy[0])
    for t in reversed(range(T)):
        h, r_z, n, q = saved[t]
        r, z = r_z[:, :H], r_z[:, H:]
        dh = dh + dy[t]
        dn = dh * (1 - z) * (1 - n * n)
        da_x[t, :, :H] = dn * q * r * (1 - r)
        da_x[t, :, H : 2 * H] = dh * (h - n) * z * (1 - z)
        da_x[t, :, 2 * H :] = dn
        da_h[t, :, : 2 * H] = da_x[t, :, : 2 * H]
        da_h[t, :, 2 * H :] = dn * r
        dh = dh * z + da_h[t] @ w_hh
    return da_x, da_h


FORWARD = {"RNN": rnn, "LSTM": lstm, "GRU": gru}
BACKWARD = {"RNN": rnn_backward, "LSTM": lstm_backward, "GRU": gru_backward}


def zeros(case: Case) -> list[Array]:
    return [np.zeros((case.B, case.H), case.dtype) for _ in range(2 if case.cell == "LSTM" else 1)]


def forward(case: Case, x: Array, weights: list[Array], state: list[Array]) -> Any:
    w_ih, w_hh, b_ih, b_hh = weights
    b = b_ih if case.cell == "GRU" else b_ih + b_hh
    a_x = (x.reshape(-1, x.shape[2]) @ w_ih.T + b).reshape(*x.shape[:2], -1)
    return FORWARD[case.cell](a_x, w_hh, b_hh, state)


def backward(
    case: Case,
    x: Array | None,
    y: Array,
    weights: list[Array],
    state: list[Array],
    dy: Array,
    saved: Any,
) -> tuple[Array, Array, Array, list[Array]]:
    """da_x (T*B, G*H), dx, dW_ih and the rest; x None: the caller has its own input."""
    w_ih, w_hh, _, _ = weights
    da_x, da_h = BACKWARD[case.cell](dy, w_hh, saved)
    before = np.concatenate([state[0][None], y[:-1]])  # h before each step
    da_x, da_h = da_x.reshape(-1, da_x.shape[2]), da_h.reshape(-1, da_h.shape[2])
    dw_hh = da_h.T @ before.reshape(-1, case.H)
    biases = [da_x.sum(axis=0), da_h.sum(axis=0)]
    if x is None:
        return da_x, np.empty(0), np.empty(0), [dw_hh, *biases]
    dx = (da_x @ w_ih).reshape(x.shape)
    return da_x, dx, da_x.T @ x.reshape(-1, x.shape[2]), [dw_hh, *biases]


def prepare(problem: Problem, threads: int) -> Job | None:
    case, x = problem.case, problem.x

    def select() -> None:
        if _set_threads is not None:
            _set_threads(threads)

    arrays = list(problem.weights.values())
    weights = [arrays[k : k + 4] for k in range(0, len(arrays), 4)]
    if case.kind == CHARACTERS:
        return characters(problem, weights[0])._replace(select=select)
    if case.ragged or (case.kind != INFERENCE and not case.plain):
        return None
    if case.kind == STEP:
        return one_step(problem, weights[0])._replace(select=select)

    def infer() -> Array:
        y = x
        for layer in range(case.layers):
            w = weights[layer * case.directions :]
            ahead = forward(case, y, w[0], zeros(case))[0]
            if case.bidirectional:
                back = forward(case, y[::-1], w[1], zeros(case))[0][::-1]
                ahead = np.concatenate([ahead, back], axis=2)
            y = ahead
        return y

    if case.kind == INFERENCE:
        return Job(infer, lambda: [infer()], select)

    def train() -> list[Array]:
        state = zeros(case)
        y, _, saved = forward(case, x, weights[0], state)
        _, dx, dw_ih, rest = backward(case, x, y, weights[0], state, problem.dy, saved)
        return [y, dx, dw_ih, *rest]

    return Job(train, train, select)


def one_step(problem: Problem, weights: list[Array]) -> Job:
    case, x = problem.case, problem.x
    state = zeros(case)

    def step() -> Array:
        nonlocal state
        y, state, _ = forward(case, x, weights, state)
        return np.asarray(y[0])

    def check() -> list[Array]:
        nonlocal state
        state = zeros(case)
        return [[step() for _ in range(3)][-1]]

    return Job(step, check)


def characters(problem: Problem, weights: list[Array]) -> Job:
    case, ids, targets = problem.case, problem.x, problem.dy.reshape(-1)
    weights = [array.copy() for array in weights]
    head, head_bias = (array.copy() for array in problem.head)
    parameters = [*weights, head, head_bias]
    moments = [(np.zeros_like(array), np.zeros_like(array)) for array in parameters]
    rng = np.random.default_rng(0)
    state, steps = zeros(case), 0
    pick = np.arange(targets.size)

    def hidden(start: list[Array]) -> Any:
        w_ih, w_hh, b_ih, b_hh = weights
        a_x = w_ih.T[ids] + (b_ih + b_hh)  # a one-hot row picks a column
        return lstm(a_x, w_hh, b_hh, start)

    def step() -> None:
        nonlocal state, steps
        y, after, saved = hidden(state)
        mask = (rng.random(y.shape, np.float32) >= DROPOUT) * np.float32(1 / (1 - DROPOUT))
        dropped = (y * mask).reshape(-1, case.H)
        logits = dropped @ head.T + head_bias
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[pick, targets] -= 1
        p /= targets.size
        dy = (p @ head).reshape(y.shape) * mask
        da_x, _, _, rest = backward(case, None, y, weights, state, dy, saved)
        one_hot = np.zeros((ids.size, case.inputs), np.float32)
        one_hot[pick, ids.reshape(-1)] = 1
        gradients = [da_x.T @ one_hot, *rest, p.T @ dropped, p.sum(axis=0)]
        norm = np.sqrt(sum(float(np.vdot(g, g)) for g in gradients))
        scale, state, steps = np.float32(min(1.0, 1.0 / norm)), after, steps + 1
        rate = 1e-3 * np.sqrt(1 - 0.999**steps) / (1 - 0.9**steps)
        for array, g, (m, v) in zip(parameters, gradients, moments, strict=True):
            g *= scale
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.001) * (g * g - v)
            array -= np.float32(rate) * m / (np.sqrt(v) + np.float32(1e-8))

    def check() -> list[Array]:
        y = hidden(zeros(case))[0]
        return [y @ head.T + head_bias]

    return Job(step, check)
