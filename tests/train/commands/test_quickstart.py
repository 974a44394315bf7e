"""The quickstart on a small world of two tastes: what is written, printed and promised, and that it holds."""

import ast
import contextlib
import io
import json
import math
import re
import shutil
import textwrap

import numpy
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel, pipeline

from m6rec import M6RecForRecommendation
from m6rec.model_cards import CARDS
from m6rec.train.cli import main
from m6rec.train.commands.quickstart import ranking_table
from m6rec.train.config.arguments import BASELINES
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation.reports import rank_catalogue, ranking_examples
from m6rec.train.runs import finetune
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import full_report
from tests.conftest import real_data
from tests.minihub import MiniHub, use
from tests.train.runs.test_facts import unmeasured

STAGES = ["data", "training", "evaluation", "saving", "recommendations"]
TINY = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.embedding_dim=16",
    "text.vocab_size=500",
    "text.max_events=10",
    "training.num_train_epochs=12",
    "training.per_device_train_batch_size=8",
    "training.learning_rate=1e-2",
]
WORDS = ["Laser Rocket Station", "Garden Wedding Letter"]
GENRES = ["Action Sci-Fi", "Comedy Romance"]


def write_films(folder, num_users=40, num_films=30):
    """Write ml-100k as RecBole ships it: odd users watch odd films only, even users even ones."""
    rng = numpy.random.default_rng(11)
    folder.mkdir()
    tables = {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float"],
        "item": ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"],
        "user": ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"],
    }
    for film in range(num_films):
        taste = film % 2
        word = WORDS[taste].split()[film % 3]
        tables["item"].append(f"{100 + film}\t{word} {film}, The\t{1970 + film}\t{GENRES[taste]}")
    for user in range(num_users):
        tables["user"].append(f"{1 + user}\t{20 + user}\t{'MF'[user % 3 > 0]}\tengineer\t12345")
        films = rng.permutation(numpy.arange(user % 2, num_films, 2))[: 9 + user % 3]
        for place, film in enumerate(films):
            tables["inter"].append(f"{1 + user}\t{100 + film}\t{rng.integers(1, 6)}\t{880_000_000 + 86_400 * place}")
    for name, lines in tables.items():
        (folder / f"ml-100k.{name}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return write_films(tmp_path_factory.mktemp("films") / "ml-100k")


@pytest.fixture(scope="module")
def done(films, tmp_path_factory):
    """The folder that the quickstart wrote, what it printed, and its progress bars."""
    output, out, err = tmp_path_factory.mktemp("quickstart") / "modèle 'x'", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["quickstart", "--data", str(films), "--output", str(output), *TINY]) == 0
    return output, out.getvalue(), err.getvalue()


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def events_of(films):
    """user -> lines of the log (item, stars, time), the oldest first."""
    found = {}
    for line in (films / "ml-100k.inter").read_text().splitlines()[1:]:
        user, item, stars, time = line.split("\t")
        found.setdefault(user, []).append((item, int(stars), int(time)))
    return {user: sorted(own, key=lambda event: event[2]) for user, own in found.items()}


def titles_of(films):
    lines = [line.split("\t") for line in (films / "ml-100k.item").read_text().splitlines()[1:]]
    return {item: f"The {title.removesuffix(', The')}" for item, title, *_ in lines}


