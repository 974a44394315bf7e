"""Dialogues as rows: texts around a slot, and items to retrieve from what was said."""

import dataclasses
import json

import numpy as np
import pytest

from m6rec.train.cli import main
from m6rec.train.config.arguments import EvaluationArguments
from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation.dialogues import dialogue_ranking, rules
from m6rec.train.rows.dialogues import Wanted, dialogue_examples, read_dialogues, title_span
from m6rec.train.rows.writing import writing_examples
from m6rec.train.runs.build import prepare, wanted_in
from m6rec.train.runs.training_set import training_parts
from tests.fast import some
from tests.modeling_m6rec.conversion.backbones import publish
from tests.train.data.test_dialogues import write_iard
from tests.train.data.test_reviews import write_clothes
from tests.train.world import recipe_of, write_tables

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_joint_layers": 1}
SMALL |= {"num_attention_heads": 2, "embedding_dim": 8}
QUICK = ["model.backbone=null", f"model.shape={SMALL}", "model.config={}", "text.vocab_size=500"]
QUICK += ["training.max_steps=2", "training.disable_tqdm=true", "evaluation.max_texts=2"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    pairs = [(user, item) for user in range(4) for item in range(3)]
    events = [{"user_id": f"u{user}", "item_id": f"i{item}", "event": "watch"} for user, item in pairs]
    items = [{"item_id": f"i{row}", "title": title} for row, title in enumerate(("Alien", "It", "Heat", "Ran"))]
    talk = []
    for number in range(5):
        for speaker, text, item in (
            ("me", "hello", "i2"),
            ("me", "something scary?", ""),
            ("bot", "I know alien (1979), it is great.", "i0"),
            ("bot", "Really.", ""),
            ("me", "seen it", ""),
            ("bot", "Then a film by Kurosawa", "i3"),
        ):
            talk.append({"dialogue_id": f"d{number}", "speaker": speaker, "text": text, "item_id": item})
    paths = write_tables(tmp_path_factory.mktemp("talk"), interactions=events, items=items, talk=talk)
    return {"data": {name: paths[name] for name in ("interactions", "items")}, "talk": paths["talk"]}


@pytest.fixture
def make_run(tables, tmp_path):
    def make(learn=("retrieval", "writing"), **task):
        own = {"learn": list(learn), "writing": {"conversation": []}}
        own |= {"dialogues": tables["talk"], "system_speakers": ["bot"]}
        evaluation = {"valid_fraction": 0.2, "test_fraction": 0.2}
        recipe = recipe_of(tables["data"], tmp_path / "run", task={**own, **task}, evaluation=evaluation)
        return prepare(load_recipe(recipe))

    return make


def dialogues_of(run, part="train"):
    return read_dialogues(run.recipe.task, run.log, run.recipe.evaluation, run.recipe.seed)[part]


def test_utterances_of_one_speaker_are_a_turn_with_its_first_item(make_run):
    (one, *others) = dialogues_of(make_run())
    assert len(others) == 2
    assert [turn["content"] for turn in one.turns] == [
        "hello\nsomething scary?",
        "I know alien (1979), it is great.\nReally.",
        "seen it",
        "Then a film by Kurosawa",
    ]
    assert one.items == ["", "i0", "", "i3"], "what users name is not recommended"


def test_a_reply_with_a_title_is_learnt_up_to_the_slot_and_from_it(make_run):
    run = make_run()
    task, evaluation = run.recipe.task, run.recipe.evaluation
    examples = writing_examples(run.writer, run.processor, run.split, "train", task, evaluation, 0)
    tokenizer = run.processor.tokenizer
    decide, around, plain = examples.examples[:3]
    learnt = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in examples.rows[:3]]
    assert learnt == ["SYSTEM: I know[SLOT]", ", it is great.\nReally.[EOS]", "SYSTEM: Then a film by Kurosawa[EOS]"]
    assert (decide.known, around.known, plain.slot) == (False, True, None)
    texts = [tokenizer.decode(row["input_ids"]) for row in examples.rows[:3]]
    assert "[ITEM]" not in texts[0] and texts[0].endswith("SYSTEM: I know[SLOT][EOS]")
    assert "[BOS][ITEM]Alien[SEG][TEXT]SYSTEM: I know[SLOT], it is great" in texts[1]
    assert "Alien" not in texts[0] and plain.request["messages"] == dialogues_of(run)[0].turns[:3]


