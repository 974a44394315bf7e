import numpy as np
import pytest

from m6rec.train.metrics.evaluate_classification import BinaryClassification


@pytest.fixture
def metric(tmp_path):
    return BinaryClassification(cache_dir=str(tmp_path))


def test_groups_follow_the_order_of_adding(metric):
    metric.add_batch(predictions=np.array([0.3, 0.1], dtype=np.float32), references=np.array([0, 1]))
    metric.add_batch(predictions=[0.4, 0.2], references=[True, False])
    metric.add(prediction=0.05, reference=0)
    report = metric.compute(groups=[5, 5, 8, 8, 8])
    assert report["gauc"] == pytest.approx((2 * 0 + 3 * 1) / 5)
    assert (report["gauc_groups"], report["gauc_examples"]) == (2, 5)
    assert report["auc"] == pytest.approx(4 / 6)


def test_bins_reach_the_calibration(metric):
    figures = [
        metric.compute(predictions=[0.1, 0.9], references=[1, 0], bins=bins)["calibration_error"] for bins in (1, 2)
    ]
    assert figures == pytest.approx([0, 0.9])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0.1, 0.2], [0, 0.7], "labels holds 0.7 at 1"),
        ([0.1, 1.2], [0, 1], "probabilities holds 1.2 at 1"),
        ([0.1, 0.2], [1], r"predictions \(2\) and references \(1\)"),
    ],
)
def test_refuses(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
