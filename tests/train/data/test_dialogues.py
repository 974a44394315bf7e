"""Data sets of dialogues: what is recommended, by whom, and which part each dialogue belongs to."""

import json

import pytest

from m6rec.train.data.dialogues import Links, films_of
from m6rec.train.data.log import DataArguments, read_log
from tests.conftest import real_data

FILMS = """movieId,title,genres,keywords
1,"Silence of the Lambs, The (1991)",Crime|Thriller,cannibal|fbi
2,It (2017),Horror,clown
3,Alien (1979),Horror|Sci-Fi,space
4,Babylon 5,(no genres listed),
"""


def write_films(folder):
    (folder / "movielens-25m-sample").mkdir(parents=True)
    (folder / "movielens-25m-sample" / "movies_w_keywords.csv").write_text(FILMS)


def write_iard(folder, dialogues=10):
    """Dialogues in which the agent recommends It, then Alien, after the user has named the Silence of the Lambs."""
    write_films(folder)
    said = [
        ("USER", "I saw the silence of the lambs (1991) and liked it"),
        ("AGENT", "So did I: The Silence of the Lambs (1991) is good. Try It (2017) ?"),
        ("AGENT", "Or Alien (1979)"),
        ("USER", "Hm, It (2017) no"),
        ("AGENT", "Then Alien (1979)! Or Unknown Film (1901)"),
    ]
    turns = [{"participant": who, "utterance": text, "dialogue_acts": []} for who, text in said]
    (folder / "iard").mkdir()
    rows = [{"conversation_id": str(number), "conversation": turns} for number in range(dialogues)]
    (folder / "iard" / "formatted_IARD_annotated_gold.json").write_text(json.dumps(rows[:4]))
    (folder / "iard" / "formatted_IARD_annotated_partially.json").write_text(json.dumps(rows[2:]))
    return folder


def write_inspired(folder):
    write_films(folder / "movie-dialogues")
    own = folder / "inspired"
    own.mkdir()
    head = "dialog_id\tspeaker\ttext\tmovies"
    lines = ["{0}\tSEEKER\tI like QUOTATION_MARKAlienQUOTATION_MARK\tAlien (1979)"]
    lines += ["{0}\tRECOMMENDER\tThen It\tIt (2017); Alien (1979)"]
    for name, dialogues in (("dev", ("a", "b")), ("test", ("c",))):
        rows = [line.format(dialogue) for dialogue in dialogues for line in lines]
        (own / f"{name}.tsv").write_text("\n".join([head, *rows]) + "\n")
    return own


def test_films_and_links(tmp_path):
    write_films(tmp_path)
    films = films_of(tmp_path)
    assert films.iloc[0].tolist() == ["1", "The Silence of the Lambs", "1991", "Crime, Thriller", "cannibal, fbi"]
    assert films.iloc[3].tolist() == ["4", "Babylon 5", "", "", ""]
    link = Links(films)
    assert (link("Silence of the Lambs, The (1991)"), link("ALIEN (1979) "), link("Alien (1980)"), link("Alien")) == (
        ("1", "3", None, None)
    )
    assert list(link.within("I like It (2017) and it's like the Alien (1979) of the Alien (1980)")) == ["2", "3"]


def test_iard(tmp_path):
    log = read_log(DataArguments(source="movie-dialogues", directory=str(write_iard(tmp_path))))
    first = log.dialogues[log.dialogues["dialogue_id"] == "iard:0"]
    assert first["item_id"].tolist() == ["", "2", "3", "", ""], "the first film that nobody has named before"
    assert first["speaker"].tolist() == ["user", "assistant", "assistant", "user", "assistant"]
    events = log.interactions[log.interactions["user_id"] == "iard:0"]
    assert list(zip(events["item_id"], events["event"])) == [("1", "mention"), ("2", "recommend"), ("3", "recommend")]
    parts = log.dialogues.groupby("dialogue_id")["part"].agg(["first", "nunique"])
    assert (parts["nunique"] == 1).all() and sorted(parts["first"]) == ["test"] + ["train"] * 8 + ["valid"]
    same = log.interactions.drop_duplicates("user_id").set_index("user_id")["part"].astype(str)
    assert same.to_dict() == parts["first"].to_dict()


def test_inspired(tmp_path):
    log = read_log(DataArguments(source="inspired", directory=str(write_inspired(tmp_path))))
    assert log.dialogues["text"].tolist()[:2] == ['I like "Alien"', "Then It"]
    assert log.dialogues["item_id"].tolist() == ["", "2"] * 3
    parts = dict(zip(log.dialogues["dialogue_id"], log.dialogues["part"]))
    assert parts["c"] == "test" and sorted((parts["a"], parts["b"])) == ["train", "valid"]
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv, test\.tsv; expected the folder of inspired"):
        read_log(DataArguments(source="inspired", directory=str(tmp_path / "movie-dialogues")))


@pytest.mark.parametrize(("source", "count", "recommended"), [("movie-dialogues", 336, 900), ("inspired", 198, 250)])
def test_the_real_dialogues(source, count, recommended):
    log = read_log(DataArguments(source=source, directory=str(real_data(source))))
    assert log.dialogues["dialogue_id"].nunique() == count
    assert (log.dialogues["item_id"] != "").sum() > recommended and len(log.items) == 13816
