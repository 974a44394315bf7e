"""Saving and loading: everything comes back, also where the package is not installed."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest

from m6rec.tokenization import M6RecProcessor, load_template

REQUEST = {
    "user": {"gender": "女", "age": 31},
    "history": [
        {"event": "rate", "item": {"title": "大话西游", "item_id": 7}, "rating": 5, "timestamp": 100},
        {"event": "watch", "item": "A long [EOS] film", "timestamp": 90000},
    ],
    "now": {"date": "2024-02-01", "timestamp": 10**6},
    "candidates": [{"title": "Seven", "genres": ["Drama", "War"], "item_id": "b", "stats": {"ratings": 5}}],
}


@pytest.fixture
def special(tokenizer):
    """A processor none of whose settings is the default."""
    settings = {"max_length": 500, "max_events": 7, "time": "ago", "item_rows": {"7": 2, "b": 1}, "options": 3}
    settings |= {"truncation_stride": 2, "max_segment": 60}
    return M6RecProcessor.from_template(tokenizer, "video", "zh", **settings)


def test_save_and_load_is_exact(tmp_path, special):
    special.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert saved["template"] == load_template("video", "zh") and saved["item_rows"] == {"7": 2, "b": 1}
    again = M6RecProcessor.from_pretrained(tmp_path)
    for name in (
        "template",
        "max_length",
        "max_events",
        "time",
        "item_rows",
        "options",
        "truncation_stride",
        "max_segment",
    ):
        assert getattr(again, name) == getattr(special, name)
    assert again.read(REQUEST) == special.read(REQUEST)
    assert any(again.read(REQUEST).item_embedding_ids)


def test_an_edited_template_is_kept(tmp_path, tokenizer):
    template = copy.deepcopy(load_template())
    template["events"]["verbs"]["click"] = "tapped"
    M6RecProcessor(tokenizer, template=template).save_pretrained(tmp_path)
    reading = M6RecProcessor.from_pretrained(tmp_path).read({"history": ["socks"], "candidates": ["x"]})
    assert reading.segments[0] == ("event", "tapped")


def test_copies_and_pickles_read_alike_and_carry_no_memory(special):
    fresh = len(pickle.dumps(special))
    wanted = special.read(REQUEST)
    special.read({"candidates": [f"item number {number}" for number in range(100)]})
    for other in (pickle.loads(pickle.dumps(special)), copy.deepcopy(special)):
        assert other.read(REQUEST) == wanted
    assert len(pickle.dumps(special)) < fresh + 100, "else every step of datasets.map would get a new fingerprint"


@pytest.mark.slow
def test_remote_code_without_the_package(tmp_path, special):
    special.save_pretrained(tmp_path / "made")
    (tmp_path / "request.json").write_text(json.dumps(REQUEST), encoding="utf-8")
    tasks = ("click", "plausibility", "explanation", "retrieval")
    expected = {task: [special.read(REQUEST, task).input_ids, special.read(REQUEST, task).text] for task in tasks}
    (tmp_path / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    code = """
import importlib.abc, json, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "m6rec":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoProcessor, AutoTokenizer
read = lambda name: json.load(open(name, encoding="utf-8"))
for folder in ("made", "again"):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__ == "M6RecProcessor" and "m6rec" not in sys.modules
    assert type(tokenizer).__name__ == type(processor.tokenizer).__name__ == "M6RecTokenizer"
    assert tokenizer.structural_ids == processor.tokenizer.structural_ids
    for task, (ids, text) in read("expected.json").items():
        reading = processor.read(read("request.json"), task)
        assert reading.input_ids == ids and reading.text == text, (task, reading.text)
    batch = processor([read("request.json")] * 2, return_tensors="pt")
    assert batch["input_ids"].shape == batch["item_embedding_ids"].shape
    processor.save_pretrained("again")
try:
    type(processor)(tokenizer)
except ImportError as error:
    assert "template" in str(error)
else:
    raise AssertionError("there can be no default template without the package")
print("fine")
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "fine", done.stderr[-3000:]
    files = {path.name for path in (tmp_path / "again").glob("*.py")}
    names = "processing tokenization formatting values atomic".split()
    assert files == {f"{name}_m6rec.py" for name in names}
