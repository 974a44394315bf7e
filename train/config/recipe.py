"""Recipes: the settings of a run as dataclasses, read from YAML and overridden on the command line.

A recipe has these sections: `data` (tables to read), `text` (how requests are worded and tokenised), `model` (the
model to train), `pretraining` (objectives and texts), `tuning` (which weights are trained), `distillation` (a trained
model to learn from), `task` (what is learnt from events), `evaluation` (splits and metrics), `recommend` (requests at
the end), and `training`, the fields of `transformers.TrainingArguments`.
"""

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from transformers import TrainingArguments

from ...atomic_m6rec import write_atomic
from ...configuration_m6rec import ROPE_BY_ROW
from ...values_m6rec import RENAMED_KEYS, check_size, rename_keys, short
from ..data.log import DataArguments
from .arguments import (
    DistillationArguments,
    EvaluationArguments,
    ModelArguments,
    PretrainingArguments,
    RecommendArguments,
    TaskArguments,
    TextArguments,
    TuningArguments,
    refuse_unknown,
)
from .locations import located, missing
from .plain_yaml import DEEPEST, MOST_VALUES, PlainDumper, read_yaml

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE_FILE = "recipe.yaml"
"""File name of a run's resolved recipe, in the folder of the weights."""
VERSIONED = ("torch", "transformers", "tokenizers", "datasets", "peft", "accelerate", "numpy", "pandas")
LESS_IS_BETTER = ("loss", "error", "rmse", "mae", "perplexity")
"""Endings of the names of metrics of which less is better."""


@dataclass
class Recipe:
    """All settings of a run."""

    data: DataArguments = field(default_factory=DataArguments)
    text: TextArguments = field(default_factory=TextArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    pretraining: PretrainingArguments = field(default_factory=PretrainingArguments)
    tuning: TuningArguments = field(default_factory=TuningArguments)
    distillation: DistillationArguments = field(default_factory=DistillationArguments)
    task: TaskArguments = field(default_factory=TaskArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    recommend: RecommendArguments = field(default_factory=RecommendArguments)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(TrainingArguments, self.training, "training")
        _check(TrainingArguments, self.pretraining.training, "pretraining.training")
        if self.training.get("hub_token") or self.pretraining.training.get("hub_token"):
            raise ValueError(
                "training.hub_token would stand in recipe.yaml and in every checkpoint for all to read: leave it out, "
                "and log in once (hf auth login) or set HF_TOKEN"
            )
        if self.training.get("push_to_hub") or self.pretraining.training.get("push_to_hub"):
            raise ValueError(
                "training.push_to_hub would upload all that lies in the folder, the pickles of the Trainer too: leave "
                "it out, and publish with m6rec push"
            )
        if not self.training.get("output_dir"):
            raise ValueError("training.output_dir is missing: name the folder that the run writes")
        self._check_average()

    def _check_average(self) -> None:
        count, kept = self.tuning.average_checkpoints, self.training.get("save_total_limit")
        if count == 1:
            return
        if self.training.get("save_strategy") in ("no", "best") or self.training.get("load_best_model_at_end"):
            raise ValueError(
                f"tuning.average_checkpoints is {count}: expected training.save_strategy epoch or steps, and no "
                "training.load_best_model_at_end, which takes one of them"
            )
        if kept is not None and kept < count:
            raise ValueError(
                f"training.save_total_limit is {kept}, and tuning.average_checkpoints {count}: expected as many or more"
            )

    @property
    def output_dir(self) -> Path:
        """The folder to which the run writes."""
        return Path(self.training["output_dir"])

    @property
    def seed(self) -> int:
        """The seed of all random draws."""
        return int(self.training.get("seed", 42))

    def for_pretraining(self) -> "Recipe":
        """Return the recipe of the pretraining: with its own settings of the Trainer, in its own folder if it has one.

        A recipe's settings of tuning, and of evaluation during training, are for fine-tuning only. In a new model that
        learns to write, written text attends to its source in every layer.
        """
        own = {"eval_strategy": "no", "load_best_model_at_end": False, **self.pretraining.training}
        own |= {"output_dir": self.pretraining.output_dir} if self.pretraining.output_dir else {}
        rope = {**self.model.shape, **self.model.config}.get("rope_parameters") or {}
        writes = any(weight and name != "likes" for name, weight in self.pretraining.objectives.items())
        model = self.model
        if writes and rope.get("rope_type") not in ROPE_BY_ROW:
            model = dataclasses.replace(model, shape={"written_attention": "source", **model.shape})
        return dataclasses.replace(
            self,
            model=model,
            training={**self.training, **own},
            tuning=TuningArguments(),
            distillation=DistillationArguments(),
        )

    def for_finetuning(self) -> "Recipe":
        """Return the recipe of the fine-tuning, which starts from the pretraining's folder if the recipe names one.

        Raises:
            FileNotFoundError: If that folder holds no model.
        """
        folder = self.pretraining.output_dir
        if not folder:
            return self
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(
                f"pretraining.output_dir {folder!r} holds no model to fine-tune: run `m6rec pretrain` with this recipe "
                "first, or `m6rec run` for all its steps, or set pretraining.output_dir=null to begin with a new model"
            )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, checkpoint=folder, backbone=None))

    def training_arguments(self, **defaults: Any) -> TrainingArguments:
        """Make the Trainer's arguments; the recipe overrides `defaults`."""
        ours: dict[str, Any] = {"report_to": "none", "remove_unused_columns": False, "label_names": ["labels"]}
        ours["logging_steps"] = 0.01  # a hundred points for the curves
        ours["ddp_find_unused_parameters"] = True  # a batch may have no labels for a head
        ours["disable_tqdm"] = not sys.stderr.isatty()  # progress bars would fill a log file
        if self.training.get("fp16"):
            if defaults.get("use_cpu") or self.training.get("use_cpu"):
                raise ValueError("training.fp16 needs a GPU, and this run computes on the CPU: leave it out")
            defaults["bf16"] = False
        if metric := self.training.get("metric_for_best_model"):  # the library minimises only losses
            ours["greater_is_better"] = not metric.endswith(LESS_IS_BETTER)
        return TrainingArguments(**{**ours, **defaults, **self.training})

    def save(self, directory: str | Path) -> None:
        """Write the resolved recipe and the versions it ran with into the weights' folder; paths become absolute."""
        directory = Path(directory)
        versions = "".join(f"#   {name} {importlib.metadata.version(name)}\n" for name in ("m6rec", *VERSIONED))
        body = yaml.dump(located(dataclasses.asdict(self)), Dumper=PlainDumper, sort_keys=False, allow_unicode=True)
        write_atomic(directory / RECIPE_FILE, f"# The recipe of this model, as it was run with\n{versions}{body}")


