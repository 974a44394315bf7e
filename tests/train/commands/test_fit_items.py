"""`m6rec fit --items`: a folder that recommends before there is any event, and counts the first ones."""

import json

import pandas
import pytest
from transformers import pipeline

import m6rec
from m6rec import Catalogue
from m6rec.catalogue_m6rec import TEXTS_ONLY
from m6rec.item_features_m6rec import Reader
from m6rec.train.answering.evidence import kept_evidence
from m6rec.train.cli import main
from m6rec.train.config.recipe import load_saved
from m6rec.train.data.log import items_log, read_log
from m6rec.train.evaluation.evidence import Evidence, EvidenceSettings
from tests.train.world import write_tables

WORDS = ["castle", "dragon", "rocket", "engine", "harbour", "boat"]
ITEMS = [
    {"sku": f"p{row}", "link": f"https://shop/{row}", "kind": "toy", "name": f"{WORDS[row % 6]} {row}"}
    for row in range(24)
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder that was fitted to items alone, and what was printed."""
    folder = tmp_path_factory.mktemp("fit")
    path = write_tables(folder, items=ITEMS)["items"]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *texts, **how: said.append(" ".join(map(str, texts))))
        assert main(["fit", "--items", path, str(folder / "shop")]) == 0
    return folder / "shop", "\n".join(said)


def test_columns_are_said_and_decisions_kept(fitted):
    folder, said = fitted
    assert "items: id sku; read as text: name; not read: link (addresses), kind (the same everywhere)" in said
    decisions = json.loads((folder / "fit.json").read_text())
    assert decisions["kept"] == "evidence" and "no events yet" in decisions["sentence"]
    assert kept_evidence(folder).settings.catalogue_rule.texts == TEXTS_ONLY.texts
    assert kept_evidence(folder).settings.catalogue_rule.words == TEXTS_ONLY.words


def test_the_pipeline_answers_from_texts_and_then_from_the_first_event(fitted, capsys):
    folder, _ = fitted
    recommend = pipeline("recommendation", model=str(folder))
    ship = recommend({"history": [{"event": "search", "query": "ship"}]}, top_k=3)
    assert {row["item"].split()[0] for row in ship} == {"boat"}, "the reader knows that a boat is a ship"
    assert main(["recommend", str(folder), "--request", "ship", "--top-k", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["item_id"] == ship[0]["item_id"]
    history = {"history": [{"item": {"item_id": "p0"}}]}
    alike = [row["item_id"] for row in recommend(history, top_k=3)]
    assert set(alike) == {"p6", "p12", "p18"}
    events = [{"user_id": "ann", "item_id": name} for name in ("p0", "p3")]
    assert recommend.catalogue.observe(events) == 2
    assert recommend(history, top_k=1)[0]["item_id"] == "p3"
    again = Catalogue.load(folder / "catalogue", recommend.model, journal=False)
    assert again.search(top_k=1, histories=[["p0"]])[0][0][0] == "p3", "what was observed is on the disk"
    again.forget("ann")
    assert [name for name, _ in again.search(top_k=3, histories=[["p0"]], exclude=[["p0"]])[0]] == alike


def test_the_scores_are_those_of_evidence_in_the_reports():
    texts = [item["name"] for item in ITEMS]
    settings = EvidenceSettings(texts=0.4)
    catalogue = Catalogue.from_dataset(
        [{"item_id": str(row), "name": text} for row, text in enumerate(texts)], evidence=settings.catalogue_rule
    )
    sequences = [[0, 1, 2], [2, 0]]
    catalogue.observe([{"user_id": user, "item_id": item} for user, own in enumerate(sequences) for item in own])
    histories = [[3, 0], [1]]
    found = Evidence(texts, sequences, settings).scores(histories)
    for own, scores in zip(catalogue.search(top_k=24, histories=histories), found):
        assert {int(name): score for name, score in own} == pytest.approx(dict(enumerate(scores)), abs=1e-6)


def test_from_python_without_events(tmp_path):
    shop = m6rec.fit(None, pandas.DataFrame(ITEMS), output_dir=tmp_path / "shop")
    assert (tmp_path / "shop" / "tables" / "given_items.parquet").is_file()
    first = pandas.DataFrame({"user_id": ["eve"], "sku": ["p0"]})
    assert set(shop.recommend(first, k=3)["item_id"]) == {"p6", "p12", "p18"}


def test_a_reader_of_ones_own(tmp_path):
    own = Reader.of(None)
    own.notice = "mine"
    own.save(tmp_path / "own.safetensors")
    path = write_tables(tmp_path, items=ITEMS)["items"]
    assert main(["fit", "--items", path, str(tmp_path / "shop"), "--reader", str(tmp_path / "own.safetensors")]) == 0
    assert Reader.of(tmp_path / "shop" / "catalogue" / "reader.safetensors").notice == "mine"


def test_items_without_events_are_refused_with_the_command_that_takes_them(fitted, tmp_path, capsys):
    folder, _ = fitted
    with pytest.raises(ValueError, match="m6rec fit --items ITEMS OUT makes a recommender of the items alone"):
        read_log(load_saved(folder).data)
    assert main(["recommend", str(folder), "--user", "ann"]) == 2
    assert main(["fit", "--items", "items.csv", "out", "more"]) == 2
    assert "--items FILE OUT takes one folder" in capsys.readouterr().err
    assert main(["fit", "events.csv", "items.csv", "out", "--reader", "file"]) == 2
    assert "--reader file goes with --items" in capsys.readouterr().err
    assert main(["fit", "--items", "items.csv", str(folder)]) == 2
    assert "holds a model" in capsys.readouterr().err
    table = write_tables(tmp_path, items=[{"a": "x", "b": "y"}, {"a": "x", "b": "y"}])["items"]
    assert main(["fit", "--items", table, str(tmp_path / "out")]) == 2
    assert "data.columns.item_id=COLUMN" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data\.items is missing"):
        items_log(type(load_saved(folder).data)())
