"""Recipes: what a run does, as dataclasses that are read from YAML and overridden on the command line.

A recipe has one section a question: `data` (what is read), `text` (how it is worded), `model` (what learns),
`pretraining` (what is learnt of texts), `task` (what is learnt of behaviour), `evaluation` (what is measured), and
`training`, the fields of `transformers.TrainingArguments`.
"""

import copy
import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from transformers import TrainingArguments

from ..configuration_m6rec import M6RecConfig
from .data import DataArguments

RECIPES = Path(__file__).parent / "recipes"
RECIPE_FILE = "recipe.yaml"
"""Where a run keeps its resolved recipe, beside the weights."""
VERSIONED = ("torch", "transformers", "tokenizers", "datasets", "peft", "accelerate", "numpy", "pandas")
LEARNT = ("retrieval", "click", "rating", "interaction")
LESS_IS_BETTER = ("loss", "error", "rmse", "mae")
"""How the names of metrics end of which less is better."""
Negatives = Literal["batch", "sampled", "catalogue"]
SplitName = Literal["leave-one-out", "time"]


@dataclass
class TextArguments:
    """The `text:` section: how requests are worded and tokenised."""

    domain: str = "ecommerce"
    """Domain of the template."""
    language: str = "en"
    """Language of the template."""
    max_length: int = 1024
    """Tokens of a source with its longest target, at most."""
    max_events: int = 50
    """Events of a history, at most."""
    vocab_size: int = 8000
    """Tokens of a tokenizer that is trained on the items' texts."""


@dataclass
class ModelArguments:
    """The `model:` section: what learns."""

    checkpoint: str | None = None
    """Folder or Hub id of an M6Rec model to go on from. None: a new model."""
    preset: str = "tiny"
    """Named size of a new model."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of M6RecConfig that differ from the preset."""
    attention: str | None = None
    """Attention implementation: sdpa, eager, ...; None: the library's choice."""
    freeze_segments: bool = False
    """Do not train embeddings and segment layers: each text is then read once, and its state kept."""
    item_memory: bool = False
    """Give every item of the catalogue a row of item memory."""

    def __post_init__(self) -> None:
        fields = {entry.name for entry in dataclasses.fields(M6RecConfig)}
        refuse_unknown(self.config, fields, "model.config")


@dataclass
class TaskArguments:
    """The `task:` section: what is learnt."""

    learn: list[str] = field(default_factory=lambda: ["retrieval"])
    """Tasks, of retrieval, click, rating, interaction."""
    targets: int = 8
    """Candidates of a training row, for click, rating and interaction."""
    interactions: dict[str, list[str]] = field(default_factory=dict)
    """For interaction: name of an interaction -> events of the log that count as it."""
    negatives: Negatives = "catalogue"
    """Against which items retrieval is learnt: those of the `batch`, a sample beside, or the whole catalogue."""
    num_sampled: int = 512
    """Items drawn for each batch with sampled negatives."""
    correct_popularity: bool = True
    """Correct batch and sampled negatives for how often an item gets among them (logQ)."""

    def __post_init__(self) -> None:
        unknown = [task for task in self.learn if task not in LEARNT]
        if unknown or not self.learn:
            raise ValueError(f"task.learn is {self.learn}; expected some of {', '.join(LEARNT)}")
        if self.negatives not in get_args(Negatives):
            raise ValueError(f"task.negatives is {self.negatives!r}; expected one of {', '.join(get_args(Negatives))}")
        if self.targets < 1 or self.num_sampled < 1:
            raise ValueError(f"task.targets={self.targets} and task.num_sampled={self.num_sampled} must be positive")
        if ("interaction" in self.learn) != bool(self.interactions):
            raise ValueError("task.interactions names what task.learn 'interaction' learns: give both or none")


@dataclass
class PretrainingArguments:
    """The `pretraining:` section: how `m6rec pretrain` learns the items' texts."""

    objectives: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "infilling": 1.0, "item": 2.0})
    """Objective -> weight: `text` writes a text on, `infilling` writes its masked spans (the paper's two), `item`
    writes an item's text from its segment (ours: with a segment summary, the summary then has to hold the text)."""
    valid_fraction: float = 0.05
    """Share of the texts held out for the perplexity."""

    def __post_init__(self) -> None:
        refuse_unknown(self.objectives, {"text", "infilling", "item"}, "pretraining.objectives")
        if not any(weight > 0 for weight in self.objectives.values()) or min(self.objectives.values()) < 0:
            raise ValueError(f"pretraining.objectives is {self.objectives}; expected weights, at least one positive")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"pretraining.valid_fraction={self.valid_fraction} is not in [0, 1)")


