"""Pretraining: what each objective gives and asks, that draws depend on nothing else, and that texts are learnt."""

import json
import math
import re
from collections import Counter

import pytest
import torch
import yaml
from transformers import AutoModel, Trainer, TrainerCallback

from m6rec.train import pretrain as module
from m6rec.train.build import prepare
from m6rec.train.cli import main
from m6rec.train.pretrain import TextRows, fit, perplexity, text_row
from m6rec.train.recipe import load_recipe
from tests.train.world import TITLES, recipe_of

OBJECTIVES = ("text", "infilling", "item")


@pytest.fixture
def make_rows(run):
    def make(seed=3, **objectives):
        return TextRows(run.writer.items, run.processor, objectives, seed)

    return make


def decoded(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def asked(processor, row):
    """What a row's labels ask for, after a check that each label is the token of its place."""
    assert len(row["labels"]) == len(row["input_ids"])
    places = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert all(row["labels"][place] == row["input_ids"][place] for place in places)
    assert places == list(range(places[0], len(row["input_ids"]))), "one stretch up to the row's end"
    return decoded(processor, [row["input_ids"][place] for place in places])


def test_text_is_written_on_as_a_plain_document(make_rows, run):
    for row, title, year in zip(make_rows(text=1.0), TITLES, range(1990, 2005)):
        said = decoded(run.processor, row["input_ids"])
        assert said == f"{title}, {year}[EOS]"
        assert asked(run.processor, row) == said


def test_item_segment_is_given_and_its_text_is_asked(make_rows, run):
    ids = run.processor.tokenizer.structural_ids
    for row, title, year in zip(make_rows(item=1.0), TITLES, range(1990, 2005)):
        said = decoded(run.processor, row["input_ids"])
        parts = r"\[BOS'\]\[EOS'\]\[BOS\]\[ITEM\](.*)\[SEG\]\[TEXT\](the user .* a video that is) (.*)\[EOS\]"
        given, lead, written = re.fullmatch(parts, said).groups()
        assert given == written == f"{title}, {year}"
        assert asked(run.processor, row) == f"{lead} {written}[EOS]"
        assert row["input_ids"][-1] == ids["eos_token_id"]


def test_infilling_masks_spans_and_asks_for_them(make_rows, run):
    hidden = 0
    for row, title, year in zip(make_rows(infilling=1.0), TITLES, range(1990, 2005)):
        said = decoded(run.processor, row["input_ids"])
        source, target = re.fullmatch(r"\[BOS'\]\[TEXT\](.*)\[SEG\]\[EOS'\]\[BOS\]\[TEXT\](.*\[EOS\])", said).groups()
        assert asked(run.processor, row) == target
        # Bytes of a character may be masked apart, so the spans are put back as ids.
        ids, special = row["input_ids"], run.processor.tokenizer.structural_ids
        opened = ids.index(special["bos_token_id"])
        body, spans = ids[2 : opened - 2], [[]]
        for index in ids[opened + 2 : -1]:
            spans[-1].append(index)
            if index == special["segment_token_id"]:
                spans[-1].pop()
                spans.append([])
        assert body.count(special["mask_token_id"]) == len(spans) == source.count("[MASK]") > 0
        assert all(spans)
        restored = []
        for index in body:
            restored += spans.pop(0) if index == special["mask_token_id"] else [index]
        assert decoded(run.processor, restored) == f"{title}, {year}"
        hidden += len(restored) - len(body)
    assert hidden > 0


def test_the_models_loss_reads_the_labels_as_the_rows_mean_them(make_rows, run):
    """Only the written tokens count: the loss is theirs, by the model's own logits."""
    model = run.model.eval()
    for objective in OBJECTIVES:
        for row in list(make_rows(**{objective: 1.0}))[:4]:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            out = model(input_ids=ids, labels=labels)
            logs = out.logits[0].log_softmax(-1)
            found = [-logs[place - 1, label] for place, label in enumerate(row["labels"]) if place and label != -100]
            torch.testing.assert_close(out.loss, torch.stack(found).mean())


@pytest.mark.parametrize("order", [range(15), range(14, -1, -1), [7, 3, 7, 7, 0, 3]])
def test_draws_depend_on_seed_epoch_and_index_only(make_rows, order):
    rows, fresh = make_rows(text=1.0, infilling=2.0, item=1.0), make_rows(text=1.0, infilling=2.0, item=1.0)
    for epoch in (2, 0, 2):
        rows.set_epoch(epoch)
        for index in order:
            fresh.set_epoch(5)
            _ = fresh[index], torch.rand(3)
            fresh.set_epoch(epoch)
            assert rows[index] == fresh[index]


def test_epochs_and_seeds_draw_anew(make_rows):
    def drawn(seed, epoch):
        rows = make_rows(seed, infilling=1.0)
        rows.set_epoch(epoch)
        return [tuple(row["input_ids"]) for row in rows]

    assert drawn(3, 0) == drawn(3, 0)
    assert sum(a != b for a, b in zip(drawn(3, 0), drawn(3, 1))) > 5
    assert sum(a != b for a, b in zip(drawn(3, 0), drawn(4, 0))) > 5


def kind_of(processor, row):
    ids = processor.tokenizer.structural_ids
    if row["input_ids"][0] != ids["source_token_id"]:
        return "text"
    return "infilling" if ids["mask_token_id"] in row["input_ids"] else "item"


def test_objectives_are_drawn_by_their_weights(make_rows, run):
    rows, counts = make_rows(text=1.0, infilling=0.0, item=3.0), Counter()
    for epoch in range(100):
        rows.set_epoch(epoch)
        counts.update(kind_of(run.processor, row) for row in rows)
    assert set(counts) == {"text", "item"}
    # 1500 draws with a chance of 3/4: 1125, give or take 4 standard deviations of 17.
    assert abs(counts["item"] - 1125) < 68


def test_length_is_kept_and_the_end_is_always_asked(make_recipe):
    run = prepare(make_recipe(text={"max_length": 48}))
    end = run.processor.tokenizer.structural_ids["eos_token_id"]
    item = {"item_id": "x", "title": "很长的标题 " * 20 + "and words " * 20}
    rng = module.np.random.default_rng(0)
    for objective in OBJECTIVES:
        row = text_row(run.processor, item, item["title"], objective, rng)
        assert len(row["input_ids"]) <= 48
        assert row["input_ids"][-1] == row["labels"][-1] == end


# ------------------------------------------------------------------------------------------------------- perplexity


@torch.no_grad()
def slow_perplexity(model, rows):
    """A row by itself, a token by itself: it is predicted from those before it."""
    losses = []
    for row in rows:
        for place, label in enumerate(row["labels"]):
            if label != -100 and place > 0:
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, place - 1]
                losses.append(-float(logits.log_softmax(-1)[label]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_perplexity_is_that_of_a_slow_loop_at_any_batch_size(make_rows, run, monkeypatch, objective):
    rows = list(make_rows(**{objective: 1.0}))[:7]
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run.model.train()
    expected = slow_perplexity(run.model.eval(), rows)
    for size in (1, 3, 64):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", size)
        assert perplexity(run.model.train(), rows, run.collator) == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary(make_rows, run):
    for parameter in run.model.parameters():
        torch.nn.init.zeros_(parameter)
    found = perplexity(run.model, list(make_rows(text=1.0, item=1.0)), run.collator)
    assert found == pytest.approx(run.model.config.vocab_size, rel=1e-4)


# --------------------------------------------------------------------------------------------------------- training


class Watcher(TextRows):
    """Remembers what was asked of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append((self.epoch, index))
        return super().__getitem__(index)


@pytest.fixture
def watched(monkeypatch):
    """All rows that are made from here on."""
    made = []
    monkeypatch.setattr(module, "TextRows", lambda *args: made.append(Watcher(*args)) or made[-1])
    return made


def epochs(count, **more):
    return {"num_train_epochs": count, "max_steps": -1, **more}


@pytest.mark.parametrize("loader_tells", [True, False], ids=["loader tells", "as with several processes"])
def test_each_epoch_is_drawn_anew_and_sees_every_text_once(make_recipe, watched, monkeypatch, loader_tells):
    if not loader_tells:
        monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda self, epoch: None)
    fit(prepare(make_recipe(pretraining={"valid_fraction": 0.2}, training=epochs(2))))
    train = watched[0]
    assert sorted(train.asked) == [(epoch, index) for epoch in range(2) for index in range(12)]


def test_held_out_texts_are_not_trained_on(make_recipe, watched):
    run = prepare(make_recipe(pretraining={"valid_fraction": 0.2}, training=epochs(1)))
    found = fit(run)
    train, *valid = watched
    ids = {item["item_id"] for item in train.items}
    assert len(ids) == 12
    for rows in valid:
        assert {item["item_id"] for item in rows.items} == {item["item_id"] for item in run.writer.items} - ids
    assert list(found) == list(OBJECTIVES)
    for objective, rows in zip(OBJECTIVES, valid):
        assert rows.names == [objective]
        expected = slow_perplexity(run.model, [rows[index] for index in range(3)])
        assert found[objective] == pytest.approx(expected, rel=0.02 if module.use_bf16() else 1e-4)


def test_without_held_out_texts_there_is_no_perplexity(make_recipe, watched):
    run = prepare(make_recipe(pretraining={"valid_fraction": 0.0}, training=epochs(1)))
    assert fit(run) == {}
    assert sorted(index for _, index in watched[0].asked) == list(range(15))


def test_a_model_trained_in_bfloat16_answers_in_float32_as_it_does_when_loaded(make_recipe):
    run = prepare(make_recipe(training={"bf16": True}))
    fit(run)
    loaded = type(run.model)(run.model.config).eval()
    loaded.load_state_dict(run.model.state_dict())
    rows = [TextRows(run.writer.items, run.processor, {"item": 1.0}, 0)[index] for index in range(15)]
    assert perplexity(run.model, rows, run.collator) == perplexity(loaded, rows, run.collator)


def test_a_text_is_learnt_by_heart(make_recipe, tmp_path):
    recipe = make_recipe(
        pretraining={"valid_fraction": 0.0},
        training={"max_steps": 200, "learning_rate": 3e-3, "lr_scheduler_type": "constant"},
        model={"config": {"hidden_dropout": 0.0}},
    )
    run = prepare(recipe)
    run.writer.items = run.writer.items[:1]
    before, after = {}, {}
    for found in (before, after):
        for objective in OBJECTIVES:
            rows = list(TextRows(run.writer.items, run.processor, {objective: 1.0}, 0))
            found[objective] = perplexity(run.model, rows, run.collator)
        fit(run) if found is before else None
    assert max(after["text"], after["item"]) < 1.1
    # What is masked differs from epoch to epoch, so that this is learnt and not remembered.
    assert after["infilling"] < before["infilling"] / 40


def test_what_a_bidirectional_document_gives_away_is_refused(make_recipe):
    config = {"document_attention": "bidirectional"}
    with pytest.raises(ValueError, match=r"'text' writes a text on.*give it the weight 0"):
        fit(prepare(make_recipe(model={"config": config})))
    objectives = {"text": 0.0, "item": 1.0}
    assert fit(prepare(make_recipe(model={"config": config}, pretraining={"objectives": objectives}))) == {}


def test_training_is_resumed(make_recipe, watched, monkeypatch, tmp_path):
    """Stopped after one epoch of two and resumed, the weights are those of a run in one go."""

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    def trained(folder, stop=False, **training):
        run = prepare(
            make_recipe(training=epochs(2, output_dir=str(tmp_path / folder), save_strategy="epoch", **training))
        )
        more = [Stop()] if stop else []
        monkeypatch.setattr(
            module, "Trainer", lambda callbacks, **kwargs: Trainer(callbacks=callbacks + more, **kwargs)
        )
        fit(run)
        return run.model.state_dict()

    whole = trained("whole")
    trained("parts", stop=True)
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    resumed = trained("parts", resume_from_checkpoint=str(checkpoint))
    assert {epoch for epoch, _ in watched[-1].asked} == {1}, "the first is not run again"
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- commands


def test_command_leaves_a_model_that_finetuning_goes_on_from(tables, tmp_path, capsys):
    plain = recipe_of(tables, tmp_path / "pretrained", pretraining={"valid_fraction": 0.2})
    # What is said of evaluation during training is meant for fine-tuning.
    plain["training"] |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    plain["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "ndcg@5"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain, allow_unicode=True))
    assert main(["pretrain", str(tmp_path / "recipe.yaml"), "training.seed=9", "training.save_strategy=no"]) == 0
    folder = tmp_path / "pretrained"
    found = json.loads((folder / "metrics.json").read_text())["perplexity"]
    assert list(found) == list(OBJECTIVES)
    printed = capsys.readouterr().out
    for name, value in found.items():
        assert f"{name:12} perplexity {value:.2f}" in printed
    assert str(folder) in printed
    assert load_recipe(folder).seed == 9
    model = AutoModel.from_pretrained(folder)
    assert model.config.trained_tasks == ["plausibility", "writing"]

    arguments = [
        f"model.checkpoint={folder}",
        f"training.output_dir={tmp_path / 'tuned'}",
        "training.learning_rate=0.0",
    ]
    assert main(["finetune", str(tmp_path / "recipe.yaml"), *arguments]) == 0
    tuned = AutoModel.from_pretrained(tmp_path / "tuned")
    assert tuned.config.trained_tasks == ["plausibility", "retrieval", "writing"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], weight, rtol=0, atol=0)
