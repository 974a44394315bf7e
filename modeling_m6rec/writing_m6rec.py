"""The class that writes: explanations, queries, replies and texts of items, freely or constrained to a catalogue.

A text does not depend on the other requests of its batch: prompts are padded on the left, and each sampled text draws
from a generator of its own. Ours, except for constrained beams as plausibility ranking (`trie_m6rec`).

Shapes: B rows, T new tokens, V = vocab_size.
"""

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .catalogue_m6rec import CatalogueView, Item, Model, item_texts, without_stats
from .layers_m6rec import inference_mode
from .ranking_m6rec import FROM_CATALOGUE, Guard, Query, Ranker, Wishes
from .trie_m6rec import ItemTrie, TrieProcessor
from .values_m6rec import WORD, short

ROWS_AT_ONCE = 16
"""Rows that are written together, without beams."""
BEAMS_AT_ONCE = 64
"""Rows that are written together, with beams."""
KEPT_LOGITS = 1 << 27
"""Logits that are kept until a batch is written, since likelihoods are read off them; this bounds memory."""

NOTHING_DRAWN = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Arguments of `generate`: draws are made by a logits processor, so that each text has its own."""
NO_SETTINGS = {
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "begin_suppress_tokens": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "renormalize_logits": False,
}
"""Arguments of `generate` in place of a checkpoint's settings, which would forbid texts of items or change scores."""
REWRITES = 2
"""Number of times that a blocked text is written anew."""
REWRITTEN_TOP_P = 0.9
"""`top_p` of the draws that replace a blocked text which was not drawn."""

RARE = 0.01
"""A word is rare if this share of the catalogue's items holds it, or fewer; a word of one item is always rare."""
COMMON = 0.5
"""A word that more of the catalogue's items hold says nothing of an item; often it is the template's."""
FEATURE_WORDS = 3
"""A field's value of more words is a sentence, whose words are not features."""
VALUES = re.compile(r"[,;|/]")

OPENED = re.compile(r"(^|\s)[\"'(\[“‘«《「『]$")
"""A bracket or a quotation mark opens at the end of a text, so that no space follows."""
LONGEST_NAME = 12
"""Most words of a name that is looked for in a conversation."""
SHORTEST_NAME = 4
"""Fewest characters of a name of one word that is looked for in a conversation."""
PUNCTUATION = " \t\n.,;:!?\"'()[]“”‘’«»《》「」『』。，！？"
YEAR = re.compile(r"\(\d{4}\)")
BRACKETED = re.compile(r"[《「『](.+?)[》」』]")
SMALL_WORDS = frozenset(("a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"))


@dataclass
class Mention:
    """A title of an item within a text, text[start:end], and the score by which the item was chosen."""

    item_id: str
    start: int
    end: int
    score: float


@dataclass
class Check:
    """What a text says of its request.

    Attributes:
        events: The contribution of each event to the item's score, the largest first.
        names: Places in `events` of those that the text names: by their title, or by two of their rare words that the
            item itself does not have.
        agrees: Whether the event named best has a contribution that is positive and at least half of the largest; None
            = the text names none.
        unsupported: Features in the text that neither the item nor the request mentions.
    """

    events: list[dict]
    names: list[int]
    agrees: bool | None
    unsupported: list[str]


@dataclass
class Written:
    """A written text.

    Attributes:
        text: The text, without white space around it.
        logprob: The mean log-likelihood of a written token, including [EOS] if the text has ended.
        finish: "end" = the model ended the text; "length" = `max_new_tokens` did; "blocked" = a guard refused it.
        items: The items that it mentions.
        checked: What it says of the request, if that was checked.
        reason: Why it was blocked.
    """

    text: str
    logprob: float
    finish: Literal["end", "length", "blocked"]
    items: list[Mention] = field(default_factory=list)
    checked: Check | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The words of a catalogue's items.

    Attributes:
        counts: Word -> number of items with it.
        size: Number of items.
        features: Words of short values of the items' fields, such as genres, colours and years.
    """

    counts: Mapping[str, int]
    size: int
    features: frozenset[str]

    @classmethod
    def of(cls, items: Iterable[Item], processor: Any, features: Iterable[str] = ()) -> "Vocabulary":
        """Count the words of items.

        Args:
            items: The items.
            processor: Processor that formats them.
            features: More words that are features.
        """
        counts: Counter[str] = Counter()
        short_values: Counter[str] = Counter()
        every = list(items)
        for item, text in zip(every, item_texts(processor, every)):
            counts.update(set(_words(text)))
            name = processor.names.candidates(item)[0]
            values = VALUES.split(text[len(name) :] if text.startswith(name) else text)
            own = [_words(value) for value in values]
            short_values.update({word for words in own if len(words) <= FEATURE_WORDS for word in words})
        found = {word for word, count in short_values.items() if count <= COMMON * len(every)}
        return cls(counts, len(every), frozenset({*found, *(word for own in features for word in _words(own))}))

    @classmethod
    def of_catalogue(cls, catalogue: CatalogueView, processor: Any) -> "Vocabulary":
        """Count the words of a catalogue's items, once for each of its states."""
        return catalogue.derived(
            "vocabulary", lambda: cls.of((catalogue.item(item_id) for item_id in catalogue), processor)
        )

    def rare(self, word: str) -> bool:
        """Whether few items have a word; a word that no item has is rare."""
        return self.counts.get(word, 0) <= max(1, RARE * self.size)


