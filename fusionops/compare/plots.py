"""The bar chart of `fusionops plot`: what each merge and way costs, a row of panels a workload. Computes no figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusionops.compare.report import MIB, Row, digits, quantity

# Two hues that colour-blind readers tell apart (Okabe and Ito, "Color Universal Design", 2008): blue and vermilion.
COLOURS = {"add": "#0072B2", "concat": "#D55E00"}
PANELS: tuple[tuple[str, Callable[[Row], float], Callable[[float], str]], ...] = (
    ("parameters", lambda row: row.params, quantity),
    ("GFLOP", lambda row: row.flops / 1e9, digits),
    ("MiB moved", lambda row: row.bytes_moved / MIB, digits),
    ("MiB of extra memory", lambda row: row.peak_bytes / MIB, digits),
    ("ms, median", lambda row: row.seconds * 1e3, digits),
)
PANEL_INCHES = 2.5, 1.9
DOTS_PER_INCH = 150
ROOM_FOR_LABELS = 1.35  # of the longest bar


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write the chart to `out`, in the format of its suffix. Needs no display."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(PANELS) + 1.2, height * len(workloads) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(workloads), len(PANELS), squeeze=False)
    for line, workload in zip(panels, workloads, strict=True):
        chosen = [row for row in rows if row.workload == workload]
        for panel, (title, value, label) in zip(line, PANELS, strict=True):
            _bars(panel, chosen, [value(row) for row in chosen], label)
            panel.set_title(title, fontsize="medium", loc="left")
        line[0].set_yticks(range(len(chosen)), [f"{row.merge}, {row.way}{_on(row, chosen)}" for row in chosen])
        line[0].set_ylabel(workload)
    figure.savefig(out, dpi=DOTS_PER_INCH)


def _on(row: Row, rows: Sequence[Row]) -> str:
    """Where a row ran, if not all of them ran there."""
    return f", {row.backend}" if len({each.backend for each in rows}) > 1 else ""


def _bars(panel: Axes, rows: Sequence[Row], values: Sequence[float], label: Callable[[float], str]) -> None:
    """One bar for each row, the first on top; materialised ones are hatched."""
    bars = panel.barh(
        range(len(rows)),
        values,
        color=[COLOURS[row.merge] for row in rows],
        alpha=0.9,
        hatch=["" if row.way == "fused" else "///" for row in rows],
        edgecolor="white",
    )
    panel.bar_label(bars, [label(value) for value in values], padding=3)
    panel.set_xlim(0, max(max(values), 1e-12) * ROOM_FOR_LABELS)
    panel.invert_yaxis()
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[["top", "right", "bottom"]].set_visible(False)
