"""The command: measures, prints, and writes benchmarks/results/<date>-<machine> pages and data.

A complete run also adds its lines to history.csv there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastrnn import _core

from benchmarks import cases, history, machine, plots, properties, report
from benchmarks.cases import Array, Case, Problem
from benchmarks.peers import OURS, Job, Peer, installed
from benchmarks.properties import Property
from benchmarks.results import Result
from benchmarks.timing import race, settle, turn

RESULTS = Path(__file__).parent / "results"

# Largest difference between libraries, as a part of a tensor's largest element.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}

# A library's other number of threads is not measured again when it was so many times slower than
# the better one in the first round. (Ours always is.)
HOPELESS = 1.5


class Effort(NamedTuple):
    """How long to measure: rounds, seconds of a turn, and of all turns of one contestant."""

    rounds: int
    seconds: float
    budget: float


STANDARD = Effort(5, 0.04, 5.0)
QUICK = Effort(2, 0.001, 5.0)
FULL = Effort(5, 0.03, 4.0)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 when a library's results did not agree with ours, or failed."""
    arguments = parse(argv)
    chosen, effort = cases.standard(), STANDARD
    if arguments.full:
        chosen, effort = cases.full(), FULL
    if arguments.quick:
        chosen, effort = cases.quick(), QUICK
    if arguments.properties:
        chosen = []
    chosen = [case for case in chosen if arguments.filter.search(case.name)]
    if not chosen and not arguments.properties:
        print(f"benchmarks: no case matches {arguments.filter.pattern!r}", file=sys.stderr)
        return 2
    some = bool(arguments.filter.pattern)
    begin = time.perf_counter()
    described = machine.describe()
    if arguments.name:
        described["conditions of this run"] = arguments.name
    host, isa = machine.slug(described), described["instruction set in use"]
    # Only complete runs have a history. What is wrong with it is said before they take their time.
    past, before = arguments.out / history.FILE, None
    recorded = not (arguments.quick or arguments.properties or arguments.name or some)
    if recorded:
        try:
            before = history.newest(past, host, isa, [case.name for case in chosen])
        except (OSError, ValueError) as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 2
    peers, missing = installed()
    names = [peer.name for peer in peers if peer.name != OURS]
    threads = sorted({1, _core.available_threads()})
    for key, value in described.items():
        print(f"{key}: {value}")
    print(f"compared: {', '.join(f'{peer.name} {peer.version}' for peer in peers)}")
    if missing:
        print(f"not installed, so not compared: pip install {' '.join(missing)}")
    print()

    settle()
    limits = machine.limits_table(threads, effort.seconds)
    results: list[Result] = []
    lines: list[Property] = []
    complete = False
    try:
        width = max((len(case.name) for case in chosen), default=0) + 1
        if chosen:
            print(report.console_header(width, names), flush=True)
        for case in chosen:
            results.append(measure(case, peers, threads, effort))
            print(report.console_line(results[-1], width, names), flush=True)
        if not some:
            print("\nProperties" if chosen else "Properties")
            sizes = properties.TINY if arguments.quick else properties.NORMAL
            for line in properties.measure(sizes):
                lines.append(line)
                print(report.console_property(line), flush=True)
        complete = True
    except KeyboardInterrupt:
        print("stopped; what was measured so far is written", file=sys.stderr)
    if not results and not lines:
        return 130
    raise_peaks(limits, results)
    since = history.compare(before, results) if before and complete else None
    texts = [report.missed(lines), report.console_summary(results, names)]
    texts += [report.console_since(since)] if since else []
    for text in filter(None, texts):
        print(f"\n{text}")
    print()
    for note in report.notes(results, described):
        print(note)
    # Only the whole default selection gets the plain name, and nothing less ever replaces it.
    suffix = "-full" * arguments.full + "-quick" * arguments.quick
    suffix += "-properties" * arguments.properties + "-part" * (some or not complete)
    suffix += f"-named-{arguments.name}" if arguments.name else ""
    files = write(
        arguments.out, results, lines, since, peers, described, limits, effort.rounds, suffix
    )
    if recorded and complete:
        history.append(past, results, described["date"], host, described["commit"], isa)
        files.append(past)
    print(f"{time.perf_counter() - begin:.0f} s; wrote {', '.join(str(file) for file in files)}")
    if not complete:
        return 130
    return 1 if any(result.failures for result in results) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def pattern(text: str) -> re.Pattern[str]:
        try:
            return re.compile(text, re.IGNORECASE)
        except re.error as error:
            raise argparse.ArgumentTypeError(f"no regular expression: {error}") from None

    def name(text: str) -> str:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text):
            raise argparse.ArgumentTypeError(f"expected a-z, 0-9 and -, got {text!r}")
        return text

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures fastrnn beside NumPy, PyTorch, ONNX Runtime and JAX, as far as they "
        "are installed. Without options: a selection of cases, some four minutes on two cores.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    size.add_argument("--full", action="store_true", help="cells × B × H; half an hour or more")
    size.add_argument("--properties", action="store_true", help="only the table of properties")
    parser.add_argument(
        "--filter",
        type=pattern,
        default=re.compile(""),
        metavar="REGEX",
        help='only cases whose name matches, such as "training LSTM.*H=256"',
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results"
    )
    parser.add_argument(
        "--name",
        type=name,
        metavar="NAME",
        help="for a run under conditions of its own: stands in its page and its files' names; "
        "history.csv and what is quoted leave it out",
    )
    arguments = parser.parse_args(argv)
    if arguments.properties and arguments.filter.pattern:
        parser.error("--filter chooses cases, of which --properties has none")
    return arguments


