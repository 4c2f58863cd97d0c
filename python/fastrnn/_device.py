"""Where arrays live: on the CPU as NumPy's, on a CUDA device as ``DeviceArray``.

All that knows of both is here. A device has a module of kernels, ``fastrnn._core`` or
``fastrnn._cuda``, whose functions have the same names and arguments. What a caller passes in comes
through a ``Port``, which makes it an array of the layer's device, and results go out through it as
arrays of the caller's kind: NumPy for NumPy, PyTorch for PyTorch, without a copy where they are on
the device already.

The CUDA module is loaded at its first use. ``FASTRNN_CUDA`` chooses it: nothing for the real one,
``emulated`` for the same kernels on a slow emulator of a GPU, for tests, ``off`` for none.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastrnn import _core

__all__ = [
    "DEVICES",
    "DeviceArray",
    "Port",
    "add_at",
    "assign",
    "cast",
    "clip",
    "constant",
    "contiguous",
    "copied",
    "device_array",
    "device_of",
    "dtype_of",
    "in_place",
    "is_array",
    "is_view",
    "join",
    "joined",
    "kernels",
    "masked",
    "move",
    "on_device",
    "picked",
    "port",
    "read_only",
    "scale",
    "status",
    "zeros",
]

DEVICES = ("cpu", "cuda")
_MODULES = {"": "fastrnn._cuda", "emulated": "fastrnn._cuda_emulated"}
_DLPACK_CUDA = 2  # DLPack's number for CUDA memory

_arrays: tuple[type, ...] = ()  # the loaded module's Array


if TYPE_CHECKING:
    from fastrnn._cuda import Array as DeviceArray
else:

    class _Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, _arrays)

    class DeviceArray(metaclass=_Kind):
        """An array in a CUDA device's memory, as ``fastrnn.device_array`` makes it.

        It has ``shape``, ``dtype`` (a name), ``ndim``, ``size``, ``nbytes``, ``reshape``, ``copy``,
        ``astype``, slices ``a[begin:end]`` that are views, assignment ``a[...] = values``, and
        ``numpy()``, a copy on the host. PyTorch, CuPy and JAX take it without a copy by
        ``from_dlpack``, Numba by ``__cuda_array_interface__``; and layers on the device take
        theirs. This class is that of the loaded module's ``Array``, for ``isinstance``.
        """

        def __new__(cls, *_: Any, **__: Any) -> Any:
            raise TypeError(
                "DeviceArray: expected fastrnn.device_array(x), got a call of the class"
            )


@functools.cache
def _cuda() -> Any:
    """The CUDA module.

    Raises:
        RuntimeError: There is none in this build, or no device; the message says which.
    """
    global _arrays
    choice = os.environ.get("FASTRNN_CUDA", "")
    if choice not in (*_MODULES, "off"):
        raise ValueError(f"FASTRNN_CUDA: expected nothing, 'emulated' or 'off', got {choice!r}")
    if choice == "off":
        raise RuntimeError("CUDA is off (FASTRNN_CUDA=off)")
    try:
        module: Any = importlib.import_module(_MODULES[choice])
    except ModuleNotFoundError:
        raise RuntimeError(
            "this build of fastrnn has no CUDA backend; install fastrnn from source on a machine "
            "with nvcc of CUDA 12.8 or newer"
        ) from None
    except ImportError as error:
        raise RuntimeError(f"its CUDA backend cannot be loaded: {error}") from None
    module.require_device()
    _arrays = (module.Array,)
    copyreg.pickle(module.Array, _reduce)
    return module


def kernels(device: str) -> Any:
    """The module of kernels for ``"cpu"`` or ``"cuda"``.

    Raises:
        RuntimeError: CUDA cannot be had here; the message says why.
    """
    if device == "cpu":
        return _core
    try:
        return _cuda()
    except RuntimeError as error:
        raise RuntimeError(f"device: expected 'cpu', got 'cuda', and {error}") from None


def status() -> str:
    """The CUDA device in a few words, or why there is none."""
    try:
        info = _cuda().device_info()
    except (RuntimeError, ValueError) as error:
        text = str(error)
        return "not in this build" if text.startswith("this build") else text
    major, minor = info["compute_capability"]
    return (
        f"{info['name']}, compute capability {major}.{minor}, "
        f"{info['memory'] / 2**30:.0f} GiB, driver {info['driver']}, runtime {info['runtime']}"
    )


def device_array(x: Any, dtype: str | None = None) -> DeviceArray:
    """Copies an array to the CUDA device.

    Args:
        x: Numbers or booleans: float32, float64, float16, integers (which become int64, but for
            int32) or bool. Another library's array on the device is not copied.
        dtype: Convert to ``"float32"``, ``"float64"``, ``"float16"``, ``"bfloat16"``, ``"int32"``,
            ``"int64"`` or ``"bool"``.

    Returns:
        A ``DeviceArray``.

    Raises:
        RuntimeError: There is no CUDA device; the message says why.
        TypeError: ``x`` has another dtype.
    """
    kernels("cuda")
    array: DeviceArray = port("cuda", x).take("x", x)
    return array if dtype is None or array.dtype == dtype else array.astype(dtype)


def is_array(value: Any) -> bool:
    """Whether ``value`` is a ``DeviceArray``."""
    return isinstance(value, _arrays)


def on_device(value: Any) -> bool:
    """Whether ``value`` is an array on a CUDA device, of whatever library."""
    if isinstance(value, np.ndarray):
        return False
    if is_array(value):
        return True
    if hasattr(type(value), "__dlpack_device__"):
        return int(value.__dlpack_device__()[0]) == _DLPACK_CUDA
    return hasattr(value, "__cuda_array_interface__")


def device_of(array: Any) -> str:
    """``"cpu"`` or ``"cuda"``: where one of our arrays lives."""
    return "cuda" if is_array(array) else "cpu"


def dtype_of(array: Any) -> str:
    """The name of an array's dtype, without its byte order."""
    dtype = array.dtype
    return dtype if isinstance(dtype, str) else dtype.name


