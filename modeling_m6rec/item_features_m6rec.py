"""Which words a text holds, in a vector of fixed width: what `tfidf_weight` compares.

Shapes: V = vocabulary, D = tfidf_dim.


Evidence of which item a user wants next that is counted and not learnt: transitions in histories, words in common.

Shapes: U users, M items that events name, N rows of words.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .values_m6rec import WORD

FACTOR, RANGE = 2654435761, 1 << 32
"""Multiplicative hashing (Knuth): ids that follow each other land far apart."""


class HashedTfidf(nn.Module):
    """Writes the words of a text into D places, a rare word as a longer step than a common one.

    Each word has a place and a sign by the hash of its id, so that words that share a place cancel out in the mean, and
    the product of two sketches is close to the cosine of the texts' TF-IDF vectors. Source: feature hashing (Weinberger
    et al., 2009).

    Args:
        words: V, ids there are.
        width: D.
    """

    rarity: torch.Tensor
    """V; zero until words are counted."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("rarity", torch.zeros(words))

    @property
    def is_fitted(self) -> bool:
        """Whether it is known how rare words are."""
        return bool(self.rarity.any())

    def fit(self, texts: Iterable[Sequence[int]]) -> None:
        """Learn how rare each word is among the ids of some texts: log((1 + texts) / (1 + texts with the word))."""
        number, found = 0, torch.zeros_like(self.rarity)
        for text in texts:
            number += 1
            found[list(set(text))] += 1
        self.rarity = torch.log((1 + number) / (1 + found))

    def resize(self, words: int) -> None:
        """Change the number of ids; nobody has used the new ones, so that they are as rare as any."""
        more = max(words - len(self.rarity), 0)
        kept = self.rarity[:words]
        self.rarity = torch.cat((kept, kept.max().expand(more))) if len(kept) else kept

    def forward(self, ids: torch.Tensor, texts: torch.Tensor, number: int, where: torch.Tensor) -> torch.Tensor:
        """Sketch texts.

        Args:
            ids: B x T ids, words of the texts among them.
            texts: B x T, the text that each stands in, counted from 0.
            number: How many texts there are.
            where: B x T bool, the ids that are words of a text.

        Returns:
            number x D, l2-normalised; zero where a text has no word.

        Raises:
            ValueError: If no words have been counted.
        """
        if not torch.compiler.is_exporting() and not self.is_fitted:  # `export_program` asks before it exports
            raise ValueError(
                "tfidf_weight does not know how rare words are: train with it or name it to `m6rec evaluate`, which "
                "count the catalogue's words, or call model.model.word_sketch.fit(processor.encode_items(items))"
            )
        key = ids * FACTOR % RANGE
        steps = self.rarity[ids] * (1 - 2 * (key >> 31))
        # One text more takes what is no word: to choose the words first would make a size that depends on their number.
        place = texts.masked_fill(~where, number) * self.width + (key >> 4) % self.width
        sketch = self.rarity.new_zeros((number + 1) * self.width).index_add(0, place.flatten(), steps.flatten())
        return functional.normalize(sketch.view(number + 1, self.width)[:number], dim=-1)


# ----------------------------------------------------------------------------------- evidence: transitions and words


SCALE = 1 << 30
"""Parts of one transition: totals are whole numbers of them, so that no order of adding and removing changes one."""
WIDTH = 1 << 31
"""A pair of items (i, j) has the key i * WIDTH + j."""
HALF_LIVES = 16
"""Decaying counts are in units of the last moment that is a multiple of so many half-lives."""
ENTRIES_AT_ONCE = 1 << 22
"""Entries of sparse rows that are added up together, where they are not of one user; bounds memory."""
TAIL_SHARE, TAIL_ROWS = 0.25, 1024
"""Rows of words that came later are sorted anew, until they are more than this share of all, and than this number."""


