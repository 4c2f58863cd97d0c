"""Immutable networks for inference: packed once, shared by any number of threads and streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import _check, _core, _device, _tape
from fastrnn._cells import Network
from fastrnn._params import Array

__all__ = ["DeviceStream", "Exclusive", "Frozen"]


class Frozen:
    """A layer's weights, packed for the kernels, and nothing that could change.

    Made by ``layer.freeze()``; a later change of the layer does not reach it. Safe to call from any
    number of threads at once, and picklable. The results have the layer's own bits.
    """

    __slots__ = ("_batch_first", "_network", "_packed", "_weights")

    def __init__(
        self, network: Network, packed: Any, batch_first: bool, weights: list[Array] | None = None
    ) -> None:
        self._network = network
        self._packed = packed
        self._batch_first = batch_first
        self._weights = weights  # of a network on the device, whose packed ones do not come back

    @classmethod
    def of(cls, network: Network, weights: dict[str, Array], batch_first: bool) -> Frozen:
        """A network with these weights, which are copied."""
        kept = None
        if network.device == "cuda":
            kept = [_device.move(weights[name], "cuda") for name in network.shapes()]
        return cls(network, network.pack(weights), batch_first, kept)

    def __call__(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: npt.ArrayLike | None = None,
        reset: Any = None,
        threads: int | None = None,
    ) -> tuple[Any, Any]:
        """Inference, as the layer's own call: (y, state)."""
        return _tape.infer_packed(
            self.device, self._packed, x, state, lengths, reset, self._batch_first, threads
        )

    def stream(self, batch_size: int = 1) -> _core.Stream | DeviceStream:
        """A running state for ``batch_size`` sequences that advance one step at a time.

        ``s.step(x_t, out=None)`` takes (B, I), or (B,) integers, and returns (B, H); ``s.state``
        reads or replaces the state; ``s.reset(rows=None)`` zeroes it.

        Raises:
            ValueError: The network is bidirectional, or batch_size is not positive.
        """
        size = _check.size("batch_size", batch_size)
        if self._network.device == "cuda":
            return DeviceStream(self._network, self._packed, size)
        return _core.Stream(self._packed, size)

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``: where the weights are."""
        return self._network.device

    @property
    def batch_first(self) -> bool:
        """Whether input and output are (B, T, ·) instead of (T, B, ·)."""
        return self._batch_first

    @property
    def dtype(self) -> Any:
        """The dtype of weights, inputs and outputs."""
        return self._network.dtype

    @property
    def input_size(self) -> int:
        """I."""
        return self._network.input_size

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._network.hidden_size

    def __reduce__(self) -> tuple[Any, ...]:
        # The packed layout depends on the machine's instruction set; the weights do not.
        weights = self._weights or _core.unpack(self._packed)
        return _restore, (self._network, weights, self._batch_first)

    def __repr__(self) -> str:
        n = self._network
        return f"<Frozen {n.cell} {n.input_size} → {n.hidden_size} × {n.num_layers} {n.dtype}>"


def _restore(network: Network, weights: list[Array], batch_first: bool) -> Frozen:
    return Frozen.of(network, dict(zip(network.shapes(), weights, strict=True)), batch_first)


class Exclusive:
    """Holds a lock that must be free: one caller at a time, and an error for a second one."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("stream: expected one thread at a time, got a second one")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class DeviceStream:
    """``_core.Stream`` for networks on the device, where the state is kept."""

    def __init__(self, network: Network, packed: Any, batch_size: int) -> None:
        if network.num_directions != 1:
            raise ValueError(
                "stream: expected a network of one direction, got a bidirectional one, which needs "
                "the whole sequence before its first output"
            )
        self._network = network
        self._packed = packed
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._state = self._checked(None)

    @property
    def batch_size(self) -> int:
        """B."""
        return self._batch_size

    def step(self, x_t: Any, out: Any = None) -> Any:
        """One step: x_t (B, I), or (B,) integers for one-hot rows, to y_t (B, H).

        Args:
            x_t: The input, an array of any library.
            out: Where to write y_t: an array of its shape, NumPy's or a ``DeviceArray``.

        Raises:
            RuntimeError: Another thread is in the middle of a step.
            TypeError, ValueError: An argument does not fit; the state is as it was.
        """
        port = _device.port("cuda", x_t)
        x = port.take("x_t", x_t)
        features = (self._network.input_size,) if "float" in x.dtype else ()
        if x.shape != (self._batch_size, *features):
            raise ValueError(f"x_t: expected shape {(self._batch_size, *features)}, got {x.shape}")
        y_shape = (self._batch_size, self._network.hidden_size)
        if out is not None:
            if not (isinstance(out, np.ndarray) or _device.is_array(out)):
                raise TypeError(f"out: expected an array, got {type(out).__name__}")
            if out.shape != y_shape:
                raise ValueError(f"out: expected shape {y_shape}, got {out.shape}")
            if _device.read_only(out):
                raise ValueError("out: expected a writable array, got a read-only one")
        x = (x if x.contiguous else x.copy()).reshape(1, *x.shape)
        with Exclusive(self._lock):
            y, self._state = self._packed.forward(x, self._state, None, None, None, False, None)
        y = y.reshape(y_shape)
        if out is None:
            return port.give(y)
        out[...] = y
        return out

    def reset(self, rows: Any = None) -> None:
        """Zeroes the state of all rows, or of those given by index or by a mask of bool."""
        B = self._batch_size
        keep = np.full(B, rows is not None)
        if np.asarray(rows).dtype == bool:
            keep = ~_check.mask("rows", rows, (B,))
        elif np.size(rows) and rows is not None:
            chosen = _check.int_array("rows", rows)
            if chosen.size and not (0 <= chosen.min() and chosen.max() < B):
                raise ValueError(f"rows: expected rows from 0 to {B - 1}, got {chosen.tolist()}")
            keep[chosen] = False
        with Exclusive(self._lock):
            self._state = _map(lambda a: _device.masked(keep[:, None], a), self._state)

    @property
    def state(self) -> Any:
        """A copy of the state: h (L, B, H), or (h, c) for an LSTM. Assign to replace it."""
        with Exclusive(self._lock):
            return _map(lambda a: a.copy(), self._state)

    @state.setter
    def state(self, value: Any) -> None:
        state = self._checked(value)
        with Exclusive(self._lock):
            self._state = state

    def _checked(self, value: Any) -> Any:
        """A copy of a state on the device; None, also in a pair, stands for zeros."""
        network = self._network
        shape = (network.num_layers, self._batch_size, network.hidden_size)

        def copy(name: str, array: Any) -> Any:
            if array is None:
                return _device.zeros(shape, network.dtype, "cuda")
            taken = _device.port("cuda", array).take(name, array)
            return _check.float_array(name, taken, network.dtype, shape).copy()

        if network.family != "lstm":
            return copy("state", value)
        if value is None:
            value = (None, None)
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"state: expected a pair (h, c), got {type(value).__name__}")
        if len(value) != 2:
            raise ValueError(f"state: expected a pair (h, c), got {len(value)} items")
        return tuple(copy(f"state[{i}]", array) for i, array in enumerate(value))


def _map(function: Callable[[Any], Any], state: Any) -> Any:
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)