SECTIONS = {
    "data": DataArguments,
    "text": TextArguments,
    "model": ModelArguments,
    "pretraining": PretrainingArguments,
    "tuning": TuningArguments,
    "distillation": DistillationArguments,
    "task": TaskArguments,
    "evaluation": EvaluationArguments,
    "recommend": RecommendArguments,
}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A YAML file, the name of a recipe of the package, a folder that holds the recipe of a run, or a mapping.
        overrides: Entries such as `training.learning_rate=1e-3`; they override the file.

    Raises:
        FileNotFoundError: If there is no such recipe; the message lists those of the package.
        ValueError: If a key is unknown or a value has the wrong type; the message names all known keys.
    """
    if isinstance(source, Mapping):
        check_size(source, "the recipe", MOST_VALUES, DEEPEST)
        tree = _copied(source)
    else:
        tree = _read_yaml(find_recipe(source))
    tree = _renamed(tree)
    for entry in overrides:
        _override(tree, entry)
    refuse_unknown(tree, {*SECTIONS, "training"}, "the recipe")
    given = {name: {} if section is None else section for name, section in tree.items()}
    for name, cls in SECTIONS.items():
        _check(cls, given.setdefault(name, {}), name)
    return Recipe(**{name: SECTIONS[name](**given[name]) for name in SECTIONS}, training=given.get("training", {}))


def _copied(value: Any) -> Any:
    """Copy mappings and lists; what else there is stays, to be refused with its name."""
    if isinstance(value, Mapping):
        return {name: _copied(entry) for name, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def load_saved(folder: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe of a run. Its data must still be at their paths, unless overrides give new paths.

    Raises:
        FileNotFoundError: If data are missing; the message names all missing paths.
    """
    recipe = load_recipe(folder, overrides)
    if gone := missing(dataclasses.asdict(recipe)):
        places = ", ".join(f"{name}={path}" for name, path in gone.items())
        raise FileNotFoundError(
            f"the run in {str(folder)!r} reads what is not there any more: {places}. Say where it is now, as in "
            f"{next(iter(gone))}=PATH"
        )
    return recipe


def find_recipe(source: str | Path) -> Path:
    """Find a recipe: a file, a folder with a run's recipe, or the name of one of the package's recipes."""
    path = Path(source)
    for candidate in (path / RECIPE_FILE, path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(entry.stem for entry in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"there is no recipe {str(source)!r}: give a YAML file, a run's folder, or one of {known}")


def _check(cls: type, values: Any, section: str) -> None:
    """Raise if a dataclass lacks one of the keys, or a value has the wrong type."""
    if not isinstance(values, Mapping):
        raise ValueError(f"section {section} is {short(values)}; expected keys with values")
    kinds = {entry.name: entry.type for entry in dataclasses.fields(cls) if entry.init}
    if cls is TrainingArguments:
        kinds["resume_from_checkpoint"] = kinds["fsdp"] = str | bool | None  # true: the newest one; shard
    refuse_unknown(values, set(kinds), section)
    for name, value in values.items():
        kind = kinds[name]
        if not _fits(value, kind):
            expected = str(kind) if get_args(kind) else getattr(kind, "__name__", kind)
            raise ValueError(f"{section}.{name} is {short(value)} ({type(value).__name__}); expected {expected}")


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a field's type; the section itself checks the values of a Literal."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any or origin is Literal:
        return True
    if origin in (UnionType, Union):
        return any(_fits(value, option) for option in inside)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, inside[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(name, inside[0]) and _fits(entry, inside[1]) for name, entry in value.items()
        )
    if isinstance(value, bool) and kind is not bool:  # in Python a bool is an int
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it in UTF-8") from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}; expected sections {', '.join(SECTIONS)}, training")
    return tree


def _renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of version 0.1 to their current names, in each section and in `model.config`."""
    found = {name: rename_keys(keys) if isinstance(keys, Mapping) else keys for name, keys in tree.items()}
    model = found.get("model")
    if isinstance(model, dict) and isinstance(model.get("config"), Mapping):
        model["config"] = rename_keys(model["config"])
    return found


def _override(tree: dict[str, Any], entry: str) -> None:
    name, found, text = entry.partition("=")
    if not found:
        raise ValueError(f"{entry!r} is no override; write section.key=value, such as training.learning_rate=1e-3")
    *path, last = (RENAMED_KEYS.get(key, key) for key in name.strip().removeprefix("--").split("."))
    for key in path:
        if tree.get(key) is None:  # left out, or left empty
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ValueError(f"{entry!r}: {key} holds a value, not keys")
    tree[last] = read_yaml(text, f"{short(entry)}: {short(text)}")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, never a part of it."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


__all__ = ["Recipe", "find_recipe", "load_recipe", "load_saved", "write_json"]
