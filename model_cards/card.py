"""Fills a model card with the facts of a run: what is unknown is left out, and no figure is made up.

>>> card = render_card(CardFacts(name="org/films", tasks=["retrieval"], seed=0))
>>> "Random seed: 0" in card, "Limits" in card
(True, False)
"""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from pprint import pformat
from typing import Any

import psutil
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

LANGUAGES = ("en", "zh")
"""Languages that cards are written in."""
OWN = "m6rec"
"""The model's own name in a report; the others are baselines."""
COUNTS = ("examples", "groups")
"""How figures of a report end that count and do not measure."""
SECRET = re.compile(r"token$|secret|password|api_key")
"""Keys of a recipe that no card may hold."""
PLACE = re.compile(r"(?:^|[\s=:'\"])(?:~|/(?=[^\s/])|[A-Za-z]:[\\/]|\\\\|file:)")
"""A path that means something on one machine only."""
EXAMPLES: dict[str, dict[str, Any]] = {
    "en": {
        "user": "A woman in her thirties",
        "history": [{"event": "clicked", "item": "men's hooded jacket"}, "hiking socks"],
        "candidates": ["waterproof hiking shoes", "yoga mat"],
    },
    "zh": {
        "user": "一位三十多岁的女性",
        "history": [{"event": "点击", "item": "男士连帽夹克"}, "徒步袜"],
        "candidates": ["防水登山鞋", "瑜伽垫"],
    },
}


@dataclass(frozen=True)
class DataFacts:
    """The data that a model was trained on; None: unknown."""

    name: str
    """Given: what people call it."""
    licence: str | None = None
    """Given: what its owners allow."""
    users: int | None = None
    """Measured: users with events, held-out ones included."""
    items: int | None = None
    """Measured: items."""
    events: int | None = None
    """Measured: events, held-out ones included."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card may say, first what is given, then what was measured; None or empty: unknown, left out."""

    name: str
    """Given: what users load the model by, a Hub id or a folder."""
    data: DataFacts | None = None
    """Given and measured: what the model was trained on."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Given: the resolved recipe. Secrets and places on this machine are left out of the card."""
    command: str | None = None
    """Given: what was typed; left out of the card if it names a place on this machine."""
    seed: int | None = None
    """Given: of everything drawn at random."""
    tasks: Sequence[str] = ()
    """Given: tasks whose heads were trained."""
    languages: Sequence[str] = ()
    """Given: ISO codes of the languages of the texts."""
    licence: str | None = None
    """Given: the Hub's identifier of the licence of the weights."""
    intended_use: Sequence[str] = ()
    """Given: what the model is meant for, a sentence each."""
    limits: Sequence[str] = ()
    """Given: what it cannot do, a sentence each."""
    example: Mapping[str, Any] | None = None
    """Given: a request with candidates, for the usage snippet. None: one from a clothes shop."""

    parameters: int | None = None
    """Measured: number of weights."""
    catalogue_size: int | None = None
    """Measured: items in the catalogue that is saved with the model."""
    results: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Measured: task -> who -> metrics on the test part, as in `metrics.json`; who is "m6rec" or a baseline."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Measured: stage -> seconds."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Measured: package -> version."""
    hardware: str | None = None
    """Measured: what the run ran on, as `hardware()` says."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name is {self.name!r}; expected the Hub id or folder that users load the model by")
        if self.example is not None and not self.example.get("candidates"):
            raise ValueError(f"example is {self.example!r}; expected a request with candidates")


