"""Facts for a model card: given and measured ones."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass(frozen=True)
class DataFacts:
    """The data that a model was trained on; None: unknown."""

    name: str | None = None
    """Given: its name."""
    licence: str | None = None
    """Given: its licence."""
    hub_id: str | None = None
    """Given: its id on the Hub."""
    users: int | None = None
    """Measured: number of users with events, including held-out ones."""
    items: int | None = None
    """Measured: number of items."""
    events: int | None = None
    """Measured: number of events, including held-out ones."""
    digest: str | None = None
    """Measured: digest that identifies the data; not printed."""


@dataclass(frozen=True)
class CardFacts:
    """All facts for a card, first given, then measured ones; None or empty: unknown, left out."""

    name: str
    """Given: the name by which users load the model, a Hub id or a folder."""
    data: DataFacts | None = None
    """Given and measured: the training data."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Given: the resolved recipe. The card leaves out secrets and local paths."""
    command: str | None = None
    """Given: the command line; the card leaves it out if it has a local path."""
    seed: int | None = None
    """Given: seed of all random draws."""
    tasks: Sequence[str] = ()
    """Given: tasks whose heads were trained."""
    languages: Sequence[str] = ()
    """Given: ISO codes of the languages of the texts."""
    licence: str | None = None
    """Given: the Hub's identifier of the licence of the weights."""
    intended_use: Sequence[str] = ()
    """Given: intended uses, one sentence each."""
    limits: Sequence[str] = ()
    """Given: limits, one sentence each."""
    example: Mapping[str, Any] | None = None
    """Given: a request with candidates, for the usage snippet. None: one from a clothes shop."""
    preset: str | None = None
    """Given: the preset of an untrained model. None: a trained model."""
    base_model: str | None = None
    """Given: the Hub id of the base model."""
    method: str | None = None
    """Given: the PEFT method, if this is an adapter. None: full weights."""
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Given: contents, `curves` or `latency` -> image file in the card's folder."""

    shape: Mapping[str, int] = field(default_factory=dict)
    """Measured: size -> number, with the configuration's names."""
    parameters: int | None = None
    """Measured: number of weights."""
    trained_parameters: int | None = None
    """Measured: number of trained weights."""
    catalogue_size: int | None = None
    """Measured: number of items in the catalogue saved with the model."""
    results: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Measured: task -> name -> metrics on the test part, as in `metrics.json`; a name is "m6rec" or a baseline."""
    perplexities: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Measured: objective of pretraining -> perplexity of held-out texts, `before` and `after`."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """Measured: latency of single requests, as in `latency.json`: `median_ms`, `p95_ms`, `requests`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Measured: stage -> seconds."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Measured: package -> version."""
    hardware: str | None = None
    """Measured: hardware of the run, from `hardware()`."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name is {self.name!r}; expected the Hub id or folder that users load the model by")
        if self.example is not None and not self.example.get("candidates"):
            raise ValueError(f"example is {self.example!r}; expected a request with candidates")


def hardware() -> str:
    """Describe the processor, its logical cores, the memory and the GPUs, without the machine's name."""
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB memory"
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join([_processor(), f"{os.cpu_count()} logical cores", memory, *cards])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    named = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


__all__ = ["CardFacts", "DataFacts", "hardware"]
