"""Splits: nothing lost, nothing leaked, the same from any order of the rows."""

import itertools
import math
import time
from collections import defaultdict

import numpy
import pandas
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st

from m6rec.train.data.log import read_movielens
from m6rec.train.data.splits import (
    PARTS,
    Split,
    by_time,
    cold_items,
    given,
    histories,
    hold_items_out,
    hold_out,
    order,
    shuffled_ties,
)
from tests.conftest import real_data
from tests.fast import examples

COLUMNS = ["user_id", "item_id", "timestamp"]
# Few users, items and moments, so that ties are the rule; no event is there twice, as in a `Log`.
rows = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["1", "2", "10", "商品"]), st.integers(0, 4)),
    min_size=1,
    max_size=40,
    unique=True,
)
seeds = st.integers(-(2**70), 2**70)
shares = st.sampled_from([0.0, 0.1, 0.25, 0.4])


def frame(events) -> pandas.DataFrame:
    return pandas.DataFrame(events, columns=COLUMNS).astype({"timestamp": float})


def leave_one_out(events: pandas.DataFrame, seed: int) -> Split:
    return hold_out(events, "shuffled", "fresh", seed)


def parts(split: Split) -> list[pandas.DataFrame]:
    return [split.train, split.valid, split.test]


def tuples(table: pandas.DataFrame) -> list[tuple]:
    return list(table.itertuples(index=False, name=None))


def tied(users: int, items: int) -> pandas.DataFrame:
    """Every user meets every item, all at the same time, in the order of the ids."""
    return frame([(f"u{user:04}", str(item), 7) for user in range(users) for item in range(items)])


@given_(rows, seeds)
def test_order_is_by_user_then_time_and_keeps_every_row(events, seed):
    ordered = order(frame(events), seed)
    assert ordered.index.tolist() == list(range(len(events)))
    assert sorted(tuples(ordered)) == sorted(tuples(frame(events)))
    keys = [(user, when) for user, _, when in tuples(ordered)]
    assert keys == sorted(keys)


@given_(st.data(), rows, seeds)
def test_the_order_of_the_file_does_not_matter(data, events, seed):
    shuffled = frame(data.draw(st.permutations(events)))
    for split in (lambda log: [order(log, seed)], lambda log: parts(leave_one_out(log, seed))):
        for given_part, shuffled_part in zip(split(frame(events)), split(shuffled)):
            pandas.testing.assert_frame_equal(given_part, shuffled_part)


def test_the_order_of_the_file_does_not_matter_for_events_of_several_kinds():
    log = tied(20, 5)
    log = pandas.concat([log.assign(event=event) for event in ("view", "buy")], ignore_index=True)
    again = log.sample(frac=1, random_state=0)
    pandas.testing.assert_frame_equal(order(log, 3), order(again, 3))


def test_ties_follow_neither_the_file_nor_the_item_ids():
    users, items = 400, 20
    ordered = order(tied(users, items), seed=0)
    places = ordered.groupby("user_id").cumcount()
    ids = ordered["item_id"].astype(int)
    assert abs(numpy.corrcoef(places, ids)[0, 1]) < 0.05  # 8,000 pairs: 4.5 standard deviations
    means = places.groupby(ids).mean()
    assert means.between(8, 11).all()  # 9.5 expected, 0.29 its standard deviation


def test_ties_of_two_items_are_broken_anew_for_each_user_and_seed():
    first = [order(tied(1000, 2), seed)["item_id"].iloc[::2].to_numpy() == "0" for seed in (0, 1, 2)]
    assert all(420 < wins.sum() < 580 for wins in first)  # 500 expected, 16 the standard deviation
    agreements = [(one == other).sum() for one, other in itertools.pairwise(first)]
    assert all(420 < agreement < 580 for agreement in agreements)


def test_the_same_seed_gives_the_same_order_for_ever():
    log = tied(1, 6)
    for kind in ("str", object):  # whatever pandas keeps texts in
        ordered = order(log.astype({"user_id": kind, "item_id": kind}), seed=0)
        assert ordered["item_id"].tolist() == ["5", "1", "2", "4", "3", "0"]


