"""Atomic checkpoints, and the checkpoint from which training is resumed.

They are written by `atomic_m6rec`: after a kill or on a full disk the earlier checkpoints remain, and the next start
removes partial files.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config.locations import located
from ..config.recipe import RECIPE_FILE, Recipe, load_recipe, write_json

logger = logging.getLogger(__name__)
STATE_FILE, RUN_FILE = "trainer_state.json", "run.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Files to remove with their model: a loader would take them for the new model's."""
DECISIVE = {
    "pretrain": ("data", "text", "model", "tuning", "pretraining"),
    "finetune": ("data", "text", "model", "tuning", "task"),
}
"""Sections of a recipe that decide the training, by stage; the split and most of `training` do too."""
SPLIT = ("split", "protocol", "validate", "valid_fraction", "test_fraction")
MAY_CHANGE: tuple[str, ...] = (
    "output_dir",
    "resume_from_checkpoint",
    "max_steps",
    "num_train_epochs",
    "use_cpu",
    "disable_tqdm",
    "run_name",
)
MAY_CHANGE += (
    "report_to",
    "project",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "greater_is_better",
)
MAY_CHANGE += ("logging", "log", "eval", "save", "load_best", "metric_for", "per_device_eval", "hub", "push_to_hub")
MAY_CHANGE += ("trackio", "ddp", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor")
"""Prefixes of settings that may differ in a resumed training; the size of a step is compared separately."""


def find_checkpoint(resume: str | bool | None, folder: Path) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        resume: True: the newest in the output folder; None or False: none; else a checkpoint, or a folder of them.
        folder: The output folder.

    Raises:
        FileNotFoundError: If a named folder holds no checkpoint.
    """
    if not resume:
        return None
    if resume is True:
        found = newest(folder)
        if found is None:
            logger.info("%s holds no checkpoint to go on from: training starts from the beginning", folder)
        return found
    found = Path(resume) if (Path(resume) / STATE_FILE).is_file() else newest(Path(resume))
    if found is None:
        raise FileNotFoundError(
            f"training.resume_from_checkpoint is {str(resume)!r}, which is no checkpoint and holds none: give a folder "
            f"{PREFIX_CHECKPOINT_DIR}-N with its {STATE_FILE}, or true for the newest one of training.output_dir"
        )
    return found


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder."""
    found = [path.parent for path in _complete(folder)]
    written = {path: ((path / STATE_FILE).stat().st_mtime_ns, int(path.name.rpartition("-")[2])) for path in found}
    return max(written, key=written.__getitem__, default=None)


def last_of_run(folder: Path, count: int, step: int, recipe: Recipe, run: dict[str, Any]) -> list[Path]:
    """Return the last checkpoints that a run has written up to a step, in order; those of other runs are skipped.

    Args:
        folder: The output folder.
        count: Maximum number.
        step: The last step of the run.
        recipe: Recipe of the run.
        run: Facts of the run, as `describe` wrote them.
    """
    steps = {path.parent: int(path.parent.name.rpartition("-")[2]) for path in _complete(folder)}
    earlier = [path for path in steps if steps[path] <= step and (path / RUN_FILE).is_file()]
    own = [path for path in earlier if not _other(path, recipe, run)]
    return sorted(own, key=steps.__getitem__)[-count:]


def describe(checkpoint: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Write the inputs of `refuse_other` into a checkpoint: the recipe, and facts of the run."""
    recipe.save(checkpoint)
    write_json(checkpoint / RUN_FILE, run)


def refuse_other(checkpoint: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Raise if a checkpoint belongs to a run with other settings.

    Args:
        checkpoint: Its folder.
        recipe: Recipe of the new run.
        run: Facts of the new run: its stage, its number of rows, the rows of an optimizer step.

    Raises:
        ValueError: The message names all differences.
    """
    if not (checkpoint / RUN_FILE).is_file() or not (checkpoint / RECIPE_FILE).is_file():
        logger.warning("%s does not say what it was trained on: nothing was compared", checkpoint)
        return
    if differences := _other(checkpoint, recipe, run):
        raise ValueError(
            f"{checkpoint} was written by another run: {'; '.join(differences)}. Go on with the same settings, or "
            "leave --resume (training.resume_from_checkpoint) out to start from the beginning"
        )


def _complete(folder: Path) -> list[Path]:
    """Return the trainer states of a folder's checkpoints: only complete checkpoints have one."""
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}"))


def _other(checkpoint: Path, recipe: Recipe, run: dict[str, Any]) -> list[str]:
    """Return the differences to the run of a checkpoint."""
    before = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    stage = run["stage"]
    then, now = _decisive(load_recipe(checkpoint), stage) | before, _decisive(recipe, stage) | run
    other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in other]


def _decisive(recipe: Recipe, stage: str) -> dict[str, Any]:
    """All settings that decide the training of a stage, by name."""
    # `pretraining.training` is merged into `training` by now; weights are averaged after the training.
    recipe = dataclasses.replace(
        recipe,
        pretraining=dataclasses.replace(recipe.pretraining, training={}, output_dir=None),
        tuning=dataclasses.replace(recipe.tuning, average_checkpoints=1),
    )
    tree, found = located(dataclasses.asdict(recipe)), dict[str, Any]()
    for section in DECISIVE[stage]:
        found |= {f"{section}.{name}": value for name, value in tree[section].items()}
    found |= {f"evaluation.{name}": getattr(recipe.evaluation, name) for name in SPLIT}
    training = {**recipe.training, "seed": recipe.seed}
    return found | {f"training.{name}": value for name, value in training.items() if not name.startswith(MAY_CHANGE)}


__all__ = [
    "WEIGHTS",
    "describe",
    "find_checkpoint",
    "last_of_run",
    "newest",
    "refuse_other",
]
