"""Adapters are found again: by PEFT, by the library, by us, in another process, in another place."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

from m6rec import M6RecForRecommendation
from m6rec.tuning import load_model, load_tuned, tune
from tests.fast import some
from tests.modeling_m6rec.tiny import BERT, build, close
from tests.modeling_m6rec.tuning.test_adapter import BLOCKS, TWO_STAGES, outputs, rows, shake
from tests.modeling_m6rec.tuning.test_methods import ADAPTERS, settings_of

VIRTUAL = ("prefix", "prompt")
KINDS = {**BLOCKS, "narrow": {**BLOCKS["shared"], "embedding_size": 20, "tie_word_embeddings": True}}


def saved(folder, method, settings=TWO_STAGES, base="pretrained"):
    """Save a base and an adapter of it as a run does; returns the PeftModel."""
    build(settings).save_pretrained(folder / base)
    model = M6RecForRecommendation.from_pretrained(folder / base)
    tuned = shake(tune(model, method, ["click", "retrieval"], **settings_of(method))).eval()
    tuned.save_pretrained(folder / "adapter")
    model.config.save_pretrained(folder / "adapter")
    return tuned


@pytest.mark.parametrize("block", ["narrow", "bert"])
@pytest.mark.parametrize("method", some(ADAPTERS, ["lora", "prefix", "option-adapter"]))
def test_every_way_to_load_gives_the_same_numbers(tmp_path, method, block):
    tuned = saved(tmp_path, method, KINDS[block])
    expected = outputs(tuned)
    base = AutoModel.from_pretrained(tmp_path / "pretrained")
    loaded = {"ours": load_tuned(tmp_path / "adapter"), "peft": PeftModel.from_pretrained(base, tmp_path / "adapter")}
    if method not in VIRTUAL:
        loaded["library"] = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert loaded["library"].fingerprint() == loaded["ours"].fingerprint()
    for model in loaded.values():
        found = outputs(model)
        close(found.scores, expected.scores, rtol=0, atol=1e-6)
        close(found.logits, expected.logits, rtol=0, atol=1e-6)
        close(found.user_vectors, expected.user_vectors, rtol=0, atol=1e-6)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert isinstance(load_model(tmp_path / "adapter"), PeftModel)
    assert isinstance(load_model(tmp_path / "pretrained"), M6RecForRecommendation)


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_need_their_own_door(tmp_path, method):
    saved(tmp_path, method)
    with pytest.raises(ValueError, match=rf"holds {method.upper()}_TUNING.*load_tuned"):
        AutoModel.from_pretrained(tmp_path / "adapter")


PROGRAM = """
import m6rec
assert "peft" not in sys.modules, "m6rec alone does not import PEFT"
import torch
from transformers import AutoModel, AutoModelForCausalLM
batch = torch.load(folder + "/batch")
if door == "peft":
    base = AutoModel.from_pretrained(folder + "/pretrained")
    from peft import PeftModel
    model = PeftModel.from_pretrained(base, folder + "/adapter")
else:
    model = AutoModelForCausalLM.from_pretrained(folder + "/adapter")
with torch.no_grad():
    torch.save(model.eval()(**batch).scores, folder + "/found")
result = "fine"
"""


@pytest.mark.parametrize("door", some(["peft", "library"], ["library"]))
def test_our_method_is_known_in_a_new_process(tmp_path, door, fresh):
    expected = outputs(saved(tmp_path, "option-adapter")).scores
    torch.save(rows(), tmp_path / "batch")
    assert fresh(f"folder, door = {str(tmp_path)!r}, {door!r}" + PROGRAM) == "fine"
    close(torch.load(tmp_path / "found"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["option", "prefix"])
def test_a_base_beside_its_adapter_moves_with_it(tmp_path, method):
    (tmp_path / "run").mkdir()
    tuned = saved(tmp_path / "run", method, base="base")
    (tmp_path / "run" / "base").rename(tmp_path / "run" / "adapter" / "base")
    (tmp_path / "run" / "adapter").rename(tmp_path / "moved")
    close(outputs(load_tuned(tmp_path / "moved")).scores, outputs(tuned).scores, rtol=0, atol=0)


def test_a_head_of_another_shape_comes_with_the_adapter(tmp_path):
    build(TWO_STAGES).save_pretrained(tmp_path / "pretrained")
    base = M6RecForRecommendation.from_pretrained(tmp_path / "pretrained")
    base.config.rating_values = [0.5, 1.0, 1.5]
    base.score_head = torch.nn.Linear(36, len(base.config.score_names))
    base.resize_item_embeddings(4)
    tuned = shake(tune(base, "lora", ["rating"], modules_to_save=["item_memory"]))
    tuned.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    batch = rows()
    batch["item_embedding_ids"] = torch.zeros_like(batch["input_ids"])
    batch["item_embedding_ids"][:, 3] = 2
    expected = outputs(tuned, batch).scores
    for model in (load_tuned(tmp_path / "adapter"), AutoModel.from_pretrained(tmp_path / "adapter")):
        assert model.config.rating_values == [0.5, 1.0, 1.5]
        close(outputs(model, batch).scores, expected, rtol=0, atol=0)


def test_what_does_not_belong_together_is_refused(tmp_path):
    saved(tmp_path, "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    build({**TWO_STAGES, **BERT, "hidden_size": 24}).save_pretrained(tmp_path / "wrong")

    def point_to(base):
        file.write_text(json.dumps({**settings, "base_model_name_or_path": base}))

    point_to(str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match="wrong' is not the base of the adapter"):
        load_tuned(tmp_path / "adapter")
    point_to(str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"the base '.*gone' of the adapter"):
        load_tuned(tmp_path / "adapter")
    point_to(None)
    with pytest.raises(ValueError, match="does not name its base"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="pretrained' holds no adapter"):
        load_tuned(tmp_path / "pretrained")


WITHOUT_PACKAGE = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "m6rec":
            raise ImportError("the package is not here")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModel, AutoModelForCausalLM

def load(folder, door):
    if door == "library":
        return AutoModelForCausalLM.from_pretrained(folder + "/adapter", trust_remote_code=True)
    from peft import PeftModel
    base = AutoModel.from_pretrained(folder + "/pretrained", trust_remote_code=True)
    return PeftModel.from_pretrained(base, folder + "/adapter")

for method, door in doors:
    folder = f"{place}/{method}"
    try:
        with torch.no_grad():
            found = load(folder, door).eval()(**torch.load(f"{place}/batch")).scores
    except ImportError as error:
        found = str(error)
    torch.save(found, folder + "/" + door)
result = "fine"
"""


def test_what_peft_knows_by_itself_needs_no_package(tmp_path, fresh):
    """All in one process, the ways to load that import PEFT themselves first."""
    doors = [("lora", "library"), ("ia3", "library"), ("lora", "peft"), ("option", "library")]
    expected = {}
    for method in ("lora", "ia3", "option"):
        expected[method] = outputs(saved(tmp_path / method, method)).scores
        for code in (tmp_path / method / "pretrained").glob("*.py"):
            shutil.copy(code, tmp_path / method / "adapter")
        shutil.copy(tmp_path / method / "pretrained" / "config.json", tmp_path / method / "adapter")
    torch.save(rows(), tmp_path / "batch")
    assert fresh(f"place, doors = {str(tmp_path)!r}, {doors!r}" + WITHOUT_PACKAGE) == "fine"
    for method, door in doors[:3]:
        close(torch.load(tmp_path / method / door), expected[method], rtol=0, atol=1e-6)
    assert "needs the package: pip install m6rec" in torch.load(tmp_path / "option" / "library")
