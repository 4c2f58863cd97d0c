"""Modules one after the other: one model, one parameter buffer, one tape."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrnn import _check, _device, _ragged
from fastrnn._frozen import Exclusive
from fastrnn._params import (
    Array,
    Gradients,
    Module,
    Params,
    accumulators,
    allocate,
    shapes_of,
    views,
)
from fastrnn.nn._stateless import Once, Stateless
from fastrnn.nn.embedding import Embedding
from fastrnn.nn.linear import Linear

__all__ = ["FrozenSequential", "Sequential", "SequentialStream", "SequentialTape"]

State = tuple[Any, ...]  # one entry per module: its state, or None for a stateless one


class Sequential(Module):
    """Feeds each module's output to the next: recurrent layers and modules without state.

    The parameters are named ``"0.weight_ih_l0"``, ``"1.weight"``, …, and live in one buffer
    (``flat``); making a Sequential moves its modules' parameters there, where ``module.params`` of
    each remains a live view of them. The state is a tuple with one entry per module, None for those
    without state.

    ``to("cuda")`` moves the whole model. Between its modules everything stays on the device; the
    results of a call come back as the input came: NumPy arrays for a NumPy array.

    Args:
        *modules: At least one, none of them twice or in another Sequential; of one dtype and on one
            device, and the recurrent ones of one ``batch_first``.

    Raises:
        TypeError: a module is none.
        ValueError: no modules, or modules that do not go together.
    """

    def __init__(self, *modules: Any) -> None:
        if not modules:
            raise ValueError("modules: expected at least one, got none")
        for i, module in enumerate(modules):
            if not isinstance(module, Module) or isinstance(module, Sequential):
                got = type(module).__name__
                raise TypeError(f"modules[{i}]: expected a layer or stateless module, got {got}")
            if any(module is other for other in modules[:i]):
                raise ValueError(f"modules[{i}]: expected each module once, got one again")
            if _device.is_view(module.flat):
                raise ValueError(f"modules[{i}]: expected a free module, got one in a Sequential")
        _common(modules, "device")
        _common(modules, "dtype")
        _common(modules, "batch_first")
        _check_chain(modules)
        self.modules: tuple[Any, ...] = modules
        self._recurrent = _recurrent(modules)
        self._gather()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The parameters' dtype."""
        return np.dtype(self.flat.dtype)

    def config(self) -> dict[str, Any]:
        """``{"modules": [{"class": name, **its config}, …]}``."""
        return {"modules": [{"class": type(m).__name__, **m.config()} for m in self.modules]}

    def __call__(
        self,
        x: Any,
        state: State | None = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        threads: int | None = None,
    ) -> tuple[Array, State]:
        """Inference: (y, state), nothing saved.

        Args:
            x: What the first module takes.
            state: A tuple with one entry per module, as returned; None: all zeros.
            lengths: For every recurrent layer; see ``fastrnn.LSTM``.
            reset: For every recurrent layer; see ``fastrnn.LSTM``.
            threads: Threads to use; None is the default. The results do not depend on it.
        """
        return _apply(self.device, self.modules, self._recurrent, x, state, lengths, reset, threads)

    def forward(
        self,
        x: Any,
        state: State | None = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        threads: int | None = None,
    ) -> tuple[Array, State, SequentialTape]:
        """Training: (y, state, tape). Arguments as for a call."""
        port, x, states = _enter(self.device, self._recurrent, x, state)
        out: list[Any] = []
        tapes: list[Any] = []
        for i, module in enumerate(self.modules):
            if self._recurrent[i]:
                x, new, tape = module.forward(
                    x, states[i], lengths=lengths, reset=reset, threads=threads
                )
            else:
                # From the second module on x is known here only, so no copy of it is needed.
                new = None
                x, tape = module._forward(x, threads=threads, owned=i > 0)
            out.append(new)
            tapes.append(tape)
        saved = SequentialTape(tapes, self._recurrent, x, tuple(out), self, port)
        return port.give(x), port.give_state(tuple(out)), saved

    def freeze(self) -> FrozenSequential:
        """An immutable, picklable copy for inference, to be shared by threads."""
        frozen = [module.freeze() for module in self.modules]
        return FrozenSequential(frozen, self._recurrent, self.device)

    def _gather(self) -> None:
        """Moves the modules' parameters into one new buffer."""
        dtypes = [module.flat.dtype for module in self.modules if module.flat.size]
        shapes = {
            f"{i}.{name}": array.shape
            for i, module in enumerate(self.modules)
            for name, array in module.params.items()
        }
        dtype = np.dtype(dtypes[0] if dtypes else np.float32)
        flat, params = allocate(shapes, dtype, self.modules[0].device)
        self.flat, self.params = flat, Params(params)
        self._bind_modules(flat)

    def _bind(self, flat: Array) -> None:
        shapes = shapes_of(self.params)
        self._bind_modules(flat)
        self.flat, self.params = flat, Params(views(flat, shapes))

    def _bind_modules(self, flat: Array) -> None:
        start = 0
        for module in self.modules:
            stop = start + module.flat.size
            module._bind(flat[start:stop])
            start = stop

    def _place(self, flat: Array) -> None:
        super()._place(flat)
        start = 0
        for module in self.modules:
            stop = start + module.flat.size
            module._place(flat[start:stop])
            start = stop

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}  # they bring their parameters along

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.modules = state["modules"]
        self._recurrent = _recurrent(self.modules)
        self._gather()

    def __copy__(self) -> Sequential:
        return copy.deepcopy(self)  # two models cannot share modules


