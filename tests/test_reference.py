"""The specification itself: fastrnn.reference against calculus, arithmetic and PyTorch.

Everything else is tested against the reference, so here it must stand on what does not come from
us: central differences and complex-step derivatives of its own forward pass, values worked out by
hand, runs on sequences cut by hand, and torch.nn where it is installed.
"""

from __future__ import annotations

import ast
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    CELLS,
    FINITE_DIFFERENCE_ATOL,
    FINITE_DIFFERENCE_RTOL,
    map_state,
    random_state,
    random_weights,
    state_arrays,
)
from fastrnn import reference

KEY = 0x123456789ABCDEF0


def forward(cell: str, *args: Any, **options: Any) -> Any:
    """The reference's forward pass for a name in CELLS."""
    family, cell_options = CELLS[cell]
    return getattr(reference, f"{family}_forward")(*args, **cell_options, **options)


def backward(cell: str, *args: Any) -> Any:
    """The reference's backward pass for a name in CELLS."""
    return getattr(reference, f"{CELLS[cell][0]}_backward")(*args)


def problem(
    cell: str,
    rng: np.random.Generator,
    *,
    T: int = 3,
    B: int = 3,
    I: int = 2,
    H: int = 2,
    L: int = 1,
    D: int = 1,
    bias: bool = True,
) -> tuple[np.ndarray, dict[str, np.ndarray], Any]:
    """Random float64 x, weights and state, all fresh arrays."""
    family = CELLS[cell][0]
    weights = random_weights(family, I, H, L, D, bias, np.float64, rng)
    state = random_state(family, (L * D, B, H), np.float64, rng)
    return rng.standard_normal((T, B, I)), weights, state


def like(arrays: Any, rng: np.random.Generator) -> Any:
    """Random numbers in the shape of an array or of a state."""
    return map_state(lambda array: rng.standard_normal(array.shape), arrays)


def dot(a: Any, b: Any) -> float:
    """The inner product of two arrays or two states."""
    pairs = zip(state_arrays(a), state_arrays(b), strict=True)
    return sum(float(np.sum(u * v)) for u, v in pairs)


# --- Finite differences -------------------------------------------------------------------------


def check_finite_differences(
    cell: str, x: np.ndarray, weights: Any, state: Any, rng: np.random.Generator, **options: Any
) -> None:
    """Every element of every gradient against a central difference of <dy, y> + <ds, state>."""
    y, final, tape = forward(cell, x, weights, state, **options)
    dy, dfinal = like(y, rng), like(final, rng)
    compare_with_differences(cell, x, weights, state, tape, dy, dfinal, **options)


def compare_with_differences(
    cell: str, x: Any, weights: Any, state: Any, tape: Any, dy: Any, dfinal: Any, **options: Any
) -> None:
    gradients = backward(cell, tape, dy, dfinal)

    def loss() -> float:
        y, final, _ = forward(cell, x, weights, state, **options)
        return dot(dy, y) + dot(dfinal, final)

    assert list(gradients.params) == list(weights)
    pairs = [
        (f"state[{k}]", *pair)
        for k, pair in enumerate(
            zip(state_arrays(state), state_arrays(gradients.state), strict=True)
        )
    ]
    pairs += [(name, weights[name], gradients.params[name]) for name in weights]
    if gradients.x is not None:
        pairs.append(("x", x, gradients.x))
    for what, values, gradient in pairs:
        assert gradient.shape == values.shape
        numeric = np.empty_like(values)
        for index in np.ndindex(values.shape):
            value, losses = values[index], []
            for step in (1e-5, -1e-5):
                values[index] = value + step
                losses.append(loss())
            values[index] = value
            numeric[index] = (losses[0] - losses[1]) / 2e-5
        np.testing.assert_allclose(
            gradient,
            numeric,
            rtol=FINITE_DIFFERENCE_RTOL,
            atol=FINITE_DIFFERENCE_ATOL,
            err_msg=what,
        )


