"""Latency of single requests: measurement, and a plot."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic_m6rec import atomic_file
from ..config.recipe import write_json

LATENCY_FILE, LATENCY_PICTURE = "latency.json", "latency.png"


def measure_latency(recommend: Callable[[Any], Any], requests: Iterable[Any]) -> list[float]:
    """Answer requests one by one, and return the milliseconds of each."""
    found = []
    for request in requests:
        start = time.perf_counter()
        recommend(request)
        found.append(1000 * (time.perf_counter() - start))
    return found


def save_latency(milliseconds: list[float], folder: Path) -> None:
    """Write `latency.json` (median, 95th percentile, number of requests) and `latency.png` into a folder."""
    median, p95 = (float(np.percentile(milliseconds, share)) for share in (50, 95))
    write_json(folder / LATENCY_FILE, {"median_ms": median, "p95_ms": p95, "requests": len(milliseconds)})
    # Not pyplot: it would open a window if there is a display, and keep every figure in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(milliseconds, bins=30, color="tab:blue")
    for share, value, style in (("median", median, "-"), ("95%", p95, "--")):
        axes.axvline(value, color="black", linestyle=style, label=f"{share}: {value:.1f} ms")
    axes.set(xlabel="milliseconds for one request", ylabel="requests")
    axes.legend()
    with atomic_file(folder / LATENCY_PICTURE) as partial:
        figure.savefig(partial, format="png")


__all__ = ["LATENCY_FILE", "LATENCY_PICTURE", "measure_latency", "save_latency"]
