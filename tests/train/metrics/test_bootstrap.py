import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec.train.metrics import auc, bootstrap, bootstrap_interval, interval_of, ndcg_at_k, resampled_means


def test_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(3).standard_normal(400) * 2 + 5
    low, high = bootstrap_interval(values, samples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    holds = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.random(60), samples=200, level=0.8, seed=seed)
        holds += low <= 0.5 <= high
    assert abs(holds / 200 - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 200)


def test_same_seed_same_interval():
    values = np.arange(30.0)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_wider_level_wider_interval():
    values = np.arange(30.0)
    (low, high), (lower, higher) = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert lower < low < high < higher


@given(st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(0, 3))
def test_groups_are_drawn_whole(groups, seed):
    """Every resample holds as many groups as there are, each with all its rows and no other."""
    rows = np.column_stack([np.arange(len(groups)), groups])
    owned = {group: groups.count(group) for group in groups}

    def check(sample):
        drawn = 0
        for group, size in owned.items():
            inside = sample[sample[:, 1] == group, 0]
            copies, rest = divmod(len(inside), size)
            assert rest == 0
            expected = sorted([i for i, g in enumerate(groups) if g == group] * copies)
            assert sorted(inside.tolist()) == expected
            drawn += copies
        assert drawn == len(owned)
        return 0.0

    bootstrap_interval(rows, check, groups=groups, samples=5, seed=seed)


def test_copies_of_a_row_in_one_group_are_no_new_evidence():
    """Ten equal rows a user: by users the interval is that of the users, by rows it is sqrt(10) times too narrow."""
    users = np.random.default_rng(1).standard_normal(50)
    rows, owners = np.repeat(users, 10), np.repeat(np.arange(50), 10)
    alone = np.diff(bootstrap_interval(users))[0]
    by_user = np.diff(bootstrap_interval(rows, groups=owners))[0]
    by_row = np.diff(bootstrap_interval(rows))[0]
    assert by_user == pytest.approx(alone)
    assert by_row == pytest.approx(alone / math.sqrt(10), rel=0.15)


def test_statistics_of_ranks_and_of_rows():
    ranks = np.array([1, 1, 2, 30, 4] * 20)
    low, high = bootstrap_interval(ranks, lambda r: ndcg_at_k(r, 10))
    assert 0 < low < ndcg_at_k(ranks, 10) < high < 1
    rows = np.column_stack([[0.1, 0.2, 0.3, 0.4] * 20, [0, 1, 0, 1] * 20])
    low, high = bootstrap_interval(rows, lambda r: auc(*r.T), samples=200)
    assert low < 3 / 4 < high


def test_one_row_says_nothing():
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert bootstrap_interval([0.0, 1.0], groups=["a", "a"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": []}, r"shape \(0,\)"),
        ({"values": 3.0}, r"shape \(\)"),
        ({"values": [1.0, np.nan]}, "values holds nan at 1"),
        ({"values": [1.0], "level": 95}, "level is 95"),
        ({"values": [1.0], "level": 0}, "level is 0"),
        ({"values": [1.0], "samples": 0}, "samples is 0"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, "groups has 1 entries and the examples 2"),
        ({"values": [1.0], "statistic": lambda rows: math.inf}, "the statistic holds inf at 0"),
        ({"values": [[0.3, 1.0]], "statistic": lambda rows: auc(*rows.T)}, "labels are all 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**options)


@pytest.mark.parametrize("at_once", [1, 500, 1 << 22])
def test_resampled_means_are_those_of_each_resample(monkeypatch, at_once):
    monkeypatch.setattr(bootstrap, "DRAWN_AT_ONCE", at_once)
    rng = np.random.default_rng(2)
    values, users = rng.random((60, 3)), rng.integers(0, 25, 60).astype(str)
    rows = {user: values[users == user] for user in np.unique(users)}
    names, generator = list(rows), np.random.default_rng(7)
    wanted = []
    for _ in range(40):
        drawn = np.concatenate([rows[names[place]] for place in generator.integers(len(names), size=len(names))])
        wanted.append(drawn.mean(0))
    np.testing.assert_allclose(resampled_means(values, users, samples=40, seed=7), wanted)
    generator = np.random.default_rng(7)
    wanted = [values[generator.integers(60, size=60)].mean(0) for _ in range(40)]
    np.testing.assert_allclose(resampled_means(values, samples=40, seed=7), wanted)


def test_differences_are_paired():
    own = np.random.default_rng(0).random(300)
    means = resampled_means(np.column_stack([own, own + 0.5, own * 0]), seed=1)
    assert means.shape == (10_000, 3)
    assert interval_of(means[:, 1] - means[:, 0]) == pytest.approx([0.5, 0.5])
    assert interval_of(means[:, 0]) == pytest.approx(list(bootstrap_interval(own, samples=4000)), abs=0.004)
    for values in (np.zeros((0, 2)), np.zeros(3)):
        with pytest.raises(ValueError, match="expected at least one row of numbers to resample"):
            resampled_means(values)
    with pytest.raises(ValueError, match="a number; drop or repair"):
        resampled_means([[np.nan]])
