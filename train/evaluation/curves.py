"""Plots of a training's log: losses and metrics over the steps, and the plotted numbers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...atomic_m6rec import atomic_file
from ..config.recipe import write_json

CURVES_FILE, PICTURE_FILE = "curves.json", "curves.png"
NOT_METRICS = ("step", "epoch", "total_flos", "num_input_tokens_seen")
"""Entries of a log that are not plotted; names ending in "runtime" or "per_second" are not plotted either."""


def curves(log_history: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Group the entries of a log by name: name -> (step, value) pairs.

    >>> curves([{"loss": 2.0, "step": 1}, {"loss": 1.5, "epoch": 0.5, "step": 2}, {"eval_auc": 0.6, "step": 2}])
    {'loss': [(1, 2.0), (2, 1.5)], 'eval_auc': [(2, 0.6)]}
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            is_curve = name not in NOT_METRICS and not name.endswith(("runtime", "per_second"))
            if is_curve and isinstance(value, (int, float)):
                found.setdefault(name, []).append((entry["step"], value))
    return found


def panels(names: Sequence[str]) -> dict[str, list[str]]:
    """Assign curves to panels: one for all losses, then one for each metric with the curves of all tasks.

    >>> panels(["loss", "loss_click", "learning_rate", "eval_click_auc", "eval_auc", "train_loss"])
    {'loss': ['loss', 'loss_click'], 'learning_rate': ['learning_rate'], 'auc': ['eval_click_auc', 'eval_auc']}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if name != "train_loss":  # the mean over the whole training, a single point
            panel = "loss" if name.startswith("loss") else name.rpartition("_")[2] if name.startswith("eval_") else name
            found.setdefault(panel, []).append(name)
    return found


def save_curves(log_history: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `curves.json` and `curves.png` into a folder; nothing if the log is empty."""
    found = curves(log_history)
    layout = panels(list(found))
    if not layout:
        return
    write_json(folder / CURVES_FILE, found)
    draw(found, layout, folder / PICTURE_FILE)


def draw(found: dict[str, list[tuple[int, float]]], layout: dict[str, list[str]], path: Path) -> None:
    """Write a PNG file with one plot for each panel of `layout`, which names the curves of `found` in it."""
    # Not pyplot: it would open a window if there is a display, and keep every figure in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(layout), 3)
    rows = math.ceil(len(layout) / columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (panel, names) in enumerate(layout.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for name in names:
            steps, values = zip(*found[name])
            axes.plot(steps, values, label=name, marker="." if len(steps) < 30 else None)
        axes.set(title=panel, xlabel="optimizer steps")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


__all__ = ["curves", "draw", "panels", "save_curves"]
