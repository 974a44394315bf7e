"""From requests to ranked items: rows of ids, scores of targets, user vectors, and the contribution of each event.

Its parts: scoring, which runs the model; the guard and the re-ranker, which decide what may be listed and in which
order; and `Ranker`, which makes the answers by the wishes of each request, such as a filter or a boost.
They are one file, with a section for each, because a checkpoint carries few files and all in one folder.

Shapes: B rows, T tokens, N targets of a request or items of an answer, E events of a request, I values of a score (1,
or one per interaction), D = vector_width.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from .catalogue_m6rec import (
    CatalogueView,
    Conditions,
    Item,
    Model,
    NamedText,
    Past,
    Predicate,
    cosines,
    embed,
    item_identity,
    item_texts,
    without_stats,
)
from .configuration_m6rec import M6RecConfig
from .item_features_m6rec import Evidence, num_recent
from .layout_m6rec import Layout, Picked, Piece
from .losses_m6rec import form_of
from .segment_cache_m6rec import SegmentCache, UserStates
from .values_m6rec import MAPPINGS, KnownItem, normalize_id, short, time_seconds

# ----------------------------------------------------------------------------------------------- scores of candidates


logger = logging.get_logger(__name__)

TARGETS_A_ROW = 100
"""Most targets in a row of the plan "flat", whose masks grow with the square of their number."""

TOKENS_AT_ONCE = 16384
"""Tokens of rows that run together; this bounds memory."""

TEXT_TOKENS_AT_ONCE = 2048
"""Most tokens of a row whose written texts attend to its source in every layer: masks grow with their square."""


BROKEN = "user vectors hold NaN: the model's weights are damaged, or too large for its number type"


class Tokens(NamedTuple):
    """A part of a row: its ids, and for each id the row of item embeddings."""

    ids: list[int]
    memory: list[int]

    def followed_by(self, others: Sequence["Tokens"]) -> "Tokens":
        """Return this part and others after it."""
        parts = [self, *others]
        return Tokens([i for part in parts for i in part.ids], [row for part in parts for row in part.memory])


@dataclass
class EncodedRequest:
    """One encoded request: the source, the targets, and the texts of the last events, which fit."""

    source: Tokens
    targets: list[Tokens]
    events: list[str]
    spans: list[tuple[int, int]]
    """(start, end) of each event's tokens in the source."""

    confidence: float | None = None
    """How sure all answers must be for the last joint layers to be left out; None = these are never left out."""
    exit_layer: int | None = None
    """The joint layer that gave the answers; None = the scorer's."""
    pieces: Sequence[Piece] = ()
    """If there are no targets, the ids of each segment of the source, and its row of item embeddings."""

    def rows(self, chosen: Sequence[int], most_targets: int | None, most_tokens: int | None) -> list[Tokens]:
        """Make rows of the source with the chosen targets; targets do not attend to each other."""
        parts: list[list[Tokens]] = []
        tokens = 0
        for target in (self.targets[index] for index in chosen):
            tokens += len(target.ids)
            full = bool(parts) and most_targets is not None and len(parts[-1]) == most_targets
            if not parts or full or (most_tokens is not None and tokens > most_tokens):
                parts.append([])
                tokens = len(self.source.ids) + len(target.ids)
            parts[-1].append(target)
        return [self.source.followed_by(part) for part in parts]


