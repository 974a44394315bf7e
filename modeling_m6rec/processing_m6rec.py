"""The processor: requests in, rows of ids out. The only place that words, encodes, fits and pads."""

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchEncoding, ProcessorMixin
from transformers.utils import logging

from .atomic_m6rec import atomic_files
from .batching_m6rec import infilling, pad, written_labels
from .conversation_m6rec import read_turns
from .limits_m6rec import MAX_CANDIDATES, MAX_EVENTS, MAX_FACTS
from .naming_m6rec import ItemNames
from .reading_m6rec import Draft, Dropped, Fitter, Reading, Slot, up_to_whole
from .request_m6rec import (
    REQUEST_KEYS,
    SCORING_TASKS,
    TASKS,
    WRITING_TASKS,
    Kept,
    check_list,
    check_mapping,
    check_moment,
    check_read,
    check_text,
    wrong_type,
)
from .tokenization_m6rec import KINDS, M6RecTokenizer
from .values_m6rec import normalize_id
from .wording_m6rec import Event, Segment, Wording

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
"""Of processor_config.json, written as `format_version`; absent = 1. It is raised with each change that code which does
not know it would misread; unknown fields are ignored."""
KEPT_TEXTS = 200_000
"""Texts whose ids are kept, since logs repeat them."""


