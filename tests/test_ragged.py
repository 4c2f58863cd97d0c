"""Ragged batches: a list of arrays, values with offsets, and a padded array with lengths agree."""

from __future__ import annotations

from typing import Any

import fastrnn
import numpy as np
import pytest

LENGTHS = [5, 0, 11, 3, 11, 1, 7]
LAYERS = [
    (fastrnn.LSTM, {}),
    (fastrnn.GRU, {"reset_after": False}),
    (fastrnn.RNN, {"nonlinearity": "relu"}),
]


def parts(state: Any) -> tuple[np.ndarray, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.fixture(params=LAYERS, ids=lambda p: p[0].__name__)
def layer(request: pytest.FixtureRequest) -> Any:
    cls, options = request.param
    return cls(6, 19, 2, bidirectional=True, rng=3, dtype="float64", **options)


def padded(sequences: list[np.ndarray]) -> np.ndarray:
    x = np.full((max(LENGTHS), len(LENGTHS), *sequences[0].shape[1:]), np.nan)
    for b, sequence in enumerate(sequences):
        x[: len(sequence), b] = sequence
    return x


@pytest.mark.parametrize("checkpoint", [None, 4])
def test_three_forms_give_the_same_bits(
    layer: Any, rng: np.random.Generator, checkpoint: int | None
) -> None:
    x = [rng.standard_normal((n, 6)) for n in LENGTHS]
    dy = [rng.standard_normal((n, 38)) for n in LENGTHS]
    reset = [rng.random(n) < 0.2 for n in LENGTHS]
    mask = np.zeros((11, len(LENGTHS)), bool)
    for b, r in enumerate(reset):
        mask[: len(r), b] = r
    yp, sp, tape_p = layer.forward(
        padded(x), lengths=LENGTHS, reset=mask, checkpoint_every=checkpoint
    )
    gp = tape_p.backward(padded(dy))
    yl, sl, tape_l = layer.forward(x, reset=reset, checkpoint_every=checkpoint)
    gl = tape_l.backward(dy)
    joined = fastrnn.Ragged.of(x)
    yr, sr, tape_r = layer.forward(joined, reset=np.concatenate(reset), checkpoint_every=checkpoint)
    gr = tape_r.backward(fastrnn.Ragged(np.concatenate(dy), joined.offsets))
    assert isinstance(yl, list)
    assert isinstance(yr, fastrnn.Ragged)
    for b, n in enumerate(LENGTHS):
        assert yl[b].shape == (n, 38)
        np.testing.assert_array_equal(yl[b], yp[:n, b])
        np.testing.assert_array_equal(yr[b], yp[:n, b])
        np.testing.assert_array_equal(gl.x[b], gp.x[:n, b])
        np.testing.assert_array_equal(gr.x[b], gp.x[:n, b])
    for other_state, other in ((sl, gl), (sr, gr)):
        for p, q in zip(parts(sp), parts(other_state), strict=True):
            np.testing.assert_array_equal(p, q)
        for p, q in zip(parts(gp.state), parts(other.state), strict=True):
            np.testing.assert_array_equal(p, q)
        for name in gp.params:
            np.testing.assert_array_equal(gp.params[name], other.params[name])
    y, _ = layer(x, reset=reset)
    y2, _ = layer.freeze()(joined, reset=np.concatenate(reset))
    for b in range(len(LENGTHS)):
        np.testing.assert_array_equal(y[b], yl[b])
        np.testing.assert_array_equal(y2[b], yl[b])


def test_each_sequence_has_the_bits_of_its_own_call(layer: Any, rng: np.random.Generator) -> None:
    x = [rng.standard_normal((n, 6)) for n in LENGTHS]
    y, _ = layer(x)
    for b, sequence in enumerate(x):
        alone, _ = layer(sequence)
        np.testing.assert_array_equal(y[b], alone)


def test_integer_sequences(rng: np.random.Generator) -> None:
    lstm = fastrnn.LSTM(9, 17, rng=0)
    ids = [rng.integers(0, 9, n) for n in LENGTHS]
    y, _, tape = lstm.forward(ids)
    dense, _, tape_dense = lstm.forward([np.eye(9, dtype="f")[i] for i in ids])
    for a, b in zip(y, dense, strict=True):
        np.testing.assert_array_equal(a, b)
    grads, grads_dense = tape.backward(y), tape_dense.backward(y)
    assert grads.x is None
    for name in grads.params:
        np.testing.assert_allclose(grads.params[name], grads_dense.params[name], atol=1e-5)


def test_batch_of_empty_sequences() -> None:
    y, (h, _) = fastrnn.LSTM(3, 4, rng=0)([np.zeros((0, 3), "f")] * 2)
    assert [a.shape for a in y] == [(0, 4), (0, 4)]
    assert not h.any()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: [np.zeros((2, 3), "f"), np.zeros((2, 4), "f")], ValueError, r"x\[1\]"),
        (lambda: [np.zeros((2, 3), "f"), np.zeros((2, 3))], TypeError, r"x\[1\]"),
        (lambda: [np.zeros((2, 3, 1), "f")], ValueError, r"x\[0\]"),
        (lambda: fastrnn.Ragged(np.zeros((5, 3), "f"), np.array([0, 2])), ValueError, "offsets"),
        (lambda: fastrnn.Ragged(np.zeros((5, 3), "f"), np.array([1, 5])), ValueError, "offsets"),
        (lambda: fastrnn.Ragged(np.zeros((5, 3), "f"), np.array([0, 4, 3, 5])), ValueError, "offs"),
        (lambda: fastrnn.Ragged(np.zeros((5, 3), "f"), np.array([0.0, 5.0])), TypeError, "offsets"),
        (lambda: fastrnn.Ragged(np.zeros((5, 3), "f"), np.array(5)), ValueError, "offsets"),
        (lambda: fastrnn.Ragged(np.zeros((5, 2), "f"), np.array([0, 5])), ValueError, "x"),
        (lambda: fastrnn.Ragged(np.zeros((5, 1, 3), "f"), np.array([0, 5])), ValueError, "x"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastrnn.LSTM(3, 4, rng=0)(make())


def test_lengths_and_foreign_gradients_are_refused() -> None:
    lstm = fastrnn.LSTM(3, 4, rng=0)
    x = [np.zeros((2, 3), "f"), np.zeros((1, 3), "f")]
    with pytest.raises(ValueError, match="lengths"):
        lstm(x, lengths=[2, 1])
    _, _, tape = lstm.forward(x)
    with pytest.raises(ValueError, match="dy"):
        tape.backward([np.zeros((1, 4), "f"), np.zeros((2, 4), "f")])
    with pytest.raises(ValueError, match="reset"):
        lstm(x, reset=[np.zeros(1, bool), np.zeros(2, bool)])
