"""The validator: every public argument passes through one of these functions.

TypeError for a wrong type, ValueError for a wrong value, always "argument: expected …, got …".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import _core, _device

__all__ = [
    "any_float_array",
    "choice",
    "flag",
    "float_array",
    "float_dtype",
    "generator",
    "int_array",
    "key",
    "mask",
    "number",
    "probability",
    "size",
    "threads",
]

_MAX_SIZE = (
    2**31 - 1
)  # one dimension; products of dimensions are 64-bit and checked where they are made
_MAX_THREADS = 1024
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def _got(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _integer(name: str, value: object, expected: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected {expected}, got {_got(value)}")
    return int(value)


def size(name: str, value: object, most: int = _MAX_SIZE) -> int:
    """A positive integer (bool is none) up to ``most``, by default what fits one dimension."""
    expected = f"an integer from 1 to {most}"
    result = _integer(name, value, expected)
    if not 1 <= result <= most:
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}")
    return result


def threads(value: object, name: str = "threads") -> int:
    """A thread count from 1 to 1024; None means the default, which is looked up here."""
    if value is None:
        return int(_core.get_num_threads())
    expected = f"None or an integer from 1 to {_MAX_THREADS}"
    result = _integer(name, value, expected)
    if not 1 <= result <= _MAX_THREADS:
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}")
    return result


def number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """A finite real number in the interval given (closed unless ``*_open``)."""
    expected = "a finite number"
    if (low, high) != (-math.inf, math.inf):
        left = "(" if low_open else "["
        expected += f" in {left}{low}, {high}{')' if high_open or high == math.inf else ']'}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"{name}: expected {expected}, got {_got(value)}")
    try:
        result = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}") from None
    above = result > low if low_open else result >= low
    below = result < high if high_open else result <= high
    if not (math.isfinite(result) and above and below):
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}")
    return result


def probability(name: str, value: object) -> float:
    """A number in [0, 1): NaN and 1 are refused."""
    return number(name, value, low=0.0, high=1.0, high_open=True)


def key(name: str, value: object) -> int:
    """A 64-bit key: an integer from 0 to 2**64 - 1."""
    expected = "an integer from 0 to 2**64 - 1"
    result = _integer(name, value, expected)
    if not 0 <= result < 2**64:
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}")
    return result


def float_dtype(name: str, value: Any) -> np.dtype[Any]:
    """float32 or float64, in native byte order."""
    expected = "'float32' or 'float64'"
    try:
        if value is None:  # np.dtype(None) is float64, which nobody means
            raise TypeError
        dtype: np.dtype[Any] = np.dtype(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {_got(value)}") from None
    if dtype not in _FLOATS:
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}")
    return dtype


def generator(name: str, value: Any) -> np.random.Generator:
    """The Generator given, or one seeded with the integer given (None: by the system)."""
    if isinstance(value, np.random.Generator):
        return value
    if value is None:
        return np.random.default_rng()
    expected = "None, a non-negative integer or numpy.random.Generator"
    seed = _integer(name, value, expected)
    if seed < 0:
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}")
    return np.random.default_rng(seed)


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that merely behaves like them."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {_got(value)}")
    return bool(value)


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """One of ``options``."""
    expected = "one of " + ", ".join(repr(option) for option in options)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {expected}, got {_got(value)}")
    if value not in options:
        raise ValueError(f"{name}: expected {expected}, got {_got(value)}")
    return value


def float_array(
    name: str, value: Any, dtype: np.dtype[Any] | str, shape: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    """``value`` as an aligned C-contiguous array of ``dtype``; copied only where it is not one yet.

    A ``DeviceArray`` stays one, here and below.

    Raises:
        TypeError: another dtype (byte order apart); the message says how to convert.
        ValueError: another shape than ``shape``, where that is given.
    """
    wanted = dtype if isinstance(dtype, str) else dtype.name
    if _device.is_array(value):
        return _device_array(name, value, (wanted,), shape)
    array = np.asarray(value)
    if array.dtype.newbyteorder("=") != dtype:
        hint = f"; convert it with .astype({wanted!r})" if array.dtype.kind in "fiu" else ""
        raise TypeError(f"{name}: expected an array of {dtype}, got {array.dtype}{hint}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    return np.require(array, dtype=dtype, requirements=["C", "A"])


def any_float_array(name: str, value: Any) -> npt.NDArray[Any]:
    """``value``, which must be float32 or float64, as an aligned C-contiguous native array."""
    if _device.is_array(value):
        return _device_array(name, value, ("float32", "float64"), None)
    array = np.asarray(value)
    dtype = array.dtype.newbyteorder("=")
    if dtype not in _FLOATS:
        raise TypeError(f"{name}: expected an array of float32 or float64, got {array.dtype}")
    return float_array(name, array, dtype)


def int_array(name: str, value: Any, shape: tuple[int, ...] | None = None) -> npt.NDArray[np.int64]:
    """``value`` as an aligned C-contiguous int64 array (bool and floats are refused)."""
    if _device.is_array(value):
        return _device_array(name, value, ("int64", "int32"), shape)
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an array of integers, got {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size:
        largest = int(array.max())
        if largest > np.iinfo(np.int64).max:  # would turn negative below
            raise ValueError(f"{name}: expected integers below 2**63, got {largest}")
    return np.require(array, dtype=np.int64, requirements=["C", "A"])


def mask(name: str, value: Any, *shapes: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """``value`` as a C-contiguous bool array in one of ``shapes``, on the CPU."""
    array = np.asarray(value)
    if array.dtype != np.bool_:
        raise TypeError(f"{name}: expected an array of bool, got {array.dtype}")
    if array.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {array.shape}")
    return np.require(array, requirements=["C", "A"])


def _device_array(
    name: str, array: Any, dtypes: tuple[str, ...], shape: tuple[int, ...] | None
) -> npt.NDArray[Any]:
    """A ``DeviceArray`` of one of the dtypes, C-contiguous."""
    if array.dtype not in dtypes:
        raise TypeError(f"{name}: expected an array of {' or '.join(dtypes)}, got {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    dense: npt.NDArray[Any] = array if array.contiguous else array.copy()
    return dense
