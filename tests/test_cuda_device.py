"""The CUDA path as a user has it, ``device="cuda"``: on a GPU, or the same tests on the emulator.

    FASTRNN_CUDA= pytest -m cuda        # on a machine with an NVIDIA GPU
    pytest tests/test_cuda_device.py    # on the emulator, which is the tests' default (conftest.py)

Without a device they are skipped, and say what is missing. ``benchmarks/gpu.sh`` runs them with all
else that a GPU must show. Some sizes, and what needs PyTorch's own arrays on the device, are for a
GPU only.

In float32 and float64 the forward pass must have the CPU's bits; gradients have the promised
accuracy. In 16 bits there is a tolerance for each precision: see SIXTEEN_BIT.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import (
    CELLS,
    FORWARD_ATOL,
    GRADIENT_TOLERANCE,
    assert_same_bits,
    map_state,
    random_state,
    random_weights,
    run_python,
    state_arrays,
)
from fastrnn import _core, _device, nn, optim, reference

EMULATED = os.environ.get("FASTRNN_CUDA") == "emulated"
pytestmark = [] if EMULATED else [pytest.mark.cuda]
gpu_only = pytest.mark.skipif(EMULATED, reason="too large for the emulator, or not about kernels")

DTYPES = ["float32", "float64"]
# One multiply-add, one rounding: so is the GPU's, and SSE2 has none.
FUSED = _core.isa() != "baseline"

# What a result may be off by, against the float64 reference on weights, inputs and an initial h
# that are rounded already: (outputs and states, absolute, in parts of max(1, the largest element);
# gradients, in parts of each array's largest element). h is rounded at each step, and so is what is
# kept for the backward pass; half of the last place of 1 is 2^-9 and 2^-12.
SIXTEEN_BIT = {"bfloat16": (1e-2, 1.5e-2), "float16": (1.25e-3, 2e-3)}
# The products over all steps may round their operands to 10 bits.
TF32 = (1e-3, 2e-3)


@pytest.fixture(scope="module")
def device() -> Any:
    """The module of kernels; skips where there is no device, and says why."""
    try:
        return _device.kernels("cuda")
    except RuntimeError as error:
        if EMULATED and os.environ.get("CI"):  # where everything is built
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def healthy(device: Any) -> Iterator[None]:
    """Ends the run where the device can no longer be used: all else would fail for that alone."""
    yield
    try:
        fastrnn.device_array(np.ones(1, np.float32)).numpy()
    except RuntimeError as error:
        pytest.exit(f"the device was lost in the test before: {error}", returncode=70)


# --- Problems ------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A network's weights, and all that goes into a forward and a backward pass."""

    cell: str
    dtype: str
    x: Any
    weights: dict[str, np.ndarray]
    state: Any
    dy: np.ndarray
    dstate: Any
    layers: int
    directions: int
    rows: dict[str, Any] = field(default_factory=dict)  # lengths, reset

    @property
    def hidden(self) -> int:
        return self.weights["weight_hh_l0"].shape[1]

    @property
    def batch(self) -> int:
        return int(self.x.shape[1])

    def layer(self, device: str = "cuda", **options: Any) -> Any:
        family, cell_options = CELLS[self.cell]
        layer = getattr(fastrnn, family.upper())(
            self.weights["weight_ih_l0"].shape[1],
            self.hidden,
            self.layers,
            bias="bias_ih_l0" in self.weights,
            bidirectional=self.directions == 2,
            dtype=self.dtype,
            device=device,
            rng=1,
            **cell_options,
            **options,
        )
        layer.load_state_dict(self.weights)
        return layer

    def infer(self, layer: Any) -> list[np.ndarray]:
        y, state = layer(self.x, self.state, **self.rows)
        return [y, *state_arrays(state)]

    def train(self, layer: Any, **options: Any) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """(outputs and final states, all gradients by name)."""
        y, state, tape = layer.forward(self.x, self.state, **self.rows, **options)
        grads = tape.backward(self.dy, self.dstate)
        found = {} if grads.x is None else {"x": grads.x}
        found |= {f"state[{i}]": array for i, array in enumerate(state_arrays(grads.state))}
        found |= {name: np.asarray(array) for name, array in grads.params.items()}
        return [y, *state_arrays(state)], found

    def expected(self, **options: Any) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """The same from the specification, in float64."""
        family, cell_options = CELLS[self.cell]
        weights = {name: _wide(array) for name, array in self.weights.items()}
        forward = getattr(reference, f"{family}_forward")
        backward = getattr(reference, f"{family}_backward")
        every = {**self.rows, **cell_options, **options}
        y, state, tape = forward(_wide(self.x), weights, map_state(_wide, self.state), **every)
        grads = backward(tape, _wide(self.dy), map_state(_wide, self.dstate))
        found = {} if grads.x is None else {"x": grads.x}
        found |= {f"state[{i}]": array for i, array in enumerate(state_arrays(grads.state))}
        return [y, *state_arrays(state)], found | dict(grads.params)


def _wide(array: Any) -> Any:
    return array.astype(np.float64) if array is not None and array.dtype.kind == "f" else array


def make(
    cell: str,
    rng: np.random.Generator,
    *,
    dtype: str = "float32",
    T: int = 6,
    B: int = 5,
    I: int = 7,
    H: int = 20,
    L: int = 1,
    D: int = 1,
    bias: bool = True,
    ids: bool = False,
    ragged: bool = False,
    reset: bool = False,
) -> Problem:
    """Signed random data, time-major and batched."""
    family = CELLS[cell][0]
    rows: dict[str, Any] = {}
    if ragged:
        rows["lengths"] = rng.permutation(np.linspace(0, T, B).astype(np.int64))
    if reset:
        rows["reset"] = rng.random((T, B)) < 0.25
    return Problem(
        cell,
        dtype,
        rng.integers(I, size=(T, B)) if ids else rng.standard_normal((T, B, I)).astype(dtype),
        random_weights(family, I, H, L, D, bias, dtype, rng),
        random_state(family, (L * D, B, H), dtype, rng),
        rng.standard_normal((T, B, D * H)).astype(dtype),
        random_state(family, (L * D, B, H), dtype, rng),
        L,
        D,
        rows,
    )


