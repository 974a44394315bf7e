"""Last.fm 2k (HetRec 2011): users' listening and friendships, without times.

People are both users and items: the item of a friendship event is a person. The description of a person, the artists
they play most, must not leak held-out events. So these artists come first in the person's events, where no split holds
anything out, and all other events follow in an order drawn by the seed.
"""

import csv
from pathlib import Path

import numpy
import pandas

from .tables import require_files

FILES = ("artists.dat", "user_artists.dat", "user_friends.dat")
DESCRIBED_BY = 5
"""Maximum number of artists in the description of a person; at most half of the person's artists."""


def lastfm_tables(directory: Path, seed: int) -> tuple[pandas.DataFrame, pandas.DataFrame, None]:
    """Reads listening and friendships.

    Args:
        directory: The folder of the three files.
        seed: Seed of the order of each user's events, and of the direction of each friendship.

    Returns:
        The interactions (user_id, item_id, event: "listen" or "follow"), the items (item_id; name of an artist, text of
        a person) and None for users. Ids are "artist:51" and "user:2". Play counts select the artists that describe a
        person and are not used otherwise. A friendship, which the files hold in both directions, is one event of one
        of the two users: else one direction would leak the other.
    """
    require_files(directory, FILES, "lastfm")
    artists = _read(directory / "artists.dat", ["id", "name"])
    listening = _read(directory / "user_artists.dat", ["userID", "artistID", "weight"])
    friends = _read(directory / "user_friends.dat", ["userID", "friendID"])
    listening["weight"] = listening["weight"].astype(int)
    listening = listening.sort_values(["userID", "weight", "artistID"], ascending=[True, False, True])
    place = listening.groupby("userID").cumcount()
    half = listening.groupby("userID")["userID"].transform("size") // 2
    described_by = place < numpy.minimum(numpy.maximum(half, 1), DESCRIBED_BY)

    rng = numpy.random.default_rng(seed)
    heard = pandas.DataFrame(
        {"user_id": "user:" + listening["userID"], "item_id": "artist:" + listening["artistID"], "event": "listen"}
    )
    events = pandas.concat([heard[~described_by], _follows(friends, rng)])
    events = events.iloc[rng.permutation(len(events))]
    events = pandas.concat([heard[described_by], events]).sort_values("user_id", kind="stable", ignore_index=True)
    return events, _items(artists, listening[described_by], friends), None


def _follows(friends: pandas.DataFrame, rng: numpy.random.Generator) -> pandas.DataFrame:
    pairs = sorted({tuple(sorted(pair)) for pair in friends.itertuples(index=False, name=None) if pair[0] != pair[1]})
    both = numpy.array(pairs, dtype=object).reshape(-1, 2)
    first = rng.integers(0, 2, len(both))
    rows = numpy.arange(len(both))
    follower, followed = both[rows, first], both[rows, 1 - first]
    return pandas.DataFrame({"user_id": "user:" + follower, "item_id": "user:" + followed, "event": "follow"})


def _items(artists: pandas.DataFrame, played: pandas.DataFrame, friends: pandas.DataFrame) -> pandas.DataFrame:
    names = dict(zip(artists["id"], artists["name"].str.strip()))
    texts = played["artistID"].map(names).groupby(played["userID"]).agg(", ".join)
    unheard = sorted({*friends["userID"], *friends["friendID"]} - set(texts.index))
    people = pandas.concat(["a listener of " + texts, pandas.Series("a listener", index=unheard, dtype="str")])
    return pandas.DataFrame(
        {
            "item_id": [*("artist:" + artists["id"]), *("user:" + people.index)],
            "name": [*names.values(), *[""] * len(people)],
            "text": [*[""] * len(artists), *people],
        }
    )


def _read(path: Path, columns: list[str]) -> pandas.DataFrame:
    table = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; the columns are {', '.join(table.columns)}")
    return table[columns]


__all__ = ["DESCRIBED_BY", "lastfm_tables"]
