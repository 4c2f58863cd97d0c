"""The compiled library against fastrnn.reference: outputs, states and every gradient.

Element-wise, with the accuracy the library promises (conftest.py). The reference runs in float64 on
the very values the library gets, so that a float32 case measures the library's rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import (
    CELLS,
    assert_forward_close,
    assert_gradient_close,
    map_state,
    random_state,
    random_weights,
    state_arrays,
)
from fastrnn import functional, reference
from hypothesis import given
from hypothesis import strategies as st

LAYERS = {"rnn": fastrnn.RNN, "lstm": fastrnn.LSTM, "gru": fastrnn.GRU}
DTYPES = ["float32", "float64"]
KEY = 0xFEDCBA9876543210


@dataclass
class Problem:
    """Everything that goes into a forward and a backward pass, in the dtype under test."""

    cell: str
    x: np.ndarray
    weights: dict[str, np.ndarray]
    state: Any
    dy: Any
    dstate: Any
    options: dict[str, Any] = field(default_factory=dict)  # lengths, reset, batch_first

    @property
    def family(self) -> str:
        return CELLS[self.cell][0]

    @property
    def cell_options(self) -> dict[str, Any]:
        return CELLS[self.cell][1]


def make_problem(
    cell: str,
    dtype: str,
    rng: np.random.Generator,
    *,
    T: int,
    B: int,
    I: int,
    H: int,
    L: int = 1,
    D: int = 1,
    bias: bool = True,
    **options: Any,
) -> Problem:
    """Signed random data, time-major and batched."""
    family = CELLS[cell][0]
    shape = (L * D, B, H)
    return Problem(
        cell,
        rng.standard_normal((T, B, I)).astype(dtype),
        random_weights(family, I, H, L, D, bias, dtype, rng),
        random_state(family, shape, dtype, rng),
        rng.standard_normal((T, B, D * H)).astype(dtype),
        random_state(family, shape, dtype, rng),
        options,
    )


def wide(array: Any) -> Any:
    """The same values for the reference: floats in float64, integers and None as they are."""
    if array is None or not np.issubdtype(array.dtype, np.floating):
        return array
    return array.astype(np.float64)


def run_reference(p: Problem, **options: Any) -> tuple[Any, Any, Any]:
    """y, final state and gradients of the specification in float64."""
    weights = {name: wide(array) for name, array in p.weights.items()}
    forward = getattr(reference, f"{p.family}_forward")
    backward = getattr(reference, f"{p.family}_backward")
    state, dstate = map_state(wide, p.state), map_state(wide, p.dstate)
    options = {**p.options, **p.cell_options, **options}
    y, final, tape = forward(wide(p.x), weights, state, **options)
    return y, final, backward(tape, wide(p.dy), dstate)


def make_layer(p: Problem, **options: Any) -> Any:
    """The layer with the problem's weights."""
    weight_ih, weight_hh = p.weights["weight_ih_l0"], p.weights["weight_hh_l0"]
    layer = LAYERS[p.family](
        weight_ih.shape[1],
        weight_hh.shape[1],
        sum(name.startswith("weight_ih") and "reverse" not in name for name in p.weights),
        bias="bias_ih_l0" in p.weights,
        bidirectional="weight_ih_l0_reverse" in p.weights,
        batch_first=p.options.get("batch_first", False),
        dtype=weight_hh.dtype.name,
        rng=1,
        **p.cell_options,
        **options,
    )
    layer.load_state_dict(p.weights)
    return layer


def call_options(p: Problem) -> dict[str, Any]:
    """The options of a layer's call: batch_first belongs to the layer."""
    return {name: value for name, value in p.options.items() if name != "batch_first"}


def output_scale(cell: str, y: np.ndarray) -> float:
    """What absolute accuracy is measured in: 1, or the largest output of the unbounded relu."""
    return max(1.0, float(np.abs(y).max(initial=0))) if cell == "rnn_relu" else 1.0


