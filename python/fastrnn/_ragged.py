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

from fastrnn._params import Array

__all__ = ["Form", "Ragged", "split"]


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
        return cls(np.concatenate(sequences), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, b: int) -> Array:
        return self.values[self.offsets[b] : self.offsets[b + 1]]

    def split(self) -> list[Array]:
        """The sequences as views."""
        return [self[b] for b in range(len(self))]


Form = Callable[[Array], Any]  # puts an array of all steps into the form of the input


def _same(array: Array) -> Array:
    return array


def split(x: Any) -> tuple[npt.ArrayLike, Array | None, Form]:
    """(array for the kernels, offsets or None, what puts results into the form of ``x``)."""
    if isinstance(x, Ragged):
        offsets = np.array(x.offsets)  # the results keep it
        return x.values, offsets, lambda values: Ragged(values, offsets)
    if isinstance(x, (list, tuple)) and x and all(isinstance(a, np.ndarray) for a in x):
        joined = Ragged.of(x)
        return joined.values, joined.offsets, lambda v: Ragged(v, joined.offsets).split()
    return x, None, _same


def values_of(name: str, value: Any, offsets: Array | None) -> Any:
    """The array of all steps in an argument (dy, reset) that has the form of ``x``.

    Raises:
        ValueError: The sequences are not those of ``x``.
    """
    if offsets is None or value is None:
        return value
    if isinstance(value, (list, tuple)):
        value = Ragged.of(value)
    if isinstance(value, Ragged):
        if not np.array_equal(value.offsets, offsets):
            raise ValueError(
                f"{name}: expected sequences of lengths {np.diff(offsets).tolist()}, "
                f"got {np.diff(value.offsets).tolist()}"
            )
        return value.values
    return value
