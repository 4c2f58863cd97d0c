"""What earlier runs found: history.csv beside the pages, a line for each case of each complete run.

A run is its date, machine and commit. Times of two days differ by the machine's mood too; ratios to
NumPy, which runs in the same rounds, do not.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import CHARACTERS
from benchmarks.results import Result, geometric_mean

__all__ = ["FILE", "Run", "append", "compare", "newest"]

FILE = "history.csv"
NUMBERS = (
    "seconds",
    "threads",
    "gflops",
    "of_peak",
    "times_numpy",
    "times_pytorch",
    "times_onnx_runtime",
    "times_jax",
)
COLUMNS = ("date", "machine", "commit", "instruction_set", "case", *NUMBERS)
MOST = 3  # cases that gained most, and as many that lost most


class Run(NamedTuple):
    """An earlier run: case → seconds a call, and case → NumPy's time over ours."""

    date: str
    commit: str
    seconds: dict[str, float]
    times_numpy: dict[str, float]


def append(
    path: Path, results: Sequence[Result], date: str, machine: str, commit: str, isa: str
) -> None:
    """Adds a run's lines, and before the first run the names of the columns."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for result in results:
            # A character model is more than products: a part of the peak says nothing there.
            of_peak = None if result.case.kind == CHARACTERS else result.of_peak()
            peers = ("NumPy", "PyTorch", "ONNX Runtime", "JAX")
            ratios = [result.ratio(peer) for peer in peers]
            numbers = [result.time(), result.threads("fastrnn"), result.rate(), of_peak, *ratios]
            texts = ["" if number is None else f"{number:.6g}" for number in numbers]
            writer.writerow([date, machine, commit, isa, result.case.name, *texts])


def newest(path: Path, machine: str, isa: str, cases: Collection[str]) -> Run | None:
    """The newest run of the same machine and instruction set that has one of the cases.

    None where there is none.

    Raises:
        ValueError: The file is not one that `append` wrote; the message says where.
    """
    if not path.exists():
        return None
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in _lines(path):
        if (line["machine"], line["instruction_set"]) == (machine, isa) and line["case"] in cases:
            runs.setdefault((line["date"], line["commit"]), []).append(line)
    if not runs:
        return None
    # Dates are written so that they sort; of two runs in one minute the later in the file.
    (date, commit), lines = max(reversed(runs.items()), key=lambda item: item[0][0])
    return Run(
        date,
        commit,
        {line["case"]: float(line["seconds"]) for line in lines},
        {line["case"]: float(line["times_numpy"]) for line in lines if line["times_numpy"]},
    )


def _lines(path: Path) -> list[dict[str, str]]:
    """All lines but the first, checked."""

    def wrong(line: int, what: str) -> ValueError:
        return ValueError(f"{path}, line {line}: {what}; mend the file, or move it away")

    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.reader(text.splitlines(), strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: no table: {error}; mend the file, or move it away") from None
    if not rows or tuple(rows[0][1]) != COLUMNS:
        raise wrong(1, f"expected the columns {','.join(COLUMNS)}")
    for number, row in rows[1:]:
        if len(row) != len(COLUMNS):
            raise wrong(number, f"expected {len(COLUMNS)} fields, not {len(row)}")
        for name, value in zip(COLUMNS, row, strict=True):
            if name in NUMBERS and not _is_number(value, empty=name != "seconds"):
                raise wrong(number, f"expected a positive number for {name}, not {value!r}")
    if not text.endswith("\n"):
        raise wrong(rows[-1][0], "the line does not end")
    return [dict(zip(COLUMNS, row, strict=True)) for _, row in rows[1:]]


def _is_number(text: str, *, empty: bool) -> bool:
    """Whether it is a positive number, or nothing where that may be."""
    if not text:
        return empty
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def compare(before: Run, results: Sequence[Result]) -> dict[str, Any]:
    """What became faster (above 1) and slower: in time, and in the ratio to NumPy.

    {"date", "commit", "kinds", "gained", "lost"}: for each kind the geometric means over the cases
    that both runs have; then the cases that gained and lost most time.
    """
    lines: list[dict[str, Any]] = []
    for result in results:
        name = result.case.name
        if name in before.seconds:
            now, then = result.ratio("NumPy"), before.times_numpy.get(name)
            lines.append(
                {
                    "case": name,
                    "kind": result.case.kind,
                    "time": before.seconds[name] / result.time(),
                    "to_numpy": now / then if now is not None and then is not None else None,
                }
            )
    kinds = []
    for kind in dict.fromkeys(line["kind"] for line in lines):
        chosen = [line for line in lines if line["kind"] == kind]
        ratios = [line["to_numpy"] for line in chosen if line["to_numpy"] is not None]
        kinds.append(
            {
                "kind": kind,
                "cases": len(chosen),
                "time": geometric_mean([line["time"] for line in chosen]),
                "to_numpy": geometric_mean(ratios) if ratios else None,
            }
        )
    order = sorted(lines, key=lambda line: line["time"], reverse=True)
    return {
        "date": before.date,
        "commit": before.commit,
        "kinds": kinds,
        "gained": [line for line in order if line["time"] > 1][:MOST],
        "lost": [line for line in reversed(order) if line["time"] < 1][:MOST],
    }
