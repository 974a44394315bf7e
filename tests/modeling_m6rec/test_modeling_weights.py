"""A checkpoint is loaded whole or refused, and saved whole or not at all."""

import errno
import io
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, modeling_utils

from m6rec import M6RecForRecommendation, M6RecProcessor, RecommendationPipeline
from m6rec.network_m6rec import M6RecModel
from tests.modeling_m6rec.shop import ITEMS, REQUEST, build, processor

FILE = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    build().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder, change):
    weights = load_file(folder / FILE)
    change(weights)
    save_file(weights, folder / FILE, {"format": "pt"})


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    "names",
    [
        ["model.embed_event.weight"],
        ["model.embed_kind.weight"],
        ["score_head.weight", "score_head.bias"],
        ["user_projection.weight"],
        ["model.item_memory.weight"],
        ["model.layers.3.attention.output.weight"],
        ["model.embeddings.tokens.weight"],
    ],
    ids=lambda names: names[0],
)
def test_a_missing_weight_is_refused(checkpoint, names):
    known = load_file(checkpoint / FILE)
    names = [name for name in names if name in known] or [next(name for name in known if "layers.3" in name)]
    edit(checkpoint, lambda weights: [weights.pop(name) for name in names])
    for load in (M6RecForRecommendation.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=rf"damaged: it lacks {len(names)} of .*{names[0]}"):
            load(checkpoint)


def test_what_the_caller_adds_is_new_on_purpose(checkpoint):
    model = M6RecForRecommendation.from_pretrained(checkpoint, bow_embeddings=True, entry_norm=True)
    assert model.model.word_memory is not None
    plain = build(num_item_embeddings=0)
    plain.save_pretrained(checkpoint)
    model, info = M6RecForRecommendation.from_pretrained(checkpoint, num_item_embeddings=5, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.item_memory.weight"}
    edit(checkpoint, lambda weights: weights.pop("model.embed_event.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 of .*model\.embed_event\.weight"):
        M6RecForRecommendation.from_pretrained(checkpoint, num_item_embeddings=5)


def test_tied_weights_are_no_missing_ones(tmp_path):
    model = build(tie_word_embeddings=True, score_head="option")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / FILE)
    again = M6RecForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_the_heads_above_a_bare_network_are_new_on_purpose(tmp_path):
    M6RecModel(build().config).save_pretrained(tmp_path)
    _, info = M6RecForRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    assert "score_head.weight" in info["missing_keys"]
    edit(tmp_path, lambda weights: weights.pop("embed_event.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 of .*model\.embed_event\.weight"):
        M6RecForRecommendation.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_event.weight", "item_projection.weight", "score_head.bias"])
def test_a_weight_that_is_not_finite_is_refused(checkpoint, name, value):
    edit(checkpoint, lambda weights: weights[name].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=f"NaN or infinity in 1 of its weights, {name}"):
        M6RecForRecommendation.from_pretrained(checkpoint)


@pytest.mark.parametrize("task", ["click", "rating", "interaction", "retrieval", "plausibility"])
def test_weights_that_break_in_the_process_give_an_error_and_no_answer(task):
    model = build()
    recommend = RecommendationPipeline(model=model, processor=processor(), device="cpu")
    assert len(recommend(REQUEST, task=task)) == 4
    with torch.no_grad():
        for weight in model.model.layers[0].parameters():
            weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        recommend(REQUEST, task=task)


# -------------------------------------------------------------------------------------------------------------- saving


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_at(patch, count):
    """Let the disk be full at the file with this number; returns how many were begun."""
    begun = [0]

    def check(path):
        begun[0] += 1
        if begun[0] == count:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def opened(path, mode="r", *args, _open=open, **kwargs):
        if "w" in mode or "a" in mode:
            check(path)
        return _open(path, mode, *args, **kwargs)

    def copied(source, target, *args, _copy=shutil.copy, **kwargs):
        _copy(source, target, *args, **kwargs)
        with _open_plain(target, "r+b") as file:
            file.truncate(10)
        check(target)
        return _copy(source, target, *args, **kwargs)

    def saved(content, path, *args, _save=modeling_utils.safe_save_file, **kwargs):
        try:
            check(path)
        except OSError as error:
            raise SafetensorError(str(error)) from error
        return _save(content, path, *args, **kwargs)

    _open_plain = open
    patch.setattr("builtins.open", opened)
    patch.setattr(io, "open", opened)
    patch.setattr(shutil, "copy", copied)
    patch.setattr(modeling_utils, "safe_save_file", saved)
    return begun


@pytest.mark.parametrize("what", ["model", "processor"])
def test_a_full_disk_leaves_the_model_that_was_there(checkpoint, what):
    """Code files too: a cut one beside the old weights would keep these from being loaded."""
    processor().save_pretrained(checkpoint)
    before = tree(checkpoint)
    assert sum(name.endswith(".py") for name in before) > 10
    save = (build(seed=1) if what == "model" else processor(max_length=77)).save_pretrained
    for count in (1, 2, 3, *range(5, 1000, 7)):
        with pytest.MonkeyPatch.context() as patch:
            begun = full_at(patch, count)
            try:
                save(checkpoint)
            except OSError as error:
                assert "No space left on device" in str(error)
        if begun[0] < count:
            break
        assert tree(checkpoint) == before, count
    assert count > 5
    assert tree(checkpoint) != before
    assert len(AutoModel.from_pretrained(checkpoint).state_dict()) == len(build().state_dict())


def test_weights_in_pieces_do_not_outlive_their_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    (tmp_path / "notes.txt").write_text("mine")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    build(seed=1).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {FILE}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    model.save_pretrained(tmp_path, variant="half")
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {FILE, "model.half.safetensors"}
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert [path.name for path in (tmp_path / "nothing").iterdir() if path.suffix != ".safetensors"] == []


def test_what_is_saved_is_told_as_before(tmp_path):
    files = processor().save_pretrained(tmp_path / "own")
    assert [str(file) for file in files] == [str(tmp_path / "own" / "processor_config.json")]
    assert json.loads((tmp_path / "own" / "processor_config.json").read_text())["processor_class"] == "M6RecProcessor"
    again = M6RecProcessor.from_pretrained(tmp_path / "own")
    assert again.encode_items(ITEMS) == processor().encode_items(ITEMS)
