"""Recipes: nothing unknown passes, what is read is what was meant, and what is saved is read back."""

import json

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from m6rec.train.config.recipe import RECIPES, SECTIONS, Recipe, find_recipe, load_recipe, write_json
from tests.fast import examples

PLAIN = {"training": {"output_dir": "out"}}


def recipe(*overrides, **sections) -> Recipe:
    return load_recipe({**PLAIN, **sections}, overrides)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"trainig": {}},
            "the recipe has unknown keys trainig; known keys are data, distillation, .*training",
        ),
        ({"text": {"max_len": 3}}, "text has unknown keys max_len; known keys are domain, .*max_length"),
        ({"training": {"lr": 1}}, "training has unknown keys lr; known keys are .*learning_rate"),
        ({"model": {"config": {"hidden": 3}}}, r"model.config has unknown keys hidden; known keys are .*hidden_size"),
        ({"task": {1: 2, "b": 3}}, "task has unknown keys 1, b; known keys are cross_batch_negatives"),
        ({"data": {"columns": {"who": "u"}}}, "unknown role who; the roles are user_id"),
    ],
)
def test_what_nobody_reads_is_refused_by_name(tree, message):
    with pytest.raises(ValueError, match=message):
        recipe(**tree)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text.max_length=long", r"text.max_length is 'long' \(str\); expected int"),
        ("text.max_length=2.5", r"text.max_length is 2.5 \(float\); expected int"),
        ("text.max_length=true", r"text.max_length is True \(bool\); expected int"),
        ("text.max_length=null", r"text.max_length is None \(NoneType\); expected int"),
        ("text.domain=3", r"text.domain is 3 \(int\); expected str"),
        ("model.item_embeddings=1", r"model.item_embeddings is 1 \(int\); expected bool"),
        ("model.checkpoint=7", r"model.checkpoint is 7 \(int\); expected str | None"),
        ("model.config=[a]", r"model.config is \['a'\] \(list\); expected dict"),
        ("task.learn=click", r"task.learn is 'click' \(str\); expected list\[str\]"),
        ("evaluation.ks=[5, ten]", r"evaluation.ks is \[5, 'ten'\] \(list\); expected list\[int\]"),
        ("task.interactions={like: like}", r"task.interactions is .*; expected dict\[str, list\[str\]\]"),
        ("training.learning_rate=fast", r"training.learning_rate is 'fast' \(str\); expected float"),
        ("training.max_steps=1.5", r"training.max_steps is 1.5 \(float\); expected int"),
        ("training.eval_strategy=false", r"training.eval_strategy is False \(bool\); expected .*IntervalStrategy"),
        ("text=5", "section text is 5; expected keys with values"),
        ("data=[]", r"section data is \[\]; expected keys with values"),
        ("training=false", "section training is False; expected keys with values"),
    ],
)
def test_a_wrong_type_is_refused_with_what_was_given_and_expected(entry, message):
    with pytest.raises(ValueError, match=message):
        recipe(entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("task.learn=[]", r"task.learn is \[\]; expected some of retrieval, click"),
        ("task.learn=[clicks]", r"task.learn is \['clicks'\]; expected some of"),
        ("task.negatives=hard", "task.negatives is 'hard'; expected one of batch, sampled, catalogue"),
        ("task.targets=0", "task.targets=0, task.num_sampled=512 and task.group_user_rows=1 must be positive"),
        ("task.num_sampled=-1", "task.num_sampled=-1 and task.group_user_rows=1 must be positive"),
        ("task.learn=[interaction]", "give both or none"),
        ("task.interactions={like: [a]}", "give both or none"),
        ("evaluation.split=random", "evaluation.split is 'random'; expected one of leave-one-out, time"),
        ("evaluation.ks=[]", r"evaluation.ks is \[\]; expected cut-offs"),
        ("evaluation.ks=[5, 0]", r"evaluation.ks is \[5, 0\]; expected cut-offs of 1 or more"),
        ("evaluation.max_users=0", "evaluation.max_users is 0; expected 1 or more"),
        ("training.output_dir=null", "training.output_dir is missing"),
        ("training={}", "training.output_dir is missing"),
        ("tuning.average_checkpoints=0", "tuning.average_checkpoints is 0; expected 1 or more"),
        ("tuning={average_checkpoints: 2, method: adalora}", "bring back the ranks that adalora has cut"),
    ],
)
def test_a_value_without_a_meaning_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        recipe(entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("training.save_strategy=no", "average_checkpoints is 3: expected training.save_strategy epoch or steps"),
        ("training.load_best_model_at_end=true", "no training.load_best_model_at_end, which takes one of them"),
        ("training.save_total_limit=2", "save_total_limit is 2, and tuning.average_checkpoints 3: expected as many"),
    ],
)
def test_a_mean_needs_its_checkpoints(entry, message):
    mean = recipe("tuning.average_checkpoints=3", "training.save_total_limit=3")
    assert mean.for_pretraining().tuning.average_checkpoints == 1
    with pytest.raises(ValueError, match=message):
        recipe("tuning.average_checkpoints=3", entry)


