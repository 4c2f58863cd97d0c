"""Losses, each with its gradient from the same call."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastrnn import _check, _device
from fastrnn._params import Array

__all__ = ["mean_squared_error", "softmax_cross_entropy"]


def softmax_cross_entropy(
    logits: Any, targets: Any, mask: Any = None, *, threads: int | None = None
) -> tuple[float, Array]:
    """Softmax, mean cross-entropy and its gradient in one pass.

    loss = mean over the positions that count of log Σ_j exp(z_j) − z_t, in nats;
    dlogits = (softmax(z) − onehot(t)) / (number of positions that count).

    Args:
        logits: z (..., V), float32 or float64. On a CUDA device, of any library: computed there.
        targets: t (...), integers in [0, V); where the mask is False any integer will do.
        mask: (...) of bool: True where a position counts. None: all count. If none does, loss and
            gradient are 0.
        threads: Threads to use; None is the default. The results do not depend on it.

    Returns:
        The loss, and dlogits (..., V), which is 0 where the mask is False, whatever the logits are
        there. No overflow for any finite logits; a NaN makes its row and the loss NaN. Sums are
        kept in float64: the loss is as accurate as one in float64 to 1e-6 (float32 logits) or
        1e-14.

    Raises:
        TypeError: ``logits`` is no float32 or float64, ``targets`` no integer, ``mask`` no bool.
        ValueError: shapes that do not fit, or a target out of range.
    """
    device = "cuda" if _device.on_device(logits) else "cpu"
    port = _device.port(device, logits)
    z = _check.any_float_array("logits", port.take("logits", logits))
    if z.ndim < 1 or z.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V > 0, got {z.shape}")
    lead = z.shape[:-1]
    t = _check.int_array("targets", targets, lead).reshape(-1)
    keep = None if mask is None else _check.mask("mask", mask, lead).reshape(-1)
    rows = z.reshape(-1, z.shape[-1])
    loss, dlogits = _device.kernels(device).softmax_cross_entropy(
        rows, t, keep, _check.threads(threads)
    )
    return float(loss), port.give(dlogits.reshape(z.shape))


def mean_squared_error(pred: Any, target: Any, mask: Any = None) -> tuple[float, Array]:
    """mean((pred − target)²) and its gradient 2 (pred − target) / (number of elements).

    Args:
        pred: Predictions of any shape, float32 or float64. On a CUDA device, of any library:
            computed there.
        target: Of the same shape and dtype.
        mask: Bool, of the shape of ``pred``, or of all its axes but the last: True where elements
            count. None: all count. If none does, loss and gradient are 0.

    Returns:
        The loss, summed in float64, and dpred, which is 0 where the mask is False, whatever pred
        and target are there.

    Raises:
        TypeError: dtypes that differ or are no float32 or float64; ``mask`` is no bool.
        ValueError: shapes that do not fit.
    """
    device = "cuda" if _device.on_device(pred) else "cpu"
    port = _device.port(device, pred)
    p = _check.any_float_array("pred", port.take("pred", pred))
    t = _check.float_array("target", port.take("target", target), np.dtype(p.dtype), p.shape)
    keep = None
    if mask is not None:
        shapes = (p.shape, p.shape[:-1]) if p.ndim else (p.shape,)
        keep = _check.mask("mask", mask, *shapes)
        if keep.ndim < p.ndim:
            keep = np.broadcast_to(keep[..., None], p.shape)
    if device == "cuda":
        loss, dpred = _device.kernels(device).mean_squared_error(p, t, keep)
        return float(loss), port.give(dpred)
    if keep is None:
        difference, count = p - t, p.size
    else:
        difference, count = np.zeros_like(p), int(np.count_nonzero(keep))
        np.subtract(p, t, out=difference, where=keep)
    count = max(count, 1)
    loss = float(np.square(difference, dtype=np.float64).sum()) / count
    return loss, difference * p.dtype.type(2 / count)