class Scorer:
    """Runs a model on requests.

    It calls the outermost model's `forward`: with prefix or prompt tuning only the PeftModel adds the virtual tokens,
    and only the plan "flat" accepts them.

    Args:
        model: The model, possibly inside a PeftModel.
        processor: Processor that makes the rows.
        segment_cache: Cache of segment states.
        user_states: Cache of user histories; None = no cache.
        exit_layer: Number of joint layers to run; None = all.
        version: As of `M6RecForRecommendation.embed_users`.
    """

    def __init__(
        self,
        model: Model,
        processor: Any,
        segment_cache: SegmentCache,
        user_states: UserStates | None = None,
        exit_layer: int | None = None,
        version: object | None = None,
    ) -> None:
        self.model, self.processor, self.segment_cache, self.exit_layer = model, processor, segment_cache, exit_layer
        self.version, self.user_states = version, user_states
        self.config = model.config
        self.kinds = self.config.kind_token_ids
        self._opener, self._kinds, self._text = self.config.bos_token_id, {*self.kinds.values()}, self.kinds["text"]
        self.virtual = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
        self.plan = {"plan": "cached", "segment_cache": segment_cache, "user_states": user_states}
        self.plan = {} if self.virtual else self.plan
        compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")
        self._by_segments = not (self.virtual or compiled) and model.reads_sources
        """Whether users are embedded from the segments of their sources."""

    def check(self, task: str, confidence: Any) -> None:
        """Refuse early exits where they are impossible, and warn of exits that were not trained.

        Args:
            task: Task of the requests.
            confidence: Their `exit_confidence`, None if absent.
        """
        trained = self.config.exit_layers or []
        if confidence is None:
            early = self.exit_layer not in (None, self.config.num_joint_layers)
            if early and (task not in self.config.scored or self.exit_layer not in trained):
                logger.warning_once(
                    f"exit_layer={self.exit_layer} was not trained for task {task!r}: exit_layers={trained} of the "
                    "configuration says after which joint layers scores were trained as well"
                )
            return
        check_confidence(confidence)
        if self.exit_layer is not None:
            raise ValueError(f"exit_layer={self.exit_layer} and exit_confidence={confidence} both say where to stop")
        if task not in self.config.scored or not form_of(task, self.config).is_probability:
            raise ValueError(
                f"exit_confidence={confidence}: the answers to task {task!r} are no probabilities of this model, so "
                "none is sure: leave it out, or give exit_layer"
            )
        if self.virtual:
            raise ValueError(
                f"exit_confidence={confidence}: with prefix or prompt tuning all requests of a batch are read equally "
                "deep: give exit_layer"
            )
        if not trained:
            logger.warning_once(
                f"exit_confidence={confidence}: no joint layer but the last was trained to score (exit_layers of the "
                "configuration); each is used nevertheless"
            )

    def encode(self, requests: Sequence[Any], task: str) -> list[EncodedRequest]:
        """Encode requests for a task."""
        return [self._encoded(reading) for reading in self.processor.read_many(requests, task)]

    def _encoded(self, reading: Any) -> EncodedRequest:
        ids, opener = reading.input_ids, self._opener  # reading an attribute of a configuration is slow
        starts = [index for index, token in enumerate(ids) if token == opener] if opener in ids else []
        cuts = pairwise([0, *starts, len(ids)])
        source, *targets = [Tokens(ids[start:end], reading.item_embedding_ids[start:end]) for start, end in cuts]
        kinds = self._kinds
        own = reading.segments[: sum(map(kinds.__contains__, source.ids))] if targets else reading.segments
        events: list[list[str]] = []
        for kind, text in own:
            if kind == "event":
                events.append([text])
            elif events and kind in ("item", "text"):
                events[-1].append(text)
        texts = [" ".join(each) for each in events]
        return EncodedRequest(source, targets, texts, reading.events, pieces=() if targets else reading.pieces)

    def scores(self, encoded: Sequence[EncodedRequest], task: str) -> list[torch.Tensor]:
        """Score all targets of each request, N x I each; record the exit of requests with an exit confidence."""
        rows: list[Tokens] = []
        owners: list[int] = []
        for number, each in enumerate(encoded):
            own = self._rows(each, range(len(each.targets)))
            rows += own
            owners += [number] * len(own)
        limits = [encoded[number].confidence for number in owners]
        parts: list[list[torch.Tensor]] = [[] for _ in encoded]
        for number, (values, exit_layer) in zip(owners, self._target_values(rows, task, limits=limits)):
            parts[number].append(values)
            encoded[number].exit_layer = exit_layer
        return [torch.cat(several) for several in parts]

    def users(self, encoded: Sequence[EncodedRequest]) -> torch.Tensor:
        """Return the vector of each user: B x D."""
        if not self._by_segments:
            return self._user_vectors([each.source for each in encoded])
        found: list[Any] = [None] * len(encoded)
        opens, ends = ((index,) for index in (self.config.source_token_id, self.config.source_end_token_id))
        for part in _sorted_batches([each.source for each in encoded]):
            sources = [[(opens, 0), *encoded[row].pieces, (ends, 0)] for row in part]
            vectors = self.model.embed_users(
                sources, self.segment_cache, self.exit_layer, self.version, self.user_states
            )
            vectors = vectors.float().cpu()
            if not np.isfinite(vectors.detach().numpy()).all():
                raise ValueError(BROKEN)
            for row, vector in zip(part, vectors):
                found[row] = vector
        return torch.stack(found)

    def scores_without(self, encoded: EncodedRequest, chosen: Sequence[int], task: str) -> torch.Tensor:
        """Score chosen targets with one event hidden, for each event: E x N x I."""
        rows, spans = self._rows(encoded, chosen), encoded.spans
        hidden = [span for span in spans for _ in rows]
        found = iter(self._target_values(rows * len(spans), task, hidden, (), encoded.exit_layer))
        return torch.stack([torch.cat([next(found)[0] for _ in rows]) for _ in spans])

    def users_without(self, encoded: EncodedRequest) -> torch.Tensor:
        """Return the user's vector with one event hidden, for each event: E x D."""
        return self._user_vectors([encoded.source] * len(encoded.spans), encoded.spans)

    def _rows(self, encoded: EncodedRequest, chosen: Sequence[int]) -> list[Tokens]:
        if self.virtual:
            return encoded.rows(chosen, TARGETS_A_ROW, None)
        if self.config.writes_from_source and any(self._text in target.ids for target in encoded.targets[:1]):
            return encoded.rows(chosen, None, TEXT_TOKENS_AT_ONCE)
        # Targets with a common exit decision stay in one row.
        return encoded.rows(chosen, None, TOKENS_AT_ONCE if encoded.confidence is None else None)

    def _target_values(
        self,
        rows: Sequence[Tokens],
        task: str,
        hidden: Sequence[tuple[int, int]] | None = None,
        limits: Sequence[float | None] = (),
        exit_layer: int | None = None,
    ) -> list[tuple[torch.Tensor, int | None]]:
        """Return N x I values of each row's targets, and their exit if `limits` decide it."""
        found: list[Any] = [None] * len(rows)
        options: dict[str, Any] = {"return_vectors": False, "exit_layer": exit_layer or self.exit_layer}
        if task == "plausibility":  # of an item's own tokens: the template's words would dilute short texts more
            options |= {"return_plausibility": True, "plausibility_lead": self.processor.plausibility_lead()}
        decision = _Decision(self.model, task, limits) if any(limits) else None
        for part, out in self._read(rows, hidden, decision, options):
            values = out.plausibility if task == "plausibility" else self.model.read_scores(out.scores, task)
            values = values if values.dim() == 3 else values[..., None]
            exits = [None] * len(part) if out.exit_layers is None else out.exit_layers.tolist()
            for row, own, last in zip(part, values.float().cpu(), exits):
                found[row] = own[: rows[row].ids.count(self._opener)], last
        return found

    def _user_vectors(self, rows: Sequence[Tokens], hidden: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        found: list[Any] = [None] * len(rows)
        options = {"exit_layer": self.exit_layer, "return_vectors": "users"}
        for part, out in self._read(rows, hidden, None, options):
            if out.user_vectors is None:
                raise ValueError(
                    "task 'retrieval' needs a model with segment layers (num_joint_layers below num_hidden_layers): "
                    "score candidates by another task"
                )
            for row, vectors in zip(part, out.user_vectors.float().cpu()):
                places = vectors[vectors.isfinite().all(-1)]
                if not len(places):
                    raise ValueError(BROKEN)
                found[row] = places[-1]  # the row's last place
        return torch.stack(found)

    def _read(
        self,
        rows: Sequence[Tokens],
        hidden: Sequence[tuple[int, int]] | None,
        decision: "_Decision | None",
        options: dict[str, Any],
    ) -> Iterator[tuple[list[int], Any]]:
        """Run rows in batches of similar length and bounded size; also yield the numbers of the rows.

        `hidden` gives for each row the (start, end) of its hidden event.
        """
        for part in _sorted_batches(rows):
            features = [{"input_ids": rows[row].ids, "item_embedding_ids": rows[row].memory} for row in part]
            batch = {name: value.to(self.model.device) for name, value in self.processor.pad(features).items()}
            if hidden is not None:
                place = torch.arange(batch["input_ids"].shape[1], device=self.model.device)
                first, end = torch.tensor([hidden[row] for row in part], device=place.device).T[..., None]
                batch["hidden_events"] = (place >= first) & (place < end)
            if decision is not None:
                batch["decide"] = decision.of(batch["input_ids"], part)
            yield part, self.model(**batch, **self.plan, return_logits=False, **options)


class _Decision(NamedTuple):
    """Decides after an exit which rows are done: all answers reach the row's confidence limit."""

    model: Model
    task: str
    limits: Sequence[float | None]
    """Limit of each row; with 1 or more, or None, the row never exits early."""

    def of(
        self, ids: torch.Tensor, part: Sequence[int]
    ) -> Callable[[torch.Tensor, Picked, Layout, list[int]], torch.Tensor]:
        """Return the decision function for a batch of B x T ids, which are these rows."""
        limits = torch.tensor([math.inf if (self.limits[row] or 1) >= 1 else self.limits[row] for row in part])

        def decide(states: torch.Tensor, kept: Picked, lay: Layout, rows: list[int]) -> torch.Tensor:
            chosen = kept.of(ids[rows], self.model.config.pad_token_id)
            sure = confidence(self.model.score_logits(states, chosen, lay), self.task, self.model.config)
            return sure >= limits[rows].to(sure.device)

        return decide


def confidence(logits: torch.Tensor, task: str, config: M6RecConfig) -> torch.Tensor:
    """Return the lowest confidence among each row's answers: B x N x S score logits (NaN = no target) -> B.

    It is the probability of the likelier of yes and no for clicks and interactions, of the likeliest value for ratings.
    """
    sure = form_of(task, config).confidence(logits[..., config.score_slices[task]].float())
    return sure.nan_to_num(math.inf).amin(1)


def check_confidence(value: Any) -> None:
    """Refuse an `exit_confidence` that is not a positive number; None means absent."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and value > 0):
        raise ValueError(
            f"exit_confidence={short(value)}: give a probability from which an answer is sure (1 and more = never), or "
            "None"
        )


def _sorted_batches(rows: Sequence[Tokens]) -> Iterator[list[int]]:
    """Split rows, by their length, into batches of at most TOKENS_AT_ONCE padded tokens, or of one row."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    batch: list[int] = []
    width = 0
    for row in order:
        width = max(width, len(rows[row].ids))
        if batch and (len(batch) + 1) * width > TOKENS_AT_ONCE:
            yield batch
            batch, width = [], len(rows[row].ids)
        batch.append(row)
    if batch:
        yield batch


# ------------------------------------------------------------------------------------- what may be shown, and how often


BLOCKED = "block list"
"""Reason of a function of a Guard that gives none."""
GUARD_KEYS = ("block_items", "block_texts", "reasons")
"""Keys of a Guard's file."""
LITERAL = re.compile(r"(?:[^\\.^$*+?{}\[\]|()]|\\[^\w])+")
"""A regular expression that means the text it spells, where a backslash only takes a character's meaning away."""


@dataclass(frozen=True)
class Guard:
    r"""Items that are never recommended, and texts that are never written, with reasons.

    Blocked items are left out before ranking, so that the other items fill the answer. A written text is checked when
    it is complete; the words among `block_texts` are not written to begin with.

    Args:
        block_items: Ids of items, or a function of an item's fields (with its `item_id`; a text has the field `item`)
            that returns whether the item is blocked, or the reason.
        block_texts: Regular expressions, without regard to case if given as texts, or a function of a text that
            returns whether it is blocked, or the reason. Expressions are also searched in the text's compatibility
            form without invisible characters.
        reasons: Id or expression -> the reason; by default it names the id or the expression.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An id or a regular expression is invalid.

    >>> guard = Guard(block_items=["42"], block_texts=[r"\bcasino\b"], reasons={"42": "recalled"})
    >>> guard.item_reason({"item_id": "42", "title": "lamp"}), guard.text_reason("Try our CASINO!")
    ('recalled', 'block list: \\bcasino\\b')
    """

    block_items: Collection[Any] | Callable[[dict[str, Any]], bool | str | None] = ()
    block_texts: Collection[str | re.Pattern] | Callable[[str], bool | str | None] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in GUARD_KEYS[:2]:
            value = getattr(self, name)
            if not callable(value) and (isinstance(value, str | bytes) or not isinstance(value, Collection)):
                raise TypeError(f"{name}={short(value)}: give a list, or a function that says True, False or a reason")
        if not callable(self.block_items):
            ids = {normalize_id(item_id, "block_items") for item_id in self.block_items}
            object.__setattr__(self, "block_items", tuple(sorted(ids)))
        if not callable(self.block_texts):
            object.__setattr__(self, "block_texts", tuple(map(_pattern, self.block_texts)))
        if not isinstance(self.reasons, Mapping) or not all(
            isinstance(own, str) for pair in self.reasons.items() for own in pair
        ):
            raise TypeError(f"reasons={short(self.reasons)}: give a mapping of ids and expressions to texts")

    @classmethod
    def load(cls, path: str | Path) -> "Guard":
        """Read a guard from a JSON file with the keys `block_items`, `block_texts` and `reasons`, all optional.

        Raises:
            ValueError: The file is no such JSON object.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # invalid JSON or UTF-8
            raise ValueError(f"{path} is no valid JSON: {error}") from error
        if not isinstance(given, dict) or (set(given) - set(GUARD_KEYS)):
            raise ValueError(f"{path} holds {short(given)}: expected an object with some of {', '.join(GUARD_KEYS)}")
        return cls(**given)

    @cached_property
    def ids(self) -> frozenset[str]:
        """The blocked ids; empty if a function decides."""
        return frozenset() if callable(self.block_items) else frozenset(self.block_items)

    @cached_property
    def words(self) -> tuple[str, ...]:
        r"""The spellings of words that are not written: of the expressions that are a word or a phrase, also in \b.

        Those that ignore case have four spellings.

        >>> Guard(block_texts=[r"\bcasino\b", r"slot ?machine", re.compile("Bet")]).words
        ('CASINO', 'Casino', 'casino', 'Bet')
        """
        found: list[str] = []
        for pattern in () if callable(self.block_texts) else self.block_texts:
            assert isinstance(pattern, re.Pattern)
            text = pattern.pattern.removeprefix(r"\b").removesuffix(r"\b")
            if pattern.flags & re.VERBOSE or not LITERAL.fullmatch(text):
                continue
            word = re.sub(r"\\(.)", r"\1", text)
            cases = {word, word.lower(), word.capitalize(), word.upper()} if pattern.flags & re.IGNORECASE else {word}
            found += sorted(cases)
        return tuple(found)

    def item_reason(self, fields: Mapping[str, Any]) -> str | None:
        """Return why an item may not be recommended; None if it may.

        Args:
            fields: Its fields, with its `item_id` if known.
        """
        if callable(self.block_items):
            return _said(self.block_items(dict(fields)))
        item_id = fields.get("item_id")
        return None if item_id is None else self.id_reason(normalize_id(item_id, "item_id"))

    def id_reason(self, item_id: str) -> str | None:
        """Return why the item with an id may not be recommended; None if the list of ids does not hold it."""
        return self.reasons.get(item_id, f"{BLOCKED}: {item_id}") if item_id in self.ids else None

    def allows(self, fields: Mapping[str, Any]) -> bool:
        """Whether an item with these fields may be recommended; usable as a filter of a search."""
        return self.item_reason(fields) is None

    def text_reason(self, text: str) -> str | None:
        """Return why a text may not be shown; None if it may."""
        if callable(self.block_texts):
            return _said(self.block_texts(text))
        plain = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
        for pattern in self.block_texts:
            assert isinstance(pattern, re.Pattern)
            if pattern.search(text) or pattern.search(plain):
                return self.reasons.get(pattern.pattern, f"{BLOCKED}: {pattern.pattern}")
        return None


def _pattern(given: Any) -> re.Pattern:
    if isinstance(given, re.Pattern) and isinstance(given.pattern, str):
        return given
    if not isinstance(given, str):
        raise TypeError(f"block_texts holds {short(given)}: give regular expressions")
    try:
        return re.compile(given, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"block_texts holds {short(given)}, which is no regular expression: {error}") from error


def _said(answer: Any) -> str | None:
    """Return the reason that a function of a Guard gives."""
    if isinstance(answer, str):
        return answer or BLOCKED
    return BLOCKED if answer else None


POPULARITY = "popularity"
"""Field of a Reranker that stands for the events of an item."""
POOL = 200
"""Default number of items that a Reranker reorders."""


@dataclass(frozen=True)
class Reranker:
    """Reorders the first items of a ranking, so that what is shown often moves down.

    An item's place is decided by its score minus a penalty from 0 to `weight`: an item never passes one whose score is
    higher by more than `weight`. With the field "popularity" the penalty
    is weight * log(1 + events) / log(1 + most events of an item). With a field of the items it is `weight` times the
    share of the value in the exposure of the rows above, each of which counts 1 / log2(rank + 1): the list is filled
    from the top (maximal marginal relevance, Carbonell & Goldstein, 1998, with equal values as similarity).

    Args:
        field: "popularity", or a field of the items.
        weight: The largest penalty, in the unit of the score.
        pool: Number of items that are reordered: an item that is ranked below them does not enter.
        counts: For "popularity": item id -> events; None = those that the catalogue's evidence has counted.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The weight or a count is negative or not finite, or the pool is below 1.
    """

    field: str
    weight: float
    pool: int = POOL
    counts: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.field, str) or not self.field:
            raise TypeError(
                f"rerank field={short(self.field)}: give {POPULARITY!r} or the name of a field of the items"
            )
        if not _natural(self.weight):
            raise ValueError(f"rerank weight={short(self.weight)}: give a finite number from 0 up")
        if isinstance(self.pool, bool) or not isinstance(self.pool, Integral) or self.pool < 1:
            raise ValueError(f"rerank pool={short(self.pool)}: give a whole number from 1 up")
        if self.counts is not None:
            if self.field != POPULARITY or not isinstance(self.counts, Mapping):
                raise TypeError(f"rerank counts: give a mapping of ids to events, with the field {POPULARITY!r} only")
            wrong = [item_id for item_id, own in self.counts.items() if not _natural(own)]
            if wrong:
                raise ValueError(f"rerank counts of {short(wrong[0])}: give a finite number from 0 up")

    @classmethod
    def of(cls, given: Any) -> "Reranker | None":
        """Make the re-ranker of a parameter: a mapping of the arguments; None = none."""
        if given is None or isinstance(given, cls):
            return given
        keys = set(cls.__dataclass_fields__)
        if not isinstance(given, Mapping) or not {"field", "weight"} <= set(given) <= keys:
            raise TypeError(
                f"rerank={short(given)}: give {{'field': ..., 'weight': ...}}, with `pool` and `counts` or not"
            )
        return cls(**given)

    def order(self, scores: Sequence[float], values: Sequence[Any], top_k: int | None) -> list[tuple[int, float]]:
        """Return place and penalty of the first items of the new order.

        Args:
            scores: N scores, in descending order.
            values: N values of the field; for "popularity" popularities from 0 to 1. None = no penalty.
            top_k: Number of items; None = all.
        """
        count = len(scores) if top_k is None else min(top_k, len(scores))
        pool = min(self.pool, len(scores))
        if self.field == POPULARITY:
            penalties = [self.weight * float(value or 0.0) for value in values]
            first = sorted(range(pool), key=lambda place: penalties[place] - scores[place])
        else:
            first, penalties = self._spread(scores, values, min(count, pool))
        chosen = [*first, *range(pool, len(scores))][:count]
        return [(place, penalties[place] if place < pool else 0.0) for place in chosen]

    def _spread(self, scores: Sequence[float], values: Sequence[Any], count: int) -> tuple[list[int], list[float]]:
        """Fill a list from the top; returns the places, and the penalty of each item of the pool when it was chosen."""
        left = list(range(min(self.pool, len(scores))))
        chosen: list[int] = []
        exposure: dict[Any, float] = {}
        penalties, total = [0.0] * len(left), 0.0
        while len(chosen) < count:
            for place in left:
                penalties[place] = self.weight * exposure.get(values[place], 0.0) / max(total, 1.0)
            best = max(left, key=lambda place: scores[place] - penalties[place])  # of equal ones the first
            left.remove(best)
            chosen.append(best)
            shown = 1 / math.log2(len(chosen) + 1)
            total += shown
            if values[best] is not None:
                exposure[values[best]] = exposure.get(values[best], 0.0) + shown
        return chosen, penalties


def _natural(value: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


# ----------------------------------------------------------------------------------------------------- ranked answers


WISHES = (
    *("task", "top_k", "exclude_seen", "filter", "explain", "exit_confidence", "pin", "block", "boost", "diversity"),
    "pmi",
)
"""Keys of a request, and parameters of a call, that say how a request is answered."""
DIVERSE = 5
"""Diversity chooses among this many times `top_k` items, and at least POOL."""


@dataclass(frozen=True)
class Boost:
    """A number that is added to the scores of some items when their order is decided."""

    items: Conditions
    by: float


@dataclass(frozen=True)
class Wishes:
    """How a request is answered.

    Attributes:
        task: A ranking or writing task; None = a ranking task, by the request.
        top_k: Number of items; None = all candidates, or 10 of a catalogue.
        exclude_seen: Leave out items of the history; None = as the catalogue says.
        filter: Decides by an item's fields whether it may be recommended; None = all may.
        explain: Return the contribution of each event; "text" = and an explanation that the model writes.
        exit_confidence: As in `Scorer.check`.
        pin: Ids of items that come first, in this order, if they may be recommended at all.
        block: Items that are left out.
        boost: What is added to the scores of some items when the order is decided; `score` stays the model's.
        diversity: From 0 (order by score) to 1: weight of the similarity to the items above against the score, which is
            scaled to 0 to 1 (maximal marginal relevance, Carbonell & Goldstein, 1998).
        pmi: For plausibility: the score is the mean log-likelihood of a token of the item's own text, minus that for no
            user, so that well-known texts do not come first for everybody (pointwise mutual information).
    """

    task: str | None = None
    top_k: int | None = None
    exclude_seen: bool | None = None
    filter: Predicate | None = None
    explain: bool | str = False
    exit_confidence: float | None = None
    pin: tuple[str, ...] = ()
    block: Conditions | None = None
    boost: tuple[Boost, ...] = ()
    diversity: float = 0.0
    pmi: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any], tasks: Sequence[str]) -> "Wishes":
        """Check wishes.

        Args:
            given: Any of WISHES; None counts as absent.
            tasks: The tasks that there are.

        Raises:
            ValueError: A value is invalid; the message names it.
            TypeError: One has the wrong type.
        """
        own = {name: value for name, value in given.items() if value is not None}
        if "task" in own and own["task"] not in tasks:
            raise ValueError(f"task={short(own['task'])} is unknown: choose one of {', '.join(tasks)}")
        top_k = own.get("top_k", 1)
        if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1:
            raise ValueError(f"top_k={short(top_k)}: give a whole number from 1 up, or None")
        for name in ("exclude_seen", "explain", "pmi"):
            if not isinstance(own.get(name, False), bool | np.bool_) and (name, own[name]) != ("explain", "text"):
                more = "'text'" if name == "explain" else "None"
                raise TypeError(f"{name}={short(own[name])}: give True, False or {more}")
        check_confidence(own.get("exit_confidence"))
        diversity = own.get("diversity", 0)
        if not _natural(diversity) or diversity > 1:
            raise ValueError(f"diversity={short(diversity)}: give a number from 0 to 1")
        own |= {"top_k": int(top_k)} if "top_k" in own else {}
        own |= {"filter": _filter(own["filter"])} if "filter" in own else {}
        own |= {"pin": _ids(own["pin"], "pin")} if "pin" in own else {}
        own |= {"block": _items(own["block"], "block")} if "block" in own else {}
        own |= {"boost": _boosts(own["boost"])} if "boost" in own else {}
        return cls(**own)

    @property
    def rearranges(self) -> bool:
        """Whether the order is not that of the scores."""
        return bool(self.pin or self.boost or self.diversity)


def _filter(given: Any) -> Predicate:
    if callable(given):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            f"filter={short(given)}: give conditions on fields, such as {{'brand': 'North'}}, or a function that says "
            "of an item's fields True or False"
        )
    return Conditions(given)


def _ids(given: Any, place: str) -> tuple[str, ...]:
    values = given if isinstance(given, list | tuple | set | frozenset) else [given]
    return tuple(dict.fromkeys(normalize_id(value, place) for value in values))


def _items(given: Any, place: str) -> Conditions | None:
    """Return items that are given by their ids or by conditions; None for no ids."""
    if isinstance(given, Mapping):
        return Conditions(given, place)
    ids = _ids(given, place)
    return Conditions({"item_id": list(ids)}, place) if ids else None


def _boosts(given: Any) -> tuple[Boost, ...]:
    if isinstance(given, Mapping):
        entries = [({"item_id": name}, by) for name, by in given.items()]
    elif isinstance(given, list | tuple) and all(
        isinstance(own, Mapping) and set(own) == {"where", "by"} for own in given
    ):
        entries = [(own["where"], own["by"]) for own in given]
    else:
        raise TypeError(
            f"boost={short(given)}: give {{id: number}}, or a list of {{'where': conditions, 'by': number}}, where "
            "conditions are as in `filter`"
        )
    for _, by in entries:
        if isinstance(by, bool) or not isinstance(by, Real) or not math.isfinite(by):
            raise ValueError(f"boost: {short(by)} is added to a score: give a finite number")
    return tuple(Boost(Conditions(items, f"boost[{place}]"), float(by)) for place, (items, by) in enumerate(entries))


FROM_CATALOGUE = 10
"""Default number of items found in a catalogue."""


class Candidate(NamedTuple):
    """An item to rank, and its id as given, if any."""

    item: Item
    item_id: Any


@dataclass
class Query:
    """One request during its processing."""

    request: dict[str, Any]
    """The request for the processor, without candidates."""
    candidates: list[Candidate]
    reading: EncodedRequest | None = None
    """The encoded request, once it exists."""
    seen: set[str] | None = None
    """Ids to leave out, if candidates are to be found in the catalogue."""
    best: list[tuple[int, float]] = field(default_factory=list)
    """Numbers of the returned candidates, and scores, the best first."""
    details: list[list[float]] = field(default_factory=list)
    """I values of each returned candidate."""
    vectors: torch.Tensor | None = None
    """N x D vectors of the returned items, for reasons of retrieval."""
    past: list[Past | None] | None = None
    """If evidence is used, what it reads of each encoded event, the last one last; None = an event of a verb only."""
    profile: list[Past] = field(default_factory=list)
    """If evidence is used, what it reads of the user, at most one text."""
    penalties: dict[int, float] = field(default_factory=dict)
    """What a re-ranker has taken off the scores of candidates, by number."""
    wishes: Wishes = field(default_factory=Wishes)
    """How it is answered."""

    boosts: dict[int, float] = field(default_factory=dict)
    """What is added to the scores of candidates, by number, when the order is decided."""
    pinned: dict[int, int] = field(default_factory=dict)
    """Places of the pinned candidates, by number."""
    bare: torch.Tensor | None = None
    """With `pmi`, what is subtracted from the score of each candidate."""

    @property
    def top_k(self) -> int | None:
        """Number of items of the answer; None = all."""
        return FROM_CATALOGUE if self.wishes.top_k is None and self.seen is not None else self.wishes.top_k

    @property
    def encoded(self) -> EncodedRequest:
        """The encoded request, which exists once the request is ranked."""
        assert self.reading is not None, "a request is encoded before it is ranked"
        return self.reading


@dataclass
class Ranker:
    """Answers requests by one task."""

    scorer: Scorer
    task: str
    catalogue: Callable[[], CatalogueView]
    """Returns the catalogue, or raises an error that names what is missing."""
    evidence: Callable[[], CatalogueView | None] = lambda: None
    """Returns the catalogue if it has evidence, for given candidates; None otherwise."""
    notice: Callable[[str, str], None] = lambda text, place: None
    """Called with each item that is given as a plain text, and its place."""
    known: Callable[[], CatalogueView | None] = lambda: None
    """Returns the catalogue if there is one; None otherwise."""
    guard: Guard | None = None
    rerank: Reranker | None = None

    def answer(
        self, requests: Sequence[str | Mapping[str, Any]], wishes: Sequence[Wishes]
    ) -> list[list[dict[str, Any]]]:
        """Answer requests, each by its wishes."""
        return [self.rows(query) for query in self.queries(requests, wishes)]

    def queries(self, requests: Sequence[str | Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Query]:
        """Rank for requests, each by its wishes."""
        turned = [self._with_turns(request) for request in requests]
        split = [self.described(request) for request in turned]
        given = [request.pop("candidates", None) for request in split]
        for own in wishes:
            self.scorer.check(self.task, own.exit_confidence)
            if own.pmi and self.task != "plausibility":
                raise ValueError(f"pmi: task {self.task!r} has no likelihood of a text, only 'plausibility' has")
            if own.diversity and self.rerank is not None:
                raise ValueError(f"diversity={own.diversity} and rerank both decide the order: give one of them")
        # Retrieval encodes requests first, which checks them; other tasks encode them with the items to rank.
        encoded = self.scorer.encode(split, "retrieval") if self.task == "retrieval" else []
        if encoded:
            self._say_unread(split, given, encoded)
        queries = [self._query(*parts) for parts in zip(split, given, wishes)]
        if self.task == "retrieval":
            for query, reading in zip(queries, encoded):
                query.reading = reading
            self._retrieve(queries)
        else:
            self._score(queries)
        return queries

    def _with_turns(self, request: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
        """Return a request with its messages as events of the history."""
        return request if isinstance(request, str) else self.scorer.processor.with_turns(request, self.task)

    def _say_unread(
        self, requests: Sequence[Mapping[str, Any]], given: Sequence[Any], encoded: Sequence[EncodedRequest]
    ) -> None:
        """Warn, once per kind, of parts of requests that retrieval ignores."""
        config = self.scorer.config
        items = (item for own in given if isinstance(own, list) for item in own)
        if any(isinstance(item, Mapping) and item.get("stats") is not None for item in items):
            logger.warning_once("task 'retrieval' does not read the statistics of candidates (`stats`)")
        if config.history_attention != "causal":
            return
        moment = self.scorer.kinds["now"]
        if any(moment in each.source.ids for each in encoded):
            logger.warning_once(
                "task 'retrieval' does not read `now`: with causal history the user is read after the last event, "
                "before the moment"
            )
        own = self.evidence()
        if own is not None and own.evidence is not None and own.evidence.profile:
            return
        if any(request.get("facts") and not each.events for request, each in zip(requests, encoded)):
            logger.warning_once(
                "task 'retrieval' does not read `facts` where there is no history: with causal history the user is "
                "then read before the facts. Say it in `user`"
            )

    def described(self, request: str | Mapping[str, Any]) -> dict[str, Any]:
        """Copy a request, and complete items that are given by id only with the catalogue's fields."""
        found: dict[str, Any] = {"user": request} if isinstance(request, str) else dict(request)
        if isinstance(found.get("candidates"), list):
            items = enumerate(found["candidates"])
            found["candidates"] = [self._described_item(item, f"candidates[{place}]") for place, item in items]
        if isinstance(found.get("history"), list):
            found["history"] = [
                {**event, "item": self._described_item(event["item"], f"history[{place}].item")}
                if isinstance(event, MAPPINGS) and "item" in event
                else self._described_item(event, f"history[{place}]")
                for place, event in enumerate(found["history"])
            ]
        return found

    def _described_item(self, item: Any, place: str) -> Any:
        if type(item) is dict and len(item) == 1 and type(item.get("item_id")) is str:
            fixed = self._fixed(item["item_id"])
            if fixed is not None:
                return fixed
        if isinstance(item, str):
            self.notice(item, place)
        if not isinstance(item, Mapping) or set(item) - {"stats"} != {"item_id"} or item["item_id"] is None:
            return item
        item_id = normalize_id(item["item_id"], f"{place}.item_id")
        try:
            catalogue = self.catalogue()
        except ValueError as error:
            raise ValueError(f"{place}: item_id {short(item_id)} alone says nothing, and {error}") from error
        if item_id not in catalogue:
            raise ValueError(
                f"{place}: item_id {short(item_id)} alone says nothing, and is not in the catalogue: give its text as "
                "well"
            )
        known = catalogue.item(item_id)
        if isinstance(known, str):
            if item.get("stats") is not None:
                raise ValueError(
                    f"{place}.stats: item {short(item_id)} of the catalogue is a text, which has no statistics: give "
                    f"it with fields, such as {{'title': ..., 'stats': ...}}"
                )
            return NamedText(known, item_id)
        return {**known, **item}

    def _fixed(self, item_id: str) -> KnownItem | None:
        """Return an item of the catalogue without a copy, if it has fields and exactly this id."""
        try:
            known = self.catalogue().fixed(item_id)
        except ValueError:  # there is no catalogue, or of another model: the slow way says which item needs it
            return None
        return known if isinstance(known, KnownItem) and known.get("item_id") == item_id else None

    # ---------------------------------------------------------------------------------------------- what can be chosen

    def _query(self, request: dict[str, Any], given: Any, wishes: Wishes) -> Query:
        if given is not None:
            return Query(request, self._allowed(_checked(given), request, wishes), wishes=wishes)
        catalogue, left_out = self.catalogue(), self.left_out(request, wishes)
        if self.task == "retrieval":
            return Query(request, [], seen=left_out, wishes=wishes)
        names, decides = [name for name in catalogue if name not in left_out], self.decides(wishes.filter)
        kept = [name for name in names if decides is None or decides(catalogue.fields(name))]
        return Query(request, [Candidate(_known(catalogue, name), name) for name in kept], wishes=wishes)

    def left_out(self, request: Mapping[str, Any], wishes: Wishes) -> set[str]:
        """Return ids of the catalogue that may not be recommended: seen, or blocked by request or guard."""
        catalogue = self.catalogue()
        exclude_seen = catalogue.exclude_seen if wishes.exclude_seen is None else wishes.exclude_seen
        seen = self._seen_in(catalogue, request) if exclude_seen else set()
        found = seen | self._blocked(catalogue)
        return found if wishes.block is None else found | {*catalogue.meeting(wishes.block)}

    def _blocked(self, catalogue: CatalogueView) -> set[str]:
        """Return the ids of the catalogue that the guard's list blocks."""
        return set() if self.guard is None else {item_id for item_id in self.guard.ids if item_id in catalogue}

    def decides(self, predicate: Predicate | None) -> Predicate | None:
        """Return a filter together with the guard's function, if it has one; None = all items are allowed."""
        guard = self.guard
        if guard is None or not callable(guard.block_items):
            return predicate
        return guard.allows if predicate is None else lambda fields: guard.allows(fields) and predicate(fields)

    def _unblocked(self, candidates: list[Candidate]) -> list[Candidate]:
        """Leave out candidates whose id the guard's list holds, or that have no id and the text of such an item."""
        guard = self.guard
        if guard is None or not guard.ids:
            return candidates
        found, catalogue = candidates, self.known()
        if catalogue is not None and any(item_identity(item) is None for item, _ in candidates):
            blocked = [catalogue.item(item_id) for item_id in sorted(self._blocked(catalogue))]
            alike = _Seen(self.scorer.processor.names, blocked)
            found = [candidate for candidate in candidates if not alike.holds(without_stats(candidate.item))]
        return [own for own in found if guard.allows(_fields(own.item))]

    def _allowed(self, candidates: list[Candidate], request: Mapping[str, Any], wishes: Wishes) -> list[Candidate]:
        """Leave out candidates that guard or filter refuse or, with `exclude_seen`, that are in the history."""
        candidates = self._unblocked(candidates)
        if wishes.block is not None:
            candidates = [candidate for candidate in candidates if not wishes.block(_fields(candidate.item))]
        if wishes.exclude_seen:
            seen = _Seen(self.scorer.processor.names, self.scorer.processor.history_items(request))
            candidates = [candidate for candidate in candidates if not seen.holds(without_stats(candidate.item))]
        decides = self.decides(wishes.filter)
        if decides is None:
            return candidates
        fields = [_fields(item) for item, _ in candidates]
        return [candidate for candidate, own in zip(candidates, fields) if decides(own)]

    def _seen_in(self, catalogue: CatalogueView, request: Mapping[str, Any]) -> set[str]:
        """Return the ids of the catalogue's items in the history, matched by id, else by text."""
        named = [(item_identity(item), item) for item in self.scorer.processor.history_items(request)]
        ids = {item_id for item_id, _ in named if item_id is not None}
        nameless = [item for item_id, item in named if item_id is None]
        names = self.scorer.processor.names
        for item in nameless:
            alike = catalogue.worded({*names.candidates(item)}, names)
            ids.update(item_id for item_id in alike if names.same(item, catalogue.item(item_id)))
        return ids

    # --------------------------------------------------------------------------------------------------------- ranking

    def _score(self, queries: list[Query]) -> None:
        # A request without remaining candidates is only checked.
        self.scorer.encode([query.request for query in queries if not query.candidates], "retrieval")
        queries = [query for query in queries if query.candidates]
        requests = [{**query.request, "candidates": [item for item, _ in query.candidates]} for query in queries]
        encoded = self.scorer.encode(requests, self.task)
        for query, own in zip(queries, encoded):
            own.confidence = query.wishes.exit_confidence
        for query, values in zip(queries, self._values(queries, encoded)):
            query.best = self._chosen(query, _best(values.mean(-1), self._reach(query)))
            query.details = [values[number].tolist() for number, _ in query.best]

    def _values(self, queries: Sequence[Query], encoded: Sequence[EncodedRequest]) -> list[torch.Tensor]:
        """Return the scores of the candidates of each request, N x I; with `pmi` minus those for no user."""
        wished = [query for query in queries if query.wishes.pmi]
        alone = [{"candidates": [item for item, _ in query.candidates]} for query in wished]
        for query, values in zip(wished, self.scorer.scores(self.scorer.encode(alone, self.task), self.task)):
            query.bare = values
        found = []
        for query, own, values in zip(queries, encoded, self.scorer.scores(encoded, self.task)):
            query.reading = own
            found.append(values if query.bare is None else values - query.bare)
        return found

    def _retrieve(self, queries: list[Query]) -> None:
        scored = [query for query in queries if query.seen is None]
        searching = [query for query in queries if query.seen is not None]
        if scored:
            self._score_given(scored)
        if searching:
            self._search(searching)

    def _score_given(self, queries: list[Query]) -> None:
        """Rank candidates that requests give."""
        catalogue, scorer = self.evidence(), self.scorer
        users = self._users(queries, catalogue)
        for query, user in zip(queries, users):
            items = [without_stats(item) for item, _ in query.candidates]
            if user is None:
                scores, vectors = torch.zeros(len(items)).double(), None
            else:
                vectors = embed(items, scorer.model, scorer.processor, segment_cache=scorer.segment_cache)
                scores = cosines(user[None], vectors)[0]
            if catalogue is not None and catalogue.evidence is not None:
                query.past, query.profile = self._past(query, catalogue.evidence), profile_of(query.request)
                added = catalogue.evidence_scores(_entries_of(query), self._as_past(items))
                scores = catalogue.evidence.learnt * scores.double() + torch.from_numpy(added.sum())
            query.best = self._chosen(query, _best(scores, self._reach(query)))
            query.vectors = None if vectors is None else vectors[[number for number, _ in query.best]]

    def _search(self, queries: list[Query]) -> None:
        """Find items in the catalogue."""
        catalogue, histories = self.catalogue(), None
        if catalogue.evidence is not None:
            for query in queries:
                query.past, query.profile = self._past(query, catalogue.evidence), profile_of(query.request)
            histories = [_entries_of(query) for query in queries]
        users = [torch.zeros(catalogue.dimension) if user is None else user for user in self._users(queries, catalogue)]
        places: dict[tuple[Any, int], list[int]] = {}  # requests with one filter and one length are searched together
        for place, query in enumerate(queries):
            own = query.wishes.filter
            key = own.key if isinstance(own, Conditions) else id(own)
            places.setdefault((key, self._reach(query) or 0), []).append(place)
        for (_, reach), group in places.items():
            decides = self.decides(queries[group[0]].wishes.filter)
            chosen = None if histories is None else [histories[place] for place in group]
            seen = [queries[place].seen for place in group]
            found = catalogue.search(torch.stack([users[place] for place in group]), reach, seen, decides, chosen)
            for place, pairs in zip(group, found):
                history = None if histories is None else histories[place]
                pairs = self._with_boosted(catalogue, queries[place], pairs, users[place], history)
                self._choose_found(catalogue, queries[place], pairs)

    def _with_boosted(
        self,
        catalogue: CatalogueView,
        query: Query,
        found: list[tuple[str, float]],
        user: torch.Tensor,
        history: Sequence[Past] | None,
    ) -> list[tuple[str, float]]:
        """Add pinned and boosted items that the search did not reach, if they may be recommended; the best first."""
        wishes, seen = query.wishes, query.seen or set()
        wanted = dict.fromkeys([name for name in wishes.pin if name in catalogue])
        for boost in wishes.boost:
            wanted |= dict.fromkeys(catalogue.meeting(boost.items))
        decides, known = self.decides(wishes.filter), {name for name, _ in found}
        names = [name for name in wanted if name not in known and name not in seen]
        names = [name for name in names if decides is None or decides(catalogue.fields(name))]
        if not names:
            return found
        more = zip(names, catalogue.scores(user, names, history))
        return sorted([*found, *more], key=lambda pair: -pair[1])

    def _choose_found(self, catalogue: CatalogueView, query: Query, pairs: list[tuple[str, float]]) -> None:
        query.candidates = [Candidate(_known(catalogue, name), name) for name, _ in pairs]
        query.best = self._chosen(query, [(place, score) for place, (_, score) in enumerate(pairs)])
        if query.wishes.explain:
            query.vectors = catalogue.vectors([pairs[place][0] for place, _ in query.best])

    def _reach(self, query: Query) -> int | None:
        """Return the number of items to rank, from which those of the answer are chosen; None = all."""
        top_k, wishes = query.top_k, query.wishes
        if top_k is None or query.seen is None and wishes.rearranges:
            return None
        reach = top_k if self.rerank is None else max(top_k, self.rerank.pool)
        if wishes.diversity:
            reach = max(reach, DIVERSE * top_k, POOL)
        if wishes.boost:  # as many as boosts can move down
            reach += len({name for own in wishes.boost if own.by < 0 for name in self.catalogue().meeting(own.items)})
        return reach

    def _chosen(self, query: Query, ranked: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """Return the candidates of the answer, number and score, in its order.

        Args:
            query: The request.
            ranked: Number and score of candidates, the best first.
        """
        top_k, wishes = query.top_k, query.wishes
        items = {number: query.candidates[number] for number, _ in ranked}
        if wishes.boost:
            fields = {number: _fields(item) for number, (item, _) in items.items()}
            query.boosts = {n: sum(own.by for own in wishes.boost if own.items(each)) for n, each in fields.items()}
            ranked = sorted(ranked, key=lambda pair: -(pair[1] + query.boosts[pair[0]]))
        if self.rerank is not None:
            order = [score + query.boosts.get(number, 0.0) for number, score in ranked]
            exposed = self._exposed(self.rerank, [items[number] for number, _ in ranked])
            found = self.rerank.order(order, exposed, None if wishes.pin else top_k)
            query.penalties = {ranked[place][0]: penalty for place, penalty in found}
            ranked = [ranked[place] for place, _ in found]
        if wishes.diversity:
            ranked = self._diverse(query, ranked, top_k)
        if wishes.pin:
            places = {name: place for place, name in enumerate(wishes.pin)}
            query.pinned = {
                number: places[name] for number, each in items.items() if (name := _identity(each)) in places
            }
            ranked = sorted(ranked, key=lambda pair: query.pinned.get(pair[0], len(places)))
        return ranked[:top_k]

    def _diverse(self, query: Query, ranked: list[tuple[int, float]], top_k: int | None) -> list[tuple[int, float]]:
        """Order the first items so that each is good and unlike those above; the others follow."""
        pool = ranked if top_k is None else ranked[: max(DIVERSE * top_k, POOL)]
        items = [without_stats(query.candidates[number].item) for number, _ in pool]
        if len(items) < 2:
            return ranked
        scorer = self.scorer
        vectors = embed(items, scorer.model, scorer.processor, segment_cache=scorer.segment_cache)
        scores = torch.tensor([score + query.boosts.get(number, 0.0) for number, score in pool]).double()
        scores = (scores - scores.min()) / (scores.max() - scores.min()).clamp_min(1e-12)
        likeness, share = torch.zeros(len(items)).double(), query.wishes.diversity
        left = torch.ones(len(items), dtype=torch.bool)
        chosen: list[int] = []
        for _ in range(len(items) if top_k is None else min(top_k, len(items))):
            worth = ((1 - share) * scores - share * likeness).masked_fill(~left, -torch.inf)
            best = int(worth.argmax())
            left[best] = False
            chosen.append(best)
            alike = cosines(vectors[best][None], vectors)[0].double()
            likeness = alike if len(chosen) == 1 else torch.maximum(likeness, alike)
        others = left.nonzero()[:, 0].tolist()
        return [*(pool[place] for place in [*chosen, *others]), *ranked[len(pool) :]]

    def _exposed(self, rerank: Reranker, items: Sequence[Candidate]) -> list[Any]:
        """Return the re-ranker's value of each item: its field, or its popularity from 0 to 1."""
        if rerank.field != POPULARITY:
            values = [_fields(item).get(rerank.field) for item, _ in items]
            return [value if value is None or isinstance(value, str | Real) else str(value) for value in values]
        catalogue = self.known()
        counts = rerank.counts
        if counts is None:
            counts = None if catalogue is None else catalogue.event_counts()
        if counts is None:
            raise ValueError(
                f"rerank by {POPULARITY!r}: the catalogue has counted no events: give `counts`, item id -> events, or "
                "name a field of the items"
            )
        most = math.log1p(max(counts.values(), default=0)) or 1.0
        ids = [item_identity(item) for item, _ in items]
        return [0.0 if item_id is None else math.log1p(counts.get(item_id, 0)) / most for item_id in ids]

    def _users(self, queries: Sequence[Query], catalogue: CatalogueView | None) -> Sequence[torch.Tensor | None]:
        """Return the vector of each user; None if the cosine has weight 0, so that the model is not run."""
        if catalogue is not None and catalogue.evidence is not None and not catalogue.evidence.learnt:
            return [None] * len(queries)
        return list(self.scorer.users([query.encoded for query in queries]))

    def _past(self, query: Query, rule: Evidence) -> list[Past | None]:
        """Return what evidence reads of a history: all events that the model reads, None = only a verb.

        Where evidence reaches further back than the model, earlier items and queries stand before them.
        """
        history = query.request.get("history") or []
        items = [event.get("item") if isinstance(event, Mapping) else event for event in history]
        places = [place for place, item in enumerate(items) if item is not None]
        times = [_moment(history[place], place) if rule.share_ties else math.nan for place in places]
        start = len(items) - len(query.encoded.events)
        back = num_recent(np.array(times[::-1]), rule)
        first = min(start, places[-back]) if len(places) >= len(rule.recency) else 0
        found = iter(self._as_past([item for item in items[first:] if item is not None]))
        moments = iter(times[len(places) - sum(place >= first for place in places) :])
        past = [
            _query_of(event) if item is None else next(found)._replace(time=next(moments))
            for event, item in zip(history[first:], items[first:])
        ]
        return [*(own for own in past[: start - first] if own is not None), *past[start - first :]]

    def _as_past(self, items: Sequence[Item]) -> list[Past]:
        """Convert items to the form that evidence uses."""
        texts = item_texts(self.scorer.processor, items)
        return [Past(item_identity(item), text) for item, text in zip(items, texts)]

    # -------------------------------------------------------------------------------------------------------- answering

    def rows(self, query: Query) -> list[dict[str, Any]]:
        """Return the answer to a ranked request."""
        chosen = [query.candidates[number] for number, _ in query.best]
        texts = iter(item_texts(self.scorer.processor, [item for item, _ in chosen if not isinstance(item, str)]))
        rows = []
        for rank, ((item, item_id), (_, score)) in enumerate(zip(chosen, query.best), 1):
            row = {"rank": rank, "item": str(item) if isinstance(item, str) else next(texts)}
            row |= {} if item_id is None else {"item_id": item_id}
            rows.append(row | {"score": score})
        for row, (number, _) in zip(rows, query.best):
            row |= {"penalty": query.penalties[number]} if number in query.penalties else {}
            row |= {"boost": query.boosts[number]} if query.boosts.get(number) else {}
            row |= {"pinned": True} if number in query.pinned else {}
        if query.wishes.exit_confidence is not None:
            for row in rows:
                row["exit_layer"] = query.encoded.exit_layer
        scored = self.scorer.config.scored.get(self.task)
        if scored is not None and scored.details:
            for row, values in zip(rows, query.details):
                row[scored.details] = dict(zip(scored.outputs(self.scorer.config), values))
        if query.wishes.explain and rows:
            for row, reasons in zip(rows, self._reasons(query)):
                row |= reasons
        return rows

    def _reasons(self, query: Query) -> list[dict[str, Any]]:
        """Return for each of the best items, as `because`, the contribution of each event.

        It is the score minus the score with the event hidden. With evidence this holds for the learnt part; words,
        transitions and texts contribute their own terms. `parts` lists the parts of a score, which sum to it; that of
        the `profile` is by words and texts.
        """
        if query.past is not None:
            return self._evident_reasons(query, query.past)
        scores = [score for _, score in query.best]
        added = self._learnt_reasons(query, scores)
        events = self._events(query)
        return [
            {"because": _sorted([{**event, "contribution": own} for event, own in zip(events, row)])} for row in added
        ]

    def _evident_reasons(self, query: Query, past: Sequence[Past | None]) -> list[dict[str, Any]]:
        catalogue = self.catalogue()
        chosen = [query.candidates[number].item for number, _ in query.best]
        found = catalogue.evidence_scores(_entries_of(query), self._as_past([without_stats(item) for item in chosen]))
        share = 0.0 if catalogue.evidence is None else catalogue.evidence.learnt
        places = [place for place, item in enumerate(past) if item is not None]
        table, count = np.zeros((3, len(past), len(query.best))), len(query.profile)
        table[:, places] = np.stack(found[:3])[:, count:]
        words, transitions, texts = table.sum(1)
        profile = (found.words + found.texts)[:count].sum(0)
        learnt = [score - added for (_, score), added in zip(query.best, found.sum().tolist())]
        earlier = [_described(item) for item in past[: len(past) - len(query.encoded.events)] if item is not None]
        added = [[0.0] * len(earlier) + own for own in self._learnt_reasons(query, learnt, share)]
        events, reasons = [*earlier, *self._events(query)], []
        for number, own in enumerate(learnt):
            because = []
            for event, alone, w, t, x in zip(events, added[number], *table[:, :, number].tolist()):
                parts = {"learnt": alone, "words": w, "transitions": t, "texts": x}
                because.append({**event, "contribution": sum(parts.values()), **parts})
            parts = {"learnt": own, "words": float(words[number]), "transitions": float(transitions[number])}
            parts |= {"texts": float(texts[number]), "profile": float(profile[number])}
            parts["popularity"] = float(found.popularity[number])
            parts["together"] = own - sum(added[number])
            reasons.append({"parts": parts, "because": _sorted(because)})
        return reasons

    def _learnt_reasons(self, query: Query, scores: Sequence[float], share: float = 1.0) -> list[list[float]]:
        """Return for each of the best items each event's contribution to the learnt part."""
        encoded = query.encoded
        if not encoded.events:
            return [[] for _ in scores]
        if not share:
            return [[0.0] * len(encoded.events) for _ in scores]
        if query.vectors is not None:
            without = cosines(self.scorer.users_without(encoded), query.vectors)
        else:
            numbers = [number for number, _ in query.best]
            without = self.scorer.scores_without(encoded, numbers, self.task).mean(-1)
            if query.bare is not None:
                without = without - query.bare[numbers, 0]
        return [[score - share * other for other in others] for score, others in zip(scores, without.T.tolist())]

    def _events(self, query: Query) -> list[dict[str, Any]]:
        """Describe the encoded events."""
        events: list[dict[str, Any]] = [{"event": text} for text in query.encoded.events]
        if not events:
            return []
        for event, entry in zip(events, query.request["history"][-len(events) :]):
            item = entry.get("item") if isinstance(entry, Mapping) else None
            if isinstance(item, NamedText):
                event["item_id"] = item.item_id
            if isinstance(item, Mapping) and item.get("item_id") is not None:
                event["item_id"] = item["item_id"]
        return events


def _known(catalogue: CatalogueView, name: str) -> Item:
    """Return an item that the catalogue has, without a copy."""
    item = catalogue.fixed(name)
    assert item is not None, "the name comes from the same state of the catalogue"
    return item


def _identity(candidate: Candidate) -> str | None:
    return None if candidate.item_id is None else normalize_id(candidate.item_id, "item_id")


def _sorted(reasons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(reasons, key=lambda reason: -reason["contribution"])


def _described(item: Past) -> dict[str, Any]:
    """Describe an event that evidence reads, and the model does not."""
    return {"event": item.text, **({} if item.item_id is None else {"item_id": item.item_id})}


def _entries_of(query: Query) -> list[Past]:
    """Return all that evidence reads of a request: the profile, then the history."""
    return [*query.profile, *(item for item in query.past or () if item is not None)]


def _moment(event: Any, place: int) -> float:
    """Return the time of an event of a history in seconds, NaN if it is not given."""
    moment = event.get("timestamp") if isinstance(event, Mapping) else None
    return math.nan if moment is None else time_seconds(moment, f"history[{place}].timestamp", relative=True)


def _query_of(event: Mapping[str, Any]) -> Past | None:
    """Return what the user searched for or wrote in an event without an item."""
    text = event.get("text") if event.get("query") is None else event["query"]
    return None if text is None else Past(None, str(text), "query")


def profile_of(request: Mapping[str, Any]) -> list[Past]:
    """Return the text of who the user is and of facts, as one entry; of the user's fields, only texts are read."""
    user = request.get("user")
    values = [own for name, own in user.items() if name != "user_id"] if isinstance(user, Mapping) else [user]
    parts = [part for own in (*values, request.get("facts")) for part in (own if isinstance(own, list) else [own])]
    text = " ".join(part for part in parts if isinstance(part, str))
    return [Past(None, text, "profile")] if text else []


def _checked(given: Any) -> list[Candidate]:
    if not isinstance(given, list):
        raise TypeError(f"candidates: expected a list, got {type(given).__name__} ({short(given)})")
    for number, item in enumerate(given):
        if not isinstance(item, str | Mapping):
            raise TypeError(
                f"candidates[{number}]: expected a text or a mapping of fields, got {type(item).__name__} "
                f"({short(item)})"
            )
    return [
        Candidate(item, item.get("item_id") if isinstance(item, Mapping) else item_identity(item)) for item in given
    ]


class _Seen:
    """The items of a history, matched by id, or by text if one of the two items has no id."""

    def __init__(self, names: Any, past: Sequence[Item]) -> None:
        self.names, self.ids = names, {item_identity(item) for item in past}
        self._by_name: dict[str, list[Item]] = {}
        for item in past:
            for name in names.candidates(item):
                self._by_name.setdefault(name, []).append(item)

    def holds(self, item: Item) -> bool:
        """Whether an item is among them."""
        item_id = item_identity(item)
        if item_id is not None and item_id in self.ids:
            return True
        alike = [other for name in self.names.candidates(item) for other in self._by_name.get(name, ())]
        return any(
            (item_id is None or item_identity(other) is None) and self.names.same(item, other) for other in alike
        )


def _fields(item: Item) -> dict[str, Any]:
    """Return the fields of an item for a filter."""
    if isinstance(item, NamedText):
        return {"item_id": item.item_id, "item": str(item)}
    return {"item": item} if isinstance(item, str) else dict(item)


def _best(scores: torch.Tensor, top_k: int | None) -> list[tuple[int, float]]:
    """Return number and score of the best items; items with equal scores keep their order."""
    if scores.isnan().any():
        raise ValueError("scores hold NaN: the model's weights are damaged, or too large for its number type")
    order = scores.argsort(descending=True, stable=True)[:top_k]
    return list(zip(order.tolist(), scores[order].tolist()))


__all__ = [
    "WISHES",
    "EncodedRequest",
    "Guard",
    "Ranker",
    "Reranker",
    "Scorer",
    "Wishes",
    "check_confidence",
    "confidence",
    "profile_of",
]
