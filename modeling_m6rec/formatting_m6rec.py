"""Formatting of requests: checks, conversations, templates, and comparison of items by their text.

Checks of a request's parts raise errors that name the place. Turns of a conversation cannot imitate another speaker. A
checked template turns the parts of a request into segments. Items without ids are compared by the field that names
them, and by all fields that both have.
"""

import json
import math
import re
import string
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from .values_m6rec import (
    MAPPINGS,
    MAX_CANDIDATES,
    MAX_EVENTS,
    MAX_VALUES,
    SCORING_TASKS,
    SIMPLE,
    KnownItem,
    check_characters,
    check_count,
    check_size,
    normalize_id,
    short,
    time_seconds,
    time_text,
)

# ----------------------------------------------------------------------------------------------------------- requests


WRITING_TASKS = ("explanation", "query", "conversation", "item_text", "content", "next_item")

OTHER_TASKS = ("retrieval", "plausibility", *WRITING_TASKS)

TASKS = (*SCORING_TASKS, *OTHER_TASKS)
"""Tasks of a request."""

REQUEST_KEYS = frozenset({"user", "history", "now", "facts", "candidates", "text", "messages", "mention"})

EVENT_KEYS = frozenset({"event", "item", "timestamp", "rating", "query", "text"})
RATINGS = frozenset({int, float, str, type(None)})
"""Types of most ratings; others are checked by abstract classes, which is slow."""

MENTIONS = frozenset({"features", "events"})


class LRUCache(OrderedDict):
    """A bounded, thread-safe cache that drops the least recently used entry. Its copies and pickles are empty."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Any:
        """Return the value of `key`, or None."""
        with self._lock:
            value = self.get(key)
            if value is not None:
                self.move_to_end(key)
            return value

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep `value`, and drop the least recently used entry if there are too many."""
        with self._lock:
            self[key] = value
            if len(self) > self.capacity:
                self.popitem(last=False)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.capacity,)


def wrong_type(value: Any, place: str, expected: str) -> TypeError:
    """Make the error for a value of the wrong type."""
    return TypeError(f"{place}: expected {expected}, got {type(value).__name__} ({short(value)})")


def check_text(value: Any, place: str, limited: bool = True) -> str:
    """Return a text without surrounding white space; it must be valid Unicode and not empty.

    Args:
        value: The text.
        place: Its place in the request, for the error.
        limited: Whether to limit its length, as for all texts of a request.
    """
    if not isinstance(value, str):
        raise wrong_type(value, place, "a text")
    if limited:
        check_characters(value, place)
    text = value.strip()
    if not text:
        raise ValueError(f"{place}: the text is empty; leave the key out, or give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {short(value)} is not valid Unicode ({error.reason})") from error
    return text


def check_mapping(value: Any, place: str, known: frozenset[str] | None = None) -> Mapping[str, Any]:
    """Return a mapping after checking that its keys are texts, and among `known` if given."""
    if not isinstance(value, MAPPINGS):
        raise wrong_type(value, place, "a mapping")
    if known is not None and value.keys() <= known:
        return value
    for key in value:
        if not isinstance(key, str):
            raise wrong_type(key, f"{place}: a key", "a text")
        if known is not None and key not in known:
            raise ValueError(f"{place}: unknown key {short(key)}; known keys: {', '.join(sorted(known))}")
    return value


def check_list(value: Any, place: str, most: int = MAX_VALUES) -> list[Any]:
    """Return a list of at most `most` entries; accepts tuples and one-dimensional arrays; None is an empty list."""
    if value is None:
        return []
    if not isinstance(value, list | tuple) and not (isinstance(value, np.ndarray) and value.ndim == 1):
        raise wrong_type(value, place, "a list")
    check_count(len(value), place, most)
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def check_read(parts: Mapping[str, Any], task: str) -> None:
    """Refuse `text` and `mention` for a task that does not read them."""
    if parts.get("mention") is not None and task != "explanation":
        raise ValueError(f"mention: task {task!r} does not read it, only explanation does")
    if parts.get("text") is not None and task not in WRITING_TASKS:
        raise ValueError(
            f"text: task {task!r} does not read it, only {', '.join(WRITING_TASKS)} do. Say who the user is in `user`, "
            "what the user looks for as an event ({'event': 'search', 'query': ...}), and a conversation in `messages`"
        )


