"""The command line: every command on a small world, one after the other, and what is said when it cannot be done."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import warnings

import datasets
import pandas
import pytest
import yaml
from huggingface_hub.errors import StrictDataclassError

from m6rec import Catalogue, M6RecForRecommendation
from m6rec.train.cli import main
from m6rec.train.config.recipe import RECIPES, load_recipe
from m6rec.train.evaluation.tables import tables
from tests.fast import some
from tests.train.world import TITLES, recipe_of

COMMANDS = ("pretrain", "finetune", "evaluate", "recommend", "quickstart")


def said(*arguments):
    """Run a command that must succeed; return what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def chain(tables_of_world, tmp_path_factory):
    """A recipe in a file, what it pretrained and what went on from that, two steps each, with what was printed."""
    folder = tmp_path_factory.mktemp("chain")
    recipe, pretrained, tuned = folder / "recipe.yaml", folder / "pretrained", folder / "tuned"
    tree = recipe_of(tables_of_world, folder / "unused", task={"learn": ["retrieval", "click"]})
    tree["pretraining"] = {"valid_fraction": 0.2}
    del tree["training"]["disable_tqdm"]
    recipe.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    first = said("pretrain", recipe, f"training.output_dir={pretrained}")
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        second = said("finetune", recipe, f"model.checkpoint={pretrained}", f"--training.output_dir={tuned}")
    return recipe, pretrained, tuned, first, second, errors.getvalue()


