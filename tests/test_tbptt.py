"""Truncated back-propagation through time against the truncation done by hand.

By hand: fastrnn.reference runs each window from its detached initial state, dy masked to the
window's losses, and the gradients are added up. Dimensions as everywhere.
"""

from __future__ import annotations

from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import (
    CELLS,
    assert_gradient_close,
    map_state,
    random_state,
    random_weights,
    state_arrays,
)
from fastrnn import functional, reference
from hypothesis import given
from hypothesis import strategies as st

T, B, I, H = 11, 4, 3, 5


def by_hand(
    family: str,
    cell_options: dict[str, Any],
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    state: Any,
    dy: Any,
    dstate: Any,
    k1: int,
    k2: int,
    reset: Any = None,
) -> tuple[np.ndarray, Any, dict[str, np.ndarray]]:
    """The truncated gradients (x, state, params) of one row, all of it unbatched, in float64."""
    forward = getattr(reference, f"{family}_forward")
    backward = getattr(reference, f"{family}_backward")
    steps = len(x)

    def window(begin: int, stop: int, start: Any) -> tuple[Any, Any]:
        masks = {} if reset is None else {"reset": reset[begin:stop]}
        return forward(x[begin:stop], weights, start, **masks, **cell_options)[1:]

    if steps == 0:
        return np.zeros((0, I)), dstate, {name: np.zeros_like(w) for name, w in weights.items()}
    dx = np.zeros((steps, I))
    dinitial = map_state(np.zeros_like, state)
    params = {name: np.zeros_like(w) for name, w in weights.items()}
    for first in range(0, steps, k1):
        begin, stop = max(0, first + k1 - k2), min(first + k1, steps)
        start = window(0, begin, state)[0]  # from the beginning: a constant
        _, tape = window(begin, stop, start)
        losses = dy[begin:stop].copy()
        losses[: first - begin] = 0
        g = backward(tape, losses, dstate if stop == steps else None)
        if g.x is not None:
            dx[begin:stop] += g.x
        for name, gradient in g.params.items():
            params[name] += gradient
        if begin == 0:
            for total, part in zip(state_arrays(dinitial), state_arrays(g.state), strict=True):
                total += part
    return dx, dinitial, params


