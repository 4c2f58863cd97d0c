"""What a caller or a machine can do to the library, by the numbers of the list of hostile cases.

The rule: an exception that names the argument, what was expected and what was got, before any large
allocation and any write; never a signal, a hang or a silently wrong number; arrays, weights and
tapes are left as they were. What could end or change the process runs in one of its own, whose exit
status is asserted.

Elsewhere: 37 to 39 are in test_bits.py; 44, 45 and 49 in test_threads.py; 48 in
cpp/test_threads.cc; 40 with the optimisers, 57 to 62 with the files.

T steps, B batch, I inputs, H hidden, L layers, D directions.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import (
    CELLS,
    assert_same_bits,
    make_layer,
    map_state,
    random_state,
    run_python,
    state_arrays,
)
from fastrnn import _core, functional, reference

FAMILIES = {"rnn": "rnn_tanh", "lstm": "lstm", "gru": "gru_reset_after"}
T, B, I, H = 5, 3, 4, 6

every_cell = pytest.mark.parametrize("cell", CELLS)


@contextmanager
def refused(error: type[Exception], argument: str) -> Iterator[None]:
    """The block raises `error`, which names the argument, what was expected and what was got."""
    with pytest.raises(error) as info:
        yield
    message = str(info.value)
    assert message.startswith(argument), message
    assert ": expected " in message and "got" in message, message


def survives(code: str, *args: str, timeout: float = 60, **env: str) -> str:
    """The code in its own process, which ends with status 0; what it printed."""
    result = run_python("import numpy as np, fastrnn\n" + code, *args, timeout=timeout, **env)
    assert result.returncode == 0, f"status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def inputs(rng: np.random.Generator, *shape: int, dtype: Any = "float32") -> np.ndarray:
    return rng.standard_normal(shape or (T, B, I)).astype(dtype)


def lstm_weights(D: int = 1) -> dict[str, np.ndarray]:
    return make_layer("lstm", I, H, D=D).state_dict()


def gradient_arrays(g: Any) -> list[np.ndarray]:
    arrays = [*state_arrays(g.state), *g.params.values()]
    return arrays if g.x is None else [*arrays, g.x]


def assert_all_same(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a, b, f"array {k}")


# --- Shapes, strides, dtypes --------------------------------------------------------------------


@every_cell
def test_01_one_dimensional_x_with_two_dimensional_state(cell: str) -> None:
    layer, h = make_layer(cell, I, H), zeros(1, H)
    with refused(ValueError, "x"):
        layer(zeros(I), (h, h) if cell == "lstm" else h)


@every_cell
def test_02_five_dimensional_state(cell: str) -> None:
    layer, h = make_layer(cell, I, H), zeros(1, B, H)
    for bad in (h[None, None], h[0, 0, 0], h[0, 0], h[0], h[:, :, :-1], zeros(2, B, H)):
        for call in (layer, layer.forward, layer.freeze()):
            with refused(ValueError, "state"):
                call(zeros(T, B, I), (h, bad) if cell == "lstm" else bad)
    stream = layer.freeze().stream(B)
    with refused(ValueError, "state"):
        stream.state = (h[None], h) if cell == "lstm" else h[None]


def test_02_state_that_is_no_pair() -> None:
    lstm, h = make_layer("lstm", I, H), zeros(1, B, H)
    with refused(TypeError, "state"):
        lstm(zeros(T, B, I), h)
    with refused(ValueError, "state"):
        lstm(zeros(T, B, I), (h, h, h))
    with refused(TypeError, "state"):
        make_layer("rnn_tanh", I, H)(zeros(T, B, I), {"h": h})


@every_cell
def test_03_gradients_smaller_than_the_forward_pass(cell: str, rng: np.random.Generator) -> None:
    """Whatever was refused, the tape then still gives the right gradients."""
    layer, x = make_layer(cell, I, H), inputs(rng)
    y, _, tape = layer.forward(x)
    want = tape.backward(y)
    _, _, tape = layer.forward(x)
    for bad in (y[:-1], y[:, :-1], y[:, :, :-1], y[0], y[None], zeros(0), zeros()):
        with refused(ValueError, "dy"):
            tape.backward(bad)
    h = zeros(1, B, H)
    for bad in (h[:, :-1], h[:, :, :-1], h[0], zeros(2, B, H)):
        with refused(ValueError, "dstate"):
            tape.backward(y, (bad, h) if cell == "lstm" else bad)
    for name, array in layer.params.items():
        into = {key: np.zeros_like(value) for key, value in layer.params.items()}
        into[name] = array[:-1].copy()
        with refused(ValueError, "into"):
            tape.backward(y, into=into)
        assert not any(value.any() for value in into.values() if value.shape == array.shape)
        del into[name]
        with refused(ValueError, "into"):
            tape.backward(y, into=into)
    assert_all_same(gradient_arrays(tape.backward(y)), gradient_arrays(want))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_04_weights_of_the_wrong_rank(name: str) -> None:
    good = lstm_weights()
    array = good[name]
    for bad in (array[0], array[..., None], array[None], array.ravel()[0], array[:0]):
        for call in (functional.lstm, functional.lstm_forward):
            with refused(ValueError, "weights"):
                call(zeros(T, B, I), {**good, name: bad})
        layer = make_layer("lstm", I, H)
        with refused(ValueError, "state"):
            layer.load_state_dict({**good, name: bad})
        assert_all_same(list(layer.params.values()), list(good.values()))


@pytest.mark.parametrize("name", ["weight_ci_l0", "weight_hr_l0", "weight_ih_l1", "norm", ""])
def test_04_weights_of_other_networks(name: str) -> None:
    """Peepholes, projections, norms: refused, never ignored."""
    for extra in (np.float32(1), zeros(2), zeros(4 * H, H)):
        with refused(ValueError, "weights"):
            functional.lstm(zeros(T, B, I), {**lstm_weights(), name: extra})


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0", "weight_ih_l0", "weight_hh_l0"])
def test_05_06_wrong_ranks_in_backward(name: str, rng: np.random.Generator) -> None:
    """Scalar biases and rank-3 weights where the gradients go."""
    layer = make_layer("lstm", I, H)
    y, _, tape = layer.forward(inputs(rng))
    good = {key: np.zeros_like(value) for key, value in layer.params.items()}
    for shape in ((), (1,), (*good[name].shape, 1), (1, *good[name].shape)):
        with refused(ValueError, "into"):
            tape.backward(y, into={**good, name: zeros(*shape)})
    for bad in (good[name].astype(np.float64), good[name].tolist(), None):
        with refused(TypeError, "into"):
            tape.backward(y, into={**good, name: bad})
    frozen = good[name].copy()
    frozen.flags.writeable = False
    for bad in (frozen, np.zeros((2 * len(frozen), *frozen.shape[1:]), np.float32)[::2]):
        with refused(ValueError, "into"):
            tape.backward(y, into={**good, name: bad})
    assert not any(value.any() for value in good.values())


@every_cell
def test_07_dy_of_another_batch_or_time(cell: str, rng: np.random.Generator) -> None:
    y, _, tape = make_layer(cell, I, H).forward(inputs(rng))
    for shape in ((T + 1, B, H), (T, B + 1, H), (B, T, H), (1, B, H), (T, 1, H), (T, H)):
        with refused(ValueError, "dy"):
            tape.backward(zeros(*shape))
    assert y.shape == (T, B, H)


def test_08_batch_and_time_swapped() -> None:
    h = zeros(1, B, H)
    for batch_first in (False, True):
        layer = make_layer("lstm", I, H, batch_first=batch_first)
        right = (B, T, I) if batch_first else (T, B, I)
        with refused(ValueError, "state"):
            layer(zeros(right[1], right[0], I), (h, h))
        assert layer(zeros(*right), (h, h))[0].shape == (*right[:2], H)


def test_09_hidden_size_that_the_weights_do_not_have() -> None:
    weights = lstm_weights()
    with refused(ValueError, "state"):
        make_layer("lstm", I, H + 1).load_state_dict(weights)
    for hidden in (H - 1, H + 1, 4 * H, 2**31, 2**62):
        with pytest.raises((ValueError, MemoryError)):
            _core.Packed("lstm", I, hidden, 1, 1, True, "float32", list(weights.values()))


def test_10_weights_that_disagree() -> None:
    w = lstm_weights()
    for bad in (
        {**w, "weight_hh_l0": zeros(4 * (H + 1), H + 1)},
        {**w, "weight_ih_l0": zeros(4 * (H + 1), I)},
        {**w, "weight_hh_l0": zeros(4 * H, H + 1)},
        {**w, "weight_hh_l0_reverse": zeros(4 * H, H)},
        {key: value for key, value in w.items() if key != "bias_hh_l0"},
        {**w, "weight_hh_l1": zeros(4 * H, H)},
        {key: value for key, value in lstm_weights(D=2).items() if key != "bias_hh_l0_reverse"},
        {},
    ):
        with refused(ValueError, "weights"):
            functional.lstm(zeros(T, B, I), bad)
    with refused(ValueError, "weights"):
        functional.gru(zeros(T, B, I), w)


@every_cell
def test_11_x_of_every_other_rank(cell: str) -> None:
    layer = make_layer(cell, I, H)
    for call in (layer, layer.forward, layer.freeze()):
        for shape in ((), (I,), (0,), (T, B, I, 1), (1, T, B, I)):
            with refused(ValueError, "x"):
                call(zeros(*shape))
            with refused(ValueError, "x"):
                call(np.zeros(shape[:-2] if len(shape) == 1 else (T, B, I), np.int64))
        for shape in ((T, B, I + 1), (T, B, I - 1), (T, B, 0), (T, I + 1)):
            with refused(ValueError, "x"):
                call(zeros(*shape))
        assert call(zeros(T, I))[0].shape == (T, H)
    stream = layer.freeze().stream(B)
    for shape in ((), (I,), (B, I + 1), (B + 1, I), (1, B, I)):
        with refused(ValueError, "x_t"):
            stream.step(zeros(*shape))


def test_13_length_one_axes_with_odd_strides(rng: np.random.Generator) -> None:
    """NumPy lets an axis of length 1 have any stride; it must never be multiplied with."""
    x = inputs(rng, 1, 1, 1)
    layer = make_layer("lstm", 1, H)
    want = layer(x)[0]
    for strides in itertools.product((4, 0, -4, 3, -(2**62), 2**62 + 1), repeat=3):
        odd = np.lib.stride_tricks.as_strided(x, (1, 1, 1), strides)
        assert_same_bits(layer(odd)[0], want)
    y, _, tape = layer.forward(x)
    dy = np.lib.stride_tricks.as_strided(y, (1, 1, H), (2**61 + 3, -7, 4))
    g = tape.backward(dy)
    _, _, tape = layer.forward(x)
    assert_all_same(gradient_arrays(g), gradient_arrays(tape.backward(y)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_13_negative_strides(cell: str, dtype: str, rng: np.random.Generator) -> None:
    layer, x = make_layer(cell, I, H, D=2, dtype=dtype), inputs(rng, dtype=dtype)
    want = layer(x)[0]
    for axes in ((0,), (1,), (2,), (0, 1, 2)):
        assert_same_bits(layer(np.flip(np.flip(x, axes).copy(), axes))[0], want)


def test_14_views_that_claim_too_much() -> None:
    """Zero strides make any size: refused by its shape, or MemoryError by what it would take."""
    survives("""
