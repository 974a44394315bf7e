"""What the benchmark of serving makes of its samples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from serving import slope


def test_memory_grows_by_the_slope_after_the_caches_are_filled():
    filling = [(minute / 60, 100.0 * minute) for minute in range(10)]
    assert slope(filling + [(minute / 60, 1000 + 0.5 * minute) for minute in range(10, 40)]) == 30
    assert slope([(minute / 60, 500.0) for minute in range(8)]) == 0
