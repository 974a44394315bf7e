"""The page ranks by what a catalogue has counted exactly as the pipeline does, with or without the model."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest

from m6rec import Catalogue, Evidence, ItemWeights, RecommendationPipeline
from m6rec.train.commands.export import export
from m6rec.train.commands.page_evidence import Packed, evidence_files
from tests.modeling_m6rec.shop import ITEMS
from tests.modeling_m6rec.test_onnx_model import MODEL, PROCESSOR, SOURCE, same
from tests.web.node import run

EVENTS = [
    {"user_id": f"u{user}", "item_id": f"i{(user + step * step) % 9}", "timestamp": 1000.0 * step + user}
    for user in range(12)
    for step in range(6)
    if (user + step * step) % 9 != 2  # i2 has no events, i8 is not in the catalogue
]
WHOLE = Evidence(learnt=0, popularity=0.1, again=0.2, unseen=0.5, half_life=5000.0)
LINEAR = Evidence(learnt=0, again=0.3, linear=0.8)
PLAIN = Evidence(learnt=0, words=0, second=0, recency=(1.0,))
TIES = Evidence(learnt=0, share_ties=True, recency=(1.0, 0.7, 0.2))
NEW = {"title": "a steel tent", "category": "outdoor"}


def recommender(rule):
    catalogue = Catalogue.from_dataset(
        ITEMS, MODEL, PROCESSOR, progress=False, evidence=dataclasses.replace(rule, linear=0.0)
    )
    if rule.linear:
        table = np.random.default_rng(0).normal(size=(len(ITEMS), 3))
        columns = [np.random.default_rng(row).permutation(len(ITEMS))[:3] for row in range(len(ITEMS))]
        catalogue.set_evidence(rule, item_weights=ItemWeights.of_rows(np.array(columns), table))
    catalogue.observe(EVENTS)
    catalogue.remove(["i7"])  # rows of later items get other numbers, and i7 stays counted
    return RecommendationPipeline(model=MODEL, processor=PROCESSOR, device="cpu", catalogue=catalogue)


def saved(recommend, folder):
    MODEL.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    recommend.catalogue.save(folder / "catalogue")
    return str(folder)


def requests():
    """Requests with known, removed, unknown and repeated items, texts, searches, users and facts."""
    draw = random.Random(0)
    made = [SOURCE, "wool", {"user": {"name": "hiking fan", "user_id": "yoga", "age": 3}, "facts": ["a Red tent"]}, {}]
    for _ in range(60):
        history, moment = [], 1_700_000_000
        for _ in range(draw.randint(0, 9)):
            number = draw.randrange(10)
            known = [{"item": {"item_id": f"i{number}"}}, {"item": {"item_id": f"i{number}", "title": "wool İtem"}}]
            other = [{"item": "防水 wool socks"}, {"event": "searched", "query": "Steel 防水"}, {"event": "visited"}]
            history.append(draw.choice([known[number > 6], known[number > 6], known[1], *other]))
            moment += draw.choice([0, 0, 1])
            history[-1] |= draw.choice([{}, {"timestamp": moment}, {"timestamp": moment}])
        made.append({"history": history, **draw.choice([{}, {"user": "a yoga man"}])})
    return made


def floats(value):
    """Whole numbers as floats, which JSON does not tell apart."""
    if isinstance(value, dict):
        return {name: floats(own) for name, own in value.items()}
    return [floats(own) for own in value] if isinstance(value, list) else float(value) if type(value) is int else value


def scored(answers):
    """Answers with scores as floats."""
    return [[{**row, "score": float(row["score"])} for row in rows] for rows in answers]


def compared(recommend, page, tmp_path, bound):
    """Compare the answers of a page with the pipeline's, then those after adding an item."""
    given = {"requests": requests(), "explained": requests()[:12], "added": [["new", NEW]], "options": {"topK": 5}}
    (tmp_path / "requests.json").write_text(json.dumps(given))
    found = run("answers.mjs", page, tmp_path / "requests.json")
    same(scored(found["answers"]), recommend(requests(), top_k=5), bound)
    expected = recommend(requests()[:12], top_k=5, explain=True)
    for own, rows in zip(found["reasons"], expected, strict=True):
        for one, row in zip(own, rows, strict=True):
            without = [{name: value for name, value in each.items() if name != "texts"} for each in row["because"]]
            same(floats(one["because"]), without, bound)
    recommend.catalogue.add([{**NEW, "item_id": "new"}], recommend.model, recommend.processor)
    same(scored([found["after"]])[0], recommend(requests()[0], top_k=9), bound)