@pytest.mark.parametrize("lengths", [None, [2, 0, 3]], ids=["padded", "lengths"])
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences(
    cell: str, bias: bool, D: int, L: int, lengths: Any, rng: np.random.Generator
) -> None:
    x, weights, state = problem(cell, rng, L=L, D=D, bias=bias)
    check_finite_differences(cell, x, weights, state, rng, lengths=lengths)


@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences_with_resets_and_dropout(cell: str, rng: np.random.Generator) -> None:
    x, weights, state = problem(cell, rng, T=4, L=2, D=2)
    reset = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]], bool)
    options = {"reset": reset, "lengths": [4, 2, 4], "dropout": 0.4, "dropout_key": KEY}
    check_finite_differences(cell, x, weights, state, rng, **options)


@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences_with_integer_input(cell: str, rng: np.random.Generator) -> None:
    _, weights, state = problem(cell, rng, I=4, D=2)
    ids = rng.integers(4, size=(3, 3), dtype=np.uint8)
    check_finite_differences(cell, ids, weights, state, rng, lengths=[3, 1, 2])


@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences_catch_a_transposed_weight_hh(
    cell: str, rng: np.random.Generator
) -> None:
    """The classic slip, da W_hh^T in place of da W_hh, gate by gate so that the shapes agree."""
    x, weights, state = problem(cell, rng)
    y, final, tape = forward(cell, x, weights, state)
    (w,) = tape.weights
    transposed = np.concatenate([gate.T for gate in np.split(w.hh, len(w.hh) // 2)])
    wrong = tape._replace(weights=[w._replace(hh=transposed)])
    dy, dfinal = like(y, rng), like(final, rng)
    compare_with_differences(cell, x, weights, state, tape, dy, dfinal)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare_with_differences(cell, x, weights, state, wrong, dy, dfinal)


# --- Adjointness --------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_backward_is_the_adjoint_of_the_derivative(cell: str, rng: np.random.Generator) -> None:
    """<dy, J v> = <J^T dy, v> to rounding, with J v by a complex step (Squire & Trapp 1998).

    f(a + i e v) = f(a) + i e J v + O(e^2) has no cancellation, so e may be so small that the
    derivative is exact, and the problem may be large.
    """
    x, weights, state = problem(cell, rng, T=20, B=5, I=4, H=7, L=2, D=2)
    reset = rng.random((20, 5)) < 0.1
    options: dict[str, Any] = {"lengths": [20, 3, 0, 11, 20], "reset": reset}
    options |= {"dropout": 0.3, "dropout_key": KEY}
    vx, vstate = like(x, rng), like(state, rng)
    vweights = {name: like(array, rng) for name, array in weights.items()}

    y, final, tape = forward(cell, x, weights, state, **options)
    dy, dfinal = like(y, rng), like(final, rng)
    gradients = backward(cell, tape, dy, dfinal)
    pulled = dot(gradients.x, vx) + dot(gradients.state, vstate)
    pulled += sum(dot(gradients.params[name], vweights[name]) for name in weights)

    step = 1e-30
    moved = {name: weights[name] + 1j * step * vweights[name] for name in weights}
    moved_state = (
        state + 1j * step * vstate
        if not isinstance(state, tuple)
        else tuple(a + 1j * step * v for a, v in zip(state, vstate, strict=True))
    )
    jy, jfinal, _ = forward(cell, x + 1j * step * vx, moved, moved_state, **options)
    pushed = dot(dy, jy.imag / step) + dot(dfinal, map_state(lambda a: a.imag / step, jfinal))

    assert abs(pushed) > 1e-3
    assert pulled == pytest.approx(pushed, rel=1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_is_linear_and_none_means_zeros(cell: str, rng: np.random.Generator) -> None:
    x, weights, state = problem(cell, rng, T=5, L=2, D=2)
    y, final, tape = forward(cell, x, weights, state)
    dy, dfinal = like(y, rng), like(final, rng)
    both = backward(cell, tape, dy, dfinal)
    first, second = backward(cell, tape, dy), backward(cell, tape, None, dfinal)
    np.testing.assert_allclose(first.x + second.x, both.x, rtol=0, atol=1e-13)
    for name, gradient in both.params.items():
        np.testing.assert_allclose(
            first.params[name] + second.params[name], gradient, rtol=0, atol=1e-13
        )
    nothing = backward(cell, tape, None)
    assert not nothing.x.any()
    assert not any(gradient.any() for gradient in nothing.params.values())


# --- Values worked out by hand ------------------------------------------------------------------


def logistic(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def scalar_weights(**gates: list[float]) -> dict[str, np.ndarray]:
    """Weights for I = H = 1: one number a gate for each kind."""
    weights = {}
    for kind, values in gates.items():
        column = np.array(values)
        weights[f"{kind}_l0"] = column if kind.startswith("bias") else column[:, None]
    return weights


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_by_hand(reset_after: bool) -> None:
    """Two steps of one unit, each formula written out: r, z, n and h' in both forms."""
    weights = scalar_weights(
        weight_ih=[0.5, -0.3, 0.8],
        weight_hh=[-0.7, 0.4, 1.1],
        bias_ih=[0.1, -0.2, 0.3],
        bias_hh=[0.05, 0.15, -0.25],
    )
    h, outputs = 0.6, []
    for x in (1.5, -2.0):
        r = logistic(0.5 * x + 0.1 + -0.7 * h + 0.05)
        z = logistic(-0.3 * x - 0.2 + 0.4 * h + 0.15)
        if reset_after:
            n = math.tanh(0.8 * x + 0.3 + r * (1.1 * h - 0.25))
        else:
            n = math.tanh(0.8 * x + 0.3 + 1.1 * (r * h) - 0.25)
        h = (1 - z) * n + z * h
        outputs.append(h)
    x_t = np.array([[1.5], [-2.0]])
    y, final = reference.gru(x_t, weights, np.array([[0.6]]), reset_after=reset_after)
    np.testing.assert_allclose(y[:, 0], outputs, rtol=1e-15)
    np.testing.assert_allclose(final, [[h]], rtol=1e-15)


def test_gru_forms_differ_only_through_the_reset_gate(rng: np.random.Generator) -> None:
    """With r = 1 (a large bias) there is nothing to reset, and both forms are one function."""
    x, weights, state = problem("gru_reset_after", rng)
    y_after, _ = reference.gru(x, weights, state)
    y_before, _ = reference.gru(x, weights, state, reset_after=False)
    assert np.abs(y_after - y_before).max() > 1e-4
    weights["bias_ih_l0"][:2] = 100
    y_after, _ = reference.gru(x, weights, state)
    y_before, _ = reference.gru(x, weights, state, reset_after=False)
    np.testing.assert_allclose(y_after, y_before, rtol=1e-14)


def test_lstm_by_hand() -> None:
    """Two steps of one unit with gates in the order i, f, g, o."""
    weights = scalar_weights(
        weight_ih=[0.5, -0.3, 0.8, 0.2],
        weight_hh=[-0.7, 0.4, 1.1, -0.6],
        bias_ih=[0.1, 1.0, 0.3, 0.0],
        bias_hh=[0.05, 0.15, -0.25, 0.4],
    )
    h, c = 0.6, -0.4
    for x in (1.5, -2.0):
        i = logistic(0.5 * x + 0.1 - 0.7 * h + 0.05)
        f = logistic(-0.3 * x + 1.0 + 0.4 * h + 0.15)
        g = math.tanh(0.8 * x + 0.3 + 1.1 * h - 0.25)
        o = logistic(0.2 * x - 0.6 * h + 0.4)
        c = f * c + i * g
        h = o * math.tanh(c)
    state = (np.array([[0.6]]), np.array([[-0.4]]))
    y, (h_n, c_n) = reference.lstm(np.array([[1.5], [-2.0]]), weights, state)
    np.testing.assert_allclose([y[1, 0], h_n[0, 0], c_n[0, 0]], [h, h, c], rtol=1e-15)


@pytest.mark.parametrize(
    ("nonlinearity", "function"),
    [("tanh", math.tanh), ("relu", lambda a: max(a, 0.0)), ("sigmoid", logistic)],
)
def test_rnn_by_hand(nonlinearity: str, function: Any) -> None:
    weights = scalar_weights(weight_ih=[0.5], weight_hh=[-0.7], bias_ih=[0.1], bias_hh=[0.05])
    h, outputs = 0.6, []
    for x in (1.5, -2.0):
        h = function(0.5 * x + 0.1 - 0.7 * h + 0.05)
        outputs.append(h)
    x_t = np.array([[1.5], [-2.0]])
    y, _ = reference.rnn(x_t, weights, np.array([[0.6]]), nonlinearity=nonlinearity)
    np.testing.assert_allclose(y[:, 0], outputs, rtol=1e-15)


def test_saturated_gates_are_exact_and_silent(rng: np.random.Generator) -> None:
    """1e30 and Inf saturate the gates: finite outputs and (warnings are errors) no warning."""
    x, weights, _ = problem("lstm", rng, I=1)
    for value in (1e30, -1e30, math.inf, -math.inf):
        x[1] = value
        y, (h, c) = reference.lstm(x, weights)
        assert np.isfinite(y).all() and np.isfinite(h).all() and np.isfinite(c).all()


# --- Resets and lengths -------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [9, 6, 0, 7]], ids=["padded", "lengths"])
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_reset_equals_segments_cut_by_hand(
    cell: str, L: int, lengths: Any, rng: np.random.Generator
) -> None:
    """Each row's segments, run alone and unbatched, give the outputs, states and every gradient.

    Only the first segment starts from the forward direction's initial state (and it does not if
    there is a reset at step 0), only the last one from the reverse direction's.
    """
    T, B, D = 9, 4, 2
    x, weights, state = problem(cell, rng, T=T, B=B, H=3, L=L, D=D)
    reset = np.zeros((T, B), bool)
    reset[[0, 4], 0] = reset[[1, 2, 8], 1] = reset[3, 2] = reset[[5, 7], 3] = True
    y, final, tape = forward(cell, x, weights, state, reset=reset, lengths=lengths)
    dy, dfinal = like(y, rng), like(final, rng)
    gradients = backward(cell, tape, dy, dfinal)

    sums = {name: np.zeros_like(array) for name, array in weights.items()}
    for b, length in enumerate(lengths or [T] * B):
        row = map_state(lambda array, b=b: array[:, b], state)
        borders = sorted({0, length, *np.flatnonzero(reset[:length, b])})
        for start, stop in itertools.pairwise(borders):
            begins = start == 0 and not reset[0, b]
            ends = stop == length
            initial = map_state(np.copy, row)
            dsegment = map_state(lambda array, b=b: array[:, b].copy(), dfinal)
            for array, d in zip(state_arrays(initial), state_arrays(dsegment), strict=True):
                array[0::2] *= begins
                array[1::2] *= ends
                d[0::2] *= ends  # the forward direction's final state comes from the last segment
                d[1::2] *= start == 0
            y_cut, final_cut, tape_cut = forward(cell, x[start:stop, b], weights, initial)
            np.testing.assert_allclose(y[start:stop, b], y_cut, rtol=0, atol=1e-14)
            cut = backward(cell, tape_cut, dy[start:stop, b], dsegment)
            np.testing.assert_allclose(gradients.x[start:stop, b], cut.x, rtol=0, atol=1e-13)
            for name in sums:
                sums[name] += cut.params[name]
            for k in range(L * D):
                reverse = k % 2 == 1
                if start == 0 if reverse else ends:
                    for whole, part in zip(
                        state_arrays(final), state_arrays(final_cut), strict=True
                    ):
                        np.testing.assert_allclose(whole[k, b], part[k], rtol=0, atol=1e-14)
                if start == 0 if not reverse else ends:
                    used = ends if reverse else begins
                    for whole, part in zip(
                        state_arrays(gradients.state), state_arrays(cut.state), strict=True
                    ):
                        np.testing.assert_allclose(whole[k, b], part[k] * used, rtol=0, atol=1e-13)
    for name, total in sums.items():
        np.testing.assert_allclose(gradients.params[name], total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_rows_end_at_their_lengths(cell: str, rng: np.random.Generator) -> None:
    """Each row is as if run alone; beyond it y and dx are 0, and NaN there reaches nothing."""
    x, weights, state = problem(cell, rng, T=6, B=4, L=2, D=2)
    lengths = [4, 6, 0, 1]
    past = np.arange(6)[:, None] >= lengths
    x[past] = np.nan
    reset = past.copy()  # flags there mean nothing either
    y, final, tape = forward(cell, x, weights, state, lengths=lengths, reset=reset)
    dy, dfinal = like(y, rng), like(final, rng)
    dy[past] = np.nan
    gradients = backward(cell, tape, dy, dfinal)
    assert not y[past].any() and not gradients.x[past].any()
    assert all(np.isfinite(gradient).all() for gradient in gradients.params.values())

    for b, length in enumerate(lengths):
        alone = map_state(lambda array, b=b: array[:, b], state)
        y_b, final_b, tape_b = forward(cell, x[:length, b], weights, alone)
        dfinal_b = map_state(lambda array, b=b: array[:, b], dfinal)
        gradients_b = backward(cell, tape_b, dy[:length, b], dfinal_b)
        np.testing.assert_allclose(y[:length, b], y_b, rtol=0, atol=1e-14)
        np.testing.assert_allclose(gradients.x[:length, b], gradients_b.x, rtol=0, atol=1e-13)
        for whole, part in (
            *zip(state_arrays(final), state_arrays(final_b), strict=True),
            *zip(state_arrays(gradients.state), state_arrays(gradients_b.state), strict=True),
        ):
            np.testing.assert_allclose(whole[:, b], part, rtol=0, atol=1e-13)
    for array, initial in zip(state_arrays(final), state_arrays(state), strict=True):
        np.testing.assert_array_equal(array[:, 2], initial[:, 2])


@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("cell", CELLS)
def test_empty_sequences_and_batches(cell: str, T: int, B: int, rng: np.random.Generator) -> None:
    x, weights, state = problem(cell, rng, T=T, B=B, L=2, D=2)
    y, final, tape = forward(cell, x, weights, state)
    assert y.shape == (T, B, 4)
    gradients = backward(cell, tape, y, final)
    assert gradients.x.shape == x.shape
    for got, initial in zip(state_arrays(final), state_arrays(state), strict=True):
        np.testing.assert_array_equal(got, initial)
    for got, given in zip(state_arrays(gradients.state), state_arrays(final), strict=True):
        np.testing.assert_array_equal(got, given)
    assert not any(gradient.any() for gradient in gradients.params.values())


# --- Layouts, integers, dtypes ------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_layouts_are_one_computation(cell: str, rng: np.random.Generator) -> None:
    """batch_first and unbatched are the same numbers in other places."""
    x, weights, state = problem(cell, rng, T=4, B=1, L=2, D=2)
    reset = np.array([[0], [1], [0], [1]], bool)
    y, final, tape = forward(cell, x, weights, state, reset=reset)
    dy, dfinal = like(y, rng), like(final, rng)
    gradients = backward(cell, tape, dy, dfinal)

    def squeeze(array: np.ndarray) -> np.ndarray:
        return array[:, 0]

    def swap(array: np.ndarray) -> np.ndarray:
        return np.swapaxes(array, 0, 1)

    def same(array: np.ndarray) -> np.ndarray:
        return array

    cases = [(swap, same, True), (squeeze, squeeze, False), (squeeze, squeeze, True)]
    for change, change_state, batch_first in cases:
        y_c, final_c, tape_c = forward(
            cell,
            change(x),
            weights,
            map_state(change_state, state),
            reset=change(reset),
            batch_first=batch_first,
        )
        gradients_c = backward(cell, tape_c, change(dy), map_state(change_state, dfinal))
        np.testing.assert_array_equal(y_c, change(y))
        np.testing.assert_array_equal(gradients_c.x, change(gradients.x))
        for name in weights:
            np.testing.assert_array_equal(gradients_c.params[name], gradients.params[name])
        for got, want in ((final_c, final), (gradients_c.state, gradients.state)):
            for a, b in zip(state_arrays(got), state_arrays(want), strict=True):
                np.testing.assert_array_equal(a, change_state(b))


@pytest.mark.parametrize("cell", CELLS)
def test_integers_are_one_hot_rows(cell: str, rng: np.random.Generator) -> None:
    _, weights, state = problem(cell, rng, I=5, D=2)
    ids = rng.integers(5, size=(3, 3), dtype=np.int16)
    y, _, tape = forward(cell, ids, weights, state)
    y_hot, _, tape_hot = forward(cell, np.eye(5)[ids], weights, state)
    np.testing.assert_array_equal(y, y_hot)
    gradients, gradients_hot = backward(cell, tape, y), backward(cell, tape_hot, y)
    assert gradients.x is None
    np.testing.assert_array_equal(
        gradients.params["weight_ih_l0"], gradients_hot.params["weight_ih_l0"]
    )
    y_first, _, _ = forward(cell, ids.T, weights, state, batch_first=True)
    np.testing.assert_array_equal(y_first, np.swapaxes(y, 0, 1))
    alone, _, _ = forward(cell, ids[:, 1], weights, map_state(lambda a: a[:, 1], state))
    np.testing.assert_allclose(alone, y[:, 1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
@pytest.mark.parametrize("cell", CELLS)
def test_computes_in_the_dtype_of_the_weights(
    cell: str, dtype: Any, rng: np.random.Generator
) -> None:
    x, weights, state = problem(cell, rng, L=2)
    y64, _, _ = forward(cell, x, weights, state)
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    y, final, tape = forward(
        cell,
        x.astype(dtype),
        weights,
        map_state(lambda a: a.astype(dtype), state),
        dropout=0.0,
    )
    gradients = backward(cell, tape, y, final)
    arrays = [y, gradients.x, *state_arrays(final), *state_arrays(gradients.state)]
    arrays += gradients.params.values()
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}
    error = {np.float16: 1e-2, np.float32: 1e-6, np.longdouble: 1e-15}[dtype]
    np.testing.assert_allclose(y.astype(np.float64), y64, rtol=0, atol=error)


def test_the_tape_holds_copies_and_serves_again(rng: np.random.Generator) -> None:
    x, weights, state = problem("lstm", rng, L=2)
    y, _, tape = reference.lstm_forward(x, weights, state)
    before = reference.lstm_backward(tape, y)
    for array in (x, *weights.values(), *state):
        array[...] = 7
    after = reference.lstm_backward(tape, y)
    np.testing.assert_array_equal(before.x, after.x)
    for name in weights:
        np.testing.assert_array_equal(before.params[name], after.params[name])


@pytest.mark.parametrize("cell", CELLS)
def test_arguments_are_left_as_they_were(cell: str, rng: np.random.Generator) -> None:
    x, weights, state = problem(cell, rng, L=2, D=2)
    reset = np.ones((3, 3), bool)
    y, final, tape = forward(cell, x, weights, state, reset=reset)
    arrays = [x, y, reset, *weights.values(), *state_arrays(state), *state_arrays(final)]
    copies = [array.copy() for array in arrays]
    forward(cell, x, weights, state, reset=reset)
    backward(cell, tape, y, final)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_short_functions_are_the_forward_pass_without_tape(rng: np.random.Generator) -> None:
    for cell, (family, options) in CELLS.items():
        x, weights, state = problem(cell, rng)
        y, final, _ = forward(cell, x, weights, state)
        y_short, final_short = getattr(reference, family)(x, weights, state, **options)
        np.testing.assert_array_equal(y, y_short)
        for a, b in zip(state_arrays(final), state_arrays(final_short), strict=True):
            np.testing.assert_array_equal(a, b)


# --- Dropout ------------------------------------------------------------------------------------


def test_splitmix64_known_values() -> None:
    """The first two outputs for seed 0 of the authors' own implementation."""
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert reference.splitmix64(states).tolist() == outputs


def test_dropout_mask_in_python_integers() -> None:
    """The mask again, element by element, in arithmetic that cannot overflow."""

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    T, B, F, layer, key = 3, 2, 5, 2, 2**64 - 1
    layer_key = mix((key + layer) % 2**64)
    p = (mix(layer_key + 7) >> 11) / 2**53  # element 7 meets p exactly, and is kept
    assert 0.1 < p < 0.9
    mask = reference.dropout_mask(key, layer, (T, B, F), p)
    for t, b, j in np.ndindex(T, B, F):
        uniform = (mix((layer_key + (t * B + b) * F + j) % 2**64) >> 11) / 2**53
        assert mask[t, b, j] == (1 / (1 - p) if uniform >= p else 0)
    assert mask.flat[7] > 0


def test_dropout_mask_has_the_right_mean_and_no_pattern() -> None:
    kept = reference.dropout_mask(KEY, 1, (100, 10, 100), 0.25) > 0
    other = reference.dropout_mask(KEY, 2, (100, 10, 100), 0.25) > 0
    deviation = math.sqrt(0.25 * 0.75 / kept.size)
    assert abs(kept.mean() - 0.75) < 4 * deviation
    assert abs((kept & other).mean() - 0.75**2) < 5 * deviation
    assert np.abs(kept.mean(axis=(0, 1)) - 0.75).max() < 5 * math.sqrt(0.25 * 0.75 / 1000)
    # Nothing is dropped at p = 0.
    np.testing.assert_array_equal(reference.dropout_mask(KEY, 1, (2, 3, 4), 0.0), 1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_is_a_mask_between_layers(
    cell: str, batch_first: bool, rng: np.random.Generator
) -> None:
    """Three layers one at a time, each later input multiplied by its mask."""
    T, B, H, L, D = 4, 3, 2, 3, 2
    x, weights, state = problem(cell, rng, T=T, B=B, H=H, L=L, D=D)
    given = np.swapaxes(x, 0, 1) if batch_first else x
    options = {"dropout": 0.5, "dropout_key": KEY, "batch_first": batch_first}
    y, _, _ = forward(cell, given, weights, state, **options)
    for layer in range(L):
        own = {
            name.replace(f"_l{layer}", "_l0"): array
            for name, array in weights.items()
            if f"_l{layer}" in name
        }
        layer_state = map_state(lambda a, k=D * layer: a[k : k + D], state)
        if layer > 0:
            x = x * reference.dropout_mask(KEY, layer, (T, B, D * H), 0.5)
        x, _, _ = forward(cell, x, own, layer_state)
    np.testing.assert_array_equal(np.swapaxes(y, 0, 1) if batch_first else y, x)


# --- Errors -------------------------------------------------------------------------------------


def test_errors_name_the_argument(rng: np.random.Generator) -> None:
    x, weights, state = problem("lstm", rng, L=2, D=2)
    ids = np.zeros((3, 3), int)
    h = state[0]
    y, final, tape = reference.lstm_forward(x, weights, state)

    def without(name: str) -> dict[str, np.ndarray]:
        return {key: array for key, array in weights.items() if key != name}

    def call(*args: Any, **options: Any) -> Any:
        return lambda: reference.lstm(*args, **options)

    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "weights: expected names with", call(x, without("weight_ih_l0"), state)),
        (ValueError, "weights: expected the names", call(x, without("bias_hh_l1"), state)),
        (ValueError, r"weights\['bias_ih_l0'\]: ", call(x, weights | {"bias_ih_l0": h[0]})),
        (ValueError, r"weights\['weight_hh_l1'\]: ", call(x, weights | {"weight_hh_l1": h})),
        (TypeError, "weights", call(x, weights | {"bias_ih_l0": np.zeros(8, np.float32)})),
        (
            TypeError,
            "x: expected integers or float64 as the weights, got float32",
            call(x.astype(np.float32), weights),
        ),
        (TypeError, "x: ", call(np.ones((3, 3, 2), bool), weights)),
        (ValueError, "x: ", call(x[0, 0], weights)),
        (ValueError, "x: expected 2 features", call(np.zeros((3, 3, 5)), weights)),
        (ValueError, r"x: expected integers in \[0, 2\)", call(ids + 2, weights)),
        (ValueError, r"x: expected integers in \[0, 2\)", call(ids - 1, weights)),
        (ValueError, "state: expected a pair", call(x, weights, h)),
        (ValueError, "state: expected shape", call(x, weights, (h, h[:, :2]))),
        (ValueError, "state: expected shape", call(x[:, 0], weights, (h, h))),
        (TypeError, "state: ", call(x, weights, (h, h.astype(np.float32)))),
        (ValueError, "lengths: ", call(x, weights, lengths=[1, 2])),
        (ValueError, "lengths: ", call(x, weights, lengths=[1, 2, 4])),
        (ValueError, "lengths: ", call(x, weights, lengths=[1, -1, 2])),
        (TypeError, "lengths: ", call(x, weights, lengths=[1.0, 2.0, 3.0])),
        (ValueError, "lengths: ", call(x[:, 0], weights, lengths=[3])),
        (ValueError, "reset: ", call(x, weights, reset=np.zeros((3, 2), bool))),
        (TypeError, "reset: ", call(x, weights, reset=ids)),
        (ValueError, "dropout: ", call(x, weights, dropout=1.0)),
        (ValueError, "dropout: ", call(x, weights, dropout=math.nan)),
        (ValueError, "dropout_key: ", call(x, weights, dropout=0.5)),
        (ValueError, "nonlinearity: ", lambda: reference.rnn(x, weights, nonlinearity="gelu")),
        (ValueError, "dy: ", lambda: reference.lstm_backward(tape, y[:2])),
        (TypeError, "dy: ", lambda: reference.lstm_backward(tape, y.astype(np.float32))),
        (ValueError, "dstate: ", lambda: reference.lstm_backward(tape, y, final[0])),
    ]
    for error, message, function in cases:
        with pytest.raises(error, match=f"^{message}"):
            function()


def test_imports_nothing_but_numpy() -> None:
    """The oracle must not lean on what it judges."""
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            roots.add(str(node.module).split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"numpy"}


# --- PyTorch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [4, 7, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru_reset_after"])
def test_matches_torch(
    cell: str, bias: bool, D: int, L: int, lengths: Any, rng: np.random.Generator
) -> None:
    """Outputs, states and every gradient to 1e-11; ragged rows through packed sequences."""
    torch = pytest.importorskip("torch")
    T, B, I, H = 7, 3, 4, 5
    x, weights, state = problem(cell, rng, T=T, B=B, I=I, H=H, L=L, D=D, bias=bias)
    family, options = CELLS[cell]
    if family != "rnn":
        options = {}
    module = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[family](
        I, H, L, bias=bias, bidirectional=D == 2, dtype=torch.float64, **options
    )
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})

    y, final, tape = forward(cell, x, weights, state, lengths=lengths)
    dy, dfinal = like(y, rng), like(final, rng)
    gradients = backward(cell, tape, dy, dfinal)

    def leaf(array: np.ndarray) -> Any:
        return torch.from_numpy(array.copy()).requires_grad_()

    x_t, state_t = leaf(x), map_state(leaf, state)
    if lengths is None:
        y_t, final_t = module(x_t, state_t)
    else:
        rnn_utils = torch.nn.utils.rnn
        packed = rnn_utils.pack_padded_sequence(x_t, lengths, enforce_sorted=False)
        packed_y, final_t = module(packed, state_t)
        y_t, _ = rnn_utils.pad_packed_sequence(packed_y, total_length=T)
    loss = (y_t * torch.from_numpy(dy)).sum()
    for array, d in zip(state_arrays(final_t), state_arrays(dfinal), strict=True):
        loss = loss + (array * torch.from_numpy(d)).sum()
    loss.backward()

    pairs = [("y", y, y_t), ("x", gradients.x, x_t.grad)]
    pairs += [
        ("final", *pair) for pair in zip(state_arrays(final), state_arrays(final_t), strict=True)
    ]
    pairs += [
        ("state", gradient, array.grad)
        for gradient, array in zip(
            state_arrays(gradients.state), state_arrays(state_t), strict=True
        )
    ]
    pairs += [(name, gradients.params[name], p.grad) for name, p in module.named_parameters()]
    assert len(pairs) == len(weights) + 2 + 2 * len(state_arrays(state))
    for what, ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-11, err_msg=what)
