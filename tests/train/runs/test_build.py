"""What a run is made of: tokenizer, processor and model that fit each other, new or from a checkpoint."""

import dataclasses
import hashlib
import json
import math

import pandas
import pytest
import torch
from safetensors.torch import load_file

from m6rec import M6RecForRecommendation
from m6rec.conversion import load_backbone
from m6rec.tokenization import M6RecProcessor
from m6rec.tokenization.templates import load_template
from m6rec.train.config.recipe import load_recipe
from m6rec.train.data.log import Log
from m6rec.train.data.splits import hold_out
from m6rec.train.evaluation.reports import catalogue_vectors, protocol_name, ranking_examples, user_vectors
from m6rec.train.runs import build
from m6rec.train.runs.build import item_texts, make_processor, prepare, save, use_bf16
from tests.modeling_m6rec.conversion.backbones import publish, tiny
from tests.train.world import recipe_of, write_tables


@pytest.fixture
def saved(make_recipe, tmp_path):
    """A run with item memory, changed by hand and saved; the recipe of another that goes on from it."""
    run = prepare(make_recipe(model={"item_embeddings": True, "config": {"hidden_dropout": 0.25}}))
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.normal_()
    save(run)
    return run


def on(saved, make_recipe, **sections):
    model = {"checkpoint": str(saved.recipe.output_dir), **sections.pop("model", {})}
    return make_recipe(model=model, training={"output_dir": f"{saved.recipe.output_dir}-on"}, **sections)


def test_ids_of_the_configuration_are_those_of_the_tokenizer(run):
    for name, value in run.processor.tokenizer.structural_ids.items():
        assert getattr(run.model.config, name) == value, name
    assert run.model.get_input_embeddings().num_embeddings == len(run.processor.tokenizer)


def test_the_longest_row_has_a_position(make_recipe):
    assert prepare(make_recipe(text={"max_length": 700})).model.config.max_position_embeddings == 700
    config = {"max_position_embeddings": 900}
    assert prepare(make_recipe(model={"config": config})).model.config.max_position_embeddings == 900


def test_the_tokenizer_reads_items_users_and_templates_and_nothing_that_happened(make_recipe, monkeypatch):
    texts = []
    monkeypatch.setattr(build.M6RecTokenizer, "train", lambda given, **_: texts.extend(given) or _tokenizer(given))
    recipe = make_recipe()
    run = prepare(recipe)
    assert set(item_texts(run.log)) < set(texts)
    assert {"女 21", "male 20"} <= set(texts)
    assert any("watched" in text for text in texts), "words of the template"
    secret = dataclasses.replace(run.log, interactions=run.log.interactions.assign(text="secret", event="secret"))
    before = list(texts)
    texts.clear()
    make_processor(recipe, secret, run.writer)
    assert texts == before
    assert not any("secret" in text for text in texts)


def _tokenizer(texts, train=build.M6RecTokenizer.train):
    return train(texts, vocab_size=400)


def test_users_of_whom_only_the_id_is_known_are_no_text(make_recipe, tmp_path):
    users = write_tables(tmp_path, users=[{"user_id": "u0"}])
    run = prepare(make_recipe(data=users))
    assert run.writer.user("u0") == {}


def test_texts_of_items_are_their_fields_joined():
    items = pandas.DataFrame({"title": ["靴子", "Coat"], "brand": ["", "X"]}, index=["a", "b"])
    assert item_texts(Log(pandas.DataFrame(), items)) == ["靴子", "Coat X"]


@pytest.mark.parametrize(("history", "time"), [("causal", "gap"), ("bidirectional", "ago")])
def test_what_events_say_of_time_follows_from_how_history_is_read(make_recipe, history, time):
    run = prepare(make_recipe(model={"config": {"history_attention": history}}))
    assert run.processor.time == time