def assert_states_close(got: Any, want: Any, what: str, scale: float = 1.0) -> None:
    assert isinstance(got, tuple) == isinstance(want, tuple)
    for k, (a, b) in enumerate(zip(state_arrays(got), state_arrays(want), strict=True)):
        assert_forward_close(a, b, f"{what}[{k}]", scale)


def assert_gradients_close(got: Any, want: Any, dtype: str, *, common_scale: bool = False) -> None:
    """Every gradient; with common_scale in parts of the largest element of all of them.

    One tensor of a tiny problem may be a sum of two terms that cancel, and then its own largest
    element says nothing about the rounding in it.
    """
    pairs = [("x", got.x, want.x)] if want.x is not None else []
    assert (got.x is None) == (want.x is None)
    pairs += [
        (f"state[{k}]", *pair)
        for k, pair in enumerate(
            zip(state_arrays(got.state), state_arrays(want.state), strict=True)
        )
    ]
    assert list(got.params) == list(want.params)
    pairs += [(name, got.params[name], want.params[name]) for name in want.params]
    scale = max(float(np.abs(b).max(initial=0)) for _, _, b in pairs) if common_scale else None
    for what, a, b in pairs:
        assert a.dtype == dtype, f"{what}: {a.dtype}"
        assert_gradient_close(a, b, f"gradient of {what}", scale)


def check_layer(p: Problem, **options: Any) -> None:
    """A layer's inference, forward and backward against the reference."""
    dtype = p.weights["weight_hh_l0"].dtype
    want_y, want_final, want_gradients = run_reference(p)
    scale = output_scale(p.cell, want_y)
    layer = make_layer(p)
    y, final = layer(p.x, p.state, **call_options(p), **options)
    assert y.dtype == dtype
    assert_forward_close(y, want_y, "y of inference", scale)
    assert_states_close(final, want_final, "state of inference", scale)
    y, final, tape = layer.forward(p.x, p.state, **call_options(p), **options)
    assert y.dtype == dtype
    assert_forward_close(y, want_y, "y", scale)
    assert_states_close(final, want_final, "state", scale)
    assert_gradients_close(tape.backward(p.dy, p.dstate), want_gradients, dtype.name)


# --- Every cell and option ----------------------------------------------------------------------


def rows_of(kind: str, T: int, B: int, rng: np.random.Generator) -> dict[str, Any]:
    """The options for a kind of batch: "full", "lengths", "reset" or "lengths_reset"."""
    options: dict[str, Any] = {}
    if "lengths" in kind:
        options["lengths"] = rng.permutation(np.linspace(0, T, B).astype(np.int64))
    if "reset" in kind:
        options["reset"] = rng.random((T, B)) < 0.25
    return options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["full", "lengths", "reset", "lengths_reset"])
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_option(
    cell: str, bias: bool, D: int, L: int, kind: str, dtype: str, rng: np.random.Generator
) -> None:
    T, B = 6, 5
    rows = rows_of(kind, T, B, rng)
    check_layer(make_problem(cell, dtype, rng, T=T, B=B, I=3, H=11, L=L, D=D, bias=bias, **rows))


