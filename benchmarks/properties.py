"""What the tables of cases do not show: fastrnn beside itself, each figure with what is expected.

Whether rows that end early cost nothing, what checkpoints save, whether a step takes as long in a
long sequence as in a short one, whether an idle pool is idle, what a second thread brings. Ratios
of times were taken in turn, so that a noisy machine hits both alike.
"""

from __future__ import annotations

import gc
import operator
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import fastrnn
import numpy as np
from fastrnn import _core

from benchmarks import memory
from benchmarks.cases import Array
from benchmarks.timing import race, settle, turn

__all__ = ["NORMAL", "TINY", "Property", "Sizes", "measure"]

HOLDS: dict[str, Callable[[float, float], bool]] = {
    "≤": operator.le,
    "≥": operator.ge,
    "<": operator.lt,
}
BUDGET = 5.0  # seconds of all turns of one contestant
IDLE_PAIRS = 5  # times that the pool falls idle
# Seconds until the pool sleeps and the system has booked what it used: of a thread that runs it
# books some only at the next tick, 4 ms later or 10.
FALL_ASLEEP = 0.02
IN_A_ROW = 20  # calls without a pause, before each of them


class Sizes(NamedTuple):
    """How large and how long."""

    T: int = 64
    B: int = 32
    H: int = 256
    one_row: int = 100  # T where B = 1
    vocabulary: int = 10_000
    long: int = 1000  # T of the checkpoints
    every: int = 32
    lengths: tuple[int, ...] = (100, 1000, 10_000, 100_000)  # T at B = 1 and H = narrow
    narrow: int = 64
    idle: float = 1.0  # seconds
    rounds: int = 9
    few: int = 3  # rounds of what takes long
    seconds: float = 0.05  # of a turn


NORMAL = Sizes()  # some 50 seconds on two cores
# Shows that all of it runs, measures nothing.
TINY = Sizes(5, 3, 8, 5, 50, 20, 4, (5, 50), 8, 0.01, 2, 1, 0.001)


