"""Configuration of M6Rec: one Transformer block, split into segment layers and joint layers, and the heads on top."""

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .values_m6rec import RENAMED_KEYS, SCORING_TASKS, ScoringTask, rename_keys

KINDS = ("user", "event", "age", "item", "now", "stat", "fact", "text", "option")
"""Kinds of segment, in the order of their token ids. A kind's number is its index here + 1; 0 means none."""

OTHER_TASKS = ("retrieval", "plausibility", "writing")

TASKS = (*SCORING_TASKS, *OTHER_TASKS)
"""Tasks of a model. All but plausibility have trained heads."""

FORMAT_VERSION = 2
"""Newest format version of the configuration and its weights; `format_version` of config.json, absent = 1.

A change that older code would misread raises it. A new field whose default keeps the earlier behaviour does not: older
code ignores unknown fields, keeps them and writes them again. A configuration is written in the oldest version that
reads it correctly.
"""

FORMAT_1: dict[str, tuple[Any, ...]] = {
    "written_attention": ("segment",),
    "norm_position": ("pre", "post"),
    "embedding_scale": (1.0,),
    "attention_scale": (None,),
    "local_layers": (None,),
}
"""Fields with values that code of format 1 does not know, and the values with which it computes the same."""

ROLES: dict[str, tuple[str, ...]] = {
    # Fields that decide segment states: part of the name of each state that a SegmentCache keeps on disk.
    "segments": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "gated_mlp", "embedding_size", "num_hidden_groups"),
        *("position_embedding_type", "max_position_embeddings", "rope_parameters", "norm_type", "norm_position"),
        *("norm_eps", "embedding_norm", "type_vocab_size", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"),
        *("pad_token_id", "unk_token_id", "mask_token_id", "source_token_id", "source_end_token_id", "bos_token_id"),
        *("eos_token_id", "segment_token_id", "first_kind_token_id", "first_option_token_id", "num_options"),
        *("num_joint_layers", "segment_attention", "document_attention", "segment_pooling", "embedding_scale"),
        *("attention_scale", "local_layers", "local_window", "local_rope_theta"),
    ),
    # Fields that decide item vectors when the weights are equal: part of the fingerprint of a catalogue. The ids of
    # special tokens belong to the tokenizer, which a pipeline compares separately.
    "vectors": (
        *("num_hidden_layers", "num_attention_heads", "hidden_act", "num_hidden_groups", "rope_parameters"),
        *("norm_type", "norm_position", "norm_eps", "num_joint_layers", "segment_attention", "segment_pooling"),
        *("max_position_embeddings", "cold_item_bias", "tfidf_weight", "tfidf_dim", "embedding_scale"),
        *("attention_scale", "local_layers", "local_window", "local_rope_theta"),
    ),
    # Fields that decide which weights exist, or their shapes: a fingerprint covers them through the weights.
    "shapes": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *(
            "num_key_value_heads",
            "head_dim",
            "gated_mlp",
            "embedding_size",
            "num_hidden_groups",
            "position_embedding_type",
            "max_position_embeddings",
        ),
        *(
            "norm_type",
            "norm_position",
            "final_norm",
            "embedding_norm",
            "type_vocab_size",
            "qkv_bias",
            "output_bias",
            "mlp_bias",
        ),
        *("qk_norm", "lm_head_transform", "lm_head_bias", "tie_word_embeddings", "entry_norm", "max_events"),
        *("embedding_dim", "num_item_embeddings", "bow_embeddings", "tfidf_weight", "score_head", "score_tasks"),
        *("rating_values", "rating_loss", "interactions"),
    ),
    # Fields that decide the outputs of the joint layers and the writing head, which no cache keeps on disk.
    "joint": (
        *("num_joint_layers", "history_attention", "joint_positions", "segment_summary", "skipped_kinds", "max_events"),
        *(
            "written_attention",
            "final_norm",
            "entry_norm",
            "exit_layers",
            "lm_head_transform",
            "lm_head_bias",
            "tie_word_embeddings",
        ),
        "use_cache",
    ),
    # Sizes that a model card lists, in this order.
    "sizes": (
        *("num_hidden_layers", "num_joint_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
        *("embedding_size", "embedding_dim", "vocab_size", "max_position_embeddings"),
    ),
    # Fields that decide the outputs of the score head and their meaning.
    "scores": ("score_head", "score_tasks", "rating_values", "rating_loss", "interactions"),
    # Fields that act in training only, or record how the model was trained.
    "training": (
        *("hidden_dropout", "attention_dropout", "entry_dropout", "item_embedding_dropout", "initializer_range"),
        *("embedding_temperature", "class_weights", "label_smoothing", "loss_weights", "trained_tasks"),
    ),
}
"""Role -> fields of M6RecConfig; a field may have several roles. `vector_settings` and the key of segment states
are derived from this table: a new field that changes vectors or states only has to be listed here."""

