"""Parameters in one flat buffer, and what every module does with them.

A layer's parameters are views, in order, of one 1-D array, and so are its gradients; a model of
several layers moves ("re-homes") them into one larger array. An optimiser step is then a single
pass over four arrays, whatever the model, and saving is a dump of the views. The arrays are NumPy's
or, for modules on a CUDA device, ``fastrnn.DeviceArray``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from fastrnn import _check, _device

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
StateT = TypeVar("StateT")
ModuleT = TypeVar("ModuleT", bound="Module")

__all__ = [
    "Array",
    "Gradients",
    "Module",
    "Params",
    "Shapes",
    "accumulators",
    "allocate",
    "flat_view",
    "place",
    "rebind",
    "shapes_of",
    "views",
]


@dataclass(frozen=True)
class Gradients(Generic[StateT]):
    """What a backward pass returns.

    Attributes:
        x: Gradient of the input, in the input's shape; None where the input was integers.
        state: Gradient of the initial state, in the state's form (``h``, or ``(h, c)`` for LSTM; a
            tuple with one entry per module for ``nn.Sequential``; None for modules without state).
            Always there for recurrent layers, even where the initial state was the default zeros.
        params: Gradients by parameter name, in the parameters' order: views of one flat buffer, or
            the dict that was given as ``into``.
    """

    x: Array | None
    state: StateT
    params: dict[str, Array]


def views(flat: Array, shapes: Shapes) -> dict[str, Array]:
    """Consecutive views of ``flat`` (1-D, exactly as many elements as ``shapes``) by name."""
    out: dict[str, Array] = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + _count(shape)
        out[name] = flat[start:stop].reshape(shape)
        start = stop
    if start != flat.size:
        raise ValueError(f"flat: expected {start} elements, got {flat.size}")
    return out


def allocate(
    shapes: Shapes, dtype: npt.DTypeLike, device: str = "cpu", *, fresh: bool = False
) -> tuple[Array, dict[str, Array]]:
    """One zeroed 1-D buffer for all ``shapes`` in order, and the views of it by name.

    With ``fresh``, on the CPU, it holds anything: whoever gets it writes all of it.

    Raises:
        MemoryError: There is no room for them, or more bytes than an address has bits for.
    """
    size, dtype = sum(_count(shape) for shape in shapes.values()), np.dtype(dtype)
    if size * dtype.itemsize > sys.maxsize:  # NumPy would speak of a dimension, with ValueError
        raise MemoryError(f"parameters: expected at most {sys.maxsize} bytes, got {size} × {dtype}")
    flat: Array = np.empty(size, dtype) if fresh else _device.zeros(size, dtype, device)
    return flat, views(flat, shapes)


def shapes_of(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shapes of ``arrays``, by name and in order."""
    return {name: array.shape for name, array in arrays.items()}


def flat_view(arrays: Mapping[str, Array]) -> Array | None:
    """The 1-D array that ``arrays`` divide among themselves, or None.

    Not None exactly where the arrays are C-contiguous, of one dtype, follow each other in memory in
    the dict's order and belong to one owner: then the result is a view that holds them all and
    nothing else.
    """
    items = list(arrays.values())
    if not items:
        return None
    if any(map(_device.is_array, items)):
        on_device: Array | None = _device.joined(items)
        return on_device
    dtype = items[0].dtype
    owner = _owner(items[0])
    expected = start = _address(items[0])
    for array in items:
        if (
            array.dtype != dtype
            or not array.flags.c_contiguous
            or not array.flags.aligned
            or _owner(array) is not owner
            or (array.size and _address(array) != expected)
        ):
            return None
        expected += array.nbytes
    if len(items) == 1:
        return items[0].reshape(-1)
    if owner.dtype != dtype or not owner.flags.c_contiguous:
        return None
    offset, misfit = divmod(start - _address(owner), dtype.itemsize)
    size = (expected - start) // dtype.itemsize
    if misfit or offset < 0 or offset + size > owner.size:
        return None
    return owner.reshape(-1)[offset : offset + size]


def place(params: dict[str, Array], flat: Array) -> None:
    """Makes each of ``params``, in order, its view of ``flat``, whatever values that has."""
    for name, view in views(flat, shapes_of(params)).items():
        dict.__setitem__(params, name, view)


def rebind(params: dict[str, Array], flat: Array) -> None:
    """Copies ``params``, in order, into ``flat`` and makes each entry its view of ``flat``."""
    old = dict(params)
    place(params, flat)
    for name, array in old.items():
        params[name][...] = array


def accumulators(
    shapes: Shapes, dtype: np.dtype[Any], into: Any, device: str = "cpu", *, fresh: bool = False
) -> dict[str, Array]:
    """Where a backward pass adds its gradients: ``into``, once found fit, or new zeros.

    With ``fresh`` and no ``into`` the arrays hold anything, for a pass that writes all of them.

    Raises:
        TypeError: ``into`` is not a dict of arrays of ``dtype`` on ``device``.
        ValueError: a name is missing or unknown, a shape differs, or an array cannot be written in
            place.
    """
    if into is None:
        return allocate(shapes, dtype, device, fresh=fresh)[1]
    if not isinstance(into, dict):
        raise TypeError(f"into: expected a dict of arrays, got {type(into).__name__}")
    _same_names("into", shapes, into)
    for name, shape in shapes.items():
        array = into[name]
        ours = isinstance(array, np.ndarray) if device == "cpu" else _device.is_array(array)
        if not ours or array.dtype != dtype:
            got = array.dtype if ours else type(array).__name__
            kind = "an array" if device == "cpu" else "a DeviceArray"
            raise TypeError(f"into[{name!r}]: expected {kind} of {dtype}, got {got}")
        if array.shape != tuple(shape):
            raise ValueError(f"into[{name!r}]: expected shape {tuple(shape)}, got {array.shape}")
        if _device.read_only(array) or not _device.in_place(array):
            raise ValueError(
                f"into[{name!r}]: expected a writable C-contiguous array, got one that is "
                + ("read-only" if _device.read_only(array) else "strided or misaligned")
            )
    arrays: dict[str, Array] = into
    return arrays