@dataclass(frozen=True)
class Evidence:
    """How a catalogue ranks by what is counted, beside what is learnt.

    The score of item j is `learnt` times the cosine of the user's and the item's vector, plus the sum over the user's
    last items i, the k-th last weighed by `recency[k]`, of `words` times the cosine of the TF-IDF vectors of i and j,
    and `transitions` times P(i, j) + `second` (P P)(i, j), and of `again` where j is i; plus `popularity` times
    log(1 + events of j), of the most frequent item 1. Here

    P(i, j) = n(i, j) / (out(i) ** out_power * in(j) ** in_power).

    n(i, j) is how often j stands `len(steps)` steps or fewer behind i in a history, each step weighed by `steps`, and
    as far before it, weighed by `backwards` too. out and in are the sums of its rows and columns, at least 1. No item
    follows itself. A term of TF-IDF weighs log((1 + items) / (1 + items with the word)) + 1.

    The defaults were chosen once, on validation purchases of Amazon Beauty.
    Source: after "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable Benchmarks" (arXiv 2605.07125).

    Attributes:
        learnt: Weight of the cosine; 0 = the model's vectors are neither made nor read.
        words: Weight of rare words in common.
        transitions: Weight of transitions.
        popularity: Weight of popularity, the same for every user.
        again: Weight of the user's own last items, where what was met before may be recommended.
        recency: Weights of a history's last items, the last one first; earlier ones count nothing.
        second: Weight of what follows an item that follows.
        steps: Weights of pairs that stand one, two, ... steps apart.
        backwards: Weight of a pair against the order of time.
        out_power: How much of the first item's frequency is divided out.
        in_power: How much of the second item's frequency is divided out.
        half_life: Seconds after which a transition counts half; None = it counts for ever.
    """

    learnt: float = 1.0
    words: float = 0.3
    transitions: float = 1.0
    popularity: float = 0.0
    again: float = 0.0
    recency: tuple[float, ...] = (1.0, 0.6, 0.4, 0.3, 0.2)
    second: float = 0.4
    steps: tuple[float, ...] = (1.0, 0.7)
    backwards: float = 0.5
    out_power: float = 0.5
    in_power: float = 0.3
    half_life: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("recency", "steps"):
                numbers = list(value) if isinstance(value, list | tuple) else []
                if not 1 <= len(numbers) <= 100 or not all(map(_is_weight, numbers)):
                    raise ValueError(f"evidence: {name}={value!r}: give 1 to 100 numbers from 0 to 1000")
                object.__setattr__(self, name, tuple(map(float, numbers)))
            elif not (_is_weight(value) or name == "half_life" and value is None or _is_time(name, value)):
                raise ValueError(f"evidence: {name}={value!r}: give a number from 0 to 1000")
            elif value is not None:
                object.__setattr__(self, name, float(value))
        if self.half_life is not None and self.half_life < 1:
            raise ValueError(f"evidence: half_life={self.half_life}: give 1 second or more, or None")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Any) -> "Evidence":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: A setting is unknown or none of its values.
        """
        names = [each.name for each in fields(cls)]
        if not isinstance(settings, dict) or not settings.keys() <= {*names}:
            raise ValueError(f"evidence: expected settings among {', '.join(names)}, got {settings!r}")
        return cls(**settings)

    @property
    def counting(self) -> tuple[Any, ...]:
        """What decides the counts; the other settings can change without counting again."""
        return self.steps, self.backwards, self.half_life

    def origin(self, latest: float) -> float:
        """Return the moment in whose units decaying transitions are counted, for a log that ends at a moment."""
        if self.half_life is None:
            return 0.0
        return math.floor(latest / (HALF_LIVES * self.half_life)) * HALF_LIVES * self.half_life


def _is_weight(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1000


def _is_time(name: str, value: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return name == "half_life" and number and value > 0


class Counts(NamedTuple):
    """Totals by key; keys ascend, no total is 0."""

    keys: np.ndarray
    totals: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, totals: np.ndarray) -> "Counts":
        """Add up whole numbers that have the same key."""
        order = np.argsort(keys, kind="stable")
        keys, totals = keys[order], totals[order]
        new = np.ones(len(keys), bool)
        new[1:] = keys[1:] != keys[:-1]
        starts = np.flatnonzero(new)
        summed = np.add.reduceat(totals, starts) if len(keys) else totals
        kept = summed != 0
        return cls(keys[starts[kept]], summed[kept])

    @classmethod
    def sum(cls, several: Sequence["Counts"]) -> "Counts":
        """Add up counts."""
        return cls.of(*(np.concatenate(parts) for parts in zip(_NONE, *several)))


_NONE = Counts(np.empty(0, np.int64), np.empty(0, np.int64))


class Histories(NamedTuple):
    """Events of some users: those of one user stand together, in order."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    """Seconds."""

    def pairs(self, rule: Evidence, origin: float, counted: np.ndarray | None = None) -> Counts:
        """Count transitions.

        Args:
            rule: Says how.
            origin: As of `Evidence.origin`.
            counted: Events that count as the later one of a pair; None = all.
        """
        keys, totals = [_NONE.keys], [_NONE.totals]
        for step, weight in enumerate(rule.steps, 1):
            first, second = self.items[:-step], self.items[step:]
            stays = (self.users[:-step] == self.users[step:]) & (first != second)
            stays &= True if counted is None else counted[step:]
            first, second = first[stays], second[stays]
            scale: Any = SCALE * weight
            if rule.half_life is not None:
                scale = scale * np.exp2((self.times[step:][stays] - origin) / rule.half_life)
            keys += [first * WIDTH + second, second * WIDTH + first]
            for way in (1, rule.backwards):
                totals.append(np.broadcast_to(np.rint(scale * way), first.shape).astype(np.int64))
        return Counts.of(np.concatenate(keys), np.concatenate(totals))


class Sparse(NamedTuple):
    """Numbers of users at items: sorted by user, then by item."""

    users: np.ndarray
    items: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, values: np.ndarray, width: int) -> "Sparse":
        """Add up, in the order given, the numbers of each user at each item; items are below `width`."""
        if not len(users):
            return cls(users, items, values)
        least, most = int(users.min()), int(users.max())
        keys = (users - least) * width + items
        if (most - least + 1) * width <= 4 * len(keys):
            totals = np.bincount(keys, values, minlength=1)
            found = np.flatnonzero(np.bincount(keys))
            totals = totals[found]
        else:
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            new = np.ones(len(keys), bool)
            new[1:] = keys[1:] != keys[:-1]
            found, totals = keys[new], np.bincount(np.cumsum(new) - 1, values[order])
        rows, columns = np.divmod(found, width)
        return cls(rows + least, columns, totals)

    def part(self, part: slice) -> "Sparse":
        """Return a part of the numbers."""
        return Sparse(self.users[part], self.items[part], self.values[part])

    def groups(self, entries: np.ndarray) -> Iterator[slice]:
        """Cut the numbers into groups of users, given what is made of each number: `ENTRIES_AT_ONCE`, or of one user.

        Users stay whole, so that no other user of a call changes in which order their numbers are added.
        """
        if entries.sum() <= ENTRIES_AT_ONCE:
            yield slice(0, len(entries))
            return
        stops = np.flatnonzero(np.diff(self.users, append=-1)) + 1
        ends = np.concatenate(([0], np.cumsum(entries)[stops - 1]))
        user = start = 0
        while user < len(stops):
            user = max(int(np.searchsorted(ends, ends[user] + ENTRIES_AT_ONCE, side="right")) - 1, user + 1)
            part = slice(start, int(stops[user - 1]))
            yield part
            start = part.stop

    def of_user(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one user's items and numbers."""
        part = slice(*np.searchsorted(self.users, (user, user + 1)))
        return self.items[part], self.values[part]

    def known(self, width: int) -> "Sparse":
        """Return the numbers at items below `width`."""
        kept = self.items < width
        return Sparse(self.users[kept], self.items[kept], self.values[kept])

    def dense(self, num_users: int, width: int) -> np.ndarray:
        """Return the U x `width` table."""
        table = np.zeros((num_users, width))
        table[self.users, self.items] = self.values
        return table