def test_folder_holds_all_that_is_promised_and_no_pickle(done):
    output, _, _ = done
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "catalogue", "README.md",
        "report.json", "metrics.json", "recipe.yaml", "modeling_m6rec.py",
    }  # fmt: skip
    assert not [name for name in names if name.startswith((".", "checkpoint-"))]
    assert not [path for path in output.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert isinstance(AutoModel.from_pretrained(output), M6RecForRecommendation)
    assert AutoModel.from_pretrained(output).config.trained_tasks == ["retrieval"]
    assert output.name in (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", CARDS.values())
def test_cards_pass_the_hub_and_name_no_figure_that_was_not_measured(done, monkeypatch, file):
    text = (done[0] / file).read_text(encoding="utf-8")
    with MiniHub() as hub:
        use(hub, monkeypatch)
        ModelCard(text).validate()
    assert unmeasured(text, done[0]) == []
    measured = read_json(done[0] / "metrics.json")["retrieval"]["m6rec"]
    (index,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    found = {entry["type"]: entry["value"] for result in index["results"] for entry in result["metrics"]}
    assert found == {name: value for name, value in measured.items() if isinstance(value, float)}
    assert {"curves.png", "latency.png"} <= {path.name for path in done[0].iterdir() if f"]({path.name})" in text}


def test_report_has_the_shape_that_was_asked_for(done):
    report = read_json(done[0] / "report.json")
    assert list(report) == ["rows", "verdict", "seconds"]
    models = ["m6rec", *BASELINES[:-1]]
    assert [row["model"] for row in report["rows"]] == models
    for row in report["rows"]:
        assert list(row) == ["model", "recall@10", "ndcg@10", "seen"]
        assert row["seen"] == "out"
        assert 0 <= row["ndcg@10"] <= row["recall@10"] <= 1
    assert list(report["seconds"]) == STAGES
    assert all(value >= 0 for value in report["seconds"].values()) and sum(report["seconds"].values()) > 0
    measured = read_json(done[0] / "metrics.json")["retrieval"]
    assert report["verdict"] == measured["m6rec"]["verdict"]
    assert [{**row, "examples": 40} for row in report["rows"]] == [
        {"model": who, **{name: row[name] for name in ("recall@10", "ndcg@10", "seen", "examples")}}
        for who, row in measured.items()
    ]


def test_learning_beats_popularity(done):
    ndcg = {row["model"]: row["ndcg@10"] for row in read_json(done[0] / "report.json")["rows"]}
    assert ndcg["m6rec"] >= 2 * ndcg["popularity"] > 0


def test_figures_are_those_that_the_saved_folder_gives_by_hand(done, films):
    """Each user's last film among all that they have not seen, by the pipeline and the log's own lines."""
    recommend = pipeline("recommendation", model=str(done[0]))
    users = {}
    for line in (films / "ml-100k.user").read_text().splitlines()[1:]:
        user, age, gender, occupation, _ = line.split("\t")
        users[user] = {"age": int(age), "gender": {"M": "male", "F": "female"}[gender], "occupation": occupation}
    ranks = []
    for user, events in events_of(films).items():
        history = [
            {"event": "rate", "item": {"item_id": item}, "rating": stars, "timestamp": time}
            for item, stars, time in events[:-1]
        ]
        answer = recommend({"user": users[user], "history": history}, top_k=30)
        assert len(answer) == 30 - len(history)
        ranks.append([row["item_id"] for row in answer].index(events[-1][0]) + 1)
    row = read_json(done[0] / "report.json")["rows"][0]
    assert row["recall@10"] == pytest.approx(sum(rank <= 10 for rank in ranks) / 40, abs=1e-9)
    assert row["ndcg@10"] == pytest.approx(sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / 40, abs=1e-9)


def test_evaluate_finds_the_same_figures(done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "copy")
    before = read_json(folder / "metrics.json")
    (folder / "metrics.json").unlink()
    assert main(["evaluate", str(folder)]) == 0
    assert read_json(folder / "metrics.json") == before


def test_screen_shows_table_and_seconds(done):
    output, screen, bars = done
    report = read_json(output / "report.json")
    for row in report["rows"]:
        assert re.search(rf"^{row['model']} +{row['recall@10']:.4f} +{row['ndcg@10']:.4f} ", screen, re.M)
    for name, value in report["seconds"].items():
        assert f"== {name} ==" in screen
        assert f"({value:.1f} s)" in screen
        assert f"{name} {value:.0f} s" in screen.partition("== done")[2]
    assert "399 ratings of 30 films by 40 users" in screen
    assert "60/60" not in bars and "it/s" not in bars, "bars are for terminals"
    assert "missing keys" not in bars


def test_screen_shows_three_users_with_reasons(done, films):
    screen, log, titles = done[1], events_of(films), titles_of(films)
    shown = re.findall(r"^user (\d+) \((.*)\), (\d+) films, the last ones:\n  (.*)\n((?:  \d\. .*\n)+)", screen, re.M)
    assert len({user for user, *_ in shown}) == 3
    for user, about, count, last, rows in shown:
        assert re.fullmatch(r"\d+, (fe)?male, engineer", about)
        assert int(count) == len(log[user])
        assert last == "; ".join(f"{titles[item]} ({stars} stars)" for item, stars, _ in log[user][-5:])
        lines = re.findall(r"^  (\d)\. (.*?), 19\d\d, .*  score (-?\d\.\d{3})  because of (.*)$", rows, re.M)
        assert [rank for rank, *_ in lines] == ["1", "2", "3"]
        scores = [float(score) for _, _, score, _ in lines]
        assert scores == sorted(scores, reverse=True)
        watched = {titles[item] for item, *_ in log[user]}
        for _, title, _, because in lines:
            assert title in set(titles.values()) - watched
            reasons = re.findall(r"(The \w+ \d+) \(([+-]\d\.\d{3})\)", because)
            assert len(reasons) == 2
            assert {reason for reason, _ in reasons} <= watched


def test_printed_python_runs_and_recommends(done):
    screen = done[1]
    code = textwrap.dedent("".join(line for line in screen.partition("To use it:")[2].splitlines(True)[1:]))
    *lines, last = ast.parse(code).body
    names = {}
    exec(compile(ast.Module(lines, []), "screen", "exec"), names)
    answer = eval(compile(ast.Expression(last.value), "screen", "eval"), names)
    assert [row["rank"] for row in answer] == [1, 2, 3, 4, 5]
    history = {entry["item"]["item_id"] for entry in ast.literal_eval(last.value.args[0])["history"]}
    assert len(history) == 2 and history.isdisjoint(row["item_id"] for row in answer)
    assert all({reason["item_id"] for reason in row["because"]} == history for row in answer)


@pytest.mark.slow
def test_second_run_into_the_same_folder_gives_the_same(done, films, monkeypatch, capsys):
    output, _, _ = done
    rows, weights = read_json(output / "report.json")["rows"], (output / "model.safetensors").read_bytes()
    monkeypatch.chdir(output)
    assert main(["quickstart", "--output", ".", f"data.directory={films}", *TINY, "--training.disable_tqdm=true"]) == 0
    assert read_json(output / "report.json")["rows"] == rows
    assert (output / "model.safetensors").read_bytes() == weights
    assert 'model="."' in capsys.readouterr().out
    assert not list(output.glob("checkpoint-*"))
    assert output.name in (output / "README.md").read_text(encoding="utf-8")
    assert len(pipeline("recommendation", model=".")({"history": [{"item": {"item_id": "100"}}]}, top_k=4)) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("task.learn=[click]", r"task\.learn is \['click'\].*retrieval at 10"),
        ("evaluation.ks=[5]", r"evaluation\.ks \[5\]"),
        ("training.epochs=3", r"training has unknown keys epochs"),
        ("data.directory=nowhere", r"nowhere/ml-100k\.inter is missing"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_training(films, tmp_path, capsys, wrong, message):
    assert main(["quickstart", "--data", str(films), "--output", str(tmp_path / "model"), *TINY, wrong]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "model" / "config.json").exists()


def test_seen_films_may_stay_in(films, tmp_path, capsys, monkeypatch):
    few = ["evaluation.exclude_seen=false", "training.max_steps=2", "evaluation.max_users=2"]
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--data", str(films), "--output", "1997", *TINY, *few]) == 0
    assert "of each of 2 users" in (screen := capsys.readouterr().out)
    assert "seen films among them" in screen
    assert {row["seen"] for row in read_json(tmp_path / "1997" / "report.json")["rows"]} == {"in"}


def test_what_is_measured_after_training_in_bfloat16_is_what_is_saved(films, tmp_path, monkeypatch):
    def scores(run):
        examples = ranking_examples(
            run.writer, run.processor, run.split, "test", run.recipe.evaluation, run.recipe.seed
        )
        return rank_catalogue(run.model, examples, run.catalogue, run.collator, bf16=False)[:]

    measured = []
    monkeypatch.setattr(finetune, "full_report", lambda run: measured.append(scores(run)) or full_report(run))
    few = ["training.bf16=true", "training.max_steps=5"]
    assert main(["quickstart", "--data", str(films), "--output", str(tmp_path / "model"), *TINY, *few]) == 0
    saved = load_recipe(tmp_path / "model", [f"model.checkpoint={tmp_path / 'model'}"])
    numpy.testing.assert_allclose(measured[0], scores(prepare(saved)), rtol=0, atol=1e-6)


def test_table_by_hand():
    def row(recall, ndcg):
        return {"examples": 4, "seen": "out", "recall@10": recall, "ndcg@10": ndcg, "coverage@20": 0.5}

    table = ranking_table({"m6rec": row(0.75, 0.5), "popularity": row(0.5, 0.2)}).splitlines()
    assert table[0].startswith("a held-out film of each of 4 users") and table[0].endswith("seen films left out:")
    assert table[2].split() == ["m6rec", "0.7500", "0.5000", "0.5000"]
    assert table[-1] == "NDCG@10 is 2.5 times that of popularity"


@pytest.mark.slow
@pytest.mark.real_data
def test_real_films_are_recommended_twice_as_well_as_by_popularity(tmp_path):
    data = real_data("ml-100k")
    assert main(["quickstart", "--data", str(data), "--output", str(tmp_path / "model")]) == 0
    report = read_json(tmp_path / "model" / "report.json")
    ndcg = {row["model"]: row["ndcg@10"] for row in report["rows"]}
    assert ndcg["m6rec"] >= 2 * ndcg["popularity"] > 0.03
    assert {row["seen"] for row in report["rows"]} == {"out"}
