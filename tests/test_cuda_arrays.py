"""fastrnn.DeviceArray: memory, views, exchange with other libraries; on the emulated GPU."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
from typing import Any

import cuda_producers as producers
import fastrnn
import numpy as np
import pytest
from conftest import assert_same_bits
from fastrnn import _device

try:
    import fastrnn._cuda_emulated as cuda
except ModuleNotFoundError:
    if os.environ.get("CI"):  # where everything is built
        raise
    pytest.skip(
        "this build has no emulator: -DFASTRNN_CUDA_EMULATED=ON makes one", allow_module_level=True
    )
if os.environ["FASTRNN_CUDA"] != "emulated":
    pytest.skip("this process has another CUDA backend", allow_module_level=True)

DTYPES = ["float32", "float64", "float16", "int32", "int64", "bool"]


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    if dtype == "bool":
        return rng.random(shape) < 0.5
    scale = 1000 if dtype.startswith("int") else 1
    return (rng.standard_normal(shape) * scale).astype(dtype)


def used() -> int:
    """Bytes of the device's memory that are taken."""
    gc.collect()
    info = cuda.device_info()
    return int(info["memory"] - info["free_memory"])


# --- To the device and back ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4), (0,), (3, 0, 2)], ids=str)
def test_values_come_back(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> None:
    x = values(rng, shape, dtype)
    array = fastrnn.device_array(x)
    assert isinstance(array, fastrnn.DeviceArray) and not isinstance(x, fastrnn.DeviceArray)
    assert array.shape == shape and array.dtype == dtype and array.device == "cuda"
    assert (array.ndim, array.size, array.nbytes) == (x.ndim, x.size, x.nbytes)
    assert array.contiguous and array.writable and not array.is_view
    assert array.numpy().dtype == dtype and array.numpy().tobytes() == x.tobytes()
    assert np.asarray(array).dtype == dtype and np.array_equal(np.asarray(array), x)
    assert repr(array) == f"DeviceArray(shape={shape}, dtype={dtype})"


def test_any_memory_layout(rng: np.random.Generator) -> None:
    x = values(rng, (6, 5, 4))
    for form in (x[::2, 1:, ::-1], x.T, np.asfortranarray(x), x.astype(">f4"), x[1:1]):
        np.testing.assert_array_equal(fastrnn.device_array(form).numpy(), form)
    misaligned = np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    np.testing.assert_array_equal(fastrnn.device_array(misaligned).numpy(), x)
    assert fastrnn.device_array([[1.0, 2.0]]).dtype == "float64"
    assert fastrnn.device_array(3.5).shape == ()


def test_integers_become_int64_or_stay_int32() -> None:
    for kind in (np.int8, np.int16, np.uint8, np.uint16, np.uint32, np.uint64, np.int64):
        array = fastrnn.device_array(np.arange(5, dtype=kind))
        assert array.dtype == "int64" and array.numpy().tolist() == [0, 1, 2, 3, 4]
    assert fastrnn.device_array(np.arange(3, dtype=np.int32)).dtype == "int32"
    with pytest.raises(ValueError, match=r"^x: expected integers below 2\*\*63, got 18446744073"):
        fastrnn.device_array(np.array([2**64 - 1], np.uint64))
    for bad in (np.zeros(2, complex), np.array(["a"]), np.zeros(2, "M8[s]")):
        with pytest.raises(TypeError, match=r"^x: expected an array of float32, float64, "):
            fastrnn.device_array(bad)


def test_conversions(rng: np.random.Generator) -> None:
    x = np.float32([1.0, -2.5, 3.14159, 1e-8, 65504, 1e30, np.inf, np.nan])
    array = fastrnn.device_array(x)
    with np.errstate(over="ignore"):
        assert_same_bits(array.astype("float16").numpy(), x.astype(np.float16))
    assert_same_bits(array.astype("float64").numpy(), x.astype(np.float64))
    brain = fastrnn.device_array(x, dtype="bfloat16")
    assert brain.dtype == "bfloat16" and brain.nbytes == 16
    bits = x[:-1].view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert_same_bits(brain.numpy()[:-1], rounded)
    assert np.isnan(brain.numpy()[-1]) and brain.numpy().dtype == np.float32
    flags = fastrnn.device_array(np.array([0, 3, -1]), dtype="bool")
    assert flags.numpy().tolist() == [False, True, True]
    assert fastrnn.device_array(flags, dtype="int32").numpy().tolist() == [0, 1, 1]
    assert fastrnn.device_array(array) is array
    assert array.astype(np.dtype("float64")).dtype == "float64"
    for bad in ("float8", "complex64"):
        with pytest.raises(ValueError, match=r"^dtype: expected 'float32', "):
            array.astype(bad)


def test_array_protocol(rng: np.random.Generator) -> None:
    x = values(rng, (2, 3))
    array = fastrnn.device_array(x)
    assert np.array(array, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.add(array, 1), x + 1)
    with pytest.raises(ValueError, match=r"^copy: expected None or True"):
        array.__array__(copy=False)


# --- Views and assignment ------------------------------------------------------------------------


def test_slices_are_views(rng: np.random.Generator) -> None:
    x = values(rng, (6, 5, 4))
    array = fastrnn.device_array(x)
    for key in (
        slice(1, 4), slice(None), ..., slice(-2, None), slice(3, 3), (slice(1, 2), ...),
        (slice(None), slice(1, 3)), (slice(2, 5), slice(0, 4), slice(1, 2)), (),
    ):  # fmt: skip
        part = array[key]
        np.testing.assert_array_equal(part.numpy(), x[key])
        assert part.shape == x[key].shape
        assert part.contiguous == x[key].flags.c_contiguous
    part = array[1:3, 2:4]
    part[...] = 7
    x[1:3, 2:4] = 7
    np.testing.assert_array_equal(array.numpy(), x)
    assert part.is_view and len(part) == 2 and len(array) == 6
    for bad, error in (
        (0, TypeError), (slice(0, 4, 2), ValueError), (None, TypeError), ([0, 1], TypeError),
        ((slice(None),) * 4, IndexError), ((..., slice(1)), TypeError), (slice("a"), TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            array[bad]
    with pytest.raises(TypeError):
        list(array)
    with pytest.raises(TypeError):
        len(fastrnn.device_array(1.0))


def test_reshape(rng: np.random.Generator) -> None:
    x = values(rng, (4, 6))
    array = fastrnn.device_array(x)
    for shape in ((24,), (2, 12), (-1,), (3, -1, 2), (4, 6), (1, 4, 1, 6)):
        np.testing.assert_array_equal(array.reshape(shape).numpy(), x.reshape(shape))
        np.testing.assert_array_equal(array.reshape(*shape).numpy(), x.reshape(shape))
    assert fastrnn.device_array(1.0).reshape(1, 1).shape == (1, 1)
    assert fastrnn.device_array(np.zeros((0, 3))).reshape(-1, 3).shape == (0, 3)
    array.reshape(-1)[3:5] = 0
    x.reshape(-1)[3:5] = 0
    np.testing.assert_array_equal(array.numpy(), x)
    for bad in ((5, 5), (-1, 5), (25,)):
        with pytest.raises(ValueError, match=r"^reshape: expected a shape of 24 elements"):
            array.reshape(bad)
    with pytest.raises(ValueError, match=r"^reshape: expected a C-contiguous array"):
        array[:, 1:3].reshape(-1)
    with pytest.raises(ValueError, match=r"^shape: expected at most 8 dimensions"):
        array.reshape(4, 6, 1, 1, 1, 1, 1, 1, 1)


def test_assignment(rng: np.random.Generator) -> None:
    x = values(rng, (4, 6))
    array = fastrnn.device_array(x)
    other = values(rng, (4, 6))
    for key, value in (
        (..., other), (slice(0, 2), other[:2]), ((slice(None), slice(1, 3)), other[:, 1:3]),
        (..., 2.5), (slice(1, 2), -1), (..., other[0]), (..., other.astype(np.float64)),
        (..., [[1, 2, 3, 4, 5, 6]]), (slice(2, 2), 3.0), (..., np.float32(4)), (..., True),
    ):  # fmt: skip
        array[key] = value
        x[key] = value
        np.testing.assert_array_equal(array.numpy(), x)
    array[...] = fastrnn.device_array(other)
    np.testing.assert_array_equal(array.numpy(), other)
    array[...] = fastrnn.device_array(other.astype(np.float64))
    array[0:3] = array[1:4]  # overlapping: as if by way of a copy
    array[1:4] = array[0:3]
    want = other.copy()
    want[0:3] = want[1:4].copy()
    want[1:4] = want[0:3].copy()
    np.testing.assert_array_equal(array.numpy(), want)
    ids = fastrnn.device_array(np.arange(4))
    ids[1:3] = 9
    assert ids.numpy().tolist() == [0, 9, 9, 3]
    with pytest.raises(ValueError):
        array[...] = other[:3]
    with pytest.raises(ValueError, match=r"^value: expected shape \(4, 6\), got \(3, 6\)"):
        array[...] = fastrnn.device_array(other[:3])
    with pytest.raises((TypeError, ValueError)):
        array[...] = "text"
    x[...] = 1
    numpy_side = np.zeros((4, 6), np.float32)
    numpy_side[...] = array
    np.testing.assert_array_equal(numpy_side, want)


def test_copies_are_apart(rng: np.random.Generator) -> None:
    x = values(rng, (4, 3))
    array = fastrnn.device_array(x)
    for other in (array.copy(), copy.copy(array), copy.deepcopy(array), array[:, 1:].copy()):
        other[...] = 0
        assert other.contiguous and not other.is_view
    np.testing.assert_array_equal(array.numpy(), x)


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_pickling_goes_by_way_of_the_host(rng: np.random.Generator, dtype: str) -> None:
    array = fastrnn.device_array(values(rng, (3, 4)), dtype=dtype)
    again = pickle.loads(pickle.dumps(array[1:]))
    assert again.dtype == dtype and again.shape == (2, 4)
    np.testing.assert_array_equal(again.numpy(), array.numpy()[1:])


def test_the_class_is_not_a_constructor() -> None:
    with pytest.raises(TypeError, match=r"fastrnn\.device_array"):
        fastrnn.DeviceArray(np.zeros(3))


# --- Memory --------------------------------------------------------------------------------------


def test_memory_is_given_back(rng: np.random.Generator) -> None:
    before = used()
    array = fastrnn.device_array(values(rng, (100, 100)))
    part = array[3:4]
    assert used() >= before + 40000
    del array
    assert used() >= before + 40000  # the view keeps all of it
    np.testing.assert_array_equal(part.numpy().shape, (1, 100))
    del part
    assert used() == before
    for _ in range(50):
        a = fastrnn.device_array(values(rng, (10, 10)))
        a[1:3] = a[4:6]
        a.astype("bfloat16").copy().numpy()
        pickle.loads(pickle.dumps(a))
        del a
    assert used() == before


def test_absurd_sizes() -> None:
    with pytest.raises(MemoryError):
        cuda.Array.empty((2**62,), "float64")
    with pytest.raises(MemoryError):
        cuda.Array.empty((2**40, 2**40), "float32")
    with pytest.raises(MemoryError):
        cuda.Array.empty((2**40,), "float32")  # more than the device has
    with pytest.raises(ValueError, match="at least 0"):
        cuda.Array.empty((-1,), "float32")


# --- DLPack: import ------------------------------------------------------------------------------


def imported(x: Any, stream: int = 7) -> Any:
    return cuda.Array.import_(x, stream)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 7)])
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_dlpack_import(rng: np.random.Generator, dtype: str, version: Any) -> None:
    x = values(rng, (3, 4))
    memory = fastrnn.device_array(x, dtype=dtype)
    producer = producers.Producer(memory, version=version)
    array = imported(producer)
    assert array.shape == (3, 4) and array.dtype == dtype and array.contiguous and array.writable
    np.testing.assert_array_equal(array.numpy(), memory.numpy())
    assert producer.calls == [{"stream": 7, "max_version": (1, 0)}]
    suffix = "" if version is None else "_versioned"
    assert producers.capsule_name(producer.capsule) == "used_dltensor" + suffix
    memory[0:1] = 1  # the same memory
    np.testing.assert_array_equal(array.numpy()[0], np.ones(4))
    array[1:2] = 0
    np.testing.assert_array_equal(memory.numpy()[1], np.zeros(4))
    part = array[2:]
    del array
    gc.collect()
    assert producer.deleted == 0
    del part
    gc.collect()
    assert producer.deleted == 1
    producer.capsule = None
    gc.collect()
    assert producer.deleted == 1