from fastrnn import functional
layer, z = fastrnn.LSTM(4, 3), np.float32(0)
many = lambda value, *shape: np.broadcast_to(value, shape)
x, h = np.zeros((2, 3, 4), np.float32), np.zeros((1, 3, 3), np.float32)
y, _, tape = layer.forward(x)
stream = layer.freeze().stream(3)
calls = [
    lambda: layer(many(z, 2**50, 1, 4)),
    lambda: layer(many(z.astype(">f4"), 2**50, 1, 4)),
    lambda: layer.forward(many(x[0, 0], 2**50, 1, 4)),
    lambda: layer(many(z, 1, 2**50, 4)),
    lambda: layer(many(np.int64(0), 2**50, 1)),
    lambda: layer(many(np.uint8(0), 2**50, 1)),
    lambda: layer(many(np.uint8(0), 2**50)),
    lambda: layer(x, (many(z, 1, 2**50, 3), h)),
    lambda: layer(x, lengths=many(np.int8(1), 2**50)),
    lambda: layer(x, reset=many(False, 2**50, 3)),
    lambda: tape.backward(many(z, 2**50, 3, 3)),
    lambda: tape.backward(y, (many(z, 2**50, 3, 3), h)),
    lambda: stream.step(many(z, 2**50, 4)),
    lambda: stream.step(many(np.int64(1), 2**50)),
    lambda: stream.reset(many(np.int64(0), 2**50)),
    lambda: functional.rnn(x[:, :, :1], {
        "weight_ih_l0": many(z, 2**25, 1), "weight_hh_l0": many(z, 2**25, 2**25)}),
    lambda: layer.load_state_dict({name: many(z, 2**50) for name in layer.params}),
]
for k, call in enumerate(calls):
    try:
        call()
    except (ValueError, MemoryError) as error:
        assert "pybind" not in str(error), error
    else:
        raise SystemExit(f"call {k} was accepted")
