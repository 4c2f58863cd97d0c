"""The pictures: how many times faster than each library, the roofline, and a step's time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CHARACTERS, INFERENCE, STEP, TRAINING
from benchmarks.peers import OURS
from benchmarks.properties import Property
from benchmarks.results import Result

__all__ = ["draw"]

INK, MUTED, LINES = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = {
    OURS: INK,
    "NumPy": "#9aa5b1",
    "PyTorch": "#e07a3f",
    "ONNX Runtime": "#3b7dd8",
    "JAX": "#3f9b6c",
}
# Light to dark: small to large.
SCALE = ("#a6cee3", "#6aaed6", "#3b7dd8", "#1f4e9e", "#0b2559", "#000000")
CELLS = ("RNN", "LSTM", "GRU")
MANY = 60  # cases: from here on a grid, which the other pictures suit


def _figure(width: float, height: float) -> Any:
    # Figure and canvas without pyplot: no window system, no state left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any) -> None:
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8.5)


def _titles(figure: Any, title: str, below: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold", fontsize=12)
    figure.supxlabel(below, x=0.01, ha="left", color=MUTED, fontsize=7.5)


def _times(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _log_ticks(low: float, high: float, steps: Sequence[int] = (1, 2, 5)) -> list[float]:
    """The steps of every decade from low to high."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def ratios(results: Sequence[Result], peers: Sequence[str], path: Path, below: str) -> None:
    """Bars from 1: to the right the library is slower than fastrnn, to the left faster."""
    sides = [
        [r for r in results if r.case.kind in kinds]
        for kinds in ((INFERENCE, STEP), (TRAINING, CHARACTERS))
    ]
    sides = [side for side in sides if side]
    found = [ratio for r in results for peer in peers if (ratio := r.ratio(peer)) is not None]
    if not found:
        return
    height = 1.5 + 0.13 * max(len(side) for side in sides) * (len(peers) + 1)
    figure = _figure(6 * len(sides) + 0.5, height)
    limits = min(0.5, 0.8 * min(found)), 1.6 * max(found)
    for axes, side in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        _ratio_bars(axes, side, peers)
        axes.set_xscale("log")
        axes.set_xlim(limits)
        ticks = _log_ticks(*limits, steps=(1, 2, 5) if limits[1] < 60 else (1, 3))
        axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="x", color=LINES, lw=0.8)
        axes.axvline(1, color=INK, lw=1.2)
        heading = "inference" if side[0].case.kind in (INFERENCE, STEP) else "training"
        axes.set_title(heading, loc="left", color=INK, fontsize=10, weight="bold")
        axes.set_xlabel("the library's time over fastrnn's", color=INK, fontsize=9)
        _tidy(axes)
        axes.tick_params(axis="y", length=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(peers), frameon=False)
    _titles(figure, "How many times faster fastrnn is", below)
    figure.savefig(path)


def _ratio_bars(axes: Any, side: Sequence[Result], peers: Sequence[str]) -> None:
    thick = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        colour = COLOURS.get(peer, MUTED)
        axes.barh(0, 0, color=colour, label=peer)  # for the legend, whatever the peer can do
        for row, result in enumerate(side):
            ratio = result.ratio(peer)
            if ratio is None:
                continue
            at = row + (place - (len(peers) - 1) / 2) * thick
            axes.barh(at, ratio - 1, left=1, height=0.9 * thick, color=colour)
            axes.annotate(
                _times(ratio),
                (max(ratio, 1), at),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=6.5,
            )
    names = [f"{STEP}: {r.case.label}" if r.case.kind == STEP else r.case.label for r in side]
    names = [
        f"character model, {name}" if r.case.kind == CHARACTERS else name
        for name, r in zip(names, side, strict=True)
    ]
    axes.set_yticks(range(len(side)), names)
    axes.set_ylim(len(side) - 0.4, -0.6)


