"""What is concluded from the data of a run on a GPU, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import INFERENCE, TRAINING
from benchmarks.gpu_cases import AIMS, GROUPS
from benchmarks.results import format_seconds, geometric_mean

__all__ = ["console", "markdown", "result_line", "summary"]

OURS, PEER = "fastrnn", "PyTorch"
TITLES = {INFERENCE: "Inference", TRAINING: "Forward and backward, all gradients"}

LEGEND = """\
- I = H and float32 unless stated. T steps, B batch rows, I inputs, H hidden units. PyTorch computes
  in the same precision; float32 is strict, in PyTorch with `allow_tf32 = False`.
- **family**: which of our kernels ran the recurrence (`docs/cuda.md`).
- Times are those of calls one after the other until the device is done, over their number: launches
  and Python included, copies to and from the host not, since all arrays are on the device. **a
  step**: the time over T.
- **× PyTorch**: its time over ours, above 1 fastrnn is faster. The median of the rounds' ratios;
  the libraries take turns in each round. PyTorch is `torch.nn.LSTM` or `GRU` with cuDNN.
- **spread**: slowest less fastest round, as a part of the median; ours / PyTorch's.
- **difference**: the largest, over y and (in training) all gradients, of the norm of our result
  less PyTorch's over the norm. Taken before the timing, and just after as much memory was filled
  with NaN and given back, so that a result that is not written would show.
- Inference of ours is on a frozen layer, whose weights are packed once; in training they are packed
  in each call, and that is in the time."""


def seconds(result: dict[str, Any], library: str) -> float | None:
    rounds = result["seconds"].get(library)
    return statistics.median(rounds) if rounds else None


def spread(result: dict[str, Any], library: str) -> str:
    rounds = result["seconds"].get(library)
    if not rounds:
        return "–"
    return f"{100 * (max(rounds) - min(rounds)) / statistics.median(rounds):.0f} %"


def label(result: dict[str, Any]) -> str:
    return str(result["name"]).removeprefix(result["kind"] + " ")


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"


def _cells(result: dict[str, Any]) -> list[str]:
    """A line of the tables, without the case."""
    ours, theirs = seconds(result, OURS), seconds(result, PEER)
    found = result["difference"]
    return [
        result["family"],
        "–" if ours is None else format_seconds(ours),
        "–" if ours is None else format_seconds(ours / result["T"]),
        "–" if ours is None else _number(result["flops"] / ours / 1e12),
        "–" if theirs is None else format_seconds(theirs),
        _number(result["ratio"]) if result.get("ratio") else "–",
        f"{spread(result, OURS)} / {spread(result, PEER)}",
        f"{found['norm']:.1g}" if found else "–",
    ]


COLUMNS = ("family", OURS, "a step", "TFLOP/s", PEER, f"× {PEER}", "spread", "difference")


def result_line(result: dict[str, Any]) -> str:
    """For the console."""
    family, ours, step, _, theirs, ratio, spreads, _ = _cells(result)
    text = (
        f"{result['name']}: {family}, {ours} ({step} a step), {PEER} {theirs}, "
        f"× {ratio}, spread {spreads}"
    )
    return "\n".join([text, *(f"  FAILED: {failure}" for failure in result["failures"])])


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each group and kind: geometric mean and least of the ratios, and what we aim at."""
    lines = []
    for group in dict.fromkeys(result["group"] for result in results):
        for kind in (INFERENCE, TRAINING):
            ratios = [
                (result["ratio"], label(result))
                for result in results
                if (result["group"], result["kind"]) == (group, kind) and result.get("ratio")
            ]
            if ratios:
                least, where = min(ratios)
                lines.append(
                    {
                        "group": group,
                        "kind": kind,
                        "cases": len(ratios),
                        "geometric_mean": geometric_mean([ratio for ratio, _ in ratios]),
                        "least": least,
                        "where": where,
                        "aim": AIMS.get(group),
                    }
                )
    return lines


