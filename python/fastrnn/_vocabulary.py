"""Integer input over a large vocabulary: only the columns of weight_ih that occur are packed.

A one-hot row picks a column of ``weight_ih_l0``. A call sees few of the columns of a large
vocabulary, so before the weights are packed the vocabulary is cut down to the tokens that occur;
the results have the same bits, and what a call costs depends on its tokens, not on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastrnn import _core
from fastrnn._cells import Network
from fastrnn._params import Array, accumulators

__all__ = ["add_columns", "compact", "parts"]

_WORTH = 512  # vocabularies below this are packed whole


def compact(
    network: Network, weights: Mapping[str, Array], values: Any, threads: int | None
) -> tuple[Network, Mapping[str, Array], Any, Array | None]:
    """(network, weights, values, columns): over the tokens that occur, if that is worth it.

    columns: the tokens that are left, rising; None where nothing was changed. Values that are not
    integers or out of range are left for the kernels' own checks.
    """
    size = network.input_size
    if size < _WORTH or not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
        return network, weights, values, None
    if values.size == 0 or values.min() < 0 or values.max() >= size:
        return network, weights, values, None
    seen = np.zeros(size, bool)
    seen[values] = True
    columns = np.flatnonzero(seen)
    if 2 * len(columns) > size:
        return network, weights, values, None
    position = np.cumsum(seen) - 1
    small = {
        name: _core.take_columns(array, columns, threads) if _picks_columns(name) else array
        for name, array in weights.items()
    }
    return replace(network, input_size=len(columns)), small, position[values], columns


def parts(network: Network, total: dict[str, Array]) -> dict[str, Array]:
    """Where the gradients over the smaller vocabulary are added.

    ``total``'s own arrays, but new ones in place of those with a column for each token.
    """
    shapes = {name: shape for name, shape in network.shapes().items() if _picks_columns(name)}
    return total | accumulators(shapes, network.dtype, None)


def add_columns(
    total: dict[str, Array], part: dict[str, Array], columns: Array, threads: int | None
) -> None:
    """Adds gradients over ``columns`` of the vocabulary to those over all of it."""
    for name, gradient in part.items():
        if _picks_columns(name):
            _core.add_columns(total[name], columns, gradient, threads)


def _picks_columns(name: str) -> bool:
    return name in ("weight_ih_l0", "weight_ih_l0_reverse")
