"""Integer input over a large vocabulary: the bits of the whole vocabulary, at the tokens' cost."""

from __future__ import annotations

from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import assert_same_bits
from fastrnn import _core


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
@pytest.mark.parametrize("tokens", [40, 900])
def test_same_bits_as_one_hot_rows(
    rng: np.random.Generator, options: dict[str, Any], tokens: int
) -> None:
    gru = fastrnn.GRU(1000, 12, rng=0, **options)
    ids = rng.integers(0, tokens, (30, 40))
    dense = np.eye(1000, dtype="f")[ids]
    y, h, tape = gru.forward(ids)
    y_dense, h_dense, tape_dense = gru.forward(dense)
    np.testing.assert_array_equal(y, y_dense)
    np.testing.assert_array_equal(h, h_dense)
    np.testing.assert_array_equal(gru(ids)[0], y)
    np.testing.assert_array_equal(gru.freeze()(ids)[0], y)
    dy = rng.standard_normal(y.shape).astype("f")
    grads, grads_dense = tape.backward(dy), tape_dense.backward(dy)
    assert grads.x is None
    for name, want in grads_dense.params.items():
        np.testing.assert_allclose(grads.params[name], want, atol=5e-6 * np.abs(want).max())
    unseen = grads.params["weight_ih_l0"][:, tokens:]
    assert not unseen.any()


def test_accumulates_into_the_whole_matrix(rng: np.random.Generator) -> None:
    lstm = fastrnn.LSTM(2000, 5, rng=0)
    ids = rng.integers(0, 2000, (6, 3), dtype=np.uint16)
    y, _, tape = lstm.forward(ids)
    first = tape.backward(y)
    into = {name: g.copy() for name, g in first.params.items()}
    second = lstm.forward(ids)[2].backward(y, into=into)
    assert second.params is into
    for name, g in first.params.items():
        np.testing.assert_array_equal(into[name], g + g)


@pytest.mark.parametrize("bad", [-1, 2000, 2**40])
def test_tokens_out_of_range_are_refused(bad: int) -> None:
    lstm = fastrnn.LSTM(2000, 5, rng=0)
    with pytest.raises(ValueError, match="x: expected token ids from 0 to 1999"):
        lstm(np.array([[3, bad]]))


def test_truncated_gradients(rng: np.random.Generator) -> None:
    lstm = fastrnn.LSTM(1000, 6, rng=0)
    ids = rng.integers(0, 50, (12, 2))
    _, _, tape = lstm.forward(ids, tbptt=(4, 4))
    _, _, dense = lstm.forward(np.eye(1000, dtype="f")[ids], tbptt=(4, 4))
    dy = rng.standard_normal((12, 2, 6)).astype("f")
    got, want = tape.backward(dy).params, dense.backward(dy).params
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_columns_out_of_a_matrix_and_back(
    rng: np.random.Generator, dtype: str, threads: int
) -> None:
    matrix = rng.standard_normal((300, 2000)).astype(dtype)
    columns = np.flatnonzero(rng.random(2000) < 0.5)
    part = _core.take_columns(matrix, columns, threads)
    np.testing.assert_array_equal(part, matrix[:, columns])
    want = matrix.copy()
    want[:, columns] += part
    _core.add_columns(matrix, columns, part, threads)
    np.testing.assert_array_equal(matrix, want)


def test_columns_have_the_same_bits_for_any_threads() -> None:
    columns = np.arange(0, 2000, 2)
    sums = []
    for threads in (1, 2):
        matrix = np.full((300, 2000), 1.5e-38, "f")  # sums that are subnormal numbers
        _core.add_columns(matrix, columns, np.full((300, 1000), -1.4e-38, "f"), threads)
        sums.append(matrix)
    assert_same_bits(*sums)


@pytest.mark.parametrize(
    ("columns", "part", "error", "words"),
    [
        ([0, 7], np.zeros((2, 2)), ValueError, "columns: expected column numbers from 0 to 6"),
        ([-1], np.zeros((2, 1)), ValueError, "columns: expected column numbers from 0 to 6"),
        ([0.5], np.zeros((2, 1)), TypeError, "columns: "),
        ([0, 1], np.zeros((2, 3)), ValueError, "part: expected shape"),
        ([0], np.zeros((2, 1), "f"), TypeError, "part: expected an array of float64"),
    ],
)
def test_columns_that_do_not_fit(
    columns: Any, part: Any, error: type[Exception], words: str
) -> None:
    matrix = np.zeros((2, 7))
    with pytest.raises(error, match=words):
        _core.add_columns(matrix, np.array(columns), part)
    matrix.flags.writeable = False
    with pytest.raises(ValueError, match="matrix: expected"):
        _core.add_columns(matrix, np.array([0]), np.zeros((2, 1)))