def check_number(value: Any, place: str) -> float:
    """Return a finite number; booleans are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise wrong_type(value, place, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{place}: expected a finite number, got {short(value)}")
    return number


def check_moment(value: Any, place: str) -> float:
    """Return a moment in seconds, by the rule of `time_seconds`; small numbers count from an arbitrary start."""
    return time_seconds(value, place, relative=True)


def number_text(value: float) -> str:
    """Format a number for people: 1995, 4.5, and 4 for 4.0.

    >>> number_text(4.0), number_text(4.5), number_text(1995)
    ('4', '4.5', '1995')
    """
    number = float(value)
    exact = isinstance(value, Integral) or (number.is_integer() and abs(number) < 1e15)
    return str(int(value)) if exact else repr(number)


def value_text(value: Any, place: str, words: Mapping[str, str]) -> str:
    """Format the value of a field: a text, a number, a truth value, or a list of these.

    Args:
        value: The value.
        place: Its place in the request, for the error.
        words: The template's `words`: words for truth values, and the separator of lists.
    """
    if isinstance(value, str):
        return check_text(value, place)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool):
        return words["true" if value else "false"]
    if isinstance(value, list | tuple) and value:
        return words["list"].join(value_text(each, f"{place}[{index}]", words) for index, each in enumerate(value))
    if isinstance(value, date):
        return time_text(value, place)
    if isinstance(value, Real):
        check_number(value, place)
        return number_text(value)  # type: ignore[arg-type]  # mypy does not know numbers.Real
    raise wrong_type(value, place, "a text, a number, a truth value or a list of these")


# ------------------------------------------------------------------------------------------------------ conversations


TURN_KEYS = frozenset({"role", "content"})

PART_KEYS = frozenset({"type", "text"})

ASSISTANT = "assistant"

BETWEEN_MESSAGES = "\n"
"""Joins consecutive messages of one speaker."""


class Turn(NamedTuple):
    """What one speaker said until the other spoke: `role` is "user" or "system" (the recommender)."""

    role: str
    content: str
    place: str
    """Place of its first message in the request."""
    slot: int | None = None
    """Number of characters before the slot, if there is one."""


class Talk(NamedTuple):
    """A conversation: the instruction to the recommender, if any, and the turns, in which speakers alternate."""

    instruction: Turn | None
    turns: list[Turn]


def read_talk(messages: Sequence[Any], labels: Iterable[str], name: str = "messages") -> Talk:
    """Read a conversation.

    A turn of `text` is a text or a mapping like a chat message. Of texts, speakers alternate, beginning with the user.
    In `messages` all turns are mappings; the recommender has the role "assistant", and a first message of the role
    "system" is the instruction. In `text`, "system" also means the recommender, unless it opens the conversation or
    there are assistants: this form is older. Consecutive turns of one speaker are joined. The labels of speakers within
    a content are put in quotation marks, so that a content cannot start another speaker's turn.

    Args:
        messages: The turns, oldest first.
        labels: The template's labels of speakers and of the instruction.
        name: The key of the request: "messages" or "text".

    Raises:
        ValueError: If a role or a content is invalid; the message names its place.
        TypeError: If one has the wrong type.
    """
    chat = any(isinstance(turn, Mapping) and turn.get("role") == ASSISTANT for turn in messages)
    labels = [*labels]
    instruction: Turn | None = None
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        turn = _turn(message, number, chat, name)
        for label in labels:
            turn = _quoted(turn, label)
        if turn.role == "instruction":
            instruction = turn
        elif turns and turns[-1].role == turn.role:
            turns[-1] = _joined(turns[-1], turn)
        else:
            turns.append(turn)
    return Talk(instruction, turns)


def _turn(turn: Any, number: int, chat: bool, name: str) -> Turn:
    place = f"{name}[{number}]"
    if isinstance(turn, str) and name == "text":
        return Turn(("user", "system")[number % 2], check_text(turn, place), place)
    fields = check_mapping(turn, place, TURN_KEYS)
    role = _role(fields.get("role"), number, chat, name)
    content, slot = _content(fields.get("content"), f"{place}.content")
    if slot is not None and role != "system":
        raise ValueError(f"{place}.content: only the assistant's turns hold a slot for an item")
    return Turn(role, content, place, slot)


def _role(role: Any, number: int, chat: bool, name: str) -> str:
    place = f"{name}[{number}].role"
    if role not in ("user", "system", ASSISTANT):
        raise ValueError(f"{place}: expected user or assistant, got {short(role)}")
    if name == "messages" and role == "system":
        if number:
            raise ValueError(f"{place}: 'system' is an instruction, which only the first message may be")
        return "instruction"
    if role == "system" and (chat or number == 0):
        raise ValueError(
            f"{place}: 'system' is an instruction to a chat model, which `text` does not hold: give the conversation "
            "as `messages`; turns of the recommender have the role 'assistant'"
        )
    return "user" if role == "user" else "system"


def _quoted(turn: Turn, label: str) -> Turn:
    """Put a speaker's label within a content in quotation marks."""
    if label not in turn.content:
        return turn
    slot = turn.slot
    before, after = turn.content[:slot], "" if slot is None else turn.content[slot:]
    before, after = (text.replace(label, f'"{label}"') for text in (before, after))
    return turn._replace(content=before + after, slot=None if slot is None else len(before))


def _joined(turn: Turn, following: Turn) -> Turn:
    if turn.slot is not None and following.slot is not None:
        raise ValueError(f"{following.place}.content: the reply has a slot already, and one item fits into a reply")
    shift = len(turn.content) + len(BETWEEN_MESSAGES)
    slot = turn.slot if following.slot is None else following.slot + shift
    return turn._replace(content=f"{turn.content}{BETWEEN_MESSAGES}{following.content}", slot=slot)


