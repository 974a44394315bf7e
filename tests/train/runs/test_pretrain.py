"""Pretraining: what each objective gives and asks, that draws depend on nothing else, and that texts are learnt."""

import json
import math
import re
from collections import Counter

import numpy
import pytest
import torch
import yaml
from transformers import AutoModel

from m6rec.train.cli import main
from m6rec.train.config.recipe import load_recipe
from m6rec.train.rows.corpus import held_out
from m6rec.train.runs import pretrain as module
from m6rec.train.runs.build import prepare, use_bf16
from m6rec.train.runs.pretrain import MixedRows, RowMaker, all_sources, fit, perplexity, pretrain
from tests.conftest import real_data
from tests.fast import some
from tests.train.world import TITLES, recipe_of

CAUSAL = ("text", "infilling", "item", "behaviour")
BOTH_WAYS = {"document_attention": "bidirectional"}
RNG = numpy.random.default_rng


@pytest.fixture
def make(run):
    return RowMaker(run.processor, 256)


def item_documents(run):
    items, events = all_sources(run, [])
    assert len(items) + len(items.valid) == len(TITLES)
    return items.documents, events.documents


def decoded(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def asked(processor, row):
    """What a row's labels ask for, after a check that each label is the token of its place."""
    assert len(row["labels"]) == len(row["input_ids"])
    places = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert all(row["labels"][place] == row["input_ids"][place] for place in places)
    return decoded(processor, [row["input_ids"][place] for place in places])


# ------------------------------------------------------------------------------------------------------- objectives


def test_text_is_written_on_as_a_plain_document(make, run):
    for document, title, year in zip(item_documents(run)[0], TITLES, range(1990, 2005)):
        row = make("text", document, RNG(0))
        said = decoded(run.processor, row["input_ids"])
        assert said == f"{title}, {year}[EOS]"
        # Nothing stands before the first token, so that it is not asked for.
        assert asked(run.processor, row) == decoded(run.processor, row["input_ids"][1:])


def test_item_segment_is_given_and_its_text_is_asked(make, run):
    for document, title, year in zip(item_documents(run)[0], TITLES, range(1990, 2005)):
        row = make("item", document, RNG(0))
        said = decoded(run.processor, row["input_ids"])
        parts = r"\[BOS'\]\[EOS'\]\[BOS\]\[ITEM\](.*)\[SEG\]\[TEXT\](the user .* a video that is) (.*)\[EOS\]"
        given, lead, written = re.fullmatch(parts, said).groups()
        assert given == written == f"{title}, {year}"
        assert asked(run.processor, row) == f"{lead} {written}[EOS]"


def test_behaviour_is_written_as_plausibility_asks_for_it(make, run):
    documents = item_documents(run)[1]
    for place in range(len(documents)):
        request = documents[place]["request"]
        row = make("behaviour", documents[place], RNG(0))
        expected = [f"also watches {item['title']}, {item['year']}[EOS]" for item in request["candidates"]]
        assert asked(run.processor, row) == "".join(expected)
        assert row["input_ids"] == run.processor.read(request, "plausibility").input_ids
        said = decoded(run.processor, row["input_ids"])
        for event in request["history"]:
            assert f"[ITEM]{event['item']['title']}, {event['item']['year']}[SEG]" in said.partition("[EOS']")[0]


def test_behaviour_carries_item_memory_and_items_by_themselves_do_not(make_recipe):
    run = prepare(make_recipe(model={"item_embeddings": True}))
    make, (items, documents) = RowMaker(run.processor, 256), item_documents(run)
    row = make("behaviour", documents[len(documents) - 1], RNG(0))
    met = [run.processor.item_row(event["item"]) for event in documents[len(documents) - 1]["request"]["history"]]
    assert [memory for memory in row["item_embedding_ids"] if memory] == met
    assert "item_embedding_ids" not in make("item", items[0], RNG(0))
    batch = run.collator([row, make("text", items[0], RNG(0))])
    assert batch["item_embedding_ids"].shape == batch["input_ids"].shape


def test_infilling_masks_spans_and_asks_for_them(make, run):
    for number, (document, title, year) in enumerate(zip(item_documents(run)[0], TITLES, range(1990, 2005))):
        row = make("infilling", document, RNG(number))
        said = decoded(run.processor, row["input_ids"])
        source, target = re.fullmatch(r"\[BOS'\]\[TEXT\](.*)\[SEG\]\[EOS'\]\[BOS\]\[TEXT\](.*\[EOS\])", said).groups()
        assert asked(run.processor, row) == target and "[MASK]" in source
        # Bytes of a character may be masked apart, so the spans are put back as ids.
        ids, special = row["input_ids"], run.processor.tokenizer.structural_ids
        opened = ids.index(special["bos_token_id"])
        spans = [[]]
        for index in ids[opened + 2 : -1]:
            spans.append([]) if index == special["segment_token_id"] else spans[-1].append(index)
        restored = []
        for index in ids[2 : opened - 2]:
            restored += spans.pop(0) if index == special["mask_token_id"] else [index]
        assert decoded(run.processor, restored) == f"{title}, {year}" and not spans


def test_masked_tokens_are_asked_at_their_own_places(make, run):
    mask, end = (run.processor.tokenizer.structural_ids[name] for name in ("mask_token_id", "eos_token_id"))
    text, found = "the long winter and 漫长的冬天 " * 6, Counter()
    ids = run.processor.tokenizer.encode_text(text)
    for seed in range(200):
        row = make("masked", {"text": text}, RNG(seed))
        assert row["input_ids"][-1] == end and row["labels"][-1] == -100 and len(row["labels"]) == len(ids) + 1
        for read, label, own in zip(row["input_ids"], row["labels"], ids):
            assert label in (-100, own)
            assert label == own or read == own
            assert read == mask or read not in run.processor.tokenizer.all_special_ids
            if label == own:
                found["mask" if read == mask else "kept" if read == own else "replaced"] += 1
    total = sum(found.values())
    assert total == 200 * round(0.15 * len(ids))
    # Five standard deviations of a share of 0.8 or 0.1; a replacement may by chance be the token itself.
    assert abs(found["mask"] / total - 0.8) < 5 * math.sqrt(0.16 / total)
    assert abs(found["replaced"] / total - 0.1) < 5 * math.sqrt(0.09 / total)


def test_of_a_long_text_a_stretch_is_drawn(run):
    make, ids = RowMaker(run.processor, 32), run.processor.tokenizer.encode_text("很长的标题 and words " * 4)
    end = run.processor.tokenizer.structural_ids["eos_token_id"]
    document = {"text": "很长的标题 and words " * 4}
    starts = set()
    for seed in range(600):
        row = make("text", document, RNG(seed))["input_ids"]
        places = [start for start in range(len(ids) - 30) if [*ids, end][start : start + 32] == row]
        assert len(row) == 32 and places
        starts.add(places[-1])
        for objective in ("infilling", "masked"):
            assert len(make(objective, document, RNG(seed))["input_ids"]) <= 32
    assert len(ids) + 1 - 32 in starts, "the end of the text is asked for when it is reached"
    assert make("text", document, RNG(1)) == make("text", document, RNG(1))


def test_the_models_loss_reads_the_labels_as_the_rows_mean_them(make, run):
    """Only the written tokens count: the loss is theirs, by the model's own logits."""
    model, (items, events) = run.model.eval(), item_documents(run)
    for objective in CAUSAL:
        row = make(objective, (events if objective == "behaviour" else items)[3], RNG(0))
        out = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        logs = out.logits[0].log_softmax(-1)
        found = [-logs[place - 1, label] for place, label in enumerate(row["labels"]) if label != -100]
        torch.testing.assert_close(out.loss, torch.stack(found).mean())


# ------------------------------------------------------------------------------------------------------- perplexity


@torch.no_grad()
def slow_perplexity(model, rows):
    """A row by itself, a token by itself: told from those before it, or in documents read both ways at its place."""
    losses, both_ways = [], model.config.document_attention == "bidirectional"
    for row in rows:
        own = both_ways and row["input_ids"][0] != model.config.source_token_id
        logs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-float(logs[place - (not own), label]) for place, label in enumerate(row["labels"]) if label != -100]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("objective", [*CAUSAL, "masked"])
