"""Clothing reviews as explanations: facts are sentences of other reviews of the article, test articles are new."""

import random
import re
from pathlib import Path
from typing import Any

import pandas

from m6rec.train.rows.writing import WritingExample

FACT_WORDS, TEXT_WORDS = 22, 30
TEST_ARTICLES = 60
FEATURES = (  # noqa: SIM905  a list of 40 words is easier to read as one text
    "fabric color colors fit fits size sizing soft comfortable flattering length sleeves sleeve waist material quality "
    "style pattern print warm light price sale shoulders hem neckline pockets lining lined shape cut small large "
    "petite boxy thin thick cute beautiful summer work jeans"
).split()


def first_words(text: str, count: int) -> str:
    """The first words of a text, up to the end of a sentence if one ends there."""
    found = " ".join(text.split()[:count])
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", found)]
    return found[: ends[-1]] if ends and ends[-1] > 40 else found


def clothing(folder: Path, seed: int = 0) -> tuple[list[WritingExample], list[WritingExample]]:
    """Training and test examples: age, two facts, category and department; the text is a review with 4 or 5 stars."""
    path = folder / "clothing-reviews" / "WomensClothingE-CommerceReviews.parquet.brotli"
    frame = pandas.read_parquet(path)
    frame.columns = [str(name).strip() for name in frame.columns]
    frame["text"] = frame["Review Text"].fillna("").str.replace(r"\s+", " ", regex=True).str.strip()
    frame = frame[frame["text"].str.len() > 40]
    rng = random.Random(seed)
    groups = frame.groupby("Clothing ID")
    articles = [article for article, rows in groups if len(rows) >= 6]
    rng.shuffle(articles)
    tested = set(articles[:TEST_ARTICLES])
    parts: dict[bool, list[WritingExample]] = {False: [], True: []}
    for article in articles:
        rows = groups.get_group(article)
        places = list(rows.index)
        rng.shuffle(places)
        half, rest = places[: len(places) // 2], places[len(places) // 2 :]
        for place in rest[: 2 if article in tested else 3]:
            row = rows.loc[place]
            if row["Rating"] >= 4:
                facts = [first_words(rows.loc[own, "text"], FACT_WORDS) for own in rng.sample(half, 2)]
                item = {"item_id": str(article), "category": row["Class Name"], "department": row["Department Name"]}
                request: dict[str, Any] = {"user": {"age": int(row["Age"])}, "facts": facts, "candidates": [item]}
                text = first_words(row["text"], TEXT_WORDS)
                parts[article in tested].append(WritingExample("explanation", request, text, str(place)))
    for examples in parts.values():
        rng.shuffle(examples)
    return parts[False], parts[True]


__all__ = ["FEATURES", "clothing"]
