"""The command `m6rec demo`."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import uvicorn

from ..answering.evidence import log_events
from ..answering.loading import load_pipeline
from ..config.recipe import RECIPE_FILE, load_saved
from ..data.log import read_log
from .answers import Demo, add_evidence
from .event import click_event
from .server import KEEP_ALIVE, make_app


def load_demo(
    model: str, event: Mapping[str, Any] | None = None, log: bool = True, overrides: Sequence[str] = ()
) -> Demo:
    """Load a model for a demo.

    Args:
        model: The folder or the Hub id of a model with a catalogue.
        event: Keys of the event that a click stands for; None = those of the example in the folder's card.json.
        log: If the catalogue has no evidence and the folder has a recipe, count the events of the recipe's log.
        overrides: What differs from the recipe in the folder, such as where the log is now.

    Raises:
        OSError: The model cannot be read.
        ValueError: The model has no catalogue, or the log cannot be read.
    """
    recommend = load_pipeline(model)
    if recommend.catalogue is None:
        raise ValueError(f"{model!r} has no catalogue to recommend from: show a model that has one")
    if log and recommend.catalogue.evidence is None and (Path(model) / RECIPE_FILE).is_file():
        try:
            recipe = load_saved(model, list(overrides))
            events = log_events(recipe, read_log(recipe.data))
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; or give --no-log, which shows the model without transitions") from error
        add_evidence(recommend, events)
    return Demo(recommend, click_event(Path(model)) if event is None else event, Path(model).name or model)


def demo(shown: Demo, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve a demo until the process gets a signal to stop.

    Args:
        shown: The demo.
        host: Address to listen on.
        port: Port to listen on.
        say: Prints a line.
    """
    app = make_app(shown)
    seconds = time.time() - psutil.Process().create_time()
    say(f"awake after {seconds:.1f} s at http://{host}:{port}")
    options: dict[str, Any] = {"access_log": False, "log_level": "warning", "timeout_keep_alive": KEEP_ALIVE}
    uvicorn.run(app, host=host, port=port, **options)


def parse_event(text: str) -> dict[str, Any]:
    """Read the JSON of the event that a click stands for."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--event {text!r} is no valid JSON: {error}") from error
    if not isinstance(given, dict) or "item" in given:
        raise ValueError(f'--event {text!r}: give an object without item, such as {{"event": "rate", "rating": 5}}')
    return given


__all__ = ["demo", "load_demo", "parse_event"]
