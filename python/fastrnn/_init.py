"""Initial values of recurrent weights."""

from __future__ import annotations

import math

import numpy as np

from fastrnn._params import Array

__all__ = ["METHODS", "initialize"]

METHODS = ("uniform", "identity", "orthogonal")


def initialize(
    params: dict[str, Array],
    method: str,
    hidden_size: int,
    rng: np.random.Generator,
    forget_bias: float | None = None,
) -> None:
    """Fills a recurrent layer's parameters in place.

    ``"uniform"``: all of them from U(-1/√H, 1/√H), PyTorch's default. ``"identity"``: every gate's
    weight_hh the identity, biases 0, weight_ih from N(0, 0.001²) (Le, Jaitly & Hinton 2015, the
    IRNN). ``"orthogonal"``: every gate's weight_hh a random orthogonal matrix (Saxe, McClelland &
    Ganguli 2014), weight_ih from Glorot's uniform distribution per gate, biases 0.

    Args:
        params: The parameters by PyTorch's names.
        method: One of ``METHODS``.
        hidden_size: H.
        rng: Where the numbers come from.
        forget_bias: For an LSTM, the forget gate's bias (Jozefowicz, Zaremba & Sutskever 2015
            recommend 1): bias_ih's part is set to it, bias_hh's to 0.
    """
    H = hidden_size
    for name, array in params.items():
        if method == "uniform":
            bound = 1.0 / math.sqrt(H)
            array[...] = rng.uniform(-bound, bound, array.shape)
        elif name.startswith("bias"):
            array[...] = 0.0
        elif name.startswith("weight_hh"):
            for gate in range(0, array.shape[0], H):
                square = np.eye(H) if method == "identity" else _orthogonal(H, rng)
                array[gate : gate + H] = square
        elif method == "identity":
            array[...] = rng.normal(0.0, 0.001, array.shape)
        else:
            bound = math.sqrt(6.0 / (H + array.shape[1]))
            array[...] = rng.uniform(-bound, bound, array.shape)
        if forget_bias is not None and name.startswith("bias"):
            array[H : 2 * H] = forget_bias if name.startswith("bias_ih") else 0.0


def _orthogonal(n: int, rng: np.random.Generator) -> Array:
    """A random orthogonal matrix, uniform among all of them (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return np.asarray(q * np.sign(np.diagonal(r)))
