"""One's own tables through the command line: every fault of them by itself, and the template from them to answers."""

import json
from pathlib import Path

import pandas
import pytest
import yaml

import m6rec.train
from m6rec.train.cli import main
from tests.fast import some
from tests.modeling_m6rec.conversion.backbones import publish, tiny

TEMPLATE = Path(m6rec.train.__file__).parent / "recipes" / "own-data.yaml"
EVENTS = [
    *[{"user_id": "anna", "item_id": item, "timestamp": f"2026-05-0{day}"} for day, item in enumerate("abcde", 1)],
    *[{"user_id": "博文", "item_id": item, "timestamp": f"2026-05-0{day}"} for day, item in enumerate("bcdea", 1)],
    *[{"user_id": "carl", "item_id": item, "timestamp": f"2026-05-0{day}"} for day, item in enumerate("cde", 1)],
    {"user_id": "once", "item_id": "a", "timestamp": "2026-05-09"},
]
ITEMS = [
    {"item_id": item, "title": title}
    for item, title in zip("abcde", ["red shoes", "轻便男士夹克", "a hat", "a coat", "a scarf"])
]
SMALL = {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "no", "save_strategy": "no"}
SMALL |= {"load_best_model_at_end": False, "use_cpu": True, "bf16": False, "disable_tqdm": True}


def written(rows, path):
    frame = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(params=[".csv", ".parquet", ".jsonl"])
def own(request, tmp_path):
    """Write one's tables, and a copy of the template that names them; returns the copy's path."""

    def make(events=EVENTS, items=ITEMS, **sections):
        tree = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
        tree["data"]["interactions"] = written(events, tmp_path / f"log{request.param}")
        tree["data"]["items"] = written(items, tmp_path / f"products{request.param}")
        tree["text"] |= {"vocab_size": 400, "max_length": 256, "max_events": 4}
        tree["model"]["shape"] |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        tree["training"] |= {"output_dir": str(tmp_path / "run"), **SMALL, "num_train_epochs": 1}
        for name, section in sections.items():
            tree[name] |= section
        path = tmp_path / "own-data.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return str(path)

    return make


def refused(capsys, command, recipe):
    """Run a command that must refuse, with one message and no traceback; returns the message."""
    capsys.readouterr()
    assert main([command, recipe]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"m6rec {command}: ")
    return said


def changed(rows, place, **cells):
    return [{**row, **(cells if number == place else {})} for number, row in enumerate(rows)]


def without(rows, column):
    return [{name: value for name, value in row.items() if name != column} for row in rows]