class SequentialTape:
    """What ``forward`` saved for ``backward``."""

    def __init__(
        self,
        tapes: list[Any],
        recurrent: Sequence[bool],
        y: Array,
        state: State,
        model: Sequential,
        port: _device.Port,
    ) -> None:
        self._tapes: list[Any] | None = tapes
        self._recurrent = recurrent
        self._dtype = model.dtype
        self._device = model.device
        self._port = port
        self._y_shape = y.shape
        self._y_dtype = _device.dtype_of(y)
        self._state_shapes = [_shape_tree(entry) for entry in state]
        self._shapes = shapes_of(model.params)
        self._once = Once()

    def backward(
        self,
        dy: Any,
        dstate: State | None = None,
        *,
        into: dict[str, Array] | None = None,
        threads: int | None = None,
    ) -> Gradients[State]:
        """Exact back-propagation, once.

        Args:
            dy: Gradient of y, of its shape and dtype; None where only ``dstate`` matters.
            dstate: Gradient of the final state: a tuple with one entry per module, None for zeros.
            into: A dict like ``Gradients.params`` to add the parameters' gradients to.
            threads: Threads to use; None is the default. The results do not depend on it.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: a wrong shape, or wrong names in ``into``.
            RuntimeError: this tape was used before.
        """
        if dy is not None:
            dy = _check.float_array("dy", self._port.take("dy", dy), self._y_dtype, self._y_shape)
        elif dstate is None or not any(self._recurrent):
            raise TypeError("dy: expected an array, got None, which needs a dstate")
        dstates = self._check_dstate(dstate)
        params = accumulators(self._shapes, self._dtype, into, self._device)
        _check.threads(threads)
        self._once.take()
        tapes, self._tapes = self._tapes, None
        assert tapes is not None
        states: list[Any] = [None] * len(tapes)
        for i in reversed(range(len(tapes))):
            # Popped, so that what a tape holds is freed when its backward is done.
            tape, prefix = tapes.pop(), f"{i}."
            part = {
                name[len(prefix) :]: array
                for name, array in params.items()
                if name.startswith(prefix)
            }
            if self._recurrent[i]:
                g = tape.backward(dy, dstates[i], into=part, threads=threads)
                states[i] = g.state
            elif dy is not None:  # else nothing comes from above yet: gradients of zero
                g = tape.backward(dy, into=part, threads=threads)
            else:
                continue
            dy = g.x
        return Gradients(self._port.give(dy), self._port.give_state(tuple(states)), params)

    def _check_dstate(self, dstate: State | None) -> Sequence[Any]:
        """``dstate`` checked, before anything is written."""
        if dstate is None:
            return [None] * len(self._recurrent)
        _check_entries("dstate", dstate, self._recurrent)
        taken = [self._port.take_state(f"dstate[{i}]", part) for i, part in enumerate(dstate)]
        for i, shapes in enumerate(self._state_shapes):
            if taken[i] is not None:
                _check_tree(f"dstate[{i}]", taken[i], shapes, self._dtype)
        return taken


