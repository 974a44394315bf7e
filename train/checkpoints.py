"""Checkpoints that are whole or not there at all, and the one that training goes on from.

Whatever is written goes into a hidden folder beside its place, which it takes in one step once it is complete. A killed
run or a full disk leaves what was there before; what it left behind is put right when the next one starts.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .locations import located
from .recipe import RECIPE_FILE, Recipe, load_recipe, write_json

logger = logging.getLogger(__name__)
PARTIAL, COMPLETE, REPLACED = ".partial-", ".complete-", ".replaced-"
"""How the names of hidden folders begin: being written; files about to move to their place; about to be removed."""
STATE_FILE, RUN_FILE, FILES_FILE = "trainer_state.json", "run.json", "files.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Files that must not outlive the model they belong to: a loader would take them for the new one's."""
DECISIVE = {
    "pretrain": ("data", "text", "model", "tuning", "pretraining"),
    "finetune": ("data", "text", "model", "tuning", "task"),
}
"""Sections of a recipe that decide what is trained, by stage; of the others, the split and most of `training`."""
SPLIT = ("split", "valid_fraction", "test_fraction")
FREE: tuple[str, ...] = (
    "output_dir",
    "resume_from_checkpoint",
    "max_steps",
    "num_train_epochs",
    "use_cpu",
    "disable_tqdm",
    "run_name",
)
FREE += ("report_to", "project", "per_device_train_batch_size", "gradient_accumulation_steps", "greater_is_better")
FREE += ("logging", "log", "eval", "save", "load_best", "metric_for", "per_device_eval", "hub", "push_to_hub")
FREE += ("trackio", "ddp", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor")
"""How the names of settings begin that may differ where training goes on; the size of a step is compared apart."""


@contextmanager
def written_whole(place: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into; it takes the place of a folder if nothing goes wrong, else it is removed."""
    partial = place.with_name(PARTIAL + place.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _removed_if_failed(partial):
        yield partial
        _sync(partial)
    replaced = place.with_name(REPLACED + place.name)
    if place.exists():
        place.rename(replaced)
    partial.rename(place)
    _sync_names(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def files_written_whole(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write a model into; its files then take their places in `folder`, all or none.

    Other files of the folder stay, but not the weights of a model that was there before. A run that is killed while the
    files move, which takes no time to speak of, is finished by the next one (`put_right`).
    """
    partial, complete = (folder / f"{start}model" for start in (PARTIAL, COMPLETE))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if complete.exists():
        _move_files(complete, folder)
    with _removed_if_failed(partial):
        yield partial
        write_json(partial / FILES_FILE, sorted(path.name for path in partial.iterdir()))
        _sync(partial)
    partial.rename(complete)
    _move_files(complete, folder)


def put_right(folder: Path) -> None:
    """Finish or remove what a killed run has left in its output folder."""
    if not folder.is_dir():
        return
    for path in sorted(folder.glob(f"{PARTIAL}*")):
        shutil.rmtree(path)
    for path in sorted(folder.glob(f"{COMPLETE}*")):
        _move_files(path, folder)
    for path in sorted(folder.glob(f"{REPLACED}*")):
        place = folder / path.name.removeprefix(REPLACED)
        if place.exists():
            shutil.rmtree(path)
        else:  # it was killed between making room and taking the place
            path.rename(place)


def find_checkpoint(resume: str | bool | None, folder: Path) -> Path | None:
    """Find the checkpoint to go on from.

    Args:
        resume: True: the newest of the output folder; None or False: none; else a checkpoint, or a folder of them.
        folder: The output folder.

    Raises:
        FileNotFoundError: If a folder is named that holds no checkpoint.
    """
    if not resume:
        return None
    if resume is True:
        found = newest(folder)
        if found is None:
            logger.info("%s holds no checkpoint to go on from: training starts anew", folder)
        return found
    found = Path(resume) if (Path(resume) / STATE_FILE).is_file() else newest(Path(resume))
    if found is None:
        raise FileNotFoundError(
            f"training.resume_from_checkpoint is {str(resume)!r}, which is no checkpoint and holds none: give a folder "
            f"{PREFIX_CHECKPOINT_DIR}-N with its {STATE_FILE}, or true for the newest one of training.output_dir"
        )
    return found


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of a folder that was written last."""
    found = [path.parent for path in _complete(folder)]
    written = {path: ((path / STATE_FILE).stat().st_mtime_ns, int(path.name.rpartition("-")[2])) for path in found}
    return max(written, key=written.__getitem__, default=None)


def last_of_run(folder: Path, count: int, step: int, recipe: Recipe, run: dict[str, Any]) -> list[Path]:
    """Return the last checkpoints that a run has written up to a step, in their order; another run's are passed over.

    Args:
        folder: The output folder.
        count: How many, at most.
        step: The last step of the run.
        recipe: What was trained.
        run: Facts of the run, as `describe` wrote them.
    """
    steps = {path.parent: int(path.parent.name.rpartition("-")[2]) for path in _complete(folder)}
    told = [path for path in steps if steps[path] <= step and (path / RUN_FILE).is_file()]
    own = [path for path in told if not _other(path, recipe, run)]
    return sorted(own, key=steps.__getitem__)[-count:]


def describe(checkpoint: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Write into a checkpoint what `refuse_other` compares: the recipe, and facts of the run."""
    recipe.save(checkpoint)
    write_json(checkpoint / RUN_FILE, run)


def refuse_other(checkpoint: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Raise if a checkpoint belongs to a run that would not have come to it this way.

    Args:
        checkpoint: Its folder.
        recipe: What is about to be trained.
        run: Facts of that run: its stage, its rows, the rows of an optimizer step.

    Raises:
        ValueError: Naming all that differs.
    """
    if not (checkpoint / RUN_FILE).is_file() or not (checkpoint / RECIPE_FILE).is_file():
        logger.warning("%s does not say what it was trained on: nothing was compared", checkpoint)
        return
    if told := _other(checkpoint, recipe, run):
        raise ValueError(
            f"{checkpoint} was written by another run: {'; '.join(told)}. Go on with the same settings, or leave "
            "--resume (training.resume_from_checkpoint) out to start anew"
        )


def _complete(folder: Path) -> list[Path]:
    """Find the states of a folder's checkpoints: a checkpoint has one once it is whole."""
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}"))


def _other(checkpoint: Path, recipe: Recipe, run: dict[str, Any]) -> list[str]:
    """Tell in what the run of a checkpoint, which says what it was trained on, differs."""
    before = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    stage = run["stage"]
    then, now = _decisive(load_recipe(checkpoint), stage) | before, _decisive(recipe, stage) | run
    other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in other]


def _decisive(recipe: Recipe, stage: str) -> dict[str, Any]:
    """All settings that decide what a stage trains, by name."""
    # What pretraining says of its own training stands in `training` by now; a mean is taken when all are trained.
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
    return found | {f"training.{name}": value for name, value in training.items() if not name.startswith(FREE)}


@contextmanager
def _removed_if_failed(partial: Path) -> Iterator[None]:
    with ExitStack() as failed:
        failed.callback(shutil.rmtree, partial, ignore_errors=True)  # a full disk gets its room back
        try:
            yield
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors tell of a full disk
            raise OSError(
                f"{partial} could not be written: {error}. Is the disk full? What was saved before is as it was"
            ) from error
        failed.pop_all()


def _move_files(complete: Path, folder: Path) -> None:
    """Let the files of a model take their places, the configuration last; may be begun again at any point."""
    if not (complete / FILES_FILE).exists():  # they all have, and it was killed while it cleaned up
        shutil.rmtree(complete)
        return
    names = json.loads((complete / FILES_FILE).read_text(encoding="utf-8"))
    for pattern in WEIGHTS:
        for path in folder.glob(pattern):
            if path.name not in names:
                path.unlink()
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        source, place = complete / name, folder / name
        if not source.exists():
            continue
        if place.is_dir():
            shutil.rmtree(place)
        source.replace(place)
    _sync_names(folder)
    shutil.rmtree(complete)


def _sync(folder: Path) -> None:
    """Make sure that all of a folder is on the disk before it gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


__all__ = [
    "describe",
    "files_written_whole",
    "find_checkpoint",
    "last_of_run",
    "newest",
    "put_right",
    "refuse_other",
    "written_whole",
]