def _content(content: Any, place: str) -> tuple[str, int | None]:
    """Read a text, or a list of parts: texts, {"type": "text", "text": ...} or, once, {"type": "slot"}.

    Returns:
        The text, and the number of characters before the slot; the slot replaces the white space before it.
    """
    if not isinstance(content, list | tuple) or not content:
        return check_text(content, place), None
    check_size(content, place)
    slots = [number for number, part in enumerate(content) if isinstance(part, Mapping) and part.get("type") == "slot"]
    if len(slots) > 1:
        raise ValueError(f"{place}: a reply has one slot at most, got {len(slots)}")
    texts = [_part(part, f"{place}[{number}]") for number, part in enumerate(content) if number not in slots]
    if not slots:
        return check_text(" ".join(text.strip() for text in texts), place), None
    before = " ".join(text.strip() for text in texts[: slots[0]])
    after = " ".join(texts[slots[0] :]).rstrip()
    return before + after, len(before)


def _part(part: Any, place: str) -> str:
    """Return the text of a part, with the white space around it."""
    if isinstance(part, Mapping):
        if part.get("type", "text") != "text":
            raise ValueError(f"{place}: a conversation holds texts only, got a part of type {short(part['type'])}")
        part = check_mapping(part, place, PART_KEYS).get("text")
    check_text(part, place)
    return str(part)


CHAT_TEMPLATE = """{#- A conversation as M6RecProcessor writes it. -#}
{%- set labels = LABELS -%}
{%- set reserved = RESERVED -%}
{%- set talk = namespace(instruction='', turns=[]) -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if role not in labels or (role == 'system' and not loop.first) -%}
    {{- raise_exception('message ' ~ loop.index0 ~ ': unexpected role ' ~ role) -}}
  {%- endif -%}
  {%- set own = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set own.text = message['content'] | trim -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- set words = part if part is string else part['text'] -%}
      {%- set own.text = own.text ~ (' ' if own.text else '') ~ (words | trim) -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if not own.text -%}{{- raise_exception('message ' ~ loop.index0 ~ ' is empty') -}}{%- endif -%}
  {%- for token in reserved -%}
    {%- if token in own.text -%}
      {{- raise_exception('message ' ~ loop.index0 ~ ' spells ' ~ token ~ ': use processor.apply_chat_template') -}}
    {%- endif -%}
  {%- endfor -%}
  {%- for label in labels.values() -%}
    {%- set own.text = own.text | replace(label, '"' ~ label ~ '"') -%}
  {%- endfor -%}
  {%- if role == 'system' -%}
    {%- set talk.instruction = own.text -%}
  {%- elif talk.turns and talk.turns[-1][0] == role -%}
    {%- set talk.turns = talk.turns[:-1] + [[role, talk.turns[-1][1] ~ '\n' ~ own.text]] -%}
  {%- else -%}
    {%- set talk.turns = talk.turns + [[role, own.text]] -%}
  {%- endif -%}
{%- endfor -%}
{%- set answered = talk.turns and talk.turns[-1][0] == 'assistant' -%}
{{- "[BOS']" -}}
{%- if talk.instruction -%}{{- '[TEXT]' ~ labels['system'] ~ JOIN ~ talk.instruction ~ '[SEG]' -}}{%- endif -%}
{%- for turn in (talk.turns[:-1] if answered else talk.turns) -%}
  {{- '[TEXT]' ~ labels[turn[0]] ~ JOIN ~ turn[1] ~ '[SEG]' -}}
{%- endfor -%}
{{- "[EOS'][BOS][TEXT]" ~ labels['assistant'] -}}
{%- if answered -%}{{- JOIN ~ talk.turns[-1][1] ~ '[EOS]' -}}{%- endif -%}
"""


def chat_template(tasks: Mapping[str, Any], reserved: Iterable[str]) -> str:
    """Return a Jinja template that writes a conversation as the processor does, for libraries that read these.

    It raises an error where a message spells a special token, which the processor encodes as ordinary text.

    Args:
        tasks: The section `tasks` of a template.
        reserved: The spellings of special tokens.
    """
    speakers = tasks["speakers"]
    labels = {"user": speakers["user"], ASSISTANT: speakers["system"]}
    if "instruction" in tasks:
        labels["system"] = tasks["instruction"]
    values = {"LABELS": labels, "RESERVED": [*reserved], "JOIN": tasks["join"]}
    names = rf"\b({'|'.join(values)})\b"
    return re.sub(names, lambda found: json.dumps(values[found[0]], ensure_ascii=False), CHAT_TEMPLATE)


# ---------------------------------------------------------------------------------------------- wording by a template


