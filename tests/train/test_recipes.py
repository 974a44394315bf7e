"""Every vertical's recipe, all steps by one command, two optimizer steps each, on small files of the real formats."""

import json
from pathlib import Path

import numpy
import pytest

import m6rec.train
from m6rec.train.cli import main
from tests.fast import some
from tests.modeling_m6rec.conversion.backbones import publish, tiny
from tests.train.data.test_lastfm import write_lastfm

QUICK = [
    "text.max_events=4",
    "text.max_length=256",
    "text.vocab_size=500",
    "pretraining.training.max_steps=2",
    "pretraining.valid_fraction=0.5",
    "training.max_steps=2",
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "training.load_best_model_at_end=false",
    "training.disable_tqdm=true",
]


def films(folder):
    rng = numpy.random.default_rng(0)
    rows = [
        f"{user}\t{film}\t{rng.integers(1, 6)}\t{880_000_000 + rng.integers(10**6)}"
        for user in range(1, 9)
        for film in range(12)
    ]
    files = {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows],
        "item": [
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
            *(f"{film}\tThe Film {film}\t{1980 + film}\tDrama Comedy" for film in range(12)),
        ],
        "user": [
            "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
            *(f"{user}\t{20 + user}\tF\tartist\t0" for user in range(1, 9)),
        ],
    }
    for suffix, lines in files.items():
        (folder / f"ml-100k.{suffix}").write_text("\n".join(lines) + "\n")


def cosmetics(folder):
    rng = numpy.random.default_rng(0)
    ids = {str(item): f"B{item:02}" for item in range(1, 15)}
    (folder / "datamaps.json").write_text(
        json.dumps({"id2user": {str(u): f"U{u}" for u in range(1, 9)}, "id2item": ids})
    )
    (folder / "item_id_to_int.json").write_text(json.dumps({asin: int(item) for item, asin in ids.items()}))
    names = [f"{row},{item},Soap number {item}" for row, item in enumerate(ids)]
    (folder / "products_lookup.csv").write_text("\n".join([",global_product_id,name", *names]))
    rows = [" ".join(map(str, [user, *rng.permutation(numpy.arange(1, 15))[:6]])) for user in range(1, 9)]
    (folder / "sequential.txt").write_text("\n".join(rows) + "\n")


def music(folder):
    listening = [(user, artist, 10 * artist + user) for user in range(1, 9) for artist in range(user % 3, 12)]
    write_lastfm(folder, listening, [(user, other) for user in range(1, 9) for other in range(user + 1, 9)])


def published(folder):
    """Publish a tiny sentence embedder, and say how a recipe that stands on one has to be changed for it."""
    publish(folder, "bert", tiny("bert", "BertModel"))
    return [f"model.backbone={folder}", f"model.config.num_hidden_layers={tiny('bert').config.num_hidden_layers + 2}"]


@pytest.mark.parametrize(
    ("name", "write", "task"),
    some(
        [("video", films, "rating"), ("ecommerce", cosmetics, "click"), ("social", music, "listen")],
        [("video", films, "rating")],
    ),
)
def test_a_vertical_runs_its_four_steps(name, write, task, tmp_path, capsys):
    data, first, last = tmp_path / "data", tmp_path / "first", tmp_path / "last"
    data.mkdir()
    write(data)
    folders = [f"data.directory={data}", f"pretraining.output_dir={first}", f"training.output_dir={last}"]
    if name == "ecommerce":
        folders += published(tmp_path / "backbone")
        folders += ["task.learn=[retrieval,click]", "task.negatives_per_event=2"]  # as the recipe says, clicks as well
    assert main(["run", name, *folders, *QUICK]) == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and task in said and said.endswith(f"written to {last}\n")
    assert " 1  " in said  # what was recommended in the end
    report = json.loads((last / "metrics.json").read_text())
    assert all("m6rec" in rows for rows in report.values()) and (first / "model.safetensors").is_file()


@pytest.mark.parametrize(("name", "write"), some([("video", films), ("social", music)], [("video", films)]))
def test_a_vertical_begins_as_a_published_model(name, write, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write(data)
    backbone = publish(tmp_path / "backbone", "llama")
    folders = [f"data.directory={data}", f"pretraining.output_dir={tmp_path / 'first'}", f"training.output_dir={out}"]
    assert main(["run", name, *folders, f"model.backbone={backbone}", "model.config.num_joint_layers=2", *QUICK]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["segment_pooling"], config["num_joint_layers"]) == (24, "mean", 2)


def test_every_recipe_is_run_through_the_command_line():
    """A new recipe wants a run of its own, here or in a test that it is named in."""
    elsewhere = {
        "quickstart": "commands/test_quickstart",
        "own-data": "test_own_data",
        "pretrain-text": "runs/test_pretrain",
        "explain": "rows/test_dialogues",
        "converse": "rows/test_dialogues",
    }
    here = {"video", "ecommerce", "social", "beauty"}
    assert {path.stem for path in (Path(m6rec.train.__file__).parent / "recipes").glob("*.yaml")} == here | {*elsewhere}
    for name, test in elsewhere.items():
        assert name in (Path(__file__).parent / f"{test}.py").read_text(encoding="utf-8")


def test_a_recipe_reads_texts_with_a_backbone_and_histories_with_new_layers(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    cosmetics(data)
    changed = {
        "data.directory": data,
        "text.max_events": 4,
        "text.max_length": 256,
        "training.output_dir": out,
        "training.max_steps": 2,
        "training.disable_tqdm": "true",
    }
    given = [*published(tmp_path / "backbone"), *(f"{key}={value}" for key, value in changed.items())]
    assert main(["finetune", "beauty", *given]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["segment_pooling"] == "mean" and config["num_joint_layers"] == 2
    layers = tiny("bert").config.num_hidden_layers
    assert config["num_hidden_layers"] == layers + 2 and config["num_item_embeddings"] > 0
    assert "m6rec" in json.loads((out / "metrics.json").read_text())["retrieval"]
