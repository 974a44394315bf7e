"""Behaviour fine-tuning: retrieval, clicks, ratings, interactions and writing, single or joint (paper, task formats).

m6rec finetune quickstart training.output_dir=runs/films
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ...segment_cache_m6rec import SegmentCache
from ..answering.loading import build_catalogue
from ..config.recipe import Recipe, write_json
from ..evaluation import reports as evaluation
from ..evaluation import texts
from ..evaluation.dialogues import dialogue_ranking, rules
from ..evaluation.untrained import Learnt, Untrained
from ..evaluation.verdicts import OWN, VERDICT, advised
from ..rows.dialogues import Wanted
from ..rows.writing import writing_examples
from .adapters import attach, callbacks, keeps_states, reads_through_cache, trainable_parameters
from .best import check_best_metric
from .build import Run, on_cpu, plain_forward, prepare, save, use_bf16, wanted_in
from .distill import distiller
from .facts import keep_facts
from .trainer import M6RecTrainer
from .training_set import earlier_runs, training_set

logger = logging.getLogger(__name__)
LOGGED = ("ndcg@10", "recall@10", "auc", "rmse", "perplexity")
"""Metrics that are shown during training; all metrics are returned, and can select the best checkpoint."""


class ValidationMetrics:
    """Measures the validation part of a run, and those of replayed runs: `replay_films_click_auc`.

    Tasks without events in a replayed run's validation part are not measured.

    Args:
        run: The run in training.
        earlier: Earlier runs, by name.
        bf16: Compute in bfloat16.
    """

    def __init__(self, run: Run, earlier: Mapping[str, Run], bf16: bool) -> None:
        self.bf16 = bf16
        runs = {"": run, **{f"replay_{name}_": each for name, each in earlier.items()}}
        self.examples = [
            (prefix, each, task, examples_of(each, "valid", task))
            for prefix, each in runs.items()
            for task in measured(each)
        ]

    def __call__(self) -> dict[str, float]:
        """Return the metrics by name."""
        found: dict[str, float] = {}
        for prefix, run, task, examples in self.examples:
            if prefix and not examples.rows:
                continue
            report = measure(run, examples, task, self.bf16)
            own = prefix if task == "retrieval" else f"{prefix}{task}_"
            found |= {f"{own}{name}": value for name, value in report.items() if _is_figure(value)}
        return found


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def measured(run: Run) -> list[str]:
    """Return the measured tasks of a run."""
    return list(run.recipe.task.learn)


def examples_of(run: Run, part: str, task: str) -> Any:
    """Make the evaluation examples of a task; for writing also those of the part "train"."""
    if task == "writing":
        arguments = (run.recipe.task, run.recipe.evaluation, run.recipe.seed)
        return writing_examples(run.writer, run.processor, run.split, part, *arguments)
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
            f"there is no event to measure {task!r} on: hold out more (evaluation.valid_fraction, test_fraction), ask "
            "about repeats too (evaluation.repeats), or set training.eval_strategy to no"
        )
    if task == "writing":
        return texts.measure_writing(run.model, examples, run.collator, bf16)
    if task == "retrieval":
        scores = _ranked(run, examples, bf16)
        return evaluation.ranking_scores_report(scores, examples, run.catalogue.counts, run.recipe.evaluation)
    return evaluation.scoring_report(_predicted(run, examples, task, bf16), examples, task)


def _ranked(run: Run, examples: evaluation.RankingExamples, bf16: bool) -> evaluation.Scores:
    return evaluation.rank_catalogue(run.model, examples, run.catalogue, run.collator, bf16, run.segment_cache)


def _predicted(run: Run, examples: evaluation.ScoringExamples, task: str, bf16: bool) -> np.ndarray:
    return evaluation.predictions(run.model, examples, task, run.collator, bf16, run.segment_cache)


def full_report(run: Run, part: str = "test", bf16: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure model and baselines on a part: task -> name -> metrics; for replayed runs `replay/NAME/TASK`.

    Weights do not change meanwhile, so each text is encoded once.
    """
    own = run.segment_cache
    if own is None and keeps_states(run):
        run.segment_cache = SegmentCache()
    try:
        report = _own_report(run, part, bf16)
        for name, each in earlier_runs(run).items():
            each.segment_cache = SegmentCache() if keeps_states(run) else None  # its metrics depend only on it
            report |= {f"replay/{name}/{task}": rows for task, rows in _own_report(each, part, bf16).items()}
    finally:
        run.segment_cache = own
    return report