def _summary_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for line in summary(results):
        aim = line["aim"]
        reached = aim and line["geometric_mean"] >= aim[0] and line["least"] >= aim[1]
        rows.append(
            [
                f"{line['group']}, {line['kind']}",
                str(line["cases"]),
                _number(line["geometric_mean"]),
                f"{_number(line['least'])} ({line['where']})",
                f"{aim[0]} and {aim[1]}: {'reached' if reached else 'not reached'}" if aim else "",
            ]
        )
    return rows


SUMMARY_COLUMNS = ("PyTorch's time over ours", "cases", "geometric mean", "least", "aim")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[int]) -> list[str]:
    """Lines of Markdown; the columns `texts` begin at the left, figures end at the right."""
    rule = ["---" if place in texts else "--:" for place in range(len(header))]
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *clean)]


def _parts(data: dict[str, Any]) -> list[list[str]]:
    return [
        [name, part["status"], f"{part['seconds']:.0f} s", part["summary"]]
        for name, part in data["parts"].items()
    ]


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    title = data["machine"].get("card", "a GPU").partition(",")[0]
    lines = [f"# fastrnn on {title}, {data['machine']['date'][:10]}", ""]
    if data["mode"] == "rehearsal":
        lines += ["**A rehearsal on the emulator: no figure here means anything.**", ""]
    lines += [f"- {key}: {value}" for key, value in data["machine"].items()]
    lines += [f"- {key}: {value}" for key, value in data["versions"].items()]
    for key, value in data["load"].items():
        lines.append(f"- card {key} (clocks, °C, W, use, memory): {value}")
    limits = data["limits"]
    if limits:
        lines.append(
            f"- measured limits: copies at {limits['copy_gbytes_per_s']:.0f} GB/s, bfloat16 "
            f"products of 8192 × 8192 at {limits['bfloat16_product_tflops']:.0f} TFLOP/s"
        )
    lines += ["", "## Parts", "", *_table(("", "", "took", ""), _parts(data), (0, 1, 3)), ""]
    for name, part in data["parts"].items():
        if part["details"]:
            lines += [f"{name}:", "", "```text", *part["details"], "```", ""]
    results = data["results"]
    rows = _summary_rows(results)
    if rows:
        lines += ["## In short", "", *_table(SUMMARY_COLUMNS, rows, (0, 3, 4)), ""]
    failures = [f"- {r['name']}: {f}" for r in results for f in r["failures"]]
    if failures:
        lines += ["## Failed cases", "", *failures, ""]
    for group in dict.fromkeys(result["group"] for result in results):
        lines += [f"## {group}", ""]
        lines += [GROUPS[group], ""] if group in GROUPS else []
        for kind, heading in TITLES.items():
            chosen = [r for r in results if (r["group"], r["kind"]) == (group, kind)]
            if chosen:
                body = [[label(result), *_cells(result)] for result in chosen]
                lines += [f"{heading}:", "", *_table(("", *COLUMNS), body, (0, 1)), ""]
    if data["left_out"]:
        count = len(data["left_out"])
        lines += ["## Left out", "", f"For lack of time, {count} cases:", ""]
        lines += [f"- {name}" for name in data["left_out"]]
        lines.append("")
    if results:
        lines += ["## How to read this", "", LEGEND, ""]
    return "\n".join(lines)


def console(data: dict[str, Any]) -> str:
    """The last thing that a run prints."""
    width = max(len(name) for name in data["parts"])
    lines = [f"{row[0]:{width}}  {row[1]:12}  {row[2]:>6}  {row[3]}" for row in _parts(data)]
    rows = _summary_rows(data["results"])
    lines += [""] if rows else []
    lines += [
        f"{what}: × {mean} over {cases}, least {least}{', aim ' + aim if aim else ''}"
        for what, cases, mean, least, aim in rows
    ]
    if data["left_out"]:
        lines.append(f"left out for lack of time: {len(data['left_out'])} cases")
    return "\n".join(lines)
