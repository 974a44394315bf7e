"""Fills a model card with the facts of a run; unknown facts are left out.

>>> card = render_card(CardFacts(name="org/films", tasks=["retrieval"], seed=0))
>>> "Random seed: 0" in card, "Limits" in card
(True, False)
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from pprint import pformat
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..atomic_m6rec import write_atomic
from ..values_m6rec import SCORING_TASKS
from .facts import CardFacts, DataFacts
from .privacy import is_private, is_secret

LANGUAGES = ("en", "zh")
"""Languages of the cards."""
CARDS = {"en": "README.md", "zh": "README_zh.md"}
"""The files of a model's two cards; the Hub shows the first, which links to the other."""
MARK = "<!-- Written by m6rec, and anew at each push unless this line is deleted. -->"
"""The last line of a card that no user has edited."""
OWN = "m6rec"
"""The model's name in a report; all other names are baselines."""
CONDITIONS: tuple[str, ...] = ("examples", "protocol", "observed", "seen", "repeats", "repeats_counted")
CONDITIONS += ("negatives_per_event", "negatives")
"""Names in a report of the conditions of its metrics."""
INTERVALS = "intervals"
"""Key in a report of the bootstrap intervals of its metrics: metric -> [low, high]."""
VERDICT = "verdict"
"""Key in the model's row of a report of its comparison with the best baseline."""
FAIRNESS = "fairness"
"""Key in a report of the exposure of items and the figures of groups of users."""
NOT_METRICS = (INTERVALS, VERDICT, FAIRNESS, "difference", "differences", "settings")
"""Keys in a report that are not metrics."""
BIAS_METRICS = ("coverage", "popularity_bias")
"""Metrics of a model's treatment of items, not of its accuracy."""
COUNTS = ("examples", "groups", "texts", "repeats", "negatives_per_event", "observed")
"""Endings of the names in a report that are counts, not metrics."""
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


def render_card(facts: CardFacts, language: str = "en", other: str | None = None) -> str:
    """Return the card: metadata in YAML, then text in Markdown.

    Args:
        facts: Facts for the card.
        language: Language of the card.
        other: File of the card in the other language, to which this one links.

    Raises:
        ValueError: If there is no template in the language; the message lists the known languages.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; there are templates in {', '.join(LANGUAGES)}")
    example = dict(_known(facts.example or EXAMPLES[language]))
    candidates = example.pop("candidates")
    recipe = _public(facts.recipe)
    results = {task: _table(report) for task, report in _known(facts.results).items()}
    metadata = _metadata(facts)
    text = _template(language).render(
        card_data=metadata.to_yaml(),
        facts=facts,
        other=other,
        name=json.dumps(facts.name, ensure_ascii=False),
        trust="" if facts.method else ", trust_remote_code=True",
        user=_python(example),
        candidates=_python(candidates),
        said=any(
            value is not None
            for name, value in vars(facts.data or DataFacts()).items()
            if name not in ("hub_id", "digest")
        ),
        results=results,
        intervals=any(INTERVALS in figures for report in facts.results.values() for figures in report.values()),
        leanings=_leanings(results),
        perplexities=_known(facts.perplexities),
        latency=_known(facts.latency),
        seconds=_known(facts.seconds),
        evaluation=recipe.get("evaluation") or {},
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip() if recipe else "",
        command=f"`{facts.command}`" if facts.command and not is_private(facts.command) else None,
        versions=", ".join(f"{package} {version}" for package, version in facts.versions.items()) or None,
        scored=next((task for task in SCORING_TASKS if task in facts.tasks), None),
        task_answers={name: task.about[language] for name, task in SCORING_TASKS.items() if language in task.about},
    )
    return str(ModelCard(text)).rstrip() + "\n"


@functools.cache
def _template(language: str) -> jinja2.Template:
    """Return the compiled template of a language. `ModelCard.from_template` would compile it for each card."""
    return jinja2.Template(Path(__file__).with_name(f"template_{language}.md").read_text(encoding="utf-8"))


def _says(data: DataFacts) -> bool:
    """Return whether any facts of the data are known that the card prints."""
    return any(value is not None for name, value in vars(data).items() if name not in ("hub_id", "digest"))


def render_cards(facts: CardFacts) -> dict[str, str]:
    """Return both cards, file -> text, each with a link to the other."""
    return {file: render_card(facts, language, _other(file)) for language, file in CARDS.items()}


def _other(file: str) -> str:
    return next(other for other in CARDS.values() if other != file)


def write_cards(facts: CardFacts, directory: str | Path) -> Path:
    """Write both cards atomically into a folder, and return the path of the first.

    They end with `MARK`: a card that still has it is rewritten when the model is pushed.
    """
    folder = Path(directory)
    for file, card in render_cards(facts).items():
        write_atomic(folder / file, f"{card}\n{MARK}\n")
    return folder / CARDS["en"]


def _metadata(facts: CardFacts) -> ModelCardData:
    """Make the card's metadata. The Hub has no pipeline tag for recommendation, so there is none."""
    results = _own_results(facts)
    more: dict[str, Any] = {}
    if facts.example:
        more["widget"] = [{"text": json.dumps(_known(facts.example), ensure_ascii=False)}]
    if facts.base_model:
        more["base_model_relation"] = "adapter" if facts.method else "finetune"
    return ModelCardData(
        model_name=facts.name if results else None,
        base_model=facts.base_model,
        datasets=[facts.data.hub_id] if facts.data and facts.data.hub_id else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        language=list(facts.languages) or None,
        license=facts.licence,
        library_name="peft" if facts.method else "transformers",
        tags=["recommendation", "recommender-system", OWN, *facts.tasks],
        eval_results=results or None,
        **more,
    )