@pytest.fixture(scope="module")
def tables_of_world(tables, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
        yield tables


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- one by one


def test_pretrain_then_finetune_leave_models_and_say_how_good_they_are(chain):
    _, pretrained, tuned, first, second, _ = chain
    assert [line.split()[:2] for line in first.splitlines()[-4:]] == [
        ["text", "perplexity"],
        ["infilling", "perplexity"],
        ["item", "perplexity"],
        ["written", "to"],
    ]
    assert first.endswith(f"written to {pretrained}\n") and second.endswith(f"written to {tuned}\n")
    for folder in (pretrained, tuned):
        names = {path.name for path in folder.iterdir()}
        assert names >= {"config.json", "model.safetensors", "processor_config.json", "recipe.yaml", "metrics.json"}
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    report = read_json(tuned / "metrics.json")
    assert list(report) == ["retrieval", "click"]
    assert tables(report) in second
    tasks = M6RecForRecommendation.from_pretrained(tuned).config.trained_tasks
    assert tasks == ["click", "plausibility", "retrieval", "writing"]
    assert load_recipe(tuned).model.checkpoint == str(pretrained)


def test_finetune_leaves_a_catalogue_to_recommend_from(chain):
    _, _, tuned, *_ = chain
    catalogue = Catalogue.load(tuned / "catalogue", M6RecForRecommendation.from_pretrained(tuned))
    assert [catalogue.fields(name)["title"] for name in catalogue] == TITLES


def test_evaluate_measures_the_saved_model_again(chain):
    _, _, tuned, _, second, _ = chain
    before = read_json(tuned / "metrics.json")
    (tuned / "metrics.json").unlink()
    printed = said("evaluate", tuned)
    assert read_json(tuned / "metrics.json") == before
    assert printed == tables(before) + "\n"
    assert printed in second
    otherwise = said("evaluate", tuned, "evaluation.exclude_seen=false", "--evaluation.max_users=5")
    assert "retrieval (5 examples, " in otherwise and ", seen items in)" in otherwise
    measured = read_json(tuned / "evaluation.json")
    assert measured.pop("overrides") == ["evaluation.exclude_seen=false", "--evaluation.max_users=5"]
    assert tables(measured) + "\n" == otherwise
    assert read_json(tuned / "metrics.json") == before  # what the training measured stays
    assert said("evaluate", tuned) == printed


def test_recommend_to_a_user_of_the_log(chain):
    _, _, tuned, *_ = chain
    answer = json.loads(said("recommend", tuned, "--user", "u3", "--top-k", "4", "--explain"))
    drawn = ("--task", "query", "--max-new-tokens", "3", "--temperature", "1.5", "--seed", "1")
    texts = [json.loads(said("recommend", tuned, "--user", "u3", *drawn)) for _ in range(2)]
    assert texts[0] == texts[1] and set(texts[0][0]) == {"text", "logprob", "finish"}
    explained = json.loads(said("recommend", tuned, "--user", "u3", "--explain", "text", "--top-k", "1"))
    assert {"because", "text"} <= set(explained[0])
    log = pandas.read_csv(load_recipe(tuned).data.interactions)
    seen = set(log[log["user_id"] == "u3"]["item_id"])
    assert [row["rank"] for row in answer] == [1, 2, 3, 4]
    assert seen.isdisjoint(row["item_id"] for row in answer)
    assert all({reason["item_id"] for reason in row["because"]} <= seen for row in answer)
    assert len(json.loads(said("recommend", tuned, "--user", "u3"))) == min(10, 15 - len(seen))


def test_recommend_for_a_request(chain):
    _, _, tuned, *_ = chain
    request = json.dumps({"history": [{"item": "红色港湾"}], "candidates": ["退潮", "Low Tide"]})
    out = said("recommend", tuned, "--request", request, "--task", "click")
    answer = json.loads(out)
    assert {row["item"] for row in answer} == {"退潮", "Low Tide"} and "退潮" in out
    assert all(0 < row["score"] < 1 and "because" not in row for row in answer)
    assert len(json.loads(said("recommend", tuned, "--request", "a woman in her thirties", "--top-k", 2))) == 2


def test_recommend_for_a_file_of_requests(chain, tmp_path):
    _, _, tuned, *_ = chain
    (tmp_path / "in.jsonl").write_text('"一位女性"\n{"history": [{"item": "退潮"}]}\n', encoding="utf-8")
    pandas.DataFrame({"user": ["一位女性", None], "history": [None, [{"item": "退潮"}]]}).to_parquet(
        tmp_path / "in.parquet"
    )
    texts = []
    for name in ("in.jsonl", "in.parquet"):
        output = tmp_path / f"{name}.jsonl"
        printed = said(
            "recommend", tuned, "--input", tmp_path / name, "--output", output, "--batch-size", 1, "--top-k", 3
        )
        assert printed == f"2 requests answered in {output}\n"
        texts.append(output.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert [len(json.loads(line)["answer"]) for line in texts[0].splitlines()] == [3, 3]


@pytest.mark.parametrize(
    "order",
    [
        ["{model}", "data.seed=1", "data.seed=2", "--user", "u3"],
        ["{model}", "data.seed=1", "--user", "u3", "data.seed=2"],
        ["--user", "u3", "{model}", "data.seed=1", "--data.seed=2"],
        ["--user", "u3", "{model}", "--data.seed=1", "data.seed=2"],
        ["--data.seed=1", "--user", "u3", "--data.seed=2", "{model}"],
    ],
)
def test_overrides_may_stand_anywhere_with_dashes_or_without(chain, monkeypatch, order):
    given = []
    monkeypatch.setattr(
        "m6rec.train.answering.loading.user_request",
        lambda model, user, overrides: given.append((user, overrides)) or user,
    )
    said("recommend", *[argument.format(model=chain[2]) for argument in order])
    ((user, overrides),) = given
    assert user == "u3"
    assert [entry.removeprefix("--") for entry in overrides] == ["data.seed=1", "data.seed=2"], "the last one wins"


# ----------------------------------------------------------------------------------------------------------- errors


def refused(capsys, *arguments):
    """Run a command that must fail; return its message."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=3", "training has unknown keys epochs"),
        ("learning_rate=1e-3", "the recipe has unknown keys learning_rate"),
        ("model.config.hiden_size=3", "model.config has unknown keys hiden_size"),
        ("task.learn=[fly]", "task.learn is ['fly']"),
        ("training.learning_rate=fast", "training.learning_rate is 'fast' (str); expected float"),
        ("data.items=nowhere.csv", "nowhere.csv"),
        ("training.learning_rate", "'training.learning_rate' is no override; write section.key=value"),
        ("--lerning", "'--lerning' is no override"),
        ("model.config.num_joint_layers=9", "num_joint_layers=9 is not in 1..4"),
        ("model.config.history_attention=sideways", "history_attention"),
    ],
)
def test_what_a_recipe_cannot_mean_is_said_without_a_traceback(chain, capsys, override, message):
    for command in ("finetune", "pretrain"):
        error = refused(capsys, command, chain[0], override)
        assert message in error.partition(f"m6rec {command}: ")[2]


def test_what_is_missing_is_named(chain, capsys, tmp_path):
    _, _, tuned, *_ = chain
    assert "there is no recipe 'nowhere'" in refused(capsys, "finetune", "nowhere")
    assert "there is no recipe" in refused(capsys, "evaluate", tmp_path)
    assert str(tmp_path) in refused(capsys, "recommend", tmp_path, "--request", "a man")
    for missing in (str(tmp_path / "nowhere"), "nowhere/at-all"):
        assert f"{missing!r} is no folder of a model" in refused(capsys, "recommend", missing, "--request", "a man")
    assert "user 'u99' is not in the log" in refused(capsys, "recommend", tuned, "--user", "u99")
    assert "gone.jsonl" in refused(
        capsys, "recommend", tuned, "--input", "gone.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert not (tmp_path / "out.jsonl").exists()
    assert "ml-100k.inter is missing" in refused(capsys, "quickstart", "--data", tmp_path, "--output", tmp_path / "q")


def test_requests_that_cannot_be_answered_are_said(chain, capsys, tmp_path):
    tuned = chain[2]
    assert "task='fly' is unknown" in refused(capsys, "recommend", tuned, "--request", "a", "--task", "fly")
    assert "top_k=0" in refused(capsys, "recommend", tuned, "--request", "a", "--top-k", "0")
    assert "unknown key 'histroy'" in refused(capsys, "recommend", tuned, "--request", '{"histroy": []}')
    assert "no valid JSON" in refused(capsys, "recommend", tuned, "--request", '{"history": [')
    assert "history: expected a list" in refused(capsys, "recommend", tuned, "--request", '{"history": 3}')
    assert "go together" in refused(capsys, "recommend", tuned, "--input", "in.jsonl")
    assert "go together" in refused(capsys, "recommend", tuned, "--request", "a", "--output", "out.jsonl")
    for more in ("--explian", "data.seed=3"):
        assert f"'{more}': overrides say where" in refused(capsys, "recommend", tuned, "--request", "a", more)
    assert "there is nothing to recommend from" in refused(capsys, "recommend", chain[1], "--request", "a man")
    (tmp_path / "in.jsonl").write_text('"a"\n')
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    assert "batch_size" in refused(capsys, "recommend", tuned, *files, "--batch-size", "0")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("command", ["finetune", "pretrain", "run"])
def test_a_model_is_not_replaced_unless_that_is_meant(chain, capsys, tmp_path, command, monkeypatch):
    recipe, _, tuned, *_ = chain
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / name).touch()
        arguments = [command, recipe, f"training.output_dir={tmp_path / name}"]
        error = refused(capsys, *arguments)
        assert f"{str(tmp_path / name)!r} holds a model, which this run would replace" in error
        assert "--overwrite" in error and "--resume" in error
    before = {path.name: path.stat().st_mtime_ns for path in tuned.iterdir()}
    refused(capsys, command, recipe, f"training.output_dir={tuned}")
    assert {path.name: path.stat().st_mtime_ns for path in tuned.iterdir()} == before
    for module in ("commands.run.run", "runs.pretrain.pretrain", "runs.finetune.finetune"):
        monkeypatch.setattr(f"m6rec.train.{module}", lambda *given: {})
    for more in ("--overwrite", "--resume"):
        assert main([*map(str, arguments), more]) == 0


def test_half_precision_without_a_gpu_is_refused(chain, capsys, tmp_path):
    error = refused(capsys, "finetune", chain[0], "training.fp16=true", f"training.output_dir={tmp_path / 'x'}")
    assert "training.fp16 needs a GPU" in error and "bf16" not in error


def test_bars_are_for_terminals(chain):
    error = chain[-1]
    assert "%|" not in error and "it/s" not in error
    assert datasets.is_progress_bar_enabled(), "it is as it was"


@pytest.mark.parametrize("arguments", [["--verbose", "finetune"], ["finetune", "--verbose"]])
def test_verbose_shows_where_an_error_came_from(chain, arguments):
    with pytest.raises(ValueError, match="unknown keys epochs"):
        main([*arguments, str(chain[0]), "training.epochs=3"])
    with pytest.raises((ValueError, StrictDataclassError), match="num_joint_layers=9"):
        main([*arguments, str(chain[0]), "model.config.num_joint_layers=9"])


def test_what_a_user_cannot_mend_is_no_message(chain, monkeypatch):
    monkeypatch.setattr("m6rec.train.runs.finetune.fit", lambda run: {}["a slip of ours"])
    with pytest.raises(KeyError, match="a slip of ours"):
        main(["finetune", str(chain[0])])


# ------------------------------------------------------------------------------------------------------- help, table


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s+\w", printed, re.M), command
    assert f"recipes of the package: {', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}" in " ".join(
        printed.split()
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: m6rec {command}")
    assert "SECTION.KEY=VALUE" in printed and "--verbose" in printed


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["finetune"], ["recommend", "model"], ["recommend", "m", "--user", "a", "--request", "b"]],
)
def test_what_is_no_command_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: m6rec" in capsys.readouterr().err


def as_main(capsys):
    """Run the module in this process as Python does for `-m`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
        patch.setattr(sys, "argv", ["cli.py", "--help"])
        runpy.run_module("m6rec.train.cli", run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out


def in_a_process(capsys):
    command = [sys.executable, "-m", "m6rec.train.cli", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("run", some([as_main, in_a_process], [as_main]))
def test_it_runs_as_a_module_too(tmp_path, monkeypatch, capsys, run):
    monkeypatch.chdir(tmp_path)
    printed = run(capsys)
    assert printed.startswith("usage: m6rec") and all(name in printed for name in COMMANDS)


def test_table_has_a_block_a_task_and_a_row_a_model():
    report = {
        "retrieval": {
            "m6rec": {"examples": 7, "ndcg@10": 0.25, "recall@10": 0.5, "ndcg@10/cold": 0.0, "seen": "out"},
            "similar_text": {"examples": 7, "ndcg@10": 0.125, "recall@10": 1.0, "ndcg@10/cold": 0.0, "seen": "out"},
        },
        "click": {"m6rec": {"auc": 0.5, "examples": 9, "calibration_error": 0.0625}},
    }
    assert tables(report).splitlines() == [
        "retrieval (7 examples, seen items out)",
        "             ndcg@10 recall@10",
        "m6rec         0.2500    0.5000",
        "similar_text  0.1250    1.0000",
        "",
        "click (9 examples)",
        "         auc calibration_error",
        "m6rec 0.5000            0.0625",
    ]
    assert tables({}) == ""
