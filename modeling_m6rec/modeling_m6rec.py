"""M6Rec for recommendation: one network with four heads (score, embed, plausibility, write), and its checkpoints.

User and item vectors rank a catalogue by their product. Their first part is learnt and l2-normalised; losses use this
part only (the paper's retrieval). Each item feature that acts on vectors appends one part (`item_features_m6rec`; our
addition).

A folder with an adapter holds the configuration of the tuned model, which may score other tasks than the base. The
base is in the adapter's folder `base` if it has no other place. A checkpoint is refused unless all its weights are
present and finite.

Shapes: B rows, T tokens so far, Q queries (the last Q of the T), N targets of a row, S = config.num_labels outputs of
the score head, E places of a row that give a user vector, M items, H = hidden_size, V = vocab_size, W = tfidf_dim,
D = vector_width.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    ModelOutput,
    can_return_tuple,
    find_adapter_config_file,
)
from transformers.utils.hub import cached_file

from .atomic_m6rec import atomic_files
from .configuration_m6rec import M6RecConfig
from .item_features_m6rec import (
    ITEM_FEATURES,
    LoneItems,
    RowItems,
    feature_modules,
    feature_weights,
    features_at,
)
from .layers_m6rec import LMHeadTransform, make_norm
from .layout_m6rec import (
    Continuation,
    KeptTokens,
    Layout,
    Piece,
    SegmentKey,
    gather_or_zero,
    item_layout,
    item_places,
    layout,
    mean_log_likelihood,
    nan_where_absent,
    target_ends,
    user_places,
)
from .losses_m6rec import form_of, given_labels, retrieval_loss, score_losses, text_loss, text_targets
from .network_m6rec import (
    CACHE_NAMES,
    CachedOutput,
    M6RecModel,
    M6RecModelOutput,
    M6RecPreTrainedModel,
    all_ids,
    last_states,
    library_arguments,
    one_cache,
)
from .segment_cache_m6rec import SegmentCache, UserStates, active_adapters, digest_weights
from .values_m6rec import IGNORE_INDEX, label_field, short

# -------------------------------------------------------------------------------------------- checkpoints of adapters


BASE = "base"
"""Folder, within the adapter's folder, of a base that has no other place."""

VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
"""PEFT methods that act outside the model, with virtual tokens."""

OWN = "M6REC_ADAPTER"
"""Type of M6Rec's own tuning method, which the package registers with PEFT; all others are PEFT's."""