def test_numbers_and_texts_are_read_as_people_mean_them(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "training: {output_dir: out, learning_rate: 1e-3, weight_decay: 1, save_strategy: no, warmup_steps: .05}\n"
        "data: {min_rating_liked: 4}\ntask:\n",
        encoding="utf-8",
    )
    read = load_recipe(path)
    assert read.training == {
        "output_dir": "out",
        "learning_rate": 0.001,
        "weight_decay": 1,
        "save_strategy": "no",
        "warmup_steps": 0.05,
    }
    assert read.data.min_rating_liked == 4
    assert read.task == Recipe(training={"output_dir": "out"}).task


def test_a_mapping_that_is_too_deep_is_refused():
    deep = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"the recipe: .* more than 50 deep"):
        load_recipe({"training": {"output_dir": deep}})


def test_a_mapping_is_copied_and_what_is_no_setting_is_refused():
    given = {"data": {"columns": {"user_id": "who"}}, "training": {"output_dir": "x"}}
    load_recipe(given, ["data.columns.user_id=other"])
    assert given["data"]["columns"] == {"user_id": "who"}
    with pytest.raises(ValueError, match="task"):
        load_recipe({"task": (number for number in range(3)), "training": {"output_dir": "x"}})


def test_overrides_win_the_last_one_most_and_reach_into_what_is_nested():
    tree = {**PLAIN, "text": {"max_length": 5}, "model": None}
    read = load_recipe(
        tree,
        [
            "text.max_length=6",
            "--text.max_length=7",
            "model.config.hidden_size=48",
            "model.config.loss_weights={click: 2}",
            "evaluation.ks=[1, 3]",
            "training.output_dir=a=b",
            "data.columns.user_id=谁",
        ],
    )
    assert read.text.max_length == 7
    assert read.model.config == {"hidden_size": 48, "loss_weights": {"click": 2}}
    assert read.evaluation.ks == [1, 3]
    assert str(read.output_dir) == "a=b"
    assert read.data.columns == {"user_id": "谁"}
    assert tree == {**PLAIN, "text": {"max_length": 5}, "model": None}, "the given mapping must stay as it was"
    assert PLAIN == {"training": {"output_dir": "out"}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text.max_length", "'text.max_length' is no override; write section.key=value"),
        ("text.max_length.more=1", "'text.max_length.more=1': max_length holds a value, not keys"),
        ("evaluation.ks=[1", r"'evaluation.ks=\[1': '\[1' is no valid YAML"),
        ("=3", "the recipe has unknown keys ;"),
    ],
)
def test_a_malformed_override_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        recipe(entry, text={"max_length": 5})


# YAML breaks lines at controls and separators that nobody writes into a recipe.
printable = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=8)
texts = st.one_of(
    st.sampled_from(["1e-3", "no", "yes", "true", "null", "1", "2020-01-01", "~", "12:30", " # "]), printable
)
names = texts.filter(bool)


