"""Held-out events to predict, and their histories."""

from dataclasses import dataclass

import numpy as np
import pandas

from ..config.arguments import EvaluationArguments
from ..data.splits import Split, histories


@dataclass(frozen=True)
class EvalQuery:
    """Held-out events of a user that are predicted with one history.

    Attributes:
        user_id: The user.
        history: Positions of the history's events in `all_events`.
        held_out: Positions of the held-out events.
    """

    user_id: str
    history: np.ndarray
    held_out: np.ndarray


def before_and_in(split: Split, part: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Return the events that histories of a part may hold, and the part; for the test they include the validation."""
    known = [split.train] if split.gap.empty else [split.train, split.gap]
    if part == "valid":
        return _together(known), split.valid
    return _together([*known, split.valid]), split.test


def learnt_before(split: Split, part: str, observe_validation: bool = False) -> pandas.DataFrame:
    """Return the events that may be learnt and counted for the prediction of a part.

    Args:
        split: The parts.
        part: "valid" or "test".
        observe_validation: For the test, include the validation part.
    """
    if part == "valid":
        return split.train
    found = [split.train] if split.gap.empty else [split.train, split.gap]
    return _together([*found, split.valid] if observe_validation else found)


def _together(parts: list[pandas.DataFrame]) -> pandas.DataFrame:
    return parts[0] if len(parts) == 1 else pandas.concat(parts).sort_index()


def drawn_users(users: list[str], arguments: EvaluationArguments, seed: int) -> list[str]:
    """Draw `max_users` of the users, in their original order."""
    if arguments.max_users is None or len(users) <= arguments.max_users:
        return users
    drawn = np.random.default_rng(seed).choice(len(users), arguments.max_users, replace=False)
    return [users[place] for place in sorted(drawn)]


def all_events(split: Split) -> pandas.DataFrame:
    """Return the events of all parts, in order."""
    return pandas.concat([split.train, split.gap, split.valid, split.test]).sort_index()


def eval_queries(
    split: Split, part: str, labelled: np.ndarray, max_events: int, evaluation: EvaluationArguments, seed: int
) -> list[EvalQuery]:
    """Return the held-out events to predict, with their histories.

    By default all held-out events of a user are predicted at once, and their history ends before the held-out part
    (for the test it holds training and validation events). With `rolling` each is predicted separately from the last
    events before it, of any part, as a service would.

    Args:
        split: The parts.
        part: "valid" or "test".
        labelled: Mask of the events in `all_events` with a known label.
        max_events: Maximum number of events in a history.
        evaluation: `rolling` and `max_users` are used.
        seed: Seed of the draw of users.
    """
    everything = all_events(split)
    known, held_out = (everything.index.isin(frame.index) for frame in before_and_in(split, part))
    chosen = held_out & labelled
    places = {user: own for user, own in histories(everything).items() if chosen[own].any()}
    found = []
    for user in drawn_users(list(places), evaluation, seed):
        own = places[user]
        if evaluation.rolling:
            wanted = np.flatnonzero(chosen[own])
            found += [EvalQuery(user, own[max(at - max_events, 0) : at], own[[at]]) for at in wanted]
        else:
            found.append(EvalQuery(user, own[known[own]][-max_events:], own[chosen[own]]))
    return found


def rankings(split: Split, part: str, arguments: EvaluationArguments) -> list[EvalQuery]:
    """Return the held-out events to rank, each with all earlier events of its user as history; users in their order.

    For each user this is the first event of the part if another event precedes it; with the protocol `time` the last
    one, or all of them if `successive`.

    Args:
        split: The parts.
        part: "valid" or "test".
        arguments: `protocol` and `successive` are used.
    """
    everything = all_events(split)
    held_out = everything.index.isin(before_and_in(split, part)[1].index)
    found = []
    for user, own in histories(everything).items():
        wanted = np.flatnonzero(held_out[own])
        if not arguments.successive:
            wanted = wanted[-1:] if arguments.protocol == "time" else wanted[:1]
        found += [EvalQuery(user, own[:at], own[[at]]) for at in wanted if at]
    return found


__all__ = [
    "EvalQuery",
    "all_events",
    "before_and_in",
    "drawn_users",
    "eval_queries",
    "learnt_before",
    "rankings",
]