def adapter_settings(name: str | PathLike, **hub: Any) -> dict[str, Any] | None:
    """Read the adapter settings of a folder or a Hub repository; None if it holds no adapter, or a whole model as well.

    Args:
        name: Folder, or name on the Hub.
        **hub: `revision`, `token` and so on.
    """
    folder = Path(name)
    if any((folder / weights).is_file() for weights in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return None  # the library itself loads an adapter next to its base
    file = find_adapter_config_file(str(name), **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def load_base(cls: Any, name: str | PathLike, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load the base model of an adapter, with the configuration that the adapter was trained with.

    Args:
        cls: Class of the model.
        name: Folder or Hub name of the adapter.
        settings: Result of `adapter_settings`.
        *args: Arguments of `PreTrainedModel.from_pretrained`.
        **kwargs: Keyword arguments of `PreTrainedModel.from_pretrained`.

    Raises:
        ValueError: If the adapter does not name its base, or the base's weights differ from those of its training.
    """
    given = settings.get("base_model_name_or_path")
    if not given:
        raise ValueError(
            f"the adapter {str(name)!r} does not name its base: write it into adapter_config.json as "
            "base_model_name_or_path"
        )
    base = _beside(Path(name), given) or given
    hub = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
    config = kwargs.pop("config", None)
    if not isinstance(config, M6RecConfig):
        found = cached_file(str(name), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        config, kwargs = M6RecConfig.from_pretrained(found or base, return_unused_kwargs=True, **kwargs)
    quantized = vars(config).pop("quantization_config", None)  # describes how the base was loaded, not stored
    if quantized is not None:
        kwargs.setdefault("quantization_config", quantized)
    try:
        model, info = cls.from_pretrained(
            base, *args, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise OSError(f"the base {base!r} of the adapter {str(name)!r} cannot be loaded: {error}") from error
    own = ("score_head.", *feature_weights())  # the adapter brings these, in its own shapes
    mismatched = sorted(map(str, info["mismatched_keys"]))
    wrong = [entry for entry in mismatched if not any(part in entry for part in own)]
    if wrong:
        raise ValueError(f"{base!r} is not the base of the adapter {str(name)!r}: its shapes differ in {wrong[0]}")
    drawn = (*map(str, info["missing_keys"]), *mismatched)
    for feature in ITEM_FEATURES:
        if feature.weights is not None and any(f"model.{feature.weights}." in entry for entry in drawn):
            # Restore the state of training: the library drew random numbers, which change the fingerprint each time.
            feature.forget(model.model)
    return model


def _beside(adapter: Path, given: str) -> str | None:
    """Find a base next to its adapter, or next to the adapter's checkpoints, even if the folder was moved."""
    places = (adapter / BASE, adapter.parent / BASE) if Path(given).name == BASE else ()
    return next((str(place) for place in places if place.is_dir()), None)


def load_adapted(cls: Any, name: str | PathLike, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load a model with its adapter inside, as `from_pretrained` does for an adapter's folder; see `load_base`.

    Raises:
        ValueError: If the adapter acts outside the model.
    """
    kind = settings.get("peft_type")
    if kind in VIRTUAL:
        raise ValueError(
            f"{str(name)!r} holds {kind}, whose virtual tokens act outside of the model: load it with "
            f"m6rec.tuning.load_tuned({str(name)!r})"
        )
    output_loading_info = kwargs.pop("output_loading_info", False)
    if kind == OWN:
        try:
            importlib.import_module("m6rec.tuning")  # registers M6Rec's method with PEFT
        except ImportError as error:
            raise ImportError(f"the adapter {str(name)!r} needs the package: pip install m6rec") from error
    model = load_base(cls, name, settings, *args, **kwargs)
    keep_trainable(model)
    info = model.load_adapter(str(name))
    model.name_or_path = str(name)  # where its catalogue is
    return (model, info.to_dict()) if output_loading_info else model


def keep_trainable(model: torch.nn.Module) -> None:
    """Keep a 4-bit model from repacking its weights for inference when it is first evaluated.

    On processors with AVX512-BF16, bitsandbytes repacks permanently, for a kernel without gradient: adapters below it
    would no longer learn. Call this function before the first forward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


# ------------------------------------------------------------------------------------------------ damaged checkpoints


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SHOWN = 3
"""Number of weight names in an error message."""


def refuse_incomplete(cls: Any, name: str | PathLike, missing: Collection[str], **hub: Any) -> None:
    """Raise if a checkpoint lacks weights that its own configuration requires.

    Weights that the caller's configuration adds, such as item embeddings, may be new, and so may the heads of a
    checkpoint that holds the network only.

    Args:
        cls: Class of the loaded model.
        name: Folder or Hub name of the checkpoint.
        missing: Names of the weights that the checkpoint lacks.
        **hub: `revision`, `token` and so on.

    Raises:
        ValueError: If required weights are missing.
    """
    if not missing:
        return
    own = M6RecConfig.from_pretrained(name, **hub)
    with torch.device("meta"):
        expected = set(cls(own).state_dict())
    if own.architectures and cls.__name__ not in own.architectures:
        expected = {weight for weight in expected if weight.startswith(f"{cls.base_model_prefix}.")}
    lacking = sorted(expected.intersection(missing))
    if lacking:
        raise ValueError(
            f"the checkpoint {str(name)!r} is damaged: it lacks {len(lacking)} of the weights that its configuration "
            f"asks for, {_some(lacking)}; they would be random. Save or download it again"
        )


def refuse_not_finite(model: nn.Module, name: str | PathLike) -> None:
    """Raise if weights of a model hold NaN or infinity.

    Args:
        model: The model.
        name: Folder or Hub name of its checkpoint.

    Raises:
        ValueError: If there are such weights; the message names them.
    """
    broken = [
        weight
        for weight, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and value.dtype in FLOATS and not value.is_meta and not is_finite(value)
    ]
    if broken:
        raise ValueError(
            f"the checkpoint {str(name)!r} holds NaN or infinity in {len(broken)} of its weights, {_some(broken)}: its "
            "training has diverged (take an earlier checkpoint, a lower learning rate), or the file is damaged"
        )


def is_finite(value: torch.Tensor) -> bool:
    """Say whether all numbers are finite."""
    return bool(value.isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


# ----------------------------------------------------------------------------------------- vectors of users and items


class Given(NamedTuple):
    """Input rows of T tokens."""

    input_ids: torch.Tensor
    """B x T."""
    attention_mask: torch.Tensor | None
    """B x (P + T)."""
    item_embedding_ids: torch.Tensor | None
    """B x T rows of item embeddings."""
    hidden: torch.Tensor | None
    """B x T: tokens that no other token attends to."""


def learnt_user_vectors(model: "M6RecForRecommendation", states: torch.Tensor) -> torch.Tensor:
    """Make the learnt part of user vectors, which losses use, from ... x H joint states: ... x embedding_dim."""
    return functional.normalize(model.user_projection(states).float(), dim=-1)


def learnt_item_vectors(
    model: "M6RecForRecommendation", texts: torch.Tensor, memory_ids: torch.Tensor | None
) -> torch.Tensor:
    """Make the learnt part of item vectors from ... x H texts and ... rows of item embeddings: ... x embedding_dim."""
    states = model.model.add_to_items(texts, memory_ids)
    return functional.normalize(model.item_projection(model.item_norm(states)).float(), dim=-1)


def item_vectors(model: "M6RecForRecommendation", items: LoneItems) -> torch.Tensor:
    """Make M x D vectors of standalone items."""
    parts = [learnt_item_vectors(model, items.texts, items.embedding_ids)]
    parts += [feature.item_vectors(model.model, items) for feature in features_at("vectors", model.config)]
    return torch.cat(parts, -1)


def row_vectors(
    model: "M6RecForRecommendation", out: "M6RecModelOutput", given: Given, kept: KeptTokens, only_users: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Make user and item vectors of rows, B x E x D and B x M x D; None without segment layers or with a filled cache.

    Args:
        model: The model.
        out: Output of its network.
        given: The rows.
        kept: Selects the entries of the tokens that have states.
        only_users: Leave out the vectors of items, which serving takes from the catalogue.
    """
    config, lay = model.config, out.layout
    if not config.num_segment_layers or kept.is_part:
        return None, None
    ids = kept.of(given.input_ids, config.pad_token_id)
    seen = None if given.hidden is None else ~kept.of(given.hidden.bool(), 0)
    users = user_places(ids, lay, config, seen)
    if only_users and not features_at("vectors", config):
        states = out.last_hidden_state[:, -kept.tokens :]
        return nan_where_absent(learnt_user_vectors(model, gather_or_zero(states, users)), users), None
    items = item_places(ids, lay, config)
    memory = None if given.item_embedding_ids is None else gather_or_zero(kept.of(given.item_embedding_ids, 0), items)
    texts, states = (field[:, -kept.tokens :] for field in (out.segment_states, out.last_hidden_state))
    rows = RowItems(given.input_ids, out.row_layout, kept, users, items, given.hidden, memory)
    parts = [
        (
            learnt_user_vectors(model, gather_or_zero(states, users)),
            learnt_item_vectors(model, gather_or_zero(texts, items), memory),
        ),
        *(feature.row_vectors(model.model, rows) for feature in features_at("vectors", config)),
    ]
    of_users, of_items = (torch.cat(own, -1) for own in zip(*parts))
    return nan_where_absent(of_users, users), nan_where_absent(of_items, items)


# ---------------------------------------------------------------------------------------------------------- the model


HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
"""Arguments of `from_pretrained` that locate a configuration."""

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Files of weights, which saving another model into the folder removes."""

PUSH = (
    *("push_to_hub", "repo_id", "commit_message", "commit_description", "private", "create_pr", "token", "tags"),
    "revision",
)
"""Arguments of `save_pretrained` that control the push after saving."""


@dataclass
class M6RecOutput(CachedOutput):
    """Output of M6Rec; NaN fills places where a row has fewer targets, places or items than the longest.

    Attributes:
        loss: Weighted sum of the losses whose labels were given.
        logits: B x Q x V of the writing head; None if only labels of other heads were given.
        scores: B x N x S logits of the score head at each target's [EOS]; `read_scores` turns them into answers.
        user_vectors: B x E x D, l2-normalised: the user after the source's head, then after each event.
        item_vectors: B x M x D, l2-normalised: the items of the row in their order.
        plausibility: B x N mean log-likelihood of each target's written tokens, if requested.
        losses: Each loss by name, unweighted.
        cache: The cache, if requested; also available as `past_key_values`.
        layout: Layout of the Q tokens.
        exit_layers: B, number of joint layers that each row ran through, if `decide` was given.
        continuation: With a cache, what the next written token needs to know of the rows; see `M6RecModel.forward`.
        hidden_states: Output of every layer, if requested.
        attentions: Attention weights of every layer, if requested.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    user_vectors: torch.Tensor | None = None
    item_vectors: torch.Tensor | None = None
    plausibility: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    cache: Cache | None = None
    layout: Layout | None = None
    exit_layers: torch.Tensor | None = None
    continuation: Continuation | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class StructuralTokens(LogitsProcessor):
    """Forbids `generate` the structural tokens, by their places: the library's processor compares all words each step.

    Args:
        config: Gives the ids.
    """

    def __init__(self, config: M6RecConfig) -> None:
        self.ids = torch.tensor(config.structural_token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the B x V scores of structural tokens to minus infinity."""
        return scores.index_fill(1, self.ids.to(scores.device), -torch.inf)


class M6RecForRecommendation(M6RecPreTrainedModel, GenerationMixin):
    """The recommender that `AutoModel` and `AutoModelForCausalLM` load.

    `forward` returns the outputs of all heads; `score`, `embed`, `plausibility` and `generate` are its shorter forms.
    Prefix and prompt tuning act in `forward` only: with these methods, call the PeftModel itself and pass its `scores`
    to `read_scores`.
    """

    accepts_loss_kwargs = False
    """The library's Trainer would pass the number of labelled tokens in a step, which only normalises the text loss.
    Each loss is the mean of its micro-batch."""
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.tokens.weight"}
    _keys_to_ignore_on_load_unexpected = [r"^score_head\."]  # of a checkpoint now loaded with score_head="option"

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.model = M6RecModel(config)
        self.lm_transform = LMHeadTransform(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.lm_head_bias)
        self.score_head = nn.Linear(size, config.num_labels) if config.score_head == "linear" else None
        # Item vectors come from the raw residual of the last segment layer, which needs a norm.
        self.item_norm = make_norm(config, size)
        self.user_projection = nn.Linear(size, config.embedding_dim, bias=False)
        self.item_projection = nn.Linear(size, config.embedding_dim, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: PLR0913 - one argument for each input and label, as the Trainer reads them off the signature
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layout_ids: torch.Tensor | None = None,
        item_embedding_ids: torch.Tensor | None = None,
        hidden_events: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        click_labels: torch.Tensor | None = None,
        rating_labels: torch.Tensor | None = None,
        interaction_labels: torch.Tensor | None = None,
        retrieval_labels: torch.Tensor | None = None,
        item_input_ids: torch.Tensor | None = None,
        item_attention_mask: torch.Tensor | None = None,
        item_states: torch.Tensor | None = None,
        candidate_embedding_ids: torch.Tensor | None = None,
        item_log_frequency: torch.Tensor | None = None,
        item_evidence: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        return_plausibility: bool = False,
        plausibility_lead: Sequence[int] = (),
        return_vectors: bool | Literal["users"] = True,
        return_scores: bool = True,
        exit_layer: int | None = None,
        plan: str | None = None,
        segment_cache: SegmentCache | None = None,
        only_losses: bool = False,
        contrast: Callable[..., torch.Tensor] = retrieval_loss,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> M6RecOutput:
        """Run the network and every head; the given labels select the losses.

        Args:
            input_ids: B x Q new ids.
            attention_mask: B x (P + T), nonzero = not padding; None = only pad ids are padding.
            layout_ids: B x T, all ids so far (without P virtual tokens); see `M6RecModel.forward`.
            item_embedding_ids: B x T rows of item embeddings, 0 = none.
            hidden_events: B x T bool, tokens that no other token attends to in the joint layers.
            past_key_values: The older name of `cache`.
            inputs_embeds: B x Q x embedding_size, in place of `input_ids`.
            labels: B x T ids of the tokens to be written, else -100.
            click_labels: B x N, 0 or 1, -100 = unknown.
            rating_labels: B x N ratings, -100 = unknown.
            interaction_labels: B x N x I, 0 or 1, -100 = unknown.
            retrieval_labels: B x T: at places of user vectors, the index (among the M items) of the next item.
            item_input_ids: M x L ids of items' segments ([ITEM] ... [SEG], padded right) for the retrieval loss.
            item_attention_mask: M x L, nonzero = not padding.
            item_states: M x H of `item_states`, in place of the ids (frozen text), or with them (bag-of-words
                embeddings).
            candidate_embedding_ids: M rows of item embeddings of these items.
            item_log_frequency: M log probabilities for the logQ correction.
            item_evidence: U x M, added to the cosines of the retrieval loss; U = known `retrieval_labels`, by row.
            use_cache: Return a cache.
            logits_to_keep: Number of last tokens that get logits (0 = all), or their indices.
            return_logits: Compute `logits`; None = unless only labels of other heads were given.
            return_plausibility: Compute `plausibility`.
            plausibility_lead: Ids of a template's words that it leaves out at the start of each written text
                (`M6RecProcessor.plausibility_lead`).
            return_vectors: Compute `user_vectors` and `item_vectors`; "users" = the former, and the latter only if they
                come with them.
            return_scores: Compute `scores`; labels of scores need them.
            exit_layer: Number of joint layers to run; None = all.
            plan: How to run; see `network_m6rec`.
            segment_cache: Segment states kept between calls, for plan "cached".
            only_losses: Return the losses and compute nothing else, for training.
            contrast: Function that computes the retrieval loss, with the arguments of `retrieval_loss`.
            cache: A cache to fill or to continue from.
            **kwargs: Passed to the network, such as `user_states` and `decide`. The losses get `num_items_in_batch`:
                a number of tokens to be written, or for each loss by name the weight of its labels (`label_weights`)
                in the whole optimizer step. Labels of further scoring tasks are named NAME_labels.
        """
        labels, retrieval_labels = given_labels(labels), given_labels(retrieval_labels, "retrieval_labels")
        step = kwargs.pop("num_items_in_batch", None)
        step = step if isinstance(step, Mapping) else {"text": step}
        named = {"click": click_labels, "rating": rating_labels, "interaction": interaction_labels}
        score_labels = self._score_labels(named, kwargs)
        others = bool(score_labels) or retrieval_labels is not None
        if return_logits is None or only_losses:
            return_logits = not only_losses and (labels is not None or not others)
        only_users, return_vectors = return_vectors == "users", bool(return_vectors) and not only_losses
        everything = return_logits or return_plausibility or labels is not None
        no_items = item_input_ids is None or item_states is not None
        heads = None if everything else ["score"] + ["user"] * return_vectors
        out = self.model(
            input_ids,
            attention_mask,
            layout_ids,
            item_embedding_ids,
            hidden_events,
            one_cache(cache, past_key_values),
            inputs_embeds,
            use_cache=use_cache,
            plan=plan,
            segment_cache=segment_cache,
            exits=self._exits(exit_layer, bool(score_labels), "decide" in kwargs),
            standalone=() if no_items else self._item_keys(item_input_ids, item_attention_mask),
            compact_output=True,
            heads=heads,
            extra_output_mask=None if retrieval_labels is None else retrieval_labels != IGNORE_INDEX,
            **kwargs,
        )
        ids = all_ids(input_ids, layout_ids)
        kept = KeptTokens(ids.shape[1], out.layout, out.kept)
        lay = out.layout
        chosen = kept.of(ids, self.config.pad_token_id)
        states, *exits = (state[:, -kept.tokens :] for state in (out.last_hidden_state, *out.exit_states))
        scored = return_scores or bool(score_labels)
        exit_scores = [self.score_logits(state, chosen, lay) for state in exits] if scored else []
        found: dict[str, torch.Tensor] = {}
        if labels is not None:
            targets = kept.of(labels[:, -ids.shape[1] :], IGNORE_INDEX)
            found["text"] = self._text_loss(states, targets, lay, step.get("text"))
        found.update(score_losses(exit_scores, score_labels, self.config, step))
        if retrieval_labels is not None:
            known = out.standalone_states if item_states is None and item_input_ids is not None else item_states
            texts = self._texts(item_input_ids, item_attention_mask, known)
            items = learnt_item_vectors(self, texts, candidate_embedding_ids)
            wanted = kept.of(retrieval_labels, IGNORE_INDEX)
            users = self._labelled_users(states, lay, wanted)
            against = (items, wanted[wanted != IGNORE_INDEX], self.config.embedding_temperature, item_log_frequency)
            more = {} if item_evidence is None else {"evidence": item_evidence}
            found["retrieval"] = contrast(users, *against, step.get("retrieval"), **more)
        if only_losses:
            return M6RecOutput(loss=self._total(found), losses=found)
        given = Given(ids, attention_mask, item_embedding_ids, hidden_events)
        vectors = row_vectors(self, out, given, kept, only_users) if return_vectors else (None, None)
        plausibility = None
        if return_plausibility:
            plausibility = mean_log_likelihood(states, chosen, lay, self.write_logits, plausibility_lead)
        return M6RecOutput(
            loss=self._total(found),
            logits=self._logits(out, ids.shape[1], logits_to_keep) if return_logits else None,
            scores=exit_scores[-1] if scored else None,
            user_vectors=vectors[0],
            item_vectors=vectors[1],
            plausibility=plausibility,
            losses=found or None,
            cache=out.cache,
            layout=lay,
            exit_layers=out.exit_layers,
            continuation=out.continuation,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    # ------------------------------------------------------------------------------------------------------ the heads

    def score(self, task: str = "click", **batch: Any) -> torch.Tensor:
        """Score every target of every row.

        Args:
            task: "click" gives B x N probabilities, "rating" B x N expected ratings, "interaction" B x N x I
                probabilities; SCORING_TASKS defines other tasks.
            **batch: Arguments of `forward`: `input_ids`, `attention_mask`, `plan`, `segment_cache`, ...
        """
        return self.read_scores(self(**batch, return_logits=False, return_vectors=False).scores, task)

    def read_scores(self, scores: torch.Tensor, task: str) -> torch.Tensor:
        """Turn B x N x S score logits into the answers of `score`."""
        if task not in self.config.score_slices:
            raise ValueError(f"task={short(task)} has no score: choose one of {list(self.config.score_slices)}")
        return form_of(task, self.config).answer(scores[..., self.config.score_slices[task]], task, self.config)

    def embed(self, **batch: Any) -> M6RecOutput:
        """Return `user_vectors` (B x E x D) and `item_vectors` (B x M x D) of rows; arguments as in `forward`."""
        self._require_segment_layers()
        return self(**batch, return_logits=False)

    def embed_items(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        memory_ids: torch.Tensor | None = None,
        segment_cache: SegmentCache | None = None,
    ) -> torch.Tensor:
        """Embed standalone items, M x D, from M x L ids ([ITEM] ... [SEG], padded right) or M x H `item_states`."""
        texts = self._texts(input_ids, attention_mask, states, segment_cache)
        lay = None if input_ids is None else item_layout(input_ids, self._valid(input_ids, attention_mask))
        return item_vectors(self, LoneItems(texts, memory_ids, input_ids, lay))

    @property
    def reads_sources(self) -> bool:
        """Whether `embed_users` can be used."""
        config = self.config
        return (
            config.history_attention == "causal"
            and bool(config.num_segment_layers)
            and not config.local_layers
            and not self.training
        )

    def embed_users(
        self,
        sources: Sequence[Sequence[Piece]],
        segment_cache: SegmentCache,
        exit_layer: int | None = None,
        version: object | None = None,
        user_states: UserStates | None = None,
    ) -> torch.Tensor:
        """Embed users, B x D, each after the last event of its source: the last `user_vectors` of `forward`.

        This is faster than `forward`, which derives from ids what the processor already knows.

        Args:
            sources: For each row the ids of its segments, [BOS'], segments that end with [SEG], [EOS'], each with its
                row of item embeddings.
            segment_cache: Cache of segment states.
            exit_layer: Number of joint layers to run; None = all.
            version: An object that stays the same while no weight and no setting changes; None = look at them.
            user_states: Cache of histories; None = no cache.
        """
        (depth,) = self._exits(exit_layer, False, False)
        states, last = self.model.read_sources(sources, segment_cache, depth, version, user_states)
        parts = [learnt_user_vectors(self, states)[:, -1]]
        if features := features_at("vectors", self.config):
            opens = self.config.kind_token_ids["item"]
            items = [[ids for ids, _ in own[: end + 1] if ids[0] == opens] for own, end in zip(sources, last)]
            parts += [feature.user_vectors(self.model, items) for feature in features]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def _texts(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        states: torch.Tensor | None,
        segment_cache: SegmentCache | None = None,
    ) -> torch.Tensor:
        """Compute the states of items as in `embed_items`, with the features of their texts: M x H."""
        self._require_segment_layers()
        features = features_at("segments", self.config)
        if input_ids is None:
            if states is None or features:
                named = ", ".join(feature.settings[0] for feature in features) or "bow_embeddings"
                raise ValueError(
                    "items have no texts: give their ids, as M6RecDataCollator does (item_input_ids for "
                    f"retrieval_labels), or their states without {named}"
                )
            return states
        if states is None:
            states = self.item_states(input_ids, attention_mask, segment_cache)
        if features:
            states = self.model.add_to_texts(states, input_ids, self._valid(input_ids, attention_mask))
        return states

    def item_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        segment_cache: SegmentCache | None = None,
    ) -> torch.Tensor:
        """Compute states of standalone items without features: M x L ids of [ITEM] ... [SEG], padded right -> M x H."""
        return last_states(self.model, self._item_keys(input_ids, attention_mask), segment_cache)

    def plausibility(self, **batch: Any) -> torch.Tensor:
        """Return B x N mean log-likelihoods of each target's written text, including [EOS] (paper, zero-shot)."""
        return self(**batch, return_logits=False, return_vectors=False, return_plausibility=True).plausibility

    def write_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Turn ... x H joint states into ... x V logits of the next token."""
        return self.lm_head(self.lm_transform(states))

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor | ModelOutput:
        """Continue from the last token, which must be inside written text; structural tokens are never generated.

        Arguments are those of `GenerationMixin.generate`; `suppress_tokens` adds to the structural ids, which are
        always suppressed. With `guidance_scale` no cache is kept; `negative_prompt_ids` must end in written text too.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError("generate needs input_ids: the layout is read off them")
        if kwargs.get("prefill_chunk_size"):
            raise ValueError("prefill_chunk_size would cut given segments in two: leave it out")
        self._refuse_unwritable(input_ids, kwargs.get("attention_mask"))
        settings = generation_config or self.generation_config
        kwargs = library_arguments(kwargs)
        processors = LogitsProcessorList([StructuralTokens(self.config), *(logits_processor or ())])
        if kwargs.get("guidance_scale", settings.guidance_scale) not in (None, 1):
            negative = kwargs.get("negative_prompt_ids", args[5] if len(args) > 5 else None)
            if negative is None:
                raise ValueError("guidance_scale needs negative_prompt_ids: rows that end inside written text")
            self._refuse_unwritable(negative, kwargs.get("negative_prompt_attention_mask"))
            kwargs["use_cache"] = False  # the library gives a cache without the ids before it, which the layout needs
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def _refuse_unwritable(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Refuse rows that cannot be continued."""
        lay = layout(ids, mask, self.config)
        if not lay.written[:, -1].all():
            raise ValueError(
                "every row must end inside written text: pad on the left, and end prompts inside a [TEXT] segment of a "
                "target, or in plain text"
            )
        if self.config.document_attention == "bidirectional" and lay.plain.any():
            raise ValueError("a document that is read in both directions cannot be written on: use a [TEXT] target")

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass `forward` all ids so far, from which it derives the layout, and the cache under both names (PEFT)."""
        kwargs = {**library_arguments(kwargs), "layout_ids": input_ids, "return_scores": False, "return_vectors": False}
        prepared = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = one_cache(*(prepared.get(name) for name in CACHE_NAMES))
        return prepared if cache is None else {**prepared, **dict.fromkeys(CACHE_NAMES, cache)}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the layout of the last token on to the next step. Beams only change places within a prompt's rows."""
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return {**updated, "continuation": outputs.get("continuation")}

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Return the 2-D mask unchanged: `forward` builds the attention masks, also for static caches."""
        return attention_mask

    # ------------------------------------------------------------------------------------------------ reading states

    def _exits(self, exit_layer: int | None, training_scores: bool, deciding: bool) -> Sequence[int]:
        joint = self.config.num_joint_layers
        if exit_layer is not None:
            if not 0 < exit_layer <= joint:
                raise ValueError(f"exit_layer={exit_layer} is not in 1..{joint} (joint layers)")
            return [exit_layer]
        trained = self.config.exit_layers or (range(1, joint) if deciding else ())
        return [*trained, joint] if training_scores or deciding else [joint]

    def score_logits(self, states: torch.Tensor, ids: torch.Tensor, lay: Layout) -> torch.Tensor:
        """Compute B x N x S logits from the B x T x H joint states at the [EOS] of each target."""
        ends = target_ends(ids, lay, self.config)
        states = gather_or_zero(states, ends)
        if self.score_head is not None:
            return nan_where_absent(self.score_head(states), ends)
        first = self.config.first_option_token_id
        # Call the module, not its weight: an adapter may have trained these tokens.
        options = torch.arange(first, first + self.config.num_labels, device=ids.device)
        embeds = self.model.embeddings.projection(self.model.embeddings.tokens(options))
        return nan_where_absent(states @ embeds.T, ends)

    def _logits(self, out: M6RecModelOutput, tokens: int, to_keep: int | torch.Tensor) -> torch.Tensor:
        """Compute B x Q x V logits; they are undefined for skipped tokens."""
        states = out.last_hidden_state if out.kept is None else out.kept.back(out.last_hidden_state, tokens)
        return self.write_logits(states[:, slice(-to_keep, None) if isinstance(to_keep, int) else to_keep])

    def _require_segment_layers(self) -> None:
        if not self.config.num_segment_layers:
            raise ValueError(
                "item vectors need segment layers: with all layers joint an item's [SEG] has read nothing of its text; "
                "set num_joint_layers below num_hidden_layers"
            )

    # ------------------------------------------------------------------------------------------------------- losses

    def _score_labels(self, named: dict[str, torch.Tensor | None], others: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Collect the given labels of scoring tasks, and remove those of further tasks from `others`."""
        further = [name for name in others if name.endswith("_labels")]
        given = named | {name.removesuffix("_labels"): others.pop(name) for name in further}
        found = {task: given_labels(labels, label_field(task)) for task, labels in given.items()}
        known = {task: labels for task, labels in found.items() if labels is not None}
        if unknown := known.keys() - self.config.scored.keys():
            raise ValueError(
                f"{label_field(min(unknown))}: the score head has no outputs for it, only for "
                f"{', '.join(self.config.scored)}: name the task in score_tasks of the configuration"
            )
        return known

    def _text_loss(
        self, states: torch.Tensor, labels: torch.Tensor, lay: Layout, count: torch.Tensor | int | None
    ) -> torch.Tensor:
        if ((labels != IGNORE_INDEX) & ~lay.written).any():
            raise ValueError(
                "labels mark tokens that are given, not written: label what follows [TEXT] in a target, or plain text, "
                "and -100 elsewhere (M6RecProcessor.labels does)"
            )
        targets = text_targets(labels, lay, self.config)
        known = targets != IGNORE_INDEX
        return text_loss(self.write_logits(states[known]), targets[known], count)

    def _valid(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return ids != self.config.pad_token_id if mask is None else mask.bool()

    @torch.compiler.disable
    def _item_keys(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> list[SegmentKey]:
        """Convert M x L ids of items' segments, padded right, to segment keys; empty without ids."""
        if input_ids is None:
            return []
        lengths = self._valid(input_ids, attention_mask).sum(1).tolist()
        keys = [SegmentKey(0, tuple(ids[:length])) for ids, length in zip(input_ids.tolist(), lengths)]
        if any(key.ids[-1:] != (self.config.segment_token_id,) for key in keys):
            raise ValueError("an item's segment must end with [SEG]: encode items with M6RecProcessor.encode_items")
        return keys

    def _labelled_users(self, states: torch.Tensor, lay: Layout, labels: torch.Tensor) -> torch.Tensor:
        known = labels != IGNORE_INDEX
        if self.config.history_attention == "bidirectional":
            last = (lay.event * lay.source).amax(1, keepdim=True)
            if (known & (lay.event < last)).any():
                raise ValueError(
                    "with bidirectional history a user vector before the last event has seen the answer: label the "
                    "last event only, or set history_attention='causal'"
                )
        return learnt_user_vectors(self, states[known])

    def _total(self, found: dict[str, torch.Tensor]) -> torch.Tensor | None:
        weights = self.config.loss_weights or {}
        return torch.stack([weights.get(name, 1.0) * loss for name, loss in found.items()]).sum() if found else None

    # ------------------------------------------------------------------------------------------------------- keeping

    def resize_item_embeddings(self, rows: int) -> None:
        """Change the number of rows of item embeddings; existing rows stay, new rows start at zero (text only)."""
        self.model.resize_item_embeddings(rows)

    def fingerprint(self) -> str:
        """Return a digest of the weights below the joint layers and the settings that decide item vectors."""
        parts = [*self.model.segment_modules(), self.item_norm, self.item_projection]
        settings, adapters = sorted(self.config.vector_settings.items()), active_adapters(parts)
        # Without adapters the digest equals that of version 0.1, whose catalogues stay valid.
        digest = hashlib.sha256(repr((settings, adapters) if adapters else settings).encode())
        digest_weights(digest, [*parts, *feature_modules(self.model)])
        return digest.hexdigest()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike | None, *args: Any, revision: str = "main", **kwargs: Any
    ) -> Any:
        """Load like `PreTrainedModel.from_pretrained`, and store the revision, which the catalogue shares."""
        # Set if an adapter is loaded; then the first argument and `revision` belong to its base.
        beside = kwargs.get("adapter_kwargs") or {}
        adapter = beside.get("_adapter_model_path") or pretrained_model_name_or_path
        own = beside.get("revision", revision)
        settings = None if adapter is None else adapter_settings(adapter, revision=own)
        if adapter is None or settings is None:
            loaded = cls._load_whole(pretrained_model_name_or_path, *args, revision=revision, **kwargs)
        else:
            kwargs.pop("adapter_kwargs", None)
            loaded = load_adapted(cls, adapter, settings, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.revision = revision if settings is None else own
        return loaded

    @classmethod
    def _load_whole(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Load like `PreTrainedModel.from_pretrained`, and refuse weights that are missing or not finite."""
        output_loading_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if name is not None and kwargs.get("state_dict") is None:  # otherwise the caller passes the weights
            hub = {key: kwargs[key] for key in HUB if key in kwargs}
            refuse_incomplete(cls, name, info["missing_keys"], **hub)
            refuse_not_finite(model, name)
        return loaded if output_loading_info else model

    @classmethod
    def from_backbone(
        cls, backbone: Any, num_joint_layers: int | None = None, tokenizer: Any = None, **fields: Any
    ) -> Any:
        """Convert a published language model to M6Rec; arguments as in `m6rec.conversion.from_backbone`."""
        try:
            conversion = importlib.import_module("m6rec.conversion")
        except ImportError as error:
            raise ImportError("only the package can read other models' weights: install m6rec") from error
        return conversion.from_backbone(backbone, num_joint_layers, tokenizer, **fields)

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Save atomically weights, configuration and the code that loads them without this package.

        Args:
            save_directory: The folder. Weights of an earlier model there are removed, other files stay.
            *args: Arguments of `PreTrainedModel.save_pretrained`.
            **kwargs: Keyword arguments of `PreTrainedModel.save_pretrained`.
        """
        # Importing pipelines is slow, and loading needs none. The library also copies files that are imported here.
        from .pipeline_m6rec import RecommendationPipeline

        module = type(self).__module__.rpartition(".")[2]
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModel": f"{module}.{type(self).__name__}",
        }
        self.config.custom_pipelines = {
            "recommendation": {
                "impl": f"{RecommendationPipeline.__module__.rpartition('.')[2]}.{RecommendationPipeline.__name__}",
                "pt": ["AutoModelForCausalLM"],
                "type": "text",
            }
        }
        push = {key: kwargs.pop(key) for key in PUSH if key in kwargs}
        if (
            kwargs.get("distributed_checkpoint") or len(args) > 2
        ):  # all processes write into one folder; a push by place
            super().save_pretrained(save_directory, *args, **kwargs)
        else:
            obsolete = () if kwargs.get("variant") else WEIGHTS
            with atomic_files(save_directory, obsolete) as partial:
                super().save_pretrained(partial, *args, **kwargs)
                if any(partial.iterdir()):  # else another process writes
                    custom_object_save(RecommendationPipeline, partial)
        if push.pop("push_to_hub", False):
            type(self).push_to_hub(self, push.pop("repo_id", None) or Path(save_directory).name, **push)


__all__ = [
    "BASE",
    "OWN",
    "Given",
    "M6RecForRecommendation",
    "M6RecOutput",
    "adapter_settings",
    "is_finite",
    "item_vectors",
    "keep_trainable",
    "learnt_item_vectors",
    "learnt_user_vectors",
    "load_adapted",
    "load_base",
    "refuse_incomplete",
    "refuse_not_finite",
    "row_vectors",
]