def test_without_times_the_order_of_the_file_is_kept():
    log = frame([("b", "1", None), ("a", "2", None), ("b", "3", None), ("a", "1", None)])
    assert order(log, seed=5)["item_id"].tolist() == ["2", "1", "1", "3"]
    log = pandas.DataFrame({"user_id": ["a", "b"] * 100, "item_id": range(200), "timestamp": numpy.nan})
    assert order(log, seed=5)["item_id"].tolist() == [*range(0, 200, 2), *range(1, 200, 2)]
    with pytest.raises(ValueError, match="1 of 2 events have no timestamp, the first in row 2"):
        order(frame([("a", "1", 1), ("a", "2", None)]), seed=0)


def test_leave_one_out_by_hand():
    log = frame([("a", "w", 4), ("b", "x", 1), ("a", "x", 1), ("a", "y", 3), ("a", "z", 2), ("b", "y", 2)])
    split = leave_one_out(log, seed=0)
    assert tuples(split.train) == [("a", "x", 1), ("a", "z", 2), ("b", "x", 1), ("b", "y", 2)]
    assert tuples(split.valid) == [("a", "y", 3)]
    assert tuples(split.test) == [("a", "w", 4)]
    assert cold_items(split) == {"w"}
    assert tuples(pandas.concat([split.train, split.valid]).sort_index())[:3] == [
        ("a", "x", 1),
        ("a", "z", 2),
        ("a", "y", 3),
    ]


def slow_parts(events, protocol, validate, seed, valid_fraction, test_fraction):
    """Parts of a protocol by loops over users: training, validation, test, gap."""
    times = sorted(when for *_, when in events)
    users = defaultdict(list)
    for event in tuples(order(frame(events), seed, "table" if protocol == "published" else "shuffled")):
        users[event[0]].append(event)
    test = {}
    for user, own in users.items():
        if protocol == "time":
            test[user] = [event for event in own if event[2] > times[int((1 - test_fraction) * len(times))]]
        else:
            test[user] = own[-1:] if len(own) >= 3 else []
    before = {user: own[: len(own) - len(test[user])] for user, own in users.items()}
    rest = sorted(when for own in before.values() for *_, when in own)
    if protocol == "time":
        start = times[int((1 - valid_fraction - test_fraction) * len(times))]
    else:
        start = rest[int((1 - valid_fraction) * len(rest))]
    found = [[], [], [], []]
    for user, own in before.items():
        asked = len(own) >= 2 and (protocol == "time" or bool(test[user]))
        if validate == "time":
            late = [event for event in own if event[2] > start]
            held = late if late else []
            valid = held[-1:] if asked else []
            gap = held[: len(held) - len(valid)]
        else:
            valid = own[-1:] if asked else []
            gap = own[-2:-1] if asked and validate == "stale" else []
        found[0] += own[: len(own) - len(valid) - len(gap)]
        found[1] += valid
        found[2] += test[user]
        found[3] += gap
    return found


@given_(
    rows,
    seeds,
    st.sampled_from(["published", "shuffled", "time"]),
    st.sampled_from(["fresh", "stale", "time"]),
    st.sampled_from([0.1, 0.25, 0.4]),
    st.sampled_from([0.1, 0.25]),
)
@settings(max_examples=examples(150), deadline=None)
def test_what_is_held_out_against_loops(events, seed, protocol, validate, valid_fraction, test_fraction):
    wanted = slow_parts(events, protocol, validate, seed, valid_fraction, test_fraction)
    arguments = (frame(events), protocol, validate, seed, valid_fraction, test_fraction)
    try:
        split = hold_out(*arguments)
    except ValueError as error:
        assert ("no event is later than the quantile" in str(error) and not wanted[2]) or not wanted[0]
        return
    assert [tuples(part) for part in (*parts(split), split.gap)] == wanted
    assert sorted(pandas.concat([*parts(split), split.gap]).index) == list(range(len(events)))


def test_a_stale_validation_lies_as_far_beyond_what_is_learnt_as_the_test():
    log = frame([("a", item, when) for when, item in enumerate("uvwxyz")])
    split = hold_out(log, "published", "stale")
    assert [list(part["item_id"]) for part in (split.train, split.gap, split.valid, split.test)] == [
        *(["u", "v", "w"], ["x"], ["y"], ["z"])
    ]
    fresh = hold_out(log, "published", "fresh")
    assert list(fresh.train["item_id"]) == ["u", "v", "w", "x"] and fresh.gap.empty


