"""Other libraries' device arrays: producers whose every detail a test can choose.

By DLPack or by the CUDA array interface; the memory is that of a DeviceArray.
"""

from __future__ import annotations

import ctypes
from typing import Any

# DLPack's structures (dlpack.h).


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


READ_ONLY, IS_COPIED = 1, 2
CODES = {
    "float32": (2, 32),
    "float64": (2, 64),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "bool": (6, 8),
}

_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_api.PyCapsule_GetName.restype = ctypes.c_char_p
_api.PyCapsule_GetName.argtypes = (ctypes.py_object,)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)

_NAMES = [b"dltensor", b"dltensor_versioned", b"used_dltensor", b"used_dltensor_versioned"]


def capsule_name(capsule: Any) -> str:
    return _api.PyCapsule_GetName(capsule).decode()


def content(capsule: Any) -> Any:
    """What a capsule holds: Managed or Versioned."""
    name = _api.PyCapsule_GetName(capsule)
    kind = Versioned if b"versioned" in name else Managed
    return kind.from_address(_api.PyCapsule_GetPointer(capsule, name))


def consume(capsule: Any) -> Any:
    """Takes the content over, as a library does that imports it: its deleter is ours to call."""
    managed = content(capsule)
    name = _api.PyCapsule_GetName(capsule)
    _api.PyCapsule_SetName(capsule, _NAMES[_NAMES.index(name) + 2])  # a name that stays alive
    return managed


class Producer:
    """An object with ``__dlpack__``.

    Args:
        memory: A DeviceArray, where the elements are.
        shape: Of the array that is offered, by default that of ``memory``.
        strides: In elements; None is passed on as no strides.
        version: None for DLPack before 1.0.
        understands: Whether ``__dlpack__`` has the argument max_version.
    """

    def __init__(
        self,
        memory: Any,
        *,
        shape: tuple[int, ...] | None = None,
        strides: tuple[int, ...] | None = None,
        dtype: tuple[int, int] | None = None,
        lanes: int = 1,
        byte_offset: int = 0,
        device: tuple[int, int] = (2, 0),
        version: tuple[int, int] | None = (1, 0),
        flags: int = 0,
        understands: bool = True,
    ) -> None:
        self.memory = memory
        self.device = device
        self.version = version
        self.understands = understands
        self.calls: list[dict[str, Any]] = []
        self.deleted = 0
        self.capsule: Any = None
        shape = memory.shape if shape is None else shape
        count = max(len(shape), 1)
        self._shape = (ctypes.c_int64 * count)(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * count)(*strides)
        code, bits = dtype or CODES[memory.dtype]
        tensor = Tensor(
            address(memory),
            *device,
            len(shape),
            code,
            bits,
            lanes,
            self._shape,
            ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64)),
            byte_offset,
        )
        self._deleter = DELETER(self._delete)
        if version is None:
            self.managed: Any = Managed(tensor, None, self._deleter)
        else:
            self.managed = Versioned(*version, None, self._deleter, flags, tensor)

    def _delete(self, managed: int) -> None:
        assert managed == ctypes.addressof(self.managed)
        self.deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        if not self.understands and "max_version" in options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.calls.append(options)
        name = _NAMES[0 if self.version is None else 1]
        self.capsule = _api.PyCapsule_New(ctypes.addressof(self.managed), name, None)
        return self.capsule


def address(array: Any) -> int:
    """Where a DeviceArray's elements begin."""
    managed = content(array.__dlpack__(stream=-1, max_version=(1, 0)))
    return (managed.tensor.data or 0) + managed.tensor.byte_offset


class Capsule:
    """An object whose ``__dlpack__`` is a capsule that is there already."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule


class Interface:
    """An object with ``__cuda_array_interface__`` and nothing else; it keeps ``memory`` alive."""

    def __init__(self, memory: Any, **changes: Any) -> None:
        self.memory = memory
        self.interface = {**memory.__cuda_array_interface__, **changes}

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {key: value for key, value in self.interface.items() if value is not ...}
