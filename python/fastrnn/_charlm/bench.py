"""``fastrnn bench``: what the layers reach on this machine, beside the same equations in NumPy.

The full comparison, with other libraries, is ``make bench`` in the source tree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

import fastrnn
from fastrnn import reference
from fastrnn._charlm.model import Settings, build
from fastrnn.nn import softmax_cross_entropy
from fastrnn.optim import Adam

__all__ = ["table"]

Job = Callable[[], Any]

# (cell, I = H, B, T)
SHAPES = (("LSTM", 128, 16, 64), ("LSTM", 256, 32, 64), ("GRU", 256, 32, 64))
GATES = {"LSTM": 4, "GRU": 3}
OURS = 5  # our runs for each of NumPy's, which take ten times as long


def table(console: rich.console.Console, threads: int | None, seconds: float) -> None:
    """Measures and prints; every figure is the best of the runs that fit into ``seconds``."""
    used = fastrnn.get_num_threads() if threads is None else threads
    console.print(f"float32, I = H, {used} thread{'s' if used > 1 else ''}", highlight=False)
    out = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("layer", "pass"):
        out.add_column(heading)
    for heading in ("H", "B", "T", "µs/step", "GF/s", "times NumPy"):
        out.add_column(heading, justify="right")
    for cell, H, B, T in SHAPES:
        # Training is forward and backward: beside the forward products, as many for the gradient
        # by what each multiplied, and as many for the gradient by the weights.
        for name, share, jobs in zip(
            ("inference", "training"), (1, 3), _layer_jobs(cell, H, B, T, threads), strict=True
        ):
            ours, theirs = _best(jobs[0], seconds, jobs[1])
            flops = share * 2.0 * GATES[cell] * H * (H + H) * B * T
            figures = f"{ours / T * 1e6:.1f}", f"{flops / ours / 1e9:.0f}", f"{theirs / ours:.1f}"
            out.add_row(cell, name, str(H), str(B), str(T), *figures)
    console.print(out)
    step = _best(_stream(), seconds)[0]
    console.print(f"stream, LSTM 128, B = 1: {step * 1e6:.1f} µs/step", highlight=False)
    work, characters = _character_step(threads)
    speed = characters / _best(work, seconds)[0]
    console.print(f"the model of `fastrnn train`: {speed:,.0f} characters/s", highlight=False)


def _layer_jobs(
    cell: str, H: int, B: int, T: int, threads: int | None
) -> tuple[tuple[Job, Job], tuple[Job, Job]]:
    """Inference and training, each as (ours, the same in NumPy)."""
    rng = np.random.default_rng(0)
    layer = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU}[cell](H, H, rng=rng)
    plain = {"LSTM": reference.lstm_forward, "GRU": reference.gru_forward}[cell]
    plain_backward = {"LSTM": reference.lstm_backward, "GRU": reference.gru_backward}[cell]
    x = rng.standard_normal((T, B, H), dtype=np.float32)
    dy = rng.standard_normal((T, B, H), dtype=np.float32)
    weights = dict(layer.params)
    return (
        (lambda: layer(x, threads=threads), lambda: plain(x, weights)),
        (
            lambda: layer.forward(x, threads=threads)[2].backward(dy, threads=threads),
            lambda: plain_backward(plain(x, weights)[2], dy),
        ),
    )


def _stream() -> Job:
    rng = np.random.default_rng(0)
    stream = fastrnn.LSTM(128, 128, rng=rng).freeze().stream(1)
    x = rng.standard_normal((1, 128), dtype=np.float32)
    out = np.empty((1, 128), dtype=np.float32)
    return lambda: stream.step(x, out=out)


def _character_step(threads: int | None) -> tuple[Job, int]:
    settings, V = Settings(), 103
    rng = np.random.default_rng(0)
    model = build(settings, V, rng)
    optimizer = Adam(model, lr=0.0)
    ids = rng.integers(0, V, (settings.window + 1, settings.batch))

    def step() -> None:
        logits, _, tape = model.forward(ids[:-1], threads=threads)
        _, dlogits = softmax_cross_entropy(logits, ids[1:], threads=threads)
        optimizer.step(tape.backward(dlogits, threads=threads).params, clip_norm=settings.clip)

    return step, settings.window * settings.batch


def _best(work: Job, seconds: float, other: Job | None = None) -> tuple[float, float]:
    """The shortest times of ``work`` and ``other``, run in turns: both meet the same machine."""
    jobs = [work] * OURS + ([other] if other else [])
    best = dict.fromkeys(jobs, math.inf)
    work()  # the first call pays for pages, threads and caches
    end = time.perf_counter() + seconds
    while True:
        for job in jobs:
            begin = time.perf_counter()
            job()
            best[job] = min(best[job], time.perf_counter() - begin)
        if time.perf_counter() >= end:
            return best[work], best[other] if other else math.inf
