"""The untrained recommender for a log: transitions, words, popularity and re-visits, weighted on validation."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ...item_features_m6rec import Evidence as Rule
from ...item_features_m6rec import ItemWeights, Reader, ReadTexts, Sparse, Transitions, Words, recent
from ..metrics import ndcg_gains
from .baselines import STRENGTHS, Ease, LastItems, Met, ease_is_quick
from .log_weights import LEARNT, LogFacts, LogWeights
from .products import Following, Likeness, SparseRows, dense, multiplied, transition_rows, word_rows
from .reports import COMPARED_AT
from .tuning import counted, falling, has_ties

RULE = Rule()

TIE_BREAK = 1e-6
"""Weight of popularity as a tie-break: above rounding errors, below any evidence."""
CELLS = 8_000_000
"""Number of scores (users times items) on which settings are chosen: seconds on one core."""
SCORES_AT_ONCE = 1 << 19
"""Number of scores that are computed together, so that they stay in the processor's cache."""
MOST_PAIRS = 10_000_000
"""Maximum number of pairs of events for wide neighbourhoods: they take 40 bytes a pair."""
WORD_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
REFINEMENTS: tuple[tuple[dict[str, Any], ...], ...] = (
    tuple({"linear": weight, "strength": strength} for strength in STRENGTHS for weight in (0.3, 1.0, 3.0, 10.0)),
    tuple({"popularity": weight} for weight in (0.03, 0.1, 0.3, 1.0)),
    tuple({"again": weight} for weight in (0.1, 0.3, 1.0, 3.0)),
    tuple({"unseen": weight} for weight in (0.25, 0.5, 1.0)),
)
"""Changes of the chosen settings, tried one group after the other."""
SURELY = 2.0
"""Number of standard errors by which a difference must exceed zero."""
FOLDS = 5
"""Folds of the users: one is ranked while the other folds are counted."""
LAST_EVENTS = 4
"""Maximum number of a user's last events that are ranked; with many users only the last one."""
LEAST_EVENTS = 700
"""Minimum number of events that are ranked, for any number of items."""