def test_item_memory_has_a_row_for_every_item(make_recipe):
    run = prepare(make_recipe(model={"item_embeddings": True}))
    assert sorted(run.processor.item_rows.values()) == list(range(1, 16))
    assert set(run.processor.item_rows) == set(run.writer.item_ids)
    assert run.model.config.num_item_embeddings == 15
    assert len(run.model.model.item_memory.weight) == 16
    assert run.catalogue.memory_ids == [run.processor.item_rows[item_id] for item_id in run.writer.item_ids]
    assert prepare(make_recipe()).model.model.item_memory is None


def test_a_bonus_of_new_items_stands_in_a_recipe(saved, make_recipe):
    bonus = {"config": {"cold_item_bias": 0.3}}
    assert prepare(make_recipe(model={"item_embeddings": True, **bonus})).model.config.cold_item_bias == 0.3
    assert prepare(on(saved, make_recipe, model=bonus)).model.config.cold_item_bias == 0.3
    assert prepare(on(saved, make_recipe)).model.config.cold_item_bias == 0.0
    with pytest.raises(Exception, match=r"cold_item_bias=0\.3 needs item memory"):
        prepare(make_recipe(model=bonus))


def test_what_the_weights_of_a_checkpoint_decide_cannot_be_changed(saved, make_recipe):
    """A field with the role "shapes" that the library would pass over, with weights that are new or left out."""
    for name, value in (("norm_type", "layer"), ("embedding_dim", 12), ("num_hidden_layers", 6), ("qk_norm", True)):
        with pytest.raises(ValueError, match=rf"decide, in brackets: {name}={value!r}"):
            prepare(on(saved, make_recipe, model={"config": {name: value}}))
    more = {"entry_norm": True, "bow_embeddings": True, "tfidf_weight": 0.5, "rating_values": [1.0, 2.0]}
    config = prepare(on(saved, make_recipe, model={"config": more})).model.config
    assert {name: getattr(config, name) for name in more} == more


def test_a_checkpoint_is_gone_on_from_as_it_was(saved, make_recipe):
    again = prepare(on(saved, make_recipe))
    weights, kept = again.model.state_dict(), saved.model.state_dict()
    assert weights.keys() == kept.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, kept[name], rtol=0, atol=0)
    assert again.catalogue.input_ids == saved.catalogue.input_ids
    assert again.processor.item_rows == saved.processor.item_rows
    assert again.processor.template == saved.processor.template
    assert again.model.config.hidden_dropout == 0.25


def test_words_are_counted_once_in_the_catalogue_of_the_model(saved, make_recipe):
    run = prepare(on(saved, make_recipe, model={"config": {"tfidf_weight": 0.5}}))
    rarity = run.model.model.word_sketch.rarity
    texts = [set(ids) for ids in run.catalogue.input_ids]
    word = run.catalogue.input_ids[0][1]
    assert float(rarity[word]) == pytest.approx(math.log((1 + len(texts)) / (1 + sum(word in text for text in texts))))
    run.model.model.word_sketch.rarity = rarity + 1  # as if counted elsewhere
    save(run)
    again = prepare(make_recipe(model={"checkpoint": str(run.recipe.output_dir)}))
    assert torch.equal(again.model.model.word_sketch.rarity, rarity + 1)
    assert again.model.config.tfidf_weight == 0.5


def test_new_items_get_rows_behind_those_of_the_checkpoint(saved, make_recipe, tables, tmp_path):
    items = pandas.read_csv(tables["items"]).iloc[::-1]
    more = pandas.concat([pandas.DataFrame([{"item_id": "new", "title": "New", "year": 2024}]), items])
    paths = write_tables(tmp_path / "more", items=more.to_dict("records"))
    again = prepare(on(saved, make_recipe, data=paths, model={"item_embeddings": True}))
    assert again.processor.item_rows == {**saved.processor.item_rows, "new": 16}
    memory = again.model.model.item_memory.weight
    assert torch.equal(memory[:16], saved.model.model.item_memory.weight)
    assert memory[16].abs().sum() == 0
    without = prepare(on(saved, make_recipe, data=paths))
    assert without.catalogue.memory_ids[0] == 0, "unknown"
    assert without.model.config.num_item_embeddings == 15


