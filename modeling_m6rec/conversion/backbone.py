"""Conversion of a published language model to an M6Rec with equal outputs: configuration, weights, new tokens.

Shapes: V tokens of the backbone, H = hidden_size.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, TokenizersBackend

from ..configuration_m6rec import ROPE_BY_ROW, M6RecConfig
from ..item_features_m6rec import Reader, feature_weights
from ..modeling_m6rec import M6RecForRecommendation
from ..tokenization_m6rec import M6RecTokenizer
from .bert import BERT
from .family import Family, Weights
from .gemma3 import GEMMA3
from .gpt2 import GPT2
from .llama import LLAMA
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .reader import is_reader, reader_backbone, reader_tokenizer

logger = logging.getLogger(__name__)

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma3_text": GEMMA3,
}
"""`model_type` of a configuration -> its family."""
MAY_DIFFER = {"attention_dropout", "hidden_dropout", "initializer_range"}
"""Fields that take the backbone's values unless given; all its other fields follow from the shapes of its weights."""
NEW_WEIGHTS = (
    *("score_head.", "item_norm.", "user_projection.", "item_projection."),
    *("model.embed_kind.", "model.embed_event.", "model.entry_norm."),
)
"""Weights that no language model has, without those of item features."""
SPREAD = 0.5
"""Distance of new tokens from the mean token, relative to that of words: distinct, but less likely than words."""
PADDING = 0.1
"""Largest share of an embedding's rows without a token (sizes are rounded up)."""


def from_backbone(
    backbone: str | Path | PreTrainedModel,
    num_joint_layers: int | None = None,
    tokenizer: TokenizersBackend | str | Path | None = None,
    slot: bool = False,
    **fields: Any,
) -> M6RecForRecommendation:
    """Make an M6Rec of a language model: BERT, GPT-2, Llama, Qwen2, Qwen3 or Gemma 3, with its head or without.

    On plain text its outputs equal the backbone's. With all layers joint, a causal backbone processes structured rows
    like any text, as zero-shot use requires; retrieval needs segment layers. The model's tokens are those of
    `M6RecTokenizer.from_backbone`, made from the backbone's tokenizer. Rows of the tokens that the backbone lacks:

    - [MASK], [UNK], [BOS] and [EOS] start as its own mask, unknown, first (or [CLS]) and last (or [SEP]) token;
    - [PAD] is the mean of its tokens. It is never an input, but with a tied head a zero row would give a logit of 0,
      higher than any word's in models with negative logits;
    - all others are drawn around that mean with the covariance of its tokens, with a fixed seed.

    If `num_hidden_layers` exceeds the backbone's, new layers are added on top.

    Embeddings of kinds and events are zero. The heads of scores and vectors are new. If the backbone has no writing
    head (`BertModel`), it is new as well, and tied to the embeddings.

    Args:
        backbone: The model, or the Hub id, folder or GGUF file of one, or "reader", the package's static reader.
        num_joint_layers: Number of last layers that read all segments together; None = all.
        tokenizer: The backbone's tokenizer, or its location; required with a model, else read from there.
        slot: Whether the vocabulary has [SLOT], as in `M6RecTokenizer.from_backbone`.
        **fields: Fields of M6RecConfig that the backbone does not determine, and `dtype`; by default dropout rates and
            number type are the backbone's.

    Raises:
        ValueError: If the architecture is not supported, has a property that an M6Rec block cannot represent, has
            missing or unexpected weights, or contradicts `fields`.
    """
    unknown = sorted(fields.keys() - {entry.name for entry in dataclasses.fields(M6RecConfig)})
    if unknown:
        raise ValueError(f"M6RecConfig has no field {', '.join(unknown)}")
    dtype = fields.pop("dtype", "auto")
    options = {"num_options": fields.pop("num_options")} if "num_options" in fields else {}
    if isinstance(backbone, PreTrainedModel):
        source = backbone
        if tokenizer is None:
            raise ValueError(f"a loaded {type(source).__name__} has no tokenizer: give its own as `tokenizer`")
    else:
        source, tokenizer = load_backbone(backbone, dtype), tokenizer or backbone
    base = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if isinstance(base, M6RecTokenizer):
        raise ValueError("tokenizer is an M6RecTokenizer: give the backbone's own, of which one is made")

    family = _family(source.config.model_type)
    weights = _weights(source, family)
    ids = M6RecTokenizer.from_backbone(base, **options, slot=slot).structural_ids
    _add_rows(weights, base, ids)
    config = M6RecConfig(**_fields(source, family, weights, ids, num_joint_layers, fields))
    model = M6RecForRecommendation._from_config(config, dtype=source.dtype if dtype == "auto" else dtype)
    _fill(model, weights)
    _stop_at_both(model, base)
    return model.to(source.device).eval()