def check(
    cell: str,
    k1: int,
    k2: int,
    rng: np.random.Generator,
    *,
    L: int = 2,
    dtype: str = "float64",
    lengths: bool = False,
    reset: bool = False,
    batch_first: bool = False,
    one_hot: bool = False,
    unbatched: bool = False,
    ragged: bool = False,
    with_dy: bool = True,
    with_dstate: bool = True,
) -> None:
    """One problem: y, state and all gradients, row by row against by_hand."""
    family, cell_options = CELLS[cell]
    rows = 1 if unbatched else B
    weights = random_weights(family, I, H, L, 1, True, dtype, rng)
    x: Any = rng.integers(I, size=(rows, T)) if one_hot else rng.standard_normal((rows, T, I))
    x = x if one_hot else x.astype(dtype)
    dy = rng.standard_normal((rows, T, H)).astype(dtype)
    state = random_state(family, (L, rows, H), dtype, rng)
    dstate = random_state(family, (L, rows, H), dtype, rng)
    starts = rng.random((rows, T)) < 0.2
    ends = np.array([T, 0, 7, 3])[:rows] if lengths or ragged else np.full(rows, T)

    def form(array: np.ndarray) -> Any:  # from (B, T, …) to the form under test
        if ragged:
            return [array[b, :n] for b, n in enumerate(ends)]
        if unbatched:
            return array[0]
        return array if batch_first else array.swapaxes(0, 1)

    def per_row(array: Any) -> np.ndarray:  # and back, for comparing
        if ragged:
            return np.stack([np.r_[a, np.zeros((T - len(a), *a.shape[1:]))] for a in array])
        if unbatched:
            return array[None]
        return array if batch_first else array.swapaxes(0, 1)

    options: dict[str, Any] = {"batch_first": batch_first, **cell_options}
    if lengths:
        options["lengths"] = ends
    if reset:
        options["reset"] = form(starts)
    call_state = map_state(lambda a: a[:, 0] if unbatched else a, state)
    call_dstate = map_state(lambda a: a[:, 0] if unbatched else a, dstate)
    forward = getattr(functional, f"{family}_forward")
    y, final, tape = forward(form(x), weights, call_state, tbptt=(k1, k2), **options)
    want_y, want_final, _ = forward(form(x), weights, call_state, **options)
    np.testing.assert_array_equal(per_row(y), per_row(want_y))
    for a, b in zip(state_arrays(final), state_arrays(want_final), strict=True):
        np.testing.assert_array_equal(a, b)
    g = tape.backward(form(dy) if with_dy else None, call_dstate if with_dstate else None)

    wide = {name: w.astype(np.float64) for name, w in weights.items()}
    params = {name: np.zeros_like(w) for name, w in wide.items()}
    for b, n in enumerate(ends):
        dx, dinitial, dparams = by_hand(
            family,
            cell_options,
            x[b, :n] if one_hot else x[b, :n].astype(np.float64),
            wide,
            map_state(lambda a, b=b: a[:, b].astype(np.float64), state),
            dy[b, :n].astype(np.float64) * with_dy,
            map_state(lambda a, b=b: a[:, b].astype(np.float64) * with_dstate, dstate),
            k1,
            k2,
            starts[b, :n] if reset else None,
        )
        if one_hot:
            assert g.x is None
        else:
            assert_gradient_close(per_row(g.x)[b, :n].astype(dtype), dx, f"dx of row {b}", 1.0)
            assert not per_row(g.x)[b, n:].any()
        for got, want in zip(state_arrays(g.state), state_arrays(dinitial), strict=True):
            row = got if unbatched else got[:, b]
            assert row.dtype == dtype
            assert_gradient_close(row, want, f"gradient of the state of row {b}", 1.0)
        for name, gradient in dparams.items():
            params[name] += gradient
    for name, gradient in g.params.items():
        assert_gradient_close(gradient, params[name], name, max(1.0, abs(params[name]).max()))


PAIRS = [(1, 1), (1, 4), (3, 3), (3, 5), (4, 8), (2, 50), (11, 11), (20, 30)]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell(cell: str, pair: tuple[int, int], rng: np.random.Generator) -> None:
    check(cell, *pair, rng)


@pytest.mark.parametrize("pair", [(3, 3), (2, 7)])
@pytest.mark.parametrize(
    "options",
    [
        {"L": 1},
        {"L": 3},
        {"dtype": "float32"},
        {"lengths": True},
        {"reset": True},
        {"lengths": True, "reset": True, "batch_first": True},
        {"batch_first": True},
        {"one_hot": True},
        {"one_hot": True, "batch_first": True, "lengths": True},
        {"unbatched": True},
        {"unbatched": True, "one_hot": True, "reset": True},
        {"ragged": True},
        {"ragged": True, "reset": True},
        {"ragged": True, "one_hot": True},
        {"with_dy": False},
        {"with_dy": False, "lengths": True},
        {"with_dy": False, "ragged": True},
        {"with_dstate": False},
        {"with_dstate": False, "lengths": True, "reset": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_after"])
def test_every_option(
    cell: str, options: dict[str, Any], pair: tuple[int, int], rng: np.random.Generator
) -> None:
    check(cell, *pair, rng, **options)


@given(
    cell=st.sampled_from(list(CELLS)),
    k1=st.integers(1, 14),
    more=st.integers(0, 14),
    L=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("reset", "one_hot", "with_dy")}),
    layout=st.sampled_from([{}, {"lengths": True}, {"ragged": True}, {"unbatched": True}]),
)
def test_random_windows(
    cell: str, k1: int, more: int, L: int, seed: int, flags: Any, layout: Any
) -> None:
    check(cell, k1, k1 + more, np.random.default_rng(seed), L=L, **flags, **layout)


# --- Through the layers -------------------------------------------------------------------------


def lstm(**options: Any) -> Any:
    return fastrnn.LSTM(I, H, **{"num_layers": 2, "rng": 3, **options})


def gradients(g: Any) -> list[np.ndarray]:
    return [g.x, *state_arrays(g.state), *g.params.values()]


@pytest.mark.parametrize("pair", [(T, T), (T, T + 1), (1, T), (4, 12), (10**9, 10**9)])
def test_windows_that_reach_back_to_the_start(
    pair: tuple[int, int], rng: np.random.Generator
) -> None:
    """Then nothing is cut off; with one window it is the same computation, bit for bit."""
    layer = lstm(dtype="float64")
    x, dy = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, H))
    dstate = random_state("lstm", (2, B, H), "float64", rng)
    _, _, tape = layer.forward(x)
    want = tape.backward(dy, dstate)
    y, _, tape = layer.forward(x, tbptt=pair)
    np.testing.assert_array_equal(y, layer(x)[0])
    got = tape.backward(dy, dstate)
    for a, b in zip(gradients(got), gradients(want), strict=True):
        if pair[0] >= T:
            np.testing.assert_array_equal(a, b)
        assert_gradient_close(a, b, "gradient")