tape.backward(y)
# What takes little is right: 2^45 steps of no row.
assert layer(np.zeros((2**45, 0, 4), np.float32))[0].shape == (2**45, 0, 3)
assert layer.forward(np.zeros((2**45, 0), np.int64))[0].shape == (2**45, 0, 3)
""")


def misaligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize("change", [misaligned, swapped])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_cell
def test_15_misaligned_or_byte_swapped(
    cell: str, dtype: str, change: Any, rng: np.random.Generator
) -> None:
    layer = make_layer(cell, I, H, dtype=dtype)
    x, state = inputs(rng, dtype=dtype), random_state(CELLS[cell][0], (1, B, H), dtype, rng)
    lengths = rng.integers(0, T + 1, B)
    y, final, tape = layer.forward(x, state, lengths=lengths)
    g = tape.backward(y, state)
    y2, final2, tape = layer.forward(change(x), map_state(change, state), lengths=change(lengths))
    g2 = tape.backward(change(y), map_state(change, state))
    assert_all_same([y2, *state_arrays(final2)], [y, *state_arrays(final)])
    assert_all_same(gradient_arrays(g2), gradient_arrays(g))
    weights = {name: change(array) for name, array in layer.params.items()}
    family, options = CELLS[cell]
    y3, _ = getattr(functional, family)(change(x), weights, state, lengths=lengths, **options)
    assert_same_bits(y3, y)
    ids = rng.integers(I, size=(T, B))
    assert_same_bits(layer(change(ids))[0], layer(ids)[0])
    into = {name: change(np.zeros_like(array)) for name, array in layer.params.items()}
    _, _, tape = layer.forward(x)
    with refused((ValueError, TypeError), "into"):  # type: ignore[arg-type]
        tape.backward(y, into=into)
    out = change(np.zeros((B, H), dtype))
    stream = layer.freeze().stream(B)
    with refused(ValueError, "out"):
        stream.step(x[0], out)
    assert_same_bits(stream.step(change(x[0])), layer(x[:1])[0][0])


NOT_FLOAT32 = [
    np.zeros((T, B, I), dtype)
    for dtype in ("O", "c8", "c16", "?", "M8[s]", "m8[s]", "S4", "U4", "V4", "f2", "f8", "g")
] + [np.zeros((T, B, I), [("x", "f4")]), [["a"]], {"a": 1}, {1, 2}, None, object(), "text", 1j]


@pytest.mark.parametrize("k", range(len(NOT_FLOAT32)))
def test_16_17_other_types(k: int, rng: np.random.Generator) -> None:
    """Refused wherever floats are expected, whatever NumPy would make of them."""
    bad = NOT_FLOAT32[k]
    layer, x = make_layer("lstm", I, H), inputs(rng)
    for call in (layer, layer.forward, layer.freeze()):
        with refused(TypeError, "x"):
            call(bad)
    h = zeros(1, B, H)
    if bad is not None:  # which means zeros
        with refused(TypeError, "state"):
            layer(x, (h, bad))
        y, _, tape = layer.forward(x)
        with refused(TypeError, "dy"):
            tape.backward(bad)
        with refused(TypeError, "dstate"):
            tape.backward(y, (bad, h))
    with refused(TypeError, "x_t"):
        layer.freeze().stream().step(bad)
    weights = {**lstm_weights(), "weight_ih_l0": bad}
    with refused(TypeError, "weights"):
        functional.lstm(x, weights)


def test_17_float_widths_do_not_mix(rng: np.random.Generator) -> None:
    """The message says how to convert."""
    for mine, other in (("float32", "float64"), ("float64", "float32")):
        layer = make_layer("gru_reset_after", I, H, dtype=mine)
        x, h = inputs(rng, dtype=mine), np.zeros((1, B, H), mine)
        y, _, tape = layer.forward(x, h)
        for call in (
            lambda layer=layer, x=x, other=other: layer(x.astype(other)),
            lambda layer=layer, x=x, h=h, other=other: layer(x, h.astype(other)),
            lambda tape=tape, y=y, other=other: tape.backward(y.astype(other)),
        ):
            with pytest.raises(TypeError, match=rf"{mine}, got {other}; .*\.astype\('{mine}'\)"):
                call()
    with refused(TypeError, "weights"):
        weights = lstm_weights()
        functional.lstm(zeros(T, B, I), {**weights, "bias_ih_l0": np.zeros(4 * H)})


# --- Lengths and resets -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_cell
def test_18_no_steps(cell: str, dtype: str, rng: np.random.Generator) -> None:
    layer = make_layer(cell, I, H, 2, 2, dtype=dtype)
    state = random_state(CELLS[cell][0], (4, B, H), dtype, rng)
    for x in (np.zeros((0, B, I), dtype), np.zeros((0, B), np.int64)):
        for rows in ({}, {"lengths": [0] * B}, {"reset": np.zeros((0, B), bool)}):
            for call in (layer, layer.freeze()):
                y, final = call(x, state, **rows)
                assert y.shape == (0, B, 2 * H)
                assert_all_same(state_arrays(final), state_arrays(state))
            for every in (None, 3):
                y, final, tape = layer.forward(x, state, **rows, checkpoint_every=every)
                assert_all_same(state_arrays(final), state_arrays(state))
                g = tape.backward(y, state)
                assert g.x is None if x.ndim == 2 else g.x.shape == x.shape
                assert_all_same(state_arrays(g.state), state_arrays(state))
                assert not any(array.any() for array in g.params.values())


@every_cell
def test_19_no_rows(cell: str) -> None:
    layer = make_layer(cell, I, H, 2, 2)
    for x in (zeros(T, 0, I), np.zeros((T, 0), np.int64), zeros(0, 0, I)):
        for rows in ({}, {"lengths": []}, {"reset": np.zeros((len(x), 0), bool)}):
            y, final = layer(x, **rows)
            assert y.shape == (len(x), 0, 2 * H)
            assert all(array.shape == (4, 0, H) for array in state_arrays(final))
            for every in (None, 2):
                y, final, tape = layer.forward(x, **rows, checkpoint_every=every)
                g = tape.backward(y, final)
                assert all(array.shape == (4, 0, H) for array in state_arrays(g.state))
                assert not any(array.any() for array in g.params.values())


@every_cell
def test_20_a_row_of_length_zero(cell: str, rng: np.random.Generator) -> None:
    layer, x = make_layer(cell, I, H, 2, 2), inputs(rng)
    state, dstate = (random_state(CELLS[cell][0], (4, B, H), "float32", rng) for _ in range(2))
    y, final, tape = layer.forward(x, state, lengths=[2, 0, T])
    g = tape.backward(rng.standard_normal(y.shape).astype(np.float32), dstate)
    assert_same_bits(y[:, 1], np.zeros_like(y[:, 1]))
    assert_same_bits(g.x[:, 1], np.zeros_like(g.x[:, 1]))
    for got, want in ((final, state), (g.state, dstate)):
        for a, b in zip(state_arrays(got), state_arrays(want), strict=True):
            assert_same_bits(a[:, 1], b[:, 1])


def test_21_22_lengths_out_of_range() -> None:
    layer, x = make_layer("lstm", I, H), zeros(T, B, I)
    for call in (layer, layer.forward, layer.freeze()):
        for bad in (T + 1, -1, -(2**63), 2**31, 2**62):
            with refused(ValueError, "lengths"):
                call(x, lengths=[1, bad, T])
        with refused(ValueError, "lengths"):
            call(x, lengths=np.array([1, 2**64 - 1, T], np.uint64))
        for shape in ((), (B + 1,), (B - 1,), (1, B), (B, 1), (0,)):
            with refused(ValueError, "lengths"):
                call(x, lengths=np.ones(shape, np.int64))
        with refused(ValueError, "lengths"):
            call(x[:, 0], lengths=[1])


def test_23_lengths_of_other_types() -> None:
    layer, x = make_layer("lstm", I, H), zeros(T, B, I)
    bads: list[Any] = [[2.5, 1, 1], [2.0, 1, 1], [True, False, True], ["1", "2", "3"]]
    bads += [[None, 1, 2], np.ones(B, object), np.ones(B, complex), {"a": 1}, "ab", zeros(B)]
    for bad in bads:
        for call in (layer, layer.forward, layer.freeze()):
            with refused(TypeError, "lengths"):
                call(x, lengths=bad)


def test_21_22_23_offsets_of_ragged_batches() -> None:
    """Where sequences stand one after the other, offsets are what lengths are elsewhere."""
    layer, values = make_layer("lstm", I, H), zeros(10, I)
    for call in (layer, layer.forward, layer.freeze()):
        for bad in (
            [0, 4, 11],
            [0, 4, 9],
            [1, 4, 10],
            [-1, 4, 10],
            [0, 7, 4, 10],
            [0, -3, 10],
            [0, 2**63 - 1, -(2**63), 10],
            [0, 2**40, 10],
            [0],
            [10],
            [],
            [[0, 10]],
            np.array([0, 2**64 - 1, 10], np.uint64),
            np.array(10),
        ):
            with refused((ValueError, TypeError), "offsets"):  # type: ignore[arg-type]
                call(fastrnn.Ragged(values, np.asarray(bad)))
        for dtype in (float, bool, object, complex):
            with refused(TypeError, "offsets"):
                call(fastrnn.Ragged(values, np.array([0, 10], dtype)))
        for shape in ((10, I, 1), (10,), (10, I + 1), ()):
            with refused(ValueError, "x"):
                call(fastrnn.Ragged(zeros(*shape), np.array([0, 10])))
        with refused(ValueError, "lengths"):
            call(fastrnn.Ragged(values, np.array([0, 10])), lengths=[10])


@every_cell
def test_24_unsorted_lengths(cell: str, rng: np.random.Generator) -> None:
    """In whatever order, a row's results are those that it has alone."""
    layer, x = make_layer(cell, I, H, 2, 2), inputs(rng, 9, 8, I)
    dy = inputs(rng, 9, 8, 2 * H)
    for lengths in ([3, 9, 0, 1, 9, 2, 2, 7], range(8), range(9, 1, -1), [4] * 8):
        y, final, tape = layer.forward(x, lengths=list(lengths))
        g = tape.backward(dy)
        for b, n in enumerate(lengths):
            y1, final1, tape = layer.forward(x[:n, b])
            g1 = tape.backward(dy[:n, b])
            assert_same_bits(y[:n, b], y1)
            assert_same_bits(g.x[:n, b], g1.x)
            for got, want in ((final, final1), (g.state, g1.state)):
                for a, c in zip(state_arrays(got), state_arrays(want), strict=True):
                    assert_same_bits(a[:, b], c)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@every_cell