def test_without_a_slot_in_the_vocabulary_replies_are_plain(make_run):
    run = make_run(learn=["retrieval"], writing={}, dialogues=None)
    assert run.processor.tokenizer.slot_token_id is None
    dialogue = dialogues_of(make_run())[:1]
    examples = list(dialogue_examples(dialogue, run.writer, run.processor))
    assert [example.slot for example in examples] == [None, None]
    assert examples[0].answered["messages"][-1]["content"] == dialogue[0].turns[1]["content"]


def test_retrieval_learns_the_recommended_item_after_the_last_turn(make_run):
    run = make_run()
    wanted = wanted_in(run, "train")
    assert wanted.targets == [0, 3] * 3 and wanted.named == [[], [0]] * 3
    assert [len(request["messages"]) for request in wanted.requests] == [1, 3] * 3
    assert run.catalogue.counts.tolist() == [4 + 3, 0, 0, 3], "training events, and recommendations that are learnt"
    rows = wanted.rows(run.processor)
    assert [row["next_items"] for row in rows[:2]] == [[-100, 0], [-100, -100, -100, 3]]
    batch = run.collator(rows[:2])
    places = (batch["retrieval_labels"] != -100).nonzero().tolist()
    segment = run.model.config.segment_token_id
    last = [int(np.flatnonzero(np.array(row["input_ids"]) == segment)[-1]) for row in rows[:2]]
    assert places == [[0, last[0]], [1, last[1]]], "at the [SEG] of the user's last turn"
    parts = training_parts(run)
    assert any(list(part)[:1] == rows[:1] for part in parts if isinstance(part, list))


def test_items_of_dialogues_are_ranked_against_rules(make_run):
    run = make_run()
    wanted = wanted_in(run, "test")
    examples = dialogue_ranking(wanted, run.processor, run.catalogue.counts)
    assert examples.targets.tolist() == [0, 3] and not examples.cold.any()
    assert [own.tolist() for own in examples.histories] == [[], [0]]
    talk = Wanted(["d"], [{"messages": [{"role": "user", "content": "is HEAT good?"}]}], [[]], [2])
    scores = rules(talk, ["Alien", "It", "Heat", "Ran"], np.array([9, 0, 0, 5]))
    assert scores["popularity"].argmax() == 0 and scores["words"].argmax() == 2
    assert (np.argsort(-scores["words"][0]) == [2, 0, 3, 1]).all(), "popular items first where no word is common"


def test_a_title_is_found_as_words_of_its_own():
    assert title_span("It is it (2017)!", "It") == (0, 2)
    assert title_span("Alienation", "Alien") is None
    assert title_span("see [Rec] (2007).", "[rec]") == (4, 16)


def test_unknown_items_are_refused(make_run):
    run = make_run()
    log = dataclasses.replace(run.log, items=run.log.items.drop("i3"))
    with pytest.raises(ValueError, match="dialogues: 1 items are not in the items table, such as 'i3'"):
        read_dialogues(run.recipe.task, log, EvaluationArguments(), 0)


@pytest.mark.parametrize("method", some(["full", "lora"], ["full"]))
def test_the_recipe_converse(tmp_path, method):
    data, out = write_iard(tmp_path / "data"), tmp_path / "out"
    given = [f"data.directory={data}", f"training.output_dir={out}", "training.per_device_train_batch_size=2", *QUICK]
    if method == "lora":
        given = [entry for entry in given if not entry.startswith("model.")]
        given += [f"model.backbone={publish(tmp_path / 'llama', 'llama')}", "model.config.num_joint_layers=1"]
        given += ["tuning.method=lora"]
    assert main(["finetune", "converse", *given]) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert {"m6rec", "popularity", "words"} == report["dialogues"].keys()
    assert report["writing"]["m6rec"]["conversation/perplexity"] > 1


def test_the_recipe_explain(tmp_path):
    data, out = write_clothes(tmp_path), tmp_path / "out"
    assert main(["finetune", "explain", f"data.directory={data}", f"training.output_dir={out}", *QUICK]) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["writing"]["m6rec"]["explanation/perplexity"] > 1
