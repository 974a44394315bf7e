"""Held-out events: which are predicted, and what is known when they are."""

from dataclasses import dataclass

import numpy as np
import pandas

from ..config.arguments import EvaluationArguments
from ..data.splits import Split, histories


@dataclass(frozen=True)
class EvalQuery:
    """Held-out events of a user, and what is known when they are asked about.

    Attributes:
        user_id: The user.
        history: Places of the history's events in `all_events`.
        asked: Places of the held-out events.
    """

    user_id: str
    history: np.ndarray
    asked: np.ndarray


def before_and_in(split: Split, part: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Return the events that may be known when a part is predicted, and the part: the test knows the validation."""
    known = [split.train] if split.gap.empty else [split.train, split.gap]
    if part == "valid":
        return _together(known), split.valid
    return _together([*known, split.valid]), split.test


def learnt_before(split: Split, part: str, observe_validation: bool = False) -> pandas.DataFrame:
    """Return the events that may be learnt and counted before a part is predicted.

    Args:
        split: The parts.
        part: "valid" or "test".
        observe_validation: Let the test observe the validation part.
    """
    if part == "valid":
        return split.train
    found = [split.train] if split.gap.empty else [split.train, split.gap]
    return _together([*found, split.valid] if observe_validation else found)


def _together(parts: list[pandas.DataFrame]) -> pandas.DataFrame:
    return parts[0] if len(parts) == 1 else pandas.concat(parts).sort_index()


def drawn_users(users: list[str], arguments: EvaluationArguments, seed: int) -> list[str]:
    """Draw `max_users` of the users; they keep their order."""
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
    """Say which held-out events are asked about, and after which history.

    All of a user's are asked at once after the last events of the earlier parts (of the test: training and
    validation); so a user's later held-out events are asked without the earlier ones. With `rolling` each is asked by
    itself after the last events before it, of whatever part, as a service would be.

    Args:
        split: The parts.
        part: "valid" or "test".
        labelled: For each of `all_events` whether it says something that can be asked.
        max_events: Events of a history, at most.
        evaluation: Says whether to roll, and how many users to draw.
        seed: Of the draw.
    """
    everything = all_events(split)
    known, held_out = (everything.index.isin(frame.index) for frame in before_and_in(split, part))
    asked = held_out & labelled
    places = {user: own for user, own in histories(everything).items() if asked[own].any()}
    found = []
    for user in drawn_users(list(places), evaluation, seed):
        own = places[user]
        if evaluation.rolling:
            wanted = np.flatnonzero(asked[own])
            found += [EvalQuery(user, own[max(at - max_events, 0) : at], own[[at]]) for at in wanted]
        else:
            found.append(EvalQuery(user, own[known[own]][-max_events:], own[asked[own]]))
    return found


def rankings(split: Split, part: str, arguments: EvaluationArguments) -> list[EvalQuery]:
    """Say which held-out events are ranked, each after all events of its user before it; users in their order.

    Of each user it is the first of the part that has an event before it; with the protocol `time` the last one, or all
    of them if `successive`.

    Args:
        split: The parts.
        part: "valid" or "test".
        arguments: Says which.
    """
    everything = all_events(split)
    held_out = everything.index.isin(before_and_in(split, part)[1].index)
    found = []
    for user, own in histories(everything).items():
        asked = np.flatnonzero(held_out[own])
        if not arguments.successive:
            asked = asked[-1:] if arguments.protocol == "time" else asked[:1]
        found += [EvalQuery(user, own[:at], own[[at]]) for at in asked if at]
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