def check(
    text: str,
    request: str | Mapping[str, Any],
    item: Item,
    because: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    processor: Any,
) -> Check:
    """Check an explanation against the contributions of the events.

    Args:
        text: The explanation of why an item is recommended.
        request: The request.
        item: The item.
        because: The contributions of the events, as `explain=True` of a ranking gives them.
        vocabulary: Decides which words are rare, and which are features.
        processor: Processor that formats the items.
    """
    own_name, own_text = processor.names.candidates(item)[0], item_texts(processor, [item])[0]
    past = _past(request, processor)
    named, own_words = _without(text, own_name), set(_words(own_text))
    strengths = {}
    for place, event in enumerate(because):
        name, said = max(
            (own for own in past if own[0] in str(event["event"])), key=lambda own: len(own[0]), default=("", "")
        )
        rare = {word for word in _words(said) if vocabulary.rare(word)} - own_words
        shared = len(rare & set(_words(named)))
        if _holds_name(named, name):
            strengths[place] = (1, len(_words(name)))
        elif shared > 1:
            strengths[place] = (0, shared)
    agrees = None
    if strengths:
        best = max(strengths, key=lambda place: strengths[place])
        largest = max(float(event["contribution"]) for event in because)
        contribution = float(because[best]["contribution"])
        agrees = contribution > 0 and contribution >= largest / 2
    given = [*_texts(request), *(said for _, said in past)]
    supported = own_words | {word for said in given for word in _words(said)}
    features = [word for word in dict.fromkeys(_words(text)) if word in vocabulary.features]
    return Check(
        [dict(event) for event in because], sorted(strengths), agrees, [w for w in features if w not in supported]
    )


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts and numbers of a request, without ids."""
    if isinstance(value, Mapping):
        for name, own in value.items():
            if name not in ("item_id", "user_id"):
                yield from _texts(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _texts(own)
    elif value is not None:
        yield str(value)


def _pattern(name: str) -> re.Pattern:
    """Make the pattern of a title as whole words; a title of one word is found in its own case only."""
    words = WORD.findall(name)
    edge = r"(?<!\w){}(?!\w)" if name.isascii() else "{}"
    return re.compile(edge.format(r"[\W_]+".join(map(re.escape, words))), re.IGNORECASE if len(words) > 1 else 0)


def _holds_name(text: str, name: str) -> bool:
    return bool(WORD.search(name)) and _pattern(name).search(text) is not None


def _without(text: str, name: str) -> str:
    """Remove the title of the explained item, which may hold that of an event (Alien 3, Alien)."""
    return _pattern(name).sub(" ", text) if WORD.search(name) else text


def _past(request: str | Mapping[str, Any], processor: Any) -> list[tuple[str, str]]:
    """Return of each event of a history the name of its item, or what the user wrote, and its text without the verb."""
    found = []
    for event in [] if isinstance(request, str) else request.get("history") or []:
        item = event if isinstance(event, str) else event.get("item")
        own = {} if isinstance(event, str) else event
        said = [str(own[key]) for key in ("query", "text") if own.get(key) is not None]
        if item is not None:
            found.append((processor.names.candidates(item)[0], " ".join([*item_texts(processor, [item]), *said])))
        elif said:
            found.append((said[0], said[0]))
    return found


@dataclass
class WrittenItem:
    """An item whose text was written, and the mean log-likelihood of a token of its text and [EOS]."""

    item_id: str
    score: float


@dataclass(frozen=True)
class WritingOptions:
    """How texts are written: greedily, by beams (`num_beams`), or drawn (`temperature` or `top_p`).

    Args:
        max_new_tokens: Most tokens of a text, and half of a row at most.
        num_beams: Number of beams.
        num_texts: Number of texts for each request: the best beams with different texts (possibly fewer), or draws.
        temperature: Divides the logits before drawing; 1 if only `top_p` is given.
        top_p: Draw from the likeliest tokens that together have this probability; 1 if only `temperature` is given.
        seed: Seed of the draws. Equal requests then have equal texts, in any batch. None = torch's own state decides.
        slot_threshold: In a conversation: recommend an item once [SLOT] has at least this probability, and not below.
            None = [SLOT] is written like any other token.

    Raises:
        ValueError: If a value is not allowed, or two contradict each other.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    num_texts: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    slot_threshold: float | None = None

    def __post_init__(self) -> None:
        threshold = self.slot_threshold
        if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, Real)):
            raise ValueError(f"slot_threshold={short(threshold)}: give a probability (above 1 = never), or None")
        for name in ("max_new_tokens", "num_beams", "num_texts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={short(value)}: give a whole number from 1 up")
        for name, most in (("temperature", float("inf")), ("top_p", 1)):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= most and value != float("inf")):
                raise ValueError(f"{name}={short(value)}: give a number above 0{', up to 1' * (most == 1)}, or None")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, Integral)):
            raise ValueError(f"seed={short(self.seed)}: give a whole number, or None")
        if self.draws and self.num_beams > 1:
            raise ValueError(
                f"num_beams={self.num_beams} and temperature or top_p: beams are searched, not drawn; give one of both"
            )
        if not self.draws and self.seed is not None:
            raise ValueError(f"seed={self.seed}, but nothing is drawn: give temperature or top_p as well")
        if not self.draws and self.num_texts > self.num_beams:
            raise ValueError(
                f"num_texts={self.num_texts}: without drawing, texts differ by beams only: give num_beams="
                f"{self.num_texts} or more, or temperature or top_p"
            )

    @property
    def draws(self) -> bool:
        """Whether texts are drawn."""
        return self.temperature is not None or self.top_p is not None


