"""Recurrent networks on the device, in the emulator, against the CPU's kernels.

The kernels' sources are those of the GPU (csrc/cuda); csrc/cuda/emulator.h says what runs them
here. In float32 and float64 the forward pass must give the CPU's bits, dropout included; gradients
are sums in another order and have the promised accuracy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import GRADIENT_TOLERANCE, assert_same_bits, run_python, state_arrays
from fastrnn import _core
from fastrnn._cells import Network

try:
    import fastrnn._cuda_emulated as cuda
except ModuleNotFoundError:
    if os.environ.get("CI"):  # where everything is built
        raise
    pytest.skip(
        "this build has no emulator: -DFASTRNN_CUDA_EMULATED=ON makes one", allow_module_level=True
    )

CELLS = {
    "rnn_tanh": ("rnn", "tanh"),
    "rnn_relu": ("rnn", "relu"),
    "rnn_sigmoid": ("rnn", "sigmoid"),
    "lstm": ("lstm", ""),
    "gru_after": ("gru", "after"),
    "gru_before": ("gru", "before"),
}
# One multiply-add, one rounding: so is the GPU's, and SSE2 has none.
FUSED = _core.isa() != "baseline"


class Problem:
    """A network with random weights, and what one call of it takes."""

    def __init__(
        self,
        cell: str,
        rng: np.random.Generator,
        *,
        dtype: str = "float32",
        T: int = 7,
        B: int = 5,
        I: int = 9,
        H: int = 20,
        L: int = 1,
        D: int = 1,
        bias: bool = True,
        ids: bool = False,
        ragged: bool = False,
        reset: bool = False,
        dropout: float = 0.0,
        checkpoint_every: int = 0,
        batch_first: bool = False,
    ) -> None:
        family, variant = CELLS[cell]
        self.network = Network(family, variant, I, H, L, D, bias, np.dtype(dtype))  # type: ignore[arg-type]
        shapes = self.network.shapes().values()
        self.weights = [(rng.uniform(-1, 1, s) / np.sqrt(H)).astype(dtype) for s in shapes]
        lead = (B, T) if batch_first else (T, B)
        self.x = rng.integers(0, I, lead) if ids else rng.standard_normal((*lead, I)).astype(dtype)
        self.state = self._states(rng, (L * D, B, H), dtype)
        self.lengths = rng.permutation(np.linspace(0, T, B).astype(int)) if ragged else None
        self.reset = rng.random(lead) < 0.2 if reset else None
        self.batch_first = batch_first
        self.training = (dropout, 12345, checkpoint_every)
        self.dy = rng.standard_normal((*lead, D * H)).astype(dtype)
        self.dstate = self._states(rng, (L * D, B, H), dtype)

    def _states(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
        draw: Callable[[], np.ndarray] = lambda: rng.uniform(-1, 1, shape).astype(dtype)  # noqa: E731
        return (draw(), draw()) if self.network.family == "lstm" else draw()

    def packed(self, module: Any, precision: str | None = None) -> Any:
        n = self.network
        return module.Packed(
            n.cell,
            n.input_size,
            n.hidden_size,
            n.num_layers,
            n.num_directions,
            n.bias,
            precision or n.dtype.name,
            self.weights,
        )

    def call(self, x: Any = None) -> tuple[Any, ...]:
        x = self.x if x is None else x
        return x, self.state, self.lengths, None, self.reset, self.batch_first, None

    def run(self, packed: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(outputs and states of training, all gradients)."""
        y, state, tape = packed.forward_training(*self.call(), *self.training)
        into = [np.zeros_like(w) for w in self.weights]
        dx, dstate = tape.backward(self.dy, self.dstate, into, None)
        gradients = [*([] if dx is None else [dx]), *state_arrays(dstate), *into]
        return [y, *state_arrays(state)], gradients


def close(got: list[np.ndarray], want: list[np.ndarray], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        scale = max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=f"array {i}")


