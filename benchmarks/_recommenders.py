"""The models and data sets of `quality.py`: each takes (data folder, its own folder, seed) and returns its rows.

M6-Rec's models are recipes of the package; `beauty` has a backbone: frozen MiniLM encodes each text once, as the mean
of its tokens, and new joint layers encode the history. `ids` adds item embeddings, `text` uses items' texts: without
texts the model is SASRec with the full softmax.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from _few_shot import cells as few_shot_cells
from _rivals import minilm_folder

from m6rec.train.data.splits import Protocol

Rows = list[dict[str, Any]]
Model = Callable[[Path, Path, int], Rows]

READERS = {"beauty": "amazon-beauty", "ml-100k": "ml-100k"}
"""Reader (also the name of the folder) of each data set."""
PROTOCOLS: dict[str, Protocol] = {"beauty": "published", "ml-100k": "shuffled"}
"""Usual protocol of each data set."""
DOMAINS = {"beauty": "ecommerce", "ml-100k": "video"}
RECIPES = {"beauty": "beauty", "ml-100k": "quickstart"}
"""Of the package: what each data set's models are trained by."""
WITH_BACKBONE = "beauty"
"""Recipe of the models that read any data set with MiniLM, and (their texts left out) of SASRec."""
ELSEWHERE: dict[str, dict[str, Any]] = {
    "ml-100k": {
        "training.num_train_epochs": 12,
        "training.per_device_train_batch_size": 64,
        "training.learning_rate": 1e-3,
    }
}
"""What that recipe takes on other data sets: as many steps."""
COLD = 0.1
"""Share of the items that are held out of training where cold items are measured."""
RIVALS = ("sentence_transformers", "item_knn", "ease")
"""Of `_ranking_rivals.py`."""
PYTHON = "M6REC_RECTOOLS_PYTHON"
"""Names the python of an environment with RecTools; without it its models are left out."""
RECTOOLS = {"sasrec (RecTools)": "SASRecModel", "bert4rec (RecTools)": "BERT4RecModel"}
RECBOLE_PYTHON = "M6REC_RECBOLE_PYTHON"
"""Names the python of an environment with RecBole; without it its models are left out."""
RECBOLE = {"din (RecBole)": "DIN", "deepfm (RecBole)": "DeepFM"}
BONUS = 0.03
"""Bias of cold items: `model.config.cold_item_bias`."""
WORDS_UNTRAINED = 4.0
"""`model.config.tfidf_weight` of an untrained model."""
IDS: dict[str, Any] = {
    "gated_mlp": False,
    "hidden_act": "gelu",
    "num_hidden_layers": 3,
    "num_joint_layers": 2,
    "num_attention_heads": 2,
    "segment_summary": 1,
    "skipped_kinds": ["event"],
    "tfidf_weight": 0.0,
    "item_embedding_dropout": 0.0,
    "entry_norm": True,
}
"""SASRec: two layers that read item vectors, one position an event."""
SASREC: dict[str, tuple[int, float, dict[str, Any]]] = {
    "beauty": (
        128,
        0.3,
        {
            "training.num_train_epochs": 8,
            "training.per_device_train_batch_size": 128,
            "training.learning_rate": 1e-3,
        },
    ),
    "ml-100k": (
        64,
        0.3,
        {
            "training.num_train_epochs": 16,
            "training.per_device_train_batch_size": 64,
            "training.learning_rate": 1e-3,
            "training.lr_scheduler_type": "constant_with_warmup",
            "training.save_strategy": "epoch",
            "tuning.average_checkpoints": 10,
            "task.shuffle_ties": True,
        },
    ),
}
"""Width, dropout, length and learning rate of the training: docs/experiments.md has the search."""
ATTENTION_DROPOUT = 0.1
ITEM_SPREAD = 0.02
"""Standard deviation of SASRec's initial item vectors."""