@dataclass
class EvaluationArguments:
    """The `evaluation:` section: what is measured."""

    split: SplitName = "leave-one-out"
    """Which events are held out: each user's last two, or all after two moments in time."""
    valid_fraction: float = 0.1
    """Share of the events used for validation, with the split by time."""
    test_fraction: float = 0.1
    """Share of the events used for the test, with the split by time."""
    ks: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Cut-offs of the ranking metrics."""
    exclude_seen: bool = True
    """Leave the items out that the user has met before."""
    max_users: int | None = None
    """Evaluate on so many users, drawn by the seed; None: all."""

    def __post_init__(self) -> None:
        if self.split not in get_args(SplitName):
            raise ValueError(f"evaluation.split is {self.split!r}; expected one of {', '.join(get_args(SplitName))}")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"evaluation.ks is {self.ks}; expected cut-offs of 1 or more")
        if self.max_users is not None and self.max_users < 1:
            raise ValueError(f"evaluation.max_users is {self.max_users}; expected 1 or more, or null for all users")


@dataclass
class Recipe:
    """Everything a run is decided by."""

    data: DataArguments = field(default_factory=DataArguments)
    text: TextArguments = field(default_factory=TextArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    pretraining: PretrainingArguments = field(default_factory=PretrainingArguments)
    task: TaskArguments = field(default_factory=TaskArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(TrainingArguments, self.training, "training")
        if not self.training.get("output_dir"):
            raise ValueError("training.output_dir is missing: name the folder that the run writes")

    @property
    def output_dir(self) -> Path:
        """The folder that the run writes."""
        return Path(self.training["output_dir"])

    @property
    def seed(self) -> int:
        """The seed of everything drawn at random."""
        return int(self.training.get("seed", 42))

    def training_arguments(self, **defaults: Any) -> TrainingArguments:
        """Make the Trainer's arguments; `defaults` give way to the recipe."""
        ours: dict[str, Any] = {"report_to": "none", "remove_unused_columns": False, "label_names": ["labels"]}
        if metric := self.training.get("metric_for_best_model"):  # the library knows only of losses that less is better
            ours["greater_is_better"] = not metric.endswith(LESS_IS_BETTER)
        return TrainingArguments(**{**ours, **defaults, **self.training})

    def save(self, directory: str | Path) -> None:
        """Write the resolved recipe, with the versions it ran with, beside the weights."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        versions = "".join(f"#   {name} {importlib.metadata.version(name)}\n" for name in ("m6rec", *VERSIONED))
        body = yaml.dump(dataclasses.asdict(self), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        _write(directory / RECIPE_FILE, f"# The recipe of this model, as it was run with\n{versions}{body}")


SECTIONS = {
    "data": DataArguments,
    "text": TextArguments,
    "model": ModelArguments,
    "pretraining": PretrainingArguments,
    "task": TaskArguments,
    "evaluation": EvaluationArguments,
}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A YAML file, the name of a recipe of the package, a folder that holds the recipe of a run, or a mapping.
        overrides: Entries such as `training.learning_rate=1e-3`; they win over the file.

    Raises:
        FileNotFoundError: If there is no such recipe; the message lists those of the package.
        ValueError: If a key is unknown or a value has the wrong type; the message names all known keys.
    """
    tree = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read_yaml(find_recipe(source))
    for entry in overrides:
        _override(tree, entry)
    refuse_unknown(tree, {*SECTIONS, "training"}, "the recipe")
    given = {name: {} if section is None else section for name, section in tree.items()}
    for name, cls in SECTIONS.items():
        _check(cls, given.setdefault(name, {}), name)
    return Recipe(**{name: SECTIONS[name](**given[name]) for name in SECTIONS}, training=given.get("training", {}))


def find_recipe(source: str | Path) -> Path:
    """Find a recipe: a file, a folder with a run's recipe, or the name of one of the package's recipes."""
    path = Path(source)
    for candidate in (path / RECIPE_FILE, path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(entry.stem for entry in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"there is no recipe {str(source)!r}: give a YAML file, a run's folder, or one of {known}")


def refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise if a mapping has keys that nobody reads: a typo must not pass in silence."""
    unknown = sorted(map(str, set(given) - known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known keys are {', '.join(sorted(known))}")


def _check(cls: type, values: Any, section: str) -> None:
    """Refuse what a dataclass has no field for, or none of that type."""
    if not isinstance(values, Mapping):
        raise ValueError(f"section {section} is {values!r}; expected keys with values")
    kinds = {entry.name: entry.type for entry in dataclasses.fields(cls) if entry.init}
    refuse_unknown(values, set(kinds), section)
    for name, value in values.items():
        kind = kinds[name]
        if not _fits(value, kind):
            expected = str(kind) if get_args(kind) else getattr(kind, "__name__", kind)
            raise ValueError(f"{section}.{name} is {value!r} ({type(value).__name__}); expected {expected}")


def _fits(value: Any, kind: Any) -> bool:
    """Say whether a value is of a field's type; what a Literal may be is left to the section's own check."""
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
    if isinstance(value, bool) and kind is not bool:  # to Python a truth value is a number
        return False
    return isinstance(value, (int, float) if kind is float else kind)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number and `no` is a text (YAML 1.1 reads a text and a false)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would take for something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}; expected sections {', '.join(SECTIONS)}, training")
    return tree


def _override(tree: dict[str, Any], entry: str) -> None:
    name, found, text = entry.partition("=")
    if not found:
        raise ValueError(f"{entry!r} is no override; write section.key=value, such as training.learning_rate=1e-3")
    *path, last = name.strip().removeprefix("--").split(".")
    for key in path:
        if tree.get(key) is None:  # left out, or left empty
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ValueError(f"{entry!r}: {key} holds a value, not keys")
    try:
        tree[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{entry!r}: {text!r} is no valid YAML: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


__all__ = [
    "LEARNT",
    "EvaluationArguments",
    "ModelArguments",
    "PretrainingArguments",
    "Recipe",
    "TaskArguments",
    "TextArguments",
    "find_recipe",
    "load_recipe",
    "refuse_unknown",
    "write_json",
]
