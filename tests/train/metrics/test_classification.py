import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from m6rec.train.metrics import (
    accuracy,
    auc,
    classification_report,
    expected_calibration_error,
    grouped_auc,
    log_loss,
    mae,
    mixed_groups,
    rmse,
)

BINARY = [auc, log_loss, expected_calibration_error, classification_report]
CLICKS = st.lists(
    st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.integers(0, 1), st.sampled_from("abc")),
    min_size=1,
    max_size=30,
)


def slow_auc(scores, labels):
    """The share of pairs in the right order; None without a pair."""
    points = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high, positive in zip(scores, labels)
        for low, negative in zip(scores, labels)
        if positive == 1 and negative == 0
    ]
    return sum(points) / len(points) if points else None


@given(CLICKS)
def test_auc_equals_the_count_of_pairs(rows):
    scores, labels, _ = zip(*rows)
    expected = slow_auc(scores, labels)
    assume(expected is not None)
    assert auc(scores, labels) == pytest.approx(expected)
    assert auc([-s for s in scores], labels) == pytest.approx(1 - expected)
    assert auc([math.exp(5 * s) for s in scores], labels) == pytest.approx(expected)


def test_auc_by_hand():
    assert auc([3, 2, 1], [1, 0, 0]) == 1.0
    assert auc([1, 1, 1, 1], [1, 0, 0, 1]) == 0.5
    assert auc([-np.inf, 0.5, np.inf], [0, 1, 0]) == 1 / 2
    assert auc([0.2, 0.1], [True, False]) == 1.0


@given(CLICKS)
def test_grouped_auc_equals_the_loop(rows):
    scores, labels, groups = zip(*rows)
    total = weight = 0.0
    used = []
    for name in set(groups):
        inside = [i for i, group in enumerate(groups) if group == name]
        value = slow_auc([scores[i] for i in inside], [labels[i] for i in inside])
        if value is not None:
            total, weight = total + len(inside) * value, weight + len(inside)
            used += inside
    assert np.flatnonzero(mixed_groups(labels, groups)).tolist() == sorted(used)
    assume(used)
    assert grouped_auc(scores, labels, groups) == pytest.approx(total / weight)
    numbered = [float(ord(group)) for group in groups]
    assert grouped_auc(scores, labels, numbered) == pytest.approx(total / weight)


def test_grouped_auc_does_not_compare_users():
    """Each user's own order is right; the second user's scores are all higher, which only the plain AUC sees."""
    scores, labels, users = [0.1, 0.2, 0.8, 0.9], [0, 1, 0, 1], [7, 7, 9, 9]
    assert grouped_auc(scores, labels, users) == 1.0
    assert auc(scores, labels) == 3 / 4


def test_grouped_auc_refuses():
    with pytest.raises(ValueError, match="none of the 2 groups"):
        grouped_auc([0.1, 0.2, 0.3], [1, 1, 0], ["a", "a", "b"])
    with pytest.raises(ValueError, match="groups has 2 entries and the examples 3"):
        grouped_auc([0.1, 0.2, 0.3], [1, 1, 0], ["a", "a"])
    with pytest.raises(ValueError, match=r"labels holds 2.0 at 1"):
        mixed_groups([1, 2], ["a", "a"])


@given(CLICKS, st.integers(1, 20))
def test_calibration_equals_the_loop(rows, bins):
    chances, labels, _ = zip(*rows)
    error = 0.0
    for b in range(bins):
        last = b == bins - 1
        inside = [i for i, p in enumerate(chances) if b / bins <= p and (last or p < (b + 1) / bins)]
        if inside:
            gap = np.mean([chances[i] for i in inside]) - np.mean([labels[i] for i in inside])
            error += len(inside) / len(rows) * abs(gap)
    assert expected_calibration_error(chances, labels, bins) == pytest.approx(error)


def test_calibration_by_hand():
    assert expected_calibration_error([0.2] * 5, [1, 0, 0, 0, 0]) == pytest.approx(0)
    assert expected_calibration_error([1.0, 1.0], [1, 1]) == 0
    assert expected_calibration_error([0.9, 0.1], [0, 1], bins=1) == pytest.approx(0)
    # A written edge opens its own bin: 0.28 and 0.29 are apart, though 0.29 * 100 < 29.
    assert expected_calibration_error([0.28, 0.29], [0, 1], bins=100) == pytest.approx((0.28 + 0.71) / 2)
    with pytest.raises(ValueError, match="bins is 0"):
        expected_calibration_error([0.5], [1], bins=0)


