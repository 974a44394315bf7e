"""The sections of a recipe, and how one recipe serves pretraining and fine-tuning."""

import pytest

from m6rec.tokenization import load_template
from m6rec.train.config.recipe import Recipe, load_recipe


def recipe(**sections) -> Recipe:
    return load_recipe({"training": {"output_dir": "out"}, **sections})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tuning": {"method": "qlora"}}, "tuning.method is 'qlora'; expected one of full, lora, .*option-adapter"),
        ({"tuning": {"method": "lora", "quantization": "fp4"}}, "tuning.quantization is 'fp4'; .* 8bit, nf4, or null"),
        ({"tuning": {"quantization": "nf4"}}, "tuning.method 'full' trains every weight"),
        ({"tuning": {"settings": {"r": 3}}}, "tuning.method 'full' trains every weight"),
        ({"tuning": {"merge": True}}, "tuning.method 'full' trains every weight"),
        ({"model": {"checkpoint": "a", "backbone": "b"}}, "'a' and model.backbone 'b' are two beginnings"),
        ({"pretraining": {"training": {"lr": 1}}}, "pretraining.training has unknown keys lr"),
        ({"task": {"negatives_per_event": -1, "learn": ["click"]}}, "task.negatives_per_event is -1"),
        ({"task": {"negatives_per_event": 2, "learn": ["rating"]}}, r"task.negatives_per_event is 2.*\['rating'\]"),
        ({"task": {"learn": ["click"], "weights": {"rating": 1}}}, "task.weights has unknown keys rating"),
        ({"task": {"learn": ["click"], "weights": {"click": 0}}}, r"task.weights is \{'click': 0\}"),
        ({"task": {"learn": ["writing"]}}, "task.writing names what task.learn 'writing' learns"),
        ({"task": {"writing": {"query": ["search"]}}}, "task.writing names what task.learn 'writing' learns"),
        ({"task": {"learn": ["writing"], "writing": {"poem": []}}}, "task.writing has unknown keys poem"),
        ({"task": {"dialogues": "talk.csv"}}, "task.dialogues is the table"),
        ({"task": {"dialogue_columns": {"who": "x"}}}, "task.dialogue_columns has unknown keys who"),
        ({"task": {"replay": ["a"], "replay_share": 1.0}}, "task.replay_share=1.0 is not between 0 and 1"),
        ({"evaluation": {"protocol": "random"}}, "protocol is 'random'; expected one of published, shuffled, time"),
        ({"evaluation": {"validate": "old"}}, "validate is 'old'; expected one of fresh, stale, time, or null"),
        ({"evaluation": {"protocol": "time", "split": "given"}}, "'time', and evaluation.split 'given' takes the log"),
        ({"evaluation": {"validate": "stale", "split": "time"}}, "name an evaluation.protocol in place of the split"),
        ({"evaluation": {"successive": True}}, "set evaluation.protocol=time"),
    ],
)
def test_what_contradicts_itself_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        recipe(**section)


def test_weights_are_named_as_the_model_names_its_losses():
    task = recipe(task={"learn": ["retrieval", "writing"], "writing": {"item_text": []}, "weights": {"writing": 0.5}})
    assert task.task.loss_weights == {"text": 0.5}


def test_a_template_stays_as_it_is_unless_another_is_named():
    own = {**load_template("video", "zh"), "words": {"true": "对", "false": "错", "list": "、"}}
    assert recipe().text.template(own) is own
    assert recipe(text={"domain": "video"}).text.template(own) is own
    assert recipe(text={"domain": "social"}).text.template(own) == load_template("social", "zh")
    assert recipe(text={"language": "en"}).text.template(own) == load_template("video", "en")
    assert recipe().text.template() == load_template("ecommerce", "en")


def test_pretraining_has_its_own_settings_and_folder():
    training = {"output_dir": "out", "learning_rate": 1e-3, "num_train_epochs": 3, "eval_strategy": "epoch"}
    own = {"output_dir": "first", "training": {"num_train_epochs": 1}}
    one = recipe(training=training, pretraining=own)
    first = one.for_pretraining()
    assert first.training == {
        "output_dir": "first",
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    assert one.training == training and recipe(training=training).for_pretraining().training["output_dir"] == "out"


def test_fine_tuning_goes_on_from_the_folder_of_the_pretraining(tmp_path):
    folder = tmp_path / "first"
    one = recipe(pretraining={"output_dir": str(folder)}, model={"backbone": "some/model", "item_embeddings": True})
    with pytest.raises(FileNotFoundError, match="first' holds no model to fine-tune: run `m6rec pretrain`"):
        one.for_finetuning()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    model = one.for_finetuning().model
    assert (model.checkpoint, model.backbone, model.item_embeddings) == (str(folder), None, True)
    assert recipe().for_finetuning() == recipe()
