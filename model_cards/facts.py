"""What a model card may say: what is given, and what was measured."""

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
    """Given: what people call it."""
    licence: str | None = None
    """Given: what its owners allow."""
    hub_id: str | None = None
    """Given: its id on the Hub."""
    users: int | None = None
    """Measured: users with events, held-out ones included."""
    items: int | None = None
    """Measured: items."""
    events: int | None = None
    """Measured: events, held-out ones included."""
    digest: str | None = None
    """Measured: by which the same data are known again; no card says it."""


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
    preset: str | None = None
    """Given: the preset that this is, with weights that have learnt nothing. None: a trained model."""
    base_model: str | None = None
    """Given: the Hub's id of the model that this one was made of."""
    method: str | None = None
    """Given: the PEFT method of the adapter that this is. None: whole weights."""
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Given: what is shown, `curves` or `latency` -> the picture's file beside the card."""

    shape: Mapping[str, int] = field(default_factory=dict)
    """Measured: size -> number, as the configuration calls them."""
    parameters: int | None = None
    """Measured: number of weights."""
    trained_parameters: int | None = None
    """Measured: how many weights were trained."""
    catalogue_size: int | None = None
    """Measured: items in the catalogue that is saved with the model."""
    results: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Measured: task -> who -> metrics on the test part, as in `metrics.json`; who is "m6rec" or a baseline."""
    perplexities: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Measured: objective of pretraining -> perplexity of held-out texts, `before` and `after`."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """Measured: what one request takes, as in `latency.json`: `median_ms`, `p95_ms`, `requests`."""
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


__all__ = ["CardFacts", "DataFacts", "hardware"]
