"""The linear layer: y = x Wᵀ + b."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastrnn import _check, _device
from fastrnn._params import Array
from fastrnn.nn._stateless import Backward, Stateless

__all__ = ["FrozenLinear", "Linear"]


class Linear(Stateless):
    """y = x Wᵀ + b on the last axis of x, as ``torch.nn.Linear``.

    Parameters are ``weight`` (out_features, in_features) and ``bias`` (out_features), drawn from
    U(-k, k), k = 1/sqrt(in_features). A call takes x (..., in_features) of ``dtype`` and returns
    (..., out_features); each row's result does not depend on the other rows, bit for bit.

    Args:
        in_features: Size of the input's last axis.
        out_features: Size of the output's last axis.
        bias: Whether to add b.
        dtype: "float32" or "float64".
        rng: None, a seed or a ``numpy.random.Generator`` for the initial values.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: Any = "float32",
        rng: Any = None,
    ) -> None:
        self.in_features = _check.size("in_features", in_features)
        self.out_features = _check.size("out_features", out_features)
        self.bias = _check.flag("bias", bias)
        self.dtype = _check.float_dtype("dtype", dtype)
        generator = _check.generator("rng", rng)
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes["bias"] = (self.out_features,)
        self._allocate(shapes, self.dtype)
        bound = 1 / math.sqrt(self.in_features)
        for array in self.params.values():
            array[...] = generator.uniform(-bound, bound, array.shape)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "dtype": self.dtype.name,
        }

    def freeze(self) -> FrozenLinear:
        """An immutable, picklable copy for inference; call it like the module."""
        return FrozenLinear(self.params["weight"], self.params.get("bias"))

    def _input(self, x: Any) -> Array:
        return _rows("x", x, self.dtype, self.in_features)

    def _compute(self, x: Array, threads: int) -> Array:
        return _affine(x, self.params["weight"], self.params.get("bias"), threads)

    def _record(self, x: Array, threads: int, owned: bool) -> tuple[Array, Backward]:
        weight = self.params["weight"].copy()
        saved = x if owned else x.copy()
        y = _affine(saved, weight, self.params.get("bias"), threads)

        def backward(dy: Array, into: dict[str, Array], threads: int) -> Array:
            dx: Array = _device.kernels(_device.device_of(dy)).linear_backward(
                saved.reshape(-1, weight.shape[1]),
                weight,
                dy.reshape(-1, weight.shape[0]),
                into["weight"],
                into.get("bias"),
                True,
                threads,
            )
            return dx.reshape(saved.shape)

        return y, backward


class FrozenLinear:
    """``Linear`` for inference: immutable, picklable, to be shared by threads."""

    def __init__(self, weight: Array, bias: Array | None) -> None:
        self._weight = _device.constant(weight)
        self._bias = None if bias is None else _device.constant(bias)

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return _device.device_of(self._weight)

    def __call__(self, x: Any, *, threads: int | None = None) -> Array:
        """(..., in_features) → (..., out_features)."""
        port, weight = _device.port(self.device, x), self._weight
        rows = _rows("x", port.take("x", x), np.dtype(weight.dtype), weight.shape[1])
        y: Array = port.give(_affine(rows, weight, self._bias, _check.threads(threads)))
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenLinear, (self._weight, self._bias)


def _rows(name: str, x: Any, dtype: np.dtype[Any], features: int) -> Array:
    """``x`` checked, its last axis of size ``features``."""
    array = _check.float_array(name, x, dtype)
    if array.ndim < 1 or array.shape[-1] != features:
        raise ValueError(f"{name}: expected shape (..., {features}), got {array.shape}")
    return array


def _affine(x: Array, weight: Array, bias: Array | None, threads: int) -> Array:
    rows = x.reshape(-1, weight.shape[1])
    y: Array = _device.kernels(_device.device_of(weight)).linear_forward(
        rows, weight, bias, threads
    )
    return y.reshape((*x.shape[:-1], weight.shape[0]))
