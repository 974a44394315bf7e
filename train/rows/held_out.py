"""Held-out events: which are predicted, and what is known when they are."""

from dataclasses import dataclass

import numpy as np
import pandas

from ..config.arguments import EvaluationArguments
from ..data.splits import Split, histories


@dataclass(frozen=True)
class Question:
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
    if part == "valid":
        return split.train, split.valid
    return pandas.concat([split.train, split.valid]).sort_index(), split.test


def drawn_users(users: list[str], arguments: EvaluationArguments, seed: int) -> list[str]:
    """Draw `max_users` of the users; they keep their order."""
    if arguments.max_users is None or len(users) <= arguments.max_users:
        return users
    drawn = np.random.default_rng(seed).choice(len(users), arguments.max_users, replace=False)
    return [users[place] for place in sorted(drawn)]


def all_events(split: Split) -> pandas.DataFrame:
    """Return the events of all parts, in order."""
    return pandas.concat([split.train, split.valid, split.test]).sort_index()


def questions(
    split: Split, part: str, heard: np.ndarray, max_events: int, evaluation: EvaluationArguments, seed: int
) -> list[Question]:
    """Say which held-out events are asked about, and after which history.

    All of a user's are asked at once after the last events of the earlier parts (of the test: training and
    validation); so a user's later held-out events are asked without the earlier ones. With `rolling` each is asked by
    itself after the last events before it, of whatever part, as a service would be.

    Args:
        split: The parts.
        part: "valid" or "test".
        heard: For each of `all_events` whether it says something that can be asked.
        max_events: Events of a history, at most.
        evaluation: Says whether to roll, and how many users to draw.
        seed: Of the draw.
    """
    everything = all_events(split)
    known, held_out = (everything.index.isin(frame.index) for frame in before_and_in(split, part))
    asked = held_out & heard
    places = {user: own for user, own in histories(everything).items() if asked[own].any()}
    found = []
    for user in drawn_users(list(places), evaluation, seed):
        own = places[user]
        if evaluation.rolling:
            wanted = np.flatnonzero(asked[own])
            found += [Question(user, own[max(at - max_events, 0) : at], own[[at]]) for at in wanted]
        else:
            found.append(Question(user, own[known[own]][-max_events:], own[asked[own]]))
    return found


__all__ = [
    "Question",
    "all_events",
    "before_and_in",
    "drawn_users",
    "questions",
]
