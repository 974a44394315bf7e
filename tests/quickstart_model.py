"""A small random model in the place of the quickstart's, for the snippets of README and docs."""

import pytest
import torch

from m6rec import Catalogue, M6RecConfig, M6RecForRecommendation, M6RecProcessor, M6RecTokenizer

FILMS = [
    {"item_id": "50", "title": "Star Wars", "year": 1977, "genres": "Action, Sci-Fi"},
    {"item_id": "172", "title": "The Empire Strikes Back", "year": 1980, "genres": "Action, Sci-Fi"},
    {"item_id": "1", "title": "Toy Story", "year": 1995, "genres": "Animation, Comedy"},
    {"item_id": "2", "title": "Amélie", "year": None, "genres": "Comedy, Romance"},
]


@pytest.fixture
def quickstart_folder(tmp_path, monkeypatch):
    """Work in a folder that holds `m6rec-ml100k/`, with a catalogue of four films, and two tables of a shop.

    The same model is in `films-lm/`, which the guide to writing makes of a language model.
    """
    torch.manual_seed(0)
    texts = [" ".join(str(value) for value in film.values()) for film in FILMS]
    tokenizer = M6RecTokenizer.train(texts, vocab_size=400)
    rows = {film["item_id"]: row for row, film in enumerate(FILMS, 1)}
    processor = M6RecProcessor.from_template(tokenizer, domain="video", item_rows=rows)
    config = M6RecConfig.preset(
        "tiny", **tokenizer.structural_ids, num_item_embeddings=4, embedding_dim=128, trained_tasks=["retrieval"],
        max_position_embeddings=1024,
    )  # fmt: skip
    model = M6RecForRecommendation(config).eval()
    model.save_pretrained(tmp_path / "m6rec-ml100k")
    processor.save_pretrained(tmp_path / "m6rec-ml100k")
    Catalogue.from_dataset(FILMS, model, processor, progress=False).save(tmp_path / "m6rec-ml100k" / "catalogue")
    (tmp_path / "films-lm").symlink_to("m6rec-ml100k")
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path)


def write_shop(folder):
    """Write events.csv and items.csv: six users with five events each, eight items."""
    names = [
        "red rain jacket",
        "hiking shoes",
        "wool socks",
        "tent",
        "camping stove",
        "head lamp",
        "blue rain hat",
        "map",
    ]
    items = "".join(f"{row:05},{name}\n" for row, name in enumerate(names, 10))
    (folder / "items.csv").write_text("item_id,title\n" + items)
    users = ["ann", "bob", "cid", "dan", "eva", "fay"]
    rows = [
        f"{user},{10 + (number + 2 * place) % 8:05},{1_700_000_000 + 86_400 * place}\n"
        for number, user in enumerate(users)
        for place in range(5)
    ]
    (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