def test_a_row_does_not_depend_on_the_others(rng: np.random.Generator) -> None:
    """Nor on padding, nor on threads."""
    layer = lstm()
    x = rng.standard_normal((T, B, I)).astype(np.float32)
    dy = rng.standard_normal((T, B, H)).astype(np.float32)
    dstate = random_state("lstm", (2, B, H), "float32", rng)
    ends = [T, 4, 6, 1]
    _, _, tape = layer.forward(x, lengths=ends, tbptt=(2, 3))
    g = tape.backward(dy, dstate, threads=2)
    for b, n in enumerate(ends):
        _, _, tape = layer.forward(x[:n, b], tbptt=(2, 3))
        alone = tape.backward(dy[:n, b], map_state(lambda a, b=b: a[:, b], dstate), threads=1)
        np.testing.assert_array_equal(g.x[:n, b], alone.x)
        np.testing.assert_array_equal(g.state[0][:, b], alone.state[0])
        np.testing.assert_array_equal(g.state[1][:, b], alone.state[1])


def test_accumulation_and_private_copies(rng: np.random.Generator) -> None:
    layer = lstm()
    x = rng.standard_normal((T, B, I)).astype(np.float32)
    dy = rng.standard_normal((T, B, H)).astype(np.float32)
    state = random_state("lstm", (2, B, H), "float32", rng)
    reset, lengths = rng.random((T, B)) < 0.2, np.array([T, 3, 5, 8])

    def forward(*arrays: Any) -> Any:
        x, state, reset, lengths = arrays
        return layer.forward(x, state, reset=reset, lengths=lengths, tbptt=(2, 4))[2]

    want = forward(x, state, reset, lengths).backward(dy)
    tape = forward(x, state, reset, lengths)
    for array in (x, *state, reset, lengths, *layer.params.values()):
        array[...] = 0
    into = {name: np.full_like(array, 0.5) for name, array in want.params.items()}
    got = tape.backward(dy, into=into)
    np.testing.assert_array_equal(got.x, want.x)
    for name, array in got.params.items():
        assert array is into[name]
        assert_gradient_close(array, want.params[name] + np.float32(0.5), name)


def test_memory_is_that_of_the_input() -> None:
    """What is held between the passes does not grow with layers or hidden units."""
    x = np.zeros((1000, 2, I), np.float32)
    _, _, tape = fastrnn.LSTM(I, 64, 2, rng=1).forward(x, tbptt=(10, 20))
    assert x.nbytes <= tape.nbytes <= 2 * x.nbytes
    tape.backward(None)
    assert tape.nbytes == 0


def test_sequences_without_steps() -> None:
    layer = lstm()
    dstate = random_state("lstm", (2, B, H), "float32", np.random.default_rng(1))
    for shape in ((0, B, I), (0, 0, I), (5, 0, I)):
        y, _, tape = layer.forward(np.zeros(shape, np.float32), tbptt=(2, 3))
        d = map_state(lambda a, n=shape[1]: a[:, :n], dstate)
        g = tape.backward(np.zeros_like(y), d)
        assert g.x.shape == shape
        np.testing.assert_array_equal(g.state[0], d[0])
        np.testing.assert_array_equal(g.state[1], d[1])


