"""Every instruction set of this build and machine: chosen by FASTRNN_ISA, and right.

The choice is made once a process, so each of these tests runs in a process of its own.
"""

from __future__ import annotations

import pytest
from conftest import run_python
from fastrnn import _core

COMPARE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from fastrnn import _core, reference
from conftest import (
    CELLS, assert_forward_close, assert_gradient_close, make_layer, map_state, random_state,
    random_weights, state_arrays,
)

rng = np.random.default_rng(0)
wide = lambda a: a.astype(np.float64)
for cell, (family, options) in CELLS.items():
    for dtype in ("float32", "float64"):
        for B, I, H in ((1, 5, 1), (3, 1, 18), (14, 40, 67)):
            T, L, D = 12, 2, 2
            layer = make_layer(cell, I, H, L, D, dtype=dtype)
            x = rng.standard_normal((T, B, I)).astype(dtype)
            state, dstate = (random_state(family, (L * D, B, H), dtype, rng) for _ in range(2))
            dy = rng.standard_normal((T, B, D * H)).astype(dtype)
            rows = {"lengths": rng.integers(1, T + 1, B), "reset": rng.random((T, B)) < 0.1}
            y, final, tape = layer.forward(x, state, **rows)
            got = tape.backward(dy, dstate)
            weights = {name: wide(a) for name, a in layer.params.items()}
            want_y, want_final, tape = getattr(reference, family + "_forward")(
                wide(x), weights, map_state(wide, state), **rows, **options
            )
            want = getattr(reference, family + "_backward")(tape, wide(dy), map_state(wide, dstate))
            assert_forward_close(y, want_y, "y", max(1.0, np.abs(want_y).max()))
            assert np.array_equal(layer(x, state, **rows)[0], y)
            for a, b in zip(state_arrays(final), state_arrays(want_final), strict=True):
                assert_forward_close(a, b, "state", max(1.0, np.abs(b).max()))
            scale = max(np.abs(a).max() for a in (want.x, *want.params.values()))
            for a, b in zip(state_arrays(got.state), state_arrays(want.state), strict=True):
                assert_gradient_close(a, b, "state", scale)
            assert_gradient_close(got.x, want.x, "x", scale)
            for name in want.params:
                assert_gradient_close(got.params[name], want.params[name], name, scale)
print(_core.isa())
"""


@pytest.mark.parametrize("isa", _core.isas())
def test_against_the_reference(isa: str) -> None:
    """Outputs, states and gradients within the promised accuracy."""
    folder = __file__.rpartition("/")[0]
    result = run_python(COMPARE, folder, FASTRNN_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


def test_the_best_is_the_default() -> None:
    code = "from fastrnn import _core; print(_core.isa())"
    result = run_python(code, FASTRNN_ISA="")
    assert result.stdout.strip() == _core.isas()[0], result.stderr


def test_at_least_the_baseline() -> None:
    assert {"baseline", "neon"} & set(_core.isas())


@pytest.mark.parametrize("wanted", ["sse9", "AVX2", "avx2 ", "0"])
def test_unknown_names(wanted: str) -> None:
    """A RuntimeError that lists what there is, at the first call and again at every other."""
    code = """
import numpy as np, fastrnn
for call in (
    lambda: fastrnn.LSTM(2, 3)(np.zeros((1, 1, 2), np.float32)),
    lambda: fastrnn.show_config("dict"),
    lambda: fastrnn.LSTM(2, 3).freeze(),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    result = run_python(code, FASTRNN_ISA=wanted)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("FASTRNN_ISA: expected one ") and line.endswith(f"got '{wanted}'")
        assert all(f"'{isa}'" in line for isa in _core.isas())
