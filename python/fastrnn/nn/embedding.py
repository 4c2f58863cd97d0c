"""The embedding: a row of a table for every integer."""

from __future__ import annotations

from typing import Any

from fastrnn import _check, _device
from fastrnn._params import Array
from fastrnn.nn._stateless import Backward, Stateless

__all__ = ["Embedding", "FrozenEmbedding"]


class Embedding(Stateless):
    """y[...] = weight[x[...]], as ``torch.nn.Embedding``.

    The parameter is ``weight`` (num_embeddings, embedding_dim), drawn from N(0, 1). A call takes
    integers x (...) in [0, num_embeddings) and returns (..., embedding_dim). ``Gradients.x`` is
    None. A row that occurs several times gets its gradients added in the order of x, so the result
    does not depend on threads, bit for bit.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Size of a row.
        dtype: "float32" or "float64".
        rng: None, a seed or a ``numpy.random.Generator`` for the initial values.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: Any = "float32",
        rng: Any = None,
    ) -> None:
        self.num_embeddings = _check.size("num_embeddings", num_embeddings)
        self.embedding_dim = _check.size("embedding_dim", embedding_dim)
        self.dtype = _check.float_dtype("dtype", dtype)
        generator = _check.generator("rng", rng)
        self._allocate({"weight": (self.num_embeddings, self.embedding_dim)}, self.dtype)
        self.params["weight"] = generator.standard_normal(self.params["weight"].shape)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "dtype": self.dtype.name,
        }

    def freeze(self) -> FrozenEmbedding:
        """An immutable, picklable copy for inference; call it like the module."""
        return FrozenEmbedding(self.params["weight"])

    def _input(self, x: Any) -> Array:
        return _check.int_array("x", x)

    def _compute(self, x: Array, threads: int) -> Array:
        return _lookup(self.params["weight"], x, threads)

    def _record(self, x: Array, threads: int, owned: bool) -> tuple[Array, Backward]:
        saved = x if owned else x.copy()

        def backward(dy: Array, into: dict[str, Array], threads: int) -> None:
            weight = into["weight"]
            rows = dy.reshape(-1, weight.shape[1])
            kernels = _device.kernels(_device.device_of(weight))
            kernels.embedding_backward(saved.reshape(-1), rows, weight, threads)

        return _lookup(self.params["weight"], saved, threads), backward


class FrozenEmbedding:
    """``Embedding`` for inference: immutable, picklable, to be shared by threads."""

    def __init__(self, weight: Array) -> None:
        self._weight = _device.constant(weight)

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return _device.device_of(self._weight)

    def __call__(self, x: Any, *, threads: int | None = None) -> Array:
        """Integers (...) → (..., embedding_dim)."""
        port = _device.port(self.device, x)
        ids = _check.int_array("x", port.take("x", x))
        y: Array = port.give(_lookup(self._weight, ids, _check.threads(threads)))
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenEmbedding, (self._weight,)


def _lookup(weight: Array, x: Array, threads: int) -> Array:
    kernels = _device.kernels(_device.device_of(weight))
    y: Array = kernels.embedding_forward(weight, x.reshape(-1), threads)
    return y.reshape((*x.shape, weight.shape[1]))