def test_a_window_of_validation_has_one_event_a_user():
    events = [("a", "w", 0), ("a", "x", 1), ("a", "y", 6), ("a", "z", 7), ("b", "x", 2), ("b", "y", 9), ("c", "x", 7)]
    split = hold_out(frame([*events, ("b", "z", 10)]), "time", "time", 0, valid_fraction=0.5, test_fraction=0.2)
    # Of the sorted times 0 1 2 6 7 7 9 10 the test is later than the seventh, the window than the third.
    assert tuples(split.test) == [("b", "z", 10)]
    assert tuples(split.valid) == [("a", "z", 7), ("b", "y", 9)]
    assert tuples(split.gap) == [("a", "y", 6), ("c", "x", 7)]  # c has no history
    assert tuples(split.train) == [("a", "w", 0), ("a", "x", 1), ("b", "x", 2)]


def test_published_ties_keep_the_order_of_the_table():
    log = tied(30, 4)
    assert order(log, 1, "table")["item_id"].tolist() == ["0", "1", "2", "3"] * 30
    assert order(log, 1)["item_id"].tolist() != order(log, 1, "table")["item_id"].tolist()
    late = frame([("a", "x", 2), ("a", "y", 1), ("a", "z", 1)])
    assert order(late, 1, "table")["item_id"].tolist() == ["y", "z", "x"]


def test_protocols_by_time_need_times():
    log = frame([("a", "1", None), ("a", "2", None), ("a", "3", None)])
    for protocol, validate, named in (("time", "fresh", "protocol"), ("published", "time", "validate")):
        with pytest.raises(ValueError, match=f"evaluation.{named} time needs timestamps"):
            hold_out(log, protocol, validate)
    assert list(hold_out(log, "published", "fresh").test["item_id"]) == ["3"]
    with pytest.raises(ValueError, match=r"no event is later than the quantile 0\.9"):
        hold_out(tied(2, 3), "time", "fresh")
    with pytest.raises(ValueError, match="no training events are left of 3"):
        hold_out(frame([("a", "x", 1), ("a", "y", 2), ("a", "z", 3)]), "published", "stale")


def test_by_time_by_hand():
    log = frame([("a", "x", 9), ("a", "y", 1), ("b", "x", 2), ("b", "z", 8), ("a", "z", 8), ("a", "x", 3)])
    split = by_time(log, valid_fraction=1 / 6, test_fraction=1 / 6)
    assert tuples(split.train) == [("a", "y", 1), ("a", "x", 3), ("b", "x", 2)]
    assert tuples(split.valid) == [("a", "z", 8), ("b", "z", 8)]  # one was asked for; a moment is never cut
    assert tuples(split.test) == [("a", "x", 9)]
    assert cold_items(split) == {"z"}


@given_(rows, shares, shares)
def test_by_time_against_a_loop(events, valid_fraction, test_fraction):
    log = frame(events)
    moments = sorted({when for *_, when in events})

    def last(fraction):  # whole moments from the end of what is left
        part = []
        while moments and len(part) < round(fraction * len(events)):
            moment = moments.pop()
            part += [event for event in tuples(order(log, 0)) if event[2] == moment]
        return sorted(part)

    test, valid = last(test_fraction), last(valid_fraction)
    train = sorted(event for event in tuples(log) if event[2] in moments)
    if not train:
        with pytest.raises(ValueError, match=f"no training events are left: too many of the {len(events)} events"):
            by_time(log, valid_fraction, test_fraction)
        return
    split = by_time(log, valid_fraction, test_fraction)
    assert [sorted(tuples(part)) for part in parts(split)] == [train, valid, test]
    for part in parts(split):
        assert part.index.is_monotonic_increasing


def test_by_time_where_one_moment_holds_most_events():
    with pytest.raises(ValueError, match=r"too many of the 10 events share a timestamp, such as 7\.0"):
        by_time(frame([("a", str(item), 7 if item else 1) for item in range(10)]), valid_fraction=0.4)


