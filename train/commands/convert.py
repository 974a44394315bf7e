"""`m6rec convert`: converts a published language model to an M6Rec model, in a folder that every command accepts.

m6rec convert HuggingFaceTB/SmolLM2-135M smollm2-rec --num-joint-layers 8 segment_summary=1 text.domain=video
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...atomic_m6rec import atomic_folder
from ...conversion import load_backbone, load_tokenizer
from ...layers_m6rec import inference_mode
from ...modeling_m6rec import M6RecForRecommendation
from ...tokenization import M6RecProcessor
from ..config.recipe import RECIPE_FILE, Recipe, load_recipe
from ..runs.build import backbone_tokenizer, check_length, seed_everything

LITTLE = 1.1
"""Ratio of perplexities up to which a model writes about as well as its backbone."""

WHOLE: dict[str, Any] = {
    "num_joint_layers": None,
    "joint_positions": "request",
    "history_attention": "causal",
    "segment_pooling": "last",
    "segment_summary": None,
    "skipped_kinds": None,
}
"""Settings with which a converted causal model reads a row as its backbone would; None layers = all of them."""

PARAGRAPHS: dict[str, dict[str, Any]] = {
    "en": {
        "facts": [
            "The rain jacket has a hood, two pockets and taped seams.",
            "It weighs 300 grams and folds into its own pocket.",
            "Many reviewers wear it for hiking in heavy rain.",
        ],
        "candidates": ["hooded rain jacket"],
        "text": "it keeps you dry in heavy rain, weighs only 300 grams and folds into its own pocket. Reviewers who go "
        "hiking like its hood and its taped seams.",
    },
    "zh": {
        "facts": [
            "这件雨衣有帽子、两个口袋和压胶接缝。",
            "它重300克，可以折叠放进自己的口袋。",
            "许多用户在大雨中徒步时穿它。",
        ],
        "candidates": ["连帽雨衣"],
        "text": "它在大雨中也能保持干爽，只有300克重，还能折叠放进自己的口袋。喜欢徒步的用户称赞它的帽子和压胶接缝。",
    },
}
"""Language -> a request and the text to be written."""


def convert(
    backbone: str | Path, output: str | Path, num_joint_layers: int | None = None, overrides: Iterable[str] = ()
) -> str:
    """Write model, tokenizer and processor of a backbone into a folder, atomically; returns a summary.

    Args:
        backbone: Hub id, folder or GGUF file of a language model.
        output: The folder; its contents are replaced only if an earlier conversion wrote them.
        num_joint_layers: Number of last layers that attend to all segments jointly; None = all.
        overrides: Fields of the configuration, e.g. `segment_summary=1`, and of the section `text` of a recipe, e.g.
            `text.language=zh`.

    Raises:
        FileExistsError: If the folder holds other files.
    """
    folder = Path(output)
    _refuse_to_destroy(folder)
    recipe = _recipe(str(backbone), folder, num_joint_layers, overrides)
    seed_everything(recipe.seed)
    source, own = load_backbone(backbone, recipe.model.config.get("dtype", "auto")), load_tokenizer(backbone)
    model = M6RecForRecommendation.from_backbone(source, tokenizer=own, slot=True, **recipe.model.config)
    text, both_ways = recipe.text, model.config.history_attention == "bidirectional"
    check_length(model.config, text.max_length)
    tokenizer = backbone_tokenizer(recipe.model, own, slot=True)
    time = "ago" if both_ways else "gap"
    processor = M6RecProcessor(tokenizer, text.template(), text.max_length, text.max_events, time)
    _write(folder, model, processor)
    lines = [
        f"{source.config.model_type}, {model.num_parameters():,} parameters",
        f"{model.config.num_hidden_layers} layers, the last {model.config.num_joint_layers} joint",
        f"{len(own):,} tokens of its own and {len(tokenizer) - len(own)} new ones",
        _head(model, source.get_output_embeddings() is not None),
        *_warnings(model, processor, text.language),
        f"written to {folder}",
    ]
    return "\n".join(lines)


def _recipe(backbone: str, output: Path, num_joint_layers: int | None, overrides: Iterable[str]) -> Recipe:
    """Parse overrides as a recipe's, so that names and types are checked in the same way."""
    entries = [entry.strip().removeprefix("--") for entry in overrides]
    entries = [entry if entry.startswith("text.") else f"model.config.{entry}" for entry in entries]
    if num_joint_layers is not None:
        entries.append(f"model.config.num_joint_layers={num_joint_layers}")
    return load_recipe({"model": {"backbone": backbone}, "training": {"output_dir": str(output)}}, entries)


def _warnings(model: M6RecForRecommendation, processor: M6RecProcessor, language: str | None) -> list[str]:
    """Return what the model cannot do before training, and what late interaction costs its writing."""
    config = model.config
    if not config.num_segment_layers:
        return []
    found = [
        f"its first {config.num_segment_layers} layers read each given text of a request by itself, which they have "
        "not learnt: train it before it ranks (m6rec finetune); plain texts are continued as before"
    ]
    if "plausibility" in (config.trained_tasks or []):
        before, after = writing_perplexity(model, processor, language)
        found.append(
            f"it writes a paragraph about a request at perplexity {after:.1f}, the backbone at {before:.1f}: "
            + _advice(after / before, config.written_attention)
        )
    return found


def _advice(cost: float, written_attention: str) -> str:
    if cost <= LITTLE:
        return "late interaction costs its writing little"
    other = "" if written_attention == "source" else "set written_attention=source, "
    return f"{other}fine-tune writing (task.learn=[writing]), or leave all layers joint"


def writing_perplexity(
    model: M6RecForRecommendation, processor: M6RecProcessor, language: str | None = None
) -> tuple[float, float]:
    """Measure the perplexity of a paragraph that explains a recommendation, given facts about the item.

    Args:
        model: The model.
        processor: Its processor.
        language: Language of the paragraph: "zh" is Chinese, all others English.

    Returns:
        The perplexity with all layers joint, which is the backbone's for this row, and with the model's own settings.
    """
    row = processor.read(PARAGRAPHS.get(language or "en", PARAGRAPHS["en"]), "explanation")
    ids, labels = (torch.tensor([numbers], device=model.device) for numbers in (row.input_ids, processor.labels(row)))
    own = {name: getattr(model.config, name) for name in WHOLE}
    found = []
    with inference_mode(model):
        for settings in ({**WHOLE, "num_joint_layers": model.config.num_hidden_layers}, own):
            for name, value in settings.items():
                setattr(model.config, name, value)
            found.append(math.exp(model(ids, labels=labels, only_losses=True).losses["text"]))
    return found[0], found[1]


def _head(model: M6RecForRecommendation, trained: bool) -> str:
    if not trained:
        return "no trained writing head: it is tied to the embeddings until it is trained"
    return "writing head tied to the embeddings" if model.config.tie_word_embeddings else "writing head of its own"


def _refuse_to_destroy(folder: Path) -> None:
    """Raise unless a folder is new, empty, or written by a conversion; a trained model's folder has a recipe."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    config = folder / "config.json"
    ours = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "m6rec"
    if not ours or (folder / RECIPE_FILE).exists():
        what = "a trained model" if ours else "something that is no M6Rec model"
        raise FileExistsError(f"{str(folder)!r} holds {what}: name another folder, or remove it first")


def _write(folder: Path, model: M6RecForRecommendation, processor: M6RecProcessor) -> None:
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


__all__ = ["convert"]
