"""Selection of the files of a model to publish: an allow-list, and checks of the allowed files."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ...catalogue_m6rec import EVIDENCE, ITEMS, READER_FILE
from ...model_cards import CARDS, MARK, find_place, find_secrets, is_place, is_secret, is_secret_variable, render_cards
from ...modeling_m6rec import BASE, adapter_settings
from ...pipeline_m6rec import FOLDER
from ..config.recipe import RECIPE_FILE
from ..runs.facts import folder_facts, hub_id

HANDLER = "handler.py"
"""File that Inference Endpoints run."""
ALLOWED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "processor_config.json",
    "*_m6rec.py",
    HANDLER,
    f"{FOLDER}/catalogue.json",
    f"{FOLDER}/{EVIDENCE}",
    f"{FOLDER}/{READER_FILE}",
    f"{FOLDER}/items.parquet",
    f"{FOLDER}/vectors.safetensors",
    "metrics.json",
    "curves.png",
    "latency.png",
    "latency.json",
    *CARDS.values(),
    "LICENSE",
)
"""Files of a published model."""
PRIVATE_FILES = {
    "training_args.bin": "a pickle of the Trainer's settings, which runs code when it is read",
    "checkpoint-*": "a state of the training, for going on with it",
    BASE: "the base of the adapter, which is published by itself",
    RECIPE_FILE: "it names places of this machine; the card holds the recipe without them",
    "card.json": "the card says what stands in it",
    "*.json": "no part of the model",
    "*_m6rec.py": "no code of this model",
}
"""Pattern -> why matching files are not published; the first match counts."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.npz")
TABLES = ("*.csv", "*.tsv", "*.parquet", "*.jsonl", "*.arrow", "*.txt", "*.inter", "*.dat")
AUTO = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "the pipeline recommendation"),
    "tokenizer_config.json": ("AutoTokenizer",),
    "processor_config.json": ("AutoProcessor",),
}
"""File -> classes for which its `auto_map` or `custom_pipelines` must name the code."""
SIBLING = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)
SHARD = 5 * 10**9
"""Maximum size of a weights file in bytes; a larger file is split."""
KEYED_BY_DATA = ("model.vocab", "model.merges", "item_rows")
"""Paths in JSON files to values whose keys are texts or ids of the data."""


@dataclass
class Plan:
    """The files to publish and the files to leave out."""

    going: dict[str, Path | str] = field(default_factory=dict)
    """Path in the repository -> the file, or its text."""
    staying: dict[str, str] = field(default_factory=dict)
    """File or folder -> why it is not published."""


def plan(folder: Path, name: str, scratch: Path, base: str | None = None, secrets: tuple[str, ...] = ()) -> Plan:
    """Select the files of a model's folder to publish, and check them.

    Args:
        folder: The folder of a run, or any folder with a saved model.
        name: Name of the model on the Hub.
        scratch: Folder for split weights.
        base: Hub id of an adapter's base, if the adapter names a folder.
        secrets: Texts that must not be in any file, in addition to those of the environment.

    Raises:
        FileNotFoundError: Part of the model is missing.
        ValueError: Files hold secrets, training data, local paths or pickles; the message names all of them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}: give the folder that a run wrote")
    found = Plan()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        own = path.relative_to(folder).as_posix()
        if is_allowed(own):
            found.going[own] = path
        else:
            found.staying |= _why(own)
    is_adapter = adapter_settings(folder) is not None
    if is_adapter:
        found.going |= _adapter_configs(folder, base)
    elif base:
        raise ValueError(f"--base {base!r}: {str(folder)!r} holds no adapter but a whole model")
    _need_model(found, is_adapter)
    _keep_own_code(found, is_adapter)
    if not is_adapter:  # an endpoint loads one repository
        found.going.setdefault(HANDLER, Path(__file__).with_name(HANDLER))
    found.going |= _cards(folder, name, found)
    check(found, folder, secrets)
    _divide(found, scratch)
    return found


def is_allowed(path: str) -> bool:
    """Return whether a file belongs to a published model."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in ALLOWED)


def _why(path: str) -> dict[str, str]:
    """Return why a file is left out; for a folder, why it is as a whole."""
    top, _, inside = path.partition("/")
    for pattern, why in PRIVATE_FILES.items():
        if fnmatch(top, pattern):
            return {f"{top}/" if inside else top: why}
    if fnmatch(path, "*.safetensors"):
        return {path: "no weights of this model"}
    if any(fnmatch(path, pattern) for pattern in PICKLES):
        return {path: "a pickle or like one, which may run code when it is read"}
    if any(fnmatch(path, pattern) for pattern in TABLES):
        return {path: "a table or text, perhaps training data"}
    return {path: "not on the list of files that a model consists of"}


