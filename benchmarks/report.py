"""How results are shown: lines on the console, a Markdown page, a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import CHARACTERS, KINDS
from benchmarks.peers import OURS, Peer
from benchmarks.results import Result, summary

__all__ = ["as_json", "console_header", "console_line", "console_summary", "markdown"]

LEGEND = """\
float32 unless stated; I = H unless stated. T steps, B batch rows, I inputs, H hidden units.

- **threads**: with how many fastrnn was fastest; every library counts at its own best number of
  threads (one or all). **speed-up**: our time on one thread over that
  on all.
- **GF/s**: multiplications and additions of the matrix products (training: three times those of
  inference; the cells' own arithmetic is not counted) per second.
- **of peak**: that, as a part of the fused multiply-adds that as many threads of this machine
  reach, measured in the same rounds.
- **of read limit** (B = 1): the shortest possible time as a part of ours. A step cannot start
  before the last one has ended and needs all of W_hh, so that the limit is the time to read it at
  the bandwidth of a working set of its size, measured in the same rounds, plus the arithmetic of
  the input's product at the FMA peak (one step: the time to read W_ih and W_hh).
- **× a library**: its time over ours; above 1 fastrnn is faster. "–": it cannot do that. Inputs and
  weights are handed to each library in its own format; converting them is not timed. Inference of
  ours is on a frozen layer, whose weights are packed, like those of an ONNX Runtime session.
- Before anything is timed, every library's results (outputs and all gradients) are compared with
  ours on the same weights.
- All take turns in one process, {rounds} rounds; a figure is the median over the rounds, a ratio
  the median of the rounds' ratios. Before every turn we wait until no thread of any library spins.
"""


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _ratio(value: float | None) -> str:
    return "–" if value is None else _number(value)


def _cells(result: Result, peers: Sequence[str]) -> list[str]:
    """A line of the tables, without the case."""
    speed_up = result.speed_up()
    characters = result.case.kind == CHARACTERS  # more than products in there
    return [
        result.shown_time(),
        str(result.threads(OURS)),
        "" if speed_up is None else f"{speed_up:.2f}",
        _number(result.rate()),
        "" if characters else _percent(result.of_peak()),
        _percent(result.of_read_limit()),
        *(_ratio(result.ratio(peer)) for peer in peers),
    ]


COLUMNS = ("fastrnn", "threads", "speed-up", "GF/s", "of peak", "of read limit")
WIDTHS = (15, 8, 9, 6, 8, 14)


def console_header(width: int, peers: Sequence[str]) -> str:
    names = "".join(f"{name:>{size}}" for name, size in zip(COLUMNS, WIDTHS, strict=True))
    return f"{'':{width}}{names}" + "".join(f"{'× ' + peer:>{len(peer) + 4}}" for peer in peers)


def console_line(result: Result, width: int, peers: Sequence[str]) -> str:
    widths = [*WIDTHS, *(len(peer) + 4 for peer in peers)]
    cells = zip(_cells(result, peers), widths, strict=True)
    line = f"{result.case.name:{width}}" + "".join(f"{cell:>{size}}" for cell, size in cells)
    return "\n".join([line, *(f"  {failure}" for failure in result.failures)])


def console_summary(results: Sequence[Result], peers: Sequence[str]) -> str:
    return "\n".join(
        f"{line['kind']}: × {line['peer']}: geometric mean {_number(line['geometric_mean'])} over "
        f"{line['cases']}, least {_number(line['least'])} ({line['where']})"
        for line in summary(results, peers)
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("--:" for _ in header[1:])]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def notes(results: Sequence[Result], machine: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if machine["load average before"] > 0.3:
        found.append(
            f"The machine was not idle: its load average was {machine['load average before']} "
            "before the run, and the figures are noise to that degree."
        )
    spread = sorted(result.spread() for result in results)
    if spread:
        found.append(
            f"Our times differ between the rounds by {_percent(spread[len(spread) // 2])} of "
            f"their median (the median case; the worst {_percent(spread[-1])})."
        )
    found += [f"**Failed:** {line}" for result in results for line in result.failures]
    return found


def markdown(
    results: Sequence[Result],
    peers: Sequence[Peer],
    machine: dict[str, Any],
    limits: dict[str, Any],
    rounds: int,
    plots: Sequence[tuple[str, str]],
) -> str:
    """The page; plots are (title, file name)."""
    names = [peer.name for peer in peers if peer.name != OURS]
    lines = [f"# fastrnn's benchmarks, {machine['date'][:10]}", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items() if value != ""]
    versions = ", ".join(f"{peer.name} {peer.version}" for peer in peers)
    lines += [f"- compared: {versions}", ""]
    lines += [f"{note}\n" for note in notes(results, machine)]
    for title, file in plots:
        lines += [f"![{title}]({file})", ""]
    for kind, title in KINDS.items():
        chosen = [result for result in results if result.case.kind == kind]
        if chosen:
            rows = [[result.case.label, *_cells(result, names)] for result in chosen]
            header = ["", *COLUMNS, *(f"× {name}" for name in names)]
            lines += [f"## {title}", "", *_table(header, rows), ""]
    lines += ["## In short", ""]
    rows = [
        [
            f"{line['kind']}, × {line['peer']}",
            str(line["cases"]),
            _number(line["geometric_mean"]),
            f"{_number(line['least'])} ({line['where']})",
        ]
        for line in summary(results, names)
    ]
    lines += [*_table(["", "cases", "geometric mean", "least"], rows), ""]
    lines += ["## The machine's limits", ""]
    threads = list(limits["gflops"])
    rows = [["FMA peak, GF/s", *(_number(limits["gflops"][n]) for n in threads)]]
    for size, values in limits["gbytes_per_s"].items():
        name = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        rows.append([f"read {name}, GB/s", *(_number(values[n]) for n in threads)])
    header = ["", *(f"{n} thread{'s' if n > 1 else ''}" for n in threads)]
    lines += [*_table(header, rows), "", "## How to read this", "", LEGEND.format(rounds=rounds)]
    return "\n".join(lines)


def as_json(
    results: Sequence[Result],
    peers: Sequence[Peer],
    machine: dict[str, Any],
    limits: dict[str, Any],
    rounds: int,
) -> dict[str, Any]:
    """Everything, for programs."""
    names = [peer.name for peer in peers if peer.name != OURS]
    return {
        "format": 1,
        "machine": machine,
        "versions": {peer.name: peer.version for peer in peers},
        "limits": limits,
        "rounds": rounds,
        "notes": notes(results, machine),
        "summary": summary(results, names),
        "results": [result.as_dict() for result in results],
    }
