"""The facts of a run reach its card, each from the file that holds it, and no figure stands there that none holds."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import m6rec.model_cards
from m6rec import M6RecConfig, M6RecForRecommendation
from m6rec.model_cards import CARDS, MARK, render_card, render_cards, write_cards
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation.latency import measure_latency, save_latency
from m6rec.train.runs.facts import _beginning, folder_facts, hub_id, preset_facts
from m6rec.train.runs.finetune import finetune
from tests.conftest import REPOSITORY
from tests.minihub import MiniHub, card_errors, use
from tests.train.world import recipe_of, write_world

HOLDERS = ("metrics.json", "recipe.yaml", "config.json", "latency.json", "catalogue/catalogue.json")
NUMBER = re.compile(r"(?<![\w.#])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)")


def unmeasured(card, folder):
    """Numbers of a card that neither a file of its run's folder holds nor its template says."""
    texts = [(folder / file).read_text(encoding="utf-8") for file in HOLDERS if (folder / file).is_file()]
    kept = json.loads((folder / "card.json").read_text(encoding="utf-8")) if (folder / "card.json").is_file() else {}
    kept |= {"limits": [], "intended_use": []}  # sentences, which may claim anything
    texts.append(json.dumps(kept, indent=1))
    known = {float(found.replace(",", "")) for text in texts for found in NUMBER.findall(text.replace(", ", " "))}
    templates = "".join(
        path.read_text(encoding="utf-8") for path in Path(m6rec.model_cards.__file__).parent.glob("*.md")
    )
    said = {found.replace(",", "") for found in NUMBER.findall(templates)}
    shown = {found.rstrip(",").replace(",", "") for found in NUMBER.findall(card)} - said
    return sorted(
        each
        for each in shown
        if float(each) not in known
        and not any(round(value, len(each.partition(".")[2])) == float(each) for value in known if "." in each)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run that learns clicks and retrieval."""
    place = tmp_path_factory.mktemp("cards")
    sections = {"task": {"learn": ["retrieval", "click"]}, "text": {"language": "zh"}}
    finetune(load_recipe(recipe_of(write_world(place / "world"), place / "films", **sections)))
    save_latency([12.0, 10.0, 11.0, 30.0], place / "films")
    return place / "films"


def test_facts_come_from_the_files_of_the_run(folder):
    facts = folder_facts(folder, "org/films")
    model = M6RecForRecommendation.from_pretrained(folder)
    assert facts.parameters == facts.trained_parameters == model.num_parameters()
    assert (facts.data.users, facts.data.items, facts.data.events) == (12, 15, 93)
    assert facts.data.name is facts.data.hub_id is facts.base_model is facts.licence is facts.method is None
    assert (facts.tasks, facts.languages, facts.seed) == (["click", "retrieval"], ["zh"], 5)
    assert facts.results == json.loads((folder / "metrics.json").read_text())
    assert facts.catalogue_size == 15 and facts.shape["hidden_size"] == 36
    assert facts.pictures == {"curves": "curves.png", "latency": "latency.png"}
    assert facts.latency == {"median_ms": 11.5, "p95_ms": pytest.approx(27.3), "requests": 4}
    assert facts.seconds.keys() == {"training", "evaluation"} and min(facts.seconds.values()) > 0
    assert facts.example["history"][0]["item"]["title"] == "Red Harbour" and "item_id" not in str(facts.example)


@pytest.mark.parametrize("file", CARDS.values())
def test_no_figure_that_was_not_measured(folder, file):
    card = render_cards(folder_facts(folder, "org/films"))[file]
    assert unmeasured(card, folder) == []
    assert len(NUMBER.findall(card)) > 100
    assert unmeasured(card + "\nIts AUC is 0.9876.\n", folder) == ["0.9876"]


@pytest.mark.parametrize("file", CARDS.values())
def test_the_hub_accepts_it(folder, file, monkeypatch):
    card = render_cards(folder_facts(folder, "org/films"))[file]
    with MiniHub() as hub:
        use(hub, monkeypatch)
        ModelCard(card).validate()
        assert ("POST", "/api/validate-yaml") in hub.log
        with pytest.raises(ValueError, match="license"):
            ModelCard(card.replace("library_name:", "license: mine\nlibrary_name:", 1)).validate()


def test_the_first_beginning_is_handed_on(folder, tmp_path):
    shutil.copy(folder / "card.json", tmp_path)
    facts = json.loads((tmp_path / "card.json").read_text()) | {"base_model": "org/base"}
    (tmp_path / "card.json").write_text(json.dumps(facts))
    assert [_beginning(name) for name in (str(tmp_path), str(folder), "org/x", None)] == [
        "org/base",
        None,
        "org/x",
        None,
    ]


def test_what_is_not_there_is_left_out(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.json", "*.png", "*.yaml", "catalogue"))
    shutil.copy(folder / "config.json", bare)
    facts = folder_facts(bare, "org/films")
    assert facts == dataclasses.replace(type(facts)("org/films"), tasks=facts.tasks, shape=facts.shape)
    assert unmeasured(render_card(facts), bare) == []


def test_cards_that_are_written_have_a_mark_and_a_link(folder, tmp_path):
    write_cards(folder_facts(folder, "films"), tmp_path)
    for file, other in zip(CARDS.values(), reversed(CARDS.values())):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert text.endswith(f"\n{MARK}\n") and f"]({other})" in text


def test_pretrained_models_have_perplexities(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text('{"perplexity": {"item": {"before": 371.25, "after": 24.5}}}')
    facts = folder_facts(tmp_path / "run", "org/films")
    assert facts.results == {} and "| item | 371.25 | 24.50 |" in render_card(facts)


# ------------------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("preset", ["tiny", "edge", "base"])
def test_cards_of_presets(preset):
    """They are those in docs, which docs/make_cards.py writes, and say what the model itself says."""
    facts = preset_facts(preset)
    config = M6RecConfig.preset(preset)
    assert all(getattr(config, name) == size for name, size in facts.shape.items())
    for file, card in render_cards(facts).items():
        assert card_errors(card) == []
        name = f"m6rec-{preset}{file.removeprefix('README')}"
        written = (REPOSITORY / "docs" / "cards" / name).read_text(encoding="utf-8")
        assert written == card.replace("](README", f"](m6rec-{preset}")
    card = render_card(facts)
    found = {}
    if preset == "tiny":  # the others are too big to be made here
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], found)
        assert found["model"].num_parameters() == facts.parameters
    assert f"{facts.parameters:,} parameters" in card and "have learnt nothing" in card
    assert "model-index" not in card and "## Results" not in card


def test_parameters_of_presets_are_about_those_of_the_paper():
    assert {preset: round(preset_facts(preset).parameters / 1e6, -1) for preset in ("edge", "base")} == {
        "edge": pytest.approx(10, abs=10),
        "base": pytest.approx(300, abs=40),
    }


# --------------------------------------------------------------------------------------------------------- the pieces


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("org/films", "org/films"),
        ("org/films:train", "org/films"),
        ("org/films:config:train", "org/films"),
        ("data/films.csv", None),
        ("/data/films", None),
        ("runs/a/b", None),
        ("films", None),
        ("a b/c", None),
        (None, None),
    ],
)
def test_hub_ids(given, found):
    assert hub_id(given) == found


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "films").mkdir(parents=True)
    assert hub_id("org/films") == "org/films"
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/films") is None


def test_latency_is_measured_one_by_one(tmp_path, monkeypatch):
    times = iter([0.0, 0.010, 1.0, 1.030])
    asked = []
    with monkeypatch.context() as clock:
        clock.setattr("m6rec.train.evaluation.latency.time.perf_counter", lambda: next(times))
        found = measure_latency(asked.append, ["a", "b"])
    assert asked == ["a", "b"] and found == pytest.approx([10, 30])
    save_latency(found, tmp_path)
    assert json.loads((tmp_path / "latency.json").read_text())["median_ms"] == pytest.approx(20)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("section", ["training", "pretraining"])
def test_a_token_in_a_recipe_is_refused_and_not_repeated(section):
    key = "training.hub_token" if section == "training" else "pretraining.training.hub_token"
    with pytest.raises(ValueError, match=r"training\.hub_token would stand in recipe\.yaml") as error:
        load_recipe("quickstart", ["training.output_dir=x", f"{key}=hf_abcdef"])
    assert "hf_abcdef" not in str(error.value)


@pytest.mark.parametrize("section", ["training", "pretraining.training"])
def test_the_trainer_does_not_publish(section):
    with pytest.raises(ValueError, match=r"training\.push_to_hub would upload .* publish with m6rec push"):
        load_recipe("quickstart", ["training.output_dir=x", f"{section}.push_to_hub=true"])
