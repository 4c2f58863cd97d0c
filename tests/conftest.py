"""What the Python tests share: random numbers, the cells, random problems, the promised accuracy.

Dimensions as everywhere: T steps, B batch, I inputs, H hidden, L layers, D directions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import hypothesis
import numpy as np
import pytest

# Hypothesis draws the same examples in every run, so that a failure is the change's and not the
# dice's. HYPOTHESIS_PROFILE=explore searches further.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# A shell's background job ignores Ctrl-C, and so would every process that the tests start and
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A process has one CUDA backend, and those it starts have the same. Where there is no GPU it is the
# emulated one.
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
    os.environ.setdefault("FASTRNN_CUDA", "emulated")

# The accuracy we promise on signed random data with T up to 1000, against the float64 reference
# run on the same values: absolute for outputs and states, …
FORWARD_ATOL = {"float32": 1e-6, "float64": 1e-12}
# … and as a part of each tensor's largest element for gradients.
GRADIENT_TOLERANCE = {"float32": 5e-6, "float64": 1e-12}

# Gradients against central differences in float64.
FINITE_DIFFERENCE_ATOL = 1e-8
FINITE_DIFFERENCE_RTOL = 1e-6

GATES = {"rnn": 1, "lstm": 4, "gru": 3}

# Every cell with its options: name of the test case → (family, options of its functions).
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("rnn", {"nonlinearity": "tanh"}),
    "rnn_relu": ("rnn", {"nonlinearity": "relu"}),
    "rnn_sigmoid": ("rnn", {"nonlinearity": "sigmoid"}),
    "lstm": ("lstm", {}),
    "gru_reset_after": ("gru", {"reset_after": True}),
    "gru_reset_before": ("gru", {"reset_after": False}),
}


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test and every run."""
    return np.random.default_rng(20240229)


def random_weights(
    cell: str,
    I: int,
    H: int,
    L: int,
    D: int,
    bias: bool,
    dtype: Any,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """PyTorch's names and initial distribution, U(-1/sqrt(H), 1/sqrt(H)); cell: rnn, lstm, gru."""
    rows, weights = GATES[cell] * H, {}
    for layer in range(L):
        for suffix in ("", "_reverse")[:D]:
            shapes = {
                "weight_ih": (rows, I if layer == 0 else D * H),
                "weight_hh": (rows, H),
                "bias_ih": (rows,),
                "bias_hh": (rows,),
            }
            for kind, shape in list(shapes.items())[: 4 if bias else 2]:
                values = rng.uniform(-1, 1, shape) / np.sqrt(H)
                weights[f"{kind}_l{layer}{suffix}"] = values.astype(dtype)
    return weights


def random_state(cell: str, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> Any:
    """A state of the given shape, (L*D, B, H) or unbatched (L*D, H): h, or (h, c) for LSTM."""
    if cell == "lstm":
        return (
            rng.uniform(-1, 1, shape).astype(dtype),
            rng.uniform(-1, 1, shape).astype(dtype),
        )
    return rng.uniform(-1, 1, shape).astype(dtype)


def state_arrays(state: Any) -> list[np.ndarray]:
    """The one or two arrays of a state."""
    return list(state) if isinstance(state, tuple) else [state]


def map_state(function: Any, state: Any) -> Any:
    """The state with `function` applied to each of its arrays; None stays None."""
    if state is None:
        return None
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def assert_forward_close(got: np.ndarray, want: np.ndarray, what: str, scale: float = 1.0) -> None:
    """Outputs and states: same shape, and the promised absolute accuracy of got's dtype.

    The promise is for outputs between -1 and 1; a scale is given where they have no bound.
    """
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    atol = FORWARD_ATOL[got.dtype.name] * scale
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=what)


def assert_gradient_close(
    got: np.ndarray, want: np.ndarray, what: str, scale: float | None = None
) -> None:
    """Gradients: same shape, and the promised part of `scale`, by default the largest of `want`.

    A scale is given for tensors of so few elements that all of them may be sums that cancel.
    """
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if scale is None:
        scale = float(np.abs(want).max(initial=0))
    atol = GRADIENT_TOLERANCE[got.dtype.name] * scale
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=what)


def make_layer(cell: str, I: int, H: int, L: int = 1, D: int = 1, **options: Any) -> Any:
    """The compiled library's layer for one of CELLS, with the same weights in every run."""
    import fastrnn  # here, so that tests that need no extension can use this file

    family, cell_options = CELLS[cell]
    layer = getattr(fastrnn, family.upper())
    return layer(I, H, L, bidirectional=D == 2, **{"rng": 5, **cell_options, **options})


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Same shape, dtype and bits: 0 and -0 differ, one NaN is as good as another."""
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.shape} {got.dtype}"
    same = (got == want) & (np.signbit(got) == np.signbit(want)) | np.isnan(got) & np.isnan(want)
    where = np.argwhere(~same)
    assert len(where) == 0, (
        f"{what}: {len(where)} of {same.size} elements differ, the first at {where[0]}"
    )


def run_python(
    code: str, *args: str, timeout: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in an interpreter of its own, for what may change or end the process."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