def test_dlpack_import_from_before_version_1(rng: np.random.Generator) -> None:
    x = values(rng, (5,))
    producer = producers.Producer(fastrnn.device_array(x), version=None, understands=False)
    np.testing.assert_array_equal(imported(producer, 9).numpy(), x)
    assert producer.calls == [{"stream": 9}]


def test_dlpack_import_of_any_strides(rng: np.random.Generator) -> None:
    x = values(rng, (60,))
    memory = fastrnn.device_array(x)
    for shape, strides, offset in (
        ((3, 4), (20, 2), 8), ((4, 5), (1, 4), 0), ((60,), (-1,), 59 * 4), ((6, 7), (0, 1), 4),
        ((0, 3), (3, 1), 0), ((), (), 12), ((3, 1, 2), (2, 99, 1), 4),
    ):  # fmt: skip
        producer = producers.Producer(memory, shape=shape, strides=strides, byte_offset=offset)
        array = imported(producer)
        want = np.lib.stride_tricks.as_strided(x[offset // 4 :], shape, [4 * s for s in strides])
        np.testing.assert_array_equal(array.numpy(), want)
        np.testing.assert_array_equal(array.copy().numpy(), want)
        assert array.contiguous == want.flags.c_contiguous


def test_dlpack_import_read_only(rng: np.random.Generator) -> None:
    memory = fastrnn.device_array(values(rng, (3,)))
    array = imported(producers.Producer(memory, flags=producers.READ_ONLY))
    assert not array.writable and not array[1:].writable and array.copy().writable
    for write in (lambda: array.__setitem__(..., 0), lambda: array[1:].__setitem__(..., 0)):
        with pytest.raises(ValueError, match="read-only"):
            write()
    with pytest.raises(ValueError, match=r"^arrays: expected a writable array, got a read-only"):
        cuda.scale([array], 2.0)
    assert not imported(
        producers.Interface(memory, data=(producers.address(memory), True))
    ).writable


def test_dlpack_import_refuses(rng: np.random.Generator) -> None:
    memory = fastrnn.device_array(values(rng, (4,)))
    for device in ((1, 0), (2, 1), (10, 0), (3, 0)):
        producer = producers.Producer(memory, device=device)
        with pytest.raises(
            ValueError, match=rf"^x: .*device 0, got one on DLPack device \({device[0]}"
        ):
            imported(producer)
        assert producer.calls == []
    for dtype in ((2, 8), (5, 64), (1, 8), (0, 16), (3, 32)):
        producer = producers.Producer(memory, dtype=dtype)
        with pytest.raises(TypeError, match=r"^x: expected an array of float32, .* type code"):
            imported(producer)
        assert producer.deleted == 1
    producer = producers.Producer(memory, lanes=4)
    with pytest.raises(TypeError):
        imported(producer)
    assert producer.deleted == 1
    producer = producers.Producer(memory, version=(2, 0))
    with pytest.raises(BufferError, match=r"^x: expected DLPack version 1, got 2"):
        imported(producer)
    assert producer.deleted == 1
    producer = producers.Producer(memory, byte_offset=2)
    with pytest.raises(ValueError, match="aligned"):
        imported(producer)
    assert producer.deleted == 1
    producer = producers.Producer(memory, shape=(1,) * 9)
    with pytest.raises(ValueError, match="at most 8 dimensions"):
        imported(producer)
    assert producer.deleted == 1
    producer = producers.Producer(memory)
    array = imported(producer)
    used_up = producer.capsule

    class Again:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, **_: Any) -> Any:
            return used_up

    with pytest.raises(TypeError, match="a DLPack capsule that was not used yet"):
        imported(Again())
    assert array.shape == (4,) and producer.deleted == 0
    for other in ([1, 2], None, object()):
        with pytest.raises(TypeError, match=r"^x: expected an array on a CUDA device, got "):
            imported(other)
    with pytest.raises(
        ValueError, match=r"^x: expected an array on CUDA device 0, got one on DLPa"
    ):
        imported(np.zeros(3))


def test_a_producers_own_error_comes_through(rng: np.random.Generator) -> None:
    class Refuses(producers.Producer):
        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("requires grad")

    with pytest.raises(BufferError, match="requires grad"):
        imported(Refuses(fastrnn.device_array(values(rng, (2,)))))


# --- DLPack: export ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 9), (2, 0)])
def test_dlpack_export(rng: np.random.Generator, dtype: str, max_version: Any) -> None:
    before = used()
    array = fastrnn.device_array(values(rng, (5, 6)), dtype=dtype)[1:4, 2:]
    assert array.__dlpack_device__() == (2, 0)
    capsule = array.__dlpack__(stream=1, max_version=max_version)
    new = max_version is not None and max_version[0] >= 1
    assert producers.capsule_name(capsule) == ("dltensor_versioned" if new else "dltensor")
    managed = producers.content(capsule)
    tensor = managed.tensor
    assert (tensor.device_type, tensor.device_id, tensor.ndim) == (2, 0, 2)
    assert (tensor.code, tensor.bits, tensor.lanes) == (*producers.CODES[dtype], 1)
    assert tensor.shape[:2] == [3, 4] and tensor.strides[:2] == [6, 1]
    if new:
        assert (managed.major, managed.minor, managed.flags) == (1, 0, 0)
    # A consumer frees it when it is done, whether or not we are.
    del tensor
    managed = producers.consume(capsule)
    del array, capsule
    assert used() > before
    managed.deleter(ctypes.addressof(managed))
    assert used() == before


def test_a_capsule_that_nobody_takes(rng: np.random.Generator) -> None:
    before = used()
    capsules = [
        fastrnn.device_array(values(rng, (9,))).__dlpack__(stream=1, max_version=version)
        for version in (None, (1, 0))
    ]
    assert used() > before
    del capsules
    assert used() == before


def test_round_trips(rng: np.random.Generator) -> None:
    x = values(rng, (4, 5))
    array = fastrnn.device_array(x)

    class ByInterface:
        def __init__(self, inner: Any) -> None:
            self.__cuda_array_interface__ = inner.__cuda_array_interface__
            self.inner = inner

    class ByDlpack:
        def __init__(self, inner: Any) -> None:
            self.__dlpack__, self.__dlpack_device__ = inner.__dlpack__, inner.__dlpack_device__

    assert producers.address(imported(array)) == producers.address(array)
    for part, want in ((array, x), (array[1:3, 2:4], x[1:3, 2:4]), (array[:0], x[:0])):
        for wrap in (ByInterface, ByDlpack):
            again = imported(wrap(part))
            np.testing.assert_array_equal(again.numpy(), want)
            if want.size:
                assert producers.address(again) == producers.address(part)
    again = imported(ByDlpack(array))
    again[0:1] = 3
    assert array.numpy()[0].tolist() == [3] * 5


def test_dlpack_export_options(rng: np.random.Generator) -> None:
    array = fastrnn.device_array(values(rng, (3,)))
    for stream in (None, -1, 1, 2, 4096):
        array.__dlpack__(stream=stream)
    assert array.stream == 4096  # where the consumer goes on
    array.__dlpack__(stream=-1)
    assert array.stream == 4096
    for bad in (0, -2):
        with pytest.raises(ValueError, match=r"^stream: expected None, -1, 1, 2 or the address"):
            array.__dlpack__(stream=bad)
    assert array.__dlpack__(dl_device=(2, 0)) is not None
    for device in ((1, 0), (2, 1)):
        with pytest.raises(BufferError, match=r"^dl_device: expected None or \(2, 0\)"):
            array.__dlpack__(dl_device=device)
    capsule = array.__dlpack__(copy=True, max_version=(1, 0))
    managed = producers.content(capsule)
    assert managed.flags == producers.IS_COPIED
    assert managed.tensor.data != producers.address(array)
    assert producers.content(array.__dlpack__(copy=False)).tensor.data == producers.address(array)
    with pytest.raises((BufferError, TypeError, RuntimeError)):
        np.from_dlpack(array)
    frozen = imported(producers.Producer(array, flags=producers.READ_ONLY))
    with pytest.raises(BufferError, match=r"^max_version: expected \(1, 0\) or above"):
        frozen.__dlpack__(stream=1)
    assert producers.content(frozen.__dlpack__(stream=1, max_version=(1, 0))).flags == 1


# --- The CUDA array interface --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_interface(rng: np.random.Generator, dtype: str) -> None:
    x = values(rng, (4, 6), dtype)
    array = fastrnn.device_array(x)
    d = array.__cuda_array_interface__
    assert d["shape"] == (4, 6) and d["version"] == 3 and d["strides"] is None
    assert np.dtype(d["typestr"]) == dtype and d["data"] == (producers.address(array), False)
    assert d["stream"] == array.stream != 0
    part = array[1:3, 2:5]
    d = part.__cuda_array_interface__
    size = x.itemsize
    assert d["strides"] == (6 * size, size)
    assert d["data"][0] == producers.address(array) + 8 * size
    assert array[:0].__cuda_array_interface__["data"][0] == 0
    np.testing.assert_array_equal(imported(producers.Interface(part)).numpy(), x[1:3, 2:5])


def test_interface_has_no_bfloat16(rng: np.random.Generator) -> None:
    array = fastrnn.device_array(values(rng, (2,)), dtype="bfloat16")
    assert not hasattr(array, "__cuda_array_interface__")


def test_interface_import(rng: np.random.Generator) -> None:
    x = values(rng, (4, 6))
    memory = fastrnn.device_array(x)
    before = used()
    transposed = producers.Interface(memory, shape=(6, 4), strides=(4, 24))
    np.testing.assert_array_equal(imported(transposed).numpy(), x.T)
    for old in ({"version": 2, "stream": ...}, {"strides": ...}, {"stream": None}, {"stream": 2}):
        array = imported(producers.Interface(memory, **old), 5)
        assert array.stream == 5
        np.testing.assert_array_equal(array.numpy(), x)
    keeper = producers.Interface(memory)
    array = imported(keeper)
    del keeper, memory
    np.testing.assert_array_equal(array.numpy(), x)  # its owner is kept alive
    del array, transposed
    assert used() == before - x.nbytes


def test_interface_import_refuses(rng: np.random.Generator) -> None:
    memory = fastrnn.device_array(values(rng, (4,)))
    address = producers.address(memory)
    for error, match, changes in (
        (TypeError, "typestr >f4", {"typestr": ">f4"}),
        (TypeError, "typestr <c8", {"typestr": "<c8"}),
        (ValueError, "without a mask", {"mask": np.zeros(4, bool)}),
        (ValueError, "aligned", {"data": (address + 2, False), "shape": (3,)}),
        (ValueError, "as many strides", {"strides": (4, 4)}),
        (ValueError, "multiples of the element", {"strides": (6,)}),
        (ValueError, "stream 0", {"stream": 0}),
    ):
        with pytest.raises(error, match=rf"^x: expected .*{match}"):
            imported(producers.Interface(memory, **changes))


# --- Streams -------------------------------------------------------------------------------------


def test_memory_goes_from_stream_to_stream(rng: np.random.Generator) -> None:
    a, b = (fastrnn.device_array(values(rng, (5,))) for _ in range(2))
    own = a.stream
    assert own not in (0, 1, 2) and own == b.stream
    b.__dlpack__(stream=77)
    assert b.stream == 77 and b[1:].stream == 77
    a[...] = b  # work goes on where the written array is
    assert a.stream == own and b.stream == own
    b.__dlpack__(stream=78)
    assert cuda.dropout(b, 0.5, 1, None).stream == 78
    assert imported(producers.Producer(a), 79).stream == 79


def test_ids_that_came_from_the_host_are_known_there(rng: np.random.Generator) -> None:
    """They are checked without waiting for the device, but only while nobody can change them."""
    table = fastrnn.device_array(values(rng, (5, 3)))
    for change in (
        lambda ids: ids.__setitem__(slice(0, 1), 7),
        lambda ids: imported(producers.Producer(ids)).__setitem__(slice(0, 1), 7),
        lambda ids: imported(producers.Interface(ids)).__setitem__(slice(0, 1), 7),
        lambda ids: ids[0:1].__setitem__(..., 7),
        lambda ids: ids.reshape(2, 2).__setitem__(slice(0, 1), fastrnn.device_array([[7, 7]])),
    ):
        ids = fastrnn.device_array(np.array([0, 1, 2, 4]))
        assert cuda.embedding_forward(table, ids, None).shape == (4, 3)
        change(ids)
        assert ids.numpy()[0] == 7
        with pytest.raises(ValueError, match=r"^x: expected integers in \[0, 5\), got 7"):
            cuda.embedding_forward(table, ids, None)


def test_finding_out_where_an_array_is(rng: np.random.Generator) -> None:
    array = fastrnn.device_array(values(rng, (2,)))
    for there in (array, producers.Producer(array), producers.Interface(array)):
        assert _device.on_device(there)
    for here in (np.zeros(2), [1.0], 3, None, producers.Producer(array, device=(1, 0))):
        assert not _device.on_device(here)
