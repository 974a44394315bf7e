"""README's Python is run as it stands, in order, against a small model in the place of the quickstart's."""

import re

import pytest
import torch

from m6rec import Catalogue, M6RecConfig, M6RecForRecommendation, M6RecProcessor, M6RecTokenizer
from m6rec.train.recipe import load_recipe
from tests.test_repository import ROOT

README = (ROOT / "README.md").read_text()
FILMS = [
    {"item_id": "50", "title": "Star Wars", "year": 1977, "genres": "Action, Sci-Fi"},
    {"item_id": "172", "title": "The Empire Strikes Back", "year": 1980, "genres": "Action, Sci-Fi"},
    {"item_id": "1", "title": "Toy Story", "year": 1995, "genres": "Animation, Comedy"},
    {"item_id": "2", "title": "Amélie", "year": 2001, "genres": "Comedy, Romance"},
]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    torch.manual_seed(0)
    texts = [" ".join(str(value) for value in film.values()) for film in FILMS]
    tokenizer = M6RecTokenizer.train(texts, vocab_size=400)
    rows = {film["item_id"]: row for row, film in enumerate(FILMS, 1)}
    processor = M6RecProcessor.from_template(tokenizer, domain="video", item_rows=rows)
    config = M6RecConfig.preset(
        "tiny", **tokenizer.structural_ids, num_item_memory=4, embedding_dim=128, trained_tasks=["retrieval"],
        max_position_embeddings=1024,
    )  # fmt: skip
    model = M6RecForRecommendation(config).eval()
    model.save_pretrained(tmp_path / "m6rec-ml100k")
    processor.save_pretrained(tmp_path / "m6rec-ml100k")
    Catalogue.from_dataset(FILMS, model, processor, progress=False).save(tmp_path / "m6rec-ml100k" / "catalogue")
    monkeypatch.chdir(tmp_path)


def test_snippets_run_in_order(trained, capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2", "3"] and "Star Wars" not in "".join(printed[:1])
    assert len(names["ranked"]) == 2 and names["ranked"][0]["rank"] == 1
    assert [len(answer) for answer in names["answers"]] == [3, 3]
    assert names["vector"].shape == (128,) and names["vectors"].shape == (2, 128)
    assert abs(float(names["vector"].norm()) - 1) < 1e-5


def test_recipes_and_files_that_it_names_exist():
    for name in re.findall(r"m6rec (?:finetune|pretrain) ([\w-]+)", README):
        load_recipe(name, ["training.output_dir=anywhere"])
    for link in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_make_targets_that_it_names_exist():
    targets = (ROOT / "Makefile").read_text()
    for name in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert f"\n{name}:" in targets, name