def _own_results(facts: CardFacts) -> list[EvalResult]:
    """Return the metrics of the model itself; the Hub's format needs the data set's name."""
    if facts.data is None or not facts.data.name:
        return []
    found = []
    for task, report in _known(facts.results).items():
        # Replayed tasks (replay/NAME/TASK) are measured on the data of another run.
        figures = {} if task.startswith("replay/") else dict(report.get(OWN, {}))
        arguments = {name: figures[name] for name in CONDITIONS[1:] if name in figures} or None
        for metric, value in figures.items():
            if isinstance(value, Real) and not metric.endswith(COUNTS):
                result = EvalResult(
                    task_type=task,
                    dataset_type=facts.data.hub_id or re.sub(r"\W+", "-", facts.data.name.lower()).strip("-"),
                    dataset_name=facts.data.name,
                    dataset_split="test",
                    metric_type=metric,
                    metric_value=float(value),
                    metric_args=arguments,
                )
                found.append(result)
    return found


def _table(report: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Arrange name -> metrics as a table with one column per model; the conditions come first."""
    names = list(dict.fromkeys(name for figures in report.values() for name in figures if name not in NOT_METRICS))
    names.sort(key=lambda name: CONDITIONS.index(name) if name in CONDITIONS else len(CONDITIONS))
    return {
        "who": list(report),
        "rows": [(name, [_cell(figures, name) for figures in report.values()]) for name in names],
        "metrics": list(dict.fromkeys(name.rpartition("/")[2].partition("@")[0] for name in names)),
        "verdict": report.get(OWN, {}).get(VERDICT),
        "subsets": any(name.startswith(("warm/", "cold/")) for name in names),
    }


def _leanings(results: Mapping[str, dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Select the rows of BIAS_METRICS from tables of retrieval: metric, and (model, value) pairs."""
    table = results.get("retrieval", {"who": [], "rows": []})
    rows = [(name, cells) for name, cells in table["rows"] if name.partition("@")[0] in BIAS_METRICS]
    return [(name, list(zip(table["who"], cells))) for name, cells in rows]


def _cell(figures: Mapping[str, Any], name: str) -> str:
    value = figures.get(name)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{value:,}"
    interval = figures.get(INTERVALS, {}).get(name)
    shown = f"{value:.4f}" if isinstance(value, Real) else str(value)
    return f"{shown} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else shown


def _known(value: Any) -> Any:
    """Remove, at any depth, None, non-finite numbers, and collections that become empty."""
    if isinstance(value, Mapping):
        kept = {key: _known(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner is not None and inner not in ({}, [])}
    if isinstance(value, list | tuple):
        return [inner for inner in map(_known, value) if inner is not None]
    return None if isinstance(value, Real) and not math.isfinite(value) else value


def _public(value: Any) -> Any:
    """Remove, at any depth, secrets and local paths, in keys and in values."""
    if isinstance(value, Mapping):
        return {
            key: _public(inner)
            for key, inner in value.items()
            if not (is_secret(str(key), inner) or is_private(str(key)) or is_private(inner))
        }
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value if not is_private(inner)]
    return value


def _python(value: Any) -> str:
    """Format a value as a Python literal."""
    return pformat(value, width=100, sort_dicts=False)


__all__ = ["CARDS", "EXAMPLES", "LANGUAGES", "MARK", "OWN", "VERDICT", "render_card", "render_cards", "write_cards"]