# ------------------------------------------------------------------------------------------------- what must be there


def _need_model(found: Plan, is_adapter: bool) -> None:
    weights = ("adapter_model.safetensors",) if is_adapter else ("model.safetensors", "model.safetensors.index.json")
    needed = {"weights": weights, "its configuration": ("config.json",), "its tokenizer": ("tokenizer.json",)}
    needed |= {"the tokenizer's settings": ("tokenizer_config.json",), "its processor": ("processor_config.json",)}
    for what, files in needed.items():
        if not any(file in found.going for file in files):
            raise FileNotFoundError(
                f"the folder lacks {what}: {' or '.join(files)} is missing; save the model and its processor into it "
                "(save_pretrained; pickled weights are read with AutoModel.from_pretrained and saved again)"
            )
    index = _json(found.going.get("model.safetensors.index.json"))
    for shard in sorted(set(index.get("weight_map", {}).values())):
        if shard not in found.going:
            raise FileNotFoundError(f"{shard} is missing, which model.safetensors.index.json names")


def _keep_own_code(found: Plan, is_adapter: bool) -> None:
    """Check that all code that the model names is present, and leave out other code."""
    pending = _named_code(found, is_adapter)
    needed: set[str] = set()
    while pending:
        module = pending.pop()
        if module in needed:
            continue
        path = found.going.get(f"{module}.py")
        if path is None:
            raise FileNotFoundError(f"{module}.py is missing, which the model's code needs: save the model again")
        needed.add(module)
        pending += SIBLING.findall(_text(path))
    for file in [file for file in found.going if file.endswith(".py") and file.removesuffix(".py") not in needed]:
        del found.going[file]
        found.staying |= _why(file)


def _named_code(found: Plan, is_adapter: bool) -> list[str]:
    """Return the modules that a model's configurations name."""
    named: list[str] = []
    for file, classes in AUTO.items():
        own = _json(found.going[file])
        pipelines = {f"the pipeline {task}": each["impl"] for task, each in own.get("custom_pipelines", {}).items()}
        entries = own.get("auto_map", {}) | pipelines
        lacking = [] if is_adapter and file == "config.json" else [name for name in classes if not entries.get(name)]
        if lacking:
            raise ValueError(
                f"{file} does not name the code of {', '.join(lacking)}: load the model with this package and save it "
                "again, so that it carries its code"
            )
        for value in entries.values():
            named += [value] if isinstance(value, str) else [each for each in value if each]
    return [value.rpartition("--")[2].partition(".")[0] for value in named]


def _adapter_configs(folder: Path, base: str | None) -> dict[str, str]:
    """Return an adapter's configurations for publishing: with the Hub id of its base, without missing code."""
    adapter, config = (_json(folder / file) for file in ("adapter_config.json", "config.json"))
    given = adapter.get("base_model_name_or_path")
    adapter["base_model_name_or_path"] = base or hub_id(given)
    if adapter["base_model_name_or_path"] is None:
        raise ValueError(
            f"adapter_config.json: base_model_name_or_path is {given!r}, which is no model of the Hub: publish the "
            "base first (m6rec push DIR org/base), then name it (--base org/base)"
        )
    config.pop("custom_pipelines", None)
    kept = {name: value for name, value in config.pop("auto_map", {}).items() if name == "AutoConfig"}
    config |= {"auto_map": kept} if kept else {}
    return {
        "adapter_config.json": json.dumps(adapter, indent=2, sort_keys=True) + "\n",
        "config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
    }


def _cards(folder: Path, name: str, found: Plan) -> dict[str, str]:
    """Rewrite the cards with the model's name, except cards edited by a user."""
    facts = folder_facts(folder, name, _json(found.going.get("adapter_config.json")))
    written = {}
    for file, card in render_cards(facts).items():
        there = folder / file
        if not there.is_file() or _text(there).rstrip().endswith(MARK):
            written[file] = card
    return written


def _divide(found: Plan, scratch: Path) -> None:
    """Split weights that are one large file."""
    path = found.going.get("model.safetensors")
    if not isinstance(path, Path) or path.stat().st_size <= SHARD:
        return
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_torch_state_dict(
        load_file(path), scratch, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD, metadata=metadata
    )
    del found.going["model.safetensors"]
    found.going |= {part.name: part for part in sorted(scratch.iterdir())}