_NOTHING = Sparse(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def recent(histories: Iterable[Sequence[int] | np.ndarray], rule: Evidence) -> Sparse:
    """Weigh the last items of each history by their age.

    >>> recent([[3, 0, 2, 0]], Evidence()).dense(1, 4).tolist()     # the last item is also the last but two
    [[1.4, 0.0, 0.6, 0.3]]
    """
    length = len(rule.recency)
    last = [np.asarray(history, dtype=np.int64)[: -length - 1 : -1] for history in histories]
    users = np.repeat(np.arange(len(last)), [len(own) for own in last])
    items = np.concatenate([np.empty(0, np.int64), *last])
    weights = np.concatenate([np.empty(0), *(rule.recency[: len(own)] for own in last)])
    return Sparse.of(users, items, weights, int(items.max(initial=0)) + 1)


def _stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the places of stretches one after the other.

    >>> _stretches(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


@dataclass(frozen=True, eq=False)
class Transitions:
    """Counted transitions between M items, which never change: `adding` gives others.

    Attributes:
        rule: Says how they are counted and weighed.
        levels: Totals of pairs in parts of `SCALE`, the largest first; a pair may be in several.
        out: Total of each item as the first of a pair.
        into: Total of each item as the second of a pair.
        met: Events of each item.
        unit: What one part counts now.
        origin: As of `Evidence.origin`.

    >>> transitions = Transitions.fit([[0, 1, 2], [0, 1]], num_items=4)
    >>> transitions.matrix()[0].round(3).tolist()       # n(0, 1) = 2, out(0) = 2.7, in(1) = 2.5; n(0, 2) = .7
    [0.0, 0.925, 0.363, 0.0]
    """

    rule: Evidence
    levels: tuple[Counts, ...]
    out: np.ndarray
    into: np.ndarray
    met: np.ndarray
    unit: float = 1 / SCALE
    origin: float = 0.0

    @classmethod
    def empty(cls, rule: Evidence) -> "Transitions":
        """Return none between no items."""
        return cls(rule, (), *(np.empty(0, np.int64) for _ in range(3)))

    @classmethod
    def fit(
        cls, sequences: Iterable[Sequence[int] | np.ndarray], num_items: int, rule: Evidence | None = None
    ) -> "Transitions":
        """Count the transitions in histories without times.

        Args:
            sequences: Items of each history, in order, as numbers.
            num_items: M.
            rule: Says how; None = the defaults.
        """
        rule = rule or Evidence()
        parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        users = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        items = np.concatenate([np.empty(0, np.int64), *parts])
        counts = Histories(users, items, np.zeros(len(items))).pairs(rule, 0.0)
        return cls.empty(rule).adding(counts, num_items).meeting(items)

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.out)

    def adding(self, counts: Counts, num_items: int, latest: float = 0.0) -> "Transitions":
        """Return these and others, in units of the same origin.

        Args:
            counts: The others; negative ones are removed.
            num_items: M, now.
            latest: The last moment of all events; it matters where counts decay.
        """
        sized = self.sized(num_items)
        for own, side in zip((sized.out, sized.into), np.divmod(counts.keys, WIDTH)):
            np.add.at(own, side, counts.totals)
        levels = [*self.levels, counts]
        while len(levels) > 1 and len(levels[-2].keys) < 2 * len(levels[-1].keys):
            levels[-2:] = [Counts.sum(levels[-2:])]
        levels = [own for own in levels if len(own.keys)]
        decayed = 1.0
        if self.rule.half_life is not None:
            decayed = 2 ** ((self.origin - latest) / self.rule.half_life)
        return replace(sized, levels=tuple(levels), unit=decayed / SCALE)

    def sized(self, num_items: int) -> "Transitions":
        """Return these among M items."""
        more = np.zeros(num_items - self.num_items, np.int64)
        out, into, met = (np.concatenate((own, more)) for own in (self.out, self.into, self.met))
        return replace(self, out=out, into=into, met=met)

    def meeting(self, items: np.ndarray, count: int = 1) -> "Transitions":
        """Return these with events of items, each so many times, for their popularity."""
        return replace(self, met=self.met + count * np.bincount(items, minlength=self.num_items))

    @property
    def popularity(self) -> np.ndarray:
        """log(1 + events) of each item, of the most frequent 1: M."""
        counts = np.log1p(self.met)
        return counts / max(counts.max(initial=0), 1e-12)

    def holds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Say of pairs of items whether they were counted.

        >>> Transitions.fit([[0, 1, 2]], num_items=4).holds(np.array([0, 2, 3]), np.array([2, 0, 1])).tolist()
        [True, True, False]
        """
        return np.isin(first * WIDTH + second, self.counts().keys)

    def counts(self) -> Counts:
        """Return all totals."""
        return Counts.sum(self.levels)

    def matrix(self) -> np.ndarray:
        """Return P as a dense matrix, for few items."""
        every = np.arange(self.num_items)
        return self.follow(Sparse(every, every, np.ones(len(every)))).dense(len(every), len(every))

    def scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Score all items for users with these histories: U x M."""
        return self.after(recent(histories, self.rule)).dense(len(histories), self.num_items)

    def after(self, shares: Sparse) -> Sparse:
        """Score what follows weighted items of users, and what follows that: P + second * P P."""
        first = self.follow(shares)
        if not self.rule.second:
            return first
        second = self.follow(first)
        several = zip(first, second._replace(values=self.rule.second * second.values))
        return Sparse.of(*(np.concatenate(parts) for parts in several), self.num_items)

    def follow(self, shares: Sparse) -> Sparse:
        """Multiply weights of users at items with P."""
        weights = shares.values / np.maximum(self.out[shares.items] * self.unit, 1) ** self.rule.out_power
        rows = shares.items * WIDTH
        spans = [tuple(np.searchsorted(keys, (rows, rows + WIDTH))) for keys, _ in self.levels]
        entries = sum((high - low for low, high in spans), np.zeros(len(rows), np.int64))
        weighed = shares._replace(values=weights)
        parts = [self._multiplied(weighed.part(part), spans, part) for part in shares.groups(entries)]
        users, items, values = parts[0] if len(parts) == 1 else map(np.concatenate, zip(_NOTHING, *parts))
        return Sparse(users, items, values / np.maximum(self.into[items] * self.unit, 1) ** self.rule.in_power)

    def _multiplied(self, shares: Sparse, spans: Sequence[tuple[np.ndarray, ...]], part: slice) -> Sparse:
        """Multiply weights of users at items with n, whose rows stand in a part of these spans of each level."""
        users, items, weights = shares
        owners, columns, totals = [_NONE.keys], [_NONE.keys], [_NONE.totals]
        for (keys, own), span in zip(self.levels, spans):
            low, high = (side[part] for side in span)
            places = _stretches(low, high - low)
            owners.append(np.repeat(np.arange(len(items)), high - low))
            columns.append(keys[places] & (WIDTH - 1))
            totals.append(own[places])
        owner, column, total = (np.concatenate(parts) for parts in (owners, columns, totals))
        if len(self.levels) > 1:  # whole numbers first, so that it does not matter in which levels a pair stands
            found = Counts.of(owner * self.num_items + column, total)
            owner, column = np.divmod(found.keys, self.num_items)
            total = found.totals
        return Sparse.of(users[owner], column, weights[owner] * (total * self.unit), self.num_items)


class EventLog:
    """The events that transitions were counted from, so that a user can be forgotten and late events find their place.

    What is counted depends on the events alone, not on the order in which they came or on how many came together: of
    one user they count by time, those of one moment as they came. Nothing here is safe among threads.

    Args:
        rule: Says how they are counted.
        latest: The last moment of events that are not here, which then cannot be forgotten; None = all are here.
    """

    def __init__(self, rule: Evidence, latest: float | None = None) -> None:
        self.rule = rule
        self.numbers: dict[str, int] = {}
        """Number of each user."""
        self._elsewhere = latest
        self._users = self._count = 0
        self._latest = -math.inf if latest is None else latest
        self._events = Histories(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        self._last_items = np.empty((0, len(rule.steps)), np.int64)  # the last one last, -1 = none
        self._last_times = np.empty(0)  # -inf = none

    def __len__(self) -> int:
        return self._count

    @property
    def is_complete(self) -> bool:
        """Whether all events that were counted are here."""
        return self._elsewhere is None

    @property
    def events(self) -> Histories:
        """All events, as they came."""
        return Histories(*(column[: self._count] for column in self._events))

    @property
    def latest(self) -> float:
        """The last moment of all events, 0 if there are none."""
        return self._latest if math.isfinite(self._latest) else 0.0

    def numbered(self, users: Iterable[str]) -> np.ndarray:
        """Return the number of each user; new ones get one."""
        found = []
        for user in users:
            number = self.numbers.get(user)
            if number is None:
                number = self.numbers[user] = self._users
                self._users += 1
            found.append(number)
        return np.array(found, np.int64)

    def without_times(self, users: np.ndarray) -> np.ndarray:
        """Return times for events that have none: each stands behind all of its user's earlier ones."""
        times = np.zeros(len(users))
        known = users < len(self._last_times)
        last = self._last_times[users[known]]
        times[known] = np.where(np.isfinite(last), last, 0.0)
        return times

    def observe(self, new: Histories, transitions: Transitions, num_items: int) -> tuple[Transitions, "Histories"]:
        """Count more events; `append` keeps them.

        Args:
            new: The events, in any order.
            transitions: What was counted of the others.
            num_items: M, with the new ones.

        Returns:
            The transitions with them; and the last events of their users, for `append`.
        """
        order = np.lexsort((new.times, new.users))
        new = Histories(*(column[order] for column in new))
        known = new.users < len(self._last_times)
        last = np.full(len(new.users), -np.inf)
        last[known] = self._last_times[new.users[known]]
        late = np.unique(new.users[new.times < last])
        behind = np.isin(new.users, late)
        on_time = Histories(*(column[~behind] for column in new))
        before = self._tails(np.unique(on_time.users))
        whole, is_new = _joined(before, on_time)
        latest = float(new.times.max(initial=self._latest)) if len(new.times) else self.latest
        origin = self.rule.origin(latest)
        parts = [whole.pairs(self.rule, origin, is_new)]
        if len(late):
            earlier = self._of(late)
            merged, _ = _joined(earlier, Histories(*(column[behind] for column in new)))
            gone = earlier.pairs(self.rule, origin)
            parts += [Counts(gone.keys, -gone.totals), merged.pairs(self.rule, origin)]
            whole = Histories(*(np.concatenate(several) for several in zip(whole, merged)))
        rebased = self._rebased(transitions, latest, num_items)
        return rebased.adding(Counts.sum(parts), num_items, latest).meeting(new.items), whole

    def append(self, new: Histories, whole: Histories) -> None:
        """Keep events that `observe` has counted."""
        count = self._count + len(new.users)
        if count > len(self._events.users):
            room = max(count, 2 * len(self._events.users), 1024) - self._count
            grown = [np.concatenate((own[: self._count], np.empty(room, own.dtype))) for own in self._events]
            self._events = Histories(*grown)
        for column, own in zip(self._events, new):
            column[self._count : count] = own
        self._count = count
        self._latest = float(new.times.max(initial=self._latest))
        self._remember(whole)

    def under(self, rule: Evidence) -> "EventLog":
        """Return the same events, to be counted by another rule."""
        new = EventLog(rule, self._elsewhere)
        new.numbers, new._users = dict(self.numbers), self._users
        new.fill(self.events)
        return new

    def fill(self, events: Histories) -> None:
        """Keep the events, in the order in which they came, of a log that has none yet."""
        order = np.lexsort((events.times, events.users))
        self.append(events, Histories(*(column[order] for column in events)))

    def forget(self, users: Sequence[str], transitions: Transitions) -> tuple[Transitions, int]:
        """Remove all that was counted of users, and their events and ids.

        Returns:
            The transitions without them, and how many events are gone.
        """
        numbers = np.array([self.numbers[user] for user in users if user in self.numbers], np.int64)
        gone = self._of(numbers)
        removed = gone.pairs(self.rule, transitions.origin)
        without = transitions.adding(Counts(removed.keys, -removed.totals), transitions.num_items, self.latest)
        stays = ~np.isin(self.events.users, numbers)
        self._events = Histories(*(column[stays] for column in self.events))
        self._count = len(self._events.users)
        if len(gone.users):
            elsewhere = -math.inf if self._elsewhere is None else self._elsewhere
            self._latest = float(self._events.times.max(initial=elsewhere))
        without = self._rebased(without, self.latest, transitions.num_items)
        for user in users:
            self.numbers.pop(user, None)
        self._last_items[numbers[numbers < len(self._last_items)]] = -1
        self._last_times[numbers[numbers < len(self._last_times)]] = -np.inf
        return without.adding(_NONE, transitions.num_items, self.latest).meeting(gone.items, -1), len(gone.users)

    def counted(self, num_items: int) -> Transitions:
        """Count all events anew."""
        return self._rebased(Transitions.empty(self.rule), self.latest, num_items, anew=True).meeting(self.events.items)

    def _rebased(self, transitions: Transitions, latest: float, num_items: int, anew: bool = False) -> Transitions:
        """Return transitions in units of the origin that a log with another end has."""
        origin = self.rule.origin(latest)
        if transitions.origin == origin and not anew:
            return transitions
        if self.is_complete or anew:
            counts = self._of(None).pairs(self.rule, origin)
        else:
            keys, totals = transitions.counts()
            totals = np.rint(totals * 2 ** ((transitions.origin - origin) / (self.rule.half_life or 1)))
            counts = Counts.of(keys, totals.astype(np.int64))
        nothing = np.zeros(transitions.num_items, np.int64)
        emptied = replace(transitions, levels=(), out=nothing, into=nothing, origin=origin)
        return emptied.adding(counts, num_items, latest)

    def _of(self, users: np.ndarray | None) -> Histories:
        """Return the histories of some users, None = of all."""
        events = self.events
        if users is not None:
            places = np.flatnonzero(np.isin(events.users, users))
            events = Histories(*(column[places] for column in events))
        order = np.lexsort((events.times, events.users))
        return Histories(*(column[order] for column in events))

    def _tails(self, users: np.ndarray) -> Histories:
        """Return the last events of users, as many as a new one makes pairs with."""
        known = users[users < len(self._last_items)]
        width = self._last_items.shape[1]
        owners, items = np.repeat(known, width), self._last_items[known].ravel()
        found = items >= 0
        return Histories(owners[found], items[found], np.repeat(self._last_times[known], width)[found])

    def _remember(self, whole: Histories) -> None:
        """Note the last events of users."""
        count, width = self._users, self._last_items.shape[1]
        if count > len(self._last_items):
            room = max(count, 2 * len(self._last_items)) - len(self._last_items)
            self._last_items = np.concatenate((self._last_items, np.full((room, width), -1)))
            self._last_times = np.concatenate((self._last_times, np.full(room, -np.inf)))
        ends = np.flatnonzero(np.diff(whole.users, append=-1)) + 1
        starts = np.concatenate(([0], ends[:-1]))
        users = whole.users[ends - 1]
        for back in range(1, width + 1):
            there = ends - back >= starts
            self._last_items[users, width - back] = np.where(there, whole.items[np.maximum(ends - back, 0)], -1)
        self._last_times[users] = whole.times[ends - 1]


def _joined(before: Histories, after: Histories) -> tuple[Histories, np.ndarray]:
    """Join two histories of each user in the order of time, and say which events are the second's."""
    users, items, times = (np.concatenate(parts) for parts in zip(before, after))
    order = np.lexsort((times, users))
    return Histories(users[order], items[order], times[order]), order >= len(before.users)


class Postings(NamedTuple):
    """Which rows hold a word."""

    starts: np.ndarray
    """Where each word starts in `rows`, and where the last one ends."""
    rows: np.ndarray

    @classmethod
    def of(cls, columns: np.ndarray, lengths: np.ndarray, first: int) -> "Postings":
        """Sort the words of rows, which are numbered from `first` up."""
        order = np.argsort(columns, kind="stable")
        ends = np.cumsum(np.bincount(columns))
        return cls(np.concatenate(([0], ends)), np.repeat(np.arange(first, first + len(lengths)), lengths)[order])

    def lengths(self, words: np.ndarray) -> np.ndarray:
        """Return how many rows hold each of some words."""
        known = np.minimum(words, max(len(self.starts) - 2, 0))
        lengths = np.diff(self.starts, append=self.starts[-1])[known]
        return np.where(words < len(self.starts) - 1, lengths, 0)

    def entries(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of words among these, and beside each a row that holds it."""
        known = np.flatnonzero(words < len(self.starts) - 1)
        low, high = self.starts[words[known]], self.starts[words[known] + 1]
        return np.repeat(known, high - low), self.rows[_stretches(low, high - low)]


@dataclass(frozen=True, eq=False)
class Words:
    """The words of N rows of texts, and how rare they are among those that are live.

    Attributes:
        vocabulary: Number of each word; shared with later ones, which add to it.
        starts: Where each row starts in `columns`, and where the last one ends: N + 1.
        columns: Words of the rows, each once.
        live: N, False where a row counts no more.

    >>> words = Words.of(["red shoes", "blue shoes", "green tea"])
    >>> words.likeness(words.vectors(recent([[0]], Evidence()))).dense(1, 3).round(2).tolist()
    [[1.0, 0.37, 0.0]]
    """

    vocabulary: dict[str, int]
    starts: np.ndarray
    columns: np.ndarray
    live: np.ndarray
    first: tuple[int, Postings | None] = (0, None)
    """How many rows are sorted by word already, and how."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Words":
        """Read texts."""
        return cls({}, np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, bool)).adding(texts)

    def adding(self, texts: Iterable[str], gone: Sequence[int] = ()) -> "Words":
        """Return these and the words of more rows, with some rows not live."""
        columns, lengths = [], []
        for text in texts:
            own = dict.fromkeys(WORD.findall(text.lower()))
            columns += [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in own]
            lengths.append(len(own))
        live = np.concatenate((self.live, np.ones(len(lengths), bool)))
        live[list(gone)] = False
        starts = np.concatenate((self.starts, self.starts[-1] + np.cumsum(lengths, dtype=np.int64)))
        every = np.concatenate((self.columns, np.array(columns, np.int64)))
        first = self._sorted if "_sorted" in self.__dict__ else self.first
        if len(live) - first[0] > max(TAIL_ROWS, TAIL_SHARE * len(live)):
            first = (0, None)
        return Words(self.vocabulary, starts, every, live, first)

    def kept(self, rows: Sequence[int]) -> "Words":
        """Return the words of some rows, which get new numbers."""
        index = np.asarray(rows, np.int64)
        lengths = self.starts[index + 1] - self.starts[index]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        columns = self.columns[_stretches(self.starts[index], lengths)]
        return Words(self.vocabulary, starts, columns, np.ones(len(index), bool))

    @cached_property
    def rarity(self) -> np.ndarray:
        """How rare each word is; the last entry is for one that no row holds."""
        found = np.bincount(self.columns, np.repeat(self.live, np.diff(self.starts)), len(self.vocabulary) + 1)
        return np.log((1 + self.live.sum()) / (1 + found)) + 1

    @cached_property
    def norms(self) -> np.ndarray:
        """Length of each row's vector, at least 1e-12: N."""
        rows = np.repeat(np.arange(len(self.live)), np.diff(self.starts))
        squares = np.bincount(rows, self.rarity[self.columns] ** 2, len(self.live))
        return np.maximum(np.sqrt(squares), 1e-12)

    @cached_property
    def _sorted(self) -> tuple[int, Postings]:
        count, known = self.first
        if known is not None:
            return count, known
        return len(self.live), Postings.of(self.columns, np.diff(self.starts), 0)

    @cached_property
    def _tail(self) -> Postings:
        count = self._sorted[0]
        return Postings.of(self.columns[self.starts[count] :], np.diff(self.starts[count:]), count)

    def vectors(self, shares: Sparse) -> Sparse:
        """Return the users' vectors, which are the sums of those of weighted rows."""
        lengths = self.starts[shares.items + 1] - self.starts[shares.items]
        words = self.columns[_stretches(self.starts[shares.items], lengths)]
        weights = np.repeat(shares.values / self.norms[shares.items], lengths) * self.rarity[words]
        return Sparse.of(np.repeat(shares.users, lengths), words, weights, len(self.rarity))

    def vector_of(self, text: str, weight: float = 1.0) -> Sparse:
        """Return the vector of a text, times a weight, as that of user 0.

        Words that no row holds only make the text longer.
        """
        unknown = len(self.rarity) - 1
        words = [self.vocabulary.get(word, unknown) for word in dict.fromkeys(WORD.findall(text.lower()))]
        found = np.sort(np.minimum(np.array(words, np.int64), unknown))
        weights = self.rarity[found]
        weights = weight * weights / max(math.sqrt((weights**2).sum()), 1e-12)
        return Sparse(np.zeros(len(found), np.int64), found, weights).known(unknown)

    def likeness(self, vectors: Sparse) -> Sparse:
        """Multiply vectors of users with those of all rows, dead ones too."""
        postings = (self._sorted[1], self._tail)
        parts = []
        for piece in vectors.groups(sum(own.lengths(vectors.items) for own in postings)):
            part = vectors.part(piece)
            weights = part.values * self.rarity[part.items]
            owners, rows = zip(*(own.entries(part.items) for own in postings))
            owner, row = np.concatenate(owners), np.concatenate(rows)
            parts.append(Sparse.of(part.users[owner], row, weights[owner], max(len(self.live), 1)))
        users, rows, values = (np.concatenate(several) for several in zip(_NOTHING, *parts))
        return Sparse(users, rows, values / self.norms[rows])


__all__ = [
    "Counts",
    "EventLog",
    "Evidence",
    "HashedTfidf",
    "Histories",
    "Postings",
    "Sparse",
    "Transitions",
    "Words",
    "recent",
]
