import math

import pytest

from m6rec.train.metrics.evaluate_rating import RatingError


def test_errors_over_batches(tmp_path):
    metric = RatingError(cache_dir=str(tmp_path))
    metric.add_batch(predictions=[4.5], references=[5])
    metric.add_batch(predictions=[1.0, 3.0], references=[3, 3])
    expected = {"rmse": math.sqrt((0.5**2 + 2**2 + 0) / 3), "mae": (0.5 + 2 + 0) / 3, "examples": 3}
    assert metric.compute() == pytest.approx(expected)


def test_refuses_a_missing_rating(tmp_path):
    with pytest.raises(ValueError, match="targets holds nan at 1"):
        RatingError(cache_dir=str(tmp_path)).compute(predictions=[1.0, 2.0], references=[1.0, None])