KEPT_ITEMS = 100_000
"""Number of items and verbs whose text is cached, since logs repeat them."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One short text of a request.

    `text` may be shortened: it consists of `parts` (the texts of the fields `names`), joined by `join` and put into
    `frame`. `lead` precedes it and is never shortened. `row` is the item's row of item embeddings. The model writes a
    `written` segment: no [SEG] closes it. A text with a `label` is cut between the label, with which it starts, and its
    end. `slot` holds the texts before and after the slot. `ids` are its ids once the processor has encoded it: segments
    of items, verbs and times are kept, so that each is encoded once.
    """

    kind: str
    text: str
    names: tuple[str, ...] = ("text",)
    parts: tuple[str, ...] = ()
    join: str = ""
    frame: tuple[str, str] = ("", "")
    lead: str = ""
    row: int = 0
    written: bool = False
    label: str = ""
    slot: tuple[str, str] | None = None
    ids: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def keep_ids(self, ids: tuple[int, ...]) -> None:
        """Keep the ids of the whole segment."""
        object.__setattr__(self, "ids", ids)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that are encoded, without the lead."""
        return (self.text,) if self.slot is None else self.slot

    @property
    def is_item(self) -> bool:
        """Whether its parts are an item's fields: an item segment, or a text segment with an item's text."""
        return self.kind in ("item", "text") and bool(self.parts)

    def only(self, fields: Sequence[int]) -> "Segment":
        """Return the segment with only these fields."""
        names, parts = (tuple(own[index] for index in fields) for own in (self.names, self.parts))
        return replace(self, names=names, parts=parts).framed(self.frame)

    def framed(self, frame: tuple[str, str]) -> "Segment":
        """Return the segment with its parts in another frame."""
        return replace(self, text=f"{frame[0]}{self.join.join(self.parts)}{frame[1]}", frame=frame)


class Event(NamedTuple):
    """A formatted event: its verb, then an item, a text, or both; and its time."""

    verb: Segment
    item: Segment | None
    text: Segment | None
    seconds: float | None


class RequestFormatter:
    """Turns the parts of a request into segments by a template.

    Args:
        template: A template as returned by `load_template`.
        item_rows: Rows of item embeddings by item id.
    """

    def __init__(self, template: Mapping[str, Any], item_rows: Mapping[str, int] | None = None) -> None:
        check_template(template)
        self.template = template
        self.words = template["words"]
        self.item_rows = item_rows or {}
        self._items = LRUCache(KEPT_ITEMS)
        self._verbs = LRUCache(KEPT_ITEMS)
        self._gaps = {name: _Table(template[name]) for name in ("gaps", "ago")}
        self._times: dict[str, Segment] = {}
        self._tables = {name: _Table(table) for name, table in template["stats"]["tables"].items()}
        self._ages = _Table(template["user"]["ages"])

    def user(self, user: Any) -> Segment | None:
        """Format the user; None if there is nothing to say. A `user_id` is left out of the text."""
        if user is None or isinstance(user, str):
            return None if user is None else Segment("user", check_text(user, "user"))
        check_size(user, "user")
        fields = _present(check_mapping(user, "user"), leave_out=("user_id",))
        if not fields:
            return None
        wording = self.template["user"]
        gender = fields.get("gender")
        known = wording["genders"].get(gender.strip().lower(), "unknown") if isinstance(gender, str) else "unknown"
        subject = wording["subjects"][known]
        if known != "unknown":
            del fields["gender"]
        if isinstance(age := fields.get("age"), Real) or (isinstance(age, str) and age.strip().isdecimal()):
            years = check_number(float(age) if isinstance(age, str) else age, "user.age")
            if not 0 <= years <= 150:
                raise ValueError(f"user.age: expected years from 0 to 150, got {number_text(years)}")
            subject += wording["age"].format(age=self._ages(int(years)), pronoun=wording["pronouns"][known])
            del fields["age"]
        names, parts = self._fields(wording, fields, "user")
        return self._segment("user", ("subject", *names), (subject, *parts), wording["join"])

    def now(self, now: Any, since: float | None) -> Segment | None:
        """Format the moment; None if there is nothing to say.

        Args:
            now: A text, or fields; `timestamp` is left out of the text.
            since: Seconds since the last event, if known.
        """
        wording = self.template["now"]
        names: list[str] = []
        parts: list[str] = []
        if isinstance(now, str):
            names, parts = ["text"], [check_text(now, "now")]
        elif now is not None:
            check_size(now, "now")
            fields = _present(check_mapping(now, "now"), leave_out=("timestamp",))
            if "date" in fields:
                fields["date"] = self._month(fields["date"])
            names, parts = self._fields(wording, fields, "now")
        if since is not None:
            names, parts = [*names, "gap"], [*parts, wording["gap"].format(value=self.gap(since, "ago"))]
        return self._segment("now", tuple(names), tuple(parts), wording["join"]) if parts else None

    def _month(self, value: Any) -> Any:
        """Replace a date by its month, which indicates season and holidays; other texts stay unchanged."""
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                return value
        if not isinstance(value, date):
            return value
        check_moment(value, "now.date")  # refuses pandas' NaT, which is also a datetime
        return self.template["now"]["months"][value.month - 1]

    def item(self, item: Any, place: str) -> Segment:
        """Format an item by its own fields only, so that its segment is equal at every place of a request."""
        if type(item) is KnownItem:
            owner, segment = item.segment
            if owner is not self:
                segment = self._kept_item(item, place)
                item.segment = self, segment
            return segment
        return self._kept_item(item, place)

    def _kept_item(self, item: Any, place: str) -> Segment:
        key = _key(item, place)
        segment = None if key is None else self._items.find(key)
        if segment is None:
            segment = self._item(item, place)
            if key is not None:
                self._items.keep(key, segment)
        return segment

    def _item(self, item: Any, place: str) -> Segment:
        wording = self.template["item"]
        if isinstance(item, str):
            text = check_text(item, place)
            return self._segment("item", ("text",), (text,), wording["join"])
        fields = check_mapping(item, place)
        check_size(item, place)
        if fields.get("stats") is not None:
            raise ValueError(f"{place}.stats: statistics vary, so they may stand in a candidate only")
        names, parts = self._fields(wording, _present(fields, leave_out=("item_id", "stats")), place)
        if not parts:
            raise ValueError(f"{place}: the item has no text, give it a field such as `title`; an id says nothing")
        segment = self._segment("item", tuple(names), tuple(parts), wording["join"])
        return replace(segment, row=self.item_row(item, place))

    @staticmethod
    def has_text(item: Any) -> bool:
        """Whether an item is a text or has a field with a value, besides its id and statistics."""
        return not isinstance(item, Mapping) or bool(_present(item, leave_out=("item_id", "stats")))

    def item_row(self, item: Any, place: str = "item") -> int:
        """Return an item's row of item embeddings, 0 = none."""
        if isinstance(item, str) or check_mapping(item, place).get("item_id") is None:
            return 0
        return self.item_rows.get(normalize_id(item["item_id"], f"{place}.item_id"), 0)

    def event(self, event: Any, place: str) -> Event:
        """Format one event of the history, which is an item's text or a mapping."""
        if isinstance(event, str):
            return Event(self._verb(None, None, place), self.item(event, place), None, None)
        check_mapping(event, place, EVENT_KEYS)
        verb = self._verb(event.get("event"), event.get("rating"), place)
        item, moment = event.get("item"), event.get("timestamp")
        text = self._event_text(event, place)
        if item is None and text is None and ("item" in event or event.get("event") is None):
            raise ValueError(f"{place}.item: None; an event needs an item, a query or a text, or only a verb")
        return Event(
            verb,
            None if item is None else self.item(item, f"{place}.item"),
            text,
            None if moment is None else check_moment(moment, f"{place}.timestamp"),
        )

    def _event_text(self, event: Mapping[str, Any], place: str) -> Segment | None:
        given = [name for name in ("query", "text") if event.get(name) is not None]
        if len(given) == 2:
            raise ValueError(f"{place}: query and text are the same thing, give one of them")
        return Segment("text", check_text(event[given[0]], f"{place}.{given[0]}")) if given else None

    def _verb(self, verb: Any, rating: Any, place: str) -> Segment:
        if verb is not None and not isinstance(verb, str):
            raise wrong_type(verb, f"{place}.event", "a text")
        if type(rating) not in RATINGS and (isinstance(rating, bool) or not isinstance(rating, str | Real)):
            raise wrong_type(rating, f"{place}.rating", "a number or a text")
        key = (verb, rating, type(rating))
        segment = self._verbs.find(key)
        if segment is None:
            wording = self.template["events"]
            name = wording["default"] if verb is None else check_text(verb, f"{place}.event")
            text = wording["verbs"].get(name.lower().replace("_", " ").replace("-", " "), name)
            if rating is not None:
                value = value_text(rating, f"{place}.rating", self.words)
                text = wording["rated"].format(verb=text, rating=value)
            segment = Segment("event", text)
            self._verbs.keep(key, segment)
        return segment

    # Conversations

    def talk(self, parts: Mapping[str, Any], task: str) -> Talk:
        """Read the conversation of a request: its `messages` or, for the task conversation, its `text`."""
        given = {name: parts[name] for name in ("messages", "text") if parts.get(name) is not None}
        if task != "conversation":
            given.pop("text", None)
        elif len(given) == 2:
            raise ValueError("messages and text are the same thing for the task conversation, give one of them")
        if not given:
            return Talk(None, [])
        ((name, value),) = given.items()
        messages = [value] if name == "text" and isinstance(value, str) else check_list(value, name)
        tasks = self.template["tasks"]
        labels = [*tasks["speakers"].values(), *([tasks["instruction"]] if "instruction" in tasks else [])]
        found = read_talk(messages, labels, name)
        if found.instruction is not None:
            self._task_words("instruction")
        return found

    def with_turns(self, request: Mapping[str, Any], task: str) -> Mapping[str, Any]:
        """Return a request whose messages are the last events of its history, as all but conversations read them.

        The instruction is left out, since it says nothing about the user.
        """
        if task == "conversation" or request.get("messages") is None:
            return request
        speakers = self.template["tasks"]["speakers"]
        turns = self.talk(request, task).turns
        history = check_list(request.get("history"), "history", MAX_EVENTS)
        history += [{"event": speakers[turn.role], "text": turn.content} for turn in turns]
        return {**{name: value for name, value in request.items() if name != "messages"}, "history": history}

    # Words before a written text

    def lead(self, task: str, parts: Mapping[str, Any]) -> str:
        """Return the words that precede the text of a writing task.

        Args:
            task: The task.
            parts: The request: an explanation's words depend on `mention`, those of `content` on the blank field.

        Raises:
            ValueError: If the template lacks words for the task, or the request does not say what to write.
        """
        tasks = self.template["tasks"]
        if task == "conversation":
            return str(tasks["speakers"]["system"])
        if task == "explanation" and parts.get("mention") is not None:
            return self._mentioning(parts)
        words = self._task_words(task)
        if task != "content":
            return str(words)
        name = self.blank_field(parts)
        return (
            words[name] if name in words and name != "other" else words["other"].format(name=_spoken(name, "content"))
        )

    def written(self, text: str) -> str:
        """Return a written text as it follows its lead: it is encoded together with the template's `join`."""
        return f"{self.template['tasks']['join']}{text}"

    def _task_words(self, name: str) -> Any:
        words = self.template["tasks"].get(name)
        if words is None:
            raise ValueError(
                f"template.tasks.{name}: this processor's template has no such words, since an older version wrote it: "
                "add them (load_template has them), and train the model on them"
            )
        return words

    def _mentioning(self, parts: Mapping[str, Any]) -> str:
        """Return an explanation's lead with the features of the item, or the events of the user, to be mentioned."""
        given = _present(check_mapping(parts["mention"], "mention", MENTIONS))
        if len(given) != 1:
            raise ValueError("mention: give either features (texts) or events (their places in the history)")
        ((name, values),) = given.items()
        values = check_list(values, f"mention.{name}")
        if name == "features":
            texts = [check_text(value, f"mention.features[{place}]") for place, value in enumerate(values)]
        else:
            history = check_list(parts.get("history"), "history", MAX_EVENTS)
            texts = [self._event_words(history, value, f"mention.events[{i}]") for i, value in enumerate(values)]
        return str(self._task_words(f"explanation_{name}").format(**{name: self.words["list"].join(texts)}))

    def _event_words(self, history: list[Any], number: Any, place: str) -> str:
        """Return the verb of an event, and the name of its item or its text."""
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise wrong_type(number, place, "the place of an event in the history")
        own = int(number)
        if not -len(history) <= own < len(history):
            raise ValueError(f"{place}: the history has {len(history)} events, none at place {own}")
        event = self.event(history[own], f"history[{own}]")
        said = [
            event.verb.text,
            *([event.item.parts[0]] if event.item else []),
            *([event.text.text] if event.text else []),
        ]
        return str(self.template["tasks"]["join"].join(said))

    @staticmethod
    def blank_field(parts: Mapping[str, Any]) -> str:
        """Return the first field of the candidate that is given as None."""
        candidates = check_list(parts.get("candidates"), "candidates", MAX_CANDIDATES)
        fields = candidates[0] if len(candidates) == 1 and isinstance(candidates[0], Mapping) else {}
        for name, value in fields.items():
            if value is None and name not in ("item_id", "stats"):
                return check_text(name, "candidates[0]: the name of a field")
        raise ValueError(
            "candidates: task 'content' writes one field of one item, which is given as None: pass one mapping with "
            "such a field, as in dict(category='boots', title=None)"
        )

    def gap(self, seconds: float, table: str = "gaps") -> str:
        """Format a time interval with the table `gaps` (since the previous event) or `ago` (before now)."""
        return self._gaps[table](seconds)

    def age(self, seconds: float, table: str = "gaps") -> Segment:
        """Return the segment of a time interval, as `gap` formats it; a table has few words, so each is made once."""
        words = self._gaps[table](seconds)
        segment = self._times.get(words)
        if segment is None:
            segment = self._times[words] = Segment("age", words)
        return segment

    def stats(self, stats: Any, place: str) -> list[Segment]:
        """Format statistics: a text, a mapping of statistics by name, or a list of these."""
        if stats is None:
            return []
        check_size(stats, place)
        if isinstance(stats, list | tuple):
            return [each for index, stat in enumerate(stats) for each in self._stat(stat, f"{place}[{index}]")]
        return self._stat(stats, place)

    def _stat(self, stat: Any, place: str) -> list[Segment]:
        if isinstance(stat, str):
            return [Segment("stat", check_text(stat, place))]
        entries = _present(check_mapping(stat, place)).items()
        return [Segment("stat", self._stat_text(name, value, f"{place}.{name}")) for name, value in entries]

    def _stat_text(self, name: str, value: Any, place: str) -> str:
        wording = self.template["stats"]
        pattern = wording["names"].get(name)
        if pattern is None and isinstance(value, Mapping):
            known = ", ".join(wording["names"])
            raise ValueError(f"{place}: the template has no words for this statistic; it has for {known}")
        if pattern is None:
            return wording["other"].format(name=_spoken(name, place), value=value_text(value, place, self.words))
        wanted = _placeholders(pattern)
        given = check_mapping(value, place) if isinstance(value, Mapping) else dict.fromkeys(wanted[:1], value)
        if set(given) != set(wanted):
            raise ValueError(f"{place}: expected the values {', '.join(wanted)}, got {', '.join(given)}")
        return pattern.format(**{key: self._stat_value(key, each, f"{place}.{key}") for key, each in given.items()})

    def _stat_value(self, name: str, value: Any, place: str) -> str:
        table = self._tables.get(name)
        return table(check_number(value, place)) if table else value_text(value, place, self.words)

    def _fields(self, wording: Mapping[str, Any], fields: Mapping[str, Any], place: str) -> tuple[list[str], list[str]]:
        """Format fields: first the template's fields in its order, then all other fields, sorted, as `name: value`."""
        known = dict(wording["fields"])
        names = [name for name in known if name in fields]
        others = sorted(fields.keys() - known.keys())
        parts = [known[name].format(value=value_text(fields[name], f"{place}.{name}", self.words)) for name in names]
        for name in others:
            value = value_text(fields[name], f"{place}.{name}", self.words)
            parts.append(wording["other"].format(name=_spoken(name, place), value=value))
        return names + others, parts

    @staticmethod
    def _segment(kind: str, names: tuple[str, ...], parts: tuple[str, ...], join: str) -> Segment:
        return Segment(kind, join.join(parts), names, parts, join)


