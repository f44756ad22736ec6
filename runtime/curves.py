"""Plots of a training log."""

import json
from collections.abc import Iterable
from pathlib import Path

from runtime.outputs import replacing

MOST_PANELS = 9
COLUMNS = 3
# Beside the losses and what validation measures; the rest of the log is for a closer look.
ALSO = ("grad_norm", "lr", "frames_per_s", "pictures_per_s")


def read_rows(log: str | Path) -> list[dict]:
    """The rows of a log.jsonl; a line that is no row, such as a half-written last one, is left out."""
    rows = []
    for line in Path(log).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def panels(rows: Iterable[dict]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """What is plotted: {title: {name: (steps, values)}}. The losses share a panel, all else has its own."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    losses = {name: series[name] for name in ("loss", "loss_pairs", "mse", "error") if name in series}
    found = {"loss": losses} if losses else {}
    names = [name for name in series if name.startswith("val_")] + [name for name in ALSO if name in series]
    found |= {name: {name: series[name]} for name in names}
    return dict(list(found.items())[:MOST_PANELS])


def draw_curves(log: str | Path, picture: str | Path) -> None:
    """Draws a run's log.jsonl into a picture, .png; nothing if it has no rows yet, or is a device.

    Raises OutputError.
    """
    shown = panels(read_rows(log)) if Path(log).is_file() else {}
    if not shown:
        return
    from matplotlib.figure import Figure  # slow to import, and only needed for plots

    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    plot = Figure(figsize=(4.2 * columns, 2.8 * lines), layout="constrained")
    axes = plot.subplots(lines, columns, squeeze=False).ravel()
    for axis, (title, curves) in zip(axes, shown.items(), strict=False):
        for name, (steps, values) in curves.items():
            axis.plot(steps, values, marker="." if len(steps) < 50 else None, label=name)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(shown) - columns) : len(shown)]:
        axis.set_xlabel("step", fontsize=9)
    with replacing(picture) as part:
        plot.savefig(part, dpi=90)