def roofline(results: Sequence[Result], limits: dict[str, Any], path: Path, below: str) -> None:
    """GF/s over the operations for each byte of weights that the steps read; the limits as lines.

    The points are float32 cases at their best number of threads, the lines those of all threads.
    Inference and training have a panel each where there are many points.
    """
    points = [
        r
        for r in results
        if r.case.kind in (INFERENCE, TRAINING) and r.case.dtype == "float32" and r.case.plain
    ]
    if not points:
        return
    kinds = [kind for kind in (INFERENCE, TRAINING) if any(r.case.kind == kind for r in points)]
    panels = [[r for r in points if r.case.kind == kind] for kind in kinds]
    if len(points) <= MANY:
        panels = [points]
    figure = _figure(9 if len(panels) == 1 else 14, 5.6)
    threads = max(limits["gflops"])
    peak = limits["gflops"][threads]
    high = 2.0 * max([64.0, *(_intensity(r) for r in points)])
    low = 0.4 * min(_intensity(r) for r in points)
    rates = [r.rate() for r in points]
    bottom, top = min(peak / 30, 0.6 * min(rates)), 1.8 * max(peak, *rates)
    for axes, chosen in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _roofline_limits(axes, limits, (low, high), bottom)
        _roofline_points(axes, chosen, spread=len(panels) > 1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(bottom, top)
        ticks = _log_ticks(bottom, top)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(
            "operations for each byte of recurrent weights that the steps read\n"
            "(with I = H: about B)",
            color=INK,
        )
        axes.grid(color=LINES, lw=0.8)
        _tidy(axes)
        axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
        if len(panels) > 1:
            axes.set_title(chosen[0].case.kind, loc="left", color=INK, fontsize=10, weight="bold")
    figure.axes[0].set_ylabel("GF/s", color=INK)
    _titles(figure, "fastrnn against the machine's limits", below)
    figure.savefig(path)


def _roofline_limits(
    axes: Any, limits: dict[str, Any], span: tuple[float, float], bottom: float
) -> None:
    low, high = span
    threads = max(limits["gflops"])
    peak, tile = limits["gflops"][threads], limits["tile_gflops"][threads]
    axes.plot([low, high], [peak, peak], color=INK, lw=1.8)
    axes.annotate(
        f"FMA peak, {threads} threads: {peak:.0f} GF/s"
        if threads > 1
        else f"FMA peak: {peak:.0f} GF/s",
        (high, peak),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=8.5,
    )
    if tile:
        # Named in the legend: the points are just below the line.
        label = f"tiles: {tile:.0f} GF/s"
        axes.plot([low, high], [tile, tile], color=INK, lw=0.9, zorder=1, label=label)
    for name, bandwidth in _read_limits(limits["gbytes_per_s"], threads):
        knee = peak / bandwidth
        if knee < 1.6 * low:
            continue  # never the limit in this picture
        axes.plot([low, knee], [low * bandwidth, peak], color=MUTED, lw=0.9, ls="--", zorder=1)
        start = 1.04 * max(low, bottom / bandwidth)
        axes.text(
            start,
            1.07 * start * bandwidth,  # a little above the line, along it
            f"read {name}: {bandwidth:.0f} GB/s",
            rotation=math.degrees(math.atan(bandwidth)),
            rotation_mode="anchor",
            transform_rotates_text=True,
            clip_on=True,
            color=MUTED,
            fontsize=7,
        )


def _read_limits(measured: dict[int, dict[int, float]], threads: int) -> list[tuple[str, float]]:
    """(working set, GB/s) from the fastest on; sets that are read about as fast are one."""
    groups: list[tuple[list[int], float]] = []
    for size, values in measured.items():
        if groups and values[threads] > 0.75 * groups[-1][1]:
            groups[-1] = [*groups[-1][0], size], max(groups[-1][1], values[threads])
        else:
            groups.append(([size], values[threads]))

    def name(size: int) -> str:
        return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"

    return [
        (" to ".join(dict.fromkeys((name(sizes[0]), name(sizes[-1])))), bandwidth)
        for sizes, bandwidth in groups
    ]


def _intensity(result: Result) -> float:
    return result.case.flops / result.case.weight_bytes


def _roofline_points(axes: Any, points: Sequence[Result], spread: bool) -> None:
    """With `spread` cells and sizes stand side by side, since a grid has few places on the axis."""
    sizes = sorted({r.case.H for r in points})
    step = max(1, (len(SCALE) - 1) // max(1, len(sizes) - 1))
    colours = {H: SCALE[min(len(SCALE) - 1, k * step)] for k, H in enumerate(sizes)}
    markers = {"RNN": "s", "LSTM": "o", "GRU": "^"}
    for r in points:
        place = CELLS.index(r.case.cell) * len(sizes) + sizes.index(r.case.H)
        aside = 0.6 * (place / (len(CELLS) * len(sizes) - 1) - 0.5) if spread else 0.0
        axes.plot(
            _intensity(r) * 2**aside,
            r.rate(),
            marker=markers[r.case.cell],
            ms=5.5 if spread else 7,
            ls="none",
            color=colours[r.case.H],
            markerfacecolor=colours[r.case.H] if r.case.kind == INFERENCE else "white",
            markeredgewidth=1.4,
            zorder=3,
        )
    shown = {r.case.cell for r in points}
    for cell in (cell for cell in markers if cell in shown):
        axes.plot([], [], marker=markers[cell], ls="none", color=MUTED, label=cell)
    if {r.case.kind for r in points} == {INFERENCE, TRAINING}:
        axes.plot([], [], marker="o", ls="none", color=MUTED, label="filled: inference")
        axes.plot(
            [],
            [],
            marker="o",
            ls="none",
            color=MUTED,
            markerfacecolor="white",
            label="open: training",
        )
    for H in sizes:
        axes.plot([], [], marker="D", ls="none", color=colours[H], label=f"H = {H}")


def _of_grid(results: Sequence[Result]) -> list[Result]:
    """The cases of the grid cells × B × H."""
    return [
        r
        for r in results
        if r.case.kind in (INFERENCE, TRAINING)
        and r.case.plain
        and r.case.dtype == "float32"
        and not r.case.I
    ]


def _present(points: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Kinds and cells of the points, in the order of the pictures."""
    kinds = [kind for kind in (INFERENCE, TRAINING) if any(r.case.kind == kind for r in points)]
    return kinds, [cell for cell in CELLS if any(r.case.cell == cell for r in points)]


def heat(results: Sequence[Result], peers: Sequence[str], path: Path, below: str) -> None:
    """The ratios of the grid: a panel for each library, rows cells × H, columns B."""
    from matplotlib.colors import LinearSegmentedColormap

    points = _of_grid(results)
    kinds, cells = _present(points)
    rows = [(cell, H) for cell in cells for H in sorted({r.case.H for r in points})]
    batches = sorted({r.case.B for r in points})
    found = {
        (kind, peer): {
            (r.case.cell, r.case.H, r.case.B): ratio
            for r in points
            if r.case.kind == kind and (ratio := r.ratio(peer)) is not None
        }
        for kind in kinds
        for peer in peers
    }
    peers = [peer for peer in peers if any(found[kind, peer] for kind in kinds)]
    if not peers:
        return
    # White at 1, where both take the same time; full colour at 8 times, or at an eighth.
    colours = LinearSegmentedColormap.from_list("", ["#e07a3f", "#ffffff", "#3b7dd8"])
    figure = _figure(0.9 + 0.55 * len(batches) * len(peers), 1.4 + 0.25 * len(rows) * len(kinds))
    panels = figure.subplots(len(kinds), len(peers), squeeze=False)
    for (kind, peer), axes in zip(
        ((kind, peer) for kind in kinds for peer in peers), panels.flat, strict=True
    ):
        ratios = found[kind, peer]
        if not ratios:
            axes.set_axis_off()
            continue
        for y, (cell, H) in enumerate(rows):
            for x, B in enumerate(batches):
                ratio = ratios.get((cell, H, B))
                if ratio is None:
                    continue
                colour = colours(0.5 + 0.5 * max(-1.0, min(1.0, math.log(ratio) / math.log(8))))
                axes.add_patch(_tile(x, y, colour))
                axes.text(x, y, _two(ratio), ha="center", va="center", color=INK, fontsize=7)
        axes.set_xlim(-0.5, len(batches) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(batches)), [f"B={B}" for B in batches])
        first = axes in panels[:, 0]
        labels = [f"{cell} H={H}" if first else "" for cell, H in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_title(f"× {peer}, {kind}", loc="left", color=INK, fontsize=9, weight="bold")
        _tidy(axes)
        axes.tick_params(length=0, labelsize=7.5)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        for edge in range(1, len(cells)):
            axes.axhline(edge * len(rows) / len(cells) - 0.5, color=INK, lw=0.8)
    _titles(figure, "How many times faster fastrnn is (below 1: slower)", below)
    figure.savefig(path)


def _tile(x: float, y: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=0.8)


def _two(value: float) -> str:
    """Two digits; near 1 two places, so that what is faster can be told."""
    return f"{value:.2f}" if value < 1.995 else _times(value)


def grid(results: Sequence[Result], path: Path, below: str) -> None:
    """The --full grid in small: the best other library over ours against H, a line for each B."""
    points = _of_grid(results)
    kinds, cells = _present(points)
    batches = sorted({r.case.B for r in points})
    if not points or all(r.best_ratio() is None for r in points):
        return
    figure = _figure(3.6 * len(cells) + 0.8, 3.0 * len(kinds) + 1)
    panels = figure.subplots(len(kinds), len(cells), sharex=True, sharey="row", squeeze=False)
    for row, kind in enumerate(kinds):
        for column, cell in enumerate(cells):
            axes = panels[row, column]
            for place, B in enumerate(batches):
                line = sorted(
                    (r.case.H, ratio)
                    for r in points
                    if (r.case.kind, r.case.cell, r.case.B) == (kind, cell, B)
                    and (ratio := r.best_ratio()) is not None
                )
                if line:
                    colour = SCALE[min(place, len(SCALE) - 1)]
                    axes.plot(*zip(*line, strict=True), "o-", ms=4, color=colour, label=f"B = {B}")
            axes.axhline(1, color=INK, lw=1.2)
            axes.set_title(f"{cell}, {kind}", loc="left", color=INK, fontsize=10)
            _log_log(axes, sorted({r.case.H for r in points}))
    for axes in panels[-1]:
        axes.set_xlabel("hidden units H = I", color=INK)
    for axes in panels[:, 0]:
        ticks = _log_ticks(*axes.get_ylim())
        axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylabel("time over fastrnn's", color=INK)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    _titles(figure, "The faster of PyTorch and ONNX Runtime over fastrnn", below)
    figure.savefig(path)


def _log_log(axes: Any, places: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{place}" for place in places])
    axes.grid(color=LINES, lw=0.8)
    _tidy(axes)


def against_units(results: Sequence[Result], peers: Sequence[str], path: Path, below: str) -> None:
    """A step's time against H, a panel for each cell, kind and one row or 32."""
    points = _of_grid(results)
    rows = [
        (f"{kind}, B = {B}", [r for r in points if (r.case.kind, r.case.B) == (kind, B)])
        for kind in (INFERENCE, TRAINING)
        for B in (1, 32)
    ]
    title = "A step's time against H"
    _step_times(rows, lambda r: r.case.H, "hidden units H = I", title, peers, path, below)


def against_rows(results: Sequence[Result], peers: Sequence[str], path: Path, below: str) -> None:
    """A step's time against B where H = 256, a panel for each cell and kind."""
    points = [r for r in _of_grid(results) if r.case.H == 256]
    rows = [(kind, [r for r in points if r.case.kind == kind]) for kind in (INFERENCE, TRAINING)]
    title = "A step's time against B, H = I = 256"
    _step_times(rows, lambda r: r.case.B, "batch rows B", title, peers, path, below)


def _step_times(
    rows: Sequence[tuple[str, list[Result]]],
    place: Callable[[Result], int],
    across: str,
    title: str,
    peers: Sequence[str],
    path: Path,
    below: str,
) -> None:
    """A row of panels for each of `rows`, a panel for each cell, a line for each library."""
    rows = [(name, points) for name, points in rows if points]
    _, cells = _present([r for _, points in rows for r in points])
    if not rows:
        return
    figure = _figure(3.4 * len(cells) + 1.4, 2.4 * len(rows) + 1)
    panels = figure.subplots(len(rows), len(cells), sharex=True, sharey="row", squeeze=False)
    for (name, points), line in zip(rows, panels, strict=True):
        for cell, axes in zip(cells, line, strict=True):
            chosen = sorted((r for r in points if r.case.cell == cell), key=place)
            for peer in peers:
                shown = [r for r in chosen if peer in r.seconds]
                axes.plot(
                    [place(r) for r in shown],
                    [1e6 * r.time(peer) / r.case.T for r in shown],
                    "o-",
                    ms=4,
                    lw=2 if peer == OURS else 1.4,
                    zorder=3 if peer == OURS else 2,
                    color=COLOURS.get(peer, MUTED),
                    label=peer,
                )
            axes.set_title(f"{cell}, {name}", loc="left", color=INK, fontsize=10)
            _log_log(axes, sorted({place(r) for _, points in rows for r in points}))
        low, high = line[0].get_ylim()
        spans = ((50, (1, 2, 5)), (2000, (1, 3)), (math.inf, (1,)))
        steps = next(steps for most, steps in spans if high < most * low)
        ticks = _log_ticks(low, high, steps)
        line[0].set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        line[0].minorticks_off()
        line[0].set_ylabel("µs a step", color=INK)
    for axes in panels[-1]:
        axes.set_xlabel(across, color=INK)
        axes.minorticks_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    _titles(figure, title, below)
    figure.savefig(path)


def lengths(properties: Sequence[Property], path: Path, below: str) -> None:
    """A step's time against T; the axis begins at 0, so that the line is level where it should."""
    for line in properties:
        if "seconds_a_step" not in line.details:
            continue
        steps = [1e6 * seconds for seconds in line.details["seconds_a_step"]]
        figure = _figure(9, 3.6)
        axes = figure.add_subplot()
        axes.plot(line.details["T"], steps, "o-", color=COLOURS[OURS])
        for T, step in zip(line.details["T"], steps, strict=True):
            axes.annotate(
                f"{step:.3g}",
                (T, step),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color=INK,
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_xticks(line.details["T"], [f"{T:,}" for T in line.details["T"]])
        axes.minorticks_off()
        axes.set_ylim(0, 1.3 * max(steps))
        axes.set_xlabel("steps T", color=INK)
        axes.set_ylabel("µs a step", color=INK)
        axes.grid(color=LINES, lw=0.8)
        _tidy(axes)
        _titles(figure, "A step's time against T", f"{line.how}\n{below}")
        figure.savefig(path)


def draw(
    results: Sequence[Result],
    properties: Sequence[Property],
    peers: Sequence[str],
    limits: dict[str, Any],
    stem: Path,
    below: str,
) -> list[tuple[str, str]]:
    """Writes <stem>-….png where there is something to draw; returns titles and file names."""
    others = [peer for peer in peers if peer != OURS]
    made: list[tuple[str, Path]] = []

    def name(title: str, end: str) -> Path:
        path = stem.with_name(f"{stem.name}-{end}.png")
        made.append((title, path))
        return path

    faster = "How many times faster fastrnn is"
    if len(results) <= MANY:
        ratios(results, others, name(faster, "ratios"), below)
    else:
        heat(results, others, name(faster, "ratios"), below)
        best = "fastrnn against the faster of PyTorch and ONNX Runtime"
        grid(results, name(best, "grid"), below)
        against_units(results, peers, name("A step's time against H", "step-h"), below)
        against_rows(results, peers, name("A step's time against B", "step-b"), below)
    roofline(results, limits, name("fastrnn against the machine's limits", "roofline"), below)
    lengths(properties, name("A step's time against T", "step-t"), below)
    return [(title, file.name) for title, file in made if file.exists()]