def assert_outputs(got: list[np.ndarray], want: list[np.ndarray], atol: float) -> None:
    """In parts of the largest element, where that is above 1: relu's outputs, an LSTM's c."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * scale, err_msg=f"output {i}")


def assert_gradients(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float
) -> None:
    """In parts of each array's largest element; of all arrays' where its own are sums that cancel.

    In problems this small a tensor may be such a sum.
    """
    assert list(got) == list(want)
    largest = max((float(np.abs(b).max(initial=0)) for b in want.values()), default=0.0)
    for name, b in want.items():
        scale = max(float(np.abs(b).max(initial=0)), 0.05 * largest)
        np.testing.assert_allclose(got[name], b, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_all_same(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a, b, f"array {i}")


def check(p: Problem, *, dropout: float = 0.0, **options: Any) -> None:
    """Bits of the forward pass as on the CPU, gradients against the float64 reference."""
    gpu, cpu = p.layer(dropout=dropout), p.layer("cpu", dropout=dropout)
    outputs, gradients = p.train(gpu, **options)
    cpu_outputs, _ = p.train(cpu, **options)
    pairs = [(p.infer(gpu), p.infer(cpu)), (outputs, cpu_outputs)]
    for got, want in pairs:
        if FUSED:
            assert_all_same(got, want)
        else:
            assert_outputs(got, want, 2 * FORWARD_ATOL[p.dtype])
    if dropout:
        return  # the mask's key is the tape's: test_dropout_is_the_cpus
    want_outputs, want_gradients = p.expected()
    assert_outputs(outputs, want_outputs, FORWARD_ATOL[p.dtype])
    assert_gradients(gradients, want_gradients, GRADIENT_TOLERANCE[p.dtype])


# --- What device there is ------------------------------------------------------------------------


def test_the_device_describes_itself(device: Any) -> None:
    info = device.device_info()
    assert info["name"] and info["memory"] > 0 and info["multiprocessors"] > 0
    assert ("emulator" in info["name"]) == EMULATED
    assert info["name"] in fastrnn.show_config("dict")["cuda"]  # type: ignore[index]


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int32", "int64", "bool", "bfloat16"]
)
def test_arrays_come_back_as_they_went(dtype: str, rng: np.random.Generator) -> None:
    host = rng.integers(0, 2 if dtype == "bool" else 100, (5, 4, 3))  # exact in every dtype
    there = fastrnn.device_array(host.astype("float32" if dtype == "bfloat16" else dtype), dtype)
    assert (there.shape, there.dtype, there.device) == (host.shape, dtype, "cuda")
    np.testing.assert_array_equal(there.numpy(), host)
    np.testing.assert_array_equal(there[1:4].numpy(), host[1:4])
    np.testing.assert_array_equal(np.asarray(there.reshape(5, 12)), host.reshape(5, 12))
    there[2:3] = 1
    host[2:3] = 1
    np.testing.assert_array_equal(there.copy().numpy(), host)
    with pytest.raises(AttributeError):
        there.no_such_thing  # noqa: B018


# --- float32 and float64: the CPU's bits ---------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "layers_and_directions": {"L": 2, "D": 2},
    "ragged": {"ragged": True, "D": 2},
    "reset": {"reset": True, "D": 2},
    "ragged_reset_layers": {"ragged": True, "reset": True, "L": 2},
    "ids": {"ids": True, "ragged": True, "D": 2},
    "one_row": {"B": 1, "T": 9},
}
# Around the tiles of the kernels; the emulator has the first one only.
SIZES = {
    "small": {},
    "tails": {"T": 33, "B": 9, "I": 33, "H": 65},
    "medium": {"T": 100, "B": 32, "I": 96, "H": 128},
    "large": {"T": 20, "B": 70, "I": 50, "H": 500},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_the_cpu(cell: str, options: str, dtype: str, rng: np.random.Generator) -> None:
    check(make(cell, rng, dtype=dtype, **OPTIONS[options]))


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", list(SIZES)[1:])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_reset_after", "gru_reset_before"])
def test_bits_of_the_cpu_at_size(
    cell: str, size: str, dtype: str, rng: np.random.Generator
) -> None:
    check(make(cell, rng, dtype=dtype, ragged=True, reset=True, **SIZES[size]))


@gpu_only
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_after"])
def test_a_thousand_steps(cell: str, rng: np.random.Generator) -> None:
    check(make(cell, rng, T=1000, B=4, I=16, H=48, ragged=True))


@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0), (1, 1)])
def test_little_or_nothing(T: int, B: int, rng: np.random.Generator) -> None:
    p = make("lstm", rng, T=T, B=B, L=2)
    assert_all_same(p.infer(p.layer()), p.infer(p.layer("cpu")))
    outputs, gradients = p.train(p.layer())
    want_outputs, want_gradients = p.train(p.layer("cpu"))
    assert_all_same(outputs, want_outputs)
    assert_gradients(gradients, want_gradients, GRADIENT_TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru_reset_before"])
def test_dropout_is_the_cpus(cell: str, dtype: str, rng: np.random.Generator) -> None:
    """The same key, the same masks: bits of the forward pass, and the gradients' accuracy."""
    p = make(cell, rng, dtype=dtype, T=5, L=3, D=2, ragged=True)
    check(p, dropout=0.4)
    layer, cpu = p.layer(dropout=0.4), p.layer("cpu", dropout=0.4)
    tapes = [each.forward(p.x, p.state, **p.rows)[2] for each in (layer, cpu)]
    assert tapes[0].dropout_key == tapes[1].dropout_key is not None
    found = [tape.backward(p.dy, p.dstate) for tape in tapes]
    _, want = p.expected(dropout=0.4, dropout_key=int(tapes[0].dropout_key))
    got = {name: np.asarray(array) for name, array in found[0].params.items()}
    assert_gradients(got, {name: want[name] for name in got}, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_reset_after", "gru_reset_before"])
def test_checkpoints_change_no_bit(cell: str, rng: np.random.Generator) -> None:
    p = make(cell, rng, T=11, L=2, D=2, ragged=True, reset=True)
    outputs, gradients = p.train(p.layer())
    for every in (1, 4):
        again, gradients_again = p.train(p.layer(), checkpoint_every=every)
        assert_all_same(again, outputs)
        assert_gradients(gradients_again, gradients, GRADIENT_TOLERANCE["float32"])


def test_truncated_backpropagation(rng: np.random.Generator) -> None:
    p = make("lstm", rng, T=9, L=2)
    outputs, gradients = p.train(p.layer(), tbptt=(2, 5))
    want, want_gradients = p.train(p.layer("cpu"), tbptt=(2, 5))
    assert_outputs(outputs, want, 2 * FORWARD_ATOL["float32"])
    assert_gradients(gradients, want_gradients, GRADIENT_TOLERANCE["float32"])


def test_batches_without_padding(rng: np.random.Generator) -> None:
    """A list of sequences and Ragged, on the host and on the device, like padded rows."""
    p = make("gru_reset_after", rng, T=8, B=4, D=2)
    lengths = [8, 0, 3, 5]
    layer = p.layer()
    want, _ = p.layer("cpu")(p.x, lengths=lengths)
    rows = [np.ascontiguousarray(p.x[:n, b]) for b, n in enumerate(lengths)]
    inputs: list[Any] = [rows, fastrnn.Ragged.of(rows), [fastrnn.device_array(r) for r in rows]]
    for x in inputs:
        y, _ = layer(x)
        for b, n in enumerate(lengths):
            got = np.asarray(y[b])
            assert got.shape == (n, 2 * p.hidden)
            if FUSED:
                assert_same_bits(got, want[:n, b])


def test_any_strides_and_layouts(rng: np.random.Generator) -> None:
    p = make("lstm", rng, T=5, B=4, I=6, L=2)
    want = p.infer(p.layer())
    wide = np.full((8, 9, 12), np.nan, np.float32)
    wide[1:8:1, 1:9:2, ::2][:5, :4] = p.x
    strided = wide[1:6, 1:9:2, ::2]
    backwards = np.ascontiguousarray(p.x[::-1])[::-1]
    for x in (strided, backwards, np.asfortranarray(p.x)):
        y, state = p.layer()(x, p.state)
        assert_all_same([y, *state], want)
    y, _ = p.layer(batch_first=True)(np.ascontiguousarray(p.x.transpose(1, 0, 2)), p.state)
    assert_same_bits(np.ascontiguousarray(y.transpose(1, 0, 2)), want[0])
    y, _ = p.layer()(p.x[:, 0], map_state(lambda a: a[:, 0], p.state))
    assert_same_bits(y, np.ascontiguousarray(want[0][:, 0]))


def test_a_row_of_nan_stays_one_row(rng: np.random.Generator) -> None:
    p = make("lstm", rng)
    want, *_ = p.infer(p.layer())
    p.x[2, 1] = np.nan
    got, *_ = p.infer(p.layer())
    rows = [0, 2, 3, 4]
    assert_same_bits(got[:, rows], want[:, rows])
    assert np.isnan(got[2:, 1]).all() and np.isfinite(got[:2, 1]).all()


def test_tf32_is_near(rng: np.random.Generator) -> None:
    sizes = {} if EMULATED else {"T": 40, "B": 32, "I": 256, "H": 256}
    for cell in ("lstm", "gru_reset_after"):
        p = make(cell, rng, **sizes)
        outputs, gradients = p.train(p.layer(precision="tf32"))
        want_outputs, want_gradients = p.expected()
        assert_outputs(outputs, want_outputs, TF32[0])
        assert_gradients(gradients, want_gradients, TF32[1])


# --- 16 bits, in each family of kernels ----------------------------------------------------------

FAMILIES = ["cluster", "grid", "step"]
KERNELS = {  # what the kernels call a cell
    "rnn_tanh": "rnn_tanh",
    "rnn_relu": "rnn_relu",
    "lstm": "lstm",
    "gru_reset_after": "gru_after",
    "gru_reset_before": "gru_before",
}
ForceFamily = Callable[[str, Problem, str], None]


@pytest.fixture
def force(device: Any, monkeypatch: pytest.MonkeyPatch) -> ForceFamily:
    """Has one family run a problem; skips, with its reason, where it cannot."""

    def family_of(family: str, p: Problem, precision: str) -> None:
        monkeypatch.setenv("FASTRNN_CUDA_FAMILY", family)
        try:
            plan = device.plan(KERNELS[p.cell], p.hidden, p.batch, p.directions, precision)
        except ValueError as error:
            pytest.skip(str(error))
        assert plan["family"] == family

    return family_of


def rounded(array: np.ndarray, precision: str) -> np.ndarray:
    """float32 values that have the precision's bits."""
    if precision == "float16":
        return array.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(array).view(np.uint32)
    even = (bits >> 16) & 1
    kept: np.ndarray = (bits + 0x7FFF + even) & np.uint32(0xFFFF0000)
    return kept.view(np.float32)


def round_problem(p: Problem, precision: str) -> Problem:
    """With matrices, inputs and initial h in 16 bits: what is left is the kernels' own rounding."""
    for name, array in p.weights.items():
        if name.startswith("weight"):
            p.weights[name] = rounded(array, precision)
    if p.x.dtype == np.float32:
        p.x = rounded(p.x, precision)
    if isinstance(p.state, tuple):
        p.state = (rounded(p.state[0], precision), p.state[1])
    else:
        p.state = rounded(p.state, precision)
    return p


def check_sixteen_bits(p: Problem, precision: str) -> None:
    round_problem(p, precision)
    outputs, gradients = p.train(p.layer(precision=precision))
    want_outputs, want_gradients = p.expected()
    forward, backward = SIXTEEN_BIT[precision]
    assert_outputs(outputs, want_outputs, forward)
    assert_gradients(gradients, want_gradients, backward)
    assert_outputs(p.infer(p.layer(precision=precision)), outputs, 0)  # nothing else is computed


@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", KERNELS)
def test_sixteen_bits(
    cell: str, family: str, precision: str, force: ForceFamily, rng: np.random.Generator
) -> None:
    p = make(cell, rng, T=5, B=9, H=40, D=2, ragged=True, reset=True)
    force(family, p, precision)
    check_sixteen_bits(p, precision)


# H: what each family was made for, and sizes that do not divide evenly.
@gpu_only
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize(
    ("family", "H", "B"),
    [
        *(("cluster", H, B) for H, B in [(64, 1), (128, 33), (256, 8), (500, 16), (512, 70)]),
        *(("grid", H, B) for H, B in [(136, 1), (250, 33), (768, 16), (1024, 8), (2048, 1)]),
        *(("step", H, B) for H, B in [(96, 1), (256, 33)]),
    ],
)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_after"])
def test_sixteen_bits_at_size(
    cell: str,
    family: str,
    H: int,
    B: int,
    precision: str,
    force: ForceFamily,
    rng: np.random.Generator,
) -> None:
    p = make(cell, rng, T=30 if H < 1000 else 10, B=B, I=64, H=H, ragged=True, reset=True)
    force(family, p, precision)
    check_sixteen_bits(p, precision)


@gpu_only
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize(
    ("family", "H", "B", "directions"),
    [
        *(
            (family, H, B, directions)
            for family, sizes in (("cluster", (128, 512)), ("grid", (512, 1024)))
            for H in sizes
            for B in (1, 8, 40, 128)
            for directions in (1, 2)
        ),
        *(("grid", 2048, B, directions) for B, directions in ((8, 1), (128, 1), (8, 2))),
    ],
)
def test_families_agree_with_the_simplest(
    family: str,
    H: int,
    B: int,
    directions: int,
    precision: str,
    force: ForceFamily,
    rng: np.random.Generator,
) -> None:
    """Where the reference would take too long: against the family of one launch a step."""
    p = round_problem(make("lstm", rng, T=12, B=B, I=16, H=H, D=directions, ragged=True), precision)
    force(family, p, precision)
    outputs, gradients = p.train(p.layer(precision=precision))
    force("step", p, precision)
    want_outputs, want_gradients = p.train(p.layer(precision=precision))
    forward, backward = SIXTEEN_BIT[precision]
    assert_outputs(outputs, want_outputs, forward / 2)
    assert_gradients(gradients, want_gradients, backward / 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_after"])
def test_the_same_bits_again(
    cell: str, family: str, force: ForceFamily, rng: np.random.Generator
) -> None:
    """Twice over, with other work in between."""
    sizes = {"T": 5, "B": 9, "H": 40} if EMULATED else {"T": 64, "B": 40, "H": 384, "I": 48}
    p = make(cell, rng, ragged=True, **sizes)
    force(family, p, "bfloat16")
    layer = p.layer(precision="bfloat16")
    outputs, gradients = p.train(layer)
    for _ in range(1 if EMULATED else 5):
        make(cell, rng).layer(precision="float16")(np.ones((3, 2, 7), np.float32))
        again, gradients_again = p.train(layer)
        assert_all_same(again, outputs)
        assert_all_same(list(gradients_again.values()), list(gradients.values()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_after"])
def test_the_same_bits_alone_and_in_parts(
    cell: str, family: str, force: ForceFamily, rng: np.random.Generator
) -> None:
    """A row alone, a sequence in two calls. Integer input: products may be another library's."""
    sizes = {"T": 5, "B": 9, "H": 40} if EMULATED else {"T": 64, "B": 40, "H": 384, "I": 48}
    p = make(cell, rng, ids=True, **sizes)
    force(family, p, "bfloat16")
    layer = p.layer(precision="bfloat16")
    whole, _ = layer(p.x, p.state)
    for row in (0, 3, p.batch - 1):
        state = map_state(lambda a, row=row: np.ascontiguousarray(a[:, row : row + 1]), p.state)
        alone, _ = layer(p.x[:, row : row + 1], state)
        assert_same_bits(alone[:, 0], np.ascontiguousarray(whole[:, row]))
    cut = p.x.shape[0] // 2
    first, state = layer(p.x[:cut], p.state)
    second, _ = layer(p.x[cut:], state)
    assert_same_bits(np.concatenate([first, second]), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits_again(dtype: str, rng: np.random.Generator) -> None:
    sizes = {} if EMULATED else {"T": 64, "B": 40, "H": 200, "I": 48}
    p = make("gru_reset_before", rng, dtype=dtype, ids=True, ragged=True, D=2, **sizes)
    _, gradients = p.train(p.layer())
    for _ in range(2):
        _, again = p.train(p.layer())
        assert_all_same(list(again.values()), list(gradients.values()))


# --- On the device from end to end ---------------------------------------------------------------


def test_device_arrays_in_and_out(rng: np.random.Generator) -> None:
    p = make("lstm", rng, L=2, D=2, ragged=True, reset=True)
    layer = p.layer()
    want_outputs, want_gradients = p.train(layer)
    there = fastrnn.device_array
    rows = {"lengths": p.rows["lengths"], "reset": there(p.rows["reset"])}
    y, state, tape = layer.forward(there(p.x), map_state(there, p.state), **rows)
    grads = tape.backward(there(p.dy), map_state(there, p.dstate))
    found = [y, *state, grads.x, *grads.state, *grads.params.values()]
    assert all(isinstance(array, fastrnn.DeviceArray) for array in found)
    assert_all_same([array.numpy() for array in found], [*want_outputs, *want_gradients.values()])


def model_on(device: str, dtype: str = "float32", dropout: float = 0.3) -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(11, 6, dtype=dtype, rng=1),
        fastrnn.LSTM(6, 12, 2, dropout=dropout, dtype=dtype, rng=2),
        nn.Dropout(dropout, rng=3),
        nn.Linear(12, 11, dtype=dtype, rng=4),
    ).to(device)


def losses_of(
    model: nn.Sequential, optimizer: Any, steps: int, rng: np.random.Generator
) -> list[float]:
    """Steps of a character model on random text; the input is NumPy's, as a user's would be."""
    losses, state = [], None
    for _ in range(steps):
        ids = rng.integers(0, 11, (6, 4))
        x, targets = ids[:-1], ids[1:]
        logits, state, tape = model.forward(x, state)
        mask = rng.random(targets.shape) < 0.8
        loss, dlogits = nn.softmax_cross_entropy(logits, targets, mask)
        optimizer.step(tape.backward(dlogits).params, clip_norm=0.5)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["sgd", "adam", "adamw"])
def test_training_steps(method: str, dtype: str) -> None:
    """The CPU's losses, dropout included; parameters and moments live on the device."""
    make_optimizer = {
        "sgd": lambda m: optim.SGD(m, 0.5, momentum=0.9, nesterov=True, weight_decay=1e-4),
        "adam": lambda m: optim.Adam(m, 1e-2),
        "adamw": lambda m: optim.AdamW(m, 1e-2),
    }[method]
    losses, params = {}, {}
    for device in ("cpu", "cuda"):
        model = model_on(device, dtype)
        optimizer = make_optimizer(model)
        losses[device] = losses_of(model, optimizer, 8, np.random.default_rng(5))
        kind = fastrnn.DeviceArray if device == "cuda" else np.ndarray
        assert all(isinstance(array, kind) for array in model.params.values())
        moments = [array for name, array in optimizer.state_dict().items() if name != "step"]
        assert all(isinstance(array, np.ndarray) and np.any(array) for array in moments)
        params[device] = model.state_dict()
    tolerance = {"float32": 1e-4, "float64": 1e-9}[dtype]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=tolerance)
    for name, want in params["cpu"].items():
        scale = float(np.abs(want).max())
        np.testing.assert_allclose(
            params["cuda"][name], want, rtol=0, atol=20 * tolerance * scale, err_msg=name
        )


def test_training_in_sixteen_bits_learns() -> None:
    """A task that takes memory: say the first token at the end."""
    rng = np.random.default_rng(3)
    model = nn.Sequential(
        fastrnn.LSTM(4, 32, precision="bfloat16", device="cuda", rng=1),
        nn.Linear(32, 4, rng=2).to("cuda"),
    )
    optimizer = optim.Adam(model, 2e-2)
    losses = []
    T, steps = (3, 40) if EMULATED else (6, 150)
    for _ in range(steps):
        ids = rng.integers(0, 4, (T, 8))
        y, _, tape = model.forward(ids)
        loss, dlast = nn.softmax_cross_entropy(y[-1], ids[0])
        dy = np.zeros_like(y)
        dy[-1] = dlast
        optimizer.step(tape.backward(dy).params)
        losses.append(loss)
    assert np.mean(losses[-5:]) < (0.8 if EMULATED else 0.2) * np.mean(losses[:5])


def test_losses_and_linear_on_the_device(rng: np.random.Generator) -> None:
    there = fastrnn.device_array
    z = rng.standard_normal((5, 3, 9)).astype(np.float32)
    targets, mask = rng.integers(0, 9, (5, 3)), rng.random((5, 3)) < 0.7
    want = nn.softmax_cross_entropy(z, targets, mask)
    got = nn.softmax_cross_entropy(there(z), targets, mask)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    np.testing.assert_allclose(np.asarray(got[1]), want[1], rtol=0, atol=1e-7)
    t = rng.standard_normal(z.shape).astype(np.float32)
    want, got = nn.mean_squared_error(z, t, mask), nn.mean_squared_error(there(z), there(t), mask)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    np.testing.assert_allclose(np.asarray(got[1]), want[1], rtol=0, atol=1e-7)
    cpu = nn.Linear(9, 17, rng=1)
    gpu = copy.deepcopy(cpu).to("cuda")
    np.testing.assert_allclose(gpu(z), cpu(z), rtol=0, atol=1e-5)


def test_clipping_and_norms(rng: np.random.Generator) -> None:
    host = {name: rng.standard_normal((30, 7)).astype(np.float32) for name in "ab"}
    there = {name: fastrnn.device_array(array) for name, array in host.items()}
    assert optim.global_norm(there) == pytest.approx(optim.global_norm(host), rel=1e-12)
    optim.clip_by_norm(there, 1.0)
    optim.clip_by_norm(host, 1.0)
    optim.clip_by_value(there, 0.05)
    optim.clip_by_value(host, 0.05)
    for name, want in host.items():
        np.testing.assert_allclose(there[name].numpy(), want, rtol=1e-6)


def test_to_the_device_and_back(rng: np.random.Generator) -> None:
    p = make("lstm", rng, L=2)
    cpu = p.layer("cpu")
    want = p.infer(cpu)
    layer = copy.deepcopy(cpu)
    assert layer.to("cuda") is layer and layer.device == "cuda"
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.device == "cuda"
        if FUSED:
            assert_all_same(p.infer(twin), want)
    layer.to("cpu")
    assert_all_same(p.infer(layer), want)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_frozen_and_streamed(cell: str, rng: np.random.Generator) -> None:
    p = make(cell, rng, T=4, B=3, L=2)
    layer = p.layer()
    want, *_ = p.infer(layer)
    frozen = layer.freeze()
    y, _ = frozen(p.x, p.state)
    assert_same_bits(y, want)
    stream = frozen.stream(batch_size=3)
    stream.state = p.state
    for t in range(4):
        assert_same_bits(stream.step(p.x[t]), want[t], f"step {t}")
    stream.reset()
    assert not any(np.asarray(array).any() for array in state_arrays(stream.state))


def test_errors_name_the_argument(rng: np.random.Generator) -> None:
    p = make("lstm", rng)
    layer = p.layer()
    for x in (p.x.astype(np.float64), p.x[..., :3], np.full((6, 5), 7), "text"):
        with pytest.raises((TypeError, ValueError), match=r"^x: expected"):
            layer(x)
    with pytest.raises(TypeError, match=r"^x: expected an array on the CPU"):
        p.layer("cpu")(fastrnn.device_array(p.x))
    _, _, tape = layer.forward(p.x)
    tape.backward(p.dy)
    with pytest.raises(RuntimeError, match="not used yet"):
        tape.backward(p.dy)


def test_threads_share_a_frozen_layer(rng: np.random.Generator) -> None:
    """Each thread has a stream of its own; the bits do not depend on who else is running."""
    p = make("lstm", rng, L=2, ragged=True)
    frozen = p.layer().freeze()
    want, _ = frozen(p.x, p.state, **p.rows)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(3 if EMULATED else 50):
            got, _ = frozen(p.x, p.state, **p.rows)
            if not np.array_equal(got, want):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_command_line_trains(tmp_path: Path) -> None:
    """On the device as on the CPU, and from there on the CPU again."""
    pytest.importorskip("click", reason="the command line is an extra: fastrnn[cli]")
    pytest.importorskip("rich", reason="the command line is an extra: fastrnn[cli]")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 120)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words), encoding="utf-8")
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        arguments = f"train {text} --out {out} --device {device} --hidden 12 --batch 4"
        arguments += " --window 8 --epochs 1 --dropout 0.1 --lr 0.02"
        code = "import sys; from fastrnn.cli import main; main(sys.argv[1:])"
        done = run_python(code, *arguments.split(), timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        losses = re.findall(r"validation (\d+\.\d+) nats/char", done.stdout + done.stderr)
        found[device] = float(losses[-1])
    assert found["cuda"] == pytest.approx(found["cpu"], abs=2e-3)


# --- PyTorch's arrays ----------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    if EMULATED:
        pytest.skip("PyTorch's memory on a GPU is not the emulator's")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA device")
    return torch


def test_torch_tensors_in_and_out(torch: Any, rng: np.random.Generator) -> None:
    p = make("lstm", rng, T=20, B=9, I=16, H=64)
    layer = p.layer()
    want_outputs, want_gradients = p.train(layer)
    there = lambda array: torch.from_numpy(array).cuda()  # noqa: E731
    x = there(p.x)
    y, state, tape = layer.forward(x, map_state(there, p.state))
    grads = tape.backward(there(p.dy), map_state(there, p.dstate))
    found = [y, *state, grads.x, *grads.state]
    assert all(isinstance(array, torch.Tensor) and array.is_cuda for array in found)
    found += [torch.from_dlpack(array) for array in grads.params.values()]
    assert_all_same(
        [array.cpu().numpy() for array in found], [*want_outputs, *want_gradients.values()]
    )
    again, _ = layer(x.transpose(0, 1).contiguous().transpose(0, 1), map_state(there, p.state))
    assert_same_bits(again.cpu().numpy(), want_outputs[0])


def test_torch_shares_memory(torch: Any) -> None:
    x = torch.arange(24, dtype=torch.float32, device="cuda").reshape(4, 6)
    ours = fastrnn.device_array(x)
    assert ours.__cuda_array_interface__["data"][0] == x.data_ptr()
    x[1, 2] = 99
    torch.cuda.synchronize()
    assert ours.numpy()[1, 2] == 99
    back = torch.from_dlpack(ours)
    assert back.data_ptr() == x.data_ptr()
    assert torch.as_tensor(ours, device="cuda").data_ptr() == x.data_ptr()
    del x, back
    assert ours.numpy()[0, 5] == 5  # ours keeps the memory alive


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_torch_in_sixteen_bits(torch: Any, name: str, rng: np.random.Generator) -> None:
    dtype = getattr(torch, name)
    p = round_problem(make("gru_reset_after", rng, T=20, B=9, I=16, H=64), name)
    layer = p.layer(precision=name)
    x = torch.from_numpy(p.x).cuda().to(dtype)
    y, _, tape = layer.forward(x, torch.from_numpy(p.state).cuda())
    grads = tape.backward(torch.from_numpy(p.dy).cuda().to(dtype))
    assert y.dtype == dtype and grads.x.dtype == dtype
    want, _ = p.expected()
    assert_outputs([y.float().cpu().numpy()], want[:1], SIXTEEN_BIT[name][0])


def test_torch_current_stream(torch: Any, rng: np.random.Generator) -> None:
    """Work goes on behind the caller's: nobody waits, and nothing is read before it is there."""
    p = make("lstm", rng, T=20, B=9, I=16, H=64)
    layer = p.layer()
    want, *_ = p.train(layer)[0]
    good, state = (
        torch.from_numpy(p.x).cuda(),
        map_state(lambda a: torch.from_numpy(a).cuda(), p.state),
    )
    torch.cuda.synchronize()
    for _ in range(3):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = torch.zeros_like(good)
            torch.cuda._sleep(50_000_000)  # some 30 ms
            x.copy_(good)
            y, _, tape = layer.forward(x, state)
            doubled = y * 2
            grads = tape.backward(torch.ones_like(y))
            total = grads.x.sum()
        stream.synchronize()
        assert_same_bits(doubled.cpu().numpy(), 2 * want)
        assert torch.isfinite(total)


def test_torch_streams_side_by_side(torch: Any, rng: np.random.Generator) -> None:
    p = make("gru_reset_after", rng, T=50, B=9, I=16, H=64)
    layer = p.layer(precision="bfloat16").freeze()
    x = torch.from_numpy(p.x).cuda()
    want = layer(x)[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(layer(x)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in found)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_after", "rnn_tanh"])
def test_torch_agrees(torch: Any, cell: str, rng: np.random.Generator) -> None:
    """CuDNN in float64: another implementation, on the same device."""
    p = make(cell, rng, dtype="float64", T=40, B=8, I=24, H=96, L=2, D=2)
    module = getattr(torch.nn, CELLS[cell][0].upper())(
        24, 96, 2, bidirectional=True, dtype=torch.float64
    ).cuda()
    module.load_state_dict({n: torch.from_numpy(w) for n, w in p.weights.items()})
    x = torch.from_numpy(p.x).cuda().requires_grad_()
    y = module(x, map_state(lambda a: torch.from_numpy(a).cuda(), p.state))[0]
    (dx,) = torch.autograd.grad(y, [x], torch.from_numpy(p.dy).cuda())
    p.dstate = map_state(np.zeros_like, p.dstate)
    outputs, gradients = p.train(p.layer())
    np.testing.assert_allclose(outputs[0], y.detach().cpu().numpy(), rtol=0, atol=1e-10)
    scale = float(np.abs(gradients["x"]).max())
    np.testing.assert_allclose(gradients["x"], dx.cpu().numpy(), rtol=0, atol=1e-10 * scale)


# --- Hostile cases: the numbers are those of docs/robustness.md ----------------------------------


def python(code: str, timeout: float = 60, **env: str) -> str:
    """What a program of its own prints, on the device; a hang is a failure."""
    done = run_python(code, timeout=timeout, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_case_63_no_device() -> None:
    """The CPU works, and asking for the device is a RuntimeError that says what is missing.

    The emulator cannot be taken away, only switched off.
    """
    hidden = {"FASTRNN_CUDA": "off"} if EMULATED else {"CUDA_VISIBLE_DEVICES": ""}
    code = """
import fastrnn, numpy as np
lstm = fastrnn.LSTM(3, 4)
assert lstm(np.ones((2, 1, 3), "f"))[0].shape == (2, 1, 4)
for attempt in (
    lambda: fastrnn.LSTM(3, 4, device="cuda"),
    lambda: lstm.to("cuda"),
    lambda: fastrnn.device_array(np.ones(3, "f")),
):
    try:
        attempt()
    except RuntimeError as error:
        print(error)
assert lstm.device == "cpu" and lstm(np.ones((2, 1, 3), "f"))[0].shape == (2, 1, 4)
print(fastrnn.show_config("dict")["cuda"])
"""
    lines = python(code, **hidden).splitlines()
    assert len(lines) == 4, lines
    assert all(line.startswith("device: expected 'cpu', got 'cuda', and ") for line in lines[:3])
    assert lines[3] in lines[0]


def test_case_64_fork() -> None:
    code = """
import os, sys
import fastrnn, numpy as np
x = np.ones((2, 1, 3), "f")
lstm = fastrnn.LSTM(3, 4, device="cuda", rng=0)
want = lstm(x)[0]
held = fastrnn.device_array(x)
child = os.fork()
if child == 0:
    try:
        lstm(x)
    except RuntimeError as error:
        print("child:", error, flush=True)
    print("cpu:", fastrnn.LSTM(3, 4)(x)[0].shape, flush=True)
    del held, lstm  # what the child inherited is the parent's to free
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(lstm(x)[0], want) and held.numpy().sum() == 6
print("parent: fine")
"""
    out = python(code)
    assert "child: " in out and "fork" in out and "cpu: (2, 1, 4)" in out
    assert out.endswith("parent: fine\n")


def test_case_65_memory_of_a_call_exhausted() -> None:
    """Outputs that exceed the device's memory: MemoryError, then a smaller call works."""
    code = """
import os
import fastrnn, numpy as np
from fastrnn import _device
H = 512 if os.environ.get("FASTRNN_CUDA") else 2048
rows = int(1.1 * _device.kernels("cuda").device_info()["memory"]) // (4 * H)
rnn = fastrnn.RNN(3, H, device="cuda", rng=0)
for call in (rnn, rnn.forward):
    for _ in range(2):
        try:
            call(np.zeros((500, rows // 500 + 1), np.int8))
        except MemoryError as error:
            print("MemoryError", error)
    small = rnn.forward(np.zeros((2, 1), np.int8))
    assert np.isfinite(small[0]).all() and small[0].any()
    assert np.isfinite(np.asarray(small[2].backward(small[0]).params["weight_hh_l0"])).all()
"""
    assert python(code).count("MemoryError") == 4


@gpu_only
def test_case_65_memory_taken_bit_by_bit() -> None:
    code = """
import fastrnn, numpy as np
from fastrnn import _device
cuda = _device.kernels("cuda")
x = np.random.default_rng(0).standard_normal((256, 64, 64)).astype("f")
lstm = fastrnn.LSTM(64, 512, device="cuda", rng=0)
want, taken, size = lstm(x)[0], [], 1 << 32
while size >= 1 << 18:
    try:
        taken.append(cuda.Array.empty((size,), "bool"))
    except MemoryError:
        size //= 2
assert sum(a.nbytes for a in taken) > 0.5 * cuda.device_info()["memory"]
try:
    lstm.forward(x)
    print("there was room")
except MemoryError:
    print("MemoryError")
del taken
assert np.array_equal(lstm(x)[0], want)
y, _, tape = lstm.forward(x)
tape.backward(y)
print("and then enough")
"""
    assert python(code).splitlines() == ["MemoryError", "and then enough"]


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_case_66_many_steps(precision: str | None, rng: np.random.Generator) -> None:
    """65,536 steps: the CPU's bits in float32; in 16 bits those of two halves."""
    T = 70 if EMULATED else 65_536
    p = make("lstm", rng, T=T, B=2, I=3, H=16, ids=precision is not None)
    layer = p.layer(precision=precision)
    outputs, gradients = p.train(layer)
    assert all(np.isfinite(array).all() for array in [*outputs, *gradients.values()])
    if precision is None:
        want_outputs, want_gradients = p.train(p.layer("cpu"))
        if FUSED:
            assert_all_same(outputs, want_outputs)
        assert_gradients(gradients, want_gradients, 1e-4)  # promised are 1000 steps
    half = T // 2
    first, state = layer(p.x[:half], p.state)
    second, _ = layer(p.x[half:], state)
    assert_same_bits(np.concatenate([first, second]), outputs[0])


@gpu_only
@pytest.mark.parametrize("family", FAMILIES)
def test_case_66_many_steps_in_several_launches(
    family: str, force: ForceFamily, rng: np.random.Generator
) -> None:
    """More rows than one chunk holds."""
    p = make("lstm", rng, T=65_536, B=8, I=8, H=128, ids=True)
    force(family, p, "bfloat16")
    layer = p.layer(precision="bfloat16").freeze()
    whole, _ = layer(p.x, p.state)
    assert np.isfinite(whole).all()
    first, state = layer(p.x[:40_000], p.state)
    second, _ = layer(p.x[40_000:], state)
    assert np.array_equal(first, whole[:40_000]) and np.array_equal(second, whole[40_000:])


def test_case_67_too_many_blocks(
    device: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Blocks that cannot all run at once: another family runs, and one that is forced refuses."""
    H = 16 * device.device_info()["multiprocessors"] + 8
    plan = device.plan("lstm", H, 2, 1, "bfloat16")
    assert plan["family"] == "step" and "grid: " in plan["reason"], plan
    monkeypatch.setenv("FASTRNN_CUDA_FAMILY", "grid")
    with pytest.raises(ValueError, match="FASTRNN_CUDA_FAMILY: expected a family that can run"):
        device.plan("lstm", H, 2, 1, "bfloat16")
    monkeypatch.delenv("FASTRNN_CUDA_FAMILY")
    if not EMULATED:
        check_sixteen_bits(make("lstm", rng, T=4, B=2, I=8, H=H), "bfloat16")


SIDE_BY_SIDE = """
import os, sys, threading
import fastrnn, numpy as np
sizes = {"cluster": 512, "grid": 1024, "step": 256}
family = os.environ["FASTRNN_CUDA_FAMILY"]
rounds, H, T = (1, 40, 3) if os.environ.get("FASTRNN_CUDA") else (20, sizes[family], 200)
rng = np.random.default_rng(0)
x = rng.standard_normal((T, 24, 16)).astype("f")
layer = fastrnn.LSTM(16, H, bidirectional=True, device="cuda", precision="bfloat16", rng=0)
try:
    want, _, tape = layer.forward(x)
except ValueError as error:
    print("cannot run:", error)
    sys.exit(0)
gradient = tape.backward(want).x
wrong = []
def work():
    for _ in range(rounds):
        y, _, tape = layer.forward(x)
        dx = tape.backward(want).x
        if not (np.array_equal(y, want) and np.array_equal(dx, gradient)):
            wrong.append(1)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_case_67_launches_side_by_side(family: str) -> None:
    """Threads whose kernels, each of which needs all its blocks at once, compete for the device."""
    code = (
        SIDE_BY_SIDE
        + """
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("wrong:", len(wrong))
"""
    )
    out = python(code, FASTRNN_CUDA_FAMILY=family)
    if out.startswith("cannot run: "):
        pytest.skip(out.strip())
    assert out == "wrong: 0\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_case_67_a_busy_device(torch: Any, family: str) -> None:
    """Another library's kernels hold the multiprocessors: ours wait for them, and end."""
    code = (
        SIDE_BY_SIDE
        + """
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    for _ in range(300): b = a @ a
rounds = 5
work()
torch.cuda.synchronize()
print("wrong:", len(wrong))
"""
    )
    out = python(code, FASTRNN_CUDA_FAMILY=family)
    if out.startswith("cannot run: "):
        pytest.skip(out.strip())
    assert out == "wrong: 0\n"
