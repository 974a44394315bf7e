"""Amazon Beauty, 5-core of 2014, as P5 split it: who bought what, in which order. No times are left in it."""

import csv
import html
import json
from pathlib import Path
from typing import Any

import pandas

from .tables import require_files

FILES = ("sequential.txt", "datamaps.json", "item_id_to_int.json", "products_lookup.csv")
UNTITLED = "untitled product"
"""Text of the seven products without a title: their ids, the only other thing known of them, are no text."""


def beauty_tables(directory: Path) -> tuple[pandas.DataFrame, pandas.DataFrame, None]:
    """Reads the purchases and the titles.

    Args:
        directory: The folder of the four files.

    Returns:
        The interactions (user_id, item_id, event; each user's rows stand in the order of the purchases, of which the
        last is the published split's test and the one before its validation), the items (item_id, which is the ASIN,
        and title, its HTML entities as characters), and nothing of users.
    """
    require_files(directory, FILES, "amazon-beauty")
    maps = _json(directory / "datamaps.json")
    events = []
    for line in (directory / "sequential.txt").read_text(encoding="utf-8").splitlines():
        user, *items = line.split()
        events += [(maps["id2user"][user], maps["id2item"][item], "buy") for item in items]
    numbers = _json(directory / "item_id_to_int.json")
    with (directory / "products_lookup.csv").open(encoding="utf-8", newline="") as file:
        titles = {int(row["global_product_id"]): _readable(row["name"]) for row in csv.DictReader(file)}
    named = [(asin, titles[numbers[asin]] or UNTITLED) for asin in maps["id2item"].values()]
    return (
        pandas.DataFrame(events, columns=["user_id", "item_id", "event"]),
        pandas.DataFrame(named, columns=["item_id", "title"]),
        None,
    )


def _readable(title: str) -> str:
    return " ".join(html.unescape(title).split())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


__all__ = ["UNTITLED", "beauty_tables"]