# What NumPy's arrays and ours on the device do differently.


def zeros(shape: int | tuple[int, ...], dtype: npt.DTypeLike, device: str) -> Any:
    """An array of zeros."""
    if device == "cpu":
        return np.zeros(shape, dtype)
    full = (shape,) if isinstance(shape, int) else shape
    return kernels(device).Array.zeros(full, np.dtype(dtype).name)


def move(array: Any, device: str) -> Any:
    """The values in new memory of ``device``."""
    if device == "cpu":
        return array.numpy() if is_array(array) else array.copy()
    return array.copy() if is_array(array) else _upload("array", array)


def assign(name: str, target: Any, source: Any) -> None:
    """Copies values of the same shape into ``target``; TypeError where NumPy would not, either."""
    if not np.can_cast(dtype_of(source), dtype_of(target), "same_kind"):
        raise TypeError(f"{name}: expected values of {dtype_of(target)}, got {dtype_of(source)}")
    target[...] = source


def contiguous(array: Any) -> bool:
    """Whether the elements stand in C order without gaps."""
    return bool(array.contiguous if is_array(array) else array.flags.c_contiguous)


def in_place(array: Any) -> bool:
    """Whether kernels can use the memory as it is: C-contiguous and aligned."""
    return contiguous(array) and (is_array(array) or bool(array.flags.aligned))


def read_only(array: Any) -> bool:
    """Whether the array may not be written."""
    return not (array.writable if is_array(array) else array.flags.writeable)


def is_view(array: Any) -> bool:
    """Whether the array lies in a larger one."""
    return bool(array.is_view if is_array(array) else array.base is not None)


def joined(arrays: Sequence[Any]) -> Any:
    """The 1-D array that device arrays divide among themselves, or None."""
    if not all(map(is_array, arrays)):
        return None
    return kernels("cuda").Array.joined(arrays)


def join(arrays: Sequence[Any]) -> Any:
    """``np.concatenate`` along the first axis."""
    if not is_array(arrays[0]):
        return np.concatenate(arrays)
    shape = (sum(len(a) for a in arrays), *arrays[0].shape[1:])
    out = kernels("cuda").Array.empty(shape, arrays[0].dtype)
    start = 0
    for array in arrays:
        out[start : start + len(array)] = array
        start += len(array)
    return out


def copied(array: Any) -> Any:
    """The same values, C-contiguous and in native byte order, in memory of its own."""
    if is_array(array):
        return array.copy()
    own = np.array(array, order="C")
    return own.astype(own.dtype.newbyteorder("="), copy=False)


def masked(mask: npt.NDArray[np.bool_], array: Any) -> Any:
    """``array`` where the mask, which is broadcast to its shape, is True; 0 elsewhere."""
    if is_array(array):
        return kernels("cuda").where(mask, array)
    return np.where(mask, array, array.dtype.type(0))


def scale(arrays: Sequence[Any], factor: float) -> None:
    """Each array, all of one device, times the factor, in place."""
    if arrays and is_array(arrays[0]):
        kernels("cuda").scale(arrays, factor)
    else:
        for array in arrays:
            array *= array.dtype.type(factor)


def clip(arrays: Sequence[Any], limit: float) -> None:
    """Each array, all of one device, clipped to [-limit, limit], in place."""
    if arrays and is_array(arrays[0]):
        kernels("cuda").clip(arrays, limit)
    else:
        for array in arrays:
            np.clip(array, -limit, limit, out=array)


def constant(array: Any) -> Any:
    """A copy that is not to be written."""
    copy = array.copy()
    if not is_array(copy):
        copy.setflags(write=False)
    return copy


def cast(array: Any, like: Any) -> Any:
    """``array`` in the dtype of ``like``, another array; itself where it has it."""
    dtype = dtype_of(like)
    return array if dtype_of(array) == dtype else array.astype(dtype)


