"""A saved checkpoint loads with the package, without it by its own code, and from the Hub's cache, and is the same."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

from m6rec import (
    Catalogue,
    M6RecConfig,
    M6RecForRecommendation,
    M6RecProcessor,
    M6RecTokenizer,
    RecommendationPipeline,
)
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, build, processor

CODE = {"configuration", "modeling", "network", "pipeline", "catalogue", "processing", "tokenization"}
COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
WITHOUT_PACKAGE = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "m6rec":
            raise ImportError("the package is not here")

sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with model, processor and catalogue."""
    folder = tmp_path_factory.mktemp("hub") / "checkpoint"
    model, own = build(), processor()
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    Catalogue.from_dataset(ITEMS, model, own).save(folder / "catalogue")
    return folder


@pytest.fixture(scope="module")
def answers():
    """What every way of loading must answer."""
    model, own = build(), processor()
    recommend = RecommendationPipeline(
        model=model, processor=own, catalogue=Catalogue.from_dataset(ITEMS, model, own), device="cpu"
    )
    return ask(recommend)


def ask(recommend):
    """What is asked of each pipeline."""
    written = [recommend(SOURCE, task=task, top_k=2, max_new_tokens=4) for task in ("query", "next_item")]
    return [recommend(REQUEST, explain=True), recommend(SOURCE, top_k=3), recommend("a man", task="click"), written]


ASK = "\n" + inspect.getsource(ask)


@pytest.fixture
def in_cache(tmp_path, checkpoint):
    """An HF_HOME whose cache holds the checkpoint as org/m6rec, and another revision without catalogue."""
    repository = tmp_path / "home" / "hub" / "models--org--m6rec"
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    shutil.copytree(checkpoint, repository / "snapshots" / OTHER, ignore=shutil.ignore_patterns("catalogue"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "home"


def program(code, folder):
    """Code that has the requests and `ask`, for a process that works in a folder."""
    (folder / "given.json").write_text(json.dumps([REQUEST, SOURCE]))
    return "import json\nREQUEST, SOURCE = json.load(open('given.json'))\n" + ASK + textwrap.dedent(code)


def run(code, home, tmp_path):
    """Run code in a process of its own, with a folder of caches of its own; it returns `result`."""
    script = "import sys\n" + program(code, tmp_path) + "\njson.dump(result, open('result.json', 'w'))\n"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "result.json").read_text())


# ------------------------------------------------------------------------------------------------ with the package


def test_auto_classes_with_the_package(checkpoint):
    ids = torch.tensor(processor()([REQUEST])["input_ids"])
    expected = build().score(input_ids=ids)
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(checkpoint)
        assert type(model) is M6RecForRecommendation and torch.equal(model.score(input_ids=ids), expected)
    assert type(AutoConfig.from_pretrained(checkpoint)) is M6RecConfig
    assert type(AutoTokenizer.from_pretrained(checkpoint)) is M6RecTokenizer
    assert type(AutoProcessor.from_pretrained(checkpoint)) is M6RecProcessor


@pytest.mark.parametrize("how", [{}, {"pipeline_class": RecommendationPipeline}, {"trust_remote_code": True}])
def test_pipeline_with_the_package(checkpoint, answers, how):
    assert json.loads((checkpoint / "config.json").read_text())["custom_pipelines"]
    recommend = pipeline("recommendation", model=str(checkpoint), device="cpu", **how)
    assert type(recommend) is RecommendationPipeline
    assert ask(recommend) == answers


def test_a_pipeline_saves_all_that_makes_it_again(checkpoint, answers, tmp_path):
    first = pipeline("recommendation", model=str(checkpoint), device="cpu", local_files_only=True)
    first.save_pretrained(tmp_path / "again")
    recommend = pipeline("recommendation", model=str(tmp_path / "again"), device="cpu")
    assert ask(recommend) == answers


def test_a_checkpoint_without_catalogue_says_what_to_give(tmp_path):
    build().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    recommend = pipeline("recommendation", model=str(tmp_path), device="cpu")
    assert recommend.catalogue is None and recommend(REQUEST)
    with pytest.raises(ValueError, match=r"candidates.*catalogue"):
        recommend(SOURCE)