def test_perplexity_is_that_of_a_slow_loop_at_any_batch_size(make_recipe, objective):
    run = prepare(make_recipe(model={"config": BOTH_WAYS if objective == "masked" else {}}))
    items, events = item_documents(run)
    make = RowMaker(run.processor, 256)
    rows = [make(objective, (events if objective == "behaviour" else items)[place], RNG(place)) for place in range(5)]
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = slow_perplexity(run.model.eval(), rows)
    for size in (1, 3, 64):
        found = perplexity(run.model.train(), rows, run.collator, rows_at_once=size)
        assert found == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary(make, run):
    for parameter in run.model.parameters():
        torch.nn.init.zeros_(parameter)
    rows = [make(name, document, RNG(0)) for name in ("text", "item") for document in item_documents(run)[0]]
    assert perplexity(run.model, rows, run.collator) == pytest.approx(run.model.config.vocab_size, rel=1e-4)


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def watched(monkeypatch):
    """(epoch, objective, document) of all rows that are made for training."""
    seen = []
    made = MixedRows.__getitem__

    def watch(self, index):
        number, place = self.plan[:, index].tolist()
        seen.append(
            (
                self.epoch,
                self.shares[number].objective,
                self.shares[number].source.documents[int(self.shares[number].source.train[place])],
            )
        )
        return made(self, index)

    monkeypatch.setattr(MixedRows, "__getitem__", watch)
    return seen