def test_25_26_whatever_is_in_the_padding(
    cell: str, poison: float, rng: np.random.Generator
) -> None:
    """Of x and of dy: outputs there are 0, and nothing of it reaches any result."""
    layer, lengths = make_layer(cell, I, H, 2, 2, dropout=0.3, rng=1), np.array([2, 0, T])
    x, dy = inputs(rng), inputs(rng, T, B, 2 * H)
    padding = np.arange(T)[:, None] >= lengths
    results = []
    for value in (0.0, poison):
        x[padding], dy[padding] = value, value
        for every in (None, 2):
            layer.rng = np.random.default_rng(7)
            y, final, tape = layer.forward(x, lengths=lengths, checkpoint_every=every)
            g = tape.backward(dy)
            assert_same_bits(y[padding], np.zeros_like(y[padding]))
            assert_same_bits(g.x[padding], np.zeros_like(g.x[padding]))
            results.append([y, *state_arrays(final), *gradient_arrays(g)])
            assert all(np.isfinite(array).all() for array in results[-1])
        y, _ = layer(x, lengths=lengths)
        assert_same_bits(y[padding], np.zeros_like(y[padding]))
    for result in results[1:]:
        assert_all_same(result, results[0])


def test_27_resets() -> None:
    layer, x = make_layer("lstm", I, H), zeros(T, B, I)
    first = make_layer("lstm", I, H, batch_first=True)
    for call in (layer, layer.forward, layer.freeze()):
        for shape in ((), (T,), (B, T), (T, B, 1), (T, B + 1), (T - 1, B), (1, B), (0, 0)):
            with refused(ValueError, "reset"):
                call(x, reset=np.zeros(shape, bool))
        for dtype in ("i1", "u1", "f4", "O", "S1"):
            with refused(TypeError, "reset"):
                call(x, reset=np.zeros((T, B), dtype))
        with refused(ValueError, "reset"):
            call(x[:, 0], reset=np.zeros((T, 1), bool))
    with refused(ValueError, "reset"):
        first(x.transpose(1, 0, 2), reset=np.zeros((T, B), bool))


@every_cell
def test_27_a_reset_at_the_start_drops_the_state(cell: str, rng: np.random.Generator) -> None:
    layer, x = make_layer(cell, I, H), inputs(rng)
    state = random_state(CELLS[cell][0], (1, B, H), "float32", rng)
    reset = np.zeros((T, B), bool)
    reset[0, 1] = True
    y, _, tape = layer.forward(x, state, reset=reset)
    g = tape.backward(y)
    fresh, kept = layer(x)[0], layer(x, state)[0]
    assert_same_bits(y[:, 1], fresh[:, 1])
    assert_same_bits(y[:, [0, 2]], kept[:, [0, 2]])
    for array in state_arrays(g.state):
        assert not array[:, 1].any() and array[:, 0].any()


# --- Sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
def test_28_sizes(name: str) -> None:
    good = {"input_size": 2, "hidden_size": 2, "num_layers": 1}
    for bad in (0, -1, -(2**63), 2**31, 2**63, 2**64 + 1, np.int64(0)):
        with refused(ValueError, name):
            fastrnn.LSTM(**{**good, name: bad})
    for bad in (True, np.True_, 1.0, np.float64(1), "1", None, [1], np.array([1]), 1j):
        with refused(TypeError, name):
            fastrnn.LSTM(**{**good, name: bad})
    assert fastrnn.LSTM(**{**good, name: np.uint8(3)})


def test_28_more_layers_than_names_can_be_made_for() -> None:
    with refused(ValueError, "num_layers"):
        fastrnn.LSTM(1, 1, 2**31 - 1)


def test_28_dropout() -> None:
    for bad in (-0.1, 1.0, 1, 1.5, np.nan, np.inf, -np.inf, np.float32(1)):
        with refused(ValueError, "dropout"):
            fastrnn.LSTM(2, 2, 2, dropout=bad)
        with refused(ValueError, "dropout"):
            weights = fastrnn.LSTM(2, 2, 2).params
            functional.lstm_forward(zeros(1, 1, 2), weights, dropout=bad, dropout_key=1)
    for bad in (True, "0.5", None, [0.5], 0.5j):
        with refused(TypeError, "dropout"):
            fastrnn.LSTM(2, 2, 2, dropout=bad)  # type: ignore[arg-type]


def test_28_other_counts(rng: np.random.Generator) -> None:
    layer, x = make_layer("lstm", I, H), inputs(rng)
    frozen = layer.freeze()
    for bad in (0, -1, 2**31, 2**64):
        with refused(ValueError, "checkpoint_every"):
            layer.forward(x, checkpoint_every=bad)
        with refused(ValueError, "batch_size"):
            frozen.stream(bad)
    for bad in (True, 1.0, "1"):
        with refused(TypeError, "checkpoint_every"):
            layer.forward(x, checkpoint_every=bad)
        with refused(TypeError, "batch_size"):
            frozen.stream(bad)
    for bad in (I, -1, 2**62, -(2**63)):
        with refused(ValueError, "x"):
            layer(np.array([[0, bad]]))
        with refused(ValueError, "x_t"):
            frozen.stream(2).step(np.array([0, bad]))
    with refused(ValueError, "x"):
        layer(np.array([[2**64 - 1]], np.uint64))
    stream = frozen.stream(2)
    for bad in (2, -1, [0, 2], [-1], 2**62, [[0]], [True], [True, False, True]):
        with refused(ValueError, "rows"):
            stream.reset(bad)
    for bad in (1.0, [0.5], "0", [None]):
        with refused(TypeError, "rows"):
            stream.reset(bad)
    stream.reset([])


