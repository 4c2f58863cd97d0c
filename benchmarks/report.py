"""How results are shown: lines on the console, a Markdown page, a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import CHARACTERS, KINDS
from benchmarks.peers import OURS, Peer
from benchmarks.properties import Property
from benchmarks.results import Result, shares, summary

__all__ = [
    "as_json",
    "console_header",
    "console_line",
    "console_property",
    "console_since",
    "console_summary",
    "markdown",
    "missed",
]

LEGEND = """\
float32 unless stated; I = H unless stated. T steps, B batch rows, I inputs, H hidden units.

- **threads**: with how many fastrnn was fastest; every library counts at its own best number of
  threads (one or all). **speed-up**: our time on one thread over that
  on all.
- **GF/s**: multiplications and additions of the matrix products (training: three times those of
  inference; the cells' own arithmetic is not counted) per second.
- **of peak**: that, as a part of the fused multiply-adds that as many threads of this machine
  reach, measured in the same rounds.
- **of tile** (B > 1): the same, as a part of what a product of tiles reaches without leaving the
  first-level cache, measured in the same rounds: what remains between it and the peak is the load
  instructions and whatever else runs on the same core.
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

PROPERTIES = """\
What the cases do not show: fastrnn beside itself, or beside PyTorch where memory is concerned.
Times that are compared were taken in turn, and a ratio is the median over the rounds."""


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
        "" if characters else _percent(result.of_tile()),
        _percent(result.of_read_limit()),
        *(_ratio(result.ratio(peer)) for peer in peers),
    ]


COLUMNS = ("fastrnn", "threads", "speed-up", "GF/s", "of peak", "of tile", "of read limit")
WIDTHS = (15, 8, 9, 6, 8, 8, 14)


def console_header(width: int, peers: Sequence[str]) -> str:
    names = "".join(f"{name:>{size}}" for name, size in zip(COLUMNS, WIDTHS, strict=True))
    return f"{'':{width}}{names}" + "".join(f"{'× ' + peer:>{len(peer) + 4}}" for peer in peers)


def console_line(result: Result, width: int, peers: Sequence[str]) -> str:
    widths = [*WIDTHS, *(len(peer) + 4 for peer in peers)]
    cells = zip(_cells(result, peers), widths, strict=True)
    line = f"{result.case.name:{width}}" + "".join(f"{cell:>{size}}" for cell, size in cells)
    return "\n".join([line, *(f"  {failure}" for failure in result.failures)])


def console_summary(results: Sequence[Result], peers: Sequence[str]) -> str:
    lines = [
        f"{line['kind']}: × {line['peer']}: geometric mean {_number(line['geometric_mean'])} over "
        f"{line['cases']}, least {_number(line['least'])} ({line['where']})"
        for line in summary(results, peers)
    ]
    lines += [
        f"{_share(line)}: median {_percent(line['median'])} over {line['cases']}, least "
        f"{_percent(line['least'])} ({line['where']})"
        for line in shares(results)
    ]
    return "\n".join(lines)


def _share(line: dict[str, Any]) -> str:
    return f"{line['kind']}, {line['which']}: of the {line['limit']}"


SINCE = """\
Beside the run of {date}{commit}: how many times as fast as then; above 1 is faster.
By time that is also the machine's mood on two days. It cancels in the ratios to NumPy, which runs
in the same rounds."""


def _since(since: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """The paragraph and the lines: what, cases, by time, by the ratio to NumPy."""
    commit = f" (commit {since['commit']})" if since["commit"] else ""
    rows = [
        [line["kind"], str(line["cases"]), _number(line["time"]), _ratio(line["to_numpy"])]
        for line in since["kinds"]
    ]
    rows += [
        [f"{key} most: {line['case']}", "1", _number(line["time"]), _ratio(line["to_numpy"])]
        for key in ("gained", "lost")
        for line in since[key]
    ]
    return SINCE.format(date=since["date"], commit=commit), rows


SINCE_COLUMNS = ("cases", "by time", "by the ratio to NumPy")


def console_since(since: dict[str, Any]) -> str:
    text, rows = _since(since)
    lines = [
        f"{what}: × {time} by time, × {to_numpy} by the ratio to NumPy"
        + ("" if cases == "1" else f", over {cases}")
        for what, cases, time, to_numpy in rows
    ]
    return "\n".join(["Since the last run", text, *lines])


def console_property(line: Property) -> str:
    expected = f", expected {line.expected}" if line.expected else ""
    return f"{line.name}: {line.measured}{expected} ({line.how})"


def missed(properties: Sequence[Property]) -> str:
    """How many are not as expected, and which; "" where all are."""
    names = [line.name for line in properties if line.holds is False]
    count = sum(line.holds is not None for line in properties)
    return f"Not as expected: {len(names)} of {count} ({'; '.join(names)})." if names else ""


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)
) -> list[str]:
    """Lines of Markdown; the columns `texts` begin at the left, figures end at the right."""
    rule = ["---" if place in texts else "--:" for place in range(len(header))]
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
    properties: Sequence[Property] = (),
    since: dict[str, Any] | None = None,
) -> str:
    """The page; plots are (title, file name), since is what history.compare found."""
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
    rows = [
        [
            f"{line['kind']}, × {line['peer']}",
            str(line["cases"]),
            _number(line["geometric_mean"]),
            f"{_number(line['least'])} ({line['where']})",
        ]
        for line in summary(results, names)
    ]
    if rows:
        lines += ["## In short", "", *_table(["", "cases", "geometric mean", "least"], rows), ""]
    rows = [
        [
            _share(line),
            str(line["cases"]),
            _percent(line["median"]),
            f"{_percent(line['least'])} ({line['where']})",
        ]
        for line in shares(results)
    ]
    if rows:
        lines += [*_table(["", "cases", "median", "least"], rows), ""]
    if since:
        text, rows = _since(since)
        lines += ["## Since the last run", "", text, "", *_table(["", *SINCE_COLUMNS], rows), ""]
    if properties:
        rows = [[line.name, line.measured, line.expected, line.how] for line in properties]
        header = ["", "measured", "expected", "what was done"]
        lines += ["## Properties", "", PROPERTIES, "", *_table(header, rows, (0, 3)), ""]
        lines += [f"{missed(properties)}\n"] * bool(missed(properties))
    lines += ["## The machine's limits", ""]
    threads = list(limits["gflops"])
    rows = [["FMA peak, GF/s", *(_number(limits["gflops"][n]) for n in threads)]]
    if all(limits["tile_gflops"].values()):
        tiles = (_number(limits["tile_gflops"][n]) for n in threads)
        rows.append(["tiles of a product in the first-level cache, GF/s", *tiles])
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
    properties: Sequence[Property] = (),
    since: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything, for programs."""
    names = [peer.name for peer in peers if peer.name != OURS]
    return {
        "format": 2,
        "machine": machine,
        "versions": {peer.name: peer.version for peer in peers},
        "limits": limits,
        "rounds": rounds,
        "notes": notes(results, machine),
        "summary": summary(results, names),
        "shares": shares(results),
        "since": since,
        "properties": [line.as_dict() for line in properties],
        "results": [result.as_dict() for result in results],
    }
