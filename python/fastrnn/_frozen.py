"""Immutable networks for inference: packed once, shared by any number of threads and streams."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from fastrnn import _check, _core, _tape
from fastrnn._cells import Network
from fastrnn._params import Array

__all__ = ["Frozen"]


class Frozen:
    """A layer's weights, packed for the kernels, and nothing that could change.

    Made by ``layer.freeze()``; a later change of the layer does not reach it. Safe to call from any
    number of threads at once, and picklable. The results have the layer's own bits.
    """

    __slots__ = ("_batch_first", "_network", "_packed")

    def __init__(self, network: Network, packed: _core.Packed, batch_first: bool) -> None:
        self._network = network
        self._packed = packed
        self._batch_first = batch_first

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
            self._packed, x, state, lengths, reset, self._batch_first, threads
        )

    def stream(self, batch_size: int = 1) -> _core.Stream:
        """A running state for ``batch_size`` sequences that advance one step at a time.

        ``s.step(x_t, out=None)`` takes (B, I), or (B,) integers, and returns (B, H); ``s.state``
        reads or replaces the state; ``s.reset(rows=None)`` zeroes it.

        Raises:
            ValueError: The network is bidirectional, or batch_size is not positive.
        """
        return _core.Stream(self._packed, _check.size("batch_size", batch_size))

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
        return _restore, (self._network, _core.unpack(self._packed), self._batch_first)

    def __repr__(self) -> str:
        n = self._network
        return f"<Frozen {n.cell} {n.input_size} → {n.hidden_size} × {n.num_layers} {n.dtype}>"


def _restore(network: Network, weights: list[Array], batch_first: bool) -> Frozen:
    packed = network.pack(dict(zip(network.shapes(), weights, strict=True)))
    return Frozen(network, packed, batch_first)
