"""TALLRec: every row of its files is in the log, to be read as it stands there."""

import ast

import pandas
import pytest

from m6rec.train.config.recipe import load_recipe
from m6rec.train.data.log import DataArguments, read_log
from m6rec.train.data.splits import PARTS, given, order
from m6rec.train.evaluation.reports import scoring_examples
from m6rec.train.rows.examples import training_rows
from m6rec.train.runs.build import prepare
from tests.conftest import real_data
from tests.train.data.test_movielens import write_movielens
from tests.train.world import recipe_of

HEADER = "user_id,history_movie_id,history_rating,movie_id,rating,timestamp\n"
STREAM = [("1", 1), ("267", 0), ("3", 1), ("1412", 0), ("1", 0), ("3", 1)]
"""What user 7 saw, and liked or not; of user 8 the same, from the third film on."""


def row(user, stream, place, history=2):
    before = stream[place - history : place]
    films, likes = [film for film, _ in before], [like for _, like in before]
    return f'{user},"{films}","{likes}",{stream[place][0]},{stream[place][1]},88{place}\n'


def write_tallrec(folder):
    movielens, folder = folder / "ml-100k", folder / "tallrec-movie"
    movielens.mkdir()
    write_movielens(movielens)
    folder.mkdir()
    (folder / "train.csv").write_text(HEADER + "".join(row(7, STREAM, place) for place in (2, 3)))
    (folder / "valid.csv").write_text(HEADER + row(7, STREAM, 4))
    (folder / "test.csv").write_text(HEADER + row(7, STREAM, 5) + row(8, STREAM[2:], 2) + row(8, STREAM[2:], 3))
    return folder


def test_the_log_by_hand(tmp_path):
    log = read_log(DataArguments(source="tallrec", directory=str(write_tallrec(tmp_path))))
    events = log.interactions
    assert events["item_id"].tolist() == [film for film, _ in STREAM[:4]] + ["1", "3", "3", "1412", "1", "3"]
    assert events["event"].tolist()[:4] == ["like", "dislike", "like", "dislike"]
    assert events["label"].fillna(-1).tolist() == [-1, -1, 1, 0, 0, 1, -1, -1, 0, 1]
    assert events["part"].tolist() == ["train"] * 4 + ["valid", "test", "train", "train", "test", "test"]
    assert log.item_fields("1") == {"title": "Toy Story", "year": "1995", "genres": "Animation, Children's, Comedy"}


def reread(log):
    """All rows as the log tells them: part, user, films before, likes before, film, label."""
    rows = []
    for user, own in order(log.interactions, 0).groupby("user_id", observed=True):
        films, likes = own["item_id"].tolist(), (own["event"] == "like").astype(int).tolist()
        first = int(own["label"].notna().to_numpy().argmax())
        for place in range(first, len(own)):
            history = slice(place - first, place)
            target = (own["part"].iat[place], user, films[history], likes[history], films[place])
            rows.append((*target, int(own["label"].iat[place])))
    return rows


def as_in_the_files(folder):
    rows = []
    for part in PARTS:
        for entry in pandas.read_csv(folder / f"{part}.csv").itertuples():
            history = (ast.literal_eval(entry.history_movie_id), ast.literal_eval(entry.history_rating))
            rows.append((part, str(entry.user_id), *history, str(entry.movie_id), entry.rating))
    return rows


def test_each_row_of_the_files_is_read_as_it_stands(tmp_path):
    folder = write_tallrec(tmp_path)
    log = read_log(DataArguments(source="tallrec", directory=str(folder)))
    assert sorted(reread(log)) == sorted(as_in_the_files(folder))
    sections = {"task": {"learn": ["click"], "targets": 1}, "evaluation": {"split": "given", "rolling": True}}
    data = {"source": "tallrec", "directory": str(folder)}
    run = prepare(load_recipe(recipe_of(data, tmp_path / "run", text={"max_events": 2}, **sections)))
    rows = training_rows(run.writer, run.split.train, run.processor, run.recipe.task)
    assert [entry["click_labels"] for entry in rows] == [[1], [0]]
    assert run.processor.tokenizer.decode(rows[1]["input_ids"]).count("[EVENT]") == 2
    tests = scoring_examples(
        run.writer, run.processor, run.split, "test", "click", run.recipe.task, run.recipe.evaluation, 0
    )
    assert tests.labels.tolist() == [1, 0, 1]
    texts = [run.processor.tokenizer.decode(entry["input_ids"]) for entry in tests.rows]
    # the second row of user 8: disliked 1412, then 1 (the first row's target), and asked about 3
    assert texts[2].index("Great Giving") < texts[2].index("Toy Story") < texts[2].index("[BOS][ITEM]")
    assert "Quoted" in texts[2].partition("[BOS][ITEM]")[2]


def test_rows_that_do_not_go_on_are_refused(tmp_path):
    folder = write_tallrec(tmp_path)
    (folder / "train.csv").write_text(HEADER + row(7, STREAM, 2) + row(7, STREAM, 4))
    with pytest.raises(ValueError, match=r"train\.csv, row 2: the films of user '7' do not go on"):
        read_log(DataArguments(source="tallrec", directory=str(folder)))


@pytest.mark.real_data
def test_all_ten_thousand_rows():
    folder = real_data("tallrec-movie")
    real_data("ml-100k")
    log = read_log(DataArguments(source="tallrec", directory=str(folder)))
    rows = reread(log)
    assert len(rows) == 10_000
    assert sorted(rows) == sorted(as_in_the_files(folder))
    split = given(log.interactions)
    assert [int(part["label"].notna().sum()) for part in (split.train, split.valid, split.test)] == [8000, 1000, 1000]
