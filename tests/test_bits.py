"""The bitwise promises: what may change how a result is computed, and must not change its bits.

Forward: threads, the split and the order of a batch, padding, memory layout, calls of any length,
single steps, frozen or not, training or not, dense or integer one-hot rows. Gradients: threads and
checkpoints. Everything again on every instruction set; AVX2 and AVX-512 agree in the forward pass.
Hostile cases 12, 37, 38 and 39.

T steps, B batch, I inputs, H hidden, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import CELLS, assert_same_bits, make_layer, map_state, run_python, state_arrays
from fastrnn import _core

DTYPES = ["float32", "float64"]
KINDS = ["full", "lengths", "reset", "lengths_reset"]
THREADS = [2, 5]

# Batch and hidden units: many rows, which threads divide, so many that more parts than threads take
# turns, and few rows of many units; none a multiple of any vector or tile, all large enough for
# several threads to be worth waking.
SIZES = {"rows": (21, 45), "turns": (70, 45), "few_rows": (2, 150)}
T, I = 19, 13


@pytest.fixture(autouse=True)
def many_threads() -> Iterator[None]:
    """More threads than this machine may have: a call's ``threads`` cannot exceed them."""
    before = fastrnn.get_num_threads()
    fastrnn.set_num_threads(max(THREADS))
    yield
    fastrnn.set_num_threads(before)


class Problem:
    """A layer with everything that goes in."""

    def __init__(
        self,
        cell: str,
        dtype: str,
        size: str = "rows",
        kind: str = "full",
        L: int = 2,
        D: int = 1,
        steps: int = T,
    ) -> None:
        rng = np.random.default_rng(3)
        B, H = SIZES[size]
        self.layer = make_layer(cell, I, H, L, D, dtype=dtype)
        self.x = rng.standard_normal((steps, B, I)).astype(dtype)

        def state() -> Any:
            arrays = [rng.uniform(-1, 1, (L * D, B, H)).astype(dtype) for _ in range(2)]
            return tuple(arrays) if cell == "lstm" else arrays[0]

        self.state, self.dstate = state(), state()
        self.dy = rng.standard_normal((steps, B, D * H)).astype(dtype)
        self.rows: dict[str, Any] = {}
        if "lengths" in kind:
            self.rows["lengths"] = rng.integers(0, steps + 1, B)
            self.rows["lengths"][B // 2] = 0
            self.rows["lengths"][-1] = steps
        if "reset" in kind:
            self.rows["reset"] = rng.random((steps, B)) < 0.2

    def forward(self, **options: Any) -> list[np.ndarray]:
        """The output and the final state of an inference."""
        y, state = self.layer(self.x, self.state, **self.rows, **options)
        return [y, *state_arrays(state)]

    def gradients(self, threads: int | None = None, every: int | None = None) -> list[np.ndarray]:
        """Everything that a training forward pass and its backward pass return."""
        y, state, tape = self.layer.forward(
            self.x, self.state, **self.rows, threads=threads, checkpoint_every=every
        )
        g = tape.backward(self.dy, self.dstate, threads=threads)
        arrays = [y, *state_arrays(state), *state_arrays(g.state), *g.params.values()]
        return arrays if g.x is None else [*arrays, g.x]


def assert_all_same(got: list[np.ndarray], want: list[np.ndarray], what: str = "") -> None:
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a, b, f"{what} array {k}")


def cells_and_dtypes(function: Any) -> Any:
    function = pytest.mark.parametrize("dtype", DTYPES)(function)
    return pytest.mark.parametrize("cell", CELLS)(function)


# --- Forward ------------------------------------------------------------------------------------


@cells_and_dtypes
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_37_threads_forward(cell: str, dtype: str, kind: str, size: str, D: int) -> None:
    p = Problem(cell, dtype, size, kind, D=D)
    want = p.forward(threads=1)
    for threads in THREADS:
        assert_all_same(p.forward(threads=threads), want, f"{threads} threads")


@cells_and_dtypes
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_38_rows_alone(cell: str, dtype: str, kind: str, D: int) -> None:
    """A row by itself and without padding, in parts of the batch, and in the batch."""
    p = Problem(cell, dtype, kind=kind, D=D)
    y, *state = p.forward()
    lengths = p.rows.get("lengths", np.full(p.x.shape[1], T))
    reset = p.rows.get("reset", np.zeros(p.x.shape[:2], bool))
    for b, n in enumerate(lengths):
        got, final = p.layer(
            p.x[:n, b], map_state(lambda s, b=b: s[:, b], p.state), reset=reset[:n, b]
        )
        assert_same_bits(got, y[:n, b], f"y of row {b} alone")
        assert_same_bits(y[n:, b], np.zeros_like(y[n:, b]), f"padding of row {b}")
        for got_s, want_s in zip(state_arrays(final), state, strict=True):
            assert_same_bits(got_s, want_s[:, b], f"state of row {b} alone")
    for cut in (1, 6, 8, 20):
        for part in (slice(0, cut), slice(cut, None)):
            got, final = p.layer(
                p.x[:, part],
                map_state(lambda s, part=part: s[:, part], p.state),
                lengths=lengths[part],
                reset=reset[:, part],
                threads=3,
            )
            assert_same_bits(got, y[:, part], f"y of rows {part}")
            for got_s, want_s in zip(state_arrays(final), state, strict=True):
                assert_same_bits(got_s, want_s[:, part], f"state of rows {part}")


