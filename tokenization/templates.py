"""Templates for the text of requests, one per domain and language, stored as editable YAML."""

import copy
import functools
from pathlib import Path
from typing import Any

import yaml

from ..formatting_m6rec import check_template

FOLDER = Path(__file__).parent / "templates"
COMMON = "common"


def available_templates() -> list[tuple[str, str]]:
    """List the (domain, language) pairs that `load_template` knows.

    >>> available_templates()[:2]
    [('ecommerce', 'en'), ('ecommerce', 'zh')]
    """
    pairs = (path.stem.rsplit("_", 1) for path in FOLDER.glob("*_*.yaml"))
    return sorted((domain, language) for domain, language in pairs if domain != COMMON)


def load_template(domain: str = "ecommerce", language: str = "en") -> dict[str, Any]:
    """Load a template: the language's common template, overridden by the domain's.

    >>> load_template("video", "zh")["tasks"]["plausibility"]
    '还观看了{item}'

    Raises:
        ValueError: If there is no such template, or its file has unknown, missing or wrong keys.
    """
    if (domain, language) not in available_templates():
        known = ", ".join("/".join(pair) for pair in available_templates())
        raise ValueError(f"no template for domain={domain!r}, language={language!r}; there are: {known}")
    template = _overlay(_read(COMMON, language), _read(domain, language))
    check_template(template)
    return template


def _read(domain: str, language: str) -> dict[str, Any]:
    return copy.deepcopy(_parsed((FOLDER / f"{domain}_{language}.yaml").read_text(encoding="utf-8")))


@functools.cache
def _parsed(text: str) -> dict[str, Any]:
    """Parse a file once; what is returned belongs to all callers."""
    return yaml.safe_load(text)


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings recursively, key by key; other values are replaced."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            merged[key] = _overlay(base[key], over[key])
    return merged


__all__ = ["available_templates", "load_template"]
