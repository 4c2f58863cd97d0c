"""What is concluded from the rounds of a case.

A round's values belong together: a ratio, or a part of a limit, is taken within each round, and
the median of those is the figure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.cases import CHARACTERS, INFERENCE, STEP, TRAINING, Case
from benchmarks.peers import OURS

__all__ = ["BEST_OF", "Result", "format_seconds", "geometric_mean", "shares", "summary"]

BEST_OF = ("PyTorch", "ONNX Runtime")  # a user would take the faster one


@dataclass
class Result:
    """A case's measurements, a value for each round.

    Some may have fewer rounds than others: those that were too slow for all of them.

    Attributes:
        seconds: Library → threads → seconds a call.
        limits: Threads → (GF/s, GB/s, tile GF/s) of the machine; 0 is what was not measured.
        failures: What did not agree or did not run, a line each.
    """

    case: Case
    seconds: dict[str, dict[int, list[float]]]
    limits: dict[int, list[tuple[float, float, float]]]
    failures: list[str] = field(default_factory=list)

    def threads(self, peer: str) -> int:
        """The number of threads with which a library is fastest; one, where more gain nothing."""
        times = {count: statistics.median(all_) for count, all_ in self.seconds[peer].items()}
        return min(count for count, time in times.items() if time <= 1.02 * min(times.values()))

    def rounds(self, peer: str) -> list[float]:
        return self.seconds[peer][self.threads(peer)]

    def time(self, peer: str = OURS) -> float:
        """Seconds a call."""
        return statistics.median(self.rounds(peer))

    def ratio(self, peer: str) -> float | None:
        """Its time over ours: above 1 we are faster. None where it cannot do the case."""
        if peer not in self.seconds:
            return None
        pairs = zip(self.rounds(peer), self.rounds(OURS), strict=False)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def best_ratio(self) -> float | None:
        """The faster of PyTorch and ONNX Runtime over ours."""
        ratios = [ratio for peer in BEST_OF if (ratio := self.ratio(peer)) is not None]
        return min(ratios, default=None)

    def rate(self) -> float:
        """Our GF/s."""
        return self.case.flops / self.time() / 1e9

    def of_peak(self, threads: int | None = None) -> float:
        """Our GF/s as a part of the FMA peak of as many threads; ours best when None."""
        threads = threads or self.threads(OURS)
        pairs = zip(self.limits[threads], self.seconds[OURS][threads], strict=False)
        return statistics.median(
            self.case.flops / seconds / (gflops * 1e9) for (gflops, _, _), seconds in pairs
        )

    def of_tile(self, threads: int | None = None) -> float | None:
        """As `of_peak`, of what tiles of a product reach in the first-level cache.

        None where B = 1, since a row is no tile, and where it was not measured.
        """
        threads = threads or self.threads(OURS)
        rounds = self.limits[threads]
        if self.case.B == 1 or not all(tile for _, _, tile in rounds):
            return None
        pairs = zip(rounds, self.seconds[OURS][threads], strict=False)
        return statistics.median(
            self.case.flops / seconds / (tile * 1e9) for (_, _, tile), seconds in pairs
        )

    def of_read_limit(self, threads: int | None = None) -> float | None:
        """The least time that reading the weights takes, over ours; None where it is no limit."""
        if not self.case.reads_weights:
            return None
        threads = threads or self.threads(OURS)
        pairs = zip(self.limits[threads], self.seconds[OURS][threads], strict=False)
        return statistics.median(
            self.case.shortest(gflops, gbytes) / seconds for (gflops, gbytes, _), seconds in pairs
        )

    def speed_up(self) -> float | None:
        """Our time on one thread over that on all; None on a machine with one."""
        times = self.seconds[OURS]
        if len(times) < 2:
            return None
        return statistics.median(
            one / all_ for one, all_ in zip(times[1], times[max(times)], strict=False)
        )

    def spread(self) -> float:
        """(Slowest - fastest) / median of our rounds."""
        rounds = self.rounds(OURS)
        return (max(rounds) - min(rounds)) / self.time()

    def shown_time(self) -> str:
        """Our time in the unit that suits the case."""
        if self.case.kind == CHARACTERS:
            return f"{self.case.rows / self.time():,.0f} chars/s"
        return format_seconds(self.time())

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file: the conclusions, then all rounds."""
        return {
            "name": self.case.name,
            "case": asdict(self.case),
            "flops": self.case.flops,
            "seconds": self.time(),
            "threads": self.threads(OURS),
            "gflops": self.rate(),
            "of_fma_peak": {threads: self.of_peak(threads) for threads in self.seconds[OURS]},
            "of_tile_limit": {threads: self.of_tile(threads) for threads in self.seconds[OURS]},
            "of_weight_read_limit": {
                threads: self.of_read_limit(threads)
                for threads in self.seconds[OURS]
                if self.case.reads_weights
            },
            "speed_up_of_threads": self.speed_up(),
            "ratios": {peer: self.ratio(peer) for peer in self.seconds if peer != OURS},
            "best_threads": {peer: self.threads(peer) for peer in self.seconds},
            "failures": self.failures,
            "rounds": {
                "seconds": self.seconds,
                "limits_gflops_gbytes_per_s_tile_gflops": self.limits,
            },
        }


def format_seconds(seconds: float) -> str:
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def summary(results: Iterable[Result], peers: Sequence[str]) -> list[dict[str, Any]]:
    """For each kind and library: the geometric mean of the ratios, the least one and its case."""
    lines = []
    results = list(results)
    for kind in dict.fromkeys(result.case.kind for result in results):
        columns = {
            peer: [(r.ratio(peer), r) for r in results if r.case.kind == kind] for peer in peers
        }
        if kind in (INFERENCE, STEP) and set(BEST_OF) <= set(peers):
            name = f"the faster of {' and '.join(BEST_OF)}"
            columns[name] = [(r.best_ratio(), r) for r in results if r.case.kind == kind]
        for name, pairs in columns.items():
            ratios = [(ratio, r.case.label) for ratio, r in pairs if ratio is not None]
            if ratios:
                least, where = min(ratios)
                lines.append(
                    {
                        "kind": kind,
                        "peer": name,
                        "cases": len(ratios),
                        "geometric_mean": geometric_mean([ratio for ratio, _ in ratios]),
                        "least": least,
                        "where": where,
                    }
                )
    return lines


def shares(results: Iterable[Result]) -> list[dict[str, Any]]:
    """How near we come to what limits a case: the median and the least over the cases.

    Of the peak and of the tile where there are many rows and units, of the read limit where there
    is one row.
    """
    results = list(results)
    many = [r for r in results if r.case.B >= 32 and r.case.H >= 256]
    lines = []
    for kind in (INFERENCE, TRAINING, STEP):
        large = [r for r in many if r.case.kind == kind]
        small = [r for r in results if r.case.kind == kind and r.case.reads_weights]
        for limit, which, found in (
            ("peak", "B ≥ 32, H ≥ 256", [(r.of_peak(), r.case.label) for r in large]),
            ("tile", "B ≥ 32, H ≥ 256", [(r.of_tile(), r.case.label) for r in large]),
            ("read limit", "B = 1", [(r.of_read_limit(), r.case.label) for r in small]),
        ):
            parts = [(part, label) for part, label in found if part is not None]
            if parts:
                least, where = min(parts)
                lines.append(
                    {
                        "kind": kind,
                        "which": which,
                        "limit": limit,
                        "cases": len(parts),
                        "median": statistics.median(part for part, _ in parts),
                        "least": least,
                        "where": where,
                    }
                )
    return lines
