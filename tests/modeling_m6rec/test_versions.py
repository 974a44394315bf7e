"""Older checkpoints answer as they did; newer ones are refused here, and answer by the code that they carry."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, pipeline

from m6rec import Catalogue, M6RecConfig, M6RecForRecommendation, M6RecProcessor
from m6rec.catalogue_m6rec import FORMAT
from m6rec.configuration_m6rec import FORMAT_1, FORMAT_VERSION
from m6rec.processing_m6rec import FORMAT_VERSION as PROCESSOR_FORMAT
from m6rec.tuning import M6RecAdapterConfig
from tests.fixtures.make import REQUESTS, answers, numbers
from tests.modeling_m6rec.shop import ITEMS, build, processor
from tests.modeling_m6rec.test_hub import WITHOUT_PACKAGE, program
from tests.test_repository import ROOT

VERSIONS = sorted(path for path in (ROOT / "tests" / "fixtures").iterdir() if (path / "config.json").is_file())


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def older(request, tmp_path):
    """A folder with the checkpoint of an older version, and what it answered then."""
    shutil.copytree(request.param, tmp_path / "checkpoint")
    return tmp_path / "checkpoint", json.loads((request.param / "expected.json").read_text(encoding="utf-8"))


def same(found, expected):
    """Alike, whatever is inside, and numbers at 1e-5; not more exactly, since processors round differently."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-5, abs=1e-5) if isinstance(expected, float) else expected)


# -------------------------------------------------------------------------------------------------- older checkpoints


def test_a_fixture_would_show_a_change():
    """What was kept is no blank: answers differ among candidates, users and tasks, and each number was finite."""
    for folder in VERSIONS:
        kept = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        scores = [row["score"] for row in kept["answers"][0]]
        assert max(scores) - min(scores) > 1e-3 and len(kept["answers"][1]) == 3
        assert all(abs(event["contribution"]) > 1e-4 for event in kept["answers"][0][0]["because"])
        assert torch.tensor(kept["numbers"]["conversation"]["values"]).std() > 0.1
        assert kept["adapter"]["values"] != kept["numbers"]["click"]["values"]
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 200_000


def test_an_older_checkpoint_gives_the_same_numbers(older):
    folder, expected = older
    model, own = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is M6RecForRecommendation and type(own) is M6RecProcessor
    found = numbers(model, own)
    for task, was in expected["numbers"].items():
        assert found[task]["input_ids"] == was["input_ids"], task
        assert same(found[task]["values"], was["values"]), task


@pytest.fixture
def whole_texts(monkeypatch):
    """Plausibility of whole texts, with the template's words, as version 0.1 computed it."""
    monkeypatch.setattr(M6RecProcessor, "plausibility_lead", lambda self: [])


def test_an_older_checkpoint_answers_alike_from_its_catalogue(older, whole_texts):
    folder, expected = older
    recommend = pipeline("recommendation", model=str(folder), device="cpu")
    assert same(answers(recommend), expected["answers"])
    catalogue = Catalogue.load(folder / "catalogue", recommend.model)  # the model's fingerprint is the same, too
    assert same(catalogue.vectors(list(catalogue)).tolist(), expected["item_vectors"])
    catalogue.encode(recommend.model, recommend.processor, progress=False)
    assert same(catalogue.vectors(list(catalogue)).tolist(), expected["item_vectors"])


def test_an_older_adapter_gives_the_same_scores(older):
    folder, expected = older
    tuned = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(folder), folder / "adapter").eval()
    assert same(numbers(tuned, AutoProcessor.from_pretrained(folder))["click"], expected["adapter"])


def test_an_older_checkpoint_that_is_saved_again_is_of_the_oldest_format_that_holds_it(older, tmp_path, whole_texts):
    folder, expected = older
    recommend = pipeline("recommendation", model=str(folder), device="cpu")
    recommend.save_pretrained(tmp_path / "again")
    for name, known in (("config.json", 1), ("processor_config.json", PROCESSOR_FORMAT)):
        assert json.loads((tmp_path / "again" / name).read_text())["format_version"] == known
    again = pipeline("recommendation", model=str(tmp_path / "again"), device="cpu")
    assert same(answers(again), expected["answers"])


# -------------------------------------------------------------------------------------------------- newer checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of today, with its code and a catalogue."""
    model, own = build(), processor()
    model.save_pretrained(tmp_path / "newer")
    own.save_pretrained(tmp_path / "newer")
    Catalogue.from_dataset(ITEMS, model, own, progress=False).save(tmp_path / "newer" / "catalogue")
    return tmp_path / "newer"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} no longer holds {old!r} once"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def newer(checkpoint):
    """What a version to come might save: another format, settings of types unknown today, and code that reads both."""
    edit(checkpoint / "config.json", format_version=FORMAT_VERSION + 1, joint_positions={"kind": "spiral"})
    edit(checkpoint / "processor_config.json", format_version=PROCESSOR_FORMAT + 1, max_length="long")
    edit(checkpoint / "catalogue" / "catalogue.json", format=FORMAT + 1)
    code = checkpoint / "configuration_m6rec.py"
    replace(code, f"\nFORMAT_VERSION = {FORMAT_VERSION}\n", f"\nFORMAT_VERSION = {FORMAT_VERSION + 1}\n")
    old = "        return super().from_dict(rename_keys(config_dict), **rename_keys(kwargs))\n"
    replace(code, old, '        config_dict = {**config_dict, "joint_positions": "request"}\n' + old)
    code = checkpoint / "processing_m6rec.py"
    replace(code, f"\nFORMAT_VERSION = {PROCESSOR_FORMAT}\n", f"\nFORMAT_VERSION = {PROCESSOR_FORMAT + 1}\n")
    replace(
        code,
        "        fields = rename_keys(processor_dict)\n",
        '        fields = {**processor_dict, "max_length": 1024}\n',
    )
    replace(checkpoint / "catalogue_m6rec.py", f"\nFORMAT = {FORMAT}\n", f"\nFORMAT = {FORMAT + 1}\n")
    return checkpoint