@given(CLICKS)
def test_log_loss_equals_the_loop(rows):
    loss = 0.0
    for chance, label, _ in rows:
        right = chance if label else 1 - chance
        loss -= math.log(max(right, 2**-52))
    chances, labels, _ = zip(*rows)
    assert log_loss(chances, labels) == pytest.approx(loss / len(rows), abs=1e-12)


def test_log_loss_of_a_certain_error_is_finite():
    assert log_loss([0.0, 1.0], [1, 0]) == pytest.approx(52 * math.log(2))
    assert log_loss([0.0, 1.0], [0, 1]) == pytest.approx(0, abs=1e-12)
    assert log_loss([1e-20], [0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("chances", "labels", "message"),
    [
        ([], [], "is empty"),
        ([0.1, np.nan], [0, 1], "holds nan at 1"),
        ([0.1, 0.2], [0, 1, 1], "labels has 3 entries"),
        ([[0.1, 0.2]], [0, 1], r"shape \(1, 2\)"),
        ([0.1, 0.2], [0, 0.7], "labels holds 0.7 at 1"),
        ([0.1, 0.2], [-1, 1], "labels holds -1.0 at 0"),
        ([0.1, 0.2], [0, np.nan], "labels holds nan at 1"),
    ],
)
@pytest.mark.parametrize("metric", BINARY)
def test_binary_metrics_refuse(metric, chances, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(chances, labels)


@pytest.mark.parametrize("wrong", [-0.25, 1.5, np.inf])
@pytest.mark.parametrize("metric", BINARY[1:])
def test_probabilities_are_probabilities(metric, wrong):
    with pytest.raises(ValueError, match=f"probabilities holds {wrong} at 1 .*sigmoid"):
        metric([0.5, wrong], [0, 1])


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc(label):
    with pytest.raises(ValueError, match=f"labels are all {label}"):
        auc([0.1, 0.2], [label, label])
    assert list(classification_report([0.1, 0.2], [label, label])) == [
        "log_loss",
        "calibration_error",
        "accuracy",
        "examples",
    ]


def test_accuracy_by_hand():
    assert accuracy([2, 0, 1], [2, 1, 1]) == 2 / 3
    with pytest.raises(ValueError, match=r"predictions holds 0.7 at 0"):
        accuracy([0.7, 0], [1, 0])
    with pytest.raises(ValueError, match="labels has 2 entries and predictions 1"):
        accuracy([1], [1, 0])


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=20))
def test_rating_errors_equal_the_loop(rows):
    guesses, truths = zip(*rows)
    squares = sum((g - t) ** 2 for g, t in rows)
    distances = sum(abs(g - t) for g, t in rows)
    assert rmse(guesses, truths) == pytest.approx(math.sqrt(squares / len(rows)))
    assert mae(guesses, truths) == pytest.approx(distances / len(rows))


@pytest.mark.parametrize("metric", [rmse, mae, accuracy])
def test_rating_errors_refuse(metric):
    with pytest.raises(ValueError, match="predictions is empty"):
        metric([], [])
    with pytest.raises(ValueError, match="predictions holds inf at 0"):
        metric([np.inf], [3])
    with pytest.raises(ValueError, match=r"(targets|labels) holds nan at 1"):
        metric([1, 2], [3, np.nan])


def test_report_by_hand():
    chances, labels, users = [0.2, 0.6, 0.5, 0.9], [0, 1, 1, 1], ["a", "a", "b", "c"]
    report = classification_report(chances, labels, users, bins=1)
    assert report == {
        "auc": 1.0,
        "log_loss": pytest.approx(-math.log(0.8 * 0.6 * 0.5 * 0.9) / 4),
        "calibration_error": pytest.approx(3 / 4 - (0.2 + 0.6 + 0.5 + 0.9) / 4),
        "accuracy": 1.0,
        "examples": 4,
        "gauc": 1.0,
        "gauc_groups": 1,
        "gauc_examples": 2,
    }
    assert json.loads(json.dumps(report)) == report
    assert "gauc" not in classification_report(chances, labels)