class FrozenSequential:
    """A Sequential for inference: immutable, picklable, to be shared by threads."""

    def __init__(
        self, modules: Sequence[Any], recurrent: Sequence[bool], device: str = "cpu"
    ) -> None:
        self._modules = tuple(modules)
        self._recurrent = tuple(recurrent)
        self._device = device

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self._device

    def __call__(
        self,
        x: Any,
        state: State | None = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        threads: int | None = None,
    ) -> tuple[Array, State]:
        """(y, state), as the Sequential it was made of."""
        parts = self._modules, self._recurrent
        return _apply(self._device, *parts, x, state, lengths, reset, threads)

    def stream(self, batch_size: int = 1) -> SequentialStream:
        """``batch_size`` sequences side by side, a step at a time, from the zero state."""
        size = _check.size("batch_size", batch_size)
        return SequentialStream(
            [
                module.stream(size) if recurrent else module
                for module, recurrent in zip(self._modules, self._recurrent, strict=True)
            ],
            self._recurrent,
            size,
            self._device,
        )


class SequentialStream:
    """Steps of a frozen Sequential. One thread at a time; a second one gets a RuntimeError."""

    def __init__(
        self, modules: Sequence[Any], recurrent: Sequence[bool], batch_size: int, device: str
    ) -> None:
        self._modules = modules
        self._recurrent = recurrent
        self._batch_size = batch_size
        self._device = device
        self._lock = threading.Lock()
        self._y_like: Any = None  # shape and dtype of y_t, known after the first step

    def step(self, x_t: Any, out: Any = None) -> Any:
        """The next step.

        Args:
            x_t: What the first module takes, (batch_size, features) or integers (batch_size).
            out: Where to write the result; it may not share memory with ``x_t``.

        Returns:
            y_t (batch_size, features), or ``out``.

        Raises:
            TypeError, ValueError: an argument does not fit; the state is as it was.
            RuntimeError: another thread is in a step.
        """
        port = _device.port(self._device, x_t)
        x: Any = port.take("x_t", x_t)
        x = x if _device.is_array(x) else np.asarray(x)
        if x.ndim not in (1, 2) or x.shape[0] != self._batch_size:
            B = self._batch_size
            raise ValueError(f"x_t: expected shape ({B}, features) or ({B},), got {x.shape}")
        if out is not None:
            if not (isinstance(out, np.ndarray) or _device.is_array(out)):
                raise TypeError(f"out: expected an array, got {type(out).__name__}")
            if _device.read_only(out):
                raise ValueError("out: expected a writable array, got a read-only one")
            if self._device == "cpu" and np.may_share_memory(out, x):
                raise ValueError("out: expected memory of its own, got an overlap with x_t")
        with self._alone():
            if out is not None and self._y_like is not None:
                _check_out(out, self._y_like)
            before = self._states() if self._y_like is None else ()
            for module, recurrent in zip(self._modules, self._recurrent, strict=True):
                x = module.step(x) if recurrent else module(x)
            if self._y_like is None and out is not None:
                try:
                    _check_out(out, x)
                except (TypeError, ValueError):
                    self._restore(before)
                    raise
            self._y_like = np.broadcast_to(np.zeros((), x.dtype), x.shape)
            if out is None:
                return port.give(x)
            out[...] = x
            return out

    @property
    def state(self) -> State:
        """A tuple with one entry per module; assigning one continues from there."""
        with self._alone():
            return self._states()

    @state.setter
    def state(self, value: State) -> None:
        _check_entries("state", value, self._recurrent)
        with self._alone():
            before = self._states()
            try:
                self._restore(value)
            except BaseException:  # all of it or nothing
                self._restore(before)
                raise

    def reset(self, rows: Any = None) -> None:
        """Zeroes the state, of the given rows only where ``rows`` says which."""
        with self._alone():
            for module, recurrent in zip(self._modules, self._recurrent, strict=True):
                if recurrent:
                    module.reset(rows)

    def _states(self) -> State:
        return tuple(
            module.state if recurrent else None
            for module, recurrent in zip(self._modules, self._recurrent, strict=True)
        )

    def _restore(self, state: State) -> None:
        for module, recurrent, entry in zip(self._modules, self._recurrent, state, strict=True):
            if recurrent:
                module.state = entry

    def _alone(self) -> Exclusive:
        return Exclusive(self._lock)