@cells_and_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_38_rows_in_any_order(cell: str, dtype: str, kind: str) -> None:
    p = Problem(cell, dtype, kind=kind, D=2)
    y, *state = p.forward()
    order = np.random.default_rng(0).permutation(p.x.shape[1])
    p.x, p.state = p.x[:, order], map_state(lambda s: s[:, order], p.state)
    p.rows = {name: a[order] if name == "lengths" else a[:, order] for name, a in p.rows.items()}
    assert_all_same(p.forward(), [y[:, order], *(s[:, order] for s in state)])


@cells_and_dtypes
@pytest.mark.parametrize("D", [1, 2])
def test_38_padding(cell: str, dtype: str, D: int) -> None:
    """More steps past every row's length, whatever they hold, change nothing."""
    p = Problem(cell, dtype, kind="lengths", D=D)
    y, *state = p.forward()
    x = np.full((T + 40, *p.x.shape[1:]), np.nan, dtype)
    for b, n in enumerate(p.rows["lengths"]):
        x[:n, b] = p.x[:n, b]
    p.x = x
    padded, *padded_state = p.forward()
    assert_all_same([padded[:T], *padded_state], [y, *state])
    assert_same_bits(padded[T:], np.zeros_like(padded[T:]))


@cells_and_dtypes
@pytest.mark.parametrize("size", SIZES)
def test_39_calls_of_any_length(cell: str, dtype: str, size: str) -> None:
    """One pass, chunks with the state handed on, single steps; with and without threads."""
    p = Problem(cell, dtype, size, kind="reset", steps=60)
    y, *final = p.forward()
    for cuts in ([1, 2, 30], [25], range(1, 60)):
        state, parts = p.state, []
        for begin, end in zip([0, *cuts], [*cuts, 60], strict=True):
            part, state = p.layer(
                p.x[begin:end], state, reset=p.rows["reset"][begin:end], threads=1 + begin % 3
            )
            parts.append(part)
        assert_all_same([np.concatenate(parts), *state_arrays(state)], [y, *final])


@cells_and_dtypes
@pytest.mark.parametrize("size", SIZES)
def test_39_streams(cell: str, dtype: str, size: str) -> None:
    """A stream of all rows, and one of a single row, against one pass."""
    p = Problem(cell, dtype, size, kind="reset")
    y, *final = p.forward()
    frozen, B = p.layer.freeze(), p.x.shape[1]
    for rows in (slice(0, B), slice(B - 1, B)):
        stream = frozen.stream(rows.stop - rows.start)
        stream.state = map_state(lambda s, rows=rows: s[:, rows], p.state)
        out = np.empty_like(y[0, rows])
        for t in range(T):
            stream.reset(p.rows["reset"][t, rows])
            assert stream.step(p.x[t, rows], out) is out
            assert_same_bits(out, y[t, rows], f"step {t}")
        for got, want in zip(state_arrays(stream.state), final, strict=True):
            assert_same_bits(got, want[:, rows], "state of the stream")


@cells_and_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_training_and_inference(cell: str, dtype: str, kind: str) -> None:
    p = Problem(cell, dtype, kind=kind, D=2)
    want = p.forward()
    y, state = p.layer.freeze()(p.x, p.state, **p.rows)
    assert_all_same([y, *state_arrays(state)], want, "frozen")
    for every in (None, 4):
        y, state, _ = p.layer.forward(p.x, p.state, **p.rows, checkpoint_every=every)
        assert_all_same([y, *state_arrays(state)], want, f"training, checkpoints {every}")


def strided(array: np.ndarray) -> np.ndarray:
    """Every second element of a larger array, along every axis, backwards."""
    larger = np.zeros([2 * n for n in array.shape], array.dtype)
    view = larger[tuple(slice(None, None, -2) for _ in array.shape)]
    view[...] = array
    return view


