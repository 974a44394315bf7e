"""MovieLens-100K as RecBole's wheel ships it: "atomic" files, tab separated, with a header of `name:type` cells."""

import csv
import importlib.util
import os
import re
from pathlib import Path

import pandas

_ARTICLES = "The|An|A|La|Le|Les|L'|Il|O|El|Un|Une|Das|Der|Die|Det"
# "Name, The" at the end of the title, or of the original title that follows in parentheses.
_MOVED_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?= ?\(|\)|$)")
_TITLE_WITH_YEAR = re.compile(r"(.+) \((\d{4})\)")
_GENDERS = {"M": "male", "F": "female"}
_NO_OCCUPATION = {"other": "", "none": ""}


def find_movielens() -> Path:
    """The folder of MovieLens-100K: in RecBole's wheel (without importing it), else in the folder `M6REC_DATA`."""
    recbole = importlib.util.find_spec("recbole")
    folders = [Path(place) / "dataset_example" for place in (recbole and recbole.submodule_search_locations) or ()]
    if "M6REC_DATA" in os.environ:
        folders.append(Path(os.environ["M6REC_DATA"]))
    for folder in folders:
        if (folder / "ml-100k").is_dir():
            return folder / "ml-100k"
    raise FileNotFoundError(
        "MovieLens-100K is not here: run `pip install --no-deps recbole==1.2.1` (its wheel holds the data), "
        "or name the folder that holds ml-100k.inter: `data.directory=DIR`, or `--data DIR` of `m6rec quickstart`"
    )


def movielens_tables(directory: Path) -> tuple[pandas.DataFrame, pandas.DataFrame, pandas.DataFrame]:
    """Reads the three files, all cells as text.

    Args:
        directory: The folder that holds `ml-100k.inter`, `ml-100k.item` and `ml-100k.user`.

    Returns:
        The interactions (user_id, item_id, rating, timestamp, event), the items (item_id, title, year, genres; the
        titles as `readable_title` writes them) and the users (user_id, age, gender, occupation). Cells without
        information are empty: the genre "unknown", the occupations "other" and "none", an invalid year.
    """
    interactions = _read_atomic(directory / "ml-100k.inter", ["user_id", "item_id", "rating", "timestamp"])
    interactions["event"] = "rate"

    items = _read_atomic(directory / "ml-100k.item", ["item_id", "movie_title", "release_year", "class"])
    items.columns = pandas.Index(["item_id", "title", "year", "genres"])
    items["title"] = items["title"].replace("unkonwn", "unknown")  # spelt so in the file; item 267 has no other text
    inside = items["title"].str.extract(_TITLE_WITH_YEAR)  # one title contains its year, and its year is "V"
    items["title"] = inside[0].fillna(items["title"]).map(readable_title)
    items["year"] = inside[1].fillna(items["year"].where(items["year"].str.fullmatch(r"\d{4}"), ""))
    items["genres"] = items["genres"].replace("unknown", "").str.replace(" ", ", ")

    users = _read_atomic(directory / "ml-100k.user", ["user_id", "age", "gender", "occupation"])
    users = users.replace({"gender": _GENDERS, "occupation": _NO_OCCUPATION})
    return interactions, items, users


def readable_title(title: str) -> str:
    """Moves the article to the front of the title.

    >>> readable_title("Shawshank Redemption, The")
    'The Shawshank Redemption'
    >>> readable_title("Star Maker, The (Uomo delle stelle, L')")
    "The Star Maker (L'Uomo delle stelle)"
    """
    return _MOVED_ARTICLE.sub(lambda found: f"{found[2]} {found[1]}".replace("L' ", "L'", 1), title)


def _read_atomic(path: Path, columns: list[str]) -> pandas.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the ml-100k folder of RecBole's wheel")
    table = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    table = table.rename(columns=lambda name: name.partition(":")[0])
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; the columns are {', '.join(table.columns)}")
    return table[columns]


__all__ = ["find_movielens", "movielens_tables", "readable_title"]
