"""Batches of sequences of different lengths, without padding.

Two forms beside a padded array with ``lengths``: a list of arrays, one a sequence, and ``Ragged``,
the sequences one after the other in one array. The kernels work on the second form in place; the
first is joined into it. Results come back in the form of the input. The cost of a call is that of
the sum of the lengths, and the bits are those of each sequence on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import _device
from fastrnn._params import Array

__all__ = ["Form", "Ragged", "is_batch", "sample", "split", "values_of"]


@dataclass(frozen=True, eq=False)
class Ragged:
    """B sequences one after the other.

    Attributes:
        values: (N, features), or (N,) integers: all steps of sequence 0, then of sequence 1, ….
        offsets: (B + 1,) integers that rise from 0 to N: sequence b is
            ``values[offsets[b] : offsets[b + 1]]``.
    """

    values: Array
    offsets: Array

    @classmethod
    def of(cls, sequences: list[Array] | tuple[Array, ...]) -> Ragged:
        """Joins arrays of shape (T_b, features), or (T_b,) for integers.

        Raises:
            ValueError: Arrays that do not agree in features, or none.
            TypeError: Arrays of different dtypes.
        """
        if not sequences:
            raise ValueError("x: expected at least one sequence, got an empty list")
        first = sequences[0]
        for i, a in enumerate(sequences):
            if a.ndim != first.ndim or a.ndim not in (1, 2) or a.shape[1:] != first.shape[1:]:
                expected = ("T",) if first.ndim == 1 else ("T", *first.shape[1:])
                raise ValueError(f"x[{i}]: expected shape {expected}, got {a.shape}")
            if a.dtype != first.dtype:
                raise TypeError(f"x[{i}]: expected an array of {first.dtype}, got {a.dtype}")
        offsets = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum([len(a) for a in sequences], out=offsets[1:])
        return cls(_device.join(sequences), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, b: int) -> Array:
        return self.values[self.offsets[b] : self.offsets[b + 1]]

    def split(self) -> list[Array]:
        """The sequences as views."""
        return [self[b] for b in range(len(self))]


Form = Callable[[Array], Any]  # puts an array of all steps into the form of the input


def _is_list(x: Any) -> bool:
    """Whether ``x`` is a list of sequences."""
    return (
        isinstance(x, (list, tuple))
        and len(x) > 0
        and all(isinstance(a, np.ndarray) or _device.on_device(a) for a in x)
    )


def is_batch(x: Any) -> bool:
    """Whether ``x`` is a batch without padding, in either form."""
    return isinstance(x, Ragged) or _is_list(x)


def sample(x: Any) -> Any:
    """One of the arrays of an input, whatever its form."""
    if isinstance(x, Ragged):
        return x.values
    return x[0] if _is_list(x) else x


def split(x: Any, port: _device.Port) -> tuple[npt.ArrayLike, Array | None, Form]:
    """(array for the kernels, offsets or None, what puts results into the form of ``x``)."""
    if isinstance(x, Ragged):
        offsets = np.array(x.offsets)  # the results keep it
        values = port.take("x", x.values)
        return values, offsets, lambda y: Ragged(port.give(y), offsets)
    if _is_list(x):
        joined = _join("x", x, port)
        return joined.values, joined.offsets, lambda y: Ragged(port.give(y), joined.offsets).split()
    return port.take("x", x), None, port.give


def values_of(name: str, value: Any, offsets: Array | None, port: _device.Port) -> Any:
    """The array of all steps in an argument (dy, reset) that has the form of ``x``.

    Raises:
        ValueError: The sequences are not those of ``x``.
    """
    if offsets is None or value is None:
        return port.take(name, value)
    if isinstance(value, (list, tuple)):
        value = _join(name, value, port)
    if isinstance(value, Ragged):
        if not np.array_equal(value.offsets, offsets):
            raise ValueError(
                f"{name}: expected sequences of lengths {np.diff(offsets).tolist()}, "
                f"got {np.diff(value.offsets).tolist()}"
            )
        value = value.values
    return port.take(name, value)


def _join(name: str, sequences: Any, port: _device.Port) -> Ragged:
    """``Ragged.of``, on the device where the sequences are there."""
    if any(map(_device.on_device, sequences)):
        sequences = [port.take(f"{name}[{i}]", a) for i, a in enumerate(sequences)]
        return Ragged.of(sequences)
    joined = Ragged.of(sequences)
    return Ragged(port.take(name, joined.values), joined.offsets)
