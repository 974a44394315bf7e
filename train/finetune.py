"""Behaviour fine-tuning: retrieval, clicks, ratings and interactions, alone or together (paper, task formats).

m6rec finetune movielens training.output_dir=runs/films
"""

from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer

from ..segment_cache_m6rec import SegmentCache
from . import evaluation
from .build import Run, on_cpu, plain_forward, prepare, save, use_bf16
from .examples import training_rows
from .recipe import Recipe, write_json
from .recommend import build_catalogue

LOGGED = ("ndcg@10", "recall@10", "auc", "rmse")
"""Metrics that are shown during training; all are returned, and can choose the best checkpoint."""


class Rows(Dataset):
    """Rows in memory, as the Trainer takes them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class M6RecTrainer(Trainer):
    """A Trainer whose evaluation is ours: full ranking and predictions on held-out events."""

    def __init__(self, run: Run, **kwargs: Any) -> None:
        # The Trainer insists on evaluation rows; ours are the examples below, which `evaluate` reads.
        super().__init__(eval_dataset=Rows([]), **kwargs)
        self.run = run
        self.segment_cache = SegmentCache() if run.model.model.segments_are_frozen else None
        self.examples = {task: _examples(run, "valid", task) for task in measured(run)}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Read frozen texts through the cache; else as the Trainer does."""
        if self.segment_cache is not None:
            inputs = {**inputs, "plan": "cached", "segment_cache": self.segment_cache}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Measure the validation part; keys are `eval_ndcg@10`, `eval_click_auc`, `eval_rating_rmse` and so on."""
        found: dict[str, float] = {}
        for task, examples in self.examples.items():
            report = measure(self.run, examples, task, self.args.bf16)
            prefix = metric_key_prefix if task == "retrieval" else f"{metric_key_prefix}_{task}"
            found |= {f"{prefix}_{name}": value for name, value in report.items() if isinstance(value, (int, float))}
        self.log({name: value for name, value in found.items() if name.rpartition("_")[2] in LOGGED})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


def measured(run: Run) -> list[str]:
    """Tasks of a run that are measured."""
    return [task for task in run.recipe.task.learn if task != "interaction"]


def _examples(run: Run, part: str, task: str) -> Any:
    if task == "retrieval":
        return evaluation.ranking_examples(
            run.writer, run.processor, run.split, part, run.recipe.evaluation, run.recipe.seed
        )
    return evaluation.scoring_examples(
        run.writer, run.processor, run.split, part, task, run.recipe.task, run.recipe.evaluation, run.recipe.seed
    )


def measure(run: Run, examples: Any, task: str, bf16: bool = False) -> dict[str, Any]:
    """Measure the model of a run on prepared examples of a task."""
    if not examples.rows:
        raise ValueError(
            f"there is no event to measure {task!r} on: hold out more (evaluation.valid_fraction, test_fraction), or "
            "set training.eval_strategy to no"
        )
    if task == "retrieval":
        scores = evaluation.rank_catalogue(run.model, examples, run.catalogue, run.collator, bf16)
        return evaluation.ranking_scores_report(scores, examples, run.catalogue.counts, run.recipe.evaluation)
    predicted = evaluation.predictions(run.model, examples, task, run.collator, bf16)
    return evaluation.scoring_report(predicted, examples, task)


def full_report(run: Run, part: str = "test", bf16: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure model and baselines on a part: task -> who -> metrics."""
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for task in measured(run):
        examples = _examples(run, part, task)
        rows = {"m6rec": measure(run, examples, task, bf16)}
        if task == "retrieval":
            rows |= evaluation.ranking_baselines(run.texts, examples, run.catalogue.counts, run.recipe.evaluation)
        else:
            rows |= evaluation.scoring_baselines(run.split, examples, part, task, run.recipe.task)
        report[task] = rows
    return report


def fit(run: Run) -> M6RecTrainer:
    """Train the model of a run; the best checkpoint by the recipe's `metric_for_best_model` is kept."""
    if run.recipe.model.freeze_segments:
        run.model.model.freeze_segments()
    bidirectional = run.model.config.history_attention == "bidirectional"
    rows = training_rows(run.writer, run.split.train, run.processor, run.recipe.task, bidirectional)
    arguments = run.recipe.training_arguments(use_cpu=on_cpu(), bf16=use_bf16())
    trainer = M6RecTrainer(run, model=run.model, args=arguments, train_dataset=Rows(rows), data_collator=run.collator)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    plain_forward(run.model)
    run.model.eval()
    run.model.config.trained_tasks = sorted({*(run.model.config.trained_tasks or []), *run.recipe.task.learn})
    return trainer


def finetune(recipe: Recipe) -> dict[str, dict[str, dict[str, Any]]]:
    """Run a recipe from data to saved model and catalogue; returns and writes the report on the test part."""
    run = prepare(recipe)
    fit(run)
    save(run)
    if run.model.config.num_segment_layers:
        build_catalogue(recipe.output_dir, run.writer.items)
    report = full_report(run)
    write_json(recipe.output_dir / "metrics.json", report)
    return report


__all__ = ["M6RecTrainer", "Rows", "finetune", "fit", "full_report", "measure", "measured"]