VECTORS_SINCE = {
    "segment_pooling": "last",
    "cold_item_bias": 0.0,
    "tfidf_weight": 0.0,
    "tfidf_dim": 1024,
    "max_position_embeddings": None,
    "embedding_scale": 1.0,
    "attention_scale": None,
    "local_layers": None,
    "local_window": None,
    "local_rope_theta": None,
}
"""Fields with the role "vectors" that version 0.1 did not have, and the value that reproduces it. Only other values
enter the fingerprint, so catalogues of version 0.1 stay valid."""

ROPE_BY_LENGTH = ("dynamic", "longrope", "yarn")
"""Types of rotary embeddings that depend on `max_position_embeddings`."""

ROPE_BY_ROW = ("dynamic", "longrope")
"""Types of rotary embeddings whose rotation by a position depends on the longest row of the batch."""

OF_LIBRARY = frozenset(
    """
    _name_or_path architectures auto_map custom_pipelines dtype transformers_version output_attentions
    output_hidden_states problem_type return_dict
    """.split()  # noqa: SIM905 - a line for each would hide the rest of the file
)
"""Fields of Transformers' configurations that change no segment state; all its other fields count as if they did."""

PRESETS: dict[str, dict[str, Any]] = {
    # For tests: the widths are no powers of two.
    "tiny": {
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_joint_layers": 2,
        "embedding_dim": 10,
        "max_position_embeddings": 512,
    },
    # The on-device model of the paper, its section on M6-Edge: 24 layers that share one set of weights, factorised
    # token embeddings of 128.
    "edge": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_hidden_groups": 1,
        "embedding_size": 128,
        "num_joint_layers": 3,
    },
    # A download of about 2 MB with 8-bit weights and a vocabulary of 8,000; ours.
    "nano": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_hidden_groups": 1,
        "embedding_size": 64,
        "num_joint_layers": 2,
    },
    # M6-base of the paper: 24 layers, 16 heads, 1024 wide, about 300M parameters; 3 joint layers (late interaction).
    "base": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "gated_mlp": False,
        "num_joint_layers": 3,
    },
}


T = TypeVar("T")


class Derived(Generic[T]):
    """Type of a field that takes None and is never None afterwards: `__post_init__` derives it from other fields.

    For a type checker, reading the field gives T; at run time `Derived[T]` is `T | None`, which `strict` checks.
    """

    if TYPE_CHECKING:

        def __get__(self, config: Any, owner: Any = None) -> T: ...

        def __set__(self, config: Any, value: T | None) -> None: ...

    else:

        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


DERIVED: Any = None
"""Default of a field with the type `Derived`."""


