"""`m6rec convert`, and recipes that begin with a published language model."""

import contextlib
import io
import json
import math
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

from m6rec import M6RecForRecommendation
from m6rec.tokenization import M6RecProcessor, M6RecTokenizer
from m6rec.train.cli import main
from m6rec.train.commands.convert import PARAGRAPHS, _advice, convert
from m6rec.train.runs.build import prepare
from tests.fast import some
from tests.modeling_m6rec.conversion.backbones import HEADS, batch, own_tokenizer, publish, tiny
from tests.train.world import recipe_of


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of tiny language models by family, as from the Hub."""
    folder = tmp_path_factory.mktemp("published")
    return {family: publish(folder / family, family) for family in HEADS}


def said(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def names(folder):
    return {path.name for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- the folder


def test_the_command_leaves_a_model_that_recommends(published, tmp_path):
    folder = tmp_path / "deep" / "ours"
    out = said("convert", published["bert"], folder, "--num-joint-layers", 2, "segment_summary=1", "text.domain=video")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    own, new = len(own_tokenizer("bert")), len(processor.tokenizer) - len(own_tokenizer("bert"))
    assert out.splitlines() == [
        f"bert, {model.num_parameters():,} parameters",
        "3 layers, the last 2 joint",
        f"{own} tokens of its own and {new} new ones",
        "writing head tied to the embeddings",
        "its first 1 layers read each given text of a request by itself, which they have not learnt: train it before "
        "it ranks (m6rec finetune); plain texts are continued as before",
        f"written to {folder}",
    ]
    assert type(model) is M6RecForRecommendation and type(processor) is M6RecProcessor
    assert (model.config.num_joint_layers, model.config.segment_summary) == (2, 1)
    assert model.config.vocab_size == len(processor.tokenizer) and isinstance(processor.tokenizer, M6RecTokenizer)
    assert processor.template == M6RecProcessor.from_template(processor.tokenizer, "video").template
    source = tiny("bert")
    ids = batch(own, "right", (6, 6))[0]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :own], source(ids).logits, rtol=1e-4, atol=1e-4)
    answer = pipeline("recommendation", model=str(folder))(
        {"user": "the cat", "history": ["shoes"], "candidates": ["the cat", "the shoes"]}, task="click"
    )
    assert sorted(row["item"] for row in answer) == ["the cat", "the shoes"]
    assert names(folder.parent) == {"ours"}, "nothing half written is left"


def test_without_segment_layers_nothing_has_to_be_learnt_first(published, tmp_path):
    assert "until it is trained" not in convert(published["llama"], tmp_path / "ours")


@pytest.mark.parametrize(
    "template", [None, "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"]
)
def test_the_chat_template_of_the_backbone_is_kept(published, tmp_path, template):
    source = shutil.copytree(published["llama"], tmp_path / "source")
    own = AutoTokenizer.from_pretrained(source)
    own.chat_template = template
    own.save_pretrained(source)
    convert(source, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(tokenizer) is M6RecTokenizer and tokenizer.chat_template == processor.tokenizer.chat_template
    if template:
        assert tokenizer.chat_template == template
        turns = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == "<user>hi"


@pytest.mark.parametrize("family", some(["gpt2", "llama"], ["gpt2"]))
def test_the_command_says_what_late_interaction_costs_writing(published, family, tmp_path):
    """Both figures are those of models that were converted so, measured by whole passes of their own."""
    given = {"text.max_length=512", "text.language=zh" if family == "llama" else "text.language=en"}
    figures = {}
    for setting in ("source", "segment"):
        out = convert(published[family], tmp_path / setting, 1, {*given, f"written_attention={setting}"})
        (line,) = [line for line in out.splitlines() if "perplexity" in line]
        figures[setting] = list(map(float, re.findall(r"\d+\.\d", line)))
        writes = AutoModel.from_pretrained(tmp_path / setting).config.trained_tasks
        assert writes == ["plausibility", "writing"] if setting == "source" else ["plausibility"]
        assert line.endswith(_advice(figures[setting][0] / figures[setting][1], setting))
    assert convert(published[family], tmp_path / "whole", None, given).count("perplexity") == 0

    def perplexity(folder):
        model, own = AutoModel.from_pretrained(tmp_path / folder), AutoProcessor.from_pretrained(tmp_path / folder)
        row = own.read(PARAGRAPHS["zh" if family == "llama" else "en"], "explanation")
        labels = own.labels(row)
        with torch.no_grad():
            logp = model(torch.tensor([row.input_ids]), plan="flat").logits[0].log_softmax(-1)
        told = [logp[place - 1, label] for place, label in enumerate(labels) if label != -100]
        assert len(told) > 20
        return math.exp(-sum(told) / len(told))

    for setting, (own, whole) in figures.items():
        assert own == pytest.approx(perplexity(setting), abs=0.06)
        assert whole == pytest.approx(perplexity("whole"), abs=0.06)
    assert figures["source"][0] != figures["segment"][0] != figures["segment"][1]


def test_advice_says_what_to_do():
    assert _advice(1.09, "source") == "late interaction costs its writing little"
    assert _advice(1.2, "source") == "fine-tune writing (task.learn=[writing]), or leave all layers joint"
    assert _advice(1.2, "segment").startswith("set written_attention=source, ")


def test_a_model_that_never_wrote_says_so(tmp_path):
    publish(tmp_path / "own", "bert", tiny("bert", "BertModel"))
    assert "no trained writing head" in convert(tmp_path / "own", tmp_path / "ours")
    publish(tmp_path / "apart", "llama")
    assert "writing head of its own" in convert(tmp_path / "apart", tmp_path / "ours")


def test_a_conversion_is_the_same_each_time(published, tmp_path):
    for name in ("one", "two"):
        convert(published["gpt2"], tmp_path / name, 1, ["text.max_length=512"])
        torch.rand(3)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_settings_reach_model_and_processor(published, tmp_path):
    given = ["dtype=bfloat16", "num_options=4", "--interactions=[buy]", "history_attention=bidirectional"]
    convert(published["qwen3"], tmp_path / "a", 1, [*given, "text.language=zh", "text.max_events=7"])
    model, processor = AutoModel.from_pretrained(tmp_path / "a"), AutoProcessor.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.bfloat16 and model.config.interactions == ["buy"]
    assert model.config.num_options == processor.tokenizer.structural_ids["num_options"] == 4
    assert (processor.time, processor.max_events, processor.max_length) == ("ago", 7, 1024)
    assert processor.template == M6RecProcessor.from_template(processor.tokenizer, language="zh").template


def test_only_what_a_conversion_wrote_is_replaced(published, tmp_path, capsys):
    folder = tmp_path / "ours"
    folder.mkdir()
    convert(published["llama"], folder)
    (folder / "stale").touch()
    convert(published["qwen2"], folder)
    assert "stale" not in names(folder) and names(tmp_path) == {"ours"}
    wanted = AutoModel.from_pretrained(folder).config.qkv_bias
    assert wanted, "Qwen2's"
    (folder / "recipe.yaml").touch()
    with pytest.raises(FileExistsError, match="ours' holds a trained model"):
        convert(published["llama"], folder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "dear diary").touch()
    for other in (tmp_path / "notes", published["llama"]):
        assert main(["convert", str(published["llama"]), str(other)]) == 2
        assert f"'{other}' holds something that is no M6Rec model" in capsys.readouterr().err
    assert names(tmp_path / "notes") == {"dear diary"}


def test_a_conversion_that_fails_leaves_what_was_there(published, tmp_path, monkeypatch):
    convert(published["llama"], tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(M6RecProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        convert(published["qwen2"], tmp_path / "ours")
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before
    assert names(tmp_path) == {"ours"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hidden_sise=3"], "model.config has unknown keys hidden_sise"),
        (["text.langage=zh"], "text has unknown keys langage"),
        (["hidden_size=7"], "hidden_size=7 contradicts the backbone, which has 24"),
        (["num_joint_layers=9"], r"num_joint_layers=9 is not in 1\.\.3"),
        (["text.language=xx", "text.max_length=512"], "'xx'"),
        ([], "text.max_length=1024, but the backbone knows 512 positions"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(overrides, message, published, tmp_path):
    with pytest.raises(Exception, match=message):
        convert(published["gpt2"], tmp_path / "ours", None, overrides)
    assert names(tmp_path) == set()


def test_an_unsupported_model_is_refused_with_the_list(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert "'t5' is not supported as a backbone; supported: bert, gpt2, llama" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_begins_with_a_backbone(published, make_recipe):
    config = {"num_joint_layers": 1, "segment_summary": 1, "embedding_dim": 12, "num_options": 2}
    run = prepare(make_recipe(model={"backbone": str(published["bert"]), "config": config, "item_embeddings": True}))
    assert {name: getattr(run.model.config, name) for name in config} == config
    assert run.model.dtype == torch.float32 and len(run.model.model.item_memory.weight) == 16
    for name, value in run.processor.tokenizer.structural_ids.items():
        assert getattr(run.model.config, name) == value, name
    own = len(own_tokenizer("bert"))
    wanted = tiny("bert").get_input_embeddings().weight
    assert torch.equal(run.model.get_input_embeddings().weight[:own], wanted)
    with pytest.raises(ValueError, match="num_attention_heads=6 contradicts the backbone, which has 4"):
        prepare(make_recipe(model={"backbone": str(published["bert"]), "config": {"num_attention_heads": 6}}))
    with pytest.raises(ValueError, match=r"text\.max_length=600, but the backbone knows 512 positions"):
        prepare(make_recipe(model={"backbone": str(published["gpt2"])}, text={"max_length": 600}))


def test_a_missing_writing_head_is_said_where_writing_is_learnt(make_recipe, tmp_path, caplog):
    publish(tmp_path / "own", "bert", tiny("bert", "BertModel"))
    model = {"backbone": str(tmp_path / "own")}
    prepare(make_recipe(model=model))
    assert "head that writes" not in caplog.text
    prepare(make_recipe(model=model, task={"learn": ["writing"], "writing": {"item_text": []}}))
    assert "own has no head that writes: it begins untrained" in caplog.text


@pytest.mark.parametrize("beginning", some(["checkpoint", "backbone"], ["checkpoint"]))
def test_two_steps_of_fine_tuning_from_a_recipe(beginning, published, tables, tmp_path):
    """From a converted folder, and from the language model at once."""
    start = published["bert"] if beginning == "backbone" else tmp_path / "converted"
    model = {beginning: str(start)}
    if beginning == "backbone":
        model["config"] = {"num_joint_layers": 1}
    else:
        said("convert", published["llama"], start, "--num-joint-layers", "1", "text.domain=video")
    tree = recipe_of(tables, tmp_path / "tuned", task={"learn": ["retrieval", "click"]})
    tree["model"] = model
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert "retrieval (" in said("finetune", tmp_path / "recipe.yaml")
    tuned = AutoModel.from_pretrained(tmp_path / "tuned")
    assert {"retrieval", "click"} <= set(tuned.config.trained_tasks)
    before = tiny("bert" if beginning == "backbone" else "llama")
    moved = tuned.model.embeddings.tokens.weight[: before.config.vocab_size] - before.get_input_embeddings().weight
    assert 0 < moved.abs().max() < 0.1, "it went on from the language model, two small steps"
