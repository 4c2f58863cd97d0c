"""What is timed on a GPU, in the order of what a run that is short of time must not leave out.

``Case`` is that of the CPU's benchmarks; its ``dtype`` is a precision here. T steps, B batch rows,
I inputs, H hidden units.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.cases import INFERENCE, TRAINING, Case

__all__ = ["AIMS", "GROUPS", "TOLERANCE", "Timed", "cases"]

# Title → (least geometric mean of PyTorch's time over ours, least ratio) that we aim at.
AIMS: dict[str, tuple[float, float]] = {}
FLASHRNN = "The shape of FlashRNN's own figures"
RAGGED = "Ragged batches, PyTorch's packed"
HASTE = "Shapes of Haste's benchmark, float32"
DEEP = "Two layers in both directions"
GRID = "{cell}, {precisions}"
SIXTEEN, THIRTY_TWO = ("bfloat16", "float16"), ("tf32", "float32")
GROUPS: dict[str, str] = {
    FLASHRNN: "LSTM, B = 16, T = 1024, H = 768 (FlashRNN, arXiv 2412.07752).",
    RAGGED: "Lengths from 1 to T in no order, half of T on average; PyTorch gets them packed and "
    "hands them back padded.",
    HASTE: "50 steps, inputs smaller than the state.",
}

# A step's time does not depend on how many there are, and with fewer the grid stays affordable.
STEPS = {128: 512, 256: 512, 512: 512, 1024: 256, 2048: 128}
BATCHES = (1, 8, 32, 128)

# How far the libraries' results may be apart: the norm of the difference over the norm, for y and
# each gradient.
TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}


class Timed(NamedTuple):
    """A case and the title under which it stands."""

    group: str
    case: Case


def cases(*, quick: bool = False, rehearse: bool = False) -> list[Timed]:
    """All of them, or enough to see that all runs, or what the emulator can do in a minute."""
    if rehearse:
        return _tiny()
    return _quick() if quick else _full()


def _full() -> list[Timed]:
    timed = [
        Timed(FLASHRNN, Case(kind, "LSTM", 1024, 16, 768, dtype=dtype))
        for dtype in SIXTEEN
        for kind in (INFERENCE, TRAINING)
    ]
    timed += _grid("LSTM", SIXTEEN)
    timed += [
        Timed(RAGGED, Case(kind, cell, 256, B, H, ragged=True, dtype=dtype))
        for cell in ("LSTM", "GRU")
        for B, H in ((32, 256), (128, 512))
        for dtype in ("bfloat16", "float16", "float32")
        for kind in (INFERENCE, TRAINING)
    ]
    timed += _grid("GRU", SIXTEEN)
    timed += [
        Timed(HASTE, Case(kind, cell, 50, B, H, I=inputs, dtype="float32"))
        for cell in ("LSTM", "GRU")
        for B, H, inputs in ((16, 256, 128), (64, 1024, 256), (128, 512, 64))
        for kind in (INFERENCE, TRAINING)
    ]
    timed += [
        Timed(DEEP, Case(kind, "LSTM", 256, 32, 256, layers=2, bidirectional=True, dtype=dtype))
        for dtype in ("bfloat16", "float16")
        for kind in (INFERENCE, TRAINING)
    ]
    for precision in THIRTY_TWO:
        for cell in ("LSTM", "GRU"):
            timed += _grid(cell, (precision,))
    return timed


def _grid(cell: str, precisions: tuple[str, ...]) -> list[Timed]:
    title = GRID.format(cell=cell, precisions=" and ".join(precisions))
    AIMS[title] = (1.5, 1.0)
    return [
        Timed(title, Case(kind, cell, T, B, H, dtype=precision))
        for H, T in STEPS.items()
        for precision in precisions
        for B in BATCHES
        for kind in (INFERENCE, TRAINING)
    ]


def _quick() -> list[Timed]:
    return [
        *(
            Timed("Quick", Case(kind, cell, 128, B, H, dtype=dtype))
            for cell, B, H, dtype in (
                ("LSTM", 8, 256, "bfloat16"),
                ("LSTM", 32, 1024, "float16"),
                ("GRU", 8, 512, "bfloat16"),
                ("LSTM", 8, 256, "tf32"),
                ("GRU", 8, 256, "float32"),
            )
            for kind in (INFERENCE, TRAINING)
        ),
        Timed(RAGGED, Case(TRAINING, "LSTM", 128, 32, 256, ragged=True, dtype="bfloat16")),
    ]


def _tiny() -> list[Timed]:
    return [
        *(
            Timed("Rehearsal", Case(kind, cell, 3, 2, 16, I=4, dtype=dtype))
            for cell, dtype in (("LSTM", "bfloat16"), ("GRU", "float32"))
            for kind in (INFERENCE, TRAINING)
        ),
        Timed(RAGGED, Case(TRAINING, "LSTM", 4, 3, 8, ragged=True, dtype="float16")),
    ]


AIMS[RAGGED] = (3.0, 1.0)
