"""MovieLens-100K: where it is found, and what becomes of its texts."""

import importlib
import sys

import pytest

from m6rec.train.data.movielens import find_movielens, movielens_tables, readable_title

FILES = {
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t267\t3\t881250949\n",
    "item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        "267\tunkonwn\tunkonwn\tunknown\n"
        "1412\tLand Before Time III: The Time of the Great Giving (1995)\tV\tAnimation Children's\n"
        '3\t"Quoted, The\t1996\tDrama\n'
    ),
    "user": (
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\tT8H1N\n3\t7\tF\tnone\t06405\n"
    ),
}


def write_movielens(folder):
    for suffix, content in FILES.items():
        (folder / f"ml-100k.{suffix}").write_text(content, encoding="utf-8")
    return folder


def test_tables(tmp_path):
    interactions, items, users = movielens_tables(write_movielens(tmp_path))
    assert interactions.to_dict("records") == [
        {"user_id": "1", "item_id": "267", "rating": "3", "timestamp": "881250949", "event": "rate"}
    ]
    assert items.columns.tolist() == ["item_id", "title", "year", "genres"]
    assert items.to_numpy().tolist() == [
        ["1", "Toy Story", "1995", "Animation, Children's, Comedy"],
        ["267", "unknown", "", ""],
        ["1412", "Land Before Time III: The Time of the Great Giving", "1995", "Animation, Children's"],
        ["3", 'The "Quoted', "1996", "Drama"],
    ]
    assert users.columns.tolist() == ["user_id", "age", "gender", "occupation"]
    assert users.to_numpy().tolist() == [
        ["1", "24", "male", "technician"],
        ["2", "53", "female", ""],
        ["3", "7", "female", ""],
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Fish Called Wanda, A", "A Fish Called Wanda"),
        ("American Werewolf in London, An", "An American Werewolf in London"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Adventures of Priscilla, Queen of the Desert, The", "The Adventures of Priscilla, Queen of the Desert"),
        ("Double vie, La (Double Life of Veronique, The)", "La Double vie (The Double Life of Veronique)"),
        ("Misérables, Les", "Les Misérables"),
        ("Enfer, L'", "L'Enfer"),
        ("Seventh Seal, The (Sjunde inseglet, Det)", "The Seventh Seal (Det Sjunde inseglet)"),
        ("Paris, Texas", "Paris, Texas"),
        ("Sex, Lies, and Videotape", "Sex, Lies, and Videotape"),
        ("To Have, or Not", "To Have, or Not"),
        ("I, Worst of All (Yo, la peor de todas)", "I, Worst of All (Yo, la peor de todas)"),
        ("Seven (Se7en)", "Seven (Se7en)"),
        ("", ""),
    ],
)
def test_titles_read_in_natural_order(written, read):
    assert readable_title(written) == read
    assert readable_title(read) == read


def test_missing_files_and_columns_are_named(tmp_path):
    write_movielens(tmp_path)
    (tmp_path / "ml-100k.user").write_text("user_id:token\tage:token\n1\t24\n")
    with pytest.raises(ValueError, match=r"ml-100k\.user: no column gender, occupation; the columns are user_id, age"):
        movielens_tables(tmp_path)
    (tmp_path / "ml-100k.item").unlink()
    with pytest.raises(FileNotFoundError, match=r"ml-100k\.item is missing"):
        movielens_tables(tmp_path)


@pytest.fixture
def _no_recbole(monkeypatch):
    monkeypatch.delenv("M6REC_DATA", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_found_in_the_wheel_without_importing_it(monkeypatch, tmp_path):
    data = tmp_path / "site" / "recbole" / "dataset_example" / "ml-100k"
    data.mkdir(parents=True)
    (tmp_path / "site" / "recbole" / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()
    (tmp_path / "ml-100k").mkdir()
    monkeypatch.setenv("M6REC_DATA", str(tmp_path))
    assert find_movielens() == data
    assert "recbole" not in sys.modules


@pytest.mark.usefixtures("_no_recbole")
def test_found_in_the_data_folder_else_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("M6REC_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps recbole==1\.2\.1.*--data DIR"):
        find_movielens()
    (tmp_path / "ml-100k").mkdir()
    assert find_movielens() == tmp_path / "ml-100k"