def test_rows_with_gaps_are_never_given_twice(saved, make_recipe):
    item_rows = {"i3": 5, "elsewhere": 40}
    tokenizer, folder = saved.processor.tokenizer, saved.recipe.output_dir
    M6RecProcessor(tokenizer, item_rows=item_rows).save_pretrained(folder)
    rows = prepare(on(saved, make_recipe, model={"item_embeddings": True})).processor.item_rows
    assert len(set(rows.values())) == len(rows) == 16
    assert rows.items() >= item_rows.items()


def test_settings_of_a_checkpoints_processor_are_kept_and_lengths_are_the_recipes(saved, make_recipe):
    folder = saved.recipe.output_dir
    M6RecProcessor(saved.processor.tokenizer, time="ago", options=3, max_length=99).save_pretrained(folder)
    processor = prepare(on(saved, make_recipe, text={"max_length": 64, "max_events": 2})).processor
    assert (processor.time, processor.options, processor.max_length, processor.max_events) == ("ago", 3, 64, 2)


def test_a_checkpoint_in_half_precision_is_trained_in_full_unless_told(saved, make_recipe):
    saved.model.to(torch.bfloat16).save_pretrained(saved.recipe.output_dir)
    assert prepare(on(saved, make_recipe)).model.dtype == torch.float32
    half = on(saved, make_recipe, model={"config": {"dtype": "bfloat16"}})
    assert prepare(half).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({}, {"learn": ["interaction"], "interactions": {"follow": ["like"], "watch": ["watch"]}}),
        ({}, {"learn": ["interaction"], "interactions": {name: [name] for name in ("a", "b", "c", "d", "e")}}),
        ({"rating_values": [1.0, 3.0, 4.5]}, {}),
        ({"rating_loss": "regression"}, {}),
    ],
)
def test_a_checkpoint_learns_other_scores_and_keeps_those_it_knows(saved, make_recipe, config, task):
    again = prepare(on(saved, make_recipe, model={"config": config}, task=task))
    head, before = again.model.score_head, saved.model.config.score_names
    names = again.model.config.score_names
    assert len(head.weight) == len(head.bias) == len(names) == again.model.config.num_labels
    assert names != before
    if task:
        assert names[-len(task["interactions"]) :] == list(task["interactions"])
    for row, name in enumerate(names):
        if name in before:
            assert torch.equal(head.weight[row], saved.model.score_head.weight[before.index(name)])
            assert head.bias[row] == saved.model.score_head.bias[before.index(name)]
        else:
            assert 0 < head.weight[row].std() < 1.5 * again.model.config.initializer_range
            assert head.bias[row] == 0
    save(again)
    loaded = M6RecForRecommendation.from_pretrained(again.recipe.output_dir)
    assert loaded.config.score_names == names
    assert torch.equal(loaded.score_head.weight, head.weight)


def test_scores_without_a_meaning_are_refused_for_a_checkpoint_too(saved, make_recipe):
    with pytest.raises(Exception, match="rating_values must ascend"):
        prepare(on(saved, make_recipe, model={"config": {"rating_values": [3.0, 1.0]}}))


def test_a_shape_is_for_models_without_a_checkpoint(saved, make_recipe):
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "hidden_dropout": 0.5, "max_position_embeddings": 900}
    own = prepare(make_recipe(model={"shape": shape, "config": {"hidden_dropout": 0.1}})).model.config
    assert (own.hidden_size, own.num_hidden_layers, own.hidden_dropout) == (24, 3, 0.1)
    assert own.max_position_embeddings == 900
    again = prepare(on(saved, make_recipe, model={"shape": shape})).model.config
    assert (again.hidden_size, again.num_hidden_layers, again.hidden_dropout) == (36, 4, 0.25)
    given = {"num_hidden_layers": 3, "hidden_size": 36, "embedding_dim": 11}
    with pytest.raises(ValueError, match=r"in brackets: num_hidden_layers=3 \(4\), embedding_dim=11 \(10\)\. Leave it"):
        prepare(on(saved, make_recipe, model={"config": given}))


