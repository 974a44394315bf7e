"""Reports and answers as text for people."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...model_cards.card import FAIRNESS
from .verdicts import verdicts

SHOWN_VALUES = 8
"""Number of values of an item's field in a table."""
TEXT_METRICS = (
    "bleu_1",
    "bleu_4",
    "rouge_1",
    "rouge_l",
    "distinct_1",
    "distinct_2",
    "usr",
    "fcr",
    "fmr",
    "div",
    "source_gain",
    "naming_rate",
    "agreement",
    "unsupported",
)
"""Metrics of generated texts in tables, in their order."""


def tables(report: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Format a report of `full_report`: one table per task, one row per model, and the comparison.

    >>> print(tables({"rating": {"m6rec": {"rmse": 1.0, "examples": 3}, "item_mean": {"rmse": 1.25, "examples": 3}}}))
    rating (3 examples)
                rmse
    m6rec     1.0000
    item_mean 1.2500
    """
    parts = []
    said = verdicts(report)
    for task, rows in report.items():
        first = next(iter(rows.values()))
        names = [name for name, value in first.items() if isinstance(value, float) and "/" not in name]
        seen = f", protocol {first['protocol']}" if "protocol" in first else ""
        if first.get("observed"):
            seen += ", validation part observed"
        seen += f", seen items {first['seen']}" if "seen" in first else ""
        seen += f", {first['repeats']} repeats counted {first['repeats_counted']}" if "repeats" in first else ""
        width = max(map(len, rows))
        sizes = [max(len(name), 6) for name in names]
        lines = [f"{task} ({first['examples']} examples{seen})"]
        shown = _difference_of(first)
        beside = [f" {shown} - {first['difference']['to']}"] if shown else []
        lines.append(" ".join([" " * width, *(name.rjust(size) for name, size in zip(names, sizes)), *beside]))
        for who, values in rows.items():
            if not names or names[0] in values:
                cells = [f"{values[name]:.4f}".rjust(size) for name, size in zip(names, sizes)]
                lines.append(" ".join([who.ljust(width), *cells, *_difference(values, shown)]))
        lines += [*_text_lines(rows), *_fairness_lines(rows)]
        if task in said:
            lines.append(said[task])
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _text_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the metrics of generated texts: a table for each writing task whose texts were compared."""
    first, lines = next(iter(rows.values())), []
    for task in [name.removesuffix("/texts") for name in first if name.endswith("/texts")]:
        names = [f"{task}/{name}" for name in TEXT_METRICS if f"{task}/{name}" in first]
        shown = {who: values for who, values in rows.items() if names[0] in values}
        width, heads = max(map(len, shown)), [name.rpartition("/")[2] for name in names]
        lines.append(f"{task} ({first[f'{task}/texts']} texts)")
        lines.append(" ".join([" " * width, *(head.rjust(10) for head in heads)]))
        for who, values in shown.items():
            cells = [f"{values[name]:.4f}" if name in values else "-" for name in names]
            lines.append(" ".join([who.ljust(width), *(cell.rjust(10) for cell in cells)]))
    return lines


def _fairness_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the exposure of items, and the figures of groups of users."""
    found = {who: values[FAIRNESS] for who, values in rows.items() if FAIRNESS in values}
    if not found:
        return []
    width, first = max(map(len, found)), next(iter(found.values()))
    fifths = list(first["exposure"]["popularity"])
    lines = [f"first {first['top']} items: Gini, coverage, and the exposure of popularity fifths"]
    lines.append(" ".join([" " * width, "   gini", "coverage", *(name.rjust(7) for name in fifths)]))
    for who, own in found.items():
        shares = [f"{own['exposure']['popularity'][name]['share']:.3f}".rjust(7) for name in fifths]
        lines.append(" ".join([who.ljust(width), f"{own['gini']:7.3f}", f"{own['coverage']:8.3f}", *shares]))
    for field, shares in first["exposure"].items():
        if field != "popularity":
            lines += [f"exposure by {field}: share of the model, of the events, of the catalogue"]
            lines += [
                f"  {value}: {own['share']:.3f}, {own['events']:.3f}, {own['items']:.3f}"
                for value, own in sorted(shares.items(), key=lambda pair: -pair[1]["share"])[:SHOWN_VALUES]
            ]
    for field, groups in first["groups"].items():
        hidden = first["not_shown"].get(field)
        lines.append(
            f"by {field}" + (f" ({hidden} users in groups that are too small are not shown)" if hidden else "")
        )
        for group, own in groups.items():
            cells = [
                f"{name} {own[name]:.3f} [{low:.3f}, {high:.3f}]" for name, (low, high) in own["intervals"].items()
            ]
            lines.append(f"  {group} ({own['users']} users): {', '.join(cells)}")
    return lines


def _difference_of(row: dict[str, Any]) -> str | None:
    """Return the metric whose difference to the rule is shown; None if there is none."""
    return next((name for name in row.get("difference", ()) if name.startswith("ndcg@")), None)


def _difference(row: dict[str, Any], metric: str | None) -> list[str]:
    """Format a row's difference to the rule with its interval."""
    if metric is None or row["difference"]["to"] not in row["differences"]:
        return []
    found = row["difference"][metric]
    low, high = found["interval"]
    return [f" {found['value']:+.4f} [{low:+.4f}, {high:+.4f}]"]


def answer_lines(request: Any, answer: list[dict[str, Any]]) -> str:
    """Format a request and its answer, one item per line.

    >>> print(answer_lines("likes the sea", [{"rank": 1, "item": {"title": "Salt"}, "score": 0.5}]))
    likes the sea
     1  0.500  Salt
    """
    lines = [request if isinstance(request, str) else json.dumps(request, ensure_ascii=False)]
    for row in answer:
        item = row["item"]
        text = (
            item
            if isinstance(item, str)
            else ", ".join(str(value) for name, value in item.items() if name != "item_id")
        )
        lines.append(f"{row['rank']:2}  {row['score']:.3f}  {text}")
    return "\n".join(lines)


def why_unwritable(error: OSError, folder: Path) -> str:
    """Return advice for an error of writing into a folder.

    >>> why_unwritable(OSError(errno.ENOSPC, "No space left on device"), Path("runs"))
    'The disk is full: make room.'
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full: make room."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"You have no permission to write into {folder}: change that, or name another place."
    if error.errno == errno.EROFS:
        return f"{folder} is on a disk that can only be read: name another place."
    return "Mend that first."


__all__ = ["answer_lines", "tables", "why_unwritable"]
