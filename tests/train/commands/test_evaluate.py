"""`m6rec evaluate`: the run's own data wherever it is called, figures that are never lost, each text read once."""

import json
import shutil

import pandas
import pytest
import yaml

from m6rec.segment_cache_m6rec import SegmentCache
from m6rec.train.cli import main
from m6rec.train.commands import evaluate as measuring
from m6rec.train.commands.evaluate import evaluate
from m6rec.train.config.locations import located, log_digest
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import finetune, full_report
from tests.train.world import recipe_of, write_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose recipe names its tables by paths that are relative to the folder of a project."""
    place = tmp_path_factory.mktemp("finished") / "project"
    write_world(place / "data")
    names = {name: f"data/{name}.csv" for name in ("interactions", "items", "users")}
    tree = recipe_of(names, "runs/plain", text={"max_events": 4})
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        finetune(load_recipe("recipe.yaml"))
    return place


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of it, as if it had been made where it is."""
    place = shutil.copytree(finished, tmp_path / "project")
    recipe = place / "runs" / "plain" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished), str(place)))
    monkeypatch.chdir(place)
    return place


def quiet(text):
    """Take what is printed."""


def kept(folder):
    return {name: (folder / name).read_text() for name in ("metrics.json", "recipe.yaml")}


def test_a_run_finds_its_own_data_from_every_folder(project, tmp_path, monkeypatch, capsys):
    run, other = project / "runs" / "plain", tmp_path / "other"
    before = kept(run)
    shutil.copytree(project / "data", other / "data")
    log = pandas.read_csv(other / "data" / "interactions.csv")
    log["item_id"] = log["item_id"].iloc[::-1].to_numpy()
    log.to_csv(other / "data" / "interactions.csv", index=False)
    monkeypatch.chdir(other)
    assert main(["evaluate", "../project/runs/plain"]) == 0
    assert kept(run) == before and not (run / "evaluation.json").exists()
    assert main(["recommend", "../project/runs/plain", "--user", "u3"]) == 0
    assert load_recipe(run).data.interactions == str(project / "data" / "interactions.csv")


def test_a_project_that_moved_is_named_and_can_be_found_again(project, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "moved"
    project.rename(moved)
    monkeypatch.chdir(moved)
    before = kept(moved / "runs" / "plain")
    assert main(["evaluate", "runs/plain"]) == 2
    error = capsys.readouterr().err
    for name in ("interactions", "items", "users"):
        assert f"data.{name}={project}/data/{name}.csv" in error
    assert "data.interactions=PATH" in error and "not there any more" in error
    found = [f"data.{name}=data/{name}.csv" for name in ("interactions", "items", "users")]
    assert main(["evaluate", "runs/plain", *found]) == 0
    assert kept(moved / "runs" / "plain") == before


@pytest.mark.parametrize("table", ["interactions", "items", "users"])
def test_changed_data_never_replace_the_metrics_of_the_run(project, table, caplog):
    run, path = project / "runs" / "plain", project / "data" / f"{table}.csv"
    before = kept(run)
    frame = pandas.read_csv(path)
    if table == "interactions":
        frame = frame.iloc[: len(frame) - 1]
    elif table == "items":
        frame.loc[0, "title"] = "Another title"
    else:
        frame.loc[0, "gender"] = "other"
    frame.to_csv(path, index=False)
    evaluate(run, [], quiet)
    assert kept(run) == before and "the data are others than those of the run" in caplog.text
    assert json.loads((run / "evaluation.json").read_text())["overrides"] == []
    said = "events then" if table == "interactions" else "as many users, items and events"
    assert said in caplog.text


def test_figures_that_cannot_be_saved_are_printed(project, monkeypatch, caplog):
    run = project / "runs" / "plain"
    before, printed = kept(run), []

    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(measuring, "write_json", refuse)
    evaluate(run, [], printed.append)
    assert "retrieval (" in printed[0] and "m6rec" in printed[0] and kept(run) == before
    assert "is not saved as" in caplog.text and "You have no permission to write into" in caplog.text


def test_held_out_events_that_the_model_has_learnt_are_counted(project, caplog):
    run = project / "runs" / "plain"
    evaluate(run, [], quiet)
    assert "its figures are no test" not in caplog.text
    report = evaluate(run, ["evaluation.protocol=time", "evaluation.test_fraction=0.3"], quiet)
    learnt = report["retrieval"]["m6rec"]["learnt"]
    assert learnt > 0 and f"{learnt} of the" in caplog.text and "its figures are no test" in caplog.text


def test_only_what_exists_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("i.csv", "t.txt", "parts-1.parquet"):
        (tmp_path / name).write_text("x")
    for name in ("saved", "films", "items"):
        (tmp_path / name).mkdir()
    tree = {
        "data": {"interactions": "i.csv", "items": "org/items:train", "users": "saved:train"},
        "model": {"checkpoint": "films", "backbone": None},
        "pretraining": {"texts": {"t.txt#body": 1.0, "items": 2.0, "org/texts": 1.0}},
        "task": {"replay": ["films", "gone"], "dialogues": "parts-*.parquet"},
    }
    here = str(tmp_path)
    assert located(tree) == {
        "data": {
            "interactions": f"{here}/i.csv",
            "items": "org/items:train",
            "users": f"{here}/saved:train",
        },
        "model": {"checkpoint": f"{here}/films", "backbone": None},
        "pretraining": {"texts": {f"{here}/t.txt#body": 1.0, "items": 2.0, "org/texts": 1.0}},
        "task": {"replay": [f"{here}/films", "gone"], "dialogues": f"{here}/parts-*.parquet"},
    }
    assert located(located(tree)) == located(tree) and tree["data"]["interactions"] == "i.csv"


def test_the_digest_of_a_log(make_recipe):
    first, second = (prepare(make_recipe()).log for _ in range(2))
    assert log_digest(first) == log_digest(second)
    second.interactions.loc[3, "timestamp"] += 1
    assert log_digest(first) != log_digest(second)


def test_what_is_measured_reads_each_text_once(make_recipe, monkeypatch):
    read = []

    class Watched(SegmentCache):
        def put(self, owner, segment, states):
            read.append(segment)
            super().put(owner, segment, states)

    monkeypatch.setattr("m6rec.train.runs.finetune.SegmentCache", Watched)
    run = prepare(make_recipe(task={"learn": ["retrieval", "click"]}))
    assert not run.base_model.model.segments_are_frozen
    full_report(run)
    assert len(read) > len(run.writer.items) and len(read) == len(set(read))
    assert run.segment_cache is None, "what is trained after it is not read through it"