@pytest.mark.parametrize(("valid", "test"), [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5), (float("nan"), 0.1)])
def test_by_time_refuses_shares_that_leave_nothing(valid, test):
    with pytest.raises(ValueError, match=f"valid_fraction {valid} and test_fraction {test}"):
        by_time(tied(1, 3), valid, test)


def test_by_time_needs_times():
    with pytest.raises(ValueError, match="needs timestamps"):
        by_time(frame([("a", "1", None)]))


@given_(rows)
def test_histories_are_the_positions_of_each_user(events):
    log = frame(events)
    found = histories(log)
    expected = defaultdict(list)
    for place, (user, *_) in enumerate(events):
        expected[user].append(place)
    assert {user: places.tolist() for user, places in found.items()} == expected
    shifted = log.set_index(numpy.arange(len(log)) + 1000)  # positions, not labels
    assert all((found[user] == places).all() for user, places in histories(shifted).items())


def test_a_hundred_thousand_events_take_no_time():
    numbers = numpy.random.default_rng(0)
    log = pandas.DataFrame({name: numbers.integers(0, 5000, 100_000).astype(str) for name in ("user_id", "item_id")})
    log["timestamp"] = numbers.integers(0, 10_000, 100_000).astype(float)
    start = time.perf_counter()
    for split in (leave_one_out(log, seed=0), by_time(log)):
        histories(split.train)
    assert time.perf_counter() - start < 2


@pytest.mark.real_data
def test_splits_of_movielens():
    log = read_movielens(real_data("ml-100k")).interactions
    split = leave_one_out(log, seed=0)
    assert [len(part) for part in parts(split)] == [98_114, 943, 943]
    split = by_time(log)
    assert [len(part) for part in parts(split)] == [79_999, 10_001, 10_000]
    assert split.train["timestamp"].max() < split.valid["timestamp"].min()
    assert split.valid["timestamp"].max() < split.test["timestamp"].min()


def test_given_parts_by_hand():
    log = frame([("b", "x", 5), ("a", "x", 3), ("a", "y", 3), ("a", "z", 1), ("b", "y", 9)])
    log["part"] = ["train", "test", "valid", "train", "test"]  # x and y at the same time: the part decides
    for part in (log, log.iloc[::-1], log.astype({"part": "category"})):
        split = given(part, seed=2)
        assert [part["item_id"].tolist() for part in parts(split)] == [["z", "x"], ["y"], ["x", "y"]]
        assert [part.index.tolist() for part in parts(split)] == [[0, 3], [1], [2, 4]]


def test_given_parts_without_times_keep_the_order_of_the_table():
    log = frame([("a", "x", None), ("b", "x", None), ("a", "y", None)]).assign(part=["train", "test", "test"])
    assert [part["item_id"].tolist() for part in parts(given(log))] == [["x"], [], ["y", "x"]]


@settings(max_examples=examples(40))
@given_(st.data(), rows)
def test_given_parts_are_taken_as_they_are_or_refused(data, events):
    log = frame(events)
    log["part"] = data.draw(st.lists(st.sampled_from(PARTS), min_size=len(log), max_size=len(log)))
    moments = defaultdict(list)
    for user, _, when, part in tuples(log):
        moments[user].append((when, PARTS.index(part)))
    ordered = all([part for _, part in sorted(own)] == sorted(part for _, part in own) for own in moments.values())
    if not ordered or "train" not in set(log["part"]):
        with pytest.raises(ValueError, match=r"after one of a later part|no event is of part 'train'"):
            given(log, 0)
        return
    for name, part in zip(PARTS, parts(given(log, 0))):
        assert sorted(tuples(part)) == sorted(event for event in tuples(log) if event[3] == name)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (frame([("a", "1", 1)]), "needs a column that says train, valid or test.*data.columns as `part`"),
        (
            frame([("a", "1", 1), ("b", "1", 2), ("b", "2", 1)]).assign(part=["test", "train", "valid"]),
            r"user 'b' has an event of part 'train' after one of a later part \(1 such",
        ),
        (frame([("a", "1", 1)]).assign(part="test"), "no event is of part 'train'"),
    ],
)
def test_given_parts_that_cannot_be_used(log, message):
    with pytest.raises(ValueError, match=message):
        given(log, 0)