@dataclass(frozen=True)
class EvidenceSettings:
    """Weights of the kinds of evidence. The defaults are those of the row `neighbours_and_words`."""

    steps: tuple[float, ...] = RULE.steps
    """Weights of pairs that are one, two, ... steps apart in a history."""
    backwards: float = RULE.backwards
    """Weight of a pair in reverse time order."""
    powers: tuple[float, float] = (RULE.out_power, RULE.in_power)
    """Exponents of an item's frequency in the normalisation of pairs, for the first and the second item."""
    recency: tuple[float, ...] = RULE.recency
    """Weights of the user's last items, the last one first."""
    second: float = RULE.second
    """Weight of second-order transitions."""
    words: float = RULE.words
    """Weight of rare words in common with the user's last items."""
    texts: float = 0.0
    """Weight of texts similar to the user's last items, by the package's static reader."""
    popularity: float = 0.0
    """Weight of popularity: log(1 + count), scaled to 1 for the most popular item."""
    again: float = 0.0
    """Weight of the user's own last items, if seen items are recommended."""
    unseen: float = 0.0
    """Additional weight of words for items without events, relative to `words`."""
    linear: float = 0.0
    """Weight of a linear model between items (EASE)."""
    strength: float = STRENGTHS[0]
    """Its ridge penalty."""
    share_ties: bool = False
    """Whether consecutive events of a user with equal times have no order."""

    @property
    def rule(self) -> Rule:
        """The settings that a catalogue uses."""
        out_power, in_power = self.powers
        return Rule(
            words=self.words,
            texts=self.texts,
            unseen=self.unseen,
            recency=self.recency,
            second=self.second,
            steps=self.steps,
            backwards=self.backwards,
            out_power=out_power,
            in_power=in_power,
            share_ties=self.share_ties,
        )

    @property
    def catalogue_rule(self) -> Rule:
        """How a catalogue ranks by it alone: no model is read."""
        more: dict[str, Any] = {"popularity": self.popularity + TIE_BREAK, "again": self.again, "linear": self.linear}
        return dataclasses.replace(self.rule, learnt=0.0, **more)

    def item_weights(self, sequences: Sequence[Sequence[int] | np.ndarray], num_items: int) -> ItemWeights | None:
        """Return the weights of the linear model for a catalogue of M items; None if it does not count."""
        return Ease(Met(sequences, num_items), self.strength).table() if self.linear else None

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "EvidenceSettings":
        """Make settings from their JSON form."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()
        }
        return cls(**fields)


WIDE = {"steps": (1.0,) * 30, "backwards": 1.0, "powers": (0.5, 0.5), "second": 0.0}
"""Neighbourhoods: pairs of items in one history, in any order."""
STRUCTURES: tuple[dict[str, Any], ...] = (
    {},
    {"recency": tuple(round(0.8**age, 3) for age in range(12))},
    {**WIDE, "recency": tuple(round(0.9**age, 3) for age in range(30))},
    {**WIDE, "recency": (1.0,) * 50},
)
"""Candidates for pairing and ageing of events, each tried with each weight of words."""
HABITS: tuple[dict[str, Any], ...] = tuple(
    {"recency": recency, "second": 0.0, "again": weight}
    for recency in ((1.0,) * 1000, falling(200, 0.98))
    for weight in (0.3, 1.0, 3.0, 10.0)
)
"""Further candidates if seen items are recommended: how often the user has met an item counts."""


class Evidence:
    """Scores items from histories and texts, without training.

    Args:
        texts: Text of each of the M items.
        sequences: Items of each counted history, in order, as rows of the catalogue.
        settings: Weights of the kinds of evidence.
        times: Times of the items of each counted history, for `share_ties`; None = unknown.

    >>> rule = Evidence(["red shoes", "blue shoes", "green tea", "tea pot"], [[0, 2], [0, 2], [3, 0]])
    >>> rule.scores([[0]])[0].argsort()[::-1].tolist()      # green tea was bought after red shoes
    [2, 0, 3, 1]
    """

    def __init__(
        self,
        texts: Sequence[str],
        sequences: Iterable[Sequence[int] | np.ndarray],
        settings: EvidenceSettings | None = None,
        times: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.settings = settings or EvidenceSettings()
        sequences = list(sequences)
        self.transitions = Transitions.fit(sequences, len(texts), self.settings.rule, times)
        self.words = Words.of(texts)
        self.reading = ReadTexts.of(Reader.of(None), texts) if self.settings.texts else None
        self.popularity = popularity(sequences, len(texts))
        self.word_weights = word_weights(self.settings, self.popularity)
        self.item_weights = self.settings.item_weights(sequences, len(texts))

    def scores(
        self, histories: Iterable[Sequence[int] | np.ndarray], times: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Score all items for users with these item rows in their histories, met at these times: U x M."""
        own, several = self.settings, list(histories)
        shares, shape = recent(several, own.rule, times), (len(several), self.transitions.num_items)
        found = self.transitions.after(shares).dense(*shape) + own.again * shares.dense(*shape)
        found += self.word_weights * self.words.likeness(self.words.vectors(shares)).dense(*shape)
        if self.reading is not None:
            vectors = self.reading.vectors
            found += own.texts * (shares.dense(*shape) @ vectors) @ vectors.T
        if self.item_weights is not None:
            found += own.linear * self.item_weights.follow(shares, shape[1]).dense(*shape)
        return found + (own.popularity + TIE_BREAK) * self.popularity