def test_29_offsets_past_two_to_the_31(rng: np.random.Generator) -> None:
    """Input and gradient of 5 rows of 2^20 steps of 2^9 features, of which few hold anything.

    The rows start up to 2^31 elements into arrays of 10 GiB, whose pages are never touched but for
    the steps that the lengths leave.
    """
    steps, features, lengths = 2**20, 2**9, [3, 2, 4, 1, 3]
    try:
        x = np.zeros((5, steps, features), np.float32)
    except MemoryError:
        pytest.skip("needs 10 GiB of address space")
    assert x.strides[0] * 4 // x.itemsize >= 2**31
    for b, n in enumerate(lengths):
        x[b, :n] = inputs(rng, n, features)
    layer = make_layer("gru_reset_after", features, 1, batch_first=True)
    y, _, tape = layer.forward(x, lengths=lengths)
    dy = np.broadcast_to(inputs(rng, steps, 1), y.shape)
    g = tape.backward(dy)
    for b, n in enumerate(lengths):
        y1, _, tape = layer.forward(x[b : b + 1, :n].copy())
        assert_same_bits(y[b, :n], y1[0])
        assert_same_bits(g.x[b, :n], tape.backward(dy[b : b + 1, :n]).x[0])
        assert not g.x[b, n : n + 1000].any()
        assert_same_bits(layer(x, lengths=lengths)[0][b, :n], y1[0])


@pytest.mark.slow
def test_29_gates_past_two_to_the_31(rng: np.random.Generator) -> None:
    """T·B·4·H past 2^31: an output of 2 GiB, checked where sequences begin anew."""
    steps, hidden = 2**24 + 1000, 32
    assert steps * 4 * hidden > 2**31
    x, reset = inputs(rng, steps)[:, None, None], np.zeros((steps, 1), bool)
    starts = [2**23 + 7, 2**24, steps - 50]
    reset[starts] = True
    layer = make_layer("lstm", 1, hidden)
    y, _ = layer(x, reset=reset)
    for start in starts:
        end = min(steps, start + 70)
        assert_same_bits(y[start:end], layer(x[start:end])[0])


def test_30_byte_counts_that_wrap() -> None:
    for sizes in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 2**30), (1, 2**31 - 1), (2**20, 2**20)):
        for layer in (fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU):
            with pytest.raises((MemoryError, OverflowError)):
                layer(*sizes)
    layer = make_layer("lstm", 1, 64)
    for shape in ((2**31, 2**31 - 1, 1), (2**44, 2**16, 1), (2**56, 1, 1)):
        for call in (layer, layer.forward):
            with pytest.raises((MemoryError, OverflowError, ValueError)):
                call(np.broadcast_to(np.float32(0), shape))


ALLOCATING = {
    "call": "layer(x, threads=2)[0]",
    "backward": "backward(None)",
    "checkpoints": "backward(7)",
    "stream": "layer.freeze().stream(4000).step(np.ones((4000, 64), np.float32))",
    "conversion": "layer(np.asfortranarray(x).astype('>f4'))[0]",
}


@pytest.mark.parametrize("name", ALLOCATING)
def test_31_every_allocation_fails_once(name: str) -> None:
    """Address space given out a MiB at a time: MemoryError until it is enough, and no harm done.

    In a thread other than the main one, with the pool at work.
    """
    survives(
        f"""
import resource, threading

layer = fastrnn.LSTM(64, 128, 2, rng=0)
rng = np.random.default_rng(0)
x = rng.standard_normal((200, 40, 64)).astype(np.float32)
dy = rng.standard_normal((200, 40, 128)).astype(np.float32)
small = layer(x[:2], threads=2)[0]

def backward(every):
    _, _, tape = layer.forward(x, checkpoint_every=every, threads=2)
    return tape.backward(dy, threads=2).x

def call():
    return {ALLOCATING[name]}

def attempt(go):
    go.wait()
    try:
        results.append(call())
    except MemoryError:
        failures.append(megabytes)

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

failures, results = [], []
for megabytes in range(2000):
    go = threading.Event()
    thread = threading.Thread(target=attempt, args=(go,))
    thread.start()
    limit = used() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        go.set()
        thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert np.array_equal(layer(x[:2], threads=2)[0], small)
    if results:
        break
    assert failures[-1] == megabytes
assert len(failures) > 2 and len(results) == 1, failures
assert np.array_equal(call(), results[0])
""",
        MALLOC_ARENA_MAX="1",  # glibc: no reserve of address space, nor of freed memory
        MALLOC_MMAP_THRESHOLD_="131072",
        MALLOC_TRIM_THRESHOLD_="0",
    )


def test_32_a_million_steps(rng: np.random.Generator) -> None:
    """No recursion, and the memory that checkpoints promise: O(T/k + k) instead of O(T)."""
    steps = 10**6
    layer, x = make_layer("gru_reset_after", 2, 4), inputs(rng, steps, 1, 2)
    y, _, tape = layer.forward(x)
    full = tape.nbytes
    want = tape.backward(y)
    y2, _, tape = layer.forward(x, checkpoint_every=1000)
    assert tape.nbytes < x.nbytes + full / 200  # the input, and states a thousand steps apart
    got = tape.backward(y)
    assert_same_bits(y2, y)
    assert_all_same(gradient_arrays(got), gradient_arrays(want))
    assert np.isfinite(got.x).all() and tape.nbytes == 0


def test_32_close_checkpoints_in_a_long_sequence(rng: np.random.Generator) -> None:
    """Time grows with the steps, not with the number of checkpoints times the steps."""
    layer, x = make_layer("gru_reset_after", 2, 4), inputs(rng, 200_000, 1, 2)

    def seconds(every: int | None) -> float:
        start = time.perf_counter()
        layer.forward(x, checkpoint_every=every)
        return time.perf_counter() - start

    assert seconds(5) < 10 * max(seconds(None), seconds(None))