WAYS = {
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "M6RecConfig": M6RecConfig.from_pretrained,
    "M6RecForRecommendation": M6RecForRecommendation.from_pretrained,
    "trusted": lambda folder: AutoModel.from_pretrained(
        folder, trust_remote_code=True
    ),  # the package's code goes first
    "pipeline": lambda folder: pipeline("recommendation", model=str(folder)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_newer_checkpoint_is_refused(newer, way):
    message = (
        rf"config\.json is of format {FORMAT_VERSION + 1}\b.*up to {FORMAT_VERSION}\..*upgrade m6rec.*trust_remote_code"
    )
    with pytest.raises(ValueError, match=message):
        WAYS[way](newer)


@pytest.mark.parametrize("auto", [AutoProcessor, M6RecProcessor])
def test_a_newer_processor_is_refused(newer, auto):
    message = (
        rf"processor_config\.json is of format {PROCESSOR_FORMAT + 1}\b.*up to {PROCESSOR_FORMAT}\..*upgrade m6rec"
    )
    with pytest.raises(ValueError, match=message):
        auto.from_pretrained(newer)


def test_a_newer_catalogue_is_refused(newer):
    with pytest.raises(
        ValueError, match=rf"catalogue\.json is of format {FORMAT + 1}\b.*up to {FORMAT}\..*upgrade m6rec"
    ):
        Catalogue.load(newer / "catalogue")


def test_a_newer_adapter_is_refused(tmp_path):
    M6RecAdapterConfig(r=3).save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 3
    edit(tmp_path / "adapter_config.json", format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=rf"adapter_config\.json is of format {FORMAT_VERSION + 1}\b"):
        peft.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("found", ["2.0", None, 0])
def test_what_is_no_format_is_called_damaged(checkpoint, found):
    edit(checkpoint / "config.json", format_version=found)
    with pytest.raises(ValueError, match=f"config.json is damaged.*{found!r}"):
        AutoModel.from_pretrained(checkpoint)


def test_a_newer_checkpoint_answers_by_its_own_code(newer, tmp_path, fresh):
    """In a process without the package, as its message says."""
    code = (
        WITHOUT_PACKAGE
        + f"""
from transformers import AutoModel, pipeline

recommend = pipeline("recommendation", model={str(newer)!r}, device="cpu", trust_remote_code=True)
import sys

own = sys.modules[type(recommend.model.config).__module__]
result = [ask(recommend), own.FORMAT_VERSION, type(recommend.model).__module__]
"""
    )
    result = fresh(program(code, tmp_path), tmp_path)
    assert isinstance(result, list), result
    shutil.rmtree(newer)
    model, own = build(), processor()
    catalogue = Catalogue.from_dataset(ITEMS, model, own, progress=False)
    recommend = pipeline("recommendation", model=model, processor=own, catalogue=catalogue, device="cpu")
    given = json.loads((tmp_path / "given.json").read_text())
    expected = [recommend(given[0], explain=True), recommend(given[1], top_k=3), recommend("a man", task="click")]
    expected.append([recommend(given[1], task=task, top_k=2, max_new_tokens=4) for task in ("query", "next_item")])
    assert result[0] == expected and result[1] == FORMAT_VERSION + 1 and result[2].startswith("transformers_modules.")


def test_only_what_older_code_would_misread_is_of_a_newer_format():
    assert build().config.to_dict()["format_version"] == 1
    new = {
        "written_attention": "source",
        "norm_position": "both",
        "embedding_scale": 2.0,
        "attention_scale": 0.5,
        "local_layers": [1],
    }
    assert set(FORMAT_1) == set(new)
    for name, value in new.items():
        assert value not in FORMAT_1[name] and getattr(build().config, name) in FORMAT_1[name]
        assert build(local_window=2, **{name: value}).config.to_dict()["format_version"] == FORMAT_VERSION == 2


def test_fields_of_a_newer_version_with_the_same_format_are_kept_and_written_again(checkpoint, tmp_path):
    """The rule: what may be ignored raises no number, so that here it is ignored, and not lost."""
    ids = torch.tensor(processor()([REQUESTS[1]])["input_ids"])
    expected = AutoModel.from_pretrained(checkpoint)(ids).logits
    edit(checkpoint / "config.json", from_the_future={"depth": 3})
    edit(checkpoint / "processor_config.json", from_the_future=4)
    model, own = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert torch.equal(model(ids).logits, expected) and own([REQUESTS[1]])["input_ids"] == ids.tolist()
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["from_the_future"] == {"depth": 3}
