"""The turns of a conversation: who says what, and nobody in another's name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .limits_m6rec import check_size
from .request_m6rec import check_mapping, check_text
from .values_m6rec import short

TURN_KEYS = frozenset({"role", "content"})
PART_KEYS = frozenset({"type", "text"})
ASSISTANT = "assistant"


def read_turns(turns: Sequence[Any], speakers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Read turns as (role, content), where a role is "user" or "system", which is the recommender.

    A turn is a text, and then speakers alternate and the user begins, or a mapping as of chat messages. The recommender
    is called "assistant". "system" is the recommender, too, unless it opens the conversation or there are assistants:
    then it is an instruction to a chat model, which nothing reads. Where a content holds the label of a speaker, it is
    put between quotation marks, so that nobody's words open a turn of another.

    Args:
        turns: The turns, oldest first.
        speakers: The template's labels of speakers, by role.

    Raises:
        ValueError: A role or a content cannot be used, named by its place.
        TypeError: One has the wrong type.
    """
    chat = any(isinstance(turn, Mapping) and turn.get("role") == ASSISTANT for turn in turns)
    labels = re.compile("|".join(rf"(?<!\w){re.escape(label)}" for label in speakers.values()))
    found = []
    for place, turn in enumerate(turns):
        role, content = _turn(turn, place, chat)
        found.append((role, labels.sub(lambda label: f'"{label[0]}"', content)))
    return found


def _turn(turn: Any, number: int, chat: bool) -> tuple[str, str]:
    place = f"text[{number}]"
    if isinstance(turn, str):
        return ("user", "system")[number % 2], check_text(turn, place)
    fields = check_mapping(turn, place, TURN_KEYS)
    role = fields.get("role")
    if role not in ("user", "system", ASSISTANT):
        raise ValueError(f"{place}.role: expected user or assistant, got {short(role)}")
    if role == "system" and (chat or number == 0):
        raise ValueError(
            f"{place}.role: 'system' is here an instruction to a chat model, which is not read: leave it out, and give "
            "what is known of the user as `facts`; turns of the recommender have the role 'assistant'"
        )
    return "user" if role == "user" else "system", _content(fields.get("content"), f"{place}.content")


def _content(content: Any, place: str) -> str:
    """Read a text, or a list of parts, each a text or {"type": "text", "text": ...}."""
    if not isinstance(content, list | tuple) or not content:
        return check_text(content, place)
    check_size(content, place)
    parts = [_part(part, f"{place}[{number}]") for number, part in enumerate(content)]
    return check_text(" ".join(parts), place)


def _part(part: Any, place: str) -> str:
    if isinstance(part, Mapping):
        if part.get("type", "text") != "text":
            raise ValueError(f"{place}: a conversation holds texts only, got a part of type {short(part['type'])}")
        part = check_mapping(part, place, PART_KEYS).get("text")
    return check_text(part, place)


__all__ = ["read_turns"]