@cells_and_dtypes
def test_12_layouts(cell: str, dtype: str) -> None:
    """batch_first, Fortran order, transposed, strided and reversed memory, for all arguments."""
    p = Problem(cell, dtype, kind="lengths_reset", D=2)
    want = p.forward(), p.gradients()
    for change in (np.asfortranarray, strided, lambda a: np.ascontiguousarray(a.T).T):
        q = Problem(cell, dtype, kind="lengths_reset", D=2)
        q.x, q.dy = change(q.x), change(q.dy)
        q.state, q.dstate = map_state(change, q.state), map_state(change, q.dstate)
        q.rows = {name: change(a) for name, a in q.rows.items()}
        assert_all_same(q.forward(threads=3), want[0])
        assert_all_same(q.gradients(threads=3), want[1])

    family, options = CELLS[cell]
    first = getattr(fastrnn, family.upper())(
        I, p.layer.hidden_size, 2, bidirectional=True, dtype=dtype, batch_first=True, **options
    )
    first.load_state_dict(p.layer.params)
    rows = {"lengths": p.rows["lengths"], "reset": p.rows["reset"].T}
    x, dy = p.x.transpose(1, 0, 2), p.dy.transpose(1, 0, 2)
    y, state, tape = first.forward(x, p.state, **rows)
    g = tape.backward(dy, p.dstate)
    got = [y.transpose(1, 0, 2), *state_arrays(state), *state_arrays(g.state)]
    assert_all_same([*got, *g.params.values(), g.x.transpose(1, 0, 2)], want[1], "batch_first")


@cells_and_dtypes
@pytest.mark.parametrize("kind", ["full", "lengths_reset"])
def test_one_hot_rows_dense_or_integer(cell: str, dtype: str, kind: str) -> None:
    p = Problem(cell, dtype, kind=kind, D=2)
    ids = np.random.default_rng(1).integers(I, size=p.x.shape[:2])
    p.x = np.eye(I, dtype=dtype)[ids]
    dense, dense_gradients = p.forward(), p.gradients()[:-1]
    p.x = ids
    assert_all_same(p.forward(), dense)
    assert_all_same(p.gradients(), dense_gradients)
    for integers in (np.uint8, np.int32):
        p.x = ids.astype(integers)
        assert_all_same(p.forward(threads=2), dense, integers.__name__)


# --- Gradients ----------------------------------------------------------------------------------


@cells_and_dtypes
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["full", "lengths_reset"])
def test_37_threads_gradients(cell: str, dtype: str, kind: str, size: str, D: int) -> None:
    p = Problem(cell, dtype, size, kind, D=D, steps=37)
    want = p.gradients(1)
    for threads in THREADS:
        assert_all_same(p.gradients(threads), want, f"{threads} threads")


@cells_and_dtypes
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lengths_reset"])
def test_checkpoints(cell: str, dtype: str, kind: str, D: int) -> None:
    """Any distance, with and without threads, gives the gradients of a full tape."""
    p = Problem(cell, dtype, kind=kind, D=D, steps=37)
    want = p.gradients()
    for every in (1, 5, 13, 36, 37, 1000):
        assert_all_same(p.gradients(1 + every % 3, every), want, f"checkpoint_every={every}")


# --- Instruction sets ---------------------------------------------------------------------------

OTHERS = _core.isas()[1:] if _core.isa() == _core.isas()[0] else []


@pytest.mark.parametrize("isa", OTHERS)
def test_every_instruction_set(isa: str) -> None:
    """This file, the hardest options of it, on the instruction sets that are not the default."""
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = "(rnn_tanh or lstm or gru_reset_before) and (lengths_reset or test_39 or one_hot)"
    flags = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    result = run_python(code, __file__, *flags, timeout=280, FASTRNN_ISA=isa)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]


def forward_digest() -> str:
    """One line for each cell and dtype: the hash of its forward results."""
    import hashlib

    lines = [_core.isa()]
    for cell in CELLS:
        for dtype in DTYPES:
            arrays = Problem(cell, dtype, kind="lengths_reset", D=2).forward()
            digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
            lines.append(f"{cell} {dtype} {digest}")
    return "\n".join(lines)


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(_core.isas()), reason="needs AVX-512")
def test_avx2_and_avx512() -> None:
    """Fused multiply-adds are explicit, so that the two round alike."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\nfrom test_bits import *; print(forward_digest())"
    )
    folder = __file__.rpartition("/")[0]
    outputs = []
    for isa in ("avx2", "avx512"):
        result = run_python(code, folder, FASTRNN_ISA=isa)
        assert result.returncode == 0, result.stderr
        name, *digests = result.stdout.splitlines()
        assert name == isa and len(digests) == len(CELLS) * len(DTYPES)
        outputs.append(digests)
    assert outputs[0] == outputs[1]