# --- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_cell
def test_33_nan_in_one_row(cell: str, dtype: str, poison: float, rng: np.random.Generator) -> None:
    """In any place of a tile: every other row has the bits of a run without it."""
    n = 17
    layer, x = make_layer(cell, I, 21, 2, 2, dtype=dtype), inputs(rng, T, n, I, dtype=dtype)
    dy = inputs(rng, T, n, 42, dtype=dtype)
    y, final, tape = layer.forward(x)
    g = tape.backward(dy)
    for row in (0, 5, 6, 8, 16):
        others = np.arange(n) != row
        bad = x.copy()
        bad[2, row, 1] = poison
        with np.errstate(all="ignore"):
            y2, final2, tape = layer.forward(bad, threads=2)
            g2 = tape.backward(dy)
        pairs = [(y2, y), (g2.x, g.x)]
        pairs += zip(state_arrays(final2), state_arrays(final), strict=True)
        pairs += zip(state_arrays(g2.state), state_arrays(g.state), strict=True)
        for a, b in pairs:
            assert_same_bits(a[:, others], b[:, others])
        if np.isnan(poison):
            assert np.isnan(y2[2:, row, :21]).all() and np.isnan(y2[:3, row, 21:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_cell
def test_34_saturation(cell: str, dtype: str, rng: np.random.Generator) -> None:
    """±Inf and 1e30 in x: NaN exactly where the float64 reference has it, else its values."""
    family, options = CELLS[cell]
    layer = make_layer(cell, I, 19, dtype=dtype)
    weights = {name: a.astype(np.float64) for name, a in layer.params.items()}
    x = inputs(rng, 2, 64, I, dtype=dtype)
    places = rng.random(x.shape) < 0.2
    x[places] = rng.choice([np.inf, -np.inf, 1e30, -1e30], places.sum())
    with np.errstate(all="ignore"):
        want, _ = getattr(reference, family)(x.astype(np.float64), weights, **options)
        got, _ = layer(x)
    assert np.isnan(want).any() and np.isfinite(want[:, ~np.isinf(x).any((0, 2))]).all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    largest = np.abs(x, where=np.isfinite(x), out=np.ones_like(x)).max(2, keepdims=True)
    scale = np.maximum(1, np.maximum.accumulate(largest)) if cell == "rnn_relu" else 1
    np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_cell
def test_35_denormals_are_zeros(cell: str, dtype: str, rng: np.random.Generator) -> None:
    """The documented flush mode: in inputs, weights, states and gradients, as 0 exactly."""
    tiny = np.finfo(dtype).tiny / 3
    family = CELLS[cell][0]
    assert tiny > 0
    results = []
    for value in (0.0, tiny, -tiny):
        layer = make_layer(cell, I, H, dtype=dtype)
        for name in layer.params:
            layer.params[name].ravel()[::3] = value
        x, dy = (np.random.default_rng(k).standard_normal((T, B, n)) for k, n in ((0, I), (1, H)))
        x, dy = x.astype(dtype), dy.astype(dtype)
        x[:, :, ::2], dy[:, ::2] = value, value
        state = random_state(family, (1, B, H), dtype, np.random.default_rng(2))
        for array in state_arrays(state):
            array[..., ::2] = value
        y, final, tape = layer.forward(x, state)
        g = tape.backward(dy)
        results.append([layer(x, state)[0], y, *state_arrays(final), *gradient_arrays(g)])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(a, b)  # 0 and -0 are one here


def test_35_denormals_cost_nothing(rng: np.random.Generator) -> None:
    """At most twice the time, forward and backward; 20 times is what they cost unflushed."""
    layer = make_layer("lstm", 64, 64)
    tiny = np.float32(1e-39)
    x = inputs(rng, 40, 16, 64)

    def seconds(values: np.ndarray) -> float:
        best = np.inf
        for _ in range(7):
            start = time.perf_counter()
            y, _, tape = layer.forward(values, threads=1)
            tape.backward(y * tiny if values is not x else y, threads=1)
            best = min(best, time.perf_counter() - start)
        return best

    normal = seconds(x)
    for name in layer.params:
        layer.params[name] = layer.params[name] * tiny
    assert seconds(x * tiny) < 2 * normal + 0.002


FENV = """
import ctypes, ctypes.util, platform

libm = ctypes.CDLL(ctypes.util.find_library("m"))
x86 = platform.machine() in ("x86_64", "AMD64", "i686")
UPWARD = 0x800 if x86 else 0x400000

def environment():
    buffer = (ctypes.c_uint8 * 64)()
    libm.fegetenv(buffer)
    return buffer

def control():  # MXCSR without its exception flags, or FPCR
    offset = 28 if x86 else 0
    return int.from_bytes(bytes(environment()[offset:offset + 4]), "little") & ~0x3F

def flush(on):  # flush to zero, and with it denormals are zero
    buffer, offset, mask = environment(), 28 if x86 else 0, 0x8040 if x86 else 1 << 24
    value = int.from_bytes(bytes(buffer[offset:offset + 4]), "little")
    value = value | mask if on else value & ~mask
    buffer[offset:offset + 4] = list(value.to_bytes(4, "little"))
    libm.fesetenv(buffer)
"""


def test_36_the_callers_floating_point_environment() -> None:
    """Rounding mode and flush mode are the caller's again on return, and do not change a bit."""
    survives(
        FENV
        + """
layer = fastrnn.LSTM(5, 40, 2, dropout=0.5, rng=0)
rng = np.random.default_rng(0)
x = rng.standard_normal((20, 30, 5)).astype(np.float32)
dy = rng.standard_normal((20, 30, 40)).astype(np.float32)

def results(threads):
    layer.rng = np.random.default_rng(1)
    y, (h, c), tape = layer.forward(x, threads=threads)
    g = tape.backward(dy, threads=threads)
    frozen = layer.freeze()
    stream = frozen.stream(30)
    stream.step(x[0])
    stream.reset([1])
    return [y, h, c, g.x, *g.state, *g.params.values(), frozen(x)[0], *stream.state]

want = results(1)
before = control()
for rounding in (0, UPWARD):
    for flushed in (False, True):
        libm.fesetround(rounding)
        flush(flushed)
        mine = control()
        assert flushed or rounding or mine == before
        got = {threads: results(threads) for threads in (1, 2)}
        try:
            layer(np.zeros((1, 1, 4), np.float32))
        except ValueError:
            pass
        assert control() == mine, (rounding, flushed, hex(mine), hex(control()))
        assert libm.fegetround() == rounding
        flush(False)
        libm.fesetround(0)
        for arrays in got.values():
            assert all(np.array_equal(a, b) for a, b in zip(arrays, want, strict=True))
"""
    )


# --- Processes, signals -------------------------------------------------------------------------

FORKS = """
import gc, os, sys, threading, time

fastrnn.set_num_threads(4)
layer, wide = fastrnn.LSTM(8, 64, rng=0), fastrnn.LSTM(8, 512, rng=0)
x = np.random.default_rng(0).standard_normal((30, 32, 8)).astype(np.float32)
big = np.zeros((2000, 64, 8), np.float32)

def results():
    y, _, tape = layer.forward(x)
    return [y, *tape.backward(y).params.values(), wide(x[:, :1])[0]]

want = results()

def check():
    for a, b in zip(results(), want, strict=True):
        assert np.array_equal(a, b)

def in_child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")


@needs_fork
def test_42_fork_after_a_parallel_call() -> None:
    """In a child, a child of it, and beside a thread that is in a parallel call."""
    survives(
        FORKS
        + """
assert in_child(check) == 0
check()

def grandchild():
    check()
    assert in_child(check) == 0
assert in_child(grandchild) == 0

stop = False
def busy():
    while not stop:
        layer(big)
thread = threading.Thread(target=busy)
thread.start()
for k in range(8):
    time.sleep(0.01 * k)
    status = in_child(check)
    assert status == 0, (k, status)
stop = True
thread.join()
check()
"""
    )


@needs_fork
def test_42_multiprocessing() -> None:
    survives(
        FORKS
        + """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    for y in pool.map(layer, [x] * 4):
        assert np.array_equal(y[0], want[0])
"""
    )


@needs_fork
@pytest.mark.parametrize("what", ["rows", "layers", "training"])
def test_42_fork_by_a_signal_handler_in_a_parallel_call(what: str) -> None:
    """The child cannot finish the call, since the threads are not there; the parent does."""
    survives(
        FORKS
        + f"""
import signal
deep = fastrnn.LSTM(256, 256, 3, rng=0).freeze()
flat = fastrnn.LSTM(256, 256, rng=0)
row, rows = np.ones((20000, 1, 256), "f"), np.ones((1000, 32, 256), "f")
y, _, tape = flat.forward(rows)
calls = {{
    "rows": lambda: flat(rows),
    "layers": lambda: deep(row),
    "training": lambda: tape.backward(y),
}}
pid = None
def fork(*_):
    global pid
    if pid is None:
        pid = os.fork()
signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.03)
try:
    calls[{what!r}]()
except RuntimeError as error:
    os._exit(0 if pid == 0 and "forked" in str(error) else 1)
if pid == 0:
    os._exit(2)  # finished without the other thread?
assert pid is not None, "the call was over before the signal"
for _ in range(200):
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        break
    time.sleep(0.05)
else:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    sys.exit("the child hangs")
assert os.waitstatus_to_exitcode(status) in (0, 2), status
check()
"""
    )


@needs_fork
def test_43_inherited_objects_are_destroyed_in_the_child() -> None:
    """Layers, frozen networks, streams and tapes; the child ends as an interpreter does."""
    survives(
        FORKS
        + """
frozen = layer.freeze()
stream = frozen.stream(32)
stream.step(x[0])
_, _, tape = layer.forward(x)
_, _, other = layer.forward(big)

def destroy():
    global layer, frozen, stream, tape, other
    tape.backward(want[0])
    stream.step(x[1])
    del layer, frozen, stream, tape, other
    gc.collect()

assert in_child(destroy) == 0
pid = os.fork()
if pid == 0:
    destroy()
    sys.exit(0)  # through the interpreter's own end
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stream.step(x[1])
tape.backward(want[0])
check()
"""
    )


def test_46_resize_during_a_call(rng: np.random.Generator) -> None:
    """Refused by NumPy, since the call holds references; the result is that of the data."""
    survives("""
import threading
layer = fastrnn.LSTM(64, 256, rng=0)
make = lambda: np.random.default_rng(0).standard_normal((1500, 16, 64)).astype(np.float32)
arrays = {"x": make(), "h": np.ones((1, 16, 256), "f"), "c": np.ones((1, 16, 256), "f"),
          "lengths": np.arange(16) * 90 + 100, "reset": np.zeros((1500, 16), bool)}
frozen = layer.freeze()
want = frozen(arrays["x"], (arrays["h"], arrays["c"]), lengths=arrays["lengths"])[0]
results, checked = [], threading.Event()

class Reset:  # the last argument that is looked at
    def __array__(self, dtype=None, copy=None):
        checked.set()
        return arrays["reset"]

def call():
    results.append(frozen(arrays["x"], (arrays["h"], arrays["c"]), lengths=arrays["lengths"],
                          reset=Reset())[0])
thread = threading.Thread(target=call)
thread.start()
checked.wait()
attempts = 0
while thread.is_alive():
    for name in ("x", "h", "c", "reset"):
        array = arrays[name]
        del arrays[name]  # so that the call's reference is the only other one
        try:
            array.resize(1)
        except ValueError:
            attempts += 1
        arrays[name] = array
        del array
    arrays["lengths"][:] = 2**40  # what was checked must not be read again
thread.join()
assert attempts and np.array_equal(results[0], want)
""")


INTERRUPTED = """
import os, signal, sys, threading, time

# A parent that runs in the background may have had the signal ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
fastrnn.set_num_threads(2)
kind, threads, I, H, B, T = sys.argv[1], *map(int, sys.argv[2:])
layer = fastrnn.LSTM(I, H, rng=0)
x = np.random.default_rng(0).standard_normal((T, B, I)).astype(np.float32)
dy = np.broadcast_to(np.float32(1), (T, B, H))
weights, short = layer.flat.copy(), layer(x[:3])[0]
every = 50 if "checkpoints" in kind else None
if "backward" in kind:
    dy, (_, _, tape) = dy.copy(), layer.forward(x, checkpoint_every=every)
    work = lambda: tape.backward(dy, threads=threads)
elif kind == "forward":
    work = lambda: layer(x, threads=threads)
else:
    work = lambda: layer.forward(x, checkpoint_every=every, threads=threads)

sent = []
def interrupt():
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
timer = threading.Timer(0.1, interrupt)
timer.start()
try:
    work()
    raise SystemExit("ended before it was interrupted")
except KeyboardInterrupt:
    waited = time.perf_counter() - sent[0]
timer.join()
assert waited < 0.35, f"KeyboardInterrupt after {waited:.3f} s"

assert np.array_equal(layer.flat, weights)
assert np.array_equal(layer(x[:3], threads=2)[0], short)
if "backward" in kind:
    try:
        tape.backward(dy)
        raise SystemExit("the tape was used twice")
    except RuntimeError:
        pass
y, _, tape = layer.forward(x[:3])
assert np.isfinite(tape.backward(y).x).all()
"""

# Steps of work that takes most of a second or more, which a deaf loop would wait for.
LONG = {
    "forward": 3_000_000,
    "training": 3_000_000,
    "training_checkpoints": 3_000_000,
    "backward": 700_000,
    "backward_checkpoints": 1_000_000,
}


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("kind", LONG)
def test_47_interrupts_of_long_sequences(kind: str, threads: str) -> None:
    """Ctrl-C among steps of a few hundred nanoseconds.

    Afterwards the weights are what they were, the tape is used up, and everything works.
    """
    survives(INTERRUPTED, kind, threads, "4", "16", "1", str(LONG[kind]))


@pytest.mark.parametrize("kind", ["training", "backward"])
def test_47_interrupts_of_large_steps(kind: str) -> None:
    """Ctrl-C among steps of milliseconds."""
    survives(INTERRUPTED, kind, "2", "256", "512", "32", "150" if "back" in kind else "500")


@pytest.mark.parametrize("kind", ["forward", "training", "training_checkpoints", "backward"])
def test_47_interrupts_of_a_team(kind: str) -> None:
    """Ctrl-C where threads share the units of one row and wait for each other in every step."""
    survives(INTERRUPTED, kind, "2", "16", "768", "1", "4000" if "back" in kind else "40_000")


def test_47_a_stream_is_interrupted_between_steps() -> None:
    """All layers of a stream stand at the same time, whenever Ctrl-C comes."""
    survives("""
import signal
frozen = fastrnn.LSTM(256, 512, 2, rng=0).freeze()
x = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
stream, other = frozen.stream(512), frozen.stream(512)
signal.signal(signal.SIGALRM, signal.default_int_handler)
steps = 0
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    while True:
        out = stream.step(x)
        steps += 1
except KeyboardInterrupt:
    pass
state = stream.state
while steps >= 0:
    other.step(x)
    steps -= 1
    if np.array_equal(other.state[0][0], state[0][0]):
        break
for a, b in zip(state, other.state, strict=True):
    assert np.array_equal(a, b)
""")


@pytest.mark.parametrize("threads", [1, 2])
def test_50_the_end_of_the_interpreter(threads: int) -> None:
    """With workers parked, and with daemon threads in the middle of a call: at once, status 0."""
    start = time.perf_counter()
    survives(
        f"fastrnn.set_num_threads({4 * threads}); fastrnn.LSTM(8, 99)(np.zeros((9, 40, 8), 'f'))"
    )
    assert time.perf_counter() - start < 10
    survives(
        """
import sys, threading, time
layer, x = fastrnn.LSTM(256, 512), np.zeros((40, 32, 256), np.float32)
def work():
    while True:
        y, _, tape = layer.forward(x, threads=int(sys.argv[1]))
        tape.backward(y, threads=int(sys.argv[1]))
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
""",
        str(threads),
        timeout=20,
    )


# --- Lifetime and aliasing ----------------------------------------------------------------------


def test_52_out_that_overlaps_the_input() -> None:
    stream = make_layer("lstm", H, H).freeze().stream(B)
    memory = np.zeros(4 * B * H, np.float32)
    out = memory[B * H : 2 * B * H].reshape(B, H)
    for start in range(1, 2 * B * H):
        x = memory[start : start + B * H].reshape(B, H)
        with refused(ValueError, "out"):
            stream.step(x, out)
    with refused(ValueError, "out"):
        stream.step(out[::-1], out)
    with refused(ValueError, "out"):
        stream.step(np.lib.stride_tricks.as_strided(memory, (B, H), (8 * H * 4, 4)), out)
    memory[:] = 0
    for start in (0, 2 * B * H):  # next to each other is apart
        stream.step(memory[start : start + B * H].reshape(B, H), out)
    memory[:] = 0
    ids = memory[B * H - 1 :].view(np.int32)[:B]
    with refused(ValueError, "out"):
        stream.step(ids, out)


def test_52_out_in_weights_or_states(rng: np.random.Generator) -> None:
    """A stream owns its weights and its state: no array of the caller's is one of them."""
    layer = make_layer("rnn_tanh", H, H)
    stream, twin = layer.freeze().stream(H), layer.freeze().stream(H)
    x = inputs(rng, H, H)
    out = layer.params["weight_hh_l0"]
    h = stream.state
    for _ in range(3):
        want = twin.step(x)
        assert_same_bits(stream.step(x, out).copy(), want)
        h[...] = np.nan
    assert np.isfinite(stream.state).all()


def test_53_read_only_arrays(rng: np.random.Generator) -> None:
    layer, x = make_layer("lstm", I, H), inputs(rng)
    stream = layer.freeze().stream(B)
    out = np.full((B, H), 7, np.float32)
    out.flags.writeable = False
    with refused(ValueError, "out"):
        stream.step(x[0], out)
    assert (out == 7).all()
    for bad in (zeros(B, H).T, zeros(B, 2 * H)[:, ::2], zeros(B, H + 1), zeros(B * H)):
        with refused(ValueError, "out"):
            stream.step(x[0], bad)
    for bad in (np.zeros((B, H)), [[0.0]], np.zeros((B, H), int)):
        with refused(TypeError, "out"):
            stream.step(x[0], bad)
    want = layer(x)[0]
    x.flags.writeable = False
    lengths, reset = np.full(B, T), np.zeros((T, B), bool)
    lengths.flags.writeable = reset.flags.writeable = False
    y, _, tape = layer.forward(x, lengths=lengths, reset=reset)
    y.flags.writeable = False
    tape.backward(y)
    assert_same_bits(stream.step(x[0]), want[0])
    assert_same_bits(y, want)


@every_cell
def test_54_results_outlive_their_makers(cell: str, rng: np.random.Generator) -> None:
    layer, x = make_layer(cell, I, H, 2, 2), inputs(rng)
    y, final, tape = layer.forward(x)
    g = tape.backward(y)
    arrays = [y, *state_arrays(final), *gradient_arrays(g)]
    copies = [array.copy() for array in arrays]
    frozen, flat, weights = layer.freeze(), layer.flat, layer.params["weight_hh_l0"]
    want, kept = frozen(x)[0], weights.copy()
    stream = make_layer(cell, I, H).freeze().stream(B)
    del layer, tape, g, y, final
    gc.collect()
    _ = [np.full(array.shape, np.nan) for array in arrays for _ in range(5)]
    assert_all_same(arrays, copies)
    assert_same_bits(frozen(x)[0], want)
    assert_same_bits(weights, kept)
    assert np.shares_memory(flat, weights) and np.isfinite(stream.step(x[0])).all()


@pytest.mark.parametrize("every", [None, 2])
@every_cell
def test_55_what_changes_between_forward_and_backward(
    cell: str, every: int | None, rng: np.random.Generator
) -> None:
    """Weights, state, lengths, resets, input: the gradient is the forward pass's as it ran.

    With checkpoints, which read the input again, an input that changed is refused.
    """
    layer, x = make_layer(cell, I, H, 2, 2), inputs(rng)
    state = random_state(CELLS[cell][0], (4, B, H), "float32", rng)
    lengths, reset = np.array([2, T, 3]), rng.random((T, B)) < 0.3
    results = []
    for change in (False, True):
        y, final, tape = layer.forward(
            x, state, lengths=lengths, reset=reset, checkpoint_every=every
        )
        dy = np.ones_like(y)
        if change:
            layer.flat[:] = np.nan
            for array in (*state_arrays(state), y, *state_arrays(final)):
                array[...] = np.nan
            lengths[:] = 2**40
            reset[...] = ~reset
            if every is None:
                x[...] = np.nan
            else:
                x[3:, 0] = np.nan  # its padding
        results.append(gradient_arrays(tape.backward(dy)))
    assert_all_same(results[1], results[0])


CHANGES = {
    "negated": lambda x: np.negative(x, out=x),
    "two signs": lambda x: np.negative(x[0, 0, [1, 9]], out=x[0, 0, 1:10:8]),
    "one bit": lambda x: np.nextafter(x[-1, -1, -1:], np.inf, out=x[-1, -1, -1:]),
    "rows swapped": lambda x: np.copyto(x[0, :2], x[0, 1::-1].copy()),
    "steps swapped": lambda x: np.copyto(x[:2], x[1::-1].copy()),
    "features rolled": lambda x: np.copyto(x, np.roll(x, 4, axis=2)),
    "scaled": lambda x: np.multiply(x, 2, out=x),
    "zeroed": lambda x: x.fill(0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_55_checkpoints_notice_a_changed_input(
    change: str, dtype: str, rng: np.random.Generator
) -> None:
    """Signs, order, a last bit: never a gradient of something in between."""
    for features in (10, 16, 19):
        layer, x = make_layer("lstm", features, H, dtype=dtype), inputs(rng, T, B, features)
        x = x.astype(dtype)
        y, _, tape = layer.forward(x, checkpoint_every=2)
        CHANGES[change](x)
        with refused(RuntimeError, "x"):
            tape.backward(y)


@pytest.mark.parametrize("every", [None, 2])
def test_55_token_ids_that_change(every: int | None) -> None:
    layer, ids = make_layer("lstm", I, H), np.arange(T * B).reshape(T, B) % I
    results = []
    for _ in range(2):
        y, _, tape = layer.forward(ids, checkpoint_every=every)
        ids[...] = 2**40
        results.append(gradient_arrays(tape.backward(y)))
        ids = np.arange(T * B).reshape(T, B) % I
    assert_all_same(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_56_used_and_foreign_tapes(family: str, rng: np.random.Generator) -> None:
    layer, x = make_layer(FAMILIES[family], I, H), inputs(rng)
    y, _, tape = layer.forward(x)
    with pytest.raises((TypeError, AttributeError)):
        copy.deepcopy(tape)
    for other in FAMILIES:
        if other != family:
            with refused(RuntimeError, "tape"):
                getattr(functional, f"{other}_backward")(tape, y)
    backward = getattr(functional, f"{family}_backward")
    with refused(TypeError, "tape"):
        backward(y, y)
    backward(tape, y)
    assert tape.nbytes == 0
    for again in (lambda: tape.backward(y), lambda: backward(tape, y)):
        with pytest.raises(RuntimeError, match="tape: expected one that was not used yet"):
            again()
