"""Layers and models as safetensors files.

A file holds the parameters under PyTorch's names and, in its metadata under ``fastrnn``, a JSON
text with the version of the format and of the library and the configuration that rebuilds the
object::

    {"format": 1, "version": "0.1.0", "model": {"class": "LSTM", "input_size": 8, ...}}

Reading trusts nothing. The header is checked here, where the tensor can be named, and once more by
the safetensors library, which looks after overlaps and gaps; the tensors are compared with what the
configuration asks for before the model is made; and class names are looked up in ``CLASSES``.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from fastrnn import _layers, nn
from fastrnn._params import Module
from fastrnn.io.atomic import atomic_write

__all__ = ["load", "read_metadata", "read_tensors", "save", "write_tensors"]

Array = npt.NDArray[Any]
Shapes = dict[str, tuple[int, ...]]
PathLike = str | os.PathLike[str]

FORMAT = 1
KEY = "fastrnn"
MAX_HEADER = 100_000_000  # bytes; the format's own limit

# Every dtype that both NumPy and the format have.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

# The classes a file may name. Nothing else is ever looked up, imported or evaluated.
CLASSES: dict[str, Callable[..., Module]] = {
    "RNN": _layers.RNN,
    "LSTM": _layers.LSTM,
    "GRU": _layers.GRU,
    "Linear": nn.Linear,
    "Embedding": nn.Embedding,
    "Dropout": nn.Dropout,
}
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def save(path: PathLike, model: Module, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a layer or model, wholly or not at all.

    Args:
        path: The file; an existing one is replaced once the new one is complete on disk.
        model: ``RNN``, ``LSTM``, ``GRU``, ``nn.Linear``, ``nn.Embedding``, ``nn.Dropout`` or an
            ``nn.Sequential`` of these.
        metadata: Texts of your own to keep in the file, see ``fastrnn.io.read_metadata``. The name
            ``"fastrnn"`` is taken.

    Raises:
        TypeError: ``model`` is nothing that ``load`` could rebuild, or ``metadata`` is not a
            mapping of str to str.
        ValueError: ``metadata`` has the name ``"fastrnn"``.
        OSError: the file cannot be written; an existing one is left as it was.
    """
    if metadata is not None and KEY in metadata:
        raise ValueError(f"metadata: expected names other than {KEY!r}, got {KEY!r}")
    from fastrnn import __version__

    description = {"format": FORMAT, "version": __version__, "model": _describe(model)}
    notes = {KEY: json.dumps(description), **(metadata or {})}
    write_tensors(path, model.state_dict(), notes)


def load(path: PathLike) -> Any:
    """Reads what ``save`` wrote and returns the layer or model, on the CPU.

    Raises:
        ValueError: the file is damaged, was not written by ``fastrnn.save``, or its tensors are not
            those of its configuration; the message names the file and every tensor concerned.
        OSError: the file cannot be read.
    """
    tensors, metadata = read_tensors(path)
    if KEY not in metadata:
        raise ValueError(f"{path}: expected a model that fastrnn.save wrote, got other tensors")
    try:
        description = json.loads(metadata[KEY])
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}, which this version of fastrnn reads")
        config = description.get("model")
        shapes, dtypes = _expected(config)
        _compare(tensors, shapes, dtypes)
        model = _build(config)
        model.load_state_dict(tensors)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: not a usable fastrnn model: {error}") from error
    return model


def write_tensors(
    path: PathLike, tensors: Mapping[str, Array], metadata: Mapping[Any, Any]
) -> None:
    """Writes arrays and texts as a safetensors file, wholly or not at all.

    Raises:
        TypeError: an entry of ``metadata`` is not a str, or a dtype is none of the format's.
        OSError: as ``atomic_write``.
    """
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"metadata: expected str to str, got {name!r}: {type(text).__name__}")
    # Not ascontiguousarray, which makes a 0-d array 1-d.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.newbyteorder("<") not in DTYPES.values():
            raise TypeError(f"{name}: expected numbers or booleans, got {array.dtype}")
    atomic_write(path, safetensors.numpy.save(arrays, dict(metadata)))


