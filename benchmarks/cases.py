"""What is measured: the cases, their arithmetic and the arrays they run on.

Dimensions as everywhere: T steps, B batch rows, I inputs, H hidden units, G gates, L layers, D
directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INFERENCE, TRAINING, STEP, CHARACTERS = "inference", "training", "one step", "characters"
KINDS = {
    INFERENCE: "Inference: a whole sequence, nothing kept for training",
    TRAINING: "Training: forward and exact back-propagation through time, all gradients",
    STEP: "One step: streaming, the state carried over",
    CHARACTERS: "Character model: one-hot LSTM, dropout, linear, cross-entropy, clipping, Adam",
}
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
VOCABULARY = 103  # distinct characters of the text that `fastrnn train` uses by default
DROPOUT = 0.2


@dataclass(frozen=True)
class Case:
    """One line of the tables; ``name`` is what --filter looks at."""

    kind: str
    cell: str
    T: int
    B: int
    H: int
    I: int = 0  # 0: as H
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    dtype: str = "float32"

    @property
    def label(self) -> str:
        steps = f"T={self.T} " if self.kind != STEP else ""
        parts = [f"{self.cell} {steps}B={self.B} H={self.H}"]
        if self.I and self.kind != CHARACTERS:
            parts.append(f"I={self.I}")
        if self.layers > 1:
            parts.append(f"{self.layers} layers")
        parts += [
            word
            for word, shown in (
                ("both directions", self.bidirectional),
                ("ragged", self.ragged),
                (self.dtype, self.dtype != "float32"),
            )
            if shown
        ]
        return " ".join(parts)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.label}"

    @property
    def plain(self) -> bool:
        """Whether it is one layer in one direction on full-length rows."""
        return self.layers == 1 and not self.bidirectional and not self.ragged

    @property
    def inputs(self) -> int:
        """I of the first layer."""
        return self.I or self.H

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def lengths(self) -> Array | None:
        """(B,) integers from 1 to T in no order, mean about T/2; None where all rows are full."""
        if not self.ragged:
            return None
        lengths = np.linspace(1, self.T, self.B).round().astype(np.int64)
        return np.random.default_rng(1).permutation(lengths)

    @property
    def rows(self) -> int:
        """Steps of all rows together."""
        return self.T * self.B if self.lengths is None else int(self.lengths.sum())

    def _layer_inputs(self) -> Iterator[int]:
        for layer in range(self.layers):
            yield self.inputs if layer == 0 else self.H * self.directions

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products; the cells' own arithmetic is not counted.

        Back-propagation makes three products of every one: itself and the gradients by both
        factors.
        """
        gates = self.gates * self.H
        if self.kind == CHARACTERS:  # one-hot input: a gather, no product
            return 3.0 * 2 * self.rows * self.H * (gates + self.inputs)
        inputs = sum(n + self.H for n in self._layer_inputs())
        passes = 3 if self.kind == TRAINING else 1
        return passes * 2.0 * self.rows * self.directions * gates * inputs

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights that a step needs before the next can start, over the whole call.

        W_hh at every step; in streaming W_ih too, which a whole sequence needs once.
        """
        return float(self.T * self.layers * self.working_set * (2 if self.kind == TRAINING else 1))

    @property
    def working_set(self) -> int:
        """Bytes that are read again at every step of a layer."""
        size = np.dtype(self.dtype).itemsize
        inputs = self.inputs if self.kind == STEP else 0
        return self.directions * self.gates * self.H * (self.H + inputs) * size

    @property
    def reads_weights(self) -> bool:
        """Whether reading the weights is the limit: one row, no gradients."""
        return self.B == 1 and self.kind in (INFERENCE, STEP)

    def shortest(self, gflops: float, gbytes_per_s: float) -> float:
        """Seconds that no implementation with these weights can beat where B = 1.

        The weights are read at every step, and what remains, the input's product of a whole
        sequence, is arithmetic.
        """
        recurrent = 2.0 * self.rows * self.layers * self.directions * self.gates * self.H * self.H
        rest = self.flops - recurrent if self.kind == INFERENCE else 0.0
        return self.weight_bytes / (gbytes_per_s * 1e9) + rest / (gflops * 1e9)


@dataclass(frozen=True)
class Problem:
    """The arrays of a case, the same for every library.

    Attributes:
        weights: PyTorch's names and shapes.
        x: (T, B, I); in a character model (T, B) integers.
        dy: (T, B, D*H), the gradient of the output; in a character model the (T, B) targets.
        head: Weight (V, H) and bias (V,) of a character model's output layer.
    """

    case: Case
    weights: dict[str, Array]
    x: Array
    dy: Array
    head: tuple[Array, Array] = field(default=(np.empty(0), np.empty(0)))

    @classmethod
    def of(cls, case: Case) -> Problem:
        rng = np.random.default_rng(0)
        bound = 1 / math.sqrt(case.H)

        def draw(*shape: int) -> Array:
            return rng.uniform(-bound, bound, shape).astype(case.dtype)

        weights = {}
        rows = case.gates * case.H
        for layer, inputs in enumerate(case._layer_inputs()):
            for suffix in ("", "_reverse")[: case.directions]:
                weights[f"weight_ih_l{layer}{suffix}"] = draw(rows, inputs)
                weights[f"weight_hh_l{layer}{suffix}"] = draw(rows, case.H)
                weights[f"bias_ih_l{layer}{suffix}"] = draw(rows)
                weights[f"bias_hh_l{layer}{suffix}"] = draw(rows)
        if case.kind == CHARACTERS:
            ids = rng.integers(0, case.inputs, (case.T + 1, case.B))
            return cls(
                case, weights, ids[:-1], ids[1:], (draw(case.inputs, case.H), draw(case.inputs))
            )
        x = rng.standard_normal((case.T, case.B, case.inputs)).astype(case.dtype)
        dy = rng.standard_normal((case.T, case.B, case.directions * case.H)).astype(case.dtype)
        return cls(case, weights, x, dy)


def standard() -> list[Case]:
    """The default: some three minutes on two cores; the properties take one more."""
    shapes = [  # cell, T, B, H
        ("LSTM", 100, 1, 64),
        ("LSTM", 100, 1, 256),
        ("LSTM", 100, 1, 512),
        ("LSTM", 100, 16, 128),
        ("LSTM", 64, 32, 256),
        ("LSTM", 50, 64, 512),
        ("GRU", 100, 1, 256),
        ("GRU", 64, 32, 256),
        ("GRU", 50, 64, 512),
        ("RNN", 100, 1, 256),
        ("RNN", 64, 32, 256),
    ]
    return [
        *(Case(INFERENCE, *shape) for shape in shapes),
        Case(INFERENCE, "LSTM", 63, 1, 32, I=24, bidirectional=True),
        Case(INFERENCE, "LSTM", 100, 1, 128, layers=3),
        *(Case(TRAINING, *shape) for shape in shapes),
        Case(TRAINING, "LSTM", 64, 32, 256, ragged=True),
        Case(TRAINING, "LSTM", 64, 32, 256, dtype="float64"),
        *_singles(),
    ]


def full() -> list[Case]:
    """The grid cells × B × H, then what the grid leaves out; half an hour or more.

    The larger H, the fewer steps: a step's time does not depend on them, and the grid stays
    affordable.
    """
    steps = {64: 100, 128: 100, 256: 100, 512: 50, 1024: 25}
    shapes = [
        (cell, T, B, H)
        for cell in ("RNN", "LSTM", "GRU")
        for B in (1, 4, 16, 32, 64)
        for H, T in steps.items()
    ]
    return [
        *(Case(INFERENCE, *shape) for shape in shapes),
        Case(INFERENCE, "LSTM", 63, 1, 32, I=24, bidirectional=True),
        *(
            Case(INFERENCE, cell, 100, 1, H, **more)
            for cell in ("LSTM", "GRU")
            for H in (128, 512)
            for more in ({"layers": 3}, {"bidirectional": True})
        ),
        *(Case(TRAINING, *shape) for shape in shapes),
        *(Case(TRAINING, cell, 100, 32, 256, ragged=True) for cell in ("RNN", "LSTM", "GRU")),
        *(
            Case(kind, cell, 100, 32, 256, dtype="float64")
            for kind in (INFERENCE, TRAINING)
            for cell in ("RNN", "LSTM", "GRU")
        ),
        *_singles(),
    ]


def _singles() -> list[Case]:
    steps = [("LSTM", 64), ("LSTM", 256), ("GRU", 128)]
    return [
        *(Case(STEP, cell, 1, 1, H) for cell, H in steps),
        Case(CHARACTERS, "LSTM", 64, 32, 256, I=VOCABULARY),
    ]


def quick() -> list[Case]:
    """Tiny sizes: shows that everything runs, measures nothing."""
    return [
        *(Case(INFERENCE, cell, 5, 1, 8) for cell in GATES),
        Case(INFERENCE, "LSTM", 5, 3, 8, I=4, layers=2, bidirectional=True),
        Case(INFERENCE, "GRU", 5, 3, 8, dtype="float64"),
        *(Case(TRAINING, cell, 5, 3, 8) for cell in GATES),
        Case(TRAINING, "LSTM", 5, 3, 8, I=4, ragged=True),
        *(Case(STEP, cell, 1, 1, 8) for cell in GATES),
        Case(CHARACTERS, "LSTM", 5, 3, 8, I=11),
    ]
