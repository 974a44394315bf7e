"""The Trainer of pretraining and fine-tuning.

It adds to the library's Trainer: an optimizer step does not depend on its division into micro-batches, accumulation and
processes; a resumed run equals an uninterrupted one; checkpoints are atomic; each loss is logged by name.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ...atomic_m6rec import atomic_folder, recover, shared_partial
from ...item_features_m6rec import features_at
from ...losses_m6rec import label_weights, loss_names
from ..evaluation.curves import save_curves
from ..rows.sampler import EpochRows, SeededOrder
from . import checkpoints
from .adapters import attach
from .build import Run, make_model
from .gradient_cache import CachedGradients, cached_gradients

logger = logging.getLogger(__name__)
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Kinds of training in which no process has the whole model, so that all must take part in each forward pass."""


class EachEpochAnew(TrainerCallback):
    """Sets the epoch on dataset and sampler, also when training resumes inside an epoch.

    Data loaders miss one of these with several processes and after a resume.
    """

    def __init__(self, trainer: "M6RecTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch."""
        for part in (self.trainer.rows, self.trainer.order):
            if part is not None:
                part.set_epoch(int(state.epoch))


class LogWhatIsSaved(TrainerCallback):
    """Logs at each checkpoint: the losses since the last log are not in a checkpoint, and would be lost."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a log."""
        control.should_log |= control.should_save


class M6RecTrainer(Trainer):
    """A Trainer with invariant steps, atomic checkpoints, and evaluation by a given function.

    Args:
        run: The run to train, with its recipe.
        stage: "pretrain" or "finetune".
        figures: Measures the model during training; returns metrics by name, such as `ndcg@10`.
        logged: Suffixes of the names of metrics that are logged; None: all.
        **kwargs: Arguments of the Trainer.
    """

    def __init__(
        self,
        run: Run,
        stage: str = "finetune",
        figures: Callable[[], dict[str, float]] | None = None,
        logged: tuple[str, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_what_is_ignored(kwargs["args"])
        self.run, self.stage, self.figures, self.logged = run, stage, figures, logged
        # The Trainer requires evaluation rows; `figures` has its own.
        super().__init__(eval_dataset=[], **kwargs)
        self.model_accepts_loss_kwargs = True  # it passes the weights of `_get_num_items_in_batch`
        self.rows: EpochRows | None = None
        self.order: SeededOrder | None = None
        self._frozen: dict[str, torch.Tensor] = {}
        task = run.recipe.task
        self.gathers = stage == "finetune" and task.negatives == "batch" and task.cross_batch_negatives
        self._saving_into: Path | None = None
        self._step_batches: list[dict[str, Any]] = []
        self._contrasts: Iterator[CachedGradients | None] | None = None
        self.losses = loss_names(run.model.config)
        self._sums = torch.zeros(2, len(self.losses), device=self.args.device)
        self._steps = 0
        self.add_callback(EachEpochAnew(self))
        self.add_callback(LogWhatIsSaved())

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint; then plot the log."""
        folder, count = self.run.recipe.output_dir, self.run.recipe.tuning.average_checkpoints
        if count > 1 and self.accelerator.distributed_type in SHARDED:
            raise ValueError("tuning.average_checkpoints: sharded checkpoints cannot be averaged; leave it out")
        if self.args.should_save:
            recover(folder)
        self.accelerator.wait_for_everyone()
        start = checkpoints.find_checkpoint(resume_from_checkpoint, folder)
        if start is not None:
            checkpoints.refuse_other(start, self.run.recipe, self._facts())
        result = super().train(None if start is None else str(start), *args, **kwargs)
        if self.accelerator.distributed_type in SHARDED:
            self._take_back()
        if count > 1:
            found = checkpoints.last_of_run(folder, count, self.state.global_step, self.run.recipe, self._facts())
            if len(found) < count:
                logger.warning("%d of %d checkpoints to average were written: see training.save_*", len(found), count)
            self._average(found)
        if self.is_world_process_zero():
            save_curves(self.state.log_history, folder)
        return result

    @torch.no_grad()
    def _average(self, places: Sequence[Path]) -> None:
        """Replace the learnt weights by the mean of those of checkpoints; without checkpoints they do not change."""
        learnt = [weight for weight in self.run.model.parameters() if weight.requires_grad]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in learnt]
        for place in places:
            self._load_from_checkpoint(str(place))
            for total, weight in zip(sums, learnt):
                total += weight
        for total, weight in zip(sums, learnt) if places else ():
            weight.copy_(total / len(places))
        logger.info("the weights are the mean of %s", ", ".join(place.name for place in places))

    def _take_back(self) -> None:
        """Gather all weights into the run's model, in the process that continues with it."""
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if self.is_world_process_zero():
            self.run.model = make_model(self.run.recipe, self.run.processor)
            attach(self.run)
            self.run.model.load_state_dict(weights, strict=False)  # it may have only one of tied weights

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            self.run.model = self.model
            # Weights are gathered for `forward` and for the methods named here: evaluation encodes items separately.
            register_fsdp_forward_method(self.run.model, "embed_items")
            register_fsdp_forward_method(self.run.model, "item_states")
        return prepared

    def _facts(self) -> dict[str, Any]:
        """Facts that must be equal in a checkpoint and a run that resumes from it."""
        dataset: Any = self.train_dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return {"stage": self.stage, "rows": rows, "rows of a step": per_step}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch; none after resuming from the last step, where the library would train another step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_training") and hasattr(dataset, "__len__"):
            shared = self.args.world_size > 1 and not self.args.dataloader_drop_last
            self.rows = EpochRows(dataset, self.args.train_batch_size * self.args.world_size if shared else 1)
            dataset = self.rows
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args, strategy = self.args, self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        together = self.run.recipe.task.group_user_rows if self.stage == "finetune" else 1
        self.order = SeededOrder(dataset, seed, rows if strategy == "group_by_length" else None, together)
        return self.order

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step, and the weights of their labels."""
        self._step_batches, weights = super().get_batch_samples(*args, **kwargs)
        self._contrasts = None
        self._steps += 1
        return self._step_batches, weights

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Sum the label weights of an optimizer step over all processes: the divisor of each loss."""
        totals = torch.zeros(len(self.losses), device=device)
        for batch in batch_samples:
            for name, weight in label_weights(batch, self.run.model.config).items():
                totals[self.losses.index(name)] += weight.to(device)
        return dict(zip(self.losses, self.accelerator.reduce(totals, "sum").tolist()))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a micro-batch, and add its parts to the log."""
        inputs = {**inputs, **self._how(num_items_in_batch)}
        if "candidate_embedding_ids" in inputs and "item_input_ids" not in inputs:
            inputs |= self._frozen_catalogue()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, part in (outputs.losses or {}).items():
            self._sums[0, self.losses.index(name)] += part.detach().sum()
            self._sums[1, self.losses.index(name)] += 1
        return (loss, outputs) if return_outputs else loss

    def _how(self, weights: dict[str, float] | None) -> dict[str, Any]:
        """Arguments of `forward` for a micro-batch: the cache of frozen texts, negatives from the whole step."""
        how: dict[str, Any] = {"only_losses": True}
        if self.run.segment_cache is not None:
            how |= {"plan": "cached", "segment_cache": self.run.segment_cache}
        if not self.gathers or len(self._step_batches) * self.args.world_size <= 1:
            return how
        whole: Any = self.model  # not its wrapper, which would wait for gradients
        if self._contrasts is None:  # only now: a resumed run sets the generators after making the batches

            def forward(batch: dict[str, Any], **more: Any) -> Any:
                return whole(**self._prepare_inputs(batch), **how, **more, num_items_in_batch=weights)

            self._contrasts = iter(cached_gradients(forward, self._step_batches, self.args.process_index))
        contrast = next(self._contrasts)
        return {**how, "contrast": contrast} if contrast else how

    @torch.no_grad()
    def _frozen_catalogue(self) -> dict[str, torch.Tensor]:
        """Encode the frozen texts of the catalogue once, in the number type of rows."""
        if not self._frozen:
            run, device = self.run, self.args.device
            padded = run.processor.pad([{"input_ids": run.catalogue.input_ids[row]} for row in run.collator.distinct])
            ids, mask = padded["input_ids"].to(device), padded["attention_mask"].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
                self._frozen["item_states"] = run.base_model.item_states(ids, mask, run.segment_cache)
            if features_at("segments", run.model.config):
                self._frozen |= {"item_input_ids": ids, "item_attention_mask": mask}
        return self._frozen

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log each loss by name and the total loss."""
        if "loss" in logs and "learning_rate" in logs:
            sums, met = self.accelerator.reduce(self._sums.clone(), "sum").tolist()
            logs |= {f"loss_{name}": sums[i] / self._steps for i, name in enumerate(self.losses) if met[i]}
            self._sums.zero_()
            self._steps = 0
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Measure the model; keys are `eval_ndcg@10`, `eval_click_auc`, `eval_rating_rmse` and so on.

        One process measures and broadcasts the metrics, unless no process has the whole model.
        """
        shared: list[dict[str, float]] = [{}]
        if self.is_world_process_zero() or self.accelerator.distributed_type in SHARDED:
            shared = [self.figures() if self.figures else {}]
        broadcast_object_list(shared)
        found = {f"{metric_key_prefix}_{name}": value for name, value in shared[0].items()}
        shown = {name for name in found if self.logged is None or name.rpartition("_")[2] in self.logged}
        self.log({name: value for name, value in found.items() if name in shown})
        self._require_best_metric(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _require_best_metric(self, found: dict[str, float]) -> None:
        """Raise if the metric for the best checkpoint is missing, such as the AUC of a single class."""
        name = self.args.metric_for_best_model
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in found:
            measured = ", ".join(each.removeprefix("eval_") for each in found) or "nothing"
            raise ValueError(f"training.metric_for_best_model is {name!r}, but measured were only {measured}")

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving_into is None else str(self._saving_into)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint into a hidden folder, and rename the folder when it is complete."""
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            with atomic_folder(folder / name, shared=True) as partial:
                self._write_checkpoint(model, trial, partial, folder / name)
        else:
            self._write_checkpoint(model, trial, shared_partial(folder / name), folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _write_checkpoint(self, model: Any, trial: Any, partial: Path, place: Path) -> None:
        """Let the library write `partial`/checkpoint-N, and move its files up to `partial`."""
        self.accelerator.wait_for_everyone()  # the folder exists
        self._saving_into = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_into = None
        self.accelerator.wait_for_everyone()  # all have written
        best = place.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step and (best == place or best.exists()):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            written = partial / place.name
            for path in written.iterdir():
                path.rename(partial / path.name)
            written.rmdir()
            self.state.save_to_json(str(partial / checkpoints.STATE_FILE))
            self.run.processor.save_pretrained(partial)
            checkpoints.describe(partial, self.run.recipe, self._facts())


def _refuse_what_is_ignored(args: TrainingArguments) -> None:
    """Raise for settings that would be ignored silently."""
    if (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true") and args.device.type == "cpu":
        raise ValueError(
            "FSDP was asked for, but this run computes on the CPU, where the Trainer would train unsharded and say "
            "nothing: leave fsdp out, or run on GPUs"
        )
    if args.dataloader_persistent_workers:
        raise ValueError(
            "training.dataloader_persistent_workers keeps copies of the rows that never hear of a new epoch, and would "
            "draw the same in each: leave it out"
        )


__all__ = ["EachEpochAnew", "M6RecTrainer"]
