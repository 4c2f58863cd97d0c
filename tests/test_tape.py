"""What a tape promises: the gradient of the forward pass as it ran, or an error."""

from __future__ import annotations

from typing import Any

import fastrnn
import numpy as np
import pytest


def problem(rng: np.random.Generator) -> tuple[fastrnn.LSTM, np.ndarray, np.ndarray]:
    lstm = fastrnn.LSTM(5, 7, 2, rng=0)
    x = rng.standard_normal((20, 3, 5)).astype("f")
    return lstm, x, rng.standard_normal((20, 3, 7)).astype("f")


def test_changed_weights_and_input_do_not_reach_the_gradient(rng: np.random.Generator) -> None:
    lstm, x, dy = problem(rng)
    want = lstm.forward(x)[2].backward(dy)
    y, _, tape = lstm.forward(x)
    lstm.flat[:] = 0
    x[:] = 0
    y[:] = 0
    got = tape.backward(dy)
    np.testing.assert_array_equal(got.x, want.x)
    for name in want.params:
        np.testing.assert_array_equal(got.params[name], want.params[name])


def test_checkpoints_notice_a_changed_input(rng: np.random.Generator) -> None:
    lstm, x, dy = problem(rng)
    _, _, tape = lstm.forward(x, checkpoint_every=4)
    x[13, 2, 4] = np.nextafter(x[13, 2, 4], np.float32(9))
    into = {name: np.zeros_like(p) for name, p in lstm.params.items()}
    with pytest.raises(RuntimeError, match="x: expected the values of the forward pass"):
        tape.backward(dy, into=into)
    assert not any(g.any() for g in into.values())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("features", [1, 4, 7, 8, 16, 33])
def test_checkpoints_notice_negation_and_exchange(
    rng: np.random.Generator, features: int, dtype: str
) -> None:
    gru = fastrnn.GRU(features, 5, rng=0, dtype=dtype)
    x = rng.standard_normal((6, 3, features)).astype(dtype)
    changes = [np.negative, lambda x: x[::-1].copy(), lambda x: x[:, ::-1].copy()]
    for change in changes:
        y, _, tape = gru.forward(x, checkpoint_every=2)
        kept = x.copy()
        x[...] = change(kept)
        with pytest.raises(RuntimeError, match="x: expected"):
            tape.backward(np.ones_like(y))
        x[...] = kept


def test_checkpoints_hold_less(rng: np.random.Generator) -> None:
    lstm = fastrnn.LSTM(16, 32, rng=0)
    x = rng.standard_normal((1000, 8, 16)).astype("f")
    _, _, full = lstm.forward(x)
    _, _, sparse = lstm.forward(x, checkpoint_every=32)
    assert sparse.nbytes < full.nbytes / 20


def test_many_tapes_of_one_layer_at_once(rng: np.random.Generator) -> None:
    lstm, x, dy = problem(rng)
    want = [lstm.forward(x * k)[2].backward(dy).x for k in range(3)]
    tapes = [lstm.forward(x * k)[2] for k in range(3)]
    for k in (2, 0, 1):
        np.testing.assert_array_equal(tapes[k].backward(dy).x, want[k])


def test_an_error_leaves_the_sums_alone(rng: np.random.Generator) -> None:
    """Several layers: all gradients are added together at the end, or none."""
    lstm, x, dy = problem(rng)
    into = {name: np.ones_like(p) for name, p in lstm.params.items()}
    _, _, tape = lstm.forward(x)
    total = tape.backward(dy, into=into).params
    single = lstm.forward(x)[2].backward(dy).params
    for name, g in single.items():
        np.testing.assert_array_equal(total[name], g + 1)
    x2 = x.copy()
    _, _, tape = lstm.forward(x2, checkpoint_every=3)
    x2[0] = 0
    kept = {name: g.copy() for name, g in into.items()}
    with pytest.raises(RuntimeError):
        tape.backward(dy, into=into)
    for name, g in kept.items():
        np.testing.assert_array_equal(into[name], g)


@pytest.mark.parametrize("options", [{}, {"tbptt": (3, 3)}, {"checkpoint_every": 2}])
def test_gradients_go_to_their_names_whatever_the_order(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    lstm = fastrnn.LSTM(5, 5, num_layers=2, rng=0)  # I = H: only the names tell the arrays apart
    x = rng.standard_normal((6, 3, 5)).astype("f")
    y, _, tape = lstm.forward(x, **options)
    want = tape.backward(np.ones_like(y)).params
    into = {name: np.zeros_like(want[name]) for name in reversed(list(want))}
    _, _, tape = lstm.forward(x, **options)
    assert tape.backward(np.ones_like(y), into=into).params is into
    for name, gradient in want.items():
        np.testing.assert_array_equal(into[name], gradient)