def changes(name: str, data: Path, folder: Path, seed: int, text: bool, ids: bool, recipe: str) -> dict[str, Any]:
    """What one of our models changes in a recipe, its own data set's or another's."""
    found: dict[str, Any] = {
        "data.source": READERS[name],
        "data.directory": str(data / READERS[name]),
        "data.seed": seed,
        "text.domain": DOMAINS[name],
        "text.times": name != "beauty",
        "evaluation.protocol": PROTOCOLS[name],
        "training.seed": seed,
        "training.output_dir": str(folder / "model"),
        "training.disable_tqdm": True,
        "model.backbone": str(minilm_folder()) if text and recipe == WITH_BACKBONE else None,
        "model.item_embeddings": ids,
    }
    if recipe == WITH_BACKBONE:
        found |= ELSEWHERE.get(name, {})
    if not text:
        width, dropout, training = SASREC[name]
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "embedding_dim": width}
        drop = {"entry_dropout": dropout, "hidden_dropout": dropout, "attention_dropout": ATTENTION_DROPOUT}
        found |= {"model.preset": "tiny", "model.config": {**IDS, **shape, **drop}}
        found |= {"text.max_length": 600, "text.vocab_size": 400, **training}
    return found


def prepared(
    name: str,
    data: Path,
    folder: Path,
    seed: int,
    text: bool,
    ids: bool,
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
) -> Any:
    """Read a data set and make one of our models for it, by its recipe or by another one."""
    from m6rec.train.config.recipe import load_recipe
    from m6rec.train.data.log import read_log
    from m6rec.train.runs.build import prepare

    recipe = recipe or RECIPES[name]
    changed = changes(name, data, folder, seed, text, ids, recipe)
    changed |= {f"evaluation.{key}": value for key, value in (evaluation or {}).items()}
    if changed.get("evaluation.cold_fraction") and text and ids:
        changed["model.config.cold_item_bias"] = BONUS
    loaded = load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in changed.items()])
    log = read_log(loaded.data)
    if not text:
        log.items[log.items.columns.difference(["title"])] = ""
        log.items["title"] = "item"
    run = prepare(loaded, log)
    if not text:
        _begin_as_sasrec(run.model)
    return run


@torch.no_grad()
def _begin_as_sasrec(model: Any) -> None:
    """Draw item vectors, with nothing in place of texts, so that a user begins as the last item."""
    network = model.model
    network.embeddings.tokens.weight.zero_()  # frozen
    network.item_memory.weight[1:].normal_(0, ITEM_SPREAD)
    added = [
        weight for layer in network.layers for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
    ]
    for weight in (network.embed_kind.weight, network.embed_event.weight, *added):
        weight.zero_()
    for projection in (model.user_projection, model.item_projection):
        torch.nn.init.eye_(projection.weight)


def measured(run: Any) -> Rows:
    """Measure the model of a run on its test part."""
    from _ranking_rivals import measure

    from m6rec.train.evaluation.reports import catalogue_vectors, user_vectors
    from m6rec.train.runs.adapters import trainable_parameters
    from m6rec.train.runs.build import use_bf16
    from m6rec.train.runs.finetune import examples_of

    examples = examples_of(run, "test", "retrieval")
    reading = run.model, run.collator, use_bf16(), run.segment_cache
    items = catalogue_vectors(reading[0], run.catalogue, *reading[1:])
    users = user_vectors(reading[0], examples.rows, *reading[1:])
    places = {user: place for place, user in enumerate(examples.users)}

    def score(user_ids: Sequence[str], histories: Sequence[np.ndarray]) -> np.ndarray:
        return (users[[places[user] for user in user_ids]] @ items.T).numpy()

    learnt, everything = trainable_parameters(run.model)
    return measure("", score, examples, parameters=everything, trainable_parameters=learnt)


def ours(
    name: str,
    data: Path,
    folder: Path,
    seed: int,
    *,
    text: bool = True,
    ids: bool = True,
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
) -> Rows:
    """Train one of our models and measure it."""
    from m6rec.train.runs.finetune import fit

    run = prepared(name, data, folder, seed, text, ids, evaluation, recipe)
    fit(run)
    return measured(run)


def transferred(learnt: str, target: str, data: Path, folder: Path, seed: int) -> Rows:
    """Train the model with texts only on one data set, and measure it zero-shot on another."""
    from m6rec.train.runs.finetune import fit

    run = prepared(learnt, data, folder, seed, text=True, ids=False, recipe=WITH_BACKBONE)
    fit(run)
    other = prepared(target, data, folder, seed, text=True, ids=False)
    other.model, other.segment_cache = run.model, run.segment_cache
    return measured(other)