class Chosen(NamedTuple):
    """An item that a reply recommends, its id, and the score by which it was chosen."""

    item: Item
    item_id: str
    score: float


Choose = Callable[[Sequence[int]], Sequence[Chosen | None]]
Write = Callable[[Sequence[Any], WritingOptions], list[list[Written]]]


class Prompt(NamedTuple):
    """An encoded request that is to be continued."""

    ids: list[int]
    memory: list[int]
    """For each id the row of item embeddings."""


class Writer:
    """Writes texts for requests.

    [EOS] ends a text, and so does a special token of the backbone, such as <|im_end|>, which models write until tuned.

    Args:
        model: The model, possibly inside a PeftModel.
        processor: Processor that makes the prompts.
        guard: Blocks texts: its words are not written, and a text that is blocked nevertheless is drawn anew up to
            REWRITES times.
    """

    def __init__(self, model: Model, processor: Any, guard: Guard | None = None) -> None:
        self.model, self.processor, self.config, self.guard = model, processor, model.config, guard

    @cached_property
    def slot(self) -> int | None:
        """Id of [SLOT], if the vocabulary has it."""
        index: int | None = self.processor.tokenizer.slot_token_id
        return index

    @cached_property
    def _ends(self) -> list[int]:
        """Ids that end a text."""
        end = self.config.eos_token_id
        others = {*self.processor.tokenizer.all_special_ids} - {*self.config.structural_token_ids, end}
        return [end, *sorted(others - {self.slot})]

    @cached_property
    def _forbidden(self) -> list[tuple[int, ...]]:
        """Ids of the guard's words, alone and after a space."""
        tokenizer, guard = self.processor.tokenizer, self.guard
        words = [space + word for word in (() if guard is None else guard.words) for space in ("", " ")]
        spelt = {tuple(ids) for ids in tokenizer.encode_texts(words) if ids} if words else set()
        return sorted(ids for ids in spelt if tokenizer.unk_token_id not in ids)

    def write(self, requests: Sequence[str | Mapping[str, Any]], task: str, **options: Any) -> list[list[Written]]:
        """Write texts.

        Args:
            requests: The requests, without the text.
            task: A writing task.
            **options: Arguments of `WritingOptions`.

        Returns:
            For each request its texts: the likeliest first, drawn ones in the order of the draws. Where the guard
            blocks a text and all that were written in its place, its text is empty, with the reason.

        Raises:
            ValueError: If a request or an option is invalid; the message names it.
        """
        return self._guarded(requests, WritingOptions(**options), lambda some, how: self._write(some, task, how))

    def _guarded(self, requests: Sequence[Any], how: "WritingOptions", write: "Write") -> list[list[Written]]:
        """Write texts, and draw those that the guard blocks anew; if that fails, they are empty."""
        written = write(requests, how)
        if self.guard is None:
            return written
        reasons = {
            (place, number): reason
            for place, texts in enumerate(written)
            for number, text in enumerate(texts)
            if (reason := self.guard.text_reason(text.text)) is not None
        }
        for attempt in range(REWRITES):
            self._rewrite(written, reasons, requests, _redrawn(how, attempt), write)
        for (place, number), reason in reasons.items():
            written[place][number] = replace(written[place][number], text="", finish="blocked", items=[], reason=reason)
        return written

    def _rewrite(
        self,
        written: list[list[Written]],
        reasons: dict[tuple[int, int], str],
        requests: Sequence[Any],
        how: "WritingOptions",
        write: "Write",
    ) -> None:
        """Draw texts in the place of blocked ones; those that the guard allows replace them."""
        assert self.guard is not None
        blocked = list(dict.fromkeys(place for place, _ in reasons))
        if not blocked:
            return
        for place, texts in zip(blocked, write([requests[place] for place in blocked], how)):
            free = [text for text in texts if self.guard.text_reason(text.text) is None]
            for number in [number for own, number in list(reasons) if own == place]:
                if free:
                    written[place][number] = free.pop(0)
                    del reasons[place, number]

    def _write(
        self, requests: Sequence[str | Mapping[str, Any]], task: str, how: "WritingOptions"
    ) -> list[list[Written]]:
        prompts, room = self._prompts(requests, task, how.max_new_tokens)
        written: list[list[Written]] = [[] for _ in requests]
        each = how.num_texts if how.draws else how.num_beams
        most = min(BEAMS_AT_ONCE if each > 1 else ROWS_AT_ONCE, KEPT_LOGITS // (self.config.vocab_size * room))
        seed = int(torch.randint(1 << 62, (1,))) if how.draws and how.seed is None else how.seed
        with inference_mode(self.model):
            for part in _parts(prompts, max(1, most // each)):
                own = [prompts[place] for place in part]
                rows = self._search(own, room, how) if how.num_beams > 1 else self._continue(own, room, how, seed)
                for place, texts in zip(part, rows):
                    written[place] = texts
        return written

    def items(
        self,
        requests: Sequence[str | Mapping[str, Any]],
        task: str,
        trie: ItemTrie | Sequence[ItemTrie],
        num_beams: int = 4,
        top_k: int = 4,
    ) -> list[list[WrittenItem]]:
        """Write items of a catalogue: texts that are constrained to a trie, by beam search.

        With as many beams as the catalogue has texts, this is plausibility ranking of the catalogue.

        Args:
            requests: The requests.
            task: A writing task.
            trie: A trie of the items' texts (`Catalogue.trie`), or one for each request, made by `where` of one trie.
            num_beams: Number of beams; `top_k` are searched if that is more, and two at least.
            top_k: Most items for each request.

        Returns:
            For each request its items, the best first; items with the same text in the order of the catalogue.

        Raises:
            ValueError: If a request is invalid, or a trie has no live item; the message names it.
        """
        tries = [trie] * len(requests) if isinstance(trie, ItemTrie) else list(trie)
        beams, depth = max(2, num_beams, top_k), max((own.depth for own in tries), default=1)
        prompts, _ = self._prompts(requests, task, depth)
        found: list[list[WrittenItem]] = [[] for _ in requests]
        search = {"num_beams": beams, "num_return_sequences": beams, "early_stopping": "never", "length_penalty": 1.0}
        with inference_mode(self.model):
            for part in _parts(prompts, max(1, BEAMS_AT_ONCE // beams)):
                batch = self._batch([prompts[place] for place in part])
                constraint = TrieProcessor(
                    [tries[place] for place in part], batch["input_ids"].shape[1], self.config.pad_token_id
                )
                out = self._generate(
                    batch,
                    depth,
                    **search,
                    **NO_SETTINGS,
                    eos_token_id=self.config.eos_token_id,
                    logits_processor=LogitsProcessorList([constraint]),
                    stopping_criteria=StoppingCriteriaList([_NothingLeft(constraint)]),
                )
                for place, texts in zip(part, constraint.found(out.sequences)):
                    own, end = tries[place], self.config.eos_token_id
                    named = [(own.ids[row], score) for ids, score in texts for row in own.items([*ids, end])]
                    found[place] = [WrittenItem(*pair) for pair in named[:top_k]]
        return found

    def _prompts(self, requests: Sequence[str | Mapping[str, Any]], task: str, new: int) -> tuple[list[Prompt], int]:
        """Encode requests with room for new tokens; also return for how many, if half of a row is too few."""
        reader, whole = copy.copy(self.processor), self.processor.max_length
        reader.max_length = max(whole - new, whole - whole // 2)
        prompts = []
        for number, reading in enumerate(reader.read_many(requests, task)):
            if reading.input_ids[-1] == self.config.eos_token_id:
                raise ValueError(f"request {number}: its text is complete: leave out what task {task!r} is to write")
            prompts.append(Prompt(reading.input_ids, reading.item_embedding_ids))
        return prompts, min(new, whole // 2)

    def _batch(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Pad prompts on the left."""
        features: list[dict[str, list[int]]] = [{"input_ids": prompt.ids} for prompt in prompts]
        if self.processor.item_rows is not None:
            features = [{**own, "item_embedding_ids": prompt.memory} for own, prompt in zip(features, prompts)]
        batch = self.processor.pad(features, padding_side="left")
        return {name: value.to(self.model.device) for name, value in batch.items() if name != "layout_ids"}

    def _continue(
        self, prompts: Sequence[Prompt], room: int, how: WritingOptions, seed: int | None
    ) -> list[list[Written]]:
        """Continue each prompt token by token, greedily or `num_texts` times by draws."""
        texts = []
        for written, likelihood in self._tokens(prompts, room, how, seed):
            text, ended = self._cut(written)
            texts.append(self._written(text, ended, float(likelihood[: len(text) + ended].mean())))
        return [texts[start : start + how.num_texts] for start in range(0, len(texts), how.num_texts)]

    def _tokens(
        self, prompts: Sequence[Prompt], room: int, how: WritingOptions, seed: int | None, slot: bool = False
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Return the ids that continue each prompt, `num_texts` times, and their log-likelihoods.

        With `slot`, a text may stop at [SLOT]; otherwise [SLOT] is not written.
        """
        rows = [prompt for prompt in prompts for _ in range(how.num_texts)]
        processors, stops = LogitsProcessorList(), {}
        if slot and self.slot is not None:
            stops = {"eos_token_id": [*self._ends, self.slot], "suppress_tokens": None}
            if how.slot_threshold is not None:
                processors.append(_Threshold(self.slot, how.slot_threshold))
        if how.draws:
            seeds = [_seed_of(seed, number, prompt) for prompt in prompts for number in range(how.num_texts)]
            processors.append(_Draws(seeds, how.temperature or 1.0, how.top_p or 1.0))
        batch = self._batch(rows)
        out = self._generate(batch, room, logits_processor=processors, output_logits=True, **stops)
        ids = out.sequences[:, batch["input_ids"].shape[1] :]
        likelihood = torch.stack(
            [own.float().log_softmax(-1).gather(1, ids[:, [step]])[:, 0] for step, own in enumerate(out.logits)], 1
        )
        return list(zip(ids.tolist(), likelihood.cpu()))

    def replies(self, requests: Sequence[Mapping[str, Any]], choose: "Choose", **options: Any) -> list[Written]:
        """Write a reply to each conversation, with an item of the catalogue where the model recommends one.

        The model writes up to [SLOT], by which it decides to recommend; then the item is chosen; then the reply is
        continued with the item in front of it and in place of the slot. So what is recommended is an item of the
        catalogue, and its place in the text is known. A reply has one item at most.

        Args:
            requests: Conversations, without candidates.
            choose: Chooses an item for requests, given their numbers; None = there is none, and the reply has no slot.
            **options: Arguments of `WritingOptions`; there is one text for each request, without beams.

        Raises:
            ValueError: If a request or an option is invalid; the message names it.
        """
        for name in ("num_beams", "num_texts"):
            if options.get(name, 1) > 1:
                raise ValueError(
                    f"{name}={options[name]}: a reply that may recommend an item is written once and without beams: "
                    "leave it out (and top_k), or draw with another seed"
                )
        how = WritingOptions(**options)
        numbered = list(enumerate(requests))
        return [text for (text,) in self._guarded(numbered, how, lambda some, own: self._replies(some, choose, own))]

    def _replies(
        self, requests: Sequence[tuple[int, Mapping[str, Any]]], choose: "Choose", how: WritingOptions
    ) -> list[list[Written]]:
        assert self.slot is not None, "replies recommend by [SLOT]"
        bare = [request for _, request in requests]
        prompts, room = self._prompts(bare, "conversation", how.max_new_tokens)
        seed = int(torch.randint(1 << 62, (1,))) if how.draws and how.seed is None else how.seed
        begun = self._in_parts(prompts, room, how, seed, slot=True)
        open_ = [place for place, (ids, _) in enumerate(begun) if self.slot in ids]
        chosen = dict(zip(open_, choose([requests[place][0] for place in open_]))) if open_ else {}
        befores = {place: begun[place][0][: begun[place][0].index(self.slot)] for place in open_}
        goes_on = []
        for place in open_:
            known, before = chosen[place], befores[place]
            given = bare[place] if known is None else {**bare[place], "candidates": [without_stats(known.item)]}
            (prompt,), _ = self._prompts([given], "conversation", room + 1)
            more = before if known is None else [*before, self.slot]
            goes_on.append(Prompt([*prompt.ids, *more], [*prompt.memory, *[0] * len(more)]))
        rest = dict(zip(open_, self._in_parts(goes_on, room, how, seed, slot=False))) if open_ else {}
        found = []
        for place, (ids, likelihood) in enumerate(begun):
            if place not in rest:
                text, ended = self._cut(ids)
                found.append([self._written(text, ended, float(likelihood[: len(text) + ended].mean()))])
                continue
            before, (after, of_after) = befores[place], rest[place]
            after, ended = self._cut(after[: max(1, room - len(before) - 1)])
            own = torch.cat([likelihood[: len(before) + 1], of_after[: len(after) + ended]])
            found.append([self._reply(before, chosen[place], after, ended, float(own.mean()))])
        return found

    def _in_parts(
        self, prompts: Sequence[Prompt], room: int, how: WritingOptions, seed: int | None, slot: bool
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Return what continues each prompt, as `_tokens` does, in batches."""
        found: list[Any] = [None] * len(prompts)
        most = min(ROWS_AT_ONCE, KEPT_LOGITS // (self.config.vocab_size * room))
        with inference_mode(self.model):
            for part in _parts(prompts, max(1, most)):
                for place, own in zip(part, self._tokens([prompts[place] for place in part], room, how, seed, slot)):
                    found[place] = own
        return found

    def _reply(
        self, before: list[int], chosen: "Chosen | None", after: list[int], ended: bool, logprob: float
    ) -> Written:
        """Put the item's name between the texts before and after the slot."""
        decode, tasks = self.processor.tokenizer.decode_text, self.processor.template["tasks"]
        start = decode(before)
        end = decode([*before, *after])[len(start) :].rstrip()
        start, finish = start.strip(), "end" if ended else "length"
        if chosen is None:
            return Written((start + end).strip(), logprob, finish)  # type: ignore[arg-type]
        (name,) = self.processor.names.item_texts([without_stats(chosen.item)])
        opening, closing = tasks.get("recommend", "{item}").split("{item}")
        start += ("" if not start or OPENED.search(start) else tasks["join"]) + opening
        mention = Mention(chosen.item_id, len(start), len(start) + len(name), chosen.score)
        return Written(f"{start}{name}{closing}{end}", logprob, finish, [mention])  # type: ignore[arg-type]

    def _search(self, prompts: Sequence[Prompt], room: int, how: WritingOptions) -> list[list[Written]]:
        """Continue each prompt by beams; of beams with the same text the best stays."""
        batch = self._batch(prompts)
        beams = {"num_beams": how.num_beams, "num_return_sequences": how.num_beams, "length_penalty": 1.0}
        out = self._generate(batch, room, output_scores=True, **beams)
        ids, found = out.sequences[:, batch["input_ids"].shape[1] :].tolist(), []
        for start in range(0, len(ids), how.num_beams):
            texts: dict[str, Written] = {}
            for written, score in zip(ids[start : start + how.num_beams], out.sequences_scores[start:].tolist()):
                own = self._written(*self._cut(written), score)
                texts.setdefault(own.text, own)
            found.append(list(texts.values())[: how.num_texts])
        return found

    def _generate(self, batch: dict[str, torch.Tensor], room: int, **more: Any) -> Any:
        more = {"eos_token_id": self._ends, "pad_token_id": self.config.pad_token_id, **more}
        if self.slot is not None:
            more.setdefault("suppress_tokens", [self.slot])
        if self._forbidden:
            more.setdefault("bad_words_ids", [list(ids) for ids in self._forbidden])
        return self.model.generate(**batch, **NOTHING_DRAWN, max_new_tokens=room, return_dict_in_generate=True, **more)

    def _cut(self, written: list[int]) -> tuple[list[int], bool]:
        """Return the ids of a text before its end, and whether there is one; what follows is padding."""
        place = next((place for place, token in enumerate(written) if token in self._ends), None)
        return (written, False) if place is None else (written[:place], True)

    def _written(self, ids: list[int], ended: bool, logprob: float) -> Written:
        text = self.processor.tokenizer.decode_text(ids).strip()
        return Written(text, logprob, "end" if ended else "length")


def _redrawn(how: WritingOptions, attempt: int) -> WritingOptions:
    """Return the options of the draws in the place of blocked texts."""
    top_p = how.top_p if how.draws else REWRITTEN_TOP_P
    seed = None if how.draws and how.seed is None else (how.seed or 0) + attempt + 1
    return replace(how, num_beams=1, top_p=top_p, seed=seed)


def _parts(prompts: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Split prompts into batches of similar length: places of the prompts."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
    for start in range(0, len(order), most):
        yield order[start : start + most]


def _seed_of(seed: int | None, number: int, prompt: Prompt) -> int:
    """Return the seed of a text: it depends on the prompt, not on its place in a batch."""
    return int.from_bytes(hashlib.sha256(repr((seed, number, prompt.ids)).encode()).digest()[:8])


class _Draws(LogitsProcessor):
    """Leaves one token of each row, drawn by the row's own generator, so that greedy decoding takes it."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Draw: B x V logits -> B x V, minus infinity for all but one token."""
        share, order = (scores.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = share.cumsum(-1) - share
        share = share.masked_fill(before >= self.top_p, 0.0)
        sums = share.cumsum(-1)
        drawn = torch.stack([torch.rand(1, generator=own, dtype=torch.float64) for own in self.generators])
        place = torch.searchsorted(sums, drawn.to(sums.device) * sums[:, -1:], right=True)
        chosen = order.gather(1, place.clamp(max=scores.shape[1] - 1))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class _Threshold(LogitsProcessor):
    """Leaves only [SLOT] where its probability is at least a threshold, and never [SLOT] elsewhere."""

    def __init__(self, slot: int, threshold: float) -> None:
        self.slot, self.threshold = slot, threshold

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Decide: B x V logits -> B x V."""
        recommends = scores.softmax(-1)[:, self.slot] >= self.threshold
        only = torch.full_like(scores, -torch.inf)
        only[:, self.slot] = 0.0
        never = scores.clone()
        never[:, self.slot] = -torch.inf
        return torch.where(recommends[:, None], only, never)


class _NothingLeft(StoppingCriteria):
    """Stops a beam search once no row can be continued to an item."""

    def __init__(self, constraint: TrieProcessor) -> None:
        self.constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Say for each row whether to stop."""
        return torch.full((len(input_ids),), self.constraint.finished, device=input_ids.device)


# ------------------------------------------------------------------------------------------- answers by writing tasks


WRITING_TASKS = ("explanation", "query", "conversation", "content", "next_item", "item_text")
"""Tasks whose answers are written."""
OPTIONS = tuple(each.name for each in fields(WritingOptions))
"""Parameters of a call that say how texts are written."""

Answer = list[dict[str, Any]]


@dataclass
class WritingAnswers:
    """Answers requests by writing tasks, and adds written explanations to ranked answers.

    Attributes:
        writer: Writes the texts.
        ranker: Returns the Ranker of a ranking task.
        ranking_task: Chooses the ranking task of a request.
        options: Arguments of `WritingOptions` that the call gives.
    """

    writer: Writer
    ranker: Callable[[str], Ranker]
    ranking_task: Callable[[Mapping[str, Any]], str]
    options: Mapping[str, Any]

    def answer(self, task: str, requests: Sequence[str | Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Answer]:
        """Answer requests by one writing task.

        Raises:
            ValueError: If a request, a wish or an option is invalid; the message names it.
        """
        if any(own.pmi for own in wishes):
            raise ValueError(f"pmi: task {task!r} has no likelihood of a text, only 'plausibility' has")
        if task == "explanation":
            return self._explanations(requests, wishes)
        described = [self.ranker("retrieval").described(request) for request in requests]
        if task == "next_item":
            return self._next_items(described, wishes)
        if any(own.explain for own in wishes):
            raise ValueError(f"explain: task {task!r} ranks nothing that could be explained")
        if task == "conversation" and self._recommends():
            return self._replies(described, wishes)
        return self._texts(task, described, wishes)

    def _recommends(self) -> bool:
        """Whether replies may recommend items: there are [SLOT], a catalogue, and vectors of users."""
        writer = self.writer
        known = writer.slot is not None and self.ranker("retrieval").known() is not None
        return known and writer.config.num_segment_layers > 0

    def _replies(self, requests: Sequence[Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Answer]:
        """Write replies that may recommend items of the catalogue, or of the candidates that a request gives."""
        bare = [{name: value for name, value in own.items() if name != "candidates"} for own in requests]

        def choose(numbers: Sequence[int]) -> list[Chosen | None]:
            return self._chosen([requests[number] for number in numbers], [wishes[number] for number in numbers])

        counts = {own.top_k for own in wishes if own.top_k is not None}
        options = {**self.options, **({"num_texts": max(counts)} if counts else {})}
        return [[_row("conversation", "", text)] for text in self.writer.replies(bare, choose, **options)]

    def _chosen(self, requests: Sequence[Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Chosen | None]:
        """Choose the best item that nobody has named in the conversation; None if none may be recommended."""
        ranker, processor = self.ranker("retrieval"), self.writer.processor
        catalogue, asked, own = ranker.catalogue(), [], []
        for request, wish in zip(requests, wishes):
            messages = processor.messages_of(request)
            named = {*catalogue.worded(phrases([each["content"] for each in messages]), processor.names)}
            allows = _not_among(named, wish.filter)
            own.append(replace(wish, task=None, top_k=1, filter=allows))
            asked.append({**{name: value for name, value in request.items() if name != "text"}, "messages": messages})
        found: list[Chosen | None] = []
        for query in ranker.queries(asked, own):
            best = [Chosen(*query.candidates[number], score) for number, score in query.best]
            found.append(best[0] if best else None)
        return found

    def ranked(self, task: str, requests: Sequence[str | Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Answer]:
        """Answer requests by one ranking task, and explain items in words where `explain` is "text"."""
        ranker = self.ranker(task)
        queries = ranker.queries(requests, wishes)
        answers = [ranker.rows(query) for query in queries]
        told = [place for place, own in enumerate(wishes) if own.explain == "text"]
        if told or self.options:
            self._explain([queries[place] for place in told], [answers[place] for place in told], [{} for _ in told])
        return answers

    def _explanations(self, requests: Sequence[str | Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Answer]:
        """Rank each request by its ranking task, and explain the items of its answer."""
        bare: list[Mapping[str, Any]] = [
            {"user": request} if isinstance(request, str) else {**request} for request in requests
        ]
        mentions = [{"mention": own["mention"]} if own.get("mention") is not None else {} for own in bare]
        bare = [{name: value for name, value in own.items() if name != "mention"} for own in bare]
        tasks = [self.ranking_task(own) for own in bare]
        answers: list[Answer] = [[] for _ in bare]
        for task in dict.fromkeys(tasks):
            places, ranker = [place for place, own in enumerate(tasks) if own == task], self.ranker(task)
            own = [replace(wishes[place], task=None, explain=True) for place in places]
            queries = ranker.queries([bare[place] for place in places], own)
            rows = [ranker.rows(query) for query in queries]
            self._explain(queries, rows, [mentions[place] for place in places])
            for place, answer in zip(places, rows):
                answers[place] = answer
        return answers

    def _explain(self, queries: Sequence[Query], answers: Sequence[Answer], more: Sequence[Mapping[str, Any]]) -> None:
        """Add a written explanation to each row; `more` are further keys of each request."""
        if self.options.get("num_texts", 1) != 1:
            raise ValueError(f"num_texts={self.options['num_texts']}: an item gets one explanation: leave it out")
        asked = [
            {**query.request, **own, "candidates": [without_stats(query.candidates[number].item)]}
            for query, own in zip(queries, more)
            for number, _ in query.best
        ]
        written = self.writer.write(asked, "explanation", **self.options)
        rows = [row for answer in answers for row in answer]
        vocabulary = self._vocabulary(asked) if rows else None
        for row, request, (text, *_) in zip(rows, asked, written):
            if vocabulary is not None and "because" in row and text.finish != "blocked":
                item, processor = request["candidates"][0], self.writer.processor
                text.checked = check(text.text, request, item, row["because"], vocabulary, processor)
            row |= {"text": text.text, **_outcome(text)}

    def _vocabulary(self, asked: Sequence[Mapping[str, Any]]) -> Vocabulary:
        """Return the words of the catalogue's items, or without a catalogue of the items that are explained."""
        catalogue, processor = self.ranker("retrieval").known(), self.writer.processor
        if catalogue is not None:
            return Vocabulary.of_catalogue(catalogue, processor)
        return Vocabulary.of([item for request in asked for item in request["candidates"]], processor)

    def _texts(self, task: str, requests: Sequence[Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Answer]:
        """Write `top_k` texts for each request, or as many as the options say."""
        blanks = [self.writer.processor.blank_field(request) if task == "content" else "" for request in requests]
        counts = [own.top_k or self.options.get("num_texts", 1) for own in wishes]
        answers: list[Answer] = [[] for _ in requests]
        for count in dict.fromkeys(counts):
            places = [place for place, own in enumerate(counts) if own == count]
            options = {**self.options, "num_texts": count}
            if not WritingOptions(**{**self.options, "num_texts": 1}).draws:
                options["num_beams"] = max(count, options.get("num_beams", 1))
            written = self.writer.write([requests[place] for place in places], task, **options)
            for place, texts in zip(places, written):
                answers[place] = [_row(task, blanks[place], text) for text in texts]
        return answers

    def _next_items(self, requests: Sequence[Mapping[str, Any]], wishes: Sequence[Wishes]) -> list[Answer]:
        """Write items of the catalogue."""
        ranker, processor = self.ranker("retrieval"), self.writer.processor
        catalogue, tries = ranker.catalogue(), []
        for request, own in zip(requests, wishes):
            if own.rearranges or own.explain or ranker.rerank is not None:
                raise ValueError(
                    "task 'next_item' orders items by the likelihood of their texts alone: leave out pin, boost, "
                    "diversity, rerank and explain, or choose task 'retrieval'"
                )
            tries.append(catalogue.trie(processor, ranker.left_out(request, own), ranker.decides(own.filter)))
        answers = []
        counts = [own.top_k or FROM_CATALOGUE for own in wishes]
        beams = self.options.get("num_beams", 1)
        found = self.writer.items(requests, "next_item", tries, beams, max(counts))
        for count, items in zip(counts, found):
            texts = item_texts(processor, [catalogue.item(own.item_id) for own in items[:count]])
            answers.append(
                [
                    {"rank": rank, "item": text, "item_id": own.item_id, "score": own.score}
                    for rank, (own, text) in enumerate(zip(items, texts), 1)
                ]
            )
        return answers


def _not_among(named: set[str], predicate: Any) -> Callable[[Mapping[str, Any]], bool]:
    """Return a filter that refuses items by id, and those that another filter refuses."""

    def allows(fields: Mapping[str, Any]) -> bool:
        return fields.get("item_id") not in named and (predicate is None or predicate(fields))

    return allows


def phrases(texts: Iterable[str]) -> set[str]:
    """Return the phrases of texts that may be names of items, as they stand and in the case of titles.

    Single words count from four letters, or before a year, since names such as "It" stand in most conversations.

    >>> "The Silence of the Lambs" in phrases(["I liked the silence of the lambs!"])
    True
    """
    found = set()
    for text in texts:
        words = text.split()
        found |= {*BRACKETED.findall(text)}
        for start in range(len(words)):
            for end in range(start + 1, min(start + LONGEST_NAME, len(words)) + 1):
                phrase = " ".join(words[start:end]).strip(PUNCTUATION)
                dated = end < len(words) and YEAR.match(words[end])
                if end - start > 1 or len(phrase) >= SHORTEST_NAME or dated:
                    title = " ".join(word if word in SMALL_WORDS else word.capitalize() for word in phrase.split())
                    found |= {phrase, phrase.title(), title[:1].upper() + title[1:]}
    return found - {""}


def _row(task: str, blank: str, text: Written) -> dict[str, Any]:
    """Return a text in the form of an answer."""
    if task == "conversation":
        row = {"role": "assistant", "content": text.text, "items": [asdict(own) for own in text.items]}
        return {**row, **_outcome(text)}
    fields: dict[str, Any] = {"fields": {blank: text.text}} if task == "content" else {}
    return {**fields, "text": text.text, "logprob": text.logprob, **_outcome(text)}


def _outcome(text: Written) -> dict[str, Any]:
    """Return how a text ended, and what is known of it; the events of a check are the row's `because`."""
    found: dict[str, Any] = {"finish": text.finish}
    if text.checked is not None:
        found["checked"] = {name: own for name, own in asdict(text.checked).items() if name != "events"}
    return found if text.reason is None else {**found, "reason": text.reason}


__all__ = [
    "OPTIONS",
    "WRITING_TASKS",
    "Check",
    "Chosen",
    "Mention",
    "Vocabulary",
    "Writer",
    "WritingAnswers",
    "WritingOptions",
    "Written",
    "WrittenItem",
    "check",
    "phrases",
]