class Params(dict[str, Array]):
    """A module's parameters by name; assigning to a name writes into the live array.

    ``params["weight"][:, 0] = 0`` and ``params["weight"] = w`` both change the module; the second
    checks the shape and dtype first.
    """

    def __setitem__(self, name: str, value: npt.ArrayLike) -> None:
        if name not in self:
            raise KeyError(f"params: expected one of {list(self)}, got {name!r}")
        target = self[name]
        source: Any = value if _device.is_array(value) else np.asarray(value)
        if source is target:  # what `params[name] *= 2` ends with
            return
        if source.shape != target.shape:
            raise ValueError(f"params[{name!r}]: expected shape {target.shape}, got {source.shape}")
        _device.assign(f"params[{name!r}]", target, source)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> Params:  # type: ignore[override,misc]
        self.update(other)
        return self

    def _fixed(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("params: the names of a module's parameters are fixed")

    __delitem__ = clear = pop = popitem = setdefault = _fixed

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class Module:
    """Parameters in a flat buffer: the base of every layer and model.

    Attributes:
        params: ``Params``, names to live, writable arrays.
        flat: 1-D array that holds all of them, in order.
    """

    params: Params
    flat: Array

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``: where the parameters are, and results are computed."""
        return _device.device_of(self.flat)

    def to(self: ModuleT, device: str) -> ModuleT:
        """Moves the parameters to ``"cpu"`` or ``"cuda"``, in place, and returns the module.

        Gradients, tapes and optimisers stay as they are; an optimiser's moments follow at its next
        step.

        Raises:
            RuntimeError: There is no CUDA device to be had; the message says why.
            TypeError, ValueError: Another device; or the module is part of a Sequential, which
                moves as a whole.
        """
        name = _check.choice("device", device, _device.DEVICES)
        _device.kernels(name)
        if name != self.device:
            if _device.is_view(self.flat):
                raise ValueError("to: expected a module of its own, got a part of a Sequential")
            self._place(_device.move(self.flat, name))
        return self

    def _place(self, flat: Array) -> None:
        """Lets the parameters be views of ``flat``, which has their values."""
        place(self.params, flat)
        self.flat = flat

    def _allocate(self, shapes: Shapes, dtype: npt.DTypeLike) -> None:
        """Gives the module zeroed parameters."""
        flat, params = allocate(shapes, dtype)
        self.flat, self.params = flat, Params(params)

    def _bind(self, flat: Array) -> None:
        """Moves the parameters, values included, into ``flat`` (1-D, this dtype and size)."""
        if flat.ndim != 1 or flat.dtype != self.flat.dtype or not _device.contiguous(flat):
            raise ValueError(
                f"flat: expected 1-D {self.flat.dtype}, got {flat.ndim}-D {flat.dtype}"
            )
        rebind(self.params, flat)
        self.flat = flat

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values, for saving."""
        raise NotImplementedError(f"{type(self).__name__} has no config()")

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters by name, on the CPU."""
        return {name: _device.move(array, "cpu") for name, array in self.params.items()}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Copies ``state``'s arrays into the parameters; all of them or, on an error, none.

        Raises:
            TypeError: not a mapping, or an array is not of a floating dtype.
            ValueError: missing, unknown or wrongly shaped entries; the message lists them all.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of arrays, got {type(state).__name__}")
        arrays = {name: np.asarray(value) for name, value in state.items()}
        problems = [f"missing {name!r}" for name in self.params if name not in arrays]
        problems += [f"unknown {name!r}" for name in arrays if name not in self.params]
        for name, target in self.params.items():
            source = arrays.get(name)
            if source is None:
                continue
            if source.dtype.kind != "f":
                raise TypeError(f"state[{name!r}]: expected {target.dtype}, got {source.dtype}")
            if source.shape != target.shape:
                problems.append(f"{name!r} of shape {source.shape} instead of {target.shape}")
        if problems:
            raise ValueError(
                f"state: expected the parameters of this module, got: {', '.join(problems)}"
            )
        for name, target in self.params.items():
            target[...] = arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if "params" in state:  # the views are made anew from the buffer, which keeps them views
            state["params"] = shapes_of(self.params)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "params" in state:
            self.flat = self.flat.copy()  # aligned, owned, and not shared by copy.copy
            self.params = Params(views(self.flat, state["params"]))


def _count(shape: Iterable[int]) -> int:
    total = 1  # Python integers: no wrap-around before NumPy gets to refuse the size
    for extent in shape:
        total *= int(extent)
    return total


def _owner(array: Array) -> Array:
    return array.base if isinstance(array.base, np.ndarray) else array


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _same_names(what: str, expected: Iterable[str], got: Iterable[str]) -> None:
    """ValueError that lists every missing and every unknown name."""
    expected, got = list(expected), list(got)
    problems = [f"missing {name!r}" for name in expected if name not in got]
    problems += [f"unknown {name!r}" for name in got if name not in expected]
    if problems:
        raise ValueError(f"{what}: expected the names {expected}, got: {', '.join(problems)}")