class FoldedEvidence:
    """Evidence for the training loss: a user is scored by the events of the other folds of users.

    With the user's own events counted, evidence would know each training event, and a network that is trained with it
    would learn nothing.

    Args:
        texts: Text of each of the M items.
        sequences: Items of each training history by user, in order, as rows of the catalogue.
        settings: Weights of the kinds of evidence.
        weight: Factor of the scores.
        seed: Seed of the folds.
        times: Times of the items of each training history by user, for `share_ties`; None = unknown.
    """

    def __init__(
        self,
        texts: Sequence[str],
        sequences: Mapping[str, np.ndarray],
        settings: EvidenceSettings,
        weight: float,
        seed: int = 0,
        times: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.settings, self.weight, self.num_items = settings, weight, len(texts)
        folds = np.random.default_rng(seed).permutation(len(sequences)) % FOLDS
        self.folds = dict(zip(sequences, folds.tolist()))
        words = Words.of(texts)
        self.words = LastItems(words, settings.rule)
        self.word_rows = word_rows(words)
        reading = ReadTexts.of(Reader.of(None), texts).vectors if settings.texts else np.zeros((len(texts), 0))
        self.reading = torch.from_numpy(reading).float()
        users = np.array([*sequences], dtype=object)
        self.counted = []
        for left_out in range(FOLDS):
            others = users[folds != left_out].tolist()
            moments = None if times is None else [times[user] for user in others]
            self.counted.append(self._counted([sequences[user] for user in others], moments))

    def _counted(self, sequences: list[np.ndarray], times: list[np.ndarray] | None) -> "_Counted":
        """Count the events of the other folds."""
        own, size = self.settings, self.num_items
        transitions = counted(own.rule, sequences, size, times)
        popular = popularity(sequences, size)
        weights = torch.from_numpy(word_weights(own, popular)).float()
        ease = Ease(Met(sequences, size), own.strength) if own.linear else None
        counts = _Counted(None, ease, None, weights, torch.from_numpy(own.popularity * popular).float())
        if transitions.table is None:
            assert isinstance(transitions.evidence, Transitions)
            return counts._replace(transitions=transition_rows(transitions.evidence))
        return counts._replace(table=self._table(counts, transitions.table), ease=None)

    def _table(self, own: "_Counted", rows: np.ndarray) -> torch.Tensor:
        """Return the evidence for each item after each item, given that by transitions: M x M."""
        found = torch.from_numpy(rows)
        if self.settings.words:
            every = self.words.table
            assert every is not None
            found.addcmul_(torch.from_numpy(every), own.word_weights)
        found.diagonal().add_(self.settings.again)
        if own.ease is not None:
            found.add_(own.ease.rows(np.arange(self.num_items)), alpha=self.settings.linear)
        return found.addmm_(self.reading, self.reading.T, alpha=self.settings.texts)

    def _rows(self, own: "_Counted", items: np.ndarray, candidates: np.ndarray) -> torch.Tensor:
        """Return the evidence for C candidates after each of D items, all distinct: D x C."""
        if own.table is not None:
            return own.table[torch.from_numpy(items)].index_select(1, torch.from_numpy(candidates))
        assert own.transitions is not None
        asked, rule = torch.from_numpy(candidates), self.settings
        found = own.transitions.block(items, candidates).to_dense()
        if rule.second:
            second = multiplied(own.transitions.block(items), own.transitions.block(columns=candidates))
            found.add_(second, alpha=rule.second)
        if rule.words:
            alike = multiplied(self.word_rows.block(items), self.word_rows.block(candidates).t())
            found.addcmul_(alike, own.word_weights[asked])
        if rule.again:
            found[torch.from_numpy(items)[:, None] == asked] += rule.again
        if own.ease is not None:
            found.add_(own.ease.rows(items, candidates), alpha=rule.linear)
        return found.addmm_(self.reading[torch.from_numpy(items)], self.reading[asked].T, alpha=rule.texts)

    def scores(
        self,
        users: Sequence[str],
        histories: Sequence[np.ndarray],
        times: Sequence[np.ndarray] | None = None,
        candidates: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Score candidates for users with these item rows in their histories.

        Args:
            users: U users.
            histories: Rows of the items that each has met.
            times: When, for `share_ties`; None = unknown.
            candidates: C distinct rows of the catalogue; None = all.

        Returns:
            U x C in float32.
        """
        shares = recent(histories, self.settings.rule, times)
        asked = np.arange(self.num_items) if candidates is None else candidates
        folds = np.array([self.folds[user] for user in users], dtype=int)
        numbers = np.unique(np.array(users), return_inverse=True)[1]
        found = torch.empty(len(users), len(asked))
        for fold in np.unique(folds).tolist():
            self._score_fold(found, self.counted[fold], np.flatnonzero(folds == fold), numbers, shares, asked)
        return found.mul_(self.weight)

    def _score_fold(
        self,
        found: torch.Tensor,
        own: "_Counted",
        places: np.ndarray,
        numbers: np.ndarray,
        shares: Sparse,
        candidates: np.ndarray,
    ) -> None:
        """Score the candidates at the places of one fold's users.

        Histories of one user have most items in common: one product of weights by age and the evidence after these
        items scores all of them.
        """
        shares = Sparse(*(column[np.isin(shares.users, places)] for column in shares))
        items, columns = np.unique(shares.items, return_inverse=True)
        rows, popular = self._rows(own, items, candidates), own.popularity[torch.from_numpy(candidates)]
        owners = numbers[shares.users]
        for number in np.unique(numbers[places]).tolist():
            part = owners == number
            known, column = np.unique(columns[part], return_inverse=True)
            at = places[numbers[places] == number]
            weights = torch.zeros(len(at), len(known))
            weights[np.searchsorted(at, shares.users[part]), column] = torch.from_numpy(shares.values[part]).float()
            found[torch.from_numpy(at)] = torch.addmm(popular, weights, rows[torch.from_numpy(known)])


class _Counted(NamedTuple):
    """Events of all folds but one."""

    transitions: SparseRows | None
    """M x M; None if they are in the table."""
    ease: Ease | None
    """The linear model; None if it does not count, or is in the table."""
    table: torch.Tensor | None
    """M x M: evidence for each item after one item; None if there are too many items."""
    word_weights: torch.Tensor
    popularity: torch.Tensor


def word_weights(settings: EvidenceSettings, popular: np.ndarray) -> np.ndarray:
    """Return the weight of words for each item, given the items' popularity: M."""
    return settings.words * (1 + settings.unseen * (popular == 0))


def popularity(sequences: Iterable[Sequence[int] | np.ndarray], num_items: int) -> np.ndarray:
    """Return log(1 + count) of the items of histories, scaled to a maximum of 1: M.

    >>> popularity([[0, 1, 1], [1]], 3).round(2).tolist()
    [0.5, 1.0, 0.0]
    """
    items = np.concatenate([np.empty(0, dtype=int), *(np.asarray(each, dtype=int) for each in sequences)])
    counts = np.log1p(np.bincount(items, minlength=num_items))
    return counts / max(counts.max(initial=0), 1e-12)


@dataclass(frozen=True)
class Choice:
    """The chosen settings, and their gain over the default on the events used for the choice."""

    settings: EvidenceSettings
    events: int
    """Number of held-out events on which settings were compared."""
    value: float
    """Mean NDCG@10 of the chosen settings."""
    default_value: float
    tried: int
    """Number of settings compared."""
    default: str = "rule"
    """What `settings` are unless others are clearly better: `rule`, the row `neighbours_and_words`, or `other logs`,
    weights learnt over several other logs."""

    @property
    def origin(self) -> str:
        """Where the settings come from, in words."""
        if self.events and self.value != self.default_value:
            return f"chosen on {self.events:,} held-out events"
        return "learnt over other logs" if self.default == "other logs" else "those of the rule"


LEARNT_BELOW = 20_000
"""Number of events below which weights learnt over other logs are the default, unless the rule ranks the held-out
events better. With more they are tried like others: the log's own events then decide (docs/experiments.md)."""


def learnt_settings(words: Words, sequences: Sequence[np.ndarray], weights: LogWeights = LEARNT) -> EvidenceSettings:
    """Return the settings that other logs suggest for a log, by its facts.

    Args:
        words: Words of the M items.
        sequences: Items of each user's known events, in order, as rows of the catalogue.
        weights: What was learnt over the other logs.
    """
    facts = LogFacts.of(words, sequences)
    alike, popular = weights.of(facts)
    fields = {**weights.structure(facts), "recency": weights.recency}
    return EvidenceSettings(**fields, words=alike, popularity=popular)


def choose_evidence(
    texts: Sequence[str],
    sequences: Sequence[np.ndarray],
    exclude_seen: bool,
    seed: int = 0,
    weights: LogWeights = LEARNT,
    times: Sequence[np.ndarray] | None = None,
) -> Choice:
    """Choose settings for a log: a default unless others are clearly better.

    The default of a log with fewer than `LEARNT_BELOW` events is what other logs suggest for it (`learnt_settings`) or
    the rule, whichever ranks the held-out events better; that of a larger one is the rule. The last event (or events)
    of users are ranked from the events before, with the events of the other folds counted: fold by fold, until there
    are as many events as can be ranked in seconds. The chosen settings have the largest gain of NDCG@10 over the
    default minus `SURELY` standard errors of the gain, so that noise of few users changes nothing. First pairing and
    ageing of events are chosen, with the weight of words; then a linear model between items (EASE) if it is quick,
    popularity, and re-visits if seen items are recommended. All settings share ties if events of a user have equal
    times.

    Args:
        texts: Text of each of the M items.
        sequences: Items of each user's known events, in order, as rows of the catalogue.
        exclude_seen: Leave out items that a user has met before.
        seed: Seed of the draw.
        weights: What was learnt over other logs.
        times: Times of each user's known events; None: unknown, or the order of equal times has a meaning.
    """
    times = times or [np.full(len(own), np.nan) for own in sequences]
    words, ties = Words.of(texts), has_ties(times)
    learnt, rule = learnt_settings(words, sequences, weights), EvidenceSettings()
    learnt, rule = (dataclasses.replace(own, share_ties=ties) for own in (learnt, rule))
    is_small = sum(map(len, sequences)) < LEARNT_BELOW
    folds = _folds(sequences, times, max(CELLS // max(len(texts), 1), LEAST_EVENTS), exclude_seen, seed)
    if not folds:
        nothing = float("nan")
        return Choice(learnt if is_small else rule, 0, nothing, nothing, 0, "other logs" if is_small else "rule")
    likeness = Likeness(words)
    trials = [_Trial(likeness, len(texts), fold, exclude_seen) for fold in folds]
    users = np.unique(np.concatenate([trial.users for trial in trials]), return_inverse=True)[1]
    gains: dict[EvidenceSettings, np.ndarray] = {}

    def measure(settings: EvidenceSettings) -> None:
        gains[settings] = np.concatenate([trial.gains(settings) for trial in trials])

    habits = [] if exclude_seen else [EvidenceSettings(**fields, share_ties=ties) for fields in HABITS]
    learnt_first = [learnt] if _is_affordable(learnt, sequences) else []
    for settings in [*learnt_first, *_structures(sequences, ties), *habits]:
        measure(settings)
    default, name = rule, "rule"
    if is_small and gains[learnt].mean() >= gains[rule].mean():
        default, name = learnt, "other logs"
    best = _clearly_best(gains, default, users)
    left_out = {"again"} if exclude_seen else set()
    left_out |= set() if ease_is_quick(len(sequences), len(texts)) else {"linear"}
    for group in REFINEMENTS:
        if not left_out & group[0].keys():
            for changed in group:
                measure(dataclasses.replace(best, **changed))
            best = _clearly_best(gains, default, users)
    return Choice(best, len(users), float(gains[best].mean()), float(gains[default].mean()), len(gains), name)


class _Fold(NamedTuple):
    """Held-out events of a fold of the users, and the events of the other users."""

    counted: list[np.ndarray]
    """Items of each counted history."""
    counted_times: list[np.ndarray]
    """Their times."""
    users: list[int]
    """The user of each of E held-out events."""
    histories: list[np.ndarray]
    """The user's items before it."""
    times: list[np.ndarray]
    """Their times."""
    targets: np.ndarray
    """Its item."""


def _folds(
    sequences: Sequence[np.ndarray],
    times: Sequence[np.ndarray],
    count: int,
    exclude_seen: bool,
    seed: int,
) -> list[_Fold]:
    """Draw held-out events, fold by fold of the users."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    askable = sum(len(sequence) > 1 for sequence in sequences)
    last = min(-(-count // max(askable, 1)), LAST_EVENTS)
    folds, found = [], 0
    for fold in range(FOLDS):
        own = order[fold::FOLDS]
        users, places, targets = [], [], []
        for user in own.tolist():
            sequence = sequences[user]
            for place in range(max(len(sequence) - last, 1), len(sequence)):
                if exclude_seen and sequence[place] in sequence[:place]:
                    continue
                users.append(user)
                places.append(place)
                targets.append(int(sequence[place]))
        users, places, targets = (each[: count - found] for each in (users, places, targets))
        found += len(users)
        if users:
            others = np.setdiff1d(np.arange(len(sequences)), own).tolist()
            counted, moments = ([each[user] for user in others] for each in (sequences, times))
            met, at = ([each[user][:place] for user, place in zip(users, places)] for each in (sequences, times))
            folds.append(_Fold(counted, moments, users, met, at, np.array(targets)))
        if found >= count:
            break
    return folds


def _structures(sequences: Sequence[np.ndarray], ties: bool) -> Iterator[EvidenceSettings]:
    for fields in STRUCTURES:
        for weight in WORD_WEIGHTS:
            settings = EvidenceSettings(**fields, words=weight, share_ties=ties)
            if _is_affordable(settings, sequences):
                yield settings


def _is_affordable(settings: EvidenceSettings, sequences: Sequence[np.ndarray]) -> bool:
    """Return whether the pairs of events are few enough for settings to be tried; those of the rule always are."""
    lengths = np.array([len(sequence) for sequence in sequences])
    pairs = np.minimum(lengths, len(settings.steps)).astype(float) @ lengths
    return settings.steps == RULE.steps or bool(pairs <= MOST_PAIRS)


def _clearly_best(
    gains: Mapping[EvidenceSettings, np.ndarray], default: EvidenceSettings, users: np.ndarray
) -> EvidenceSettings:
    """Return the settings with the largest gain over the defaults minus `SURELY` standard errors over users."""
    counts = np.bincount(users)

    def surely(settings: EvidenceSettings) -> float:
        difference = gains[settings] - gains[default]
        mean = difference.mean()
        # Plus one lost event: very few hits show no variance.
        spread = np.sqrt((np.bincount(users, difference - mean) ** 2).sum() + 1) / counts.sum()
        return float(mean - SURELY * spread)

    best = max(gains, key=surely)
    return best if surely(best) > 0 else default


class _Trial:
    """Measures settings on held-out events; consecutive settings share intermediate results."""

    def __init__(self, likeness: Likeness, num_items: int, fold: _Fold, exclude_seen: bool) -> None:
        self.likeness, self.num_items, self.fold = likeness, num_items, fold
        self.users, self.targets = np.array(fold.users), fold.targets
        self.popularity = popularity(fold.counted, num_items).astype(np.float32)
        seen = fold.histories if exclude_seen else []
        self._owners = np.repeat(np.arange(len(seen)), [len(history) for history in seen])
        self._seen = np.concatenate([np.empty(0, int), *seen])
        self._structure: Any = None
        self._parts: dict[str, np.ndarray] = {}
        self._met: Met | None = None
        self._linear: tuple[Any, np.ndarray] = (None, np.empty(0))

    def gains(self, own: EvidenceSettings) -> np.ndarray:
        """Return each event's NDCG."""
        self._begin(own)
        follow = self._part("follow", lambda: self._following.after(self._shares, len(self.targets)))
        terms: list[tuple[Any, np.ndarray]] = []
        if own.second:
            terms.append((own.second, self._part("second", lambda: self._following.product(torch.from_numpy(follow)))))
        if own.words:
            alike = self._part("words", lambda: self.likeness(torch.from_numpy(self._weights())))
            terms.append((word_weights(own, self.popularity).astype(np.float32), alike))
        if own.again:
            terms.append((own.again, self._weights()))
        if own.linear:
            terms.append((own.linear, self._linearly(own)))
        popular, ranks = (own.popularity + TIE_BREAK) * self.popularity, []
        at_once = max(SCORES_AT_ONCE // self.num_items, 1)
        for start in range(0, len(self.targets), at_once):
            part = slice(start, start + at_once)
            scores = follow[part].copy()
            for weight, term in terms:
                scores += weight * term[part]
            scores += popular
            ranks.append(self._ranks(scores, start))
        return ndcg_gains(np.concatenate(ranks), COMPARED_AT)

    def _ranks(self, scores: np.ndarray, start: int) -> np.ndarray:
        """Rank the targets of consecutive events by their scores, which are changed: E."""
        events = np.arange(len(scores))
        targets = scores[events, self.targets[start : start + len(scores)]][:, None]
        seen = slice(*np.searchsorted(self._owners, (start, start + len(scores))))
        scores[self._owners[seen] - start, self._seen[seen]] = -np.inf
        higher, equal = (np.count_nonzero(own, axis=1) for own in (scores > targets, scores == targets))
        return 1 + higher + np.maximum(equal - 1, 0) / 2

    def _begin(self, own: EvidenceSettings) -> None:
        """Drop intermediate results that these settings do not share."""
        structure = (own.steps, own.backwards, own.powers, own.recency, own.share_ties)
        if structure != self._structure:
            fold = self.fold
            transitions = Transitions.fit(fold.counted, self.num_items, own.rule, fold.counted_times)
            self._following = Following(transitions)
            self._shares = recent(fold.histories, own.rule, fold.times)
            self._parts, self._structure = {}, structure

    def _linearly(self, own: EvidenceSettings) -> np.ndarray:
        """Score all items by the linear model, with all its weights."""
        key = own.strength, own.recency, own.share_ties
        if self._linear[0] != key:
            self._met = self._met or Met(self.fold.counted, self.num_items)
            ease = Ease(self._met, own.strength)
            self._linear = key, ease.weighed(self._shares, len(self.targets))
        return self._linear[1]

    def _weights(self) -> np.ndarray:
        """Return the weights of the users' last items: U x M."""
        return self._part("shares", lambda: dense(self._shares, len(self.targets), self.num_items))

    def _part(self, name: str, make: Callable[[], torch.Tensor]) -> np.ndarray:
        if name not in self._parts:
            self._parts[name] = make().numpy()
        return self._parts[name]


__all__ = [
    "Choice",
    "Evidence",
    "EvidenceSettings",
    "FoldedEvidence",
    "choose_evidence",
    "learnt_settings",
    "popularity",
]
