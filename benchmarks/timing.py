"""How time is taken: turns in rounds, in one process, with idle threads in between.

Libraries keep their worker threads spinning for a while after a call (OpenBLAS, OpenMP, ONNX
Runtime), and a spinning thread takes a core from whoever runs next. So before every turn we wait
until the process uses no processor time; it costs some milliseconds, and waits at most a quarter of
a second for a thread that never rests.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from itertools import repeat
from typing import Any, TypeVar

__all__ = ["race", "settle", "turn"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

BATCH = 1e-3  # seconds; shorter calls are timed several at once


def settle(longest: float = 0.25) -> None:
    """Returns when no thread of this process is busy."""
    pause = 2e-3
    deadline = time.perf_counter() + longest
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(pause)
        if time.process_time() - before < 0.1 * pause:
            return


def turn(call: Callable[[], Any], select: Callable[[], None], seconds: float) -> float:
    """Seconds a call takes: the median over as many as fit into `seconds`, at least one.

    The first call of a turn wakes threads and fills caches and does not count. The collector
    of cycles rests meanwhile.
    """
    select()
    settle()
    gc.disable()
    try:
        begin = time.perf_counter()
        call()
        once = time.perf_counter() - begin
        number = max(1, round(BATCH / once))
        samples = []
        end = time.perf_counter() + seconds
        while True:
            begin = time.perf_counter()
            for _ in repeat(None, number):
                call()
            now = time.perf_counter()
            samples.append((now - begin) / number)
            if now + samples[-1] * number > end:
                return statistics.median(samples)
    finally:
        gc.enable()


def race(
    contestants: Mapping[Key, Callable[[], Value]],
    rounds: int,
    budget: float,
    drop: Callable[[Mapping[Key, list[Value]]], set[Key]],
) -> dict[Key, list[Value]]:
    """Every contestant's values, a round each; each round begins with another contestant.

    Args:
        contestants: Functions that take one turn each.
        rounds: How many.
        budget: Seconds; a contestant that has used up so many sits out the rounds that remain.
        drop: Called after the first round; the contestants it returns sit out likewise.
    """
    values: dict[Key, list[Value]] = {key: [] for key in contestants}
    spent = dict.fromkeys(contestants, 0.0)
    active = list(contestants)
    for number in range(rounds):
        first = number % len(active)
        for key in active[first:] + active[:first]:
            begin = time.perf_counter()
            values[key].append(contestants[key]())
            spent[key] += time.perf_counter() - begin
        out = drop(values) if number == 0 else set()
        active = [key for key in active if key not in out and spent[key] < budget]
        if not active:
            break
    return values
