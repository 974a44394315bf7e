"""`m6rec convert`: converts a published language model to an M6Rec model, in a folder that every command accepts.

m6rec convert HuggingFaceTB/SmolLM2-135M smollm2-rec --num-joint-layers 8 segment_summary=1 text.domain=video
"""

import json
from collections.abc import Iterable
from pathlib import Path

from ...atomic_m6rec import atomic_folder
from ...conversion import load_backbone, load_tokenizer
from ...modeling_m6rec import M6RecForRecommendation
from ...tokenization import M6RecProcessor
from ..config.recipe import RECIPE_FILE, Recipe, load_recipe
from ..runs.build import backbone_tokenizer, check_length, seed_everything


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
    model = M6RecForRecommendation.from_backbone(source, tokenizer=own, **recipe.model.config)
    text, both_ways = recipe.text, model.config.history_attention == "bidirectional"
    check_length(model.config, text.max_length)
    tokenizer = backbone_tokenizer(recipe.model, own)
    time = "ago" if both_ways else "gap"
    processor = M6RecProcessor(tokenizer, text.template(), text.max_length, text.max_events, time)
    _write(folder, model, processor)
    lines = [
        f"{source.config.model_type}, {model.num_parameters():,} parameters",
        f"{model.config.num_hidden_layers} layers, the last {model.config.num_joint_layers} joint",
        f"{len(own):,} tokens of its own and {len(tokenizer) - len(own)} new ones",
        _head(model, source.get_output_embeddings() is not None),
        *_warnings(model),
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


def _warnings(model: M6RecForRecommendation) -> list[str]:
    """Return warnings of what the model cannot do before training."""
    apart = model.config.num_segment_layers
    if not apart:
        return []
    return [
        f"its first {apart} layers read each text of a request by itself, which they have not learnt: what it writes "
        "about requests is no good until it is trained (m6rec pretrain, or task.learn=[writing]); plain texts are "
        "continued as before"
    ]


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