@settings(max_examples=examples(40), deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "data": st.fixed_dictionaries(
                {"interactions": texts, "columns": st.dictionaries(st.just("rating"), texts)}
            ),
            "text": st.fixed_dictionaries({"domain": texts, "max_length": st.integers()}),
            "task": st.fixed_dictionaries(
                {"learn": st.just(["interaction"]), "interactions": st.dictionaries(names, st.lists(texts), min_size=1)}
            ),
            "training": st.fixed_dictionaries(
                {"output_dir": names, "learning_rate": st.floats(allow_nan=False), "save_strategy": st.just("no")}
            ),
        }
    )
)
def test_a_saved_recipe_is_read_back_whatever_its_texts_look_like(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("saved")
    saved = load_recipe(tree)
    saved.save(folder)
    assert load_recipe(folder) == saved
    assert load_recipe(folder / "recipe.yaml") == saved
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_a_saved_recipe_is_utf8_and_names_the_versions_it_ran_with(tmp_path):
    recipe("data.interactions=数据.csv").save(tmp_path)
    text = (tmp_path / "recipe.yaml").read_bytes().decode("utf-8")
    assert "interactions: 数据.csv" in text
    for package in (torch, transformers):
        assert f"#   {package.__name__} {package.__version__.split('+')[0]}" in text
    assert set(yaml.safe_load(text)) == {*SECTIONS, "training"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_package_load_by_name(path):
    out = ["training.output_dir=out"]  # the quickstart's is given with the command
    read = load_recipe(path.stem, out)
    assert read == load_recipe(path, out) == load_recipe(path.name, out)
    assert read.training_arguments(use_cpu=True, bf16=False).output_dir == "out"


def test_there_are_recipes():
    assert list(RECIPES.glob("*.yaml"))


def test_a_recipe_that_is_missing_is_answered_with_those_there_are(tmp_path):
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    for missing in ("movilens", str(tmp_path / "movielens.yaml"), "elsewhere/movielens.yaml"):
        with pytest.raises(FileNotFoundError, match=f"no recipe '{missing}'.* one of {known}"):
            find_recipe(missing)


@pytest.mark.parametrize(("text", "message"), [("a: [", "no valid YAML"), ("- a", "holds list; expected sections")])
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"bad.yaml .*{message}"):
        load_recipe(tmp_path / "bad.yaml")


def test_a_recipe_that_is_not_in_utf8_is_refused_by_name_and_a_mark_before_it_is_none(tmp_path):
    text = "data: {interactions: café.csv}\ntraining: {output_dir: out}\n"
    (tmp_path / "latin.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml is not in UTF-8 .*: save it in UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "marked.yaml").write_bytes(text.encode("utf-8-sig"))
    assert load_recipe(tmp_path / "marked.yaml").data.interactions == "café.csv"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("evaluation.ks=[!!int '']", r"ks=.*no valid YAML: '' cannot be read as int"),
        ("text.max_length=2020-13-45", "'2020-13-45' cannot be read as timestamp"),
        ("model.config={hidden_size: 1, hidden_size: 2}", "the key 'hidden_size' stands twice"),
    ],
)
def test_an_override_is_read_by_the_same_rules(entry, message):
    with pytest.raises(ValueError, match=message):
        recipe(entry)


def test_the_trainers_arguments_come_from_the_recipe_then_from_the_run():
    read = recipe("training.learning_rate=0.5", "training.use_cpu=true")
    arguments = read.training_arguments(learning_rate=0.1, bf16=False, use_cpu=False, seed=read.seed)
    assert (arguments.learning_rate, arguments.use_cpu, arguments.report_to) == (0.5, True, [])
    assert arguments.seed == read.seed == TrainingArguments(output_dir="out", use_cpu=True).seed
    assert recipe("training.seed=7").seed == 7


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("ndcg@10", True), ("click_auc", True), ("rating_rmse", False), ("rating_mae", False), ("click_log_loss", False)],
)
def test_the_best_model_is_the_one_with_the_smallest_error_or_the_greatest_gain(metric, greater):
    read = recipe(f"training.metric_for_best_model={metric}", "training.use_cpu=true")
    assert read.training_arguments().greater_is_better is greater
    told = recipe(
        f"training.metric_for_best_model={metric}", f"training.greater_is_better={not greater}", "training.use_cpu=true"
    )
    assert told.training_arguments().greater_is_better is not greater


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "new" / "metrics.json", {"片": [1, 2.5]})
    assert json.loads((tmp_path / "new" / "metrics.json").read_text(encoding="utf-8")) == {"片": [1, 2.5]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "metrics.json", {"a": object()})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]
    assert json.loads((tmp_path / "new" / "metrics.json").read_text(encoding="utf-8")) == {"片": [1, 2.5]}