def _stop_at_both(model: M6RecForRecommendation, base: TokenizersBackend) -> None:
    """Let generation stop at the backbone's own end, too: before training both ends are equally likely."""
    own_end = _first_id(base, "eos_token_id", "sep_token_id")
    if own_end is not None:
        model.generation_config.eos_token_id = sorted({model.config.eos_token_id, own_end})


def load_backbone(name: str | Path, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Load a complete published language model; weights that transformers would only warn about are errors.

    Args:
        name: Hub id, folder, or GGUF file; "reader" = the package's static reader as a model.
        dtype: Number type; "auto" = as stored.
    """
    if is_reader(name):
        own = reader_backbone(Reader.of(None))
        return own if dtype == "auto" else own.type(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    where = _where(name)
    settings, _ = PreTrainedConfig.get_config_dict(**where)
    family = _family(settings.get("model_type"))
    headless = (settings.get("architectures") or [None])[0] == family.base
    loader = getattr(transformers, family.base if headless else family.head)
    model, found = loader.from_pretrained(**where, dtype=dtype, output_loading_info=True)
    lost, extra = (
        sorted(key for key in found[kind] if not re.search(family.unread, key))
        for kind in ("missing_keys", "unexpected_keys")
    )
    _refuse_odd_weights(f"{str(name)!r} read as {loader.__name__}", lost, extra)
    return model


def load_tokenizer(name: str | Path) -> TokenizersBackend:
    """Load the tokenizer of a published language model: Hub id, folder, or GGUF file; or that of the "reader"."""
    if is_reader(name):
        return reader_tokenizer(Reader.of(None))
    tokenizer = AutoTokenizer.from_pretrained(**_where(name))
    if not isinstance(tokenizer, TokenizersBackend):
        raise TypeError(f"{str(name)!r} has a {type(tokenizer).__name__}: only fast tokenizers can take on our tokens")
    return tokenizer


def _where(name: str | Path) -> dict[str, str]:
    path = Path(name)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(name)}


def _family(model_type: str | None) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported as a backbone; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _refuse_odd_weights(what: str, lost: list[str], extra: list[str]) -> None:
    problems = [f"lacks {', '.join(lost)}"] * bool(lost) + [f"has no place for {', '.join(extra)}"] * bool(extra)
    if problems:
        raise ValueError(f"{what} {' and '.join(problems)}: the model would not be the one that was trained")


def _weights(source: PreTrainedModel, family: Family) -> Weights:
    """Return a model's weights under M6Rec's names, without those of a tied head."""
    weights: Weights = {}
    extra = []
    for name, tensor in family.untangle(source.state_dict()).items():
        if tensor.is_meta or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: load the backbone whole and not quantised")
        module, _, leaf = name.removeprefix(f"{source.base_model_prefix}.").rpartition(".")
        ours = [found.expand(new) for old, new in family.names.items() if (found := re.fullmatch(old, module))]
        if ours:
            weights[f"{ours[0]}.{leaf}"] = tensor
        elif not re.search(family.unread, name):
            extra.append(name)
    _refuse_odd_weights(type(source).__name__, [], extra)
    head = source.get_output_embeddings()
    if head is None:
        logger.debug("%s has no head that writes: it is tied to the embeddings, untrained", type(source).__name__)
    elif head.weight is source.get_input_embeddings().weight:
        del weights["lm_head.weight"]
    return weights


def _fields(
    source: PreTrainedModel,
    family: Family,
    weights: Weights,
    ids: Mapping[str, int],
    num_joint_layers: int | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Combine the fields of M6RecConfig: shapes of the weights, defaults that suit them, and given fields."""
    shape = family.fields(source.config)
    shape |= {"lm_head_transform": "lm_transform.dense.weight" in weights, "lm_head_bias": "lm_head.bias" in weights}
    shape |= {"tie_word_embeddings": "lm_head.weight" not in weights, **ids}
    layers = shape["num_hidden_layers"]
    if (given.get("num_hidden_layers") or 0) > layers:
        shape["num_hidden_layers"] = shape["num_hidden_groups"] = given["num_hidden_layers"]
    for name, value in given.items():
        if name in shape and name not in MAY_DIFFER and value != shape[name]:
            raise ValueError(f"{name}={value!r} contradicts the backbone, which has {shape[name]!r}: leave it out")
    causal = family.causal and getattr(source.config, "is_causal", True)
    attention = "causal" if causal else "bidirectional"
    whole = num_joint_layers in (None, shape["num_hidden_layers"])
    # Learned positions are those of a text: they continue across segments only if a causal model reads one whole text.
    counts_on = shape["position_embedding_type"] == "rotary" or causal and whole
    writes = causal and source.get_output_embeddings() is not None and shape["num_hidden_layers"] == layers
    by_row = shape.get("rope_parameters", {}).get("rope_type") in ROPE_BY_ROW
    written = given.get("written_attention") or ("source" if writes and not by_row else "segment")
    # Segment layers that read nothing of the source have never written so: that has to be trained.
    untrained = [] if whole or written == "source" else ["writing"]
    return {
        **shape,
        "written_attention": written,
        "num_joint_layers": num_joint_layers,
        "segment_attention": attention,
        "document_attention": attention,
        "history_attention": "causal",
        "joint_positions": "request" if counts_on else "segment",
        "trained_tasks": [task for task in ("plausibility", "writing") if writes and task not in untrained],
        **given,
    }


def _add_rows(weights: Weights, base: TokenizersBackend, ids: Mapping[str, int]) -> None:
    """Extend embeddings, and the weights of an untied head, to the tokens of M6Rec."""
    table, size = weights["model.embeddings.tokens.weight"], ids["vocab_size"]
    rows, tokens = len(table), len(base)
    if max(base.get_vocab().values()) >= tokens:
        raise ValueError(f"the tokenizer's {tokens} tokens have ids up to {max(base.get_vocab().values())}, with gaps")
    if base.vocab_size > rows or rows - tokens > PADDING * rows:
        raise ValueError(f"the tokenizer has {tokens} tokens, the backbone rows for {rows}: give the backbone's own")
    known = min(rows, tokens)
    begin_as = {
        "mask_token_id": _first_id(base, "mask_token_id"),
        "unk_token_id": _first_id(base, "unk_token_id"),
        "bos_token_id": _first_id(base, "bos_token_id", "cls_token_id"),
        "eos_token_id": _first_id(base, "eos_token_id", "sep_token_id"),
    }
    copies = {ids[name]: old for name, old in begin_as.items() if old is not None and old < known <= ids[name]}
    for name in ("model.embeddings.tokens.weight", "lm_head.weight", "lm_head.bias"):
        if name in weights:
            weights[name] = _grown(weights[name], known, size, copies, ids["pad_token_id"])


def _first_id(base: TokenizersBackend, *names: str) -> int | None:
    return next((index for name in names if (index := getattr(base, name)) is not None), None)


def _grown(table: torch.Tensor, known: int, size: int, copies: Mapping[int, int], pad: int) -> torch.Tensor:
    """Keep `known` rows of V x H weights (or V biases) and append new ones up to `size`."""
    old = table[:known].float().reshape(known, -1)
    mean = old.mean(0)
    draws = torch.randn(size - known, known, generator=torch.Generator().manual_seed(0)).to(old.device)
    new = mean + SPREAD * (draws @ (old - mean)) / known**0.5  # has the covariance of the old rows, scaled
    if pad >= known:
        new[pad - known] = mean
    for index, row in copies.items():
        new[index - known] = old[row]
    return torch.cat((old, new)).reshape(size, *table.shape[1:]).to(table.dtype)


def _fill(model: M6RecForRecommendation, weights: Weights) -> None:
    """Load the weights; embeddings that M6Rec adds to a language model's states start at zero.

    A user's vector then starts near the vectors of the last items, since texts are meaningful from the start.
    """
    lost, extra = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] * model.config.tie_word_embeddings
    known = max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")) + 1
    new = tuple(f"model.layers.{index}." for index in range(known, len(model.model.layers)))
    lost = [name for name in lost if not name.startswith((*NEW_WEIGHTS, *feature_weights(), *new)) and name not in tied]
    _refuse_odd_weights("the backbone", lost, extra)
    for table in (model.model.embed_kind, model.model.embed_event):
        nn.init.zeros_(table.weight)
    with torch.no_grad():
        model.user_projection.weight.copy_(model.item_projection.weight)


__all__ = ["FAMILIES", "from_backbone", "load_backbone", "load_tokenizer"]
