"""Splits of a log into training, validation and test events, and the events of each user.

Events of one user with equal timestamps have no order of their own. The order of the file often follows popularity
or item ids and leaks the answer, so ties are shuffled: by a hash of seed, user and item, which does not depend on the
order of the file. Only for a published order do they keep the order of the table.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy
import pandas

PARTS = ("train", "valid", "test")
Ties = Literal["shuffled", "table"]
Protocol = Literal["published", "shuffled", "time"]
Validate = Literal["fresh", "stale", "time"]


@dataclass(frozen=True, eq=False)
class Split:
    """The parts of the interactions.

    Each part is ordered by user, then time, and its index is the row's position in `order(interactions, seed)`:
    `pandas.concat([train, valid]).sort_index()` is in order again.

    Attributes:
        train: Events learnt before the validation part is predicted.
        valid: The validation part.
        test: The test part.
        gap: Events between the training and the validation part. When the validation part is predicted, they are in
            histories but not learnt; they are learnt before the test. Empty unless `validate` is `stale` or `time`.
    """

    train: pandas.DataFrame
    valid: pandas.DataFrame
    test: pandas.DataFrame
    gap: pandas.DataFrame = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.gap is None:
            object.__setattr__(self, "gap", self.train.iloc[:0])


def order(interactions: pandas.DataFrame, seed: int, ties: Ties = "shuffled") -> pandas.DataFrame:
    """Sorts events by user, then time, then part if the log has parts, then at random.

    Args:
        interactions: The events of a `Log`. Without timestamps (all NaN: a published split) each user's events keep
            the order of the table.
        seed: Seed of the order of events with the same user and time.
        ties: Whether events with the same user and time are "shuffled", or keep the order of the "table".

    Returns:
        The same rows with a new index 0, 1, 2, …
    """
    users, _ = pandas.factorize(interactions["user_id"], sort=True)
    if has_times(interactions):
        keys = (_part_ranks(interactions), interactions["timestamp"].to_numpy(), users)
        rows = numpy.lexsort(keys if ties == "table" else (tie_keys(interactions, seed), *keys))
    else:
        rows = numpy.argsort(users, kind="stable")
    return interactions.iloc[rows].reset_index(drop=True)


def hold_out(
    interactions: pandas.DataFrame,
    protocol: Protocol,
    validate: Validate,
    seed: int = 0,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> Split:
    """Holds out the test events of a protocol, and a validation part.

    Args:
        interactions: The events of a `Log`; all but `published` and `fresh` or `stale` need timestamps.
        protocol: `published`: each user's last event is the test, ties in the order of the table. `shuffled`: the
            same, ties shuffled. `time`: all events later than the quantile 1 - `test_fraction` of all times are the
            test, ties shuffled.
        validate: The validation part, from the events before the test; one event per user. `fresh`: the last one.
            `stale`: the same, and the event before it is the gap, so that neither is learnt before the validation part
            is predicted, as with the last two events before the test is. `time`: the user's last event in the window
            of the last `valid_fraction` of all events before the test; the other events in the window are the gap.
        seed: Seed of the order of events with the same user and time.
        valid_fraction: Share of the events in the window.
        test_fraction: Share of the events later than the quantile.

    Returns:
        The split. All events of users with fewer than three are in the training part, unless the test is by time; a
        user without an earlier event has none in the validation part.
    """
    check_shares(valid_fraction, test_fraction)
    ordered = order(interactions, seed, "table" if protocol == "published" else "shuffled")
    times = ordered["timestamp"].to_numpy()
    if "time" in (protocol, validate) and not has_times(ordered):
        named = "protocol" if protocol == "time" else "validate"
        raise ValueError(f"evaluation.{named} time needs timestamps, and this log has none: use published or stale")
    users, _ = pandas.factorize(ordered["user_id"])
    if protocol == "time":
        test, eligible = _later(times, times, 1 - test_fraction), numpy.ones(len(ordered), dtype=bool)
        if not test.any():
            raise ValueError(
                f"no event is later than the quantile {1 - test_fraction:g} of the times: too many of the "
                f"{len(ordered)} events share the last timestamp"
            )
    else:
        eligible = numpy.bincount(users)[users] >= 3
        test = eligible & (_events_left(users) == 0)
    rest = numpy.flatnonzero(~test)
    users = users[rest]
    left = _events_left(users)
    eligible = eligible[rest] & (numpy.bincount(users)[users] >= 2)
    if validate == "time":
        quantile = 1 - valid_fraction - (test_fraction if protocol == "time" else 0)
        window = _later(times[rest], times if protocol == "time" else times[rest], quantile)
        valid = window & eligible & (left == 0)
        gap = window & ~valid
    else:
        valid = eligible & (left == 0)
        gap = eligible & (left == 1) & (validate == "stale")
    if len(ordered) and not (~(valid | gap)).any():  # without a log only texts are learnt
        raise ValueError(f"no training events are left of {len(ordered)}: the log is too small for validate {validate}")
    return Split(*(ordered.iloc[rows] for rows in (rest[~(valid | gap)], rest[valid], test.nonzero()[0], rest[gap])))


def _events_left(users: numpy.ndarray) -> numpy.ndarray:
    """Return the number of events of the same user after each event, given the numbers of the users in order."""
    ends = numpy.append(numpy.flatnonzero(numpy.diff(users)), len(users) - 1)
    return ends[numpy.searchsorted(ends, numpy.arange(len(users)))] - numpy.arange(len(users))


def check_shares(valid_fraction: float, test_fraction: float) -> None:
    """Raise if the shares of the events leave no training events."""
    if not (min(valid_fraction, test_fraction) >= 0 and valid_fraction + test_fraction < 1):
        raise ValueError(
            f"valid_fraction {valid_fraction} and test_fraction {test_fraction}: expected shares of 0 or more "
            "with a sum below 1"
        )


def _later(times: numpy.ndarray, everything: numpy.ndarray, quantile: float) -> numpy.ndarray:
    """Mask of the times that are later than a quantile of all times."""
    return times > numpy.sort(everything)[int(quantile * len(everything))]


def by_time(
    interactions: pandas.DataFrame, valid_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0
) -> Split:
    """Cuts the log at two moments: training events precede all validation events, and these all test events.

    Args:
        interactions: The events of a `Log`, with timestamps.
        valid_fraction: Minimum share of the events in the validation part: all events at the moment of a cut belong to
            the later part.
        test_fraction: Minimum share of the events in the test part.
        seed: Seed of the order of events with the same user and time.
    """
    check_shares(valid_fraction, test_fraction)
    if not has_times(interactions):
        raise ValueError("a split by time needs timestamps, and this log has none: use leave-one-out")
    ordered = order(interactions, seed)
    times = ordered["timestamp"]
    moments = numpy.sort(times.to_numpy())
    test_start = _start_of_last(moments, round(len(moments) * test_fraction))
    moments = moments[moments < test_start]
    valid_start = min(test_start, _start_of_last(moments, round(len(times) * valid_fraction)))
    if not (times < valid_start).any():
        raise ValueError(
            f"no training events are left: too many of the {len(times)} events share a timestamp, such as "
            f"{times.mode()[0]}, and one moment is never split"
        )
    train, test = times < valid_start, times >= test_start
    return Split(ordered[train], ordered[~(train | test)], ordered[test])


def given(interactions: pandas.DataFrame, seed: int = 0) -> Split:
    """Takes the parts from the log's column `part`.

    Args:
        interactions: The events of a `Log`. No user's event may precede one of an earlier part: its prediction would
            use the future.
        seed: Seed of the order of events with the same user, time and part.
    """
    if "part" not in interactions:
        raise ValueError(
            "evaluation.split 'given' needs a column that says train, valid or test for each event: name it in "
            "data.columns as `part`"
        )
    ordered = order(interactions, seed)
    ranks = _part_ranks(ordered)
    same_user = ordered["user_id"].to_numpy()[1:] == ordered["user_id"].to_numpy()[:-1]
    early = same_user & (ranks[1:] < ranks[:-1])
    if early.any():
        user, part = ordered[["user_id", "part"]].iloc[int(early.argmax()) + 1]
        raise ValueError(
            f"user {user!r} has an event of part {part!r} after one of a later part ({early.sum()} such events): "
            "expected each user's parts in the order train, valid, test; use evaluation.split time or leave-one-out"
        )
    train, valid, test = (ordered[ranks == rank] for rank in range(len(PARTS)))
    if train.empty:
        raise ValueError("no event is of part 'train': there is nothing to learn from")
    return Split(train, valid, test)


def shuffled_ties(frame: pandas.DataFrame, seed: int, epoch: int) -> pandas.DataFrame:
    """Draws a new order of events with the same user and time.

    Args:
        frame: Events, ordered, with timestamps.
        seed: Every order depends only on (seed, epoch).
        epoch: Each epoch has its own order.
    """
    if not has_times(frame):
        raise ValueError(
            "task.shuffle_ties: this log has no timestamps, so its order is all that is known; leave it out"
        )
    users, _ = pandas.factorize(frame["user_id"], sort=True)
    drawn = numpy.random.default_rng([seed, epoch]).random(len(frame))
    return frame.iloc[numpy.lexsort((drawn, frame["timestamp"].to_numpy(), users))]


def histories(frame: pandas.DataFrame) -> dict[str, numpy.ndarray]:
    """The row positions (for `iloc`) of each user's events, in the order of the rows.

    >>> histories(pandas.DataFrame({"user_id": ["a", "b", "a"]}))
    {'a': array([0, 2]), 'b': array([1])}
    """
    rows = frame.groupby("user_id", sort=False, observed=True).indices
    return {str(user): numpy.asarray(positions) for user, positions in rows.items()}


def hold_items_out(split: Split, fraction: float, seed: int = 0, for_validation: bool = False) -> Split:
    """Makes items cold: removes all training events of randomly drawn items, as if these items were new.

    The validation and test parts do not change. A history holds training events, and in the test also validation
    events, so it contains a cold item only if the user's own validation event was one.

    Settings, such as the bias of items without training events, are chosen on other items held out in place of the
    cold ones: a second draw of the same size, whose validation events stand for the test events of the cold items. The
    events of the cold items are then in no part.

    Args:
        split: The parts.
        fraction: Share of the items with events that is drawn.
        seed: Seed of the draws.
        for_validation: Hold out the second draw, and drop all events of the first.

    Returns:
        A split with fewer training events; `cold_items` returns its held-out items that are cold.
    """
    if not 0 < fraction < 0.5:
        raise ValueError(f"fraction is {fraction}; expected a share of the items above 0 and below 0.5")
    parts: tuple[pandas.DataFrame, ...] = (split.train, split.valid, split.test, split.gap)
    items = sorted({str(item) for part in parts for item in part["item_id"].unique()})
    drawn = numpy.random.default_rng(seed).permutation(len(items))
    count = max(round(len(items) * fraction), 1)
    cold, next_cold = ({items[place] for place in drawn[start : start + count]} for start in (0, count))
    if for_validation:
        parts = tuple(part[~part["item_id"].isin(cold)] for part in parts)
        cold = next_cold
    train, valid, test, gap = parts
    train, gap = (part[~part["item_id"].isin(cold)] for part in (train, gap))
    if train.empty:
        raise ValueError(f"no training events are left: the {count} items that are held out have all of them")
    return Split(train, valid, test, gap)


def cold_items(split: Split) -> set[str]:
    """The items of validation and test events without a training event."""
    return (set(split.valid["item_id"]) | set(split.test["item_id"])) - set(split.train["item_id"])


def has_times(interactions: pandas.DataFrame) -> bool:
    """Return whether events have timestamps.

    Raises:
        ValueError: If only some events have one.
    """
    missing = interactions["timestamp"].isna()
    if missing.any() and not missing.all():
        raise ValueError(
            f"{missing.sum()} of {len(missing)} events have no timestamp, the first in row {missing.argmax() + 1}; "
            "expected all or none"
        )
    return not missing.all()


def _part_ranks(interactions: pandas.DataFrame) -> numpy.ndarray:
    if "part" not in interactions:
        return numpy.zeros(len(interactions), dtype=numpy.int8)
    return pandas.Categorical(interactions["part"], categories=list(PARTS)).codes


def tie_keys(interactions: pandas.DataFrame, seed: int) -> numpy.ndarray:
    """A pseudo-random number per event, independent of the event's position in the table."""
    who_what = [name for name in ("user_id", "item_id", "event") if name in interactions]
    secret = hashlib.sha256(str(seed).encode()).hexdigest()[:16]  # pandas requires keys of 16 characters
    return pandas.util.hash_pandas_object(interactions[who_what], index=False, hash_key=secret).to_numpy()


def _start_of_last(moments: numpy.ndarray, count: int) -> float:
    """The latest moment such that at least `count` of the sorted moments are at or after it, if there are as many."""
    return float(moments[-min(count, len(moments))]) if count and len(moments) else math.inf


__all__ = [
    "PARTS",
    "Protocol",
    "Split",
    "Ties",
    "Validate",
    "by_time",
    "cold_items",
    "given",
    "has_times",
    "histories",
    "hold_items_out",
    "hold_out",
    "order",
    "shuffled_ties",
    "tie_keys",
]
