"""TALLRec's click task on MovieLens-100K: ten films that a user liked or not, and whether the user will like one more.

A user's rows are consecutive: a row's ten films are the ten before its target, and the last of them is the target of
the user's previous row. So a log of each user's films in that order holds the same data. The first ten films of each
user have no row of their own: they are history only, and have no label.
"""

import ast
from pathlib import Path

import pandas

from .movielens import find_movielens, movielens_tables
from .splits import PARTS
from .tables import require_files

_VERBS = ("dislike", "like")


def tallrec_tables(directory: Path) -> tuple[pandas.DataFrame, pandas.DataFrame, None]:
    """Reads the rows of train.csv, valid.csv and test.csv as one log with `evaluation.split: given`.

    With `text.max_events: 10`, `task.targets: 1` and `evaluation.rolling: true` the model reads each row as in the
    file. Times are not read: the file has them for targets only.

    Args:
        directory: The folder of the three files. The films' texts come from ml-100k: in the same parent folder,
            else where `find_movielens` finds it.

    Returns:
        The interactions (user_id, item_id, event: "like" or "dislike", label, part), the films, and None for users.
    """
    require_files(directory, [f"{part}.csv" for part in PARTS], "tallrec-movie")
    events: list[tuple[str, str, str, int | None, str]] = []
    recent: dict[str, list[tuple[str, int]]] = {}
    for part in PARTS:
        path = directory / f"{part}.csv"
        rows = pandas.read_csv(path, dtype=str, keep_default_na=False)
        names = ["user_id", "history_movie_id", "history_rating", "movie_id", "rating"]
        for number, (user, films, likes, film, like) in enumerate(zip(*(rows[name] for name in names)), 1):
            history = list(zip(ast.literal_eval(films), map(int, ast.literal_eval(likes)), strict=True))
            if user not in recent:
                events += [(user, earlier, _VERBS[liked], None, "train") for earlier, liked in history]
            elif recent[user] != history:
                raise ValueError(
                    f"{path}, row {number}: the films of user {user!r} do not go on from the row before; expected "
                    f"{recent[user]}, got {history}"
                )
            events.append((user, film, _VERBS[int(like)], int(like), part))
            recent[user] = [*history[1:], (film, int(like))]
    films_folder = directory.parent / "ml-100k"
    _, films, _ = movielens_tables(films_folder if films_folder.is_dir() else find_movielens())
    return pandas.DataFrame(events, columns=["user_id", "item_id", "event", "label", "part"]), films, None


__all__ = ["tallrec_tables"]