def epochs(count, **more):
    return {"num_train_epochs": count, "max_steps": -1, **more}


def key(document):
    return f"{document['item']['title']} {document['item']['year']}"


@pytest.mark.parametrize("loader_tells", [True, False], ids=["loader tells", "as with several processes"])
def test_each_epoch_is_drawn_anew_and_none_of_it_is_held_out(make_recipe, watched, monkeypatch, loader_tells):
    if not loader_tells:
        monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda self, epoch: None)
    run = prepare(make_recipe(pretraining={"valid_fraction": 0.3}, training=epochs(2)))
    found = fit(run)
    train = [item for item in run.writer.items if not held_out(f"{item['title']} {item['year']}", 0.3)]
    assert 0 < len(train) < len(TITLES)
    once = sorted(f"{item['title']} {item['year']}" for item in train)
    for epoch in range(2):
        assert sorted(key(document) for at, _, document in watched if at == epoch) == once
    assert list(found) == ["text", "infilling", "item"]


def test_the_reported_perplexity_is_that_of_the_held_out_rows(make_recipe):
    run = prepare(make_recipe(pretraining={"valid_fraction": 0.3, "objectives": dict.fromkeys(CAUSAL, 1)}))
    items, events = all_sources(run, [])
    make, weights = RowMaker(run.processor, 256), {n: w.clone() for n, w in run.model.state_dict().items()}
    expected = {"before": {}, "after": {}}
    found = fit(run)
    assert list(found) == list(CAUSAL)
    for when, state in (("after", run.model.state_dict()), ("before", weights)):
        run.model.load_state_dict(state)
        for objective in CAUSAL:
            own = events if objective == "behaviour" else items
            rows = [make(objective, each, RNG([5, place])) for place, each in enumerate(own.validation(256, 5))]
            assert len(rows) == len(own.valid) > 0
            expected[when][objective] = slow_perplexity(run.model, rows)
    for objective in CAUSAL:
        for when in ("before", "after"):
            assert found[objective][when] == pytest.approx(expected[when][objective], rel=1e-4)


def test_without_held_out_texts_there_is_no_perplexity(make_recipe, watched):
    run = prepare(make_recipe(pretraining={"valid_fraction": 0.0}, training=epochs(1)))
    assert fit(run) == {}
    assert len({key(document) for *_, document in watched}) == len(TITLES)


@pytest.mark.skipif(not use_bf16(), reason="this processor has no bfloat16")
def test_a_model_trained_in_bfloat16_answers_in_float32_as_it_does_when_loaded(make_recipe, make):
    run = prepare(make_recipe(training={"bf16": True}))
    fit(run)
    loaded = type(run.model)(run.model.config).eval()
    loaded.load_state_dict(run.model.state_dict())
    rows = [make("item", document, RNG(0)) for document in item_documents(run)[0]]
    assert perplexity(run.model, rows, run.collator) == perplexity(loaded, rows, run.collator)


@pytest.mark.parametrize("document", some(["causal", "bidirectional"], ["causal"]))
def test_a_text_is_learnt_by_heart(make_recipe, tmp_path, document):
    """Packed with others, and while something else is learnt beside it."""
    (tmp_path / "one.txt").write_text("the long winter of 1990 漫长的冬天\n" * 8)
    objective = "text" if document == "causal" else "masked"
    recipe = make_recipe(
        pretraining={"valid_fraction": 0.0, "objectives": {objective: 1, "infilling": 1}, "pack": True, "length": 128}
        | {"texts": {str(tmp_path / "one.txt"): 1}},
        training={"max_steps": 100, "learning_rate": 5e-3, "lr_scheduler_type": "constant"},
        model={"config": {"hidden_dropout": 0.0, "document_attention": document}},
    )
    run = prepare(recipe)
    make, text = RowMaker(run.processor, 128), {"text": "the long winter of 1990 漫长的冬天"}
    rows = {name: [make(name, text, RNG(seed)) for seed in range(9)] for name in (objective, "infilling")}
    before = {name: perplexity(run.model, own, run.collator) for name, own in rows.items()}
    fit(run)
    after = {name: perplexity(run.model, own, run.collator) for name, own in rows.items()}
    assert min(before.values()) > 100
    # What is masked differs from row to row, so that this is learnt and not remembered.
    assert after[objective] < (1.05 if objective == "text" else 10) and after["infilling"] < 20, after