def test_bad_combinations_are_refused_with_a_reason(make_recipe, tables, tmp_path):
    with pytest.raises(ValueError, match="no preset 'huge'"):
        prepare(make_recipe(model={"preset": "huge"}))
    with pytest.raises(ValueError, match="vocab_size=50 is too small"):
        prepare(make_recipe(text={"vocab_size": 50}))
    with pytest.raises(Exception, match=r"num_joint_layers=9 is not in 1\.\.4"):
        prepare(make_recipe(model={"config": {"num_joint_layers": 9}}))
    with pytest.raises(ValueError, match=r"data\.source 'tables' needs"):
        prepare(load_recipe(recipe_of({}, tmp_path)))
    untimed = pandas.read_csv(tables["interactions"]).drop(columns="timestamp")
    paths = write_tables(tmp_path / "untimed", interactions=untimed.to_dict("records"))
    with pytest.raises(ValueError, match="a split by time needs timestamps"):
        prepare(make_recipe(data=paths, evaluation={"split": "time"}))


def test_the_split_is_the_recipes(make_recipe):
    run = prepare(make_recipe(evaluation={"split": "time", "valid_fraction": 0.2, "test_fraction": 0.3}))
    parts = [run.split.train, run.split.valid, run.split.test]
    assert sum(map(len, parts)) == len(run.log.interactions)
    assert parts[0]["timestamp"].max() < parts[1]["timestamp"].min()
    assert parts[1]["timestamp"].max() < parts[2]["timestamp"].min()
    left_out = prepare(make_recipe()).split
    assert (left_out.test["user_id"].value_counts() == 1).all()


def test_a_protocol_decides_in_place_of_the_split(make_recipe):
    shares = {"valid_fraction": 0.2, "test_fraction": 0.3}
    run = prepare(make_recipe(evaluation={"protocol": "time", **shares}))
    wanted = hold_out(run.log.interactions, "time", "time", 0, 0.2, 0.3)
    for name in ("train", "gap", "valid", "test"):
        assert getattr(run.split, name).equals(getattr(wanted, name))
    assert not run.split.gap.empty
    stale = prepare(make_recipe(evaluation={"validate": "stale"})).split
    assert len(stale.gap) == len(stale.valid) == len(stale.test) == 12


def test_a_log_without_times_has_no_ties_to_shuffle(make_recipe, tables, tmp_path):
    frame = pandas.read_csv(tables["interactions"]).drop(columns="timestamp")
    frame.to_csv(tmp_path / "untimed.csv", index=False)
    paths = {**tables, "interactions": str(tmp_path / "untimed.csv")}
    with pytest.raises(ValueError, match="protocol shuffled shuffles events of the same time, and this log has no"):
        prepare(make_recipe(data=paths, evaluation={"protocol": "shuffled"}))
    run = prepare(make_recipe(data=paths))
    assert protocol_name(run.recipe.evaluation, run.split) == "published"


def test_times_are_not_told_where_the_recipe_says_so(make_recipe):
    told = {}
    for times in (True, False):
        run = prepare(make_recipe(text={"max_events": 4, "times": times}))
        request = run.writer.request("u1", run.writer.events(run.split.train.iloc[:3]))
        told[times] = [set(event) for event in request["history"]]
    assert all(one - {"timestamp"} == other for one, other in zip(told[True], told[False], strict=True))
    assert "timestamp" in told[True][0]


def test_counts_are_those_of_the_training_part(run):
    counts = dict(zip(run.writer.item_ids, run.catalogue.counts.tolist()))
    assert counts == {item_id: (run.split.train["item_id"] == item_id).sum() for item_id in run.writer.item_ids}
    assert run.texts == item_texts(run.log)


