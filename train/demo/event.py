"""Which event a click in a demo stands for."""

import json
from pathlib import Path
from typing import Any

CARD_FILE = "card.json"


def click_event(folder: Path) -> dict[str, Any]:
    """Return the first event of the example in a folder's card.json, without its item; empty if there is none.

    The models of the package learn events with their verbs and ratings: a click is worded as their data words it.
    """
    path = folder / CARD_FILE
    example = json.loads(path.read_text(encoding="utf-8")).get("example") if path.is_file() else None
    history = (example or {}).get("history") or [{}]
    first = history[0] if isinstance(history[0], dict) else {}
    return {name: value for name, value in first.items() if name in ("event", "rating")}


__all__ = ["click_event"]
