"""The untrained rows of a table of retrieval, with settings chosen on validation."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ...item_features_m6rec import Evidence, Words
from ..config.arguments import BASELINES, EvaluationArguments
from ..data.splits import Split, has_times
from ..rows.examples import RequestWriter
from ..rows.held_out import learnt_before
from .baselines import (
    STRENGTHS,
    Ease,
    LastItems,
    Met,
    NeighboursAndWords,
    RecentPopularity,
    Repeat,
    SimilarText,
    ease_is_quick,
    popularity_scores,
    refuse_large_ease,
)
from .reports import (
    RankingExamples,
    Scores,
    learnt_sequences,
    learnt_times,
    ranking_examples,
    ranking_rows,
    warn_of_repeats,
)
from .tuning import DEFAULT, Trial, best, choose_counting, choose_weights, choose_words, counted, has_ties

logger = logging.getLogger(__name__)
TUNED_USERS = 2000
"""Maximum number of users of the validation part on which settings are chosen."""
TUNED_CELLS = 30_000_000
"""Maximum number of scores (users times items) on which settings are chosen, but at least `LEAST_USERS` users."""
LEAST_USERS = 200
DAY = 86_400.0
HALF_LIVES = (30 * DAY, 3 * DAY, 10 * DAY, 100 * DAY, 300 * DAY)


PLAIN = ("popularity", "similar_text", "neighbours_and_words")
"""Rows without settings, computed within seconds."""


def plain(arguments: EvaluationArguments, split: Split, num_items: int) -> EvaluationArguments:
    """Select the rows without settings, and EASE where it is quick, unless rows are named."""
    quick = [*PLAIN, "ease"] if ease_is_quick(split.train["user_id"].nunique(), num_items) else list(PLAIN)
    quick += [] if arguments.exclude_seen else ["repeat"]
    return dataclasses.replace(arguments, baselines=arguments.baselines or quick)


class Learnt:
    """Events that may be counted for the prediction of a part.

    Args:
        writer: Has the catalogue's rows.
        split: The parts.
        part: "valid" or "test".
        arguments: `observe_validation` is used.
    """

    def __init__(self, writer: RequestWriter, split: Split, part: str, arguments: EvaluationArguments) -> None:
        self.num_items = len(writer.item_ids)
        self.sequences = learnt_sequences(writer, split, part, arguments)
        self.sequence_times = learnt_times(split, part, arguments)
        events = learnt_before(split, part, arguments.observe_validation)
        self.items = np.array([writer.rows[item_id] for item_id in events["item_id"]], dtype=int)
        self.times = events["timestamp"].to_numpy(dtype=float)
        self.transitions: LastItems | None = None

    @property
    def counts(self) -> np.ndarray:
        """Number of events of each item."""
        return np.bincount(self.items, minlength=self.num_items)

    def recent_popularity(self, half_life: float) -> RecentPopularity:
        """Count events with decay by age."""
        return RecentPopularity(self.items, self.times, self.num_items, half_life)


class Untrained:
    """Makes the untrained rules for a log.

    Settings are chosen on the validation part, with the events that may be learnt before it counted; for the measured
    part, the events that may be learnt before that part are counted. Without validation events the first settings are
    used.

    Args:
        writer: Has the catalogue's rows.
        texts: Text of each of the M items.
        split: The parts.
        arguments: `baselines` and `observe_validation` are used.
        seed: Seed of the draw of users for the choice of settings.

    Raises:
        ValueError: `baselines` names EASE, and there are too many items for it.
    """

    def __init__(
        self, writer: RequestWriter, texts: Sequence[str], split: Split, arguments: EvaluationArguments, seed: int
    ) -> None:
        self.writer, self.texts, self.split, self.arguments, self.seed = writer, texts, split, arguments, seed
        self.wanted = self._wanted()

    def _wanted(self) -> list[str]:
        """Return the requested rows that can be computed."""
        named, size = self.arguments.baselines, len(self.texts)
        users = self.split.train["user_id"].nunique()
        if named is not None and "ease" in named:
            refuse_large_ease(users, size)
        wanted = [name for name in BASELINES if named is None or name in named]
        if named is None and not ease_is_quick(users, size):
            logger.info(
                "ease is left out of the table: %s items; name it in evaluation.baselines to compute it", f"{size:,}"
            )
            wanted.remove("ease")
        if "repeat" in wanted and self.arguments.exclude_seen:
            wanted.remove("repeat")
        if "recent_popularity" in wanted and not has_times(self.split.train):
            wanted.remove("recent_popularity")
        if "neighbours_and_words_tuned" in wanted and not len(self.trial):
            wanted.remove("neighbours_and_words_tuned")
        return wanted

    def scores(self, examples: RankingExamples, part: str) -> dict[str, Scores]:
        """Make the scores of the requested rows, for the events of a part: name -> scores."""
        makers: dict[str, Callable[[Learnt, RankingExamples], Scores]] = {
            "popularity": self._popularity,
            "recent_popularity": self._recent_popularity,
            "similar_text": self._similar_text,
            "words": self._words,
            "transitions": self._transitions,
            "neighbours_and_words": self._neighbours_and_words,
            "neighbours_and_words_tuned": self._tuned,
            "ease": self._ease,
            "repeat": self._repeat,
        }
        learnt = Learnt(self.writer, self.split, part, self.arguments)
        return {name: makers[name](learnt, examples) for name in self.wanted}

    @cached_property
    def valid(self) -> RankingExamples:
        """Validation events on which settings are chosen."""
        most = max(min(TUNED_USERS, TUNED_CELLS // max(len(self.texts), 1)), LEAST_USERS)
        asked = dataclasses.replace(self.arguments, max_users=min(most, self.arguments.max_users or most))
        return ranking_examples(self.writer, None, self.split, "valid", asked, self.seed)

    @cached_property
    def trial(self) -> Trial:
        """Comparison of settings on the validation events."""
        times = self.valid.moments if self.share_ties else None
        return Trial(self.valid.histories, self.valid.targets, self.arguments.exclude_seen, times)

    @cached_property
    def share_ties(self) -> bool:
        """Whether tuned rules give events of one time no order: where there are such events, whose order is drawn."""
        return self.arguments.ties == "shuffled" and has_ties(self.before.sequence_times)

    @cached_property
    def before(self) -> Learnt:
        """Events that may be counted for the validation part."""
        return Learnt(self.writer, self.split, "valid", self.arguments)

    @cached_property
    def plain_words(self) -> LastItems:
        """Words in common with the last items, by the rule's own weights."""
        return LastItems(Words.of(self.texts), DEFAULT)

    @cached_property
    def untuned_words(self) -> LastItems:
        """The same, with ties shared where tuned rules share them."""
        return self.plain_words.ruled(dataclasses.replace(DEFAULT, share_ties=self.share_ties))

    @cached_property
    def words(self) -> LastItems:
        """Words in common with the last items, with chosen weights."""
        return choose_words(self.untuned_words, self.trial) if len(self.trial) else self.untuned_words

    @cached_property
    def counting(self) -> Evidence:
        """The chosen rule for counting transitions."""
        times = self.before.sequence_times if self.share_ties else None
        if not len(self.trial):
            return dataclasses.replace(DEFAULT, share_ties=self.share_ties)
        return choose_counting(self.before.sequences, len(self.texts), self.trial, times)

    @cached_property
    def weights(self) -> tuple[float, float]:
        """The chosen weight of words relative to transitions, and its increase for items without events."""
        if not len(self.trial):
            return DEFAULT.words, DEFAULT.unseen
        transitions = counted(self.counting, self.before.sequences, len(self.texts), self.before.sequence_times)
        return choose_weights(transitions, self.words, self.before.counts == 0, self.trial)

    @cached_property
    def half_life(self) -> float:
        """The chosen half-life of recent popularity, in seconds."""
        times = self.valid.times

        def value(half_life: float) -> float:
            rule = self.before.recent_popularity(half_life)
            return self.trial.value(lambda part: rule.scores_at(times[part]))

        return best(HALF_LIVES, value) if len(self.trial) else HALF_LIVES[0]

    @cached_property
    def strength(self) -> float:
        """The chosen ridge penalty of EASE."""
        if not len(self.trial):
            return STRENGTHS[0]
        met = Met(self.before.sequences, len(self.texts))

        def value(strength: float) -> float:
            rule = Ease(met, strength)
            return self.trial.value(lambda part: rule.scores(self.valid.histories[part]))

        return best(STRENGTHS, value)

    def _popularity(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        counts = learnt.counts
        return Scores(lambda part: popularity_scores(counts, len(examples.histories[part])))

    def _recent_popularity(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        rule, times = learnt.recent_popularity(self.half_life), examples.times
        return Scores(lambda part: rule.scores_at(times[part]), {"half_life_days": self.half_life / DAY})

    def _similar_text(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        rule = SimilarText(self.texts)
        return Scores(lambda part: rule.scores(examples.histories[part]))

    def _words(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        rule, settings = self.words, {"recency": list(self.words.rule.recency)}
        return Scores(lambda part: rule.scores(examples.histories[part], examples.moments[part]), settings)

    def _transitions(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        rule = self._counted(learnt)
        settings = _settings(self.counting)
        return Scores(lambda part: rule.scores(examples.histories[part], examples.moments[part]), settings)

    def _neighbours_and_words(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        rule = NeighboursAndWords(self.texts, learnt.sequences, self.plain_words)
        return Scores(lambda part: rule.scores(examples.histories[part]))

    def _tuned(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        transitions, words, (weight, unseen) = self._counted(learnt), self.words, self.weights
        weights = weight * (1 + unseen * (learnt.counts == 0)).astype(np.float32)

        def scores(part: slice) -> np.ndarray:
            own = examples.histories[part], examples.moments[part]
            return transitions.scores(*own) + weights * words.scores(*own)

        chosen = {"words_recency": list(words.rule.recency), "words_weight": weight, "unseen": unseen}
        return Scores(scores, {**_settings(self.counting), **chosen})

    def _counted(self, learnt: Learnt) -> LastItems:
        """Count transitions with the chosen settings; rows share the counts."""
        if learnt.transitions is None:
            learnt.transitions = counted(self.counting, learnt.sequences, len(self.texts), learnt.sequence_times)
        return learnt.transitions

    def _repeat(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        rule = Repeat(learnt.counts)
        return Scores(lambda part: rule.scores(examples.histories[part]))

    def _ease(self, learnt: Learnt, examples: RankingExamples) -> Scores:
        rule = Ease(Met(learnt.sequences, len(self.texts)), self.strength)
        return Scores(lambda part: rule.scores(examples.histories[part]), {"strength": self.strength})


def untrained_rows(
    writer: RequestWriter, texts: Sequence[str], split: Split, part: str, arguments: EvaluationArguments, seed: int
) -> dict[str, dict[str, Any]]:
    """Measure the untrained rows on a part of a log: name -> metrics, as `ranking_rows` returns them.

    Args:
        writer: Has the catalogue's rows.
        texts: Text of each item of the catalogue.
        split: The parts.
        part: "valid" or "test".
        arguments: Settings of the evaluation.
        seed: Seed of all draws.

    Raises:
        ValueError: The part has no event that can be ranked.
    """
    examples = ranking_examples(writer, None, split, part, arguments, seed)
    warn_of_repeats(examples, arguments)
    if not examples.users:
        raise ValueError(f"the {part} part holds no event to rank: hold out more, or ask about repeats too")
    scores = Untrained(writer, texts, split, arguments, seed).scores(examples, part)
    return ranking_rows(scores, examples, Learnt(writer, split, part, arguments).counts, arguments, seed)


def _settings(rule: Evidence) -> dict[str, Any]:
    """Return the rule for counting transitions in JSON form."""
    names = ("steps", "backwards", "out_power", "in_power", "second", "recency", "share_ties")
    return {name: value for name, value in rule.to_dict().items() if name in names}


__all__ = ["Learnt", "Untrained", "plain", "untrained_rows"]