def read_tensors(path: PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and texts of any safetensors file; the arrays are writable and in native byte order.

    Raises:
        ValueError: the file is damaged; the message names the file and, where there is one, the
            tensor.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        header = _header(path, file.read, os.fstat(file.fileno()).st_size)
        file.seek(0)
        content = file.read()
    try:
        raw: Any = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    tensors = {}
    for name, entry in raw:
        dtype = DTYPES[entry["dtype"]]
        array = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        tensors[name] = array.astype(dtype.newbyteorder("="))
    return tensors, header.get("__metadata__", {})


def read_metadata(path: PathLike) -> dict[str, str]:
    """The texts kept in a safetensors file, without reading its tensors. Raises as ``load``."""
    with open(path, "rb") as file:
        header = _header(path, file.read, os.fstat(file.fileno()).st_size)
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata


def _header(path: PathLike, read: Callable[[int], bytes], size: int) -> dict[str, Any]:
    """The file's checked header.

    A safetensors file is the header's length (8 bytes, little-endian), the header (JSON), and the
    tensors' bytes, in the order and at the offsets that the header says.
    """

    def bad(what: str) -> ValueError:
        return ValueError(f"{path}: not a safetensors file: {what}")

    prefix = read(8)
    if len(prefix) < 8:
        raise bad(f"{size} bytes are too few for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER or length > size - 8:
        raise bad(f"a header of {length} bytes does not fit a file of {size} bytes")
    try:
        header = json.loads(read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise bad(f"its header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("its metadata are not texts")
    for name, entry in header.items():
        if name != "__metadata__":
            problem = _problem(entry, size - 8 - length)
            if problem:
                raise bad(f"tensor {name!r} {problem}")
    return header


def _problem(entry: Any, available: int) -> str | None:
    """What is wrong with one tensor's entry in the header, if anything."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        return "has no dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has dtype {dtype!r}, which NumPy lacks"
    if not _sizes(shape) or len(shape) > 32:
        return f"has shape {shape!r}"
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        return f"has data_offsets {offsets!r}, the file has {available} bytes of data"
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != offsets[1] - offsets[0]:
        return f"has {offsets[1] - offsets[0]} bytes, its shape {shape} and {dtype} need {needed}"
    return None


def _sizes(value: Any) -> bool:
    """Whether ``value`` is a list of non-negative integers."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; ValueError where a name occurs twice, which JSON lets pass."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} occurs twice")
        result[name] = value
    return result


# Configurations: {"class": name, **constructor's arguments}, Sequential's are {"class":
# "Sequential", "modules": [...]}.


def _describe(model: Any) -> dict[str, Any]:
    """The configuration of ``model``, from which ``_build`` makes its like."""
    cls: Any = type(model)  # itself: a subclass may compute something else
    if cls is nn.Sequential:
        return {"class": "Sequential", "modules": [_describe(part) for part in model.modules]}
    name = cls.__name__
    if CLASSES.get(name) is not cls:
        expected = ", ".join(CLASSES)
        raise TypeError(f"model: expected a Sequential, {expected}, got {name}")
    return {"class": name, **model.config()}


def _build(config: Any) -> Module:
    """The layer or model of a configuration; its initial values are about to be replaced."""
    name = config["class"]
    if name == "Sequential":
        return nn.Sequential(*(_build(part) for part in config["modules"]))
    options = {key: value for key, value in config.items() if key != "class"}
    if name in GATES:
        options["device"] = "cpu"  # where it was trained says nothing about where it is read
    return CLASSES[name](**options)


def _expected(config: Any, prefix: str = "") -> tuple[Shapes, dict[str, str]]:
    """Shapes and dtypes of the tensors that a configuration asks for, by name.

    Computed from the numbers alone: a file of a few bytes may claim a layer of a terabyte.
    """
    if not isinstance(config, dict) or not isinstance(config.get("class"), str):
        raise ValueError("its configuration names no class")
    name = config["class"]
    if name == "Sequential":
        modules = config.get("modules")
        if prefix or not isinstance(modules, list):
            raise ValueError("its configuration of Sequential is not a list of modules")
        shapes: Shapes = {}
        dtypes: dict[str, str] = {}
        for index, part in enumerate(modules):
            part_shapes, part_dtypes = _expected(part, f"{index}.")
            shapes |= part_shapes
            dtypes |= part_dtypes
        return shapes, dtypes
    if name not in CLASSES:
        raise ValueError(f"its configuration names {name!r}, which is not one of {list(CLASSES)}")
    shapes = {prefix + key: shape for key, shape in _shapes(name, config).items()}
    dtype = config.get("dtype", "float32")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"its configuration has dtype {dtype!r}")
    return shapes, dict.fromkeys(shapes, str(dtype))


def _shapes(name: str, config: dict[str, Any]) -> Shapes:
    """One layer's parameters in PyTorch's names and shapes."""

    def size(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise ValueError(f"its configuration of {name} has {key} {value!r}")
        return value

    bias = config.get("bias", True)
    if name == "Dropout":
        return {}
    if name == "Embedding":
        return {"weight": (size("num_embeddings"), size("embedding_dim"))}
    if name == "Linear":
        weight = {"weight": (size("out_features"), size("in_features"))}
        return weight | ({"bias": (size("out_features"),)} if bias else {})
    I, H, L = size("input_size"), size("hidden_size"), size("num_layers")
    if L > 10_000:
        raise ValueError(f"its configuration of {name} has {L} layers")
    rows, ends = GATES[name] * H, ("", "_reverse") if config.get("bidirectional") else ("",)
    shapes: Shapes = {}
    for layer in range(L):
        inputs = I if layer == 0 else len(ends) * H
        for end in ends:
            suffix = f"_l{layer}{end}"
            shapes |= {f"weight_ih{suffix}": (rows, inputs), f"weight_hh{suffix}": (rows, H)}
            if bias:
                shapes |= {f"bias_ih{suffix}": (rows,), f"bias_hh{suffix}": (rows,)}
    return shapes


def _compare(tensors: Mapping[str, Array], shapes: Shapes, dtypes: Mapping[str, str]) -> None:
    """ValueError that lists everything missing, extra or different at once."""
    problems = [f"missing {name!r}" for name in shapes if name not in tensors]
    problems += [f"unknown {name!r}" for name in tensors if name not in shapes]
    for name, shape in shapes.items():
        array = tensors.get(name)
        if array is not None and (array.shape != shape or array.dtype != dtypes[name]):
            problems.append(
                f"{name!r} is {array.dtype} {array.shape} instead of {dtypes[name]} {shape}"
            )
    if problems:
        shown = problems[:50] + ([f"and {len(problems) - 50} more"] if len(problems) > 50 else [])
        raise ValueError("; ".join(shown))