def _own_report(run: Run, part: str, bf16: bool) -> dict[str, dict[str, dict[str, Any]]]:
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for task in measured(run):
        examples = examples_of(run, part, task)
        if task == "retrieval":
            evaluation.warn_of_repeats(examples, run.recipe.evaluation)
        if not examples.rows:
            logger.warning("%s is not measured: the %s part holds no event for it", task, part)
            continue
        rows = _rows(run, examples, part, task, bf16)
        if VERDICT in rows[OWN]:
            rows[OWN][VERDICT] = advised(rows[OWN][VERDICT], task, run.recipe, run.base_model.config)
        report[task] = rows
    if run.recipe.task.learns_dialogues:
        wanted = wanted_in(run, part)
        if wanted.targets:
            report["dialogues"] = _dialogue_rows(run, wanted, bf16)
    return report


def _dialogue_rows(run: Run, wanted: Wanted, bf16: bool) -> dict[str, dict[str, Any]]:
    """Measure how well the items that dialogues recommend are found: name -> metrics."""
    counts = run.catalogue.counts
    examples = dialogue_ranking(wanted, run.processor, counts)
    scores: dict[str, Any] = {OWN: _ranked(run, examples, bf16)} | rules(wanted, run.texts, counts)
    return evaluation.ranking_rows(scores, examples, counts, run.recipe.evaluation, run.recipe.seed)


def _rows(run: Run, examples: Any, part: str, task: str, bf16: bool) -> dict[str, dict[str, Any]]:
    """Measure model and baselines on prepared examples of a task: name -> metrics."""
    recipe = run.recipe
    if task == "retrieval":
        counts = Learnt(run.writer, run.split, part, recipe.evaluation).counts
        scores: dict[str, Any] = {OWN: _ranked(run, examples, bf16)}
        scores |= Untrained(run.writer, run.texts, run.split, recipe.evaluation, recipe.seed).scores(examples, part)
        return evaluation.ranking_rows(scores, examples, counts, recipe.evaluation, recipe.seed)
    if task == "writing":
        own = measure(run, examples, task, bf16)
        known = examples_of(run, "train", task), examples_of(run, "valid", task)
        arguments = (run.collator, recipe.evaluation, recipe.seed, run.writer.items)
        rows = texts.measure_texts(run.model, examples, known, *arguments)
        rows = {OWN: own | rows.pop(OWN, {}), **rows}
        return {**rows, "unigram": texts.unigram_perplexity(known[0], examples, len(run.processor.tokenizer))}
    predicted = {OWN: _predicted(run, examples, task, bf16)}
    predicted |= evaluation.scoring_baselines(run.split, run.writer, examples, part, task, recipe.task, recipe.seed)
    return evaluation.scoring_rows(predicted, examples, task, recipe.seed)


def fit(
    run: Run,
    figures: Callable[[], dict[str, float]] | None = None,
    more: Sequence[TrainerCallback] = (),
    without: Sequence[type[TrainerCallback]] = (),
) -> M6RecTrainer:
    """Train the model of a run and keep the best checkpoint by the recipe's `metric_for_best_model`.

    Args:
        run: The run.
        figures: Measures the model during training; None: `ValidationMetrics`.
        more: Additional callbacks of the Trainer.
        without: Callbacks of the library to remove.
    """
    if run.recipe.model.freeze_segments:
        run.base_model.model.freeze_segments()
    attach(run)
    if reads_through_cache(run):
        run.segment_cache, run.collator.frozen = SegmentCache(), True
    earlier = earlier_runs(run)
    arguments = run.recipe.training_arguments(use_cpu=on_cpu(), bf16=use_bf16())
    trainer = distiller(run)(
        run=run,
        figures=figures or ValidationMetrics(run, earlier, arguments.bf16),
        logged=LOGGED,
        model=run.model,
        args=arguments,
        train_dataset=training_set(run, earlier),
        data_collator=run.collator,
        callbacks=[*callbacks(run), *more],
    )
    for callback in without:
        trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    plain_forward(run.model)
    run.model.eval()
    run.model.config.trained_tasks = sorted({*(run.model.config.trained_tasks or []), *run.recipe.task.learn})
    return trainer


def finetune(recipe: Recipe) -> dict[str, dict[str, dict[str, Any]]]:
    """Run a recipe from data to saved model and catalogue; returns and writes the report on the test part.

    With several processes, one measures and writes; the other processes return an empty report.
    """
    recipe = recipe.for_finetuning()
    check_best_metric(recipe)
    run = prepare(recipe)
    start = time.monotonic()
    trainer = fit(run)
    trained, seconds = trainable_parameters(run.model)[0], {"training": time.monotonic() - start}
    if trainer.is_world_process_zero():
        save(run)
        if run.model.config.num_segment_layers:
            build_catalogue(recipe.output_dir, run.writer.items, recipe.evaluation.exclude_seen)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():  # only one process measures
        return {}
    start = time.monotonic()
    report = full_report(run)
    seconds["evaluation"] = time.monotonic() - start
    write_json(recipe.output_dir / "metrics.json", report)
    keep_facts(run, seconds, trained, "m6rec finetune")
    return report


__all__ = ["ValidationMetrics", "examples_of", "finetune", "fit", "full_report", "measure", "measured"]