class _Table:
    """Maps a number to words: the first entry whose limit is at least the number."""

    def __init__(self, entries: list[list[Any]]) -> None:
        self.limits = [limit for limit, _ in entries[:-1]]
        self.words = [words for _, words in entries]

    def __call__(self, number: float) -> str:
        return self.words[bisect_left(self.limits, number)]


def _key(item: Any, place: str) -> Any:
    """Return a cache key that is equal only for items with equal text; None if there is no such key.

    The key contains types, since True == 1 == 1.0, and the text of times, since equal times of different zones have
    different texts.
    """
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise wrong_type(item, place, "a text or a mapping of fields")
    key: list[Any] = [tuple(item)]
    for value in item.values():
        if type(value) not in SIMPLE and isinstance(value, np.generic):
            value = value.tolist()
        key += (type(value), value)
        if type(value) in SIMPLE:
            continue
        if isinstance(value, date):
            key[-1] = value.isoformat()
        elif type(value) in (list, tuple) and all(type(each) in SIMPLE for each in value):
            key[-1] = (*value, *map(type, value))
        else:
            return None
    return tuple(key)


def _present(fields: Mapping[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Copy the fields that have a value; empty cells of tables are None, "" or []."""
    return {name: value for name, value in fields.items() if not _is_empty(value) and name not in leave_out}


def _is_empty(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) and not value.strip() or isinstance(value, list | tuple) and not value
    )


def _spoken(name: str, place: str) -> str:
    return check_text(name, f"{place}: the name of a field").replace("_", " ")


def _placeholders(pattern: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]


Check = Callable[[Any, str], None]


def _text(value: Any, place: str) -> None:
    check_text(value, place)


def _any_text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        raise wrong_type(value, place, "a text")


def _each(check: Check) -> Check:
    """Check every value of a mapping with arbitrary keys."""

    def run(value: Any, place: str) -> None:
        for name, entry in check_mapping(value, place).items():
            check(entry, f"{place}.{name}")

    return run


def _pattern(*needed: str, optional: tuple[str, ...] = ()) -> Check:
    """Check a pattern: it contains each needed {placeholder}, only optional ones besides, and no format specs."""

    def run(value: Any, place: str) -> None:
        _text(value, place)
        try:
            found = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{place}: {value!r} is no pattern: {error}") from error
        names = {name for _, name, _, _ in found if name is not None}
        bare = not any(spec or conversion for _, _, spec, conversion in found)
        if not bare or not set(needed) <= names <= {*needed, *optional}:
            wanted = " ".join(f"{{{name}}}" for name in (*needed, *optional))
            raise ValueError(f"{place}: {value!r} must hold the placeholders {wanted} and nothing else in braces")

    return run


def _stat_pattern(value: Any, place: str) -> None:
    _text(value, place)
    names = _placeholders(value)
    if not names or not all(name.isidentifier() for name in names):
        raise ValueError(f"{place}: {value!r} must hold a placeholder, such as {{times}}, and only plain names")
    _pattern(*names)(value, place)


def _table(value: Any, place: str) -> None:
    """Check a table: [limit, words] entries with ascending limits, the last limit null."""
    _pairs(value, place, "[limit, words]")
    if not value:
        raise ValueError(f"{place}: the table is empty")
    for _, words in value:
        _text(words, place)
    limits = [check_number(limit, place) for limit, _ in value[:-1]]
    if limits != sorted(set(limits)) or value[-1][0] is not None:
        raise ValueError(f"{place}: limits must rise and end with null, got {[limit for limit, _ in value]}")


def _fields(value: Any, place: str) -> None:
    """Check [name, pattern] entries; they are a list, since saving a mapping sorts its keys."""
    pairs = _pairs(value, place, "[name, pattern]")
    for name, pattern in pairs:
        _text(name, place)
        _pattern("value")(pattern, f"{place}.{name}")
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: a field is named twice among {', '.join(names)}")


def _pairs(value: Any, place: str, expected: str) -> list[list[Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in value):
        raise ValueError(f"{place}: expected a list of {expected}, got {short(value)}")
    return value


def _months(value: Any, place: str) -> None:
    if not isinstance(value, list) or len(value) != 12:
        raise ValueError(f"{place}: expected twelve names, got {short(value)}")
    for name in value:
        _text(name, place)


def _content_leads(value: Any, place: str) -> None:
    """Check the words before a field's text, by field; `other` holds the {name} of any other field."""
    leads = check_mapping(value, place)
    _pattern("name")(leads.get("other"), f"{place}.other")
    for name, words in leads.items():
        if name != "other":
            _text(words, f"{place}.{name}")


_FIELDS = {"fields": _fields, "other": _pattern("name", "value"), "join": _any_text}

_BY_GENDER = {"unknown": _any_text, "male": _any_text, "female": _any_text}

SCHEMA: dict[str, Any] = {
    "domain": _text,
    "language": _text,
    "words": {"true": _text, "false": _text, "list": _any_text},
    "user": {
        **_FIELDS,
        "genders": _each(_text),
        "subjects": _BY_GENDER,
        "pronouns": _BY_GENDER,
        "age": _pattern("age", optional=("pronoun",)),
        "ages": _table,
    },
    "now": {**_FIELDS, "months": _months, "gap": _pattern("value")},
    "gaps": _table,
    "ago": _table,
    "events": {"default": _text, "verbs": _each(_text), "rated": _pattern("verb", "rating")},
    "item": _FIELDS,
    "stats": {"names": _each(_stat_pattern), "other": _pattern("name", "value"), "tables": _each(_table)},
    "tasks": {
        "plausibility": _pattern("item"),
        "explanation": _text,
        "query": _text,
        "item_text": _text,
        "speakers": {"user": _text, "system": _text},
        "join": _any_text,
        # Absent from templates that version 0.1 saved:
        "explanation_features": _pattern("features"),
        "explanation_events": _pattern("events"),
        "content": _content_leads,
        "next_item": _text,
        "instruction": _text,
        "recommend": _pattern("item"),
    },
}
"""Schema of templates: a mapping must have exactly these keys; a check applies to any other value."""

OPTIONAL = frozenset({"explanation_features", "explanation_events", "content", "next_item", "instruction", "recommend"})
"""Keys that older templates lack."""


def check_template(template: Any, schema: Mapping[str, Any] = SCHEMA, place: str = "template") -> None:
    """Check a template.

    Raises:
        ValueError: If a key is unknown or missing, or a value is invalid.
        TypeError: If a value has the wrong type.
    """
    given = check_mapping(template, place)
    for key in given.keys() - schema.keys():
        raise ValueError(f"{place}: unknown key {key!r}; known keys: {', '.join(schema)}")
    for key in schema.keys() - given.keys() - OPTIONAL:
        raise ValueError(f"{place}: missing key {key!r}")
    for key, expected in schema.items():
        if key not in given:
            continue
        if isinstance(expected, Mapping):
            check_template(given[key], expected, f"{place}.{key}")
        else:
            expected(given[key], f"{place}.{key}")
    if place == "template":
        wrong = {*given["user"]["genders"].values()} - {"male", "female"}
        if wrong:
            raise ValueError(f"template.user.genders: {sorted(wrong)} are neither male nor female")


# ----------------------------------------------------------------------------------------------------- names of items


class ItemNames:
    """Compares items by their text.

    Two items are the same if their names (the first field of their text) are equal and no common field differs. A text
    is the same as an item with this name or this full text.

    Args:
        wording: Formatter of the items.
    """

    def __init__(self, wording: RequestFormatter) -> None:
        self._wording = wording

    def item_texts(self, items: Iterable[Any]) -> list[str]:
        """Return the name of each item, by which a catalogue finds it."""
        return [self._worded(item).parts[0] for item in items]

    def candidates(self, item: Any) -> list[str]:
        """Return the possible names of items that are the same as this one."""
        segment = self._worded(item)
        if not isinstance(item, str) or not segment.join:
            return [segment.parts[0]]
        pieces = segment.text.split(segment.join)
        return [segment.join.join(pieces[:count]) for count in range(1, len(pieces) + 1)]

    def same(self, one: Any, other: Any) -> bool:
        """Whether two items are the same."""
        first, second = self._worded(one), self._worded(other)
        if isinstance(one, str) or isinstance(other, str):
            return bool({first.text, first.parts[0]} & {second.text, second.parts[0]})
        fields, others = (dict(zip(segment.names, segment.parts)) for segment in (first, second))
        equal = all(fields[name] == others[name] for name in fields.keys() & others.keys())
        return equal and first.parts[0] == second.parts[0]

    def _worded(self, item: Any) -> Segment:
        return self._wording.item(item, "item")


__all__ = [
    "EVENT_KEYS",
    "OPTIONAL",
    "OTHER_TASKS",
    "REQUEST_KEYS",
    "SCHEMA",
    "TASKS",
    "WRITING_TASKS",
    "Event",
    "ItemNames",
    "LRUCache",
    "RequestFormatter",
    "Segment",
    "Talk",
    "Turn",
    "chat_template",
    "check_list",
    "check_mapping",
    "check_moment",
    "check_number",
    "check_read",
    "check_template",
    "check_text",
    "number_text",
    "read_talk",
    "value_text",
    "wrong_type",
]
