"""Amazon Beauty, 5-core of 2014, as P5 split it: ordered purchases, with times where they are known.

The published split holds no times. They are read from `times.csv` (user, place, item as in `sequential.txt`, timestamp)
where that file lies in the folder.
"""

import csv
import html
import json
from pathlib import Path
from typing import Any

import numpy
import pandas

from .tables import require_files

FILES = ("sequential.txt", "datamaps.json", "item_id_to_int.json", "products_lookup.csv")
TIMES = "times.csv"
UNTITLED = "untitled product"
"""Text of the seven products without a title: nothing else is known of them but their ids, which are not text."""


def beauty_tables(directory: Path) -> tuple[pandas.DataFrame, pandas.DataFrame, None]:
    """Reads the purchases and the titles.

    Args:
        directory: The folder of the four files, and of `times.csv` if that is there.

    Returns:
        The interactions (user_id, item_id, event, with times also timestamp; each user's rows are in the order of
        the purchases: the last is the published split's test, the one before its validation), the items (item_id,
        which is the ASIN, and title, with HTML entities decoded), and None for users.

        Times never decrease in the published order: in four sequences two purchases are swapped, and both get the
        later time.

    Raises:
        ValueError: If `times.csv` does not hold the same purchases.
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
    interactions = pandas.DataFrame(events, columns=["user_id", "item_id", "event"])
    if (directory / TIMES).is_file():
        interactions["timestamp"] = _times(directory / TIMES, maps, interactions)
    return (
        interactions,
        pandas.DataFrame(named, columns=["item_id", "title"]),
        None,
    )


def _times(path: Path, maps: dict[str, Any], interactions: pandas.DataFrame) -> numpy.ndarray:
    """Read the time of each purchase, in the order of the purchases."""
    table = pandas.read_csv(path, dtype={"user": str, "place": int, "item": str, "timestamp": float})
    place = interactions.groupby("user_id", sort=False).cumcount()
    keys = pandas.MultiIndex.from_arrays([interactions["user_id"], interactions["item_id"], place])
    given = [table["user"].map(maps["id2user"]), table["item"].map(maps["id2item"]), table["place"]]
    times = pandas.Series(table["timestamp"].to_numpy(), index=pandas.MultiIndex.from_arrays(given))
    if len(times) != len(keys) or not keys.isin(times.index).all():
        raise ValueError(
            f"{path} has {len(times)} rows; expected one for each of the {len(keys)} purchases of sequential.txt, with "
            "its user, its place and its item"
        )
    known = pandas.Series(times.reindex(keys).to_numpy())
    return known.groupby(interactions["user_id"].to_numpy(), sort=False).cummax().to_numpy()


def _readable(title: str) -> str:
    return " ".join(html.unescape(title).split())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


__all__ = ["UNTITLED", "beauty_tables"]
