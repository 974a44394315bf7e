"""INSPIRED's recommendations as requests, linked to the films of movie-dialogues."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas

CONTEXT = 8
"""Turns before a recommendation that are read."""


class Turn(NamedTuple):
    """A turn that recommends linked films which were not named before."""

    messages: list[dict[str, str]]
    wanted: list[str]
    named: set[str]
    """Films that were named before."""
    dialogue: str


def films(folder: Path) -> pandas.DataFrame:
    """The 13,816 films: item_id, title, genres, keywords."""
    table = pandas.read_csv(folder / "movie-dialogues/movielens-25m-sample/movies_w_keywords.csv", dtype=str)
    table = table.rename(columns={"movieId": "item_id"}).fillna("")
    for name in ("genres", "keywords"):
        table[name] = table[name].str.replace("|", ", ")
    return table.drop_duplicates("item_id")


def key(title: str) -> tuple[str, str]:
    """A title's words, with a moved article put back, and its year; empty without one.

    >>> key("Terminator, The (1984)"), key("the terminator")
    (('the terminator', '1984'), ('the terminator', ''))
    """
    match = re.match(r"(.*?)\s*\((\d{4})\)\s*$", title)
    name, year = (match[1], match[2]) if match else (title, "")
    name = re.sub(r"^(.*), (The|A|An)$", r"\2 \1", name)
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9 ]", "", name.lower())).strip(), year


def turns(folder: Path, part: str, table: pandas.DataFrame) -> tuple[list[Turn], list[dict[str, Any]]]:
    """The recommending turns of a part, "dev" or "test", and its mentions of films as events, a dialogue a user."""
    ids: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item_id, title in zip(table["item_id"], table["title"]):
        name, year = key(title)
        ids[name, year].append(item_id)
        ids[name, ""].append(item_id)
    found: list[Turn] = []
    events: list[dict[str, Any]] = []
    frame = pandas.read_csv(folder / "inspired" / f"{part}.tsv", sep="\t", keep_default_na=False)
    for name, dialogue in frame.groupby("dialog_id", sort=False):
        messages: list[dict[str, str]] = []
        named: set[str] = set()
        for row in dialogue.itertuples():
            titles = [title.strip() for title in str(row.movies).split(";") if title.strip()]
            linked = [ids[key(title)][0] for title in titles if ids.get(key(title))]
            events += [{"user_id": name, "item_id": own, "timestamp": len(messages)} for own in linked]
            new = [item_id for item_id in dict.fromkeys(linked) if item_id not in named]
            if row.speaker == "RECOMMENDER" and messages and new:
                found.append(Turn(messages[-CONTEXT:], new, set(named), name))
            named |= {*linked}
            role = "assistant" if row.speaker == "RECOMMENDER" else "user"
            messages = [*messages, {"role": role, "content": str(row.text)}]
    return found, events


def recalls(lists: list[list[str]], asked: list[Turn], ks: tuple[int, ...] = (1, 10, 50)) -> dict[str, Any]:
    """The share of turns of which a film is among the first k; films that were named before are left out."""
    report: dict[str, Any] = {}
    kept = [[item for item in items if item not in turn.named] for items, turn in zip(lists, asked)]
    for k in ks:
        hits = [bool({*items[:k]} & {*turn.wanted}) for items, turn in zip(kept, asked)]
        report[f"recall@{k}"] = sum(hits) / len(hits)
    return report


__all__ = ["Turn", "films", "key", "recalls", "turns"]