def test_the_same_seed_makes_the_same_model_and_another_seed_another(make_recipe):
    def weights(seed):
        return prepare(make_recipe(training={"seed": seed})).model.state_dict()["model.embeddings.tokens.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_attention_is_the_recipes(make_recipe):
    assert prepare(make_recipe(model={"attention": "eager"})).model.config._attn_implementation == "eager"


def test_a_run_is_saved_whole(saved):
    folder = saved.recipe.output_dir
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "recipe.yaml"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    assert load_recipe(folder) == saved.recipe
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["model.item_memory.weight"], saved.model.model.item_memory.weight)


def test_bf16_is_asked_of_the_processor(monkeypatch):
    assert isinstance(use_bf16(), bool)
    if torch.cuda.is_available():
        return
    for capabilities, expected in (({"amx_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert use_bf16() is expected


def test_an_item_longer_than_the_positions_of_a_backbone_is_read_by_its_beginning(make_recipe, tmp_path):
    """The row has room for it, and the model has learnt 32 positions of a segment."""
    folder = publish(tmp_path / "bert", "bert", tiny("bert", "BertModel", max_position_embeddings=32))
    items = [{"item_id": f"i{row}", "title": "the cat shoes " * (30 if row == 3 else 1)} for row in range(6)]
    events = [{"user_id": f"u{user}", "item_id": f"i{(user + step) % 6}"} for user in range(4) for step in range(4)]
    config = {"num_hidden_layers": 5, "num_joint_layers": 2, "segment_pooling": "mean"}
    run = prepare(
        make_recipe(
            data=write_tables(tmp_path / "tables", interactions=events, items=items),
            model={"backbone": str(folder), "preset": "tiny", "config": config},
            text={"domain": None, "max_length": 400, "max_events": 20},
        )
    )
    assert run.processor.max_segment == 32 and max(map(len, run.catalogue.input_ids)) == 32
    assert catalogue_vectors(run.model, run.catalogue, run.collator).isfinite().all()
    examples = ranking_examples(run.writer, run.processor, run.split, "test", run.recipe.evaluation, 0)
    assert user_vectors(run.model, examples.rows, run.collator).isfinite().all()
    assert prepare(make_recipe()).processor.max_segment is None


def test_the_reader_is_a_backbone_whose_tokens_weigh_as_they_are_rare_in_the_catalogue(make_recipe):
    config = {"segment_pooling": "mean", "num_hidden_layers": 3, "num_joint_layers": 2}
    run = prepare(make_recipe(model={"backbone": "reader", "config": config}))
    table, tokens = run.base_model.model.embeddings.tokens.weight, run.processor.tokenizer.get_vocab()
    own = load_backbone("reader").embed_tokens.weight
    texts = [{*ids} for ids in run.catalogue.input_ids]
    ratios = {}
    for word in ("the", "harbour", "nobody"):
        token = tokens[word]
        rarity = math.log((1 + len(texts)) / (1 + sum(token in text for text in texts))) + 1
        ratios[word] = float(table[token].norm() / own[token].norm()) / rarity
    assert ratios["the"] == pytest.approx(ratios["harbour"], rel=1e-4) == pytest.approx(ratios["nobody"], rel=1e-4)


@pytest.mark.parametrize(
    ("domain", "language", "digest"),
    [
        ("video", "en", "0f7fd00d94584c3d"),
        ("video", "zh", "2e70e19342547a5a"),
        ("social", "en", "0a581551c26832e9"),
        ("social", "zh", "8365957d68dd632d"),
        ("ecommerce", "en", "2dd3b57fd7ca30a7"),
        ("ecommerce", "zh", "d7e8c1d87568b27c"),
    ],
)
def test_words_for_other_purposes_change_no_vocabulary(domain, language, digest):
    """A vocabulary is trained on these words: other words are another vocabulary, and other figures in all tables.

    Words of writing tasks and of facts are for runs that use them. Another digest means that all figures of models with
    a vocabulary of their own have to be measured again.
    """
    template = load_template(domain, language)
    words = build._words(build._spoken(template, writes=False, knows=False))
    assert hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16] == digest
    more = build._words(build._spoken(template, writes=True, knows=True))
    assert set(words) < set(more) and len(more) == len(build._words(template)), "runs that use them learn them"