class M6RecProcessor(ProcessorMixin):
    """Turns recommendation requests into rows of ids: `[BOS'] user side [EOS']`, then `[BOS] candidate [EOS]` for each.

    A request is a text (who the user is) or a mapping with any of these keys:

    - `user`: a text or fields;
    - `history`: events, oldest first; an event is an item's text or a mapping with `event` (the verb), `item`,
      `timestamp`, `rating`, and `query` or `text`;
    - `now`: a text or fields such as `date`, `place`, `weather`, `timestamp`;
    - `facts`: texts;
    - `candidates`: items, each with `stats` if it has any;
    - `text`: what a writing task writes, or the turns of a conversation.

    An item is a text or fields; its `item_id` is never worded. A key that holds None counts as absent. Only writing
    tasks read the text, others refuse it; `retrieval` reads no candidates, and only scoring tasks their `stats`, of
    which a warning is given once. A request may be so large as `limits_m6rec` says.

    Args:
        tokenizer: A tokenizer that knows the tokens of requests.
        template: How requests are worded, see `load_template`; None = e-commerce in English.
        max_length: Most tokens of a source with its longest target.
        max_events: Most events of a history.
        time: What an event says of its time: "gap" since the event before (for causal history), or how long "ago".
        item_rows: Rows of the item memory by item id, 1 and up; fixed for the processor's life. None = no item memory.
        options: How many option tokens scoring tasks see in the source; True = all that the tokenizer has.
        forget_events: Where a history is too long, its oldest events are left out so many at a time: what is kept of a
            user (`UserStates`) then serves until the next are left out. 1 = no more than must be.
    """

    def __init__(
        self,
        tokenizer: M6RecTokenizer,
        template: dict[str, Any] | None = None,
        max_length: int = 1024,
        max_events: int = 50,
        time: str = "gap",
        item_rows: dict[str, int] | None = None,
        options: int | bool = False,
        forget_events: int = 1,
    ) -> None:
        # Parameters are positional and named as they are kept: ProcessorMixin saves and restores them by these names.
        self.template = _default_template() if template is None else template
        self.max_length = max_length
        self.max_events = max_events
        self.time = time
        self.forget_events = forget_events
        self.item_rows = None if item_rows is None else _rows_by_id(item_rows)
        super().__init__(tokenizer)
        self._ids = tokenizer.structural_ids
        self.options = self._ids["num_options"] if options is True else int(options)
        self._check()
        self._kinds = {kind: self._ids["first_kind_token_id"] + place for place, kind in enumerate(KINDS)}
        self._wording = Wording(self.template, self.item_rows)
        self._names = ItemNames(self._wording)
        self._texts = Kept(KEPT_TEXTS)

    @classmethod
    def from_template(
        cls, tokenizer: M6RecTokenizer, domain: str = "ecommerce", language: str = "en", **kwargs: Any
    ) -> "M6RecProcessor":
        """Make a processor with one of the package's templates; `kwargs` go to the constructor."""
        return cls(tokenizer, template=_templates().load_template(domain, language), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save tokenizer, template and code: all of it, or nothing. Arguments as of every processor.

        Returns:
            The paths of the files that the library names.
        """
        with atomic_files(save_directory) as partial:
            files = super().save_pretrained(str(partial)) or []
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or Path(save_directory).name, **kwargs)
        return [str(Path(save_directory) / Path(file).relative_to(partial)) for file in files]

    def to_dict(self) -> dict[str, Any]:
        """Serialise, with the number of the format."""
        return {**super().to_dict(), "format_version": FORMAT_VERSION}

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor of its tokenizer and what a checkpoint says, unless a newer version wrote it.

        Raises:
            ValueError: If it is of a format that is not known here.
        """
        fields = dict(processor_dict)
        found = fields.pop("format_version", 1)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            raise ValueError(
                f"processor_config.json is of format {found!r}, which a newer version wrote: this one reads formats "
                f"up to {FORMAT_VERSION}. Upgrade (pip install --upgrade m6rec), or load with trust_remote_code=True "
                "in a process that does not import m6rec, so that the code which the checkpoint carries is used"
            )
        return super().from_args_and_dict(args, fields, **kwargs)

    def _check(self) -> None:
        if self.max_length < 8:
            raise ValueError(f"max_length={self.max_length} is too small for any request: give 8 or more")
        if self.max_events < 1:
            raise ValueError(f"max_events={self.max_events}: give 1 or more")
        if not 1 <= self.forget_events <= self.max_events:
            raise ValueError(f"forget_events={self.forget_events} is not in 1..{self.max_events} (max_events)")
        if self.time not in ("gap", "ago"):
            raise ValueError(f"time={self.time!r}: expected 'gap' or 'ago'")
        if not 0 <= self.options <= self._ids["num_options"]:
            raise ValueError(f"options={self.options}, but the tokenizer has {self._ids['num_options']} option tokens")
        wrong = {key: row for key, row in (self.item_rows or {}).items() if type(row) is not int or row < 1}
        if wrong:
            raise ValueError(f"item_rows: rows are whole numbers from 1 up (0 = unknown), got {wrong}")

    def __call__(
        self,
        requests: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
        task: str = "click",
        return_tensors: str | None = None,
        padding_side: str = "right",
    ) -> BatchEncoding:
        """Read requests into a batch; a single request is a batch of one.

        Args:
            requests: One request or several.
            task: One of TASKS; decides what the targets are.
            return_tensors: "pt" = padded tensors, None = lists of unpadded rows.
            padding_side: Which side is padded; generation needs "left".
        """
        several = [requests] if isinstance(requests, str | Mapping) else list(requests)
        features = [self._feature(reading) for reading in self.read_many(several, task)]
        if return_tensors == "pt":
            return BatchEncoding(self.pad(features, padding_side))
        if return_tensors is not None:
            raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt' or None")
        names = ["input_ids", "attention_mask", "layout_ids"] + ["item_ids"] * (self.item_rows is not None)
        return BatchEncoding({name: [feature[name] for feature in features] for name in names})

    def _feature(self, reading: Reading) -> dict[str, list[int]]:
        ids = reading.input_ids
        feature = {"input_ids": ids, "attention_mask": [1] * len(ids), "layout_ids": list(ids)}
        return feature if self.item_rows is None else {**feature, "item_ids": reading.item_ids}

    def read(self, request: str | Mapping[str, Any], task: str = "click") -> Reading:
        """Read one request: its row, what it says, and what was dropped.

        Raises:
            ValueError: Something in the request, named by its place, cannot be used, or it cannot be made to fit.
            TypeError: Something in it has the wrong type.
        """
        return self.read_many([request], task)[0]

    def read_many(self, requests: Sequence[str | Mapping[str, Any]], task: str = "click") -> list[Reading]:
        """Read several requests at once, which is faster than one by one."""
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}")
        drafts = [self._draft(request, task) for request in requests]
        return self._read_drafts(drafts)

    def encode_items(self, items: Iterable[str | Mapping[str, Any]]) -> list[list[int]]:
        """Encode items alone, each as `[ITEM] text [SEG]`: the ids they have wherever they stand in a request."""
        segments = [self._wording.item(item, f"items[{index}]") for index, item in enumerate(items)]
        drafts = [Draft([Slot(segment, f"items[{index}]")], [], [], []) for index, segment in enumerate(segments)]
        return [reading.input_ids[1:-1] for reading in self._read_drafts(drafts)]

    def item_texts(self, items: Iterable[str | Mapping[str, Any]]) -> list[str]:
        """Word items."""
        requests = [{"history": [{"item": item}]} for item in items]
        return [reading.segments[-1][1] for reading in self.read_many(requests, "retrieval")]

    @property
    def names(self) -> ItemNames:
        """What says which items are the same where their ids do not."""
        return self._names

    def item_row(self, item: str | Mapping[str, Any]) -> int:
        """Return an item's row in the item memory, 0 where it has none."""
        return self._wording.item_row(item)

    def labels(self, reading: Reading | Sequence[int]) -> list[int]:
        """Label what is written in one row: after [TEXT] up to and including [EOS], in each closed target."""
        row = reading.input_ids if isinstance(reading, Reading) else list(reading)
        return written_labels(row, self._ids, self._kinds["text"])

    def document(self, text: str) -> tuple[list[int], list[int]]:
        """Make a plain row of a text, ended by [EOS], and its labels; a text longer than `max_length` is cut."""
        row = [
            *self._encode([check_text(text, "text", limited=False)])[0][: self.max_length - 1],
            self._ids["eos_token_id"],
        ]
        return row, list(row)

    def infill(self, text: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Make a text-infilling row, and its labels: spans of the text are masked, and written in the target.

        Args:
            text: The text; if it is longer than `max_length` allows, it is cut.
            rng: Where every draw comes from.
        """
        text_ids = self._encode([check_text(text, "text", limited=False)])[0]
        row = infilling(text_ids, self._ids, self._kinds["text"], rng, self.max_length)
        return row, self.labels(row)

    def pad(self, features: Sequence[Mapping[str, Any]], padding_side: str = "right") -> dict[str, Any]:
        """Pad rows to the longest: the only place that does.

        What stands beside tokens is padded on `padding_side`: ids with the pad id, `attention_mask` and `item_ids`
        with 0, labels with -100. Labels of targets (`click_labels`, ...) are padded with -100 on the right. Rows
        without a label that others have get -100. `layout_ids` are always there.

        Args:
            features: Rows as mappings of lists, `input_ids` among them.
            padding_side: "right" or "left".
        """
        return pad(features, self._ids, padding_side)

    # Encoding

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_texts(texts)

    def _read_drafts(self, drafts: Sequence[Draft]) -> list[Reading]:
        """Encode all texts in one go, those kept from before apart, then fit and write each draft."""
        segments = [slot.segment for draft in drafts for slot in draft.slots()]
        texts = {segment.text for segment in segments} | {segment.lead for segment in segments}
        found = {text: self._texts.find(text) for text in texts}
        missing = [text for text, ids in found.items() if ids is None]
        for text, ids in zip(missing, self._encode(missing)):
            found[text] = ids
            self._texts.keep(text, ids)

        def encode(texts: Sequence[str]) -> list[list[int]]:
            new = [*dict.fromkeys(text for text in texts if text not in found)]
            found.update(zip(new, self._encode(new) if new else []))
            return [found[text] for text in texts]

        fitter = Fitter(self._ids, self._kinds, encode, self._decode, self.max_length, self.forget_events)
        return [fitter.read(draft) for draft in drafts]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode_text(ids)

    # Drafting: which segments a request has, in which order

    def _draft(self, request: str | Mapping[str, Any], task: str) -> Draft:
        parts = check_mapping({"user": request} if isinstance(request, str) else request, "request", REQUEST_KEYS)
        check_read(parts, task)
        history = check_list(parts.get("history"), "history", MAX_EVENTS)
        skipped = up_to_whole(max(0, len(history) - self.max_events), self.forget_events)
        events = [
            self._wording.event(event, f"history[{place}]") for place, event in enumerate(history[skipped:], skipped)
        ]
        moment = self._moment(parts.get("now"))
        slots, since = self._events(events, moment, skipped)
        targets, turns = self._targets(parts, task)
        now = self._wording.now(parts.get("now"), since if self.time == "gap" else None)
        # What is neither event nor moment stands first: an event ends with the next, with [NOW] or with [EOS'], and a
        # causal history must not move when an event is appended.
        return Draft(
            start=[*self._user(parts), *self._options(task), *turns],
            events=slots,
            end=[] if now is None else [Slot(now, "now")],
            targets=targets,
            gaps=self.time == "gap",
            closed=task not in WRITING_TASKS or bool(targets[0][-1].segment.text),
            dropped=Dropped(events=skipped),
        )

    def _user(self, parts: Mapping[str, Any]) -> list[Slot]:
        user = self._wording.user(parts.get("user"))
        facts = enumerate(check_list(parts.get("facts"), "facts", MAX_FACTS))
        slots = [] if user is None else [Slot(user, "user")]
        return slots + [Slot(Segment("fact", check_text(fact, f"facts[{i}]")), f"facts[{i}]") for i, fact in facts]

    def _options(self, task: str) -> list[Slot]:
        if not self.options or task not in SCORING_TASKS:
            return []
        tokens = tuple(f"[OPT_{index}]" for index in range(self.options))
        return [Slot(Segment("option", " ".join(tokens), tokens, tokens, " "), "options")]

    @staticmethod
    def _moment(now: Any) -> float | None:
        given = now.get("timestamp") if isinstance(now, Mapping) else None
        return None if given is None else check_moment(given, "now.timestamp")

    def _events(self, events: list[Event], now: float | None, first: int) -> tuple[list[list[Slot]], float | None]:
        """Give each event its [AGE]; also return the seconds from the last event until now, where both are known."""
        moments = [event.seconds for event in events if event.seconds is not None]
        until = now if now is not None else max(moments, default=None)
        slots, before = [], None
        for place, (verb, item, text, seconds) in enumerate(events, first):
            segments = [verb]
            if seconds is not None:
                self._check_order(before, seconds, f"history[{place}].timestamp")
                if self.time == "ago" and until is not None:
                    self._check_order(seconds, until, "now.timestamp")
                    segments.append(Segment("age", self._wording.gap(until - seconds, "ago")))
                elif self.time == "gap" and before is not None:
                    segments.append(Segment("age", self._wording.gap(seconds - before)))
                before = seconds
            segments += [segment for segment in (item, text) if segment is not None]
            slots.append([Slot(segment, f"history[{place}]") for segment in segments])
        if now is None or before is None:
            return slots, None
        self._check_order(before, now, "now.timestamp")
        return slots, now - before

    @staticmethod
    def _check_order(before: float | None, after: float, place: str) -> None:
        if before is not None and after < before:
            raise ValueError(f"{place}: {after:.0f} is earlier than {before:.0f} before it; give the oldest first")

    def _targets(self, parts: Mapping[str, Any], task: str) -> tuple[list[list[Slot]], list[Slot]]:
        """Make the targets, and the turns of a conversation that stand in the source."""
        given = check_list(parts.get("candidates"), "candidates", MAX_CANDIDATES)
        candidates = [self._candidate(candidate, f"candidates[{place}]") for place, candidate in enumerate(given)]
        turns = self._turns(parts.get("text"), task)
        if task not in SCORING_TASKS and any(len(candidate) > 1 for candidate in candidates):
            logger.warning_once(f"task {task!r} does not read the statistics of candidates (`stats`)")
        if task == "retrieval":
            if candidates:
                logger.warning_once("a row of task 'retrieval' holds the user alone: its candidates are not read")
            return [], []
        if task in WRITING_TASKS:
            return self._writing(candidates, turns, task)
        if not candidates:
            raise ValueError(f"candidates: task {task!r} needs at least one")
        if task == "plausibility":
            frame = tuple(self.template["tasks"]["plausibility"].format(item="\0").split("\0"))
            worded = [replace(item.segment.framed(frame), kind="text", written=True) for item, *_ in candidates]
            return [[Slot(segment, f"candidates[{place}]")] for place, segment in enumerate(worded)], []
        return candidates, []

    def _candidate(self, candidate: Any, place: str) -> list[Slot]:
        stats: Any = None
        if isinstance(candidate, Mapping) and "stats" in candidate:
            stats = candidate["stats"]
            candidate = {name: value for name, value in candidate.items() if name != "stats"}
        item = Slot(self._wording.item(candidate, place), place)
        return [item, *(Slot(stat, f"{place}.stats") for stat in self._wording.stats(stats, f"{place}.stats"))]

    def _writing(
        self, candidates: list[list[Slot]], turns: list[tuple[str, str]], task: str
    ) -> tuple[list[list[Slot]], list[Slot]]:
        """Make the one target of a writing task: the item, if one is given, then the lead, then the text if known."""
        if len(candidates) > 1 or (task == "explanation" and not candidates):
            expected = "exactly one" if task == "explanation" else "at most one"
            raise ValueError(f"candidates: task {task!r} takes {expected}, got {len(candidates)}")
        tasks = self.template["tasks"]
        speakers, join = tasks["speakers"], tasks["join"]
        known = bool(turns) and turns[-1][0] == "system"
        answer = turns[-1][1] if known else ""
        past = [f"{speakers[role]}{join}{content}" for role, content in turns[: len(turns) - known]]
        lead = speakers["system"] if task == "conversation" else tasks[task]
        written = Segment("text", f"{join}{answer}" if answer else "", lead=lead, written=True)
        target = [*(candidates[0][:1] if candidates else []), Slot(written, "text")]
        return [target], [Slot(Segment("text", text), f"text[{place}]") for place, text in enumerate(past)]

    def _turns(self, text: Any, task: str) -> list[tuple[str, str]]:
        """Read `text` as (role, content) turns; outside conversations it is one turn of the system: what to write."""
        if text is None:
            return []
        if task not in WRITING_TASKS:
            return []
        if task != "conversation":
            if not isinstance(text, str):
                raise wrong_type(text, "text", f"a text for task {task!r}")
            return [("system", check_text(text, "text"))]
        turns = [text] if isinstance(text, str) else check_list(text, "text")
        return read_turns(turns, self.template["tasks"]["speakers"])


def _rows_by_id(rows: Mapping[Any, int]) -> dict[str, int]:
    """Return rows of the item memory by normalised id; of two keys that are one id, the normalised one counts.

    Tables once kept white space around ids, so older processors may hold such keys.
    """
    ids = {key: normalize_id(key, "item_rows: a key") for key in rows}
    return {known: rows[known] if known in rows else rows[key] for key, known in ids.items()}


def _templates() -> Any:
    """Import the package's templates, which do not travel with a checkpoint."""
    try:
        return importlib.import_module("m6rec.tokenization.templates")
    except ImportError as error:
        raise ImportError(
            "the templates come with the package: install m6rec, or give `template` (a saved processor holds its own)"
        ) from error


def _default_template() -> dict[str, Any]:
    return _templates().load_template()


M6RecProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["M6RecProcessor"]
