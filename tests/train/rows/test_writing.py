"""Writing: the right texts are asked, nothing is told of them, what is cut is not ended, figures mean what they say."""

import gzip
import json
import math

import numpy as np
import pandas
import pytest
import torch

from m6rec import writing_m6rec
from m6rec.train.config.arguments import EvaluationArguments, TaskArguments
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation import texts
from m6rec.train.evaluation.texts import measure_texts, measure_writing, unigram_perplexity, write
from m6rec.train.metrics import rouge_l
from m6rec.train.rows.dialogues import WritingExample, dialogue_examples, read_dialogues
from m6rec.train.rows.writing import TextSource, WritingExamples, encoded, writing_examples
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import finetune, fit, full_report, measure
from tests.conftest import real_data
from tests.train.world import recipe_of, write_tables

BY_TIME = {"split": "time", "valid_fraction": 0.3, "test_fraction": 0.4}
ALL = {"explanation": ["rate"], "query": ["search"], "item_text": ["rate"], "conversation": []}
REVIEWS = ["a quiet film about the sea", "too long, but the end is good", "音乐很好", "not for me"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Eight users who search, watch and rate twelve films; some ratings without words; and six dialogues."""
    events = []
    for user in range(8):
        for step in range(6):
            verb = ["search", "rate", "rate"][step % 3]
            text = {0: f"films like {user} {step}", 1: f"{REVIEWS[(user + step) % 4]} {user} {step}", 2: ""}[step % 3]
            row = {
                "user_id": f"u{user}",
                "item_id": f"i{(user + 2 * step) % 12}",
                "timestamp": 10**9 + 100 * step + user,
            }
            events.append({**row, "event": verb, "text": text})
    items = [{"item_id": f"i{row}", "title": f"Film number {row}", "year": 1990 + row} for row in range(12)]
    turns = []
    for dialogue in range(6):
        for speaker, text in [("BOT", "hello"), ("me", f"a film {dialogue}?"), ("bot", f"take {dialogue}"), ("me", "")]:
            turns.append({"talk": f"d{dialogue}", "speaker": speaker, "text": text})
    paths = write_tables(tmp_path_factory.mktemp("words"), interactions=events, items=items, talk=turns)
    return {"data": {name: paths[name] for name in ("interactions", "items")}, "talk": paths["talk"]}


def task_of(tables, **changes):
    own = {"dialogues": tables["talk"], "dialogue_columns": {"dialogue_id": "talk"}, "system_speakers": ["bot"]}
    return {"learn": ["writing"], "writing": ALL, **own, **changes}


@pytest.fixture
def make_run(tables, tmp_path):
    def make(task=None, **sections):
        task = task_of(tables, **(task or {}))
        return prepare(load_recipe(recipe_of(tables["data"], tmp_path / "run", task=task, **sections)))

    return make


def examples_of(run, part="train", rolling=False):
    evaluation = EvaluationArguments(rolling=rolling, valid_fraction=0.2, test_fraction=0.2)
    return writing_examples(run.writer, run.processor, run.split, part, run.recipe.task, evaluation, 0)


def by_name(examples):
    return {name: [examples.examples[place] for place in examples.of(name)] for name in ALL}


def test_every_text_of_the_training_part_is_learnt_once_after_what_came_before(make_run):
    run = make_run()
    train = run.split.train
    found = by_name(examples_of(run))
    assert [example.text for example in found["query"]] == train[train["event"] == "search"]["text"].tolist()
    reviews = train[(train["event"] == "rate") & (train["text"] != "")]
    assert [example.text for example in found["explanation"]] == reviews["text"].tolist()
    rated = train[train["event"] == "rate"]
    titles = [run.writer.item(item)["title"] for item in rated["item_id"]]
    assert [example.text.split(",")[0] for example in found["item_text"]] == titles
    for name, frame in (("query", train[train["event"] == "search"]), ("explanation", reviews), ("item_text", rated)):
        for example, (index, event) in zip(found[name], frame.iterrows(), strict=True):
            earlier = train[(train["user_id"] == event["user_id"]) & (train.index < index)]["item_id"].tolist()
            told = [each["item"]["item_id"] for each in example.request["history"]]
            assert told == earlier[-run.processor.max_events :]
            candidates = [item["item_id"] for item in example.request.get("candidates", [])]
            assert candidates == ([event["item_id"]] if name == "explanation" else [])


def test_rows_are_worded_by_the_template_and_label_the_text_alone(make_run):
    run = make_run()
    examples, decode = examples_of(run), run.processor.tokenizer.decode
    leads = {**run.processor.template["tasks"], "conversation": "SYSTEM:"}
    for example, row in zip(examples.examples, examples.rows, strict=True):
        source, target = decode(row["input_ids"]).split("[BOS]")
        assert f"[TEXT]{leads[example.name]}" in target
        labels = np.array(row["labels"])
        first = int((labels != -100).argmax())
        assert (labels[first:] == row["input_ids"][first:]).all()
        written = decode(labels[first:])
        assert written.endswith("[EOS]")
        assert example.text in written
        assert example.name == "conversation" or example.text not in source or example.name == "item_text"


@pytest.mark.parametrize("rolling", [False, True])
def test_held_out_texts_are_told_what_may_be_known(make_run, rolling):
    run = make_run(evaluation=BY_TIME)
    split = run.split
    found = by_name(examples_of(run, "test", rolling))["item_text"]
    rated = split.test[split.test["event"] == "rate"]
    everything = pandas.concat([split.train, split.valid, split.test]).sort_index()
    known = everything if rolling else everything.drop(split.test.index)
    assert len(found) == len(rated) > 8
    for example, (index, event) in zip(found, rated.iterrows(), strict=True):
        earlier = known[(known["user_id"] == event["user_id"]) & (known.index < index)]["item_id"].tolist()
        told = [each["item"]["item_id"] for each in example.request["history"]]
        assert told == earlier[-run.processor.max_events :]


def test_a_text_that_was_cut_is_not_ended(make_run):
    run = make_run(task={"writing": {"query": ["search"]}, "dialogues": None, "dialogue_columns": {}})
    whole = examples_of(run)
    assert all(row["labels"][-1] == run.model.config.eos_token_id for row in whole.rows)
    run.processor.max_length = 24
    run.split.train.loc[run.split.train["event"] == "search", "text"] = "a very long query " * 9
    cut = examples_of(run)
    for row in cut.rows:
        assert len(row["input_ids"]) <= 24
        assert row["input_ids"][-1] == run.model.config.eos_token_id
        assert row["labels"][-1] == -100
        assert sum(label != -100 for label in row["labels"]) > 3


def test_each_turn_of_the_system_is_learnt_with_the_turns_before(make_run, tables):
    run, evaluation = make_run(), EvaluationArguments(valid_fraction=1 / 3, test_fraction=1 / 6)
    dialogues = read_dialogues(TaskArguments(**task_of(tables)), run.log, evaluation, 0)
    (third,) = [each for own in dialogues.values() for each in own if each.name == "d2"]
    assert third.turns == [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "a film 2?"},
        {"role": "assistant", "content": "take 2"},
    ]
    parts = {part: list(dialogue_examples(own, run.writer, run.processor)) for part, own in dialogues.items()}
    assert {part: len(found) for part, found in parts.items()} == {"train": 6, "valid": 4, "test": 2}
    answers = [example.text for found in parts.values() for example in found if example.text != "hello"]
    assert sorted(answers) == [f"take {dialogue}" for dialogue in range(6)]
    turns = {f"take {each.name[1:]}": each.turns for own in dialogues.values() for each in own}
    for found in parts.values():
        for first, second in zip(found[::2], found[1::2], strict=True):
            assert (first.text, first.request) == ("hello", {"messages": []})
            assert second.request["messages"] == turns[second.text][:2]
            assert second.answered["messages"] == turns[second.text]
    run.processor.max_events = 1
    short = list(dialogue_examples(dialogues["test"], run.writer, run.processor))
    assert [each.request["messages"] for each in short] == [[], parts["test"][1].request["messages"][-1:]]


def test_what_cannot_be_learnt_is_refused(make_run, tables):
    with pytest.raises(ValueError, match=r"'query': no training event of \['look'\] has a text"):
        examples_of(make_run(task={"writing": {"query": ["look"]}, "dialogues": None}))
    run = make_run(task={"writing": {"query": ["search"], "explanation": []}, "dialogues": None})
    for column, name in (("event", "query"), ("text", "query")):
        with pytest.raises(ValueError, match=f"'{name}' is learnt from column '{column}'"):
            list(
                TextSource(run.writer, run.processor, run.recipe.task).labelled(
                    pandas.DataFrame({"event": ["search"], "text": [""]}).drop(columns=column), name
                )
            )
    with pytest.raises(
        ValueError, match=r"no speaker is one of task.system_speakers \(robot\); the table has BOT, bot, me"
    ):
        read_dialogues(TaskArguments(**task_of(tables, system_speakers=["robot"])), run.log, EvaluationArguments(), 0)
    with pytest.raises(ValueError, match=r"name their table as task.dialogues, or a data set that has them"):
        read_dialogues(TaskArguments(**task_of(tables, dialogues=None)), run.log, EvaluationArguments(), 0)


def test_perplexity_is_the_exponent_of_the_mean_cost_of_a_written_token(make_run):
    run = make_run(evaluation=BY_TIME)
    examples = examples_of(run, "valid")
    report = measure_writing(run.model, examples, run.collator)
    costs = {}
    for example, row in zip(examples.examples, examples.rows, strict=True):
        with torch.no_grad():
            logits = run.model.eval()(torch.tensor([row["input_ids"]]), return_logits=True).logits[0]
        for place, label in enumerate(row["labels"]):
            if label != -100:
                costs.setdefault(example.name, []).append(-float(logits[place - 1].log_softmax(-1)[label]))
    assert report["perplexity"] == pytest.approx(math.exp(np.mean(sum(costs.values(), []))), rel=1e-4)
    for name, own in costs.items():
        assert report[f"{name}/perplexity"] == pytest.approx(math.exp(np.mean(own)), rel=1e-4)
    assert report["examples"] == len(examples.rows)
    assert set(costs) == set(ALL)


def test_unigrams_by_hand():
    def rows(*labels):
        return WritingExamples([], [{"labels": list(own)} for own in labels])

    # of 5 tokens, with one added to each: 2, 1, 3, 1, 1 of 8
    found = unigram_perplexity(rows((-100, 0, 2), (-100, 2)), rows((-100, 2, 1)), 5)
    assert found == {"perplexity": pytest.approx(math.sqrt(8 / 3 * 8 / 1)), "examples": 1}


def test_texts_are_written_in_batches_as_one_by_one(make_run, monkeypatch):
    run = make_run(model={"item_embeddings": True})
    torch.nn.init.normal_(run.model.get_input_embeddings().weight)  # so that it has something to say
    torch.nn.init.normal_(run.model.model.item_memory.weight)
    monkeypatch.setattr(texts, "NEW_TOKENS", 8)
    found = by_name(examples_of(run))
    for name in ("explanation", "conversation"):
        monkeypatch.setattr(writing_m6rec, "ROWS_AT_ONCE", 3)
        together = write(run.model, found[name][:7], run.processor)
        alone = [write(run.model, [example], run.processor)[0] for example in found[name][:7]]
        assert together == alone
        assert any(together)


def test_what_is_written_is_compared_with_what_people_wrote(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(texts, "source_gain", lambda *_: None)
    examples = WritingExamples([WritingExample("query", {}, f"red {n}") for n in range(5)], [{}] * 5)
    monkeypatch.setattr(texts, "write", lambda _, own, __: [f"red {example.text[-1]} shoe" for example in own])
    evaluation = EvaluationArguments(max_texts=3, text_features=["Red", "blue"])
    report = measure_texts(run.model, examples, (examples, examples), run.collator, evaluation, 0)
    assert list(report) == ["m6rec", "one_sentence", "nearest_text", "previous_text"]
    own = report["m6rec"]
    assert own["query/texts"] == 3
    assert own["query/rouge_l"] == pytest.approx(rouge_l(["red 1 shoe"], ["red 1"]))
    assert own["query/usr"] == own["query/fmr"] == 1
    assert own["intervals"]["query/rouge_l"] == pytest.approx([own["query/rouge_l"]] * 2)
    assert report["one_sentence"]["query/usr"] == pytest.approx(1 / 3)
    assert report["previous_text"]["query/rouge_l"] == 0


def test_source_gain_is_the_perplexity_of_a_wrong_source_over_the_right_one(make_run):
    run = make_run()
    items = [{"title": f"film {row}"} for row in range(3)]
    sources = [{"facts": ["a quiet sea"]}, {"user": "Ann"}, {"facts": ["too long"], "history": ["x"]}]
    own = [
        WritingExample("explanation", {**source, "candidates": [item]}, f"red {row}", f"u{row % 2}")
        for row, (source, item) in enumerate(zip(sources, items))
    ]
    # The next in the circle with another user and another item: 0 -> 1, 1 -> 2, 2 -> 1 (0 has the same user).
    wrong = [
        WritingExample("explanation", {**sources[other], "candidates": [items[row]]}, f"red {row}")
        for row, other in [(0, 1), (1, 2), (2, 1)]
    ]
    ratio = [texts.perplexity(run.model, list(encoded(part, run.processor)), run.collator) for part in (wrong, own)]
    assert texts.source_gain(run.model, own, run.collator) == pytest.approx(ratio[0] / ratio[1] - 1, rel=1e-5)
    assert texts.source_gain(run.model, own[::2], run.collator) is None
    same = [own[0], WritingExample("explanation", own[0].request, "red", "u1")]
    assert texts.source_gain(run.model, same, run.collator) is None


def test_writing_is_finetuned_beside_other_tasks_and_reported(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "NEW_TOKENS", 8)
    task = {"learn": ["writing", "retrieval"], "weights": {"writing": 0.5}}
    training = {"eval_strategy": "steps", "eval_steps": 2}
    sections = {"task": task_of(tables, **task), "evaluation": {**BY_TIME, "max_texts": 3}, "training": training}
    recipe = load_recipe(recipe_of(tables["data"], tmp_path / "run", **sections))
    report = finetune(recipe)
    assert list(report) == ["writing", "retrieval"]
    assert {"perplexity", "query/perplexity", "conversation/rouge_l", "item_text/bleu_4"} <= set(
        report["writing"]["m6rec"]
    )
    assert "query/source_gain" in report["writing"]["m6rec"]
    for who in ("m6rec", "one_sentence", "nearest_text", "previous_text"):
        assert {"explanation/naming_rate", "explanation/unsupported"} <= set(report["writing"][who])
    assert report["writing"]["previous_text"]["item_text/rouge_l"] == 0
    assert report["writing"]["unigram"]["examples"] == report["writing"]["m6rec"]["examples"]
    config = json.loads((recipe.output_dir / "config.json").read_text())
    assert config["loss_weights"] == {"text": 0.5}
    assert config["trained_tasks"] == ["retrieval", "writing"]
    again = load_recipe(recipe.output_dir, [f"model.checkpoint={recipe.output_dir}"])
    assert full_report(prepare(again)) == report


@pytest.mark.real_data
@pytest.mark.slow
def test_thirty_steps_on_real_reviews_lower_the_perplexity_below_half(tmp_path):
    folder = real_data("gift-cards")
    with gzip.open(folder / "meta_Gift_Cards.json.gz", "rt", encoding="utf-8") as file:
        titles = {row["asin"]: row["title"] for row in map(json.loads, file)}
    with gzip.open(folder / "Gift_Cards_5.json.gz", "rt", encoding="utf-8") as file:
        reviews = [row for row in map(json.loads, file) if titles.get(row["asin"])]
    names = {"reviewerID": "user_id", "asin": "item_id", "unixReviewTime": "timestamp", "reviewText": "text"}
    events = [{new: row.get(old, "") for old, new in names.items()} for row in reviews]
    items = [{"item_id": asin, "title": titles[asin]} for asin in sorted({event["item_id"] for event in events})]
    sections = {
        "text": {"domain": "ecommerce", "vocab_size": 2000},
        "task": {"learn": ["writing"], "writing": {"explanation": []}},
        "evaluation": {"split": "time", "max_users": 40},
        "training": {"max_steps": 30, "learning_rate": 0.003},
    }
    run = prepare(
        load_recipe(recipe_of(write_tables(tmp_path, interactions=events, items=items), tmp_path, **sections))
    )
    task, evaluation = run.recipe.task, run.recipe.evaluation
    examples = writing_examples(run.writer, run.processor, run.split, "test", task, evaluation, 0)
    before = measure(run, examples, "writing")["perplexity"]
    fit(run)
    assert measure(run, examples, "writing")["perplexity"] < before / 2


def test_items_are_learnt_as_the_next_one_and_field_by_field(make_run):
    run = make_run(task={"writing": {"next_item": ["rate"], "content": ["rate"]}, "dialogues": None})
    examples = examples_of(run)
    train = run.split.train
    rated = train[train["event"] == "rate"]
    names = ("next_item", "content")
    following, content = ([examples.examples[place] for place in examples.of(name)] for name in names)
    assert [each.text for each in following] == [item_of(run, item) for item in rated["item_id"]]
    assert not any("candidates" in each.request for each in following)
    fields = set()
    for each, item in zip(content, rated["item_id"], strict=True):
        (candidate,) = each.request["candidates"]
        (blank,) = [name for name, value in candidate.items() if value is None]
        assert each.text == run.writer.item(item)[blank]
        fields.add(blank)
    assert fields == {"title", "year"}


def item_of(run, item_id):
    return run.processor.item_texts([run.writer.item(item_id)])[0]