def untrained(name: str, data: Path, folder: Path, seed: int) -> Rows:
    """Measure the untrained model with texts only."""
    from m6rec.segment_cache_m6rec import SegmentCache

    run = prepared(name, data, folder, seed, text=True, ids=False)
    run.model.config.tfidf_weight = WORDS_UNTRAINED
    run.segment_cache = SegmentCache()
    return [{**row, "trainable_parameters": 0} for row in measured(run)]


def _rankings(name: str, cold: float = 0.0) -> dict[str, Model]:
    """All models of a ranking."""
    reader, protocols = READERS[name], [PROTOCOLS[name]]
    protocols += [] if cold else [other for other in get_args(Protocol) if other != PROTOCOLS[name]]
    held = {"cold_fraction": cold}
    return {
        "m6rec": partial(ours, name, evaluation=held),
        "m6rec text only": partial(ours, name, ids=False, evaluation=held),
        "sasrec (m6rec ids only)": partial(ours, name, text=False, evaluation=held, recipe=WITH_BACKBONE),
        **{rival: partial(_rival, reader, rival, cold) for rival in RIVALS},
        **{f"untrained, {protocol}": partial(_untrained, reader, cold, protocol) for protocol in protocols},
        **{name: partial(_rectools, reader, kind, cold) for name, kind in RECTOOLS.items() if PYTHON in os.environ},
        **{f"m6rec, {protocol}": partial(_ours_under, name, protocol) for protocol in protocols[1:]},
    }


def _ours_under(name: str, protocol: Protocol, data: Path, folder: Path, seed: int) -> Rows:
    """Our model under another protocol than the usual one."""
    return [{**row, "row": "m6rec"} for row in ours(name, data, folder, seed, evaluation={"protocol": protocol})]


def _mean_likes(name: str, data: Path, folder: Path, seed: int) -> Rows:
    """A mean of known labels on MovieLens-100K's clicks."""
    from _click_rivals import mean_likes

    return [mean_likes(data, folder, seed)[name]]


def _likes(data: Path, folder: Path, seed: int) -> Rows:
    """Our recipe of clicks and ratings."""
    from _click_rivals import trained

    return [trained(data, folder, seed)]


def _recbole(kind: str, data: Path, folder: Path, seed: int) -> Rows:
    """A model of RecBole on MovieLens-100K's clicks."""
    from _click_rivals import recbole

    return recbole(data, folder, kind, seed)


def _rival(reader: str, name: str, cold: float, data: Path, folder: Path, seed: int) -> Rows:
    from _ranking_rivals import rival

    return rival(data, reader, name, seed, cold)


def _untrained(reader: str, cold: float, protocol: Protocol, data: Path, folder: Path, seed: int) -> Rows:
    """All untrained rules of the package."""
    from _ranking_rivals import rival

    return rival(data, reader, "untrained", seed, cold, protocol)


def _rectools(reader: str, kind: str, cold: float, data: Path, folder: Path, seed: int) -> Rows:
    from _ranking_rivals import rectools

    return rectools(data, reader, kind, seed, cold)


DATASETS: dict[str, dict[str, Model]] = {
    "beauty": _rankings("beauty"),
    "beauty-cold": _rankings("beauty", COLD),
    "ml-100k": _rankings("ml-100k"),
    "ml-100k-click": {
        "m6rec": _likes,
        **{name: partial(_mean_likes, name) for name in ("item_mean", "user_mean", "history_mean", "history_and_item")},
        **{name: partial(_recbole, kind) for name, kind in RECBOLE.items() if RECBOLE_PYTHON in os.environ},
    },
    "tallrec": few_shot_cells(),
    "transfer": {
        "m6rec untrained": partial(untrained, "beauty"),
        "m6rec trained on films": partial(transferred, "ml-100k", "beauty"),
        "sentence_transformers": partial(_rival, "amazon-beauty", "sentence_transformers", 0.0),
        "untrained, published": partial(_untrained, "amazon-beauty", 0.0, "published"),
    },
}

__all__ = ["DATASETS"]