@dataclass(frozen=True)
class Property:
    """A line of the table.

    Attributes:
        value: In `unit`; None when it could not be measured, and `how` says why.
        bound: ("≤", 1.2), or None where nothing in particular is expected.
        how: What was done.
        details: What else a program may want.
    """

    name: str
    value: float | None
    bound: tuple[str, float] | None
    how: str
    unit: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether it is as expected; None where nothing is, or nothing was measured."""
        if self.value is None or self.bound is None:
            return None
        sign, limit = self.bound
        return HOLDS[sign](self.value, limit)

    @property
    def measured(self) -> str:
        return "–" if self.value is None else self._text(self.value)

    @property
    def expected(self) -> str:
        return "" if self.bound is None else f"{self.bound[0]} {self._text(self.bound[1])}"

    def _text(self, value: float) -> str:
        number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{number} {self.unit}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def measure(sizes: Sizes = NORMAL) -> Iterator[Property]:
    """All of them, one after the other."""
    before = fastrnn.get_num_threads()
    try:
        # A call uses no more threads than this, whatever it asks for.
        fastrnn.set_num_threads(_core.available_threads())
        for group in (ragged, double, one_hot, checkpoints, lengths, idle, two_threads):
            gc.collect()
            yield from group(sizes)
    finally:
        fastrnn.set_num_threads(before)


def ragged(sizes: Sizes) -> Iterator[Property]:
    T, B, H = sizes.T, sizes.B, sizes.H
    row_lengths = np.random.default_rng(1).permutation(np.linspace(1, T, B).round().astype(int))
    layer, x, dy = fastrnn.LSTM(H, H), draw(T, B, H), draw(T, B, H)
    times = in_turn(
        sizes,
        {
            "ragged": training(layer, x, dy, lengths=row_lengths),
            "full": training(layer, x, dy),
        },
    )
    part = float(row_lengths.sum()) / (B * T)
    yield Property(
        "ragged batch: time over its part of the full batch's",
        part_of(times, "ragged", "full") / part,
        ("≤", 1.2),
        f"LSTM {shape(T, B, H)}, forward and backward; lengths 1 to {T} in no order, "
        f"{100 * part:.0f} % of all steps",
    )


def double(sizes: Sizes) -> Iterator[Property]:
    T, B, H = sizes.T, sizes.B, sizes.H
    times = in_turn(
        sizes,
        {
            dtype: inference(fastrnn.LSTM(H, H, dtype=dtype), draw(T, B, H).astype(dtype))
            for dtype in ("float32", "float64")
        },
    )
    yield Property(
        "float64: operations a second over those in float32",
        part_of(times, "float32", "float64"),
        ("≥", 0.45),
        f"LSTM {shape(T, B, H)}, inference on frozen layers",
    )


def one_hot(sizes: Sizes) -> Iterator[Property]:
    T, B, H = sizes.T, sizes.B, sizes.H
    ids = np.random.default_rng(1).integers(0, sizes.vocabulary, (T, B))
    wide, dense = fastrnn.LSTM(sizes.vocabulary, H), fastrnn.LSTM(H, H)
    x, dy = draw(T, B, H), draw(T, B, H)
    into = {
        layer: {name: np.zeros_like(array) for name, array in layer.params.items()}
        for layer in (wide, dense)
    }
    expected = ("≤", 1.0)
    for what, bound, calls in (
        (
            "inference on frozen layers",
            expected,
            {"ids": inference(wide, ids), "dense": inference(dense, x)},
        ),
        (
            "forward and backward, gradients added to arrays that are there",
            expected,
            {
                "ids": training(wide, ids, dy, into=into[wide]),
                "dense": training(dense, x, dy, into=into[dense]),
            },
        ),
        (
            "forward and backward, gradients in new arrays",  # for every token of the vocabulary
            None,
            {"ids": training(wide, ids, dy), "dense": training(dense, x, dy)},
        ),
    ):
        yield Property(
            f"one-hot input of {sizes.vocabulary:,}: time over dense input's, {what}",
            part_of(in_turn(sizes, calls), "ids", "dense"),
            bound,
            f"LSTM {shape(T, B, H)}; integers beside numbers of I={H}",
        )


def checkpoints(sizes: Sizes) -> Iterator[Property]:
    T, B, H, every = sizes.long, sizes.B, sizes.H, sizes.every
    layer, x, dy = fastrnn.LSTM(H, H), draw(T, B, H), draw(T, B, H)
    times = in_turn(
        sizes,
        {
            "all": training(layer, x, dy),
            "some": training(layer, x, dy, checkpoint_every=every),
        },
        sizes.few,
    )
    what = f"LSTM {shape(T, B, H)}, forward and backward"
    yield Property(
        f"checkpoints every {every} steps: time over that without",
        part_of(times, "some", "all"),
        ("≤", 1.35),
        what,
    )
    del layer, x, dy
    how = f"{what}; largest resident size less that before the call, in a process of its own"
    found: dict[str, float | None] = {}
    why: dict[str, str] = {}
    for key, name, kind, kept in (
        ("ours", "memory added", "training", 0),
        ("some", f"memory added with checkpoints every {every} steps", "training", every),
        ("PyTorch", "memory that PyTorch adds", "pytorch", 0),
    ):
        found[key], why[key] = mebibytes(kind, T, B, H, kept)
        yield Property(name, found[key], None, why[key] or how, "MiB")
    theirs = found["PyTorch"]
    for key, name, bound in (
        ("ours", "memory added, over PyTorch's", 0.5),
        ("some", f"memory added with checkpoints every {every} steps, over PyTorch's", 0.16),
    ):
        ours = found[key]
        ratio = ours / theirs if ours is not None and theirs else None
        reason = why[key] or why["PyTorch"] or "not measured: PyTorch added nothing"
        yield Property(name, ratio, ("≤", bound), how if ratio is not None else reason)


def lengths(sizes: Sizes) -> Iterator[Property]:
    H, longest = sizes.narrow, max(sizes.lengths)
    frozen, x = fastrnn.LSTM(H, H).freeze(), draw(longest, 1, H)
    times = in_turn(sizes, {T: partial(frozen, x[:T], threads=1) for T in sizes.lengths})
    steps = {T: statistics.median(rounds) / T for T, rounds in times.items()}
    least, most = min(steps.values()), max(steps.values())
    shown = ", ".join(f"{T:,}" for T in sizes.lengths)
    yield Property(
        "time a step in short and long sequences: (largest - least) / least",
        100 * (most - least) / least,
        ("≤", 5.0),
        f"LSTM B=1 H={H}, inference on a frozen layer, one thread; T = {shown}",
        "%",
        {"T": list(steps), "seconds_a_step": list(steps.values())},
    )
    value, why = mebibytes("inference", longest, 1, H)
    if value is not None:
        value -= 4 * longest * H / 2**20
    yield Property(
        f"memory added by inference at T = {longest:,}, beyond input and output",
        value,
        None,
        why
        or f"LSTM B=1 H={H} on a frozen layer; largest resident size less that before the call "
        "and less the output, in a process of its own",
        "MiB",
    )


def idle(sizes: Sizes) -> Iterator[Property]:
    later_name = f"first call after {sizes.idle:g} s idle, less one in a row"
    used_name = f"idle pool: processor time while the caller sleeps for {sizes.idle:g} s"
    T, H = sizes.one_row, sizes.H
    layer, x = fastrnn.LSTM(H, H), draw(T, 1, H)
    how = f"LSTM {shape(T, 1, H)}, inference on a frozen layer; median of {IDLE_PAIRS}"
    # On one thread no pool takes part: what a first call costs there is the machine's (caches that
    # others have used meanwhile, a processor that has to wake up).
    _, alone = rests(sizes, inference(layer, x, 1))
    yield Property(f"{later_name}, one thread", 1e6 * alone, None, how, "µs")
    if _core.available_threads() < 2:
        yield Property(f"{later_name}, two threads", None, ("≤", 50.0), ONE_THREAD, "µs")
        yield Property(used_name, None, ("<", 0.1), ONE_THREAD, "%")
        return
    used, later = rests(sizes, inference(layer, x, 2))
    yield Property(f"{later_name}, two threads", 1e6 * later, ("≤", 50.0), how, "µs")
    yield Property(used_name, 100 * used, ("<", 0.1), f"{how}, two threads", "%")


def rests(sizes: Sizes, call: Callable[[], Any]) -> tuple[float, float]:
    """Processors in use while the caller sleeps, and seconds by which the next call is longer."""
    used, later = [], []
    settle()  # other libraries' threads
    gc.disable()
    try:
        for _ in range(IDLE_PAIRS):
            in_a_row = [seconds(call) for _ in range(IN_A_ROW)]
            time.sleep(FALL_ASLEEP)
            before, begin = time.process_time(), time.perf_counter()
            time.sleep(sizes.idle)
            used.append((time.process_time() - before) / (time.perf_counter() - begin))
            later.append(seconds(call) - statistics.median(in_a_row))
    finally:
        gc.enable()
    return statistics.median(used), statistics.median(later)


def two_threads(sizes: Sizes) -> Iterator[Property]:
    name = "two threads: times as fast as one, "
    yield second_processor(sizes, f"{name}the machine's multiply-adds")
    T, B, H, one = sizes.T, sizes.B, sizes.H, sizes.one_row
    plain, both = fastrnn.LSTM(H, H), fastrnn.LSTM(H, H, bidirectional=True)
    deep = fastrnn.LSTM(H, H, 3)
    x, dy, row = draw(T, B, H), draw(T, B, H), draw(one, 1, H)
    for what, bound, how, call in (
        (
            "inference",
            1.85,
            f"LSTM {shape(T, B, H)} on a frozen layer",
            partial(inference, plain, x),
        ),
        (
            "forward and backward",
            1.85,
            f"LSTM {shape(T, B, H)}",
            partial(training, plain, x, dy),
        ),
        (
            "both directions, one row",
            1.7,
            f"LSTM {shape(one, 1, H)} in both directions, inference on a frozen layer",
            partial(inference, both, row),
        ),
        (
            "three layers, one row",
            1.7,
            f"LSTM {shape(one, 1, H)} of 3 layers, inference on a frozen layer",
            partial(inference, deep, row),
        ),
    ):
        if _core.available_threads() < 2:
            yield Property(name + what, None, ("≥", bound), ONE_THREAD)
            continue
        times = in_turn(sizes, {count: call(threads=count) for count in (1, 2)})
        yield Property(name + what, part_of(times, 1, 2), ("≥", bound), how)


def second_processor(sizes: Sizes, name: str) -> Property:
    """What a second thread can bring at most: two processors may be one core's."""
    if _core.available_threads() < 2:
        return Property(name, None, None, ONE_THREAD)

    def rate(threads: int) -> float:
        settle()
        return float(_core.measure_limits(threads, seconds=sizes.seconds)["gflops"])

    ratios = [1 / rate(1) * rate(2) for _ in range(sizes.rounds)]
    how = f"{sizes.rounds} rounds, the least {min(ratios):.2f}, the most {max(ratios):.2f}"
    return Property(name, statistics.median(ratios), None, how)


