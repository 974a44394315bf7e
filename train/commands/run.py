"""All steps of a recipe: inspect the data, pretrain, fine-tune, recommend (the four steps of each vertical).

m6rec run video
"""

from collections.abc import Callable
from pathlib import Path

from ..answering.loading import load_pipeline
from ..config.recipe import Recipe
from ..evaluation.tables import answer_lines, tables
from ..runs.best import check_best_metric
from ..runs.finetune import finetune
from ..runs.pretrain import pretrain
from .prepare import report


def run(recipe: Recipe, say: Callable[[str], object]) -> None:
    """Run a recipe from its tables to recommendations; `say` receives the findings of each step.

    Recipes with a folder for it (`pretraining.output_dir`) include pretraining; if training is resumed and that folder
    is complete, it is skipped.
    """
    check_best_metric(recipe)
    say(report(recipe))
    folder = recipe.pretraining.output_dir
    if folder and not (recipe.training.get("resume_from_checkpoint") and (Path(folder) / "metrics.json").is_file()):
        for objective, value in pretrain(recipe).items():
            say(f"{objective:12} perplexity {value['before']:.2f} before, {value['after']:.2f} after")
    say(tables(finetune(recipe)))
    if recipe.recommend.requests:
        recommend = load_pipeline(str(recipe.output_dir))
        for request in recipe.recommend.requests:
            say(answer_lines(request, recommend(request, top_k=recipe.recommend.top_k)))
    say(f"written to {recipe.output_dir}")


__all__ = ["run"]
