"""Recipes: what a run does, as dataclasses that are read from YAML and overridden on the command line.

A recipe has one section a question: `data` (what is read), `text` (how it is worded), `model` (what learns), `task`
(what is learnt), `evaluation` (what is measured), and `training`, the fields of `transformers.TrainingArguments`.
"""

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from transformers import TrainingArguments

from ..configuration_m6rec import M6RecConfig
from .data import DataArguments

RECIPES = Path(__file__).parent / "recipes"
RECIPE_FILE = "recipe.yaml"
"""Where a run keeps its resolved recipe, beside the weights."""
VERSIONED = ("torch", "transformers", "tokenizers", "datasets", "peft", "accelerate", "numpy", "pandas")
LEARNT = ("retrieval", "click", "rating", "interaction")
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


@dataclass
class Recipe:
    """Everything a run is decided by."""

    data: DataArguments = field(default_factory=DataArguments)
    text: TextArguments = field(default_factory=TextArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    task: TaskArguments = field(default_factory=TaskArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields = {entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init}
        refuse_unknown(self.training, fields, "training")
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
        ours = {"report_to": "none", "remove_unused_columns": False, "label_names": ["labels"]}
        return TrainingArguments(**{**ours, **defaults, **self.training})

    def save(self, directory: str | Path) -> None:
        """Write the resolved recipe, with the versions it ran with, beside the weights."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        versions = "".join(f"#   {name} {importlib.metadata.version(name)}\n" for name in ("m6rec", *VERSIONED))
        body = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
        (directory / RECIPE_FILE).write_text(f"# The recipe of this model, as it was run with\n{versions}{body}")


SECTIONS = {
    "data": DataArguments,
    "text": TextArguments,
    "model": ModelArguments,
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
    tree = dict(source) if isinstance(source, Mapping) else _read_yaml(find_recipe(source))
    for entry in overrides:
        _override(tree, entry)
    refuse_unknown(tree, {*SECTIONS, "training"}, "the recipe")
    sections = {name: _build(cls, tree.get(name) or {}, name) for name, cls in SECTIONS.items()}
    return Recipe(**sections, training=dict(tree.get("training") or {}))


def find_recipe(source: str | Path) -> Path:
    """Find a recipe: a file, a folder with a run's recipe, or the name of one of the package's recipes."""
    path = Path(source)
    for candidate in (path / RECIPE_FILE, path, RECIPES / path.name, RECIPES / f"{path.name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(entry.stem for entry in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"there is no recipe {str(source)!r}: give a YAML file, a run's folder, or one of {known}")


def refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise if a mapping has keys that nobody reads: a typo must not pass in silence."""
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known keys are {', '.join(sorted(known))}")


def _build(cls: type, values: Any, section: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"section {section} is {values!r}; expected keys with values")
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    refuse_unknown(values, set(fields), section)
    return cls(**{name: _typed(value, fields[name].type, f"{section}.{name}") for name, value in values.items()})


PLAIN: dict[Any, tuple[type, ...]] = {
    float: (int, float),
    int: (int,),
    str: (str,),
    bool: (bool,),
    dict: (dict,),
    list: (list,),
    type(None): (type(None),),
}


def _typed(value: Any, kind: Any, where: str) -> Any:
    """Check a value against the field's type as far as YAML can get it wrong: numbers, texts, lists, yes or no."""
    if getattr(kind, "__origin__", None) is Literal:
        return value
    options = get_args(kind) if not hasattr(kind, "__origin__") and get_args(kind) else (kind,)
    allowed = [allowed for option in options for allowed in PLAIN[getattr(option, "__origin__", option)]]
    if not isinstance(value, tuple(allowed)) or isinstance(value, bool) and bool not in allowed:
        names = " or ".join(dict.fromkeys(entry.__name__ for entry in allowed))
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}); expected {names}")
    return value


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number (YAML 1.1 reads it as text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{entry!r}: {key} holds a value, not keys")
        tree = inner
    tree[last] = yaml.load(text, Loader=_Loader)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


__all__ = [
    "LEARNT",
    "EvaluationArguments",
    "ModelArguments",
    "Recipe",
    "TaskArguments",
    "TextArguments",
    "find_recipe",
    "load_recipe",
    "refuse_unknown",
    "write_json",
]
