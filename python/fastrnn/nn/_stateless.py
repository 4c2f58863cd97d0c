"""What the modules without state share: calls, tapes and their protocol with Sequential.

A subclass says how to check its input (``_input``), compute (``_compute``), record what the
gradient needs (``_record``) and freeze (``freeze``). All these see arrays of the module's device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from fastrnn import _check, _device
from fastrnn._params import Array, Gradients, Module, Shapes, accumulators, shapes_of

__all__ = ["Backward", "Once", "Stateless", "Tape"]

# (dy, where to add the parameters' gradients, threads) -> dx
Backward = Callable[[Array, dict[str, Array], int], Array | None]


class Once:
    """Lets exactly one caller pass, whichever threads they are."""

    def __init__(self) -> None:
        self._ticket = [True]

    def take(self) -> None:
        """Passes the first time; RuntimeError afterwards."""
        try:
            self._ticket.pop()  # atomic under the GIL, unlike a test and an assignment
        except IndexError:
            raise RuntimeError(
                "tape: expected an unused tape, got one that backward has consumed; "
                "call forward again"
            ) from None


class Tape:
    """What ``forward`` saved for ``backward``: copies, so later changes do not matter."""

    def __init__(self, y: Array, shapes: Shapes, backward: Backward, port: _device.Port) -> None:
        self._y_shape = y.shape
        self._dtype: np.dtype[Any] = np.dtype(y.dtype)
        self._device = _device.device_of(y)
        self._port = port
        self._shapes = shapes
        self._run: Backward | None = backward
        self._once = Once()

    def backward(
        self, dy: Any, *, into: dict[str, Array] | None = None, threads: int | None = None
    ) -> Gradients[None]:
        """The gradients of ⟨dy, y⟩, once.

        Args:
            dy: Gradient of the output, of its shape and dtype.
            into: A dict like ``Gradients.params`` to add the parameters' gradients to.
            threads: Threads to use; None is the default. The results do not depend on it.

        Raises:
            TypeError: ``dy``, ``into`` or ``threads`` is of the wrong type or dtype.
            ValueError: ``dy`` or ``into`` has the wrong shape or names.
            RuntimeError: this tape was used before.
        """
        dy = _check.float_array("dy", self._port.take("dy", dy), self._dtype, self._y_shape)
        params = accumulators(self._shapes, self._dtype, into, self._device)
        count = _check.threads(threads)
        self._once.take()
        run, self._run = self._run, None  # what it holds is freed with this call
        assert run is not None
        return Gradients(self._port.give(run(dy, params, count)), None, params)


class Stateless(Module, ABC):
    """A module whose output depends on its input alone."""

    def __call__(self, x: Any, *, threads: int | None = None) -> Array:
        """Inference: the output alone, nothing saved.

        Args:
            x: The input; see the class.
            threads: Threads to use; None is the default. The results do not depend on it.
        """
        port = _device.port(self.device, x)
        array = self._input(port.take("x", x))
        y: Array = port.give(self._compute(array, _check.threads(threads)))
        return y

    def forward(self, x: Any, *, threads: int | None = None) -> tuple[Array, Tape]:
        """Training: the output and a tape with ``backward(dy, *, into=None, threads=None)``.

        Args:
            x: The input; see the class.
            threads: Threads to use; None is the default. The results do not depend on it.
        """
        return self._forward(x, threads=threads, owned=False)

    def _forward(self, x: Any, *, threads: int | None, owned: bool) -> tuple[Array, Tape]:
        """``forward``; ``owned`` promises that nobody else will write to ``x``."""
        port = _device.port(self.device, x)
        array = self._input(port.take("x", x))
        y, backward = self._record(array, _check.threads(threads), owned)
        return port.give(y), Tape(y, shapes_of(self.params), backward, port)

    @abstractmethod
    def _input(self, x: Any) -> Array:
        """``x`` as a checked, C-contiguous array."""

    @abstractmethod
    def _compute(self, x: Array, threads: int) -> Array:
        """The output for inference."""

    @abstractmethod
    def _record(self, x: Array, threads: int, owned: bool) -> tuple[Array, Backward]:
        """The output for training, which may not alias ``x``, and its gradient function."""

    @abstractmethod
    def freeze(self) -> Callable[..., Array]:
        """An immutable, picklable copy for inference, to be called like the module."""
