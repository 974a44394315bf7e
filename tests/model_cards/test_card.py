"""A card says what its facts say, all of it and nothing else, and its snippet runs."""

import dataclasses
import os
import platform
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import m6rec.model_cards
from m6rec.model_cards import (
    CARDS,
    LANGUAGES,
    MARK,
    CardFacts,
    DataFacts,
    hardware,
    render_card,
    render_cards,
    write_cards,
)
from m6rec.train.config.recipe import RECIPES, load_recipe
from tests.fast import examples

FACTS = CardFacts(
    name="org/films",
    data=DataFacts("Films: a sample", "Research only.", "org/sample", users=1943, items=20, events=100_000),
    recipe={"evaluation": {"split": "leave-one-out", "max_users": 1500}, "training": {"seed": 7}},
    command="m6rec finetune films training.seed=7",
    seed=7,
    tasks=["retrieval", "click"],
    languages=["en", "zh"],
    licence="other",
    intended_use=["Recommending films."],
    limits=["It knows 20 films.", "It has seen no children's requests."],
    parameters=1_234_567,
    catalogue_size=20,
    results={
        "retrieval": {
            "m6rec": {
                "recall@10": 0.17512345,
                "cold/mrr": 1 / 3,
                "examples": 1500,
                "seen": "out",
                "intervals": {"recall@10": [0.15, 0.2]},
            },
            "popularity": {"recall@10": 0.25, "cold/mrr": None, "examples": 1500, "seen": "in"},
        },
        "click": {
            "m6rec": {"auc": 0.5, "gauc_groups": 3, "negatives_per_event": 4, "negatives": "uniform"},
            "user_mean": {"auc": 1.0},
            "history_and_item": {"auc": 0.25},
        },
    },
    seconds={"train": 1301.26, "evaluate": 2},
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    hardware="A processor, 2 logical cores",
)
WHOLE = """\
---
datasets:
- org/sample
language:
- en
- zh
library_name: transformers
license: other
metrics:
- recall@10
- cold/mrr
- auc
tags:
- recommendation
- recommender-system
- m6rec
- retrieval
- click
model-index:
- name: org/films
  results:
  - task:
      type: retrieval
    dataset:
      name: 'Films: a sample'
      type: org/sample
      split: test
    metrics:
    - type: recall@10
      value: 0.17512345
      args:
        seen: out
    - type: cold/mrr
      value: 0.3333333333333333
      args:
        seen: out
  - task:
      type: click
    dataset:
      name: 'Films: a sample'
      type: org/sample
      split: test
    metrics:
    - type: auc
      value: 0.5
      args:
        negatives_per_event: 4
        negatives: uniform
---

# org/films

An m6rec model: a generative language model that is also a recommender. It reads a request as short texts: who the \
user is, what the user did, and what might be recommended. It has 1,234,567 parameters. A catalogue of 20 items is \
saved with it.

## How to use it

```python
from transformers import pipeline

user = {'user': 'A woman in her thirties',
 'history': [{'event': 'clicked', 'item': "men's hooded jacket"}, 'hiking socks']}
candidates = ['waterproof hiking shoes', 'yoga mat']
recommend = pipeline("recommendation", model="org/films", trust_remote_code=True)
ranked = recommend({**user, "candidates": candidates}, explain=True)
found = recommend(user, top_k=10)  # from the catalogue
```

The same without the pipeline:

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("org/films", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("org/films", trust_remote_code=True)
batch = processor([{**user, "candidates": candidates}], "click", return_tensors="pt")
scores = model.score("click", **batch)
```

## Intended use

- Recommending films.
- Task `retrieval`: finds items of a catalogue for a user; the score is a cosine.
- Task `click`: the probability that a user clicks or likes an item.

Heads of other tasks were not trained: their scores say nothing.

## Limits

- It knows 20 films.
- It has seen no children's requests.

## Training data

- Data set: Films: a sample
- Users: 1,943
- Items: 20
- Events: 100,000
- Terms: Research only.

## Results

Measured on the test part: each user's last event; the one before it was for validation. Of the users, at most 1,500 \
are ranked for, drawn at random. Figures are rounded to four decimals. In brackets: 95% bootstrap intervals.

### retrieval

| | this model | popularity |
|---|---:|---:|
| test users | 1,500 | 1,500 |
| items met before | left out | kept |
| `recall@10` | 0.1751 [0.1500, 0.2000] | 0.2500 |
| `cold/mrr` | 0.3333 | – |

Every item of the catalogue is ranked for each test user. `warm/` and `cold/`: test users whose held-out item has \
training events, and has none.

- `recall`: share of users whose held-out item is among the first k
- `mrr`: mean of 1 / rank
- popularity: items by the number of their training events, the same for every user

### click

| | this model | the user's mean | history and item |
|---|---:|---:|---:|
| negatives per event | 4 | – | – |
| how negatives are drawn | uniformly | – | – |
| `auc` | 0.5000 | 1.0000 | 0.2500 |
| `gauc_groups` | 3 | – | – |

- `auc`: how often an event with label 1 has a higher score than one with label 0
- the user's mean: the mean label or rating of the user's earlier events, drawn towards the overall mean
- history and item: the mean of the history's mean and the item's mean

## The run

- Command: `m6rec finetune films training.seed=7`
- Random seed: 7
- Hardware: A processor, 2 logical cores
- Versions: torch 2.13.0, transformers 5.23.0

| stage | seconds |
|---|---:|
| train | 1,301.3 |
| evaluate | 2.0 |

The recipe as it was resolved, without secrets and without paths of the machine it ran on.

```yaml
evaluation:
  split: leave-one-out
  max_users: 1500
training:
  seed: 7
```
"""
LEANING = CardFacts(
    name="x",
    results={"retrieval": {who: {"coverage@20": 0.5, "popularity_bias@20": 2.0} for who in ("m6rec", "popularity")}},
)
PARTS = {field.name: getattr(FACTS, field.name) for field in dataclasses.fields(FACTS) if field.name != "name"}
PARTS |= {"data": DataFacts("Films"), "results": {"rating": {"item_mean": {"rmse": 0.75}}}}
PARTS |= {"recipe": {"text": {"language": "zh"}}, "example": {"candidates": ["x"]}}
PARTS |= {
    "preset": "edge",
    "base_model": "org/base",
    "method": "lora",
    "trained_parameters": 12,
    "shape": {"layers": 3},
}
PARTS |= {"pictures": {"curves": "curves.png", "latency": "latency.png"}}
PARTS |= {"latency": {"median_ms": 12.34, "p95_ms": 56.78, "requests": 90}}
PARTS |= {"perplexities": {"item": {"before": 370.125, "after": 24.5}}}


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def table(text, number=0):
    """Cells of a table of the card, row by row."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[number].splitlines()]
    return [rows[0], *rows[2:]]


# ---------------------------------------------------------------------------------------------------- what it says


def test_whole_card():
    assert render_card(FACTS) == WHOLE


def test_a_card_of_what_is_unknown():
    text = render_card(CardFacts(name="x"))
    assert head(text) == {"library_name": "transformers", "tags": ["recommendation", "recommender-system", "m6rec"]}
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == ["# x", "## How to use it"]
    nothing = {"retrieval": {"m6rec": {"mrr": None}}, "click": {"m6rec": {"auc": float("nan")}}, "rating": {}}
    assert render_card(CardFacts(name="x", results=nothing, recipe={"hub_token": "hf_1"}, seconds={"a": None})) == text


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    "facts", [FACTS, LEANING, *(CardFacts(name="x", **{name: value}) for name, value in PARTS.items())]
)
def test_every_card_is_well_formed(facts, language):
    text = render_card(facts, language)
    assert not re.search(r"\{\{|\{%|%\}|None|Undefined|\bnull\b", text.replace("{**", ""))
    assert "\n\n\n" not in text and text.endswith("\n") and not text.endswith("\n\n")
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert not re.search(r"^(#.*)\n+(#{1,2} |\Z)", text.split("```")[-1], re.MULTILINE)
    for line in re.findall(r"^#+ .*$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        assert f"\n\n{line}\n\n" in text
    for number in range(len(re.findall(r"^\|-", text, re.MULTILINE))):
        assert len({len(row) for row in table(text, number)}) == 1


@pytest.mark.parametrize("name", PARTS)
def test_each_fact_is_said(name):
    assert render_card(CardFacts(name="x", **{name: PARTS[name]})) != render_card(CardFacts(name="x"))


@settings(max_examples=examples(50), deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["m6rec", "popularity", "another"]),
        st.dictionaries(st.sampled_from(["recall@5", "ndcg@10", "odd"]), st.floats(-9, 9), min_size=1),
        min_size=1,
    ),
    st.sampled_from(LANGUAGES),
)
def test_figures_are_those_given(report, language):
    facts = CardFacts(name="x", data=DataFacts("d"), results={"retrieval": report})
    text = render_card(facts, language)
    header, *rows = table(text)
    assert len(header) == 1 + len(report)
    found = {row[0].strip("`"): row[1:] for row in rows}
    for place, figures in enumerate(report.values()):
        assert {metric for metric, cells in found.items() if cells[place] != "–"} == figures.keys()
        for metric, value in figures.items():
            assert float(found[metric][place]) == pytest.approx(value, abs=5.0001e-5)
    own = [result for index in head(text).get("model-index", []) for result in index["results"]]
    measured = {entry["type"]: entry["value"] for result in own for entry in result["metrics"]}
    assert measured == report.get("m6rec", {})


def test_without_a_data_set_there_is_no_model_index():
    assert "model-index" not in head(render_card(dataclasses.replace(FACTS, data=None)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_hubs_own_reader_reads_the_head(language):
    text = render_card(FACTS, language)
    read = ModelCard(text)
    assert read.data.to_dict() == head(text) and str(read) == text
    assert [(result.task_type, result.metric_type, result.metric_value) for result in read.data.eval_results] == [
        ("retrieval", "recall@10", 0.17512345),
        ("retrieval", "cold/mrr", 1 / 3),
        ("click", "auc", 0.5),
    ]


def test_both_languages_say_the_same():
    """The templates differ in wording only: the same conditions, loops and values in the same order."""
    folder, logic = Path(m6rec.model_cards.__file__).parent, {}
    for language in LANGUAGES:
        text = (folder / f"template_{language}.md").read_text(encoding="utf-8")
        names = re.findall(r'^  ("\w+"):', text, re.MULTILINE)
        body = re.sub(r"\{%- set .*?-%\}", "", text, flags=re.DOTALL)
        parts = re.findall(r"\{%.*?%\}|\{\{.*?\}\}|```\w*|^\|?[-#|]+", body, re.MULTILINE)
        logic[language] = names, [re.sub(r'\("[^"]*",|"(测试|test)[^"]*"', "", part) for part in parts]
    assert logic["en"] == logic["zh"]


def test_chinese_card():
    text, english = render_card(FACTS, "zh"), render_card(FACTS)
    assert head(text) == head(english)
    prose = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    for figure in ("1,234,567", "1,943", "100,000", "0.1751", "1,500", "1,301.3", *FACTS.limits):
        assert figure in prose
    left = set(re.findall(r"[A-Za-z]{4,}", re.sub(r"`.*?`", "", prose)))
    known = set(re.findall(r"[A-Za-z]{4,}", str(FACTS))) | {"pipeline", "IDF"}
    assert left <= known and "防水登山鞋" in text and "用户见过的物品 | 排除 | 保留" in text


def test_leanings_of_models_are_told_apart():
    text = render_card(LEANING)
    assert "- `coverage@20`: this model 0.5000, popularity 0.5000\n" in text
    assert "- `popularity_bias@20`: this model 2.0000, popularity 2.0000\n" in text


def test_what_is_replayed_is_not_the_results_of_this_data():
    results = {"replay/old/click": {"m6rec": {"auc": 0.75}}}
    text = render_card(dataclasses.replace(FACTS, results=results))
    assert "model-index" not in head(text) and "0.7500" in text


def test_only_retrieval_has_warm_and_cold_users():
    text = render_card(CardFacts(name="x", results={"interaction": {"m6rec": {"like/auc": 0.5}}}))
    assert "`like/auc`" in text and "warm" not in text


def test_adapters_and_presets_are_loaded_in_their_own_way():
    adapter = render_card(CardFacts(name="org/x", method="lora", base_model="org/base", trained_parameters=1234))
    assert "import m6rec\nfrom transformers import pipeline\n" in adapter and 'model="org/x")' in adapter
    assert "for [org/base](https://huggingface.co/org/base)" in adapter and "1,234 parameters were trained" in adapter
    assert "trust_remote_code" not in adapter and head(adapter)["library_name"] == "peft"
    assert (head(adapter)["base_model"], head(adapter)["base_model_relation"]) == ("org/base", "adapter")
    assert head(render_card(CardFacts(name="x", base_model="org/base")))["base_model_relation"] == "finetune"
    assert "pipeline(" not in render_card(CardFacts(name="m6rec-edge", preset="edge"))


def test_the_widget_shows_a_request_of_the_model():
    request = {"history": ["a"], "candidates": ["b"]}
    (widget,) = head(render_card(CardFacts(name="x", example=request)))["widget"]
    assert yaml.safe_load(widget["text"]) == request and "widget" not in head(render_card(CardFacts(name="x")))


def test_a_split_by_time_is_named():
    facts = dataclasses.replace(FACTS, recipe={"evaluation": {"split": "time", "max_users": None}})
    assert "Measured on the test part: the events after a moment in time. Retrieval" in render_card(facts)
    given = dataclasses.replace(FACTS, recipe={"evaluation": {"split": "given"}})
    assert "Measured on the test part: the events that the table marks as test. Figures" in render_card(given)
    unknown = dataclasses.replace(FACTS, recipe={"evaluation": None})
    assert "Measured on the test part. Figures" in render_card(unknown)


# ----------------------------------------------------------------------------------------------- what it keeps quiet


@pytest.mark.parametrize(
    "place", ["/home/me/films", "~/films", "C:\\films", "\\\\host\\films", "file:///films", "films /data:train", "a=/b"]
)
def test_places_of_the_machine_stay_out(place):
    recipe = {"data": {"items": place, "users": "org/users:train"}, "training": {"many": [place, "kept"]}}
    text = render_card(CardFacts(name="x", recipe=recipe, command=f"m6rec finetune {place}"))
    assert place not in text and "Command" not in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == {
        "data": {"users": "org/users:train"},
        "training": {"many": ["kept"]},
    }


def test_secrets_stay_out():
    recipe = {"training": {"hub_token": "hf_1", "seed": 1, "inner": {"my_api_key": "hf_1", "password": "hf_1"}}}
    text = render_card(CardFacts(name="x", recipe=recipe))
    assert "hf_1" not in text and "token" not in text and "seed: 1" in text


def test_numbers_of_tokens_stay_in():
    settings = {"num_virtual_tokens": 8, "max_tokens": 64, "pad_token": "[PAD]", "first_option_token": "yes"}
    recipe = {"tuning": {"settings": settings}, "pretraining": {"texts": {"/data/en.txt": 1, "org/en": 2}}}
    text = render_card(CardFacts(name="x", recipe=recipe))
    kept = {"tuning": {"settings": settings}, "pretraining": {"texts": {"org/en": 2}}}
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == kept


def test_a_secret_under_a_harmless_name_stays_out():
    token = "hf_" + "aB3" * 11
    text = render_card(CardFacts(name="x", recipe={"training": {"run_name": f"by {token}", "seed": 1}}, command=token))
    assert token not in text and "seed: 1" in text


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_the_recipe_of_a_card_is_a_recipe(name):
    recipe = load_recipe(name, ["training.output_dir=runs/x", "model.config.num_joint_layers=null"])
    text = render_card(CardFacts(name="x", recipe=dataclasses.asdict(recipe)))
    assert load_recipe(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])) == recipe


# ------------------------------------------------------------------------------------------------ files and errors


def test_write_cards(tmp_path):
    path = write_cards(FACTS, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "README.md" and sorted(os.listdir(path.parent)) == [*CARDS.values()]
    assert render_cards(FACTS)["README.md"] == WHOLE.replace("films\n\nAn", "films\n\n[中文](README_zh.md)\n\nAn")
    for file, text in render_cards(FACTS).items():
        assert (path.parent / file).read_text(encoding="utf-8") == f"{text}\n{MARK}\n"


def test_a_write_that_fails_leaves_the_old_card(tmp_path, monkeypatch):
    path = write_cards(FACTS, tmp_path)
    before, write = path.read_text(encoding="utf-8"), Path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        write_cards(CardFacts(name="x"), tmp_path)
    assert path.read_text(encoding="utf-8") == before


def test_hardware_names_the_parts_and_not_the_machine():
    found = hardware()
    assert f", {os.cpu_count()} logical cores, " in found
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert float(re.search(r"([\d.]+) GiB memory", found)[1]) == pytest.approx(pages / 2**30, abs=0.06)
    assert found.split(",")[0].strip() and platform.node() not in found and "/" not in found


def test_a_processor_without_a_name_is_called_by_its_kind(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert hardware().startswith(f"{platform.machine()}, ")


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match=r"'fr'.*en, zh"):
        render_card(FACTS, "fr")
    with pytest.raises(ValueError, match=r"name is ' '"):
        CardFacts(name=" ")
    with pytest.raises(ValueError, match=r"'history': \['a'\].*candidates"):
        CardFacts(name="x", example={"history": ["a"]})


def test_a_card_says_how_the_model_compares_and_what_became_of_repeats():
    verdict = {
        "metric": "ndcg@10",
        "baseline": "neighbours_and_words",
        "difference": -0.0125,
        "interval": [-0.02, -0.005],
    }
    row = {"ndcg@10": 0.1, "examples": 400, "seen": "out", "repeats": 12, "repeats_counted": "as misses"}
    results = {"retrieval": {"m6rec": {**row, "verdict": verdict}, "neighbours_and_words": {**row, "ndcg@10": 0.1125}}}
    facts = dataclasses.replace(FACTS, results=results)
    english, chinese = render_card(facts), render_card(facts, "zh")
    assert "Against neighbours and words, the best column that needs no training" in english
    assert "| held-out items met before | 12 | 12 |" in english and "| these count | as misses | as misses |" in english
    assert "| 留出物品中用户见过的 | 12 | 12 |" in chinese and "| 其计法 | 计为未命中 | 计为未命中 |" in chinese
    assert all(
        "`ndcg@10` -0.0125 [-0.0200, -0.0050]" in text and "`verdict`" not in text for text in (english, chinese)
    )
