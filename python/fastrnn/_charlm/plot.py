"""The picture of a run: training and validation loss over the characters seen."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

__all__ = ["loss_curve"]

Points = Sequence[tuple[int, float]]
INK, MUTED, TRAIN, VALIDATION = "#1f2933", "#7b8794", "#8fb8de", "#c2410c"


def loss_curve(train: Points, validation: Points, title: str) -> bytes:
    """A PNG of both curves.

    Args:
        train: (characters seen, mean nats a character since the last point), in order.
        validation: (characters seen, nats a character), in order.
        title: One line about the run.
    """
    # Figure and canvas without pyplot: no window system, no state left behind, whatever MPLBACKEND.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    def to_bits(nats: Any) -> Any:
        return nats / math.log(2)

    def to_nats(bits: Any) -> Any:
        return bits * math.log(2)

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles: tuple[tuple[Points, dict[str, Any]], ...] = (
        (train, {"color": TRAIN, "lw": 1.8, "label": "training (with dropout)"}),
        (
            validation,
            {"color": VALIDATION, "lw": 2.2, "marker": "o", "ms": 5, "label": "validation"},
        ),
    )
    for points, style in styles:
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    if validation:
        at, best = min(validation, key=lambda point: point[1])
        axes.axhline(best, color=VALIDATION, lw=0.8, ls=":", zorder=0)
        axes.annotate(
            f"{best:.3f} nats/char",
            (at, best),
            xytext=(0, 10),
            textcoords="offset points",
            ha="right",
            color=VALIDATION,
            weight="bold",
        )
    losses = [loss for _, loss in (*train, *validation)]
    if losses:
        # The first points lie near log V and would press everything of interest onto the axis.
        low, high = min(losses), max(losses)
        axes.set_ylim(max(0.0, low - 0.15), min(high, max(2.5 * low, low + 0.5)) + 0.05)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlabel("characters seen", color=INK)
    axes.set_ylabel("loss, nats/char", color=INK)
    bits = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
    bits.set_ylabel("bits/char", color=MUTED)
    bits.tick_params(colors=MUTED)
    axes.set_title(title, loc="left", color=INK, weight="bold", fontsize=11)
    axes.grid(color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    bits.spines["right"].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    buffer = io.BytesIO()
    canvas.print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _short(value: float) -> str:
    """1500000 → "1.5 M"."""
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"