# One long sequence a cell and dtype, with the options dealt out over the cells.
LONG = {
    "rnn_tanh": {"D": 2},
    "rnn_relu": {"lengths": [1000, 617]},
    "rnn_sigmoid": {"bias": False},
    "lstm": {"L": 2},
    "gru_reset_after": {"D": 2, "lengths": [411, 1000]},
    "gru_reset_before": {},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps(cell: str, dtype: str, rng: np.random.Generator) -> None:
    check_layer(make_problem(cell, dtype, rng, T=1000, B=2, I=8, H=24, **LONG[cell]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 63, 65, 100])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_reset_after", "gru_reset_before"])
def test_every_tail_of_a_vector(cell: str, H: int, dtype: str, rng: np.random.Generator) -> None:
    """Hidden sizes around every vector width and tile, odd batches and input sizes with them."""
    check_layer(make_problem(cell, dtype, rng, T=4, B=1 + H % 7, I=1 + H % 5, H=H, D=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 2, 5, 6, 7, 12, 13, 16, 33, 64, 65])
def test_every_tail_of_a_batch(B: int, dtype: str, rng: np.random.Generator) -> None:
    rows = rows_of("lengths_reset", 5, B, rng)
    check_layer(make_problem("lstm", dtype, rng, T=5, B=B, I=17, H=19, **rows), threads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_larger_than_the_blocks(cell: str, dtype: str, rng: np.random.Generator) -> None:
    """Sizes that span several panels and blocks of the matrix product in every dimension."""
    check_layer(make_problem(cell, dtype, rng, T=4, B=40, I=150, H=140, L=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_integer_input(cell: str, dtype: str, rng: np.random.Generator) -> None:
    p = make_problem(cell, dtype, rng, T=7, B=5, I=30, H=10, L=2, D=2)
    p.options = rows_of("lengths_reset", 7, 5, rng)
    for integers in (np.uint8, np.int16, np.int64):
        p.x = rng.integers(30, size=(7, 5)).astype(integers)
        check_layer(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_between_layers(cell: str, dtype: str, rng: np.random.Generator) -> None:
    """The tape tells its key; with it the reference draws the same masks."""
    p = make_problem(cell, dtype, rng, T=6, B=4, I=3, H=9, L=3, D=2)
    p.options = rows_of("lengths", 6, 4, rng)
    layer = make_layer(p, dropout=0.4)
    keys = set()
    for _ in range(2):
        y, final, tape = layer.forward(p.x, p.state, **call_options(p))
        keys.add(int(tape.dropout_key))
        want = run_reference(p, dropout=0.4, dropout_key=int(tape.dropout_key))
        assert_forward_close(y, want[0], "y")
        assert_states_close(final, want[1], "state")
        assert_gradients_close(tape.backward(p.dy, p.dstate), want[2], dtype)
    assert len(keys) == 2, "each forward pass draws its own mask"
    y, _ = layer(p.x, p.state, **call_options(p))
    assert_forward_close(y, run_reference(p)[0], "y of inference, which drops nothing")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_default_state_and_missing_gradients(
    cell: str, dtype: str, rng: np.random.Generator
) -> None:
    """No state is zeros and still has a gradient; dy or dstate may be left out."""
    p = make_problem(cell, dtype, rng, T=5, B=3, I=4, H=6, L=2, D=2)
    p.state = None
    dy, dstate = p.dy, p.dstate
    for p.dy, p.dstate in ((dy, dstate), (dy, None), (None, dstate)):
        check_layer(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 3, 7, 100])
@pytest.mark.parametrize("cell", CELLS)
def test_checkpoints_change_nothing(
    cell: str, every: int, dtype: str, rng: np.random.Generator
) -> None:
    p = make_problem(cell, dtype, rng, T=10, B=4, I=3, H=6, L=2, D=2)
    p.options = rows_of("lengths_reset", 10, 4, rng)
    y, final, tape = make_layer(p).forward(p.x, p.state, checkpoint_every=every, **call_options(p))
    want = run_reference(p)
    assert_forward_close(y, want[0], "y")
    assert_states_close(final, want[1], "state")
    assert_gradients_close(tape.backward(p.dy, p.dstate), want[2], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_frozen_and_streamed(cell: str, dtype: str, rng: np.random.Generator) -> None:
    """The packed layer in one pass, and step by step with rows reset between the steps."""
    T, B = 8, 3
    p = make_problem(cell, dtype, rng, T=T, B=B, I=5, H=13, L=2)
    p.options = rows_of("reset", T, B, rng)
    want_y, want_final, _ = run_reference(p)
    frozen = make_layer(p).freeze()
    y, final = frozen(p.x, p.state, **call_options(p))
    assert_forward_close(y, want_y, "y")
    assert_states_close(final, want_final, "state")

    stream = frozen.stream(batch_size=B)
    stream.state = p.state
    for t in range(T):
        rows = np.flatnonzero(p.options["reset"][t])
        if len(rows):
            stream.reset(rows)
        assert_forward_close(stream.step(p.x[t]), want_y[t], f"y[{t}]")
    assert_states_close(stream.state, want_final, "state of the stream")


# --- Random shapes, layouts and options ---------------------------------------------------------


def flipped(array: np.ndarray) -> np.ndarray:
    """Negative strides along every axis."""
    return np.flip(np.flip(array).copy())


def sliced(array: np.ndarray) -> np.ndarray:
    """Every second element of a larger array, NaN (or 99) in between."""
    gaps = np.full([2 * n + 1 for n in array.shape], 99).astype(array.dtype)
    if np.issubdtype(array.dtype, np.floating):
        gaps[...] = np.nan
    view = gaps[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def misaligned(array: np.ndarray) -> np.ndarray:
    """Data that begin one byte after an aligned address."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def rotated(array: np.ndarray) -> np.ndarray:
    """The first axis is the fastest in memory, the others follow in C order."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 0, -1)), -1, 0)


def swapped(array: np.ndarray) -> np.ndarray:
    """The other byte order."""
    return array.astype(array.dtype.newbyteorder())


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


LAYOUTS: dict[str, Any] = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "flipped": flipped,
    "sliced": sliced,
    "rotated": rotated,
    "misaligned": misaligned,
    "swapped": swapped,
    "read_only": read_only,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_reset_before"])
def test_layouts_give_the_same_bits(
    cell: str, layout: str, dtype: str, rng: np.random.Generator
) -> None:
    """Hostile cases 12, 13 and 15: the bits of a contiguous copy, for every argument at once."""
    p = make_problem(cell, dtype, rng, T=5, B=4, I=6, H=7, L=2, D=2)
    p.options = rows_of("lengths_reset", 5, 4, rng)
    change = LAYOUTS[layout]
    changed = Problem(
        cell,
        change(p.x),
        {name: change(array) for name, array in p.weights.items()},
        map_state(change, p.state),
        change(p.dy),
        map_state(change, p.dstate),
        {name: change(array) for name, array in p.options.items()},
    )
    forward = getattr(functional, f"{p.family}_forward")
    backward = getattr(functional, f"{p.family}_backward")
    results = []
    for q in (p, changed):
        y, final, tape = forward(q.x, q.weights, q.state, **q.options, **q.cell_options)
        g = backward(tape, q.dy, q.dstate)
        results.append([y, *state_arrays(final), g.x, *state_arrays(g.state), *g.params.values()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@st.composite
def problems(draw: Any, cell: str | None = None) -> tuple[Problem, dict[str, Any]]:
    """A problem in any shape, layout and dtype, and options of the call that change no result."""
    cell, dtype = cell or draw(st.sampled_from(list(CELLS))), draw(st.sampled_from(DTYPES))
    T, B = draw(st.integers(0, 12)), draw(st.integers(0, 9))
    I, H = draw(st.integers(1, 20)), draw(st.integers(1, 35))
    L, D = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    batched, batch_first = draw(st.booleans()), draw(st.booleans())
    bias, one_hot = draw(st.booleans()), draw(st.booleans())
    if not batched:
        B = 1
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p = make_problem(cell, dtype, rng, T=T, B=B, I=I, H=H, L=L, D=D, bias=bias)
    if one_hot:
        p.x = rng.integers(I, size=(T, B)).astype(draw(st.sampled_from("bBhHiIqQ")))

    options: dict[str, Any] = {"batch_first": batch_first}
    if batched and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
        integers = draw(st.sampled_from(["uint8", "int32", "int64"]))
        options["lengths"] = np.array(lengths, integers)
    if draw(st.booleans()):
        options["reset"] = rng.random((T, B)) < 0.3

    def place(array: Any, steps: bool = False) -> Any:
        if array is None:
            return None
        if not batched:
            array = array[:, 0]
        elif steps and batch_first:
            array = np.swapaxes(array, 0, 1)
        return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](array)

    p.x, p.dy = place(p.x, steps=True), place(p.dy, steps=True)
    p.state, p.dstate = map_state(place, p.state), map_state(place, p.dstate)
    if "reset" in options:
        options["reset"] = place(options["reset"], steps=True)
    present = draw(st.tuples(*[st.booleans()] * 3))
    p.state, p.dy, p.dstate = (
        value if there else None
        for value, there in zip((p.state, p.dy, p.dstate), present, strict=True)
    )
    p.options = options
    same = {"threads": draw(st.sampled_from([None, 1, 2, 3]))}
    return p, same


def native(array: Any) -> Any:
    """A plain copy for the reference, which does not convert byte orders."""
    return None if array is None else np.array(array, array.dtype.newbyteorder("="))


def check_functional(p: Problem, same: dict[str, Any], dropout: float) -> None:
    drop = {"dropout": dropout, "dropout_key": KEY} if dropout else {}
    plain = Problem(
        p.cell,
        native(p.x),
        p.weights,
        map_state(native, p.state),
        native(p.dy),
        map_state(native, p.dstate),
        p.options,
    )
    want_y, want_final, want_gradients = run_reference(plain, **drop)
    options = {**p.options, **p.cell_options, **same}
    if not dropout:
        y, final = getattr(functional, p.family)(p.x, p.weights, p.state, **options)
        assert_forward_close(y, want_y, "y of inference")
        assert_states_close(final, want_final, "state of inference")
    forward = getattr(functional, f"{p.family}_forward")
    backward = getattr(functional, f"{p.family}_backward")
    y, final, tape = forward(p.x, p.weights, p.state, **options, **drop)
    assert_forward_close(y, want_y, "y")
    assert_states_close(final, want_final, "state")
    gradients = backward(tape, p.dy, p.dstate, **same)
    dtype = p.weights["weight_hh_l0"].dtype.name
    assert_gradients_close(gradients, want_gradients, dtype, common_scale=True)


@pytest.mark.parametrize("cell", CELLS)
@given(data=st.data(), dropout=st.sampled_from([0.0, 0.0, 0.25, 0.8]))
def test_random_problems(cell: str, data: st.DataObject, dropout: float) -> None:
    check_functional(*data.draw(problems(cell)), dropout)


@given(problems())
def test_random_problems_through_layers(drawn: tuple[Problem, dict[str, Any]]) -> None:
    """The layers do what the functions do, bit for bit."""
    p, same = drawn
    layer = make_layer(p)
    y, final = layer(p.x, p.state, **call_options(p), **same)
    options = {**p.options, **p.cell_options, **same}
    y_f, final_f = getattr(functional, p.family)(p.x, p.weights, p.state, **options)
    np.testing.assert_array_equal(y, y_f)
    for a, b in zip(state_arrays(final), state_arrays(final_f), strict=True):
        np.testing.assert_array_equal(a, b)
    y, final, tape = layer.forward(p.x, p.state, **call_options(p), **same)
    np.testing.assert_array_equal(y, y_f)
    forward = getattr(functional, f"{p.family}_forward")
    _, _, tape_f = forward(p.x, p.weights, p.state, **options)
    g, g_f = tape.backward(p.dy, p.dstate, **same), tape_f.backward(p.dy, p.dstate, **same)
    pairs = [*zip(state_arrays(g.state), state_arrays(g_f.state), strict=True)]
    pairs += [(g.params[name], g_f.params[name]) for name in p.weights]
    if g_f.x is not None:
        pairs.append((g.x, g_f.x))
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


@given(problems(), st.floats(0.1, 3.0))
def test_accumulation_into_given_gradients(
    drawn: tuple[Problem, dict[str, Any]], start: float
) -> None:
    """backward(into=…) adds to what is there and returns it; nothing else changes."""
    p, same = drawn
    options = {**p.options, **p.cell_options, **same}
    forward = getattr(functional, f"{p.family}_forward")
    _, _, tape = forward(p.x, p.weights, p.state, **options)
    plain = tape.backward(p.dy, p.dstate)
    into = {name: np.full_like(array, start) for name, array in plain.params.items()}
    _, _, tape = forward(p.x, p.weights, p.state, **options)
    added = tape.backward(p.dy, p.dstate, into=into)
    scale = max([start, *(float(np.abs(a).max(initial=0)) for a in plain.params.values())])
    for name, array in added.params.items():
        assert array is into[name]
        assert_gradient_close(array, plain.params[name] + array.dtype.type(start), name, scale)