@pytest.mark.parametrize(
    "tbptt, error",
    [
        ("33", TypeError),
        (3, TypeError),
        ({1: 2}, TypeError),
        (np.array([2, 3]), TypeError),
        ((), ValueError),
        ((3,), ValueError),
        ((3, 3, 3), ValueError),
        ((2.0, 3), TypeError),
        ((True, 3), TypeError),
        ((2, None), TypeError),
        ((0, 3), ValueError),
        ((-1, 3), ValueError),
        ((3, 2), ValueError),
        ((1, 2**80), ValueError),
    ],
)
def test_bad_pairs(tbptt: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="tbptt"):
        lstm().forward(np.zeros((T, B, I), np.float32), tbptt=tbptt)


def test_options_that_do_not_go_together() -> None:
    x = np.zeros((T, B, I), np.float32)
    with pytest.raises(ValueError, match=r"tbptt.*reverse direction starts at the end"):
        lstm(bidirectional=True).forward(x, tbptt=(2, 2))
    with pytest.raises(ValueError, match="checkpoint_every: expected None with tbptt"):
        lstm().forward(x, tbptt=(2, 2), checkpoint_every=2)
    with pytest.raises(ValueError, match="tbptt: expected None with dropout between layers"):
        lstm(dropout=0.5).forward(x, tbptt=(2, 2))
    lstm(dropout=0.5, num_layers=1).forward(x, tbptt=(2, 2))  # there is nothing to drop
    weights = lstm().state_dict()
    with pytest.raises(ValueError, match="tbptt"):
        functional.lstm_forward(x, weights, dropout=0.5, dropout_key=1, tbptt=(2, 2))


def test_backward_refuses_what_does_not_fit_and_stays_usable() -> None:
    x = np.zeros((T, B, I), np.float32)
    y, (h, c), tape = lstm().forward(x, tbptt=(2, 3))
    good = tape.backward(y, (h, c)).params
    _, _, tape = lstm().forward(x, tbptt=(2, 3))
    into = {name: np.zeros_like(array) for name, array in good.items()}
    bad: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (y.astype("float64"), None, {}, TypeError, "dy"),
        (y[1:], None, {}, ValueError, "dy"),
        (y, h, {}, TypeError, "dstate"),
        (y, (h,), {}, ValueError, "dstate"),
        (y, (h, c[:1]), {}, ValueError, "dstate"),
        (y, (h, c.astype("float64")), {}, TypeError, "dstate"),
        (y, None, {"threads": 0}, ValueError, "threads"),
        (y, None, {"threads": 1.5}, TypeError, "threads"),
        (y, None, {"into": {}}, ValueError, "into"),
        (y, None, {"into": []}, TypeError, "into"),
    ]
    for dy, dstate, options, error, name in bad:
        with pytest.raises(error, match=name):
            tape.backward(dy, dstate, **{"into": into, **options})
    assert not any(array.any() for array in into.values())  # nothing was written
    tape.backward(y, (h, c), into=into)
    for name, array in into.items():
        np.testing.assert_array_equal(array, good[name])
    with pytest.raises(RuntimeError, match="not used yet"):
        tape.backward(y)


def test_bad_input_is_refused_as_without_windows() -> None:
    layer = lstm()
    x = np.zeros((T, B, I), np.float32)
    for bad, options in (
        (x[0, 0], {}),
        (x.astype("float64"), {}),
        (x, {"lengths": [T + 1] * B}),
        (x, {"reset": np.zeros((T, B), int)}),
        (x, {"state": (np.zeros(3), None)}),
        (np.full((T, B), I), {}),
        (None, {}),
    ):
        with pytest.raises((TypeError, ValueError)) as plain:
            layer.forward(bad, **options)
        with pytest.raises((TypeError, ValueError)) as windows:
            layer.forward(bad, **options, tbptt=(2, 2))
        assert str(plain.value) == str(windows.value)
