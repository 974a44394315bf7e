"""All steps of a recipe by one command, on the small world."""

import contextlib
import io
import json

import yaml

from m6rec.train.cli import main
from m6rec.train.config.recipe import load_recipe
from tests.train.world import recipe_of


def said(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def test_run_prepares_pretrains_fine_tunes_and_recommends(tables, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tree = recipe_of(tables, second, task={"learn": ["retrieval", "click"]})
    tree["pretraining"] = {"output_dir": str(first), "training": {"learning_rate": 1e-4}}
    asked = {"history": ["Night Train"], "candidates": ["a film about the sea", "the mountain"]}
    tree["recommend"] = {"requests": [asked, "likes trains"], "top_k": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    text = said("run", recipe)
    assert "12 users" in text or "users" in text
    for expected in ("perplexity", "ndcg@10" if "ndcg@10" in text else "ndcg@5", "popularity", "auc", "likes trains"):
        assert expected in text
    assert text.endswith(f"written to {second}\n")
    assert load_recipe(second).model.checkpoint == str(first)
    assert json.loads((first / "metrics.json").read_text()).keys() == {"perplexity"}

    before = (first / "model.safetensors").stat().st_mtime_ns
    again = said("run", recipe, "--resume")
    assert (first / "model.safetensors").stat().st_mtime_ns == before and "popularity" in again
