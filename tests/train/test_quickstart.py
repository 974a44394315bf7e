"""The quickstart on a small world of two tastes: what is written, printed and promised, from the command to the answer."""

import json
import re
import textwrap

import numpy
import pytest
from transformers import AutoModel, pipeline

from m6rec import M6RecForRecommendation
from m6rec.train.cli import main
from m6rec.train.quickstart import ranking_table
from tests.conftest import real_data

STAGES = ["data", "training", "evaluation", "saving", "recommendations"]
TINY = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.embedding_dim=16",
    "text.vocab_size=500",
    "text.max_events=10",
    "training.num_train_epochs=8",
    "training.per_device_train_batch_size=8",
    "training.learning_rate=1e-2",
]
WORDS = ["Laser Rocket Station", "Garden Wedding Letter"]
GENRES = ["Action Sci-Fi", "Comedy Romance"]


def write_films(folder, num_users=40, num_films=30):
    """Write ml-100k as RecBole ships it: odd users watch odd films only, even users even ones."""
    rng = numpy.random.default_rng(11)
    folder.mkdir()
    tables = {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float"],
        "item": ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"],
        "user": ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"],
    }
    for film in range(num_films):
        taste = film % 2
        word = WORDS[taste].split()[film % 3]
        tables["item"].append(f"{100 + film}\t{word} {film}, The\t{1970 + film}\t{GENRES[taste]}")
    for user in range(num_users):
        tables["user"].append(f"{1 + user}\t{20 + user}\t{'MF'[user % 3 > 0]}\tengineer\t12345")
        films = rng.permutation(numpy.arange(user % 2, num_films, 2))[: 9 + user % 3]
        for place, film in enumerate(films):
            tables["inter"].append(f"{1 + user}\t{100 + film}\t{rng.integers(1, 6)}\t{880_000_000 + 86_400 * place}")
    for name, lines in tables.items():
        (folder / f"ml-100k.{name}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return write_films(tmp_path_factory.mktemp("films") / "ml-100k")


if __name__ == "__main__":
    import pathlib, sys, tempfile
    d = pathlib.Path(tempfile.mkdtemp())
    print(d)
    print(main(["quickstart", "--data", str(write_films(d / "ml-100k")), "--output", str(d / "out"), *TINY, *sys.argv[1:]]))