# ----------------------------------------------------------------------------------------------- what must not be in it


def check(found: Plan, folder: Path, secrets: tuple[str, ...] = ()) -> None:
    """Raise if a file holds forbidden contents; the message names each file, and the line or key in it."""
    known = tuple(secret for secret in (*secrets, *own_secrets()) if len(secret) >= 8)
    problems: list[str] = []
    for file, content in found.going.items():
        problems += [f"{file}{where}: {what}" for where, what in _problems(file, content, known)]
    problems += _training_data(found, folder)
    if problems:
        raise ValueError("this must not be published:\n  " + "\n  ".join(problems) + "\nNothing was sent.")


def _problems(file: str, content: Path | str, known: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if file.endswith(".safetensors"):
        yield from _weights(Path(content), known)
    elif file.endswith(".parquet"):
        yield from _cells(Path(content), known)
    elif file.endswith(".png"):
        if Path(content).read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
            yield "", "no PNG"
    else:
        text = _text(content)
        for number, line in enumerate(text.splitlines(), 1):
            yield from ((f", line {number}", what) for what in find_secrets(line, known))
            if not file.endswith(".json") and (found := find_place(line)):
                yield f", line {number}", f"a path of one machine, {found!r}"
        if file.endswith(".json"):
            yield from _values(json.loads(text), "")


def _values(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield findings in a JSON value; values keyed by texts or ids of the data, such as a vocabulary, are skipped."""
    if isinstance(value, dict):
        for name, inner in value.items():
            place = f"{key}.{name}" if key else str(name)
            if is_secret(str(name), inner):
                yield f", key {place}", "a secret"
            elif place not in KEYED_BY_DATA:
                if is_place(name):
                    yield f", key {place}", f"a path of one machine, {name!r}"
                yield from _values(inner, place)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _values(inner, f"{key}[{number}]")
    elif is_place(value):
        yield f", key {key}", f"a path of one machine, {value!r}"


def _weights(path: Path, known: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        yield "", f"no safetensors, although named so ({error})"
        return
    yield from ((f", metadata {name}", what) for name, value in metadata.items() for what in find_secrets(value, known))
    yield from ((f", metadata{where.removeprefix(', key')}", what) for where, what in _values(metadata, ""))


def _cells(path: Path, known: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield findings in a table: the first affected row of each column."""
    table = pyarrow.parquet.ParquetFile(path)
    with table:
        row = 0
        reported: set[str] = set()
        for batch in table.iter_batches():
            for name in set(batch.schema.names) - reported:
                for number, value in enumerate(batch.column(name).to_pylist()):
                    is_place = isinstance(value, str) and find_place(value) is not None
                    whats = [
                        *find_secrets(str(value), known),
                        *([f"a path of one machine, {value!r}"] if is_place else []),
                    ]
                    if whats:
                        reported.add(name)
                        yield from ((f", column {name}, row {row + number}", what) for what in whats)
                        break
            row += batch.num_rows


def own_secrets() -> Iterator[str]:
    """Yield the secrets in the environment of this process."""
    return (value for name, value in os.environ.items() if is_secret_variable(name, value))


def _training_data(found: Plan, folder: Path) -> list[str]:
    """Return the files with user behaviour, and the tables of the recipe."""
    recipe = folder / RECIPE_FILE
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    data = tree.get("data") or {}
    texts = (tree.get("pretraining") or {}).get("texts") or []
    tables = [data.get(name) for name in ("interactions", "items", "users")]
    tables += [(tree.get("task") or {}).get("dialogues"), *texts]
    read = [Path(table.partition("#")[0]) for table in tables if table]
    problems = [
        f"{file}: training data, which the recipe reads"
        for file, content in found.going.items()
        if isinstance(content, Path) and any(path.exists() and path.samefile(content) for path in read)
    ]
    items = found.going.get(f"{FOLDER}/{ITEMS}")
    if isinstance(items, Path):
        user = (data.get("columns") or {}).get("user_id", "user_id")
        if {user, "user_id"} & {*pyarrow.parquet.read_schema(items).names}:
            problems.append(f"{FOLDER}/{ITEMS}, column {user}: training data, a catalogue has items and no users")
    return problems


def _json(content: Path | str | None) -> dict[str, Any]:
    return {} if content is None else json.loads(_text(content))


def _text(content: Path | str) -> str:
    return content.read_text(encoding="utf-8") if isinstance(content, Path) else content


__all__ = ["ALLOWED", "Plan", "check", "is_allowed", "plan"]