def render_card(facts: CardFacts, language: str = "en") -> str:
    """Return the card: metadata in YAML, then text in Markdown.

    Args:
        facts: What the card may say.
        language: What it is written in.

    Raises:
        ValueError: If there is no template in the language; the message lists those there are.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; there are templates in {', '.join(LANGUAGES)}")
    example = dict(_known(facts.example or EXAMPLES[language]))
    candidates = example.pop("candidates")
    recipe = _public(facts.recipe)
    card = ModelCard.from_template(
        _metadata(facts),
        template_path=str(Path(__file__).with_name(f"template_{language}.md")),
        facts=facts,
        name=json.dumps(facts.name, ensure_ascii=False),
        user=_python(example),
        candidates=_python(candidates),
        results={task: _table(report) for task, report in _known(facts.results).items()},
        seconds=_known(facts.seconds),
        evaluation=recipe.get("evaluation") or {},
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip() if recipe else "",
        command=f"`{facts.command}`" if facts.command and not _is_place(facts.command) else None,
        versions=", ".join(f"{package} {version}" for package, version in facts.versions.items()) or None,
        scored=next((task for task in ("click", "rating", "interaction") if task in facts.tasks), None),
    )
    return str(card).rstrip() + "\n"


def write_card(facts: CardFacts, directory: str | Path, language: str = "en") -> Path:
    """Write the card as the README.md of a folder, in one step, and return its path; arguments as of `render_card`."""
    path = Path(directory) / "README.md"
    card = render_card(facts, language)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(card, encoding="utf-8", newline="\n")
    return partial.replace(path)


def hardware() -> str:
    """Name the processor, its logical cores, the memory and the graphics cards; not the machine."""
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB memory"
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join([_processor(), f"{os.cpu_count()} logical cores", memory, *cards])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    named = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _metadata(facts: CardFacts) -> ModelCardData:
    """Make the head of the card. The Hub has no pipeline tag for recommendation, so there is none."""
    results = _own_results(facts)
    return ModelCardData(
        model_name=facts.name if results else None,
        language=list(facts.languages) or None,
        license=facts.licence,
        library_name="transformers",
        tags=["recommendation", "recommender-system", OWN, *facts.tasks],
        eval_results=results or None,
    )


def _own_results(facts: CardFacts) -> list[EvalResult]:
    """List what was measured of the model itself; the Hub's format needs the data set's name."""
    if facts.data is None:
        return []
    found = []
    for task, report in _known(facts.results).items():
        figures = dict(report.get(OWN, {}))
        arguments = {"seen": figures["seen"]} if "seen" in figures else None
        for metric, value in figures.items():
            if isinstance(value, Real) and not metric.endswith(COUNTS):
                result = EvalResult(
                    task_type=task,
                    dataset_type=re.sub(r"\W+", "-", facts.data.name.lower()).strip("-"),
                    dataset_name=facts.data.name,
                    dataset_split="test",
                    metric_type=metric,
                    metric_value=float(value),
                    metric_args=arguments,
                )
                found.append(result)
    return found


def _table(report: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Lay out who -> metrics with a column for each model; what the figures rest on comes first."""
    names = list(dict.fromkeys(name for figures in report.values() for name in figures))
    names.sort(key=lambda name: name not in ("examples", "seen"))
    return {
        "who": list(report),
        "rows": [(name, [_cell(figures.get(name)) for figures in report.values()]) for name in names],
        "metrics": list(dict.fromkeys(name.rpartition("/")[2].partition("@")[0] for name in names)),
        "subsets": any("/" in name for name in names),
    }


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Integral):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, Real) else str(value)


def _known(value: Any) -> Any:
    """Leave out, at any depth, what is None or no finite number, and what nothing is left of."""
    if isinstance(value, Mapping):
        kept = {key: _known(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner is not None and inner not in ({}, [])}
    if isinstance(value, list | tuple):
        return [inner for inner in map(_known, value) if inner is not None]
    return None if isinstance(value, Real) and not math.isfinite(value) else value


def _public(value: Any) -> Any:
    """Leave out secrets, and texts that name a place on this machine, at any depth."""
    if isinstance(value, Mapping):
        kept = {key: inner for key, inner in value.items() if not SECRET.search(str(key)) and not _is_place(inner)}
        return {key: _public(inner) for key, inner in kept.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value if not _is_place(inner)]
    return value


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and PLACE.search(value) is not None


def _python(value: Any) -> str:
    """Write a value as a Python literal."""
    return pformat(value, width=100, sort_dicts=False)


__all__ = ["EXAMPLES", "LANGUAGES", "CardFacts", "DataFacts", "hardware", "render_card", "write_card"]