def picked(array: Any, where: Any) -> Any:
    """``array[where]``: a tuple of slices, or integers that pick rows of a matrix."""
    if is_array(array) and isinstance(where, np.ndarray):
        wide = array if array.dtype in ("float32", "float64") else array.astype("float32")
        return cast(kernels("cuda").embedding_forward(wide, where, None), array)
    return array[where]


def add_at(array: Any, where: Any, values: Any) -> None:
    """``array[where] += values``, where as above and without repetitions."""
    if not is_array(array):
        array[where] += values
    elif isinstance(where, np.ndarray):
        kernels("cuda").embedding_backward(where, cast(values, array), array, None)
    else:
        kernels("cuda").add(array[where], cast(values, array))


# The way in and out.


class Port:
    """How a call's arrays come to a layer's device, and its results go back to the caller."""

    __slots__ = ("_give", "_stream")

    def __init__(self, stream: int, give: Callable[[Any], Any]) -> None:
        self._stream = stream  # of the caller's library, which work for it goes on
        self._give = give

    def take(self, name: str, value: Any) -> Any:
        """``value`` as an array of the device, without a copy where it is on it; None stays None.

        Raises:
            TypeError, ValueError: ``value`` is no array that the device could have.
        """
        if value is None or is_array(value):
            return value
        if on_device(value):
            return _cuda().Array.import_(value, self._stream, name)
        return _upload(name, np.asarray(value))

    def give(self, array: Any) -> Any:
        """A result in the caller's kind of array; None stays None."""
        return None if array is None else self._give(array)

    def take_state(self, name: str, state: Any) -> Any:
        """``take`` for each array of a state."""
        if isinstance(state, (tuple, list)):
            return tuple(self.take(f"{name}[{i}]", value) for i, value in enumerate(state))
        return self.take(name, state)

    def give_state(self, state: Any) -> Any:
        """``give`` for each array of a state, nested or not."""
        if isinstance(state, tuple):
            return tuple(map(self.give_state, state))
        return self.give(state)


class _Home(Port):
    """For layers on the CPU: everything stays as it is."""

    __slots__ = ()

    def take(self, name: str, value: Any) -> Any:
        if is_array(value):
            raise TypeError(
                f"{name}: expected an array on the CPU, where the layer is, got a DeviceArray; "
                "move one of them: layer.to('cuda') or array.numpy()"
            )
        return value

    def take_state(self, name: str, state: Any) -> Any:
        if isinstance(state, (tuple, list)):
            for i, value in enumerate(state):
                self.take(f"{name}[{i}]", value)
        return self.take(name, state)

    def give(self, array: Any) -> Any:
        return array

    def give_state(self, state: Any) -> Any:
        return state


def _same(array: Any) -> Any:
    return array


def _to_numpy(array: Any) -> Any:
    return array.numpy()


_HOME = _Home(0, _same)
_OURS = Port(0, _same)
_NUMPY = Port(0, _to_numpy)


def port(device: str, x: Any) -> Port:
    """The port for a call of a layer on ``device`` with an input like ``x``.

    With None arrays come in, and the results are ours.
    """
    if device == "cpu":
        return _HOME
    if x is None or is_array(x):
        return _OURS
    if not on_device(x):
        return _NUMPY
    library = type(x).__module__.partition(".")[0]
    find = _LIBRARIES.get(library)
    return _OURS if find is None else Port(*find())


# A library's current stream, as DLPack numbers streams (0: it does not tell), and what makes its
# arrays of ours.


def _torch() -> tuple[int, Callable[[Any], Any]]:
    torch: Any = sys.modules["torch"]
    return torch.cuda.current_stream().cuda_stream or 1, torch.from_dlpack


def _cupy() -> tuple[int, Callable[[Any], Any]]:
    cupy: Any = sys.modules["cupy"]
    return cupy.cuda.get_current_stream().ptr or 1, cupy.from_dlpack


def _jax() -> tuple[int, Callable[[Any], Any]]:
    return 0, importlib.import_module("jax.dlpack").from_dlpack


_LIBRARIES: Mapping[str, Callable[[], tuple[int, Callable[[Any], Any]]]] = {
    "torch": _torch,
    "cupy": _cupy,
    "jax": _jax,
    "jaxlib": _jax,
}


def _upload(name: str, array: Any) -> Any:
    if array.dtype.kind == "u" or (array.dtype.kind == "i" and array.dtype.itemsize != 4):
        if array.size and array.max() > np.iinfo(np.int64).max:  # would turn negative
            raise ValueError(f"{name}: expected integers below 2**63, got {array.max()}")
        array = array.astype(np.int64, copy=False)
    return kernels("cuda").Array.from_numpy(array, name)


def _reduce(array: Any) -> tuple[Any, ...]:
    """Pickling: by way of the host."""
    return device_array, (array.numpy(), array.dtype)