def test_categories_are_split_like_texts():
    log = tied(30, 4).sample(frac=1, random_state=1)
    log["timestamp"] = numpy.arange(len(log)) // 7 * 1.0
    small = log.assign(**{name: log[name].astype("category") for name in ("user_id", "item_id")})
    for split in (lambda events: [order(events, 3)], lambda events: parts(leave_one_out(events, 3))):
        for texts, categories in zip(split(log), split(small)):
            pandas.testing.assert_frame_equal(texts, categories.astype({"user_id": "str", "item_id": "str"}))
    first, second = histories(log), histories(small[small["user_id"] != "u0003"])
    assert set(first) - set(second) == {"u0003"}
    assert all(type(user) is str for user in second)


@settings(max_examples=examples(60))
@given_(st.integers(0, 99), st.sampled_from([0.1, 0.3, 0.4]), st.booleans())
def test_cold_items_lose_their_training_events_and_nothing_else(seed, fraction, for_validation):
    rng = numpy.random.default_rng(seed)
    log = frame(
        [(f"u{user}", str(item), time) for user in range(12) for time, item in enumerate(rng.permutation(20)[:7])]
    )
    split = leave_one_out(log, seed)
    count, never = round(log["item_id"].nunique() * fraction), set(log["item_id"]) - items_of(split.train)
    real, found = hold_items_out(split, fraction, seed), hold_items_out(split, fraction, seed, for_validation)
    cold = items_of(split.train) - items_of(real.train)
    held_out = items_of(split.train) - items_of(found.train) - (cold if for_validation else set())
    assert count - len(never) <= len(held_out) <= count
    assert tuples(found.train) == [event for event in tuples(split.train) if event[1] not in held_out | cold]
    for before, after in zip(parts(split)[1:], parts(found)[1:]):
        gone = items_of(before) - items_of(after)
        assert tuples(after) == [event for event in tuples(before) if event[1] not in gone]
        assert gone <= cold | never and bool(gone & cold) == bool(for_validation and items_of(before) & cold)


def items_of(part: pandas.DataFrame) -> set[str]:
    return set(part["item_id"])


def test_cold_items_follow_the_seed_and_not_the_order_of_the_file():
    log = tied(20, 10)
    drawn = [
        frozenset(cold_items(hold_items_out(leave_one_out(events, 0), 0.2, seed)))
        for events, seed in [(log, 1), (log.sample(frac=1, random_state=0), 1), (log, 2), (log, 3)]
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2
    assert len(set(drawn)) > 1
    of_validation = {frozenset(cold_items(hold_items_out(leave_one_out(log, 0), 0.2, 1, for_validation=True)))}
    assert of_validation != {drawn[0]} and not of_validation.pop() & drawn[0]


def test_no_more_can_be_cold_than_leaves_something_to_learn():
    split = leave_one_out(tied(4, 10), 0)
    for fraction in (0.0, 0.5):
        with pytest.raises(ValueError, match=f"fraction is {fraction}"):
            hold_items_out(split, fraction)
    alone = Split(split.train[split.train["item_id"] == "3"], split.valid[:0], split.test[:0])
    with pytest.raises(ValueError, match="no training events are left: the 1 items"):
        hold_items_out(alone, 0.4)


@given_(rows, seeds, st.integers(0, 3))
@settings(deadline=None)
def test_ties_are_ordered_anew_in_each_epoch_and_times_stay(events, seed, epoch):
    ordered = order(frame(events), seed)
    again = shuffled_ties(ordered, abs(seed), epoch)
    assert sorted(again.index) == list(ordered.index)
    assert again[["user_id", "timestamp"]].to_numpy().tolist() == ordered[["user_id", "timestamp"]].to_numpy().tolist()
    pandas.testing.assert_frame_equal(again, shuffled_ties(ordered, abs(seed), epoch))


def test_each_order_of_a_tie_is_met_and_a_log_without_times_is_refused():
    tied = frame([("a", "1", 0), ("a", "2", 1), ("a", "10", 1)])
    found = {tuple(shuffled_ties(tied, 0, epoch)["item_id"]) for epoch in range(20)}
    assert found == {("1", "2", "10"), ("1", "10", "2")}
    with pytest.raises(ValueError, match=r"task\.shuffle_ties: this log has no timestamps"):
        shuffled_ties(tied.assign(timestamp=math.nan), 0, 0)