def _common(modules: Sequence[Any], attribute: str) -> None:
    """ValueError unless the modules that have ``attribute`` agree on it."""
    found = [(i, getattr(m, attribute)) for i, m in enumerate(modules) if hasattr(m, attribute)]
    for i, value in found:
        if value != found[0][1]:
            raise ValueError(
                f"modules[{i}]: expected {attribute} {found[0][1]} as of modules[{found[0][0]}], "
                f"got {value}"
            )


def _check_chain(modules: Sequence[Any]) -> None:
    """ValueError unless every module takes what the one before it gives."""
    features: int | None = None  # of the last axis so far; None: any
    for i, module in enumerate(modules):
        if isinstance(module, Embedding):
            if i > 0:
                raise ValueError(f"modules[{i}]: expected Embedding, which takes integers, first")
            features = module.embedding_dim
            continue
        if isinstance(module, Stateless) and not isinstance(module, Linear):
            continue
        linear = isinstance(module, Linear)
        takes = module.in_features if linear else module.input_size
        if features is not None and takes != features:
            name = "in_features" if linear else "input_size"
            raise ValueError(f"modules[{i}]: expected {name} {features}, got {takes}")
        directions = 2 if getattr(module, "bidirectional", False) else 1
        features = module.out_features if linear else module.hidden_size * directions


def _recurrent(modules: Sequence[Any]) -> tuple[bool, ...]:
    """Which modules have a state."""
    return tuple(not isinstance(module, Stateless) for module in modules)


def _apply(
    device: str,
    modules: Sequence[Any],
    recurrent: Sequence[bool],
    x: Any,
    state: State | None,
    lengths: Any,
    reset: Any,
    threads: int | None,
) -> tuple[Array, State]:
    """The inference of a Sequential, frozen or not."""
    port, x, states = _enter(device, recurrent, x, state)
    out: list[Any] = []
    for i, module in enumerate(modules):
        if recurrent[i]:
            x, new = module(x, states[i], lengths=lengths, reset=reset, threads=threads)
        else:
            x, new = module(x, threads=threads), None
        out.append(new)
    return port.give(x), port.give_state(tuple(out))


def _check_out(out: Array, y: Array) -> None:
    """``out`` must have the shape and dtype of ``y``."""
    if out.dtype != y.dtype:
        raise TypeError(f"out: expected an array of {y.dtype}, got {out.dtype}")
    if out.shape != y.shape:
        raise ValueError(f"out: expected shape {y.shape}, got {out.shape}")


def _enter(
    device: str, recurrent: Sequence[bool], x: Any, state: State | None
) -> tuple[_device.Port, Any, Sequence[Any]]:
    """(port, input, states to start from by module): what a call begins with.

    Batches without padding go through the modules' own ports, if they take them at all.
    """
    port = _device.port(device, None if _ragged.is_batch(x) else x)
    if state is None:
        states: Sequence[Any] = [None] * len(recurrent)
    else:
        _check_entries("state", state, recurrent)
        states = [port.take_state(f"state[{i}]", part) for i, part in enumerate(state)]
    return port, x if _ragged.is_batch(x) else port.take("x", x), states


def _check_entries(name: str, value: Any, recurrent: Sequence[bool]) -> None:
    """``value`` must be a tuple with an entry per module, None for those without state."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"{name}: expected a tuple, one entry per module, got {type(value).__name__}"
        )
    if len(value) != len(recurrent):
        raise ValueError(f"{name}: expected {len(recurrent)} entries, got {len(value)}")
    for i, (entry, stateful) in enumerate(zip(value, recurrent, strict=True)):
        if entry is not None and not stateful:
            raise ValueError(f"{name}[{i}]: expected None, the module has no state")


def _shape_tree(state: Any) -> Any:
    """Arrays replaced by their shapes, tuples kept."""
    if isinstance(state, tuple):
        return [_shape_tree(entry) for entry in state]
    return None if state is None else state.shape


def _check_tree(name: str, value: Any, shapes: Any, dtype: np.dtype[Any]) -> None:
    """Arrays of ``dtype`` in the shapes that ``_shape_tree`` found."""
    if isinstance(shapes, list):
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: expected a tuple of arrays, got {type(value).__name__}")
        if len(value) != len(shapes):
            raise ValueError(f"{name}: expected {len(shapes)} arrays, got {len(value)}")
        for i, (entry, shape) in enumerate(zip(value, shapes, strict=True)):
            if entry is not None:
                _check_tree(f"{name}[{i}]", entry, shape, dtype)
    else:
        _check.float_array(name, value, dtype, shapes)
