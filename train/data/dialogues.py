"""Dialogues in which one speaker recommends films to another: IARD (a part of ReDial), and INSPIRED.

The films are those of MovieLens-25M with their keywords; a dialogue's titles are linked to them by title and year.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import pandas

from .movielens import readable_title
from .tables import require_files

FILMS = "movielens-25m-sample/movies_w_keywords.csv"
IARD = ("iard/formatted_IARD_annotated_gold.json", "iard/formatted_IARD_annotated_partially.json")
INSPIRED = {"dev.tsv": "train", "test.tsv": "test"}
TITLE = re.compile(r"(.+) \((\d{4})\)\s*$")
LONGEST = 12
"""Number of words of a title."""
HELD_OUT = 0.1
"""Share of the dialogues in the validation part, and in the test part where the files do not name it."""

Frames = tuple[pandas.DataFrame, pandas.DataFrame, None]


class Said(NamedTuple):
    """One utterance, the ids of the films that it names, and whether they are recommended."""

    speaker: str
    text: str
    films: list[str]


def films_of(directory: Path) -> pandas.DataFrame:
    """Read the films: item_id, title, year, genres, keywords."""
    require_files(directory, [FILMS], "movie-dialogues")
    table = pandas.read_csv(directory / FILMS, dtype=str, keep_default_na=False)
    named = table["title"].str.extract(TITLE)
    return pandas.DataFrame(
        {
            "item_id": table["movieId"],
            "title": named[0].fillna(table["title"]).map(readable_title),
            "year": named[1].fillna(""),
            "genres": table["genres"].replace("(no genres listed)", "").str.replace("|", ", "),
            "keywords": table["keywords"].str.replace("|", ", "),
        }
    )


class Links:
    """Finds the film with a title and a year."""

    def __init__(self, films: pandas.DataFrame) -> None:
        keys = zip(films["title"].str.lower(), films["year"])
        self._ids = dict(zip(keys, films["item_id"]))

    def __call__(self, title: str) -> str | None:
        """Return the id of a film that is given as "Title (Year)"; None if there is none."""
        found = TITLE.match(title.strip())
        return None if found is None else self._ids.get((readable_title(found[1]).lower(), found[2]))

    def within(self, text: str) -> Iterator[str]:
        """Yield the ids of the films that a text names as "Title (Year)": the longest title before each year."""
        start = 0
        for year in re.finditer(r"\((\d{4})\)", text):
            words = text[start : year.start()].split()
            start = year.end()
            titles = (" ".join(words[place:]) for place in range(max(0, len(words) - LONGEST), len(words)))
            found = (self._ids.get((readable_title(title).lower(), year[1])) for title in titles)
            if (film := next((film for film in found if film is not None), None)) is not None:
                yield film


def iard_tables(directory: Path, seed: int) -> Frames:
    """Read the films that the dialogues of IARD name, as events: (user_id = dialogue, item_id, event, part)."""
    films = films_of(directory)
    return _events(_iard(directory, films), _drawn_parts(_iard_ids(directory), seed)), films, None


def iard_dialogues(directory: Path, seed: int) -> pandas.DataFrame:
    """Read the utterances of IARD: dialogue_id, speaker, text, item_id (the film that it recommends), part."""
    return _turns(_iard(directory, films_of(directory)), _drawn_parts(_iard_ids(directory), seed))


def inspired_tables(directory: Path, seed: int) -> Frames:
    """Read the films that the dialogues of INSPIRED name, as `iard_tables`; the films are those next to its folder."""
    films = films_of(directory.parent / "movie-dialogues")
    return _events(_inspired(directory, films), _inspired_parts(directory, seed)), films, None


def inspired_dialogues(directory: Path, seed: int) -> pandas.DataFrame:
    """Read the utterances of INSPIRED, as `iard_dialogues`. The validation part is drawn from dev.tsv."""
    films = films_of(directory.parent / "movie-dialogues")
    return _turns(_inspired(directory, films), _inspired_parts(directory, seed))


def _iard(directory: Path, films: pandas.DataFrame) -> Iterator[tuple[str, list[Said]]]:
    link = Links(films)
    for dialogue, turns in _iard_files(directory).items():
        said = []
        for turn in turns:
            text = turn["utterance"].strip()
            speaker = "recommender" if turn["participant"] == "AGENT" else "user"
            said.append(Said(speaker, text, list(link.within(text))))
        yield dialogue, said


def _iard_files(directory: Path) -> dict[str, list[dict]]:
    require_files(directory, IARD, "movie-dialogues")
    found: dict[str, list[dict]] = {}
    for name in IARD:
        for each in json.loads((directory / name).read_text(encoding="utf-8")):
            found.setdefault(f"iard:{each['conversation_id']}", each["conversation"])
    return found


def _iard_ids(directory: Path) -> list[str]:
    return list(_iard_files(directory))


def _inspired(directory: Path, films: pandas.DataFrame) -> Iterator[tuple[str, list[Said]]]:
    link = Links(films)
    for _, table in _inspired_files(directory):
        for dialogue, turns in table.groupby("dialog_id", sort=False):
            said = []
            for speaker, text, movies in zip(turns["speaker"], turns["text"], turns["movies"]):
                ids = [film for title in movies.split(";") if (film := link(title)) is not None]
                words = text.replace("QUOTATION_MARK", '"').strip()
                said.append(Said(speaker.strip().lower(), words, ids))
            yield str(dialogue), said


def _inspired_files(directory: Path) -> Iterator[tuple[str, pandas.DataFrame]]:
    require_files(directory, INSPIRED, "inspired")
    for name, part in INSPIRED.items():
        yield (
            part,
            pandas.read_csv(directory / name, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE),
        )


def _inspired_parts(directory: Path, seed: int) -> dict[str, str]:
    parts: dict[str, str] = {}
    for part, table in _inspired_files(directory):
        ids = list(table["dialog_id"].unique())
        parts |= dict.fromkeys(ids, part) if part == "test" else _drawn_parts(ids, seed, ("valid",))
    return parts


def _drawn_parts(ids: list[str], seed: int, held_out: tuple[str, ...] = ("valid", "test")) -> dict[str, str]:
    """Draw the dialogues of the held-out parts; the others are of the training part."""
    order, count = numpy.random.default_rng(seed).permutation(len(ids)), max(1, round(HELD_OUT * len(ids)))
    parts = dict.fromkeys(ids, "train")
    for number, part in enumerate(held_out):
        parts |= {ids[place]: part for place in order[number * count : (number + 1) * count]}
    return parts


def _events(dialogues: Iterator[tuple[str, list[Said]]], parts: dict[str, str]) -> pandas.DataFrame:
    """Make an event of the first naming of each film in a dialogue."""
    rows = []
    for dialogue, said in dialogues:
        named: set[str] = set()
        for turn in said:
            for film in turn.films:
                if film not in named:
                    event = "recommend" if turn.speaker == "recommender" else "mention"
                    rows.append((dialogue, film, event, parts[dialogue]))
                named.add(film)
    return pandas.DataFrame(rows, columns=["user_id", "item_id", "event", "part"])


def _turns(dialogues: Iterator[tuple[str, list[Said]]], parts: dict[str, str]) -> pandas.DataFrame:
    """Make the utterances; each has the first film that the recommender names and nobody has named before."""
    rows = []
    for dialogue, said in dialogues:
        named: set[str] = set()
        for turn in said:
            new = [film for film in turn.films if film not in named and turn.speaker == "recommender"]
            speaker = "user" if turn.speaker in ("user", "seeker") else "assistant"
            rows.append((dialogue, speaker, turn.text, new[0] if new else "", parts[dialogue]))
            named.update(turn.films)
    return pandas.DataFrame(rows, columns=["dialogue_id", "speaker", "text", "item_id", "part"])


__all__ = ["films_of", "iard_dialogues", "iard_tables", "inspired_dialogues", "inspired_tables"]