@pytest.mark.parametrize("rule", [WHOLE, PLAIN, LINEAR, TIES], ids=["whole", "plain", "linear", "ties"])
def test_a_page_without_a_model_ranks_by_evidence_as_the_pipeline(rule, tmp_path):
    recommend = recommender(rule)
    said = []
    export(saved(recommend, tmp_path / "shop"), tmp_path / "page", "web", "int8", say=said.append)
    files = {path.relative_to(tmp_path / "page").as_posix() for path in (tmp_path / "page").rglob("*")}
    assert not any("onnx" in name or name.startswith("vendor") for name in files), "no graph, no runtime"
    assert not any("by the static reader" in line for line in said)
    compared(recommend, tmp_path / "page", tmp_path, 1e-12)


@pytest.mark.slow
def test_a_page_ranks_by_model_and_evidence_as_the_pipeline(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, which fetches onnxruntime-web")
    recommend = recommender(Evidence(learnt=0.4, popularity=0.1, again=0.2, unseen=0.5))
    export(saved(recommend, tmp_path / "shop"), tmp_path / "page", "web")
    compared(recommend, tmp_path / "page", tmp_path, 1e-5)


def test_texts_that_the_page_does_not_compare_are_named(tmp_path):
    said = []
    recommend = recommender(Evidence(learnt=0, texts=0.3))
    export(saved(recommend, tmp_path / "shop"), tmp_path / "page", "web", say=said.append)
    assert any("does not compare texts" in line for line in said)
    manifest = json.loads((tmp_path / "page/model/manifest.json").read_text())
    assert manifest["evidence"]["rule"]["texts"] == 0.3  # the page then shows its note


def test_arrays_are_small_and_exact():
    packed = Packed()
    given = {
        "few": np.array([0.1, 0.7, 0.1, 0.1, 0.7, 0.1]),
        "many": np.array([0.1, 0.2, 0.3]),
        "small": np.array([3, 255]),
        "large": np.array([1 << 20]),
        "none": np.empty(0),
        "single": np.float32([0.1, -0.7]),
    }
    for name, values in given.items():
        packed.put(name, values)
    places = packed.places
    kinds = {name: places[name]["type"] for name in places}
    assert kinds == {
        **{"few.table": "float64", "few.places": "uint8", "many": "float64"},
        **{"small": "uint8", "large": "uint32", "none": "float64", "single": "float32"},
    }
    for place in places.values():
        assert place["start"] % 8 == 0
        values = np.frombuffer(packed.content, place["type"], place["length"], place["start"])
        assert len(values) == place["length"]
    own = np.frombuffer(packed.content, "<f8", 2, places["few.table"]["start"])
    assert own[np.frombuffer(packed.content, "u1", 6, places["few.places"]["start"])].tolist() == given["few"].tolist()


def test_counted_items_outside_the_catalogue_are_kept():
    counted = recommender(WHOLE).catalogue.counted()
    manifest, content, vocabulary = evidence_files(counted)
    assert set(manifest["outside"]) == {"i7", "i8"} and manifest["items"] == 9
    assert vocabulary == list(counted.words.vocabulary)
    place = manifest["arrays"]["numbers"]
    numbers = np.frombuffer(content, place["type"], place["length"], place["start"])
    assert [counted.names[number - 1] for number in numbers] == [f"i{number}" for number in range(7)]
