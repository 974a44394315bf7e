"""Names of version 0.1 in configurations, processors and recipes: read, and written under today's names."""

import pytest
import torch

from m6rec import M6RecConfig, M6RecForRecommendation
from m6rec.train.config.recipe import load_recipe
from m6rec.values_m6rec import RENAMED_KEYS, rename_keys

OLD = {"word_similarity": 0.3, "word_similarity_dim": 64, "new_item_bonus": 0.1, "num_item_memory": 5}
NEW = {"tfidf_weight": 0.3, "tfidf_dim": 64, "cold_item_bias": 0.1, "num_item_embeddings": 5}


def test_a_configuration_reads_the_old_names_and_writes_the_new():
    made, read = M6RecConfig.preset("tiny", **OLD), M6RecConfig.from_dict(OLD)
    for config in (made, read):
        assert {name: getattr(config, name) for name in NEW} == NEW
        assert not OLD.keys() & config.to_dict().keys()
    assert M6RecConfig.from_dict({}, word_memory=True).bow_embeddings is True


def test_a_field_under_both_names_is_refused():
    with pytest.raises(ValueError, match="both names of a field are given"):
        rename_keys({"word_similarity": 0.1, "tfidf_weight": 0.2})


def test_fingerprints_hold_the_names_of_the_first_version():
    settings = M6RecConfig.preset("tiny", **NEW).vector_settings
    assert settings["word_similarity"] == 0.3 and settings["new_item_bonus"] == 0.1
    assert not NEW.keys() & settings.keys()


def test_recipes_and_overrides_read_the_old_names():
    old = {"model": {"item_memory": True, "config": {"word_similarity": 0.2}}, "task": {"rows_together": 4}}
    training = {"training": {"output_dir": "x"}}
    recipe = load_recipe(
        {**old, **training},
        ["evaluation.cold_pretend=true", "evaluation.cold_fraction=0.1", "model.config.new_item_bonus=0.5"],
    )
    assert recipe.model.item_embeddings and recipe.task.group_user_rows == 4 and recipe.evaluation.cold_validation
    assert recipe.model.config == {"tfidf_weight": 0.2, "cold_item_bias": 0.5}
    assert load_recipe({**old, **training}, ["task.rows_together=2"]).task.group_user_rows == 2


def test_a_plan_is_known_by_its_old_name():
    model, ids = (
        M6RecForRecommendation(M6RecConfig.preset("tiny")).eval(),
        torch.tensor([[3, 8, 40, 7, 4, 5, 11, 41, 7, 6]]),
    )
    old, new = (model(ids, plan=plan).scores for plan in ("reuse", "shared_prefix"))
    assert torch.equal(old, new) and old.isfinite().all()


def test_no_new_name_is_an_old_one():
    assert not set(RENAMED_KEYS) & set(RENAMED_KEYS.values())
