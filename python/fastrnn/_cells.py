"""What the layers and the functional interface know of a cell: its gates, its options, its names.

Parameters have PyTorch's names and shapes: for layer k, ``weight_ih_l{k}`` (G·H, I or D·H),
``weight_hh_l{k}`` (G·H, H), ``bias_ih_l{k}`` and ``bias_hh_l{k}`` (G·H), the reverse direction's
with the suffix ``_reverse``. Gates stand in the order i, f, g, o (LSTM) or r, z, n (GRU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastrnn import _check, _device
from fastrnn._params import Array

__all__ = ["NONLINEARITIES", "PRECISIONS", "Network", "infer", "parameter_shapes"]

NONLINEARITIES = ("tanh", "relu", "sigmoid")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # of float32 networks on the device
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
Family = Literal["rnn", "lstm", "gru"]


@dataclass(frozen=True)
class Network:
    """The shape of a recurrent network.

    Attributes:
        family: ``"rnn"``, ``"lstm"`` or ``"gru"``.
        variant: The nonlinearity of an RNN; ``"after"`` or ``"before"``, where a GRU's reset gate
            acts; empty for an LSTM.
        device: Where weights and results live: ``"cpu"`` or ``"cuda"``.
        precision: What products are computed in on the device, one of ``PRECISIONS``; None for the
            dtype itself. The CPU has no other.
    """

    family: Family
    variant: str
    input_size: int
    hidden_size: int
    num_layers: int
    num_directions: int
    bias: bool
    dtype: np.dtype[Any]
    device: str = "cpu"
    precision: str | None = None

    @property
    def cell(self) -> str:
        """The kernel's name."""
        return f"{self.family}_{self.variant}" if self.variant else self.family

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by name, in the order in which the kernels take them."""
        return parameter_shapes(
            self.family,
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.num_directions,
            self.bias,
        )

    def pack(self, weights: Mapping[str, Array], threads: int | None = None, x: Any = None) -> Any:
        """A private copy of ``weights`` in the layout of the device's kernels: their ``Packed``.

        Made on the stream of ``x``, the array that it will run on, where that is on the device.
        """
        own = self.precision is None or self.device == "cpu"
        stream = {"stream": x.stream} if _device.is_array(x) else {}
        return _device.kernels(self.device).Packed(
            self.cell,
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.num_directions,
            self.bias,
            self.dtype.name if own else self.precision,
            [weights[name] for name in self.shapes()],
            threads,
            **stream,
        )


def parameter_shapes(
    family: Family, input_size: int, hidden_size: int, layers: int, directions: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes by name: for each layer and direction weight_ih, weight_hh, bias_ih, bias_hh."""
    rows = GATES[family] * hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        columns = input_size if layer == 0 else directions * hidden_size
        for direction in range(directions):
            end = f"_l{layer}" + ("_reverse" if direction else "")
            shapes["weight_ih" + end] = (rows, columns)
            shapes["weight_hh" + end] = (rows, hidden_size)
            if bias:
                shapes["bias_ih" + end] = (rows,)
                shapes["bias_hh" + end] = (rows,)
    return shapes


def infer(
    family: Family, variant: str, weights: Mapping[str, Any]
) -> tuple[Network, dict[str, Array]]:
    """The network that ``weights`` (PyTorch's names) describe, and the weights as arrays.

    Weights on a CUDA device make a network there.

    Raises:
        TypeError: not a mapping of float32 or float64 arrays of one dtype.
        ValueError: names or shapes that do not fit together; the message lists all of them.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a mapping of arrays, got {type(weights).__name__}")
    if "weight_hh_l0" not in weights or "weight_ih_l0" not in weights:
        raise ValueError(
            "weights: expected PyTorch's names (weight_ih_l0, weight_hh_l0, …), "
            f"got {sorted(map(str, weights))}"
        )
    device = "cuda" if _device.on_device(weights["weight_hh_l0"]) else "cpu"
    arrays: dict[str, Any] = {}
    for name, value in weights.items():
        if device == "cpu":
            arrays[name] = np.asarray(value)
        else:
            arrays[name] = _device.port(device, value).take(f"weights[{name!r}]", value)
    dtype = _device.dtype_of(arrays["weight_hh_l0"])
    for name, array in arrays.items():
        if _device.dtype_of(array) != dtype or dtype not in ("float32", "float64"):
            expected = dtype if dtype in ("float32", "float64") else "float32 or float64"
            raise TypeError(
                f"weights[{name!r}]: expected an array of {expected}, got {array.dtype}"
            )
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if arrays[name].ndim != 2 or 0 in arrays[name].shape:
            raise ValueError(
                f"weights[{name!r}]: expected a matrix with no empty axis, "
                f"got shape {arrays[name].shape}"
            )
    layers = 0
    while f"weight_hh_l{layers}" in arrays:
        layers += 1
    shape = {
        "input_size": arrays["weight_ih_l0"].shape[1],
        "hidden_size": arrays["weight_hh_l0"].shape[1],
        "num_layers": layers,
        "num_directions": 2 if "weight_hh_l0_reverse" in arrays else 1,
        "bias": "bias_ih_l0" in arrays,
    }
    network = Network(family, variant, dtype=np.dtype(dtype), device=device, **shape)
    expected_shapes = network.shapes()
    problems = [f"missing {name!r}" for name in expected_shapes if name not in arrays]
    problems += [f"unknown {name!r}" for name in arrays if name not in expected_shapes]
    problems += [
        f"{name!r} of shape {arrays[name].shape} instead of {wanted}"
        for name, wanted in expected_shapes.items()
        if name in arrays and arrays[name].shape != wanted
    ]
    if problems:
        raise ValueError(
            f"weights: expected those of {layers} {family} layers of {network.hidden_size} units, "
            f"got: {', '.join(problems)}"
        )
    return network, arrays


def variant_of(family: Family, nonlinearity: Any = "tanh", reset_after: Any = True) -> str:
    """The cell's variant from the options of its family."""
    if family == "rnn":
        return _check.choice("nonlinearity", nonlinearity, NONLINEARITIES)
    if family == "gru":
        return "after" if _check.flag("reset_after", reset_after) else "before"
    return ""
