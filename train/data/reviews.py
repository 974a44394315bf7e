"""Reviews to learn explanations from: of clothes (no user ids), and of gift cards."""

import gzip
import html
import json
import re
from pathlib import Path

import numpy
import pandas

from .tables import require_files

CLOTHES = "WomensClothingE-CommerceReviews.parquet.brotli"
CARDS = ("Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz")
WORDS = 30
"""Number of words that the sentences taken from a review may have, after the first sentence."""
FACTS = 2
SHARES = (("test", 0.1), ("valid", 0.1))
"""Shares of the articles, or of the users, that each part holds; the rest is the training part."""


def clothing_tables(directory: Path, seed: int) -> tuple[pandas.DataFrame, pandas.DataFrame, pandas.DataFrame]:
    """Reads the reviews of 4 and 5 stars as events of users who have one event each.

    A user is described by their age and by two sentences from other reviews of the article, as facts. Parts are drawn
    by article, since these sentences would otherwise show texts of a part in another one. Repeated texts are left out.

    Args:
        directory: The folder of the file.
        seed: Seed of the parts and of the sentences.

    Returns:
        The interactions (user_id, item_id, rating, event, text, part), the items (item_id, category, department) and
        the users (user_id, age, facts).
    """
    require_files(directory, [CLOTHES], "clothing-reviews")
    table = pandas.read_parquet(directory / CLOTHES)
    table = pandas.DataFrame(
        {
            "item_id": table["Clothing ID"].astype(str),
            "age": table["Age"].astype(str),
            "rating": table["Rating"],
            "category": table["Class Name"].fillna("").str.lower(),
            "department": table["Department Name"].fillna("").str.lower(),
            "words": table["Review Text"].fillna("").str.strip(),
        }
    )
    table = table[(table["words"] != "") & (table["category"] != "")].drop_duplicates("words").reset_index(drop=True)
    table["user_id"] = "review:" + table.index.astype(str)
    table["text"] = table["words"].map(first_sentences)
    rng = numpy.random.default_rng(seed)
    kept = table[(table["rating"] >= 4) & (table.groupby("item_id")["item_id"].transform("size") > FACTS)].copy()
    kept["facts"] = _facts(table, kept, rng)
    kept["part"] = _parts(kept["item_id"], rng)
    items = kept.drop_duplicates("item_id")[["item_id", "category", "department"]]
    events = kept[["user_id", "item_id", "rating", "text", "part"]].assign(event="review")
    return events, items, kept[["user_id", "age", "facts"]]


def _facts(table: pandas.DataFrame, kept: pandas.DataFrame, rng: numpy.random.Generator) -> list[str]:
    """Draw the first sentences of other reviews of each review's article, one a line."""
    places = table.groupby("item_id").indices
    sentences = [re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)[0] for text in table["words"]]
    found = []
    for place, item in zip(kept.index, kept["item_id"]):
        others = places[item][places[item] != place]
        found.append("\n".join(sentences[other] for other in rng.choice(others, FACTS, replace=False)))
    return found


def gift_card_tables(directory: Path, seed: int) -> tuple[pandas.DataFrame, pandas.DataFrame, None]:
    """Reads the reviews of gift cards as events, with parts drawn by user.

    Many users paste one text for several cards, at the same second or later, so that a text would often stand in its
    own history: one review per user and second is kept, and none whose text the user has written before.

    Args:
        directory: The folder of the two files.
        seed: Seed of the parts.

    Returns:
        The interactions (user_id, item_id, timestamp, rating, event, text, part), the items (item_id, title, brand,
        description), and None for users.
    """
    require_files(directory, CARDS, "gift-cards")
    rows = _json_lines(directory / CARDS[0])
    columns = {"reviewerID": "user_id", "asin": "item_id", "unixReviewTime": "timestamp", "overall": "rating"}
    table = pandas.DataFrame(rows).rename(columns=columns)
    table["text"] = table["reviewText"].fillna("").map(lambda text: first_sentences(html.unescape(text)))
    table = table[table["text"] != ""].sort_values(["user_id", "timestamp"], kind="stable")
    table = table.drop_duplicates(["user_id", "timestamp"])
    table = table[~table.assign(key=table["text"].map(_plain)).duplicated(["user_id", "key"])]
    table["part"] = _parts(table["user_id"], numpy.random.default_rng(seed))
    events = table[["user_id", "item_id", "timestamp", "rating", "text", "part"]].assign(event="review")
    return events, _cards(directory, set(events["item_id"])), None


def _json_lines(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _cards(directory: Path, used: set[str]) -> pandas.DataFrame:
    found: dict[str, dict[str, str]] = {}
    for card in _json_lines(directory / CARDS[1]):
        if card["asin"] in used:
            text = first_sentences(html.unescape(" ".join(card.get("description") or [])))
            texts = {"title": html.unescape(card.get("title") or ""), "brand": card.get("brand") or "", "text": text}
            found[card["asin"]] = {"item_id": card["asin"], **texts}
    for item_id in sorted(used - found.keys()):
        found[item_id] = {"item_id": item_id, "title": "gift card", "brand": "", "text": ""}
    return pandas.DataFrame(list(found.values())).rename(columns={"text": "description"})


def first_sentences(text: str) -> str:
    """Return the first sentences of a text, up to WORDS words but at least one sentence.

    >>> first_sentences("Soft.  Fits well! " + "very " * 30 + "long.")
    'Soft. Fits well!'
    """
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        if found and len(" ".join([*found, sentence]).split()) > WORDS:
            break
        found.append(sentence)
    return " ".join(found)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _parts(groups: pandas.Series, rng: numpy.random.Generator) -> list[str]:
    """Draw a part for each group of rows."""
    names = sorted(groups.unique())
    order, start, part = rng.permutation(len(names)), 0, dict.fromkeys(names, "train")
    for name, share in SHARES:
        count = max(1, round(share * len(names)))
        part |= {names[place]: name for place in order[start : start + count]}
        start += count
    return [part[group] for group in groups]


__all__ = ["clothing_tables", "first_sentences", "gift_card_tables"]