@strict
class M6RecConfig(PreTrainedConfig):
    """Everything that decides the shape and the behaviour of an M6Rec model.

    The block is general enough to hold the weights of BERT, GPT-2, Llama, Qwen2, Qwen3 and Gemma 3. Each field is
    documented below its definition. A wrong type fails at construction and at assignment; invalid combinations fail in
    `validate_architecture` with the reason. "Paper" is the M6-Rec paper; "our addition" is not in the paper.
    """

    model_type = "m6rec"
    keys_to_ignore_at_inference = [
        *("cache", "past_key_values", "layout", "losses", "user_vectors", "item_vectors", "continuation"),
    ]

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: Derived[int] = DERIVED
    """Number of key and value heads (grouped-query attention); None = num_attention_heads."""
    head_dim: Derived[int] = DERIVED
    """Width of an attention head; None = hidden_size // num_attention_heads."""
    hidden_act: str = "silu"
    gated_mlp: bool = True
    embedding_size: Derived[int] = DERIVED
    """Width of the token embeddings; smaller than hidden_size = factorised (M6-Edge). None = hidden_size."""
    num_hidden_groups: Derived[int] = DERIVED
    """Number of distinct sets of layer weights, as in ALBERT; None = one per layer."""
    position_embedding_type: Literal["rotary", "learned"] = "rotary"
    max_position_embeddings: int = 4096
    rope_parameters: Derived[dict[str, Any]] = DERIVED
    norm_type: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post", "both"] = "pre"
    """Norms before each attention and feed-forward block, after the sum with it (BERT), or before and after each block
    (Gemma 3)."""
    norm_eps: float = 1e-6
    final_norm: bool = True
    embedding_norm: bool = False
    type_vocab_size: int = 0
    """Rows of the token-type table; row 0 is added to every token (BERT); 0 = no table."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether to normalise each head's queries and keys (Qwen3)."""
    embedding_scale: float = 1.0
    """Factor of the token embeddings at the input; the writing head uses them without it (Gemma 3)."""
    attention_scale: float | None = None
    """Factor of the attention scores; None = head_dim ** -0.5."""
    local_layers: list[int] | None = None
    """Layers, counted from 0, in which a token attends to positions less than `local_window` away only (Gemma 3)."""
    local_window: int | None = None
    local_rope_theta: float | None = None
    """Base of the rotary positions of `local_layers`; None = that of the others."""
    lm_head_transform: bool = False
    """Whether a dense layer, an activation and a norm precede the writing head (BERT)."""
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    entry_norm: bool = False
    """Whether to normalise the input of the joint layers. Small vectors, such as item embeddings, then have the same
    scale as the layers' updates and are learnt in a quarter of the steps (our addition)."""
    entry_dropout: float = 0.0
    """Dropout rate of the input of the joint layers (segment states plus item, kind and event embeddings), as in
    SASRec."""
    initializer_range: Derived[float] = DERIVED
    """Standard deviation of new weights; None = hidden_size ** -0.5. The customary 0.02 suits widths near 1,000: with
    it, a narrow model's attention is flat and learns no clicks for hundreds of steps (our addition)."""
    use_cache: bool = True
    """Default of `generate`; `forward` returns a cache only if its own `use_cache` is set."""

    pad_token_id: int = 0
    unk_token_id: int | None = 1
    mask_token_id: int | None = 2
    source_token_id: int = 3
    source_end_token_id: int = 4
    bos_token_id: int = 5
    eos_token_id: int = 6
    segment_token_id: int = 7
    first_kind_token_id: int = 8
    """Id of the first kind token; the kind tokens have consecutive ids in the order of KINDS."""
    first_option_token_id: int = 17
    num_options: int = 16

    num_joint_layers: Derived[int] = DERIVED
    """Number of last layers that read all segments together; None = all layers (no segment layers)."""
    segment_attention: Literal["bidirectional", "causal"] = "bidirectional"
    history_attention: Literal["bidirectional", "causal"] = "causal"
    document_attention: Literal["causal", "bidirectional"] = "causal"
    """Attention within documents (plain rows): causal as in GPT, or bidirectional as in BERT. If bidirectional,
    `labels` stand at the [MASK] positions."""
    joint_positions: Literal["request", "segment"] = "request"
    written_attention: Literal["segment", "source"] = "segment"
    """What written text attends to in the segment layers: its own segment, or, as in the joint layers, everything
    before it in source and target. With "source" it attends to all of these tokens in every layer: `segment_summary`
    and `skipped_kinds` then hold for given text only. States of given text are equal with either value (our
    addition)."""
    segment_pooling: Literal["last", "mean"] = "last"
    """State at the [SEG] of a given segment when the joint layers begin: its own state, or the mean of the segment's
    states, as in sentence embeddings (MiniLM)."""
    segment_summary: int | None = None
    """Number of last tokens of each closed given segment that are keys of the joint layers; None = all."""
    skipped_kinds: list[str] | None = None
    """Kinds of given segments that the joint layers skip, which is faster but loses their content: for example "event"
    if every event has the same type, such as buying. None = no kind is skipped (our addition)."""
    max_events: int = 256
    """Rows of the table of event ordinals; later events share the last row."""
    embedding_dim: int = 128
    """Width of user and item vectors (the paper's 128)."""
    embedding_temperature: float = 0.07
    """Temperature of the retrieval softmax (the paper's 0.07)."""
    num_item_embeddings: int = 0
    """Rows of the optional table of item embeddings; 0 = off."""
    item_embedding_dropout: float = 0.3
    """Probability of leaving out an item's embedding at an occurrence in training, so that the text without it still
    works."""
    bow_embeddings: bool = False
    """Whether to add bag-of-words embeddings of an item's text to its segment state. With frozen segment layers these
    embeddings learn brands and series, which also helps later items (our addition)."""
    cold_item_bias: float = 0.0
    """Bias added to the product of user and item vector if the item's embedding is untrained: an item that never was a
    training target scores too low. No loss contains it: choose it on validation events of items held out of training
    (our addition)."""
    tfidf_weight: float = 0.0
    """Weight of the TF-IDF similarity between an item's words and those of the user's last items, added to the product
    of user and item vector. It needs no training and works for later items. No loss contains it: choose it on
    validation (our addition)."""
    tfidf_dim: int = 1024
    """Dimensions of user and item vectors that the hashed TF-IDF takes; more dimensions approximate matches of
    exact words better."""
    exit_layers: list[int] | None = None
    """Joint layers (counted from 1) after which scores are also trained, for early exit; None = the last only."""

    score_head: Literal["linear", "option"] = "linear"
    """Whether a linear layer or the embeddings of the option tokens (option tuning) give the scores."""
    score_tasks: Derived[list[str]] = DERIVED
    """Scoring tasks of the score head, in the order of its outputs; None = click, rating, interaction."""
    rating_values: Derived[list[float]] = DERIVED
    """Possible ratings, ascending; None = 1 to 5."""
    rating_loss: Literal["classes", "regression"] = "classes"
    interactions: Derived[list[str]] = DERIVED
    """Names of the interactions that are predicted together; None = like, follow, comment."""
    class_weights: dict[str, list[float]] | None = None
    """Class weights by scoring task: "click" (2 weights), "rating" (one per value), "interaction" (one per name, for
    its positives)."""
    label_smoothing: float = 0.0
    loss_weights: dict[str, float] | None = None
    """Weights of the losses by name: "text", "retrieval" or a scoring task; absent = 1."""
    trained_tasks: list[str] | None = None
    """Tasks whose heads have been trained; None = not recorded."""

    if not TYPE_CHECKING:
        # The library looks up other names and per-layer values at each read, of which there are none here.
        __getattribute__ = object.__getattribute__

    def __post_init__(self, **kwargs: Any) -> None:
        self._set_renamed(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        if self.num_joint_layers is None:
            self.num_joint_layers = self.num_hidden_layers
        if self.num_hidden_groups is None:
            self.num_hidden_groups = self.num_hidden_layers
        self._complete_scores()
        self._refuse_other_labels(kwargs.pop("num_labels", None))
        self.id2label = dict(enumerate(self.score_names))
        self.label2id = {name: index for index, name in self.id2label.items()}
        kwargs.pop("format_version", None)  # the file's version: the next save writes this code's
        if not __name__.startswith("transformers_modules."):
            # The installed package registers its pipeline itself: a checkpoint need not ask for trust in its own code.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def _complete_scores(self) -> None:
        """Give the fields that decide the score head's outputs their values where they are None."""
        if self.rating_values is None:
            self.rating_values = [1.0, 2.0, 3.0, 4.0, 5.0]
        if self.interactions is None:
            self.interactions = ["like", "follow", "comment"]
        if self.score_tasks is None:
            self.score_tasks = [name for name, task in SCORING_TASKS.items() if task.by_default]

    def _set_renamed(self, fields: dict[str, Any]) -> None:
        """Set fields given by their names of version 0.1, and remove these names from `fields`."""
        for name in RENAMED_KEYS.keys() & fields.keys():
            setattr(self, RENAMED_KEYS[name], fields.pop(name))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from a checkpoint's config.json, unless a newer version wrote it.

        Args:
            config_dict: Content of config.json.
            **kwargs: As in `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: If the format version is unknown.
        """
        # Check first: the fields of a newer format may have other types.
        check_format(config_dict.get("format_version", 1), FORMAT_VERSION, "the checkpoint's config.json")
        return super().from_dict(rename_keys(config_dict), **rename_keys(kwargs))

    @classmethod
    def preset(cls, name: str, **kwargs: Any) -> "M6RecConfig":
        """Make one of the named sizes.

        "tiny" is for tests, "nano" a download of 2 MB, "edge" the paper's M6-Edge (10M), "base" M6-base (300M).

        Args:
            name: Name of the preset.
            **kwargs: Fields that override the preset's.

        Raises:
            ValueError: If no preset has that name.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}: choose one of {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **kwargs})

    @property
    def num_segment_layers(self) -> int:
        """Number of layers that read each segment independently."""
        return self.num_hidden_layers - self.num_joint_layers

    @property
    def writes_from_source(self) -> bool:
        """Whether there are segment layers in which written text attends to its source."""
        return self.written_attention == "source" and self.num_segment_layers > 0

    @property
    def vector_settings(self) -> dict[str, Any]:
        """Settings that change item vectors without changing a weight, by their names in version 0.1.

        The fingerprint contains these names, so that catalogues of version 0.1 stay valid.
        """
        names = {new: old for old, new in RENAMED_KEYS.items()}
        fields = {name: getattr(self, name) for name in ROLES["vectors"]}
        if not self.tfidf_weight:
            fields["tfidf_dim"] = VECTORS_SINCE["tfidf_dim"]
        if (self.rope_parameters or {}).get("rope_type") not in ROPE_BY_LENGTH:
            fields["max_position_embeddings"] = None
        absent = object()
        return {
            names.get(name, name): value for name, value in fields.items() if value != VECTORS_SINCE.get(name, absent)
        }

    @property
    def scored(self) -> dict[str, ScoringTask]:
        """Scoring tasks of the score head by name, in the order of their outputs.

        Raises:
            ValueError: If `score_tasks` does not name scoring tasks, each once.
        """
        names = list(self.score_tasks or ())
        if not names or len({*names}) < len(names) or not {*names} <= SCORING_TASKS.keys():
            raise ValueError(f"score_tasks={names} must name some of {', '.join(SCORING_TASKS)}, each once")
        return {name: SCORING_TASKS[name] for name in names}

    @property
    def score_slices(self) -> dict[str, slice]:
        """Slice of each task's outputs among the outputs of the score head."""
        found, start = {}, 0
        for name, task in self.scored.items():
            found[name] = slice(start, start := start + len(task.outputs(self)))
        return found

    @property
    def score_names(self) -> list[str]:
        """Name of each output of the score head, which is also the meaning of its option token."""
        return [name for task in self.scored.values() for name in task.outputs(self)]

    @property
    def num_labels(self) -> int:
        """Number of outputs of the score head, derived from the scoring tasks; another number cannot be set."""
        return len(self.score_names)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if value != self.num_labels:
            raise ValueError(
                f"num_labels={value!r}: the score head has {self.num_labels} outputs here, {self.score_names}, which "
                "follow from score_tasks, rating_values, rating_loss and interactions: change these fields, and leave "
                "num_labels out"
            )

    def _refuse_other_labels(self, number: int | None) -> None:
        """Refuse a number or names of outputs that contradict the scoring tasks."""
        if number is not None:
            self.num_labels = number
        names = {str(index): name for index, name in (self.id2label or {}).items()}
        names |= {str(index): name for name, index in (self.label2id or {}).items()}
        if any(name != dict(enumerate(self.score_names)).get(int(index)) for index, name in names.items()):
            raise ValueError(
                f"id2label={self.id2label}, label2id={self.label2id}: names of the score head's outputs follow from "
                f"score_tasks, rating_values and interactions, here {self.score_names}: leave both out"
            )

    @property
    def kind_token_ids(self) -> dict[str, int]:
        """Mapping from kind to the id of the token that opens a segment of that kind."""
        first = self.first_kind_token_id  # reading an attribute of a configuration is slow
        return {kind: first + index for index, kind in enumerate(KINDS)}

    @property
    def structural_token_ids(self) -> list[int]:
        """Ids that a model never writes: padding, unknown, mask, openers, segment ends, kinds and options."""
        single = [self.pad_token_id, self.unk_token_id, self.mask_token_id, self.bos_token_id]
        options = range(self.first_option_token_id, self.first_option_token_id + self.num_options)
        markers = [self.source_token_id, self.source_end_token_id, self.segment_token_id]
        return [index for index in (*single, *markers, *self.kind_token_ids.values(), *options) if index is not None]

    def to_dict(self) -> dict[str, Any]:
        """Serialise; the names of score outputs are left out, since other fields determine them."""
        older = all(getattr(self, name) in values for name, values in FORMAT_1.items())
        fields = {**super().to_dict(), "format_version": 1 if older else FORMAT_VERSION}
        fields.pop("id2label", None)
        fields.pop("label2id", None)
        return fields

    def validate_architecture(self) -> None:
        """Refuse invalid combinations of settings (called by `strict` at construction)."""
        problems = [*self._problems_of_the_block(), *self._problems_of_the_stages(), *self._problems_of_the_heads()]
        if problems:
            raise ValueError("; ".join(problems))

    def _problems_of_the_block(self) -> list[str]:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        rules = [
            (
                groups is not None and heads % groups,
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})",
            ),
            (
                self.head_dim is not None and self.position_embedding_type == "rotary" and self.head_dim % 2,
                f"rotary positions need an even head_dim, got {self.head_dim}",
            ),
            (
                self.num_hidden_groups is not None and not 0 < self.num_hidden_groups <= self.num_hidden_layers,
                f"num_hidden_groups={self.num_hidden_groups} is not in 1..{self.num_hidden_layers}",
            ),
            (
                bool(self.local_layers) and (self.local_window or 0) < 1,
                f"local_layers={self.local_layers} need local_window, 1 or more, got {self.local_window}",
            ),
            (
                not set(self.local_layers or ()) <= set(range(self.num_hidden_layers)),
                f"local_layers={self.local_layers} are not all in 0..{self.num_hidden_layers - 1}",
            ),
            (
                self.norm_position == "post" and self.final_norm,
                "norm_position='post' already ends each layer with a norm: set final_norm=False",
            ),
        ]
        return [text for broken, text in rules if broken]

    def _problems_of_the_stages(self) -> list[str]:
        layers, joint = self.num_hidden_layers, self.num_joint_layers
        if joint is not None and not 0 < joint <= layers:
            return [f"num_joint_layers={joint} is not in 1..{layers}"]
        has_segment_layers = joint is not None and joint < layers
        exits = self.exit_layers or []
        rules = [
            (
                self.segment_summary is not None and self.segment_summary < 1,
                f"segment_summary={self.segment_summary} keeps no token: give at least 1, or None for all",
            ),
            (
                self.segment_summary is not None and not has_segment_layers,
                "segment_summary needs segment layers (num_joint_layers < num_hidden_layers): what it drops is unread",
            ),
            (
                not set(self.skipped_kinds or ()) <= {*KINDS} - {"item"},
                f"skipped_kinds={self.skipped_kinds} may name {', '.join(kind for kind in KINDS if kind != 'item')} "
                "(items are what it is about)",
            ),
            (
                self.segment_pooling == "mean" and joint is not None and not has_segment_layers,
                "segment_pooling='mean' needs segment layers (num_joint_layers < num_hidden_layers): a mean of what no "
                "layer has read says nothing of the order of the words",
            ),
            (
                self.position_embedding_type == "learned" and has_segment_layers and self.joint_positions == "request",
                "learned positions are added at the embedding, where segment layers need the place in the segment: "
                "set joint_positions='segment'",
            ),
            (
                self.written_attention == "source" and (self.rope_parameters or {}).get("rope_type") in ROPE_BY_ROW,
                f"written_attention='source' takes given text at its positions in the request, but positions of "
                f"rope_type={(self.rope_parameters or {}).get('rope_type')!r} depend on the length of the row: set "
                "written_attention='segment'",
            ),
            (
                joint is not None and any(not 0 < layer <= joint for layer in exits),
                f"exit_layers={exits} count joint layers from 1 to {joint}: [EOS] has not met the user before",
            ),
        ]
        return [text for broken, text in rules if broken]

    def _problems_of_the_heads(self) -> list[str]:
        values, weights, losses = self.rating_values or [], self.class_weights or {}, self.loss_weights or {}
        names, tasks = ("text", *SCORING_TASKS, "retrieval"), (*SCORING_TASKS, *OTHER_TASKS)
        rules = [
            (list(values) != sorted(set(values)), f"rating_values must ascend without repeats, got {values}"),
            (
                self.score_head == "option" and self.rating_loss == "regression",
                "score_head='option' chooses among classes: set rating_loss='classes'",
            ),
            (
                self.score_head == "option" and len(self.score_names) > self.num_options,
                f"score_head='option' needs one option token for each of {self.score_names}, but "
                f"num_options={self.num_options}",
            ),
            (
                self.cold_item_bias != 0 and self.num_item_embeddings == 0,
                f"cold_item_bias={self.cold_item_bias} needs item memory, which tells new items from others",
            ),
            (self.tfidf_weight < 0, f"tfidf_weight={self.tfidf_weight} is negative: give 0 (off) or more"),
            (self.tfidf_dim < 1, f"tfidf_dim={self.tfidf_dim}: give 1 or more"),
            (not 0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing} is not in [0, 1)"),
            (self.embedding_temperature <= 0, f"embedding_temperature={self.embedding_temperature} must be positive"),
            (
                any(name not in names for name in losses),
                f"loss_weights={sorted(losses)} names an unknown loss: choose from {list(names)}",
            ),
            (
                any(task not in tasks for task in self.trained_tasks or []),
                f"trained_tasks={self.trained_tasks} names an unknown task: choose from {list(tasks)}",
            ),
        ]
        return [text for broken, text in rules if broken] + self._problems_of_class_weights(weights)

    def _problems_of_class_weights(self, weights: dict[str, list[float]]) -> list[str]:
        sizes = {name: len((task.values or task.outputs)(self)) for name, task in self.scored.items()}
        problems = [
            f"class_weights: unknown task {name!r}, choose from {list(sizes)}" for name in weights if name not in sizes
        ]
        return problems + [
            f"class_weights[{name!r}] has {len(values)} weights for {sizes[name]} classes"
            for name, values in weights.items()
            if name in sizes and len(values) != sizes[name]
        ]


def check_format(found: Any, known: int, what: str) -> None:
    """Refuse a format that a newer version of the package wrote.

    Args:
        found: Format number as written.
        known: Newest format number that this version reads.
        what: Name of the file or object, for the message.

    Raises:
        ValueError: If the format is unknown.
    """
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"{what} is damaged: it is of format {found!r}, expected a number from 1 to {known}")
    if found > known:
        raise ValueError(
            f"{what} is of format {found}, which a newer version wrote: this one reads formats up to {known}. Upgrade "
            "(pip install --upgrade m6rec), or load it with trust_remote_code=True in a process that does not import "
            "m6rec, so that the code which the checkpoint carries is used"
        )


__all__ = ["DERIVED", "FORMAT_VERSION", "KINDS", "PRESETS", "TASKS", "Derived", "M6RecConfig", "check_format"]