ONE_THREAD = "not measured: this process may use one thread"


def draw(*dimensions: int) -> Array:
    return np.random.default_rng(0).standard_normal(dimensions, np.float32)


def shape(T: int, B: int, H: int) -> str:
    return f"T={T} B={B} H={H}"


def inference(layer: fastrnn.LSTM, x: Array, threads: int | None = None) -> Callable[[], Any]:
    return partial(layer.freeze(), x, threads=threads)


def training(
    layer: fastrnn.LSTM,
    x: Array,
    dy: Array,
    threads: int | None = None,
    into: dict[str, Array] | None = None,
    **options: Any,
) -> Callable[[], Any]:
    def call() -> Any:
        y, _, tape = layer.forward(x, threads=threads, **options)
        return y, tape.backward(dy, into=into, threads=threads)

    return call


def in_turn(
    sizes: Sizes, calls: Mapping[Any, Callable[[], Any]], rounds: int | None = None
) -> dict[Any, list[float]]:
    """Seconds of each call, a value a round."""
    contestants = {
        key: partial(turn, call, lambda: None, sizes.seconds) for key, call in calls.items()
    }
    return race(contestants, rounds or sizes.rounds, BUDGET, lambda values: set())


def part_of(times: Mapping[Any, list[float]], this: Any, that: Any) -> float:
    """The median of the rounds' ratios of times."""
    return statistics.median(a / b for a, b in zip(times[this], times[that], strict=False))


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def mebibytes(kind: str, T: int, B: int, H: int, every: int = 0) -> tuple[float | None, str]:
    """The memory that a call adds and "", or None and why it could not be measured."""
    try:
        return memory.in_a_process(kind, T, B, H, every) / 2**20, ""
    except memory.NotMeasuredError as failed:
        return None, f"not measured: {failed}"