FAULTS = {
    "a column that is not there": (
        {"data": {"columns": {"user_id": "customer"}}},
        "interactions: no column 'customer'; the columns are user_id, item_id, timestamp",
    ),
    "a column of items that is not there": (
        {"data": {"item_columns": ["name"]}},
        "items: no column 'name'; the columns are item_id, title",
    ),
    "a column without which nothing goes": (
        {"events": without(EVENTS, "item_id")},
        "interactions: no column 'item_id'; the columns are user_id, timestamp",
    ),
    "a time that is none": (
        {"events": changed(EVENTS, 4, timestamp="last Tuesday")},
        "interactions: column 'timestamp', row 5: expected a time (seconds or ISO 8601, one of them in all rows), got "
        "'last Tuesday' (1 of 14 rows are refused; data.drop_invalid: true leaves them out)",
    ),
    "an item without text": (
        {"items": changed(ITEMS, 2, title=" ")},
        "items: column 'item_id', row 3: expected an item with some text in title, got 'c' (1 of 5 rows",
    ),
    "an event of an unknown item": (
        {"events": changed(EVENTS, 0, item_id="z")},
        "interactions: column 'item_id', row 1: expected an item of the items table, got 'z' (1 of 14 rows",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["prepare", "finetune"])
def test_a_fault_is_told_by_column_and_row(own, capsys, tmp_path, fault, command):
    tables, told = FAULTS[fault]
    assert told in refused(capsys, command, own(**tables))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("table", ["interactions", "items"])
def test_an_empty_table(own, capsys, tmp_path, table):
    recipe = own()
    place = Path(yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["data"][table])
    if place.suffix == ".parquet":
        pandas.read_parquet(place).head(0).to_parquet(place, index=False)
    else:
        place.write_text(place.read_text(encoding="utf-8").splitlines()[0] * (place.suffix == ".csv"), encoding="utf-8")
    said = refused(capsys, "prepare", recipe)
    assert place.name in said and "it holds no rows" in said


def test_what_is_dropped_is_told(own, capsys):
    events = changed(changed(EVENTS, 4, timestamp="last Tuesday"), 0, item_id="z")
    recipe = own(events, changed(ITEMS, 2, title=""), data={"drop_invalid": True})
    assert main(["prepare", recipe]) == 0
    said = capsys.readouterr().out
    assert "items: column 'item_id': not an item with some text in title: 1\n" in said
    assert "interactions: column 'item_id': not an item of the items table: 4\n" in said  # z, and c three times
    assert "not a time (seconds or ISO 8601, one of them in all rows): 1\n" in said
    assert "\n  rows: 9\n" in said


def test_equal_labels_are_a_warning_and_then_an_error(own, capsys, tmp_path):
    recipe = own([{**event, "label": 1} for event in EVENTS], task={"learn": ["click"]})
    told = "all labels of 'click' are 1 in the training part: there is nothing to learn from them; task."
    assert main(["prepare", recipe]) == 0
    assert f"warning: {told}" in capsys.readouterr().out
    assert main(["finetune", recipe, "training.metric_for_best_model=click_auc"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("own", [".jsonl"], indirect=True)
def test_mixed_types_are_refused(own, capsys):
    events = [*EVENTS, {"user_id": 7, "item_id": "a", "timestamp": "2026-05-01"}]
    told = "interactions: column 'user_id' mixes types; write all its values as text or null"
    assert told in refused(capsys, "prepare", own(events))


def test_texts_that_look_like_numbers_stay_texts(own, capsys):
    more = [{"user_id": user, "item_id": "a", "timestamp": "2026-05-01"} for user in ("7", "007", "7.0")]
    assert main(["prepare", own([*EVENTS, *more])]) == 0
    assert "\n  users: 7\n" in capsys.readouterr().out


@pytest.mark.parametrize("own", [".csv"], indirect=True)
def test_the_template_runs_all_its_steps_and_a_user_with_one_event_gets_answers(own, capsys, tmp_path):
    recipe = own(pretraining={"output_dir": str(tmp_path / "first"), "valid_fraction": 0.5})
    assert main(["run", recipe]) == 0
    said = capsys.readouterr().out
    assert "users with one event: 1\n" in said and "users in train only: 1\n" in said
    assert "perplexity" in said and "popularity" in said and said.endswith(f"written to {tmp_path / 'run'}\n")
    assert main(["recommend", str(tmp_path / "run"), "--user", "once", "--top-k", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


EMBEDDER = ["model.freeze_segments=true", "model.config.bow_embeddings=true", "model.config.segment_pooling=mean"]
EMBEDDER += ["model.config.num_hidden_layers=5", "model.config.num_joint_layers=2"]
BEGINNINGS = {
    "converted": ["model.checkpoint={folder}/converted"],
    "converted, by an adapter": ["model.checkpoint={folder}/converted", "tuning.method=lora"],
    "backbone": ["model.backbone={folder}/llama", "model.config.num_joint_layers=2"],
    "embedder under new layers": ["model.backbone={folder}/bert", *EMBEDDER],
    "pretrained on texts": ["model.checkpoint={folder}/texts"],
}
"""As README and the recipes word them: what the template says of a model of its own gives way."""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Make what one may begin with: two published models, one of them converted, and a model pretrained on texts."""
    folder = tmp_path_factory.mktemp("published")
    publish(folder / "llama", "llama")
    publish(folder / "bert", "bert", tiny("bert", "BertModel"))
    joint = ["--num-joint-layers", "2"]
    assert main(["convert", str(folder / "llama"), str(folder / "converted"), *joint, "segment_summary=1"]) == 0
    for name, line in {"english": "a line of number {}", "chinese": "第{}行文字"}.items():
        (folder / f"{name}.txt").write_text("\n".join(line.format(row) for row in range(60)), encoding="utf-8")
    texts = json.dumps([str(folder / "english.txt"), str(folder / "chinese.txt")])
    given = [f"pretraining.texts={texts}", f"training.output_dir={folder / 'texts'}", "model.shape.hidden_size=32"]
    given += ["text.vocab_size=400", "pretraining.length=64", "training.max_steps=2", "training.bf16=false"]
    given += ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1"]
    assert main(["pretrain", "pretrain-text", *given, "training.use_cpu=true", "training.disable_tqdm=true"]) == 0
    return folder


@pytest.mark.parametrize("own", [".csv"], indirect=True)
@pytest.mark.parametrize("beginning", some(BEGINNINGS, ["converted, by an adapter", "embedder under new layers"]))
def test_the_template_begins_as_whatever_is_named(own, published, tmp_path, beginning):
    given = [entry.format(folder=published) for entry in BEGINNINGS[beginning]]
    assert main(["finetune", own(), *given]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["hidden_size"] == (32 if "texts" in beginning else 24)
    assert config["num_joint_layers"] == (3 if "texts" in beginning else 2)
    assert (config["num_hidden_layers"], config["segment_summary"]) == (
        {"pretrained on texts": 6, "embedder under new layers": 5}.get(beginning, 3),
        1,
    )
    assert main(["recommend", str(tmp_path / "run"), "--user", "once", "--top-k", "2"]) == 0