def measure(case: Case, peers: Sequence[Peer], threads: Sequence[int], effort: Effort) -> Result:
    """Compares the libraries' results, then lets the libraries and the machine race."""
    gc.collect()  # the last case's
    problem = Problem.of(case)
    result = Result(case, {}, {})
    jobs = prepare(problem, peers, threads, result.failures)
    contestants: dict[tuple[str, int], Callable[[], Any]] = {
        key: partial(turn, job.call, job.select, effort.seconds) for key, job in jobs.items()
    }
    working_set = case.working_set if case.reads_weights else 0

    def limits(count: int) -> tuple[float, float, float]:
        settle()
        return machine.measure_limits(count, working_set, effort.seconds / 4, case.dtype)

    for count in threads:
        contestants["", count] = partial(limits, count)
    values = race(contestants, effort.rounds, effort.budget, hopeless)
    for (name, count), rounds in values.items():
        if name:
            result.seconds.setdefault(name, {})[count] = rounds
        else:
            result.limits[count] = rounds
    return result


def raise_peaks(limits: dict[str, Any], results: Sequence[Result]) -> None:
    """A machine that reached more in the rounds than before them has that for its limit."""
    for result in results:
        if result.case.dtype == "float32":
            for count, rounds in result.limits.items():
                for key, place in (("gflops", 0), ("tile_gflops", 2)):
                    reached = statistics.median(values[place] for values in rounds)
                    limits[key][count] = max(limits[key][count], reached)


def hopeless(values: Mapping[tuple[str, int], list[Any]]) -> set[tuple[str, int]]:
    """Other libraries' thread counts that need no further rounds."""
    best: dict[str, float] = {}
    times = {key: rounds[0] for key, rounds in values.items() if key[0] not in ("", OURS)}
    for (name, _), seconds in times.items():
        best[name] = min(seconds, best.get(name, math.inf))
    return {key for key, seconds in times.items() if seconds > HOPELESS * best[key[0]]}


def prepare(
    problem: Problem, peers: Sequence[Peer], threads: Sequence[int], failures: list[str]
) -> dict[tuple[str, int], Job]:
    """The jobs of all that can do the case and agree with ours; why not goes to `failures`."""
    jobs: dict[tuple[str, int], Job] = {}
    expected: list[Array] = []
    for peer in peers:
        for count in threads if peer.threads else threads[-1:]:
            try:
                job = peer.prepare(problem, count)
                if job is None:
                    continue
                job.select()
                found = job.check()
            except Exception as error:
                if peer.name == OURS:
                    raise
                failures.append(f"{peer.name}, {count} threads: {type(error).__name__}: {error}")
                continue
            expected = expected or found
            difference = disagreement(found, expected, TOLERANCE[problem.case.dtype])
            if difference:
                failures.append(f"{peer.name}, {count} threads: {difference}")
            else:
                jobs[peer.name, count] = job
    return jobs


def disagreement(found: Sequence[Array], expected: Sequence[Array], tolerance: float) -> str:
    """What differs, "" when nothing does."""
    if len(found) != len(expected):
        return f"{len(found)} results, expected {len(expected)}"
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape:
            return f"result {k} has shape {a.shape}, expected {b.shape}"
        largest = float(np.abs(b).max(initial=0))
        error = float(np.abs(a - b).max(initial=0))
        if not error <= tolerance * max(largest, 1e-3):
            return f"result {k} differs by {error:.2g}, its largest element is {largest:.2g}"
    return ""


def write(
    out: Path,
    results: Sequence[Result],
    lines: Sequence[Property],
    since: dict[str, Any] | None,
    peers: Sequence[Peer],
    described: dict[str, Any],
    limits: dict[str, Any],
    rounds: int,
    suffix: str,
) -> list[Path]:
    """Writes the JSON, the pictures and the page that shows them."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{described['date'][:10]}-{machine.slug(described)}{suffix}"
    versions = ", ".join(f"{peer.name} {peer.version.split(' ')[0]}" for peer in peers)
    processor = described["processor"].partition(" (sse")[0]
    below = (
        f"{processor}, {described['threads']} threads, {described['instruction set in use']}; "
        f"{versions}; {described['date']}"
    )
    names = [peer.name for peer in peers]
    pictures = plots.draw(results, lines, names, limits, stem, below)
    page, data = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.json")
    everything = report.as_json(results, peers, described, limits, rounds, lines, since)
    data.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    text = report.markdown(
        results, peers, described, limits, rounds, pictures, properties=lines, since=since
    )
    page.write_text(text, encoding="utf-8")
    return [page, data, *(out / name for _, name in pictures)]


if __name__ == "__main__":
    sys.exit(main())