def test_what_a_model_cannot_learn_is_refused(make_recipe, tmp_path):
    def tried(objectives, config, **more):
        fit(prepare(make_recipe(model={"config": config}, pretraining={"objectives": objectives, **more})))

    with pytest.raises(ValueError, match=r"'text' writes a text on.*give it the weight 0"):
        tried({"text": 1.0}, BOTH_WAYS)
    with pytest.raises(ValueError, match=r"'masked' needs a model that reads documents in both directions"):
        tried({"masked": 1.0}, {})
    tried({"text": 0.0, "masked": 1.0, "item": 1.0}, BOTH_WAYS)
    learned = {"position_embedding_type": "learned", "joint_positions": "segment"}
    with pytest.raises(ValueError, match=r"pretraining.length=400, but the model has learned positions for 256"):
        tried({"text": 1.0}, learned, length=400)
    endless = make_recipe(pretraining={"streaming": True}, training=epochs(1))
    with pytest.raises(ValueError, match=r"streaming goes on without an end: set training.max_steps .* is -1"):
        fit(prepare(endless))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"objectives": {"text": -1}}, r"objectives is \{'text': -1\}; expected weights"),
        ({"objectives": {"mask": 1}}, "unknown keys mask; known keys are behaviour, infilling, item, likes, "),
        ({"texts": {"a.txt": 0}}, r"texts is \{'a.txt': 0\}; expected weights, at least one positive"),
        ({"texts": "a.txt"}, "pretraining.texts is 'a.txt'"),
        ({"length": 4}, "length=4; expected 16 or more"),
        ({"valid_rows": 0}, "valid_rows=0; expected 1 or more"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
    ],
)
def test_sections_that_mean_nothing_are_refused(make_recipe, section, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(pretraining=section)


@pytest.mark.parametrize("streaming", some([False, True], [True]), ids=["stored", "streamed"])
def test_training_is_resumed(make_recipe, tmp_path, streaming):
    """Resumed from a checkpoint in the middle, the weights are those of a run in one go."""
    (tmp_path / "texts.txt").write_text("\n".join(f"text {number} 文本" for number in range(60)))
    pretraining = {"streaming": streaming, "texts": [str(tmp_path / "texts.txt")], "pack": True, "length": 64}
    pretraining["objectives"] = dict.fromkeys(CAUSAL, 1)

    def trained(folder, steps, **training):
        training |= {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 3}
        training |= {"max_steps": steps, "lr_scheduler_type": "constant"}
        run = prepare(make_recipe(pretraining=pretraining, training=training))
        fit(run)
        return run.model.state_dict()

    whole = trained("whole", 6)
    resumed = trained("resumed", 6, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- commands


def write_recipe(folder, tree):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return str(path)


def test_command_leaves_a_model_that_finetuning_goes_on_from(tables, tmp_path, capsys):
    plain = recipe_of(tables, tmp_path / "pretrained", pretraining={"valid_fraction": 0.3})
    plain["pretraining"]["objectives"] = dict.fromkeys(CAUSAL, 1)
    # What is said of evaluation during training is meant for fine-tuning.
    plain["training"] |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    plain["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "ndcg@5"}
    recipe = write_recipe(tmp_path, plain)
    assert main(["pretrain", recipe, "training.seed=9", "training.save_strategy=no"]) == 0
    folder = tmp_path / "pretrained"
    found = json.loads((folder / "metrics.json").read_text())["perplexity"]
    assert list(found) == list(CAUSAL)
    printed = capsys.readouterr().out
    for name, value in found.items():
        assert f"{name:12} perplexity {value['before']:.2f} before, {value['after']:.2f} after" in printed
    assert str(folder) in printed
    assert load_recipe(folder).seed == 9
    model = AutoModel.from_pretrained(folder)
    assert model.config.trained_tasks == ["plausibility", "writing"]
    assert model.config.written_attention == "source"

    arguments = [
        f"model.checkpoint={folder}",
        f"training.output_dir={tmp_path / 'tuned'}",
        "training.learning_rate=0.0",
    ]
    assert main(["finetune", recipe, *arguments]) == 0
    tuned = AutoModel.from_pretrained(tmp_path / "tuned")
    assert tuned.config.trained_tasks == ["plausibility", "retrieval", "writing"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], weight, rtol=0, atol=0)


@pytest.fixture
def two_languages(tmp_path):
    english, chinese = tmp_path / "english.txt", tmp_path / "chinese.txt"
    english.write_text("\n".join(f"this is line number {number} of a text" for number in range(80)))
    chinese.write_text("\n".join(f"这是第{number}行的文字" for number in range(80)), encoding="utf-8")
    return [str(english), str(chinese)]


def test_the_recipe_of_raw_texts_runs_without_a_log_and_is_resumed(two_languages, tmp_path, capsys):
    folder = tmp_path / "out"
    small = ["model.preset=tiny", "model.shape={}", "text.vocab_size=400", "pretraining.length=64", "training.seed=1"]
    small += [f"pretraining.texts={json.dumps(two_languages)}", f"training.output_dir={folder}"]
    small += ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1", "training.bf16=false"]
    small += ["training.save_strategy=steps", "training.save_steps=1", "training.use_cpu=true"]
    assert main(["pretrain", "pretrain-text", *small, "training.max_steps=1"]) == 0
    assert main(["pretrain", "pretrain-text", *small, "training.max_steps=2", "--resume"]) == 0
    assert "text         perplexity" in capsys.readouterr().out
    found = json.loads((folder / "metrics.json").read_text())["perplexity"]
    assert set(found) == {"text", "infilling"}
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    model = AutoModel.from_pretrained(folder)
    assert model.config.vocab_size <= 400


def test_masked_texts_and_histories_are_streamed_by_the_command(tables, two_languages, tmp_path, capsys):
    tree = recipe_of(tables, tmp_path / "out", model={"config": BOTH_WAYS})
    tree["pretraining"] = {"objectives": {"text": 0, "masked": 1, "infilling": 1, "item": 1, "behaviour": 2}}
    tree["pretraining"] |= {"texts": {two_languages[0]: 1.0, "items": 2.0}, "streaming": True, "pack": True}
    tree["pretraining"] |= {"length": 64, "valid_fraction": 0.3}
    assert main(["pretrain", write_recipe(tmp_path, tree)]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[-5:-1]] == ["masked", "infilling", "item", "behaviour"]


def test_without_a_log_only_texts_can_be_learnt(two_languages, tmp_path):
    def tried(**pretraining):
        pretrain(load_recipe(recipe_of({}, tmp_path / "out", pretraining=pretraining)))

    with pytest.raises(ValueError, match="'item' has no items to learn from"):
        tried(texts=two_languages)
    with pytest.raises(ValueError, match=r"needs data\.interactions and data\.items"):
        tried()


def test_a_new_tokenizer_learns_none_of_the_held_out_texts(tmp_path):
    words = [f"{'xyzw'[n % 4] * 3}{'abcdefgh'[n // 4 % 8] * 4}{n % 7} " * 3 for n in range(60)]
    (tmp_path / "words.txt").write_text("\n".join(words))
    recipe = load_recipe(
        recipe_of({}, tmp_path / "out", pretraining={"texts": [str(tmp_path / "words.txt")], "valid_fraction": 0.5})
    )
    seen = list(module._vocabulary(module.raw_sources(recipe.pretraining), module._log(recipe), recipe))
    assert sorted(seen) == sorted(word for word in words if not held_out(word, 0.5)) and len(seen) < 60


# -------------------------------------------------------------------------------------------------------- real texts


@pytest.mark.real_data
def test_real_english_and_chinese_reviews_are_learnt(tmp_path):
    import pandas

    reviews = pandas.read_parquet(next(real_data("clothing-reviews").glob("*.parquet.brotli")))
    column = next(name for name in reviews if "review" in name.lower() and "text" in name.lower())
    chinese = pandas.read_csv(real_data("chinese-reviews") / "waimai_10k.csv")
    files = {"english.txt": reviews[column].dropna(), "chinese.txt": chinese["review"].dropna()}
    for name, texts in files.items():
        lines = texts.astype(str).str.replace(r"\s+", " ", regex=True).head(4000)
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    names = [str(tmp_path / name) for name in files]
    tree = recipe_of({}, tmp_path / "out", text={"vocab_size": 4000, "max_length": 128})
    tree["pretraining"] = {"objectives": {"text": 1, "infilling": 1}, "texts": dict.fromkeys(names, 1), "pack": True}
    tree["pretraining"] |= {"length": 128, "valid_rows": 64}
    tree["model"] = {"preset": "tiny", "config": {"hidden_size": 96, "intermediate_size": 256}}
    tree["training"] |= {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 3e-3}
    found = pretrain(load_recipe(tree))
    for objective in ("text", "infilling"):
        assert found[objective]["before"] > 3000 and found[objective]["after"] < 1200