def test_a_damaged_catalogue_does_not_stop_what_needs_none(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    (tmp_path / "damaged" / "catalogue" / "items.parquet").write_bytes(b"")
    recommend = pipeline("recommendation", model=str(tmp_path / "damaged"), device="cpu")
    assert recommend(REQUEST)
    with pytest.raises(ValueError, match=r"items\.parquet"):
        recommend(SOURCE)


def test_an_adapter_folder(checkpoint, answers, tmp_path):
    """The base's catalogue is not the adapter's: its vectors have changed."""
    model = AutoModel.from_pretrained(checkpoint)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    expected = RecommendationPipeline(model=tuned, processor=processor(), device="cpu")(REQUEST)
    recommend = pipeline("recommendation", model=str(tmp_path / "adapter"), device="cpu")
    assert [row["item"] for row in recommend(REQUEST)] == [row["item"] for row in expected]
    for row, other in zip(recommend(REQUEST), expected):
        assert row["score"] == pytest.approx(other["score"], abs=1e-5)
    assert recommend(REQUEST) != answers[0]
    with pytest.raises(ValueError, match="catalogue"):
        recommend(SOURCE)


def test_what_travels_imports_only_what_travels(checkpoint):
    """Files of a checkpoint import their siblings, the standard library and what every user has."""
    everywhere = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
    everywhere |= sys.stdlib_module_names
    files = {path.name: path for path in checkpoint.glob("*.py")}
    assert {f"{name}_m6rec.py" for name in CODE} <= files.keys()
    for path in files.values():
        assert f"{path.stem}.py" in files and path.stem.endswith("_m6rec")
        tree = ast.parse(path.read_text())
        optional = {id(node) for branch in ast.walk(tree) if isinstance(branch, ast.Try) for node in ast.walk(branch)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files
            elif isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in optional:
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.partition(".")[0] for name in names} <= everywhere, path


# --------------------------------------------------------------------------------------------- without the package


def test_without_the_package(checkpoint, answers, tmp_path, fresh):
    code = (
        WITHOUT_PACKAGE
        + f"""
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

folder, trusted = {str(checkpoint)!r}, {{"trust_remote_code": True}}
autos = AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, AutoProcessor
names = [type(auto.from_pretrained(folder, **trusted)).__name__ for auto in autos]
recommend = pipeline("recommendation", model=folder, device="cpu", **trusted)
first = ask(recommend)
recommend.save_pretrained("again")
second = ask(pipeline(model="again", device="cpu", **trusted))
AutoModel.from_pretrained(folder, **trusted).save_pretrained("bare")
files = [sorted(path.name for path in Path(place).glob("*.py")) for place in (folder, "again", "bare")]
try:
    pipeline("recommendation", model=folder, trust_remote_code=False)
except ValueError as error:
    refused = str(error)
result = [names, first, second, files, refused, "m6rec" in sys.modules]
"""
    )
    result = fresh(program(code, tmp_path), tmp_path)
    assert isinstance(result, list), result
    names, first, second, (files, again, bare), refused, imported = result
    model = "M6RecForRecommendation"
    assert names == ["M6RecConfig", model, model, "M6RecTokenizer", "M6RecProcessor"] and not imported
    assert first == second == answers
    assert files == again and {"modeling_m6rec.py", "pipeline_m6rec.py", "catalogue_m6rec.py"} <= {*bare}
    assert "trust_remote_code=True" in refused
    assert type(AutoModel.from_pretrained(tmp_path / "again")) is M6RecForRecommendation


@pytest.mark.slow
def test_from_the_hubs_cache(in_cache, answers, tmp_path):
    code = """
from transformers import AutoModel, pipeline

recommend = pipeline("recommendation", model="org/m6rec", device="cpu", trust_remote_code=True)
origin = type(AutoModel.from_pretrained("org/m6rec", trust_remote_code=True)).__module__
other = pipeline("recommendation", model="org/m6rec", device="cpu", revision="f" * 40, trust_remote_code=True)
modules = [name.partition(".")[0] for name in (origin, type(recommend).__module__)]
result = [ask(recommend), other.catalogue is None, *modules]
"""
    own = run(WITHOUT_PACKAGE + code, in_cache, tmp_path)
    assert own == [answers, True, "transformers_modules", "transformers_modules"]
    installed = run("import m6rec\n" + code.replace(", trust_remote_code=True", ""), in_cache, tmp_path)
    assert installed == [answers, True, "m6rec", "m6rec"]