def check(problem: Problem) -> None:
    """Both modules: inference, training, gradients."""
    dtype = problem.network.dtype.name
    cpu, device = problem.packed(_core), problem.packed(cuda)
    inference = [device.forward(*problem.call()), cpu.forward(*problem.call())]
    got, want = ([y, *state_arrays(state)] for y, state in inference)
    outputs, gradients = problem.run(device)
    cpu_outputs, cpu_gradients = problem.run(cpu)
    if FUSED:
        for a, b in zip([*got, *outputs], [*want, *cpu_outputs], strict=True):
            assert_same_bits(a, b)
    else:
        close([*got, *outputs], [*want, *cpu_outputs], GRADIENT_TOLERANCE[dtype])
    close(gradients, cpu_gradients, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"L": 3, "D": 2, "dropout": 0.4},
        {"ragged": True, "reset": True, "D": 2},
        {"ids": True, "ragged": True, "D": 2, "batch_first": True},
        {"ragged": True, "reset": True, "L": 2, "checkpoint_every": 3, "bias": False},
        {"ids": True, "checkpoint_every": 2, "reset": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_as_on_the_cpu(
    cell: str, dtype: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    check(Problem(cell, rng, dtype=dtype, **options))


@pytest.mark.parametrize("cell", ["lstm", "gru_before"])
def test_recorded_groups_of_steps(cell: str, rng: np.random.Generator) -> None:
    """Long sequences are run by recordings of 32 steps, used again by the next call."""
    for T in (64, 100, 129):
        check(Problem(cell, rng, T=T, B=3, I=4, H=6, ragged=True, reset=True))
    problem = Problem(cell, rng, T=100, B=3, I=4, H=6)
    first, second = problem.run(problem.packed(cuda)), problem.run(problem.packed(cuda))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("T", "B"), [(0, 4), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("cell", ["lstm", "gru_after"])
def test_nothing_to_do(cell: str, T: int, B: int, rng: np.random.Generator) -> None:
    check(Problem(cell, rng, T=T, B=B, L=2))


@pytest.mark.parametrize(("H", "I", "B"), [(1, 1, 1), (16, 1, 8), (17, 33, 9), (40, 65, 33)])
def test_tails(H: int, I: int, B: int, rng: np.random.Generator) -> None:
    check(Problem("lstm", rng, T=3, H=H, I=I, B=B))
    check(Problem("gru_after", rng, T=3, H=H, I=I, B=B))


def test_rows_one_after_the_other(rng: np.random.Generator) -> None:
    problem = Problem("lstm", rng, T=9, B=1, D=2)
    offsets = np.array([0, 4, 4, 6, 9])
    x, shape = problem.x[:, 0], (2, 4, 20)
    state = (rng.uniform(-1, 1, shape).astype("float32"), np.zeros(shape, "float32"))
    results = []
    for module in (_core, cuda):
        packed = problem.packed(module)
        y, final, tape = packed.forward_training(
            x, state, None, offsets, None, False, None, 0.0, 0, 0
        )
        into = [np.zeros_like(w) for w in problem.weights]
        dx, _ = tape.backward(problem.dy[:, 0], None, into, None)
        results.append(([y, *final], [dx, *into]))
    close(results[1][0], results[0][0], 0 if FUSED else 1e-6)
    close(results[1][1], results[0][1], GRADIENT_TOLERANCE["float32"])


def test_one_row_of_nan_stays_one_row(rng: np.random.Generator) -> None:
    problem = Problem("gru_after", rng)
    packed = problem.packed(cuda)
    want, _ = packed.forward(*problem.call())
    x = problem.x.copy()
    x[2, 1] = np.nan
    got, _ = packed.forward(*problem.call(x))
    rows = [0, 2, 3, 4]
    assert_same_bits(got[:, rows], want[:, rows])
    assert np.isnan(got[2:, 1]).all() and np.isfinite(got[:2, 1]).all()


def test_any_strides(rng: np.random.Generator) -> None:
    problem = Problem("lstm", rng)
    want, _ = problem.packed(cuda).forward(*problem.call())
    wide = np.zeros((5, 7, 18), "float32")
    wide[:, ::-1, ::2] = problem.x.transpose(1, 0, 2)
    view = wide[:, ::-1, ::2].transpose(1, 0, 2)
    got, _ = problem.packed(cuda).forward(*problem.call(view))
    assert_same_bits(got, want)


# 16 bits: weights, inputs, h and what is kept are rounded; sums and c are not.
SIXTEEN_BIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half of the last place of 1


@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_after", "gru_before"])
def test_sixteen_bits_are_near(cell: str, precision: str, rng: np.random.Generator) -> None:
    """Each of T roundings moves a state by half a last place, and errors do not grow here."""
    problem = Problem(cell, rng, ragged=True, reset=True, D=2)
    unit = SIXTEEN_BIT[precision]
    outputs, gradients = problem.run(problem.packed(cuda, precision))
    cpu_outputs, cpu_gradients = problem.run(problem.packed(_core))
    for a, b in zip(outputs, cpu_outputs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * unit)
    close(gradients, cpu_gradients, 16 * unit)
    assert any(not np.array_equal(a, b) for a, b in zip(outputs, cpu_outputs, strict=True))


@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("family", ["cluster", "grid", "step"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_after"])
def test_families_agree(
    cell: str,
    family: str,
    precision: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each family alone, a row alone and in a batch, in one call and in two."""
    problem = Problem(cell, rng, T=5, B=9, H=40, ragged=True, reset=True)
    monkeypatch.setenv("FASTRNN_CUDA_FAMILY", "step")
    want, want_gradients = problem.run(problem.packed(cuda, precision))
    monkeypatch.setenv("FASTRNN_CUDA_FAMILY", family)
    packed = problem.packed(cuda, precision)
    got, gradients = problem.run(packed)
    unit = SIXTEEN_BIT[precision]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * unit)
    close(gradients, want_gradients, 8 * unit)
    again, gradients_again = problem.run(packed)
    for a, b in zip([*got, *gradients], [*again, *gradients_again], strict=True):
        assert_same_bits(a, b)

    def part(values: Any, rows: slice) -> Any:
        if isinstance(values, tuple):
            return tuple(part(v, rows) for v in values)
        return np.ascontiguousarray(values[:, rows])

    rows = slice(3, 4)
    alone, _ = packed.forward(
        part(problem.x, rows),
        part(problem.state, rows),
        problem.lengths[rows],  # type: ignore[index]
        None,
        part(problem.reset, rows),
        False,
        None,
    )
    assert_same_bits(alone[:, 0], got[0][:, 3])
    first, state = packed.forward(problem.x[:2], problem.state, None, None, None, False, None)
    second, _ = packed.forward(problem.x[2:], state, None, None, None, False, None)
    whole, _ = packed.forward(problem.x, problem.state, None, None, None, False, None)
    assert_same_bits(np.concatenate([first, second]), whole)


def test_plan_says_why() -> None:
    assert cuda.plan("lstm", 256, 8, 1, "bfloat16") == {"family": "cluster", "reason": ""}
    large = cuda.plan("lstm", 1024, 8, 1, "bfloat16")
    assert large["family"] == "grid" and large["reason"].startswith("cluster: ")
    for cell, H, precision in [("lstm", 256, "float32"), ("gru_before", 256, "bfloat16")]:
        slow = cuda.plan(cell, H, 8, 1, precision)
        assert slow["family"] == "step"
        assert "cluster: " in slow["reason"] and "; grid: " in slow["reason"]


def test_a_family_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_FAMILY", "cluster")
    with pytest.raises(ValueError, match=r"^FASTRNN_CUDA_FAMILY: expected .*'cluster': "):
        cuda.plan("lstm", 256, 8, 1, "float32")
    monkeypatch.setenv("FASTRNN_CUDA_FAMILY", "fastest")
    with pytest.raises(ValueError, match=r"'cluster', 'grid' or 'step', got 'fastest'"):
        cuda.plan("lstm", 256, 8, 1, "float32")


def test_same_complaints_as_the_cpu(rng: np.random.Generator) -> None:
    """What does not fit is refused in the same words, before anything is computed."""
    problem = Problem("lstm", rng, T=4, B=3)
    h, c = problem.state
    x = problem.x
    bad: list[tuple[Any, ...]] = [
        (x[..., :8], problem.state, None, None, None),
        (x[0, 0], problem.state, None, None, None),
        (x.astype("float64"), problem.state, None, None, None),
        (x.astype(bool), problem.state, None, None, None),
        (None, problem.state, None, None, None),
        (x, h, None, None, None),
        (x, (h,), None, None, None),
        (x, (h[:, :2], c), None, None, None),
        (x, problem.state, [4, 5, 1], None, None),
        (x, problem.state, [4, -1, 1], None, None),
        (x, problem.state, [4.0, 1.0, 1.0], None, None),
        (x, problem.state, [4, 4], None, None),
        (x[:, 0], None, [4], None, None),
        (x[:, 0], None, None, [0, 3], None),
        (x[:, 0], None, None, [1, 4], None),
        (x, problem.state, None, None, np.zeros((4, 2), bool)),
        (x, problem.state, None, None, np.zeros((4, 3))),
        (np.full((4, 3), 9), problem.state, None, None, None),
        (np.full((4, 3), -1), problem.state, None, None, None),
    ]
    for arguments in bad:
        found = []
        for module in (_core, cuda):
            with pytest.raises((TypeError, ValueError)) as error:
                problem.packed(module).forward(*arguments, False, None)
            found.append((error.type, str(error.value)))
        assert found[0] == found[1]


def test_a_tape_is_used_once(rng: np.random.Generator) -> None:
    problem = Problem("lstm", rng)
    _, _, tape = problem.packed(cuda).forward_training(*problem.call(), 0.0, 0, 0)
    assert tape.nbytes > 0 and not tape.consumed
    into = [np.zeros_like(w) for w in problem.weights]
    with pytest.raises(ValueError, match="dy: expected shape"):
        tape.backward(problem.dy[:2], None, into, None)
    with pytest.raises(ValueError, match="into: expected 4 arrays"):
        tape.backward(problem.dy, None, into[:2], None)
    tape.backward(problem.dy, None, into, None)
    assert tape.consumed and tape.nbytes == 0
    with pytest.raises(RuntimeError, match="not used yet"):
        tape.backward(problem.dy, None, into, None)


def test_gradients_are_added(rng: np.random.Generator) -> None:
    problem = Problem("gru_after", rng)
    packed = problem.packed(cuda)
    once = problem.run(packed)[1][2:]
    into = [np.ones_like(w) for w in problem.weights]
    _, _, tape = packed.forward_training(*problem.call(), *problem.training)
    tape.backward(problem.dy, problem.dstate, into, None)
    for a, b in zip(into, once, strict=True):
        np.testing.assert_allclose(a, b + 1, rtol=0, atol=1e-5 * np.abs(b).max())


def test_checkpoints_take_less_memory(rng: np.random.Generator) -> None:
    def held(every: int) -> int:
        problem = Problem("lstm", rng, T=60, checkpoint_every=every)
        _, _, tape = problem.packed(cuda).forward_training(*problem.call(), *problem.training)
        return int(tape.nbytes)

    assert held(8) < 0.6 * held(0)


def test_own_products_where_there_is_no_cublaslt() -> None:
    """The emulator looks for none, and a path that leads nowhere is no error either."""
    code = """
import numpy as np
import fastrnn._cuda_emulated as cuda
w = [np.ones((4, 1), "float32")] * 2
x = np.ones((2, 1, 1), "float32")
y, _ = cuda.Packed("lstm", 1, 1, 1, 1, False, "tf32", w).forward(
    x, None, None, None, None, False, None)
print(float(y[0, 0, 0]))
"""
    expected = run_python(code).stdout
    assert float(expected) == pytest.approx(
        np.tanh(np.tanh(1) / (1 + np.exp(-1))) / (1 + np.exp(-1))
    )
    assert run_python(code, FASTRNN_CUBLASLT="/no/such/library.so").stdout == expected


# Packed, forward and backward on three streams, and what they were given dropped before anything is
# waited for: the last stream first, or the first ones first. Prints the results' bytes.
STREAMS = """
import sys
import fastrnn, numpy as np
import fastrnn._cuda_emulated as cuda

class Interface:  # of an array, and nothing else of it
    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__
        self.array = array

I, H, T, B, ids, every, *streams, in_order = map(int, sys.argv[1:])
rng = np.random.default_rng(1)
there = lambda *shape: fastrnn.device_array(rng.standard_normal(shape).astype("float32") / 4)
shapes = [(4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
packed = cuda.Packed("lstm", I, H, 1, 1, True, "float32", [there(*s) for s in shapes],
                     stream=streams[0])
x = fastrnn.device_array(rng.integers(0, I, (T, B))) if ids else there(T, B, I)
state, dy = (there(1, B, H), there(1, B, H)), there(T, B, H)
y, last, tape = packed.forward_training(
    x, state, None, None, None, False, None, 0.0, 0, every, stream=streams[1])
into = [cuda.Array.zeros(s, "float32") for s in shapes]
dx, dstate = tape.backward(dy, None, into, None, stream=streams[2])
del tape, packed, x, state, dy
if in_order:
    [np.asarray(a) for a in (y, *last)]
    there(1)  # waits for the stream that the arrays were made on
results = [*into, *dstate, *([] if ids else [dx])]
results = [cuda.Array.import_(Interface(a), 4) for a in results]
host = [np.asarray(a) for a in (*results, y, *last)]
assert all(np.isfinite(a).all() for a in host) and not all((a == 0).all() for a in host)
print(b"".join(a.tobytes() for a in host).hex())
"""


@pytest.mark.parametrize("sizes", ["3 5 70 2 0 0", "3 5 70 2 0 66", "3 5 7 2 1 3"])
def test_streams_wait_for_each_other(sizes: str) -> None:
    """On an emulator whose streams do nothing before somebody waits for them."""
    expected = run_python(STREAMS, *sizes.split(), *"0000", FASTRNN_CUDA_DEFER="0")
    assert expected.stdout, expected.stderr
    for streams in ("5670", "5671", "5660", "5561", "5051"):
        got = run_python(STREAMS, *sizes.split(), *streams, FASTRNN_CUDA_DEFER="1")
        assert got.stdout == expected.stdout, got.stderr
