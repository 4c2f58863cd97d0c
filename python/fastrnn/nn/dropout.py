"""Dropout between modules."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastrnn import _check, _device
from fastrnn._params import Array
from fastrnn.nn._stateless import Backward, Stateless

__all__ = ["Dropout", "FrozenDropout"]


class Dropout(Stateless):
    """In ``forward``, zeroes each element with probability p and divides the others by 1 - p.

    Srivastava et al. 2014, in the inverted form, so that ``module(x)``, the inference, returns x
    itself. The mask is not stored: element e (in C order) is kept where
    ``(splitmix64(key + e) >> 11) * 2**-53 >= p``, with a 64-bit key drawn from ``rng`` in every
    ``forward``.

    Args:
        p: Probability in [0, 1) of dropping an element.
        rng: None, a seed or a ``numpy.random.Generator`` for the keys.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.
    """

    def __init__(self, p: float = 0.5, *, rng: Any = None) -> None:
        self.p = _check.probability("p", p)
        self.rng = _check.generator("rng", rng)
        self._allocate({}, np.float32)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values."""
        return {"p": self.p}

    def freeze(self) -> FrozenDropout:
        """The identity, to be called like the module."""
        return FrozenDropout()

    def _bind(self, flat: Array) -> None:
        self.flat = flat  # empty, of the model's dtype

    def _input(self, x: Any) -> Array:
        return _check.any_float_array("x", x)

    def _compute(self, x: Array, threads: int) -> Array:
        return x

    def _record(self, x: Array, threads: int, owned: bool) -> tuple[Array, Backward]:
        p = self.p
        if p == 0:
            return x.copy(), lambda dy, _into, _threads: dy.copy()
        key = int(self.rng.integers(2**64, dtype=np.uint64))
        kernels = _device.kernels(_device.device_of(x))

        def backward(dy: Array, _into: dict[str, Array], threads: int) -> Array:
            dx: Array = kernels.dropout(dy, p, key, threads)
            return dx

        return kernels.dropout(x, p, key, threads), backward


class FrozenDropout:
    """``Dropout`` for inference: the identity."""

    def __call__(self, x: Any, *, threads: int | None = None) -> Array:
        """Returns ``x`` as an array."""
        _check.threads(threads)
        return _check.any_float_array("x", x)
