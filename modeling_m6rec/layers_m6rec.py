"""The Transformer block, which can hold the weights of BERT, GPT-2, Llama, Qwen and Gemma 3.

Shapes: B rows, Q queries, K keys, H heads, G key/value heads, D = head_dim. In the shared form B = U * N: U users with
N candidates each, S keys of a user; `n` of the N are computed at once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_m6rec import M6RecConfig
from .layout_m6rec import gather_tokens

SCORES_AT_ONCE = 1 << 19
"""Most attention scores to shared keys in one table: larger tables exceed the processor's cache."""
MOST_KEPT = 8192
"""Positions below this one are looked up in a table of cosines and sines."""
SHORT = 32
"""Number of keys up to which eager attention is faster on CPUs than the fused kernel, which starts row by row."""


class SharedKeys(NamedTuple):
    """A user's keys and values in one layer, which all candidates of the user attend to."""

    key: torch.Tensor
    """U x G x S x D."""
    value: torch.Tensor
    """U x G x S x D."""
    bias: torch.Tensor | None
    """U x 1 x 1 x S, added to attention scores; None = all keys are visible."""

    def followed_by(self, others: "SharedKeys") -> "SharedKeys":
        """Return these keys and others after them."""
        biases = [
            part.key.new_zeros(len(part.key), 1, 1, part.key.shape[2]) if part.bias is None else part.bias
            for part in (self, others)
        ]
        bias = None if self.bias is None and others.bias is None else torch.cat(biases, -1)
        return SharedKeys(torch.cat((self.key, others.key), 2), torch.cat((self.value, others.value), 2), bias)

    def before(
        self, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return these keys and values and those of one row of each user after them, and the mask of both."""
        size = (*attention_mask.shape[:3], self.key.shape[2])
        seen = attention_mask.new_zeros(size) if self.bias is None else self.bias.expand(size)
        keys, values = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        return keys, values, torch.cat((seen, attention_mask), -1)

    def chosen(self, users: torch.Tensor) -> "SharedKeys":
        """Return the keys of some users."""
        return SharedKeys(self.key[users], self.value[users], None if self.bias is None else self.bias[users])


class M6RecRMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        if hidden_states.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_exporting():
            # The same operations in one call; of narrower numbers it rounds the product with the weight otherwise.
            return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden_states.dtype)


def make_norm(config: M6RecConfig, size: int) -> nn.Module:
    """Make the norm of the configuration."""
    return M6RecRMSNorm(size, config.norm_eps) if config.norm_type == "rms" else nn.LayerNorm(size, config.norm_eps)


class _Table(NamedTuple):
    """Cosines and sines of positions from 0, N x D each, and the frequencies that they were computed from."""

    source: torch.Tensor
    version: int
    cos: torch.Tensor
    sin: torch.Tensor


class M6RecRotaryEmbedding(nn.Module):
    """Cosines and sines of positions; `_init_weights` recomputes buffers with these names after a meta init."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = self.kind_of(config)
        default = self.rope_type == "default"
        initialise = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = initialise(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        self._table: _Table | None = None

    @staticmethod
    def kind_of(config: M6RecConfig) -> str:
        """Return the type of rotary embeddings, by the library's name."""
        return config.rope_parameters["rope_type"]

    @staticmethod
    def compute_default_rope_parameters(config: M6RecConfig, **_: Any) -> tuple[torch.Tensor, float]:
        """Return D/2 inverse frequencies and the scale of the result."""
        return _frequencies(config.rope_parameters["rope_theta"], config.head_dim), 1.0

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert B x Q positions to cosines and sines, B x 1 x Q x D each, in the type of `hidden_states`."""
        may = self.rope_type == "default" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if may and position_ids.device.type == "cpu" and hidden_states.dtype == torch.float32 and position_ids.numel():
            last = int(position_ids.max())
            if last < MOST_KEPT and not self.get_buffer("inv_freq").is_inference():
                return self._kept(position_ids, last)
        return self._computed(hidden_states, position_ids)

    @torch.no_grad()
    @dynamic_rope_update
    def _computed(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.get_buffer("inv_freq").float()
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)

    def _kept(self, position_ids: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Look positions up to `last` up in a table, which is made again when the frequencies have changed."""
        source, table = self.get_buffer("inv_freq"), self._table
        if table is None or table.source is not source or table.version != source._version or last >= len(table.cos):
            cos, sin = self._computed(source.float(), torch.arange(max(2 * last, 256))[None])
            table = self._table = _Table(source, source._version, cos[0, 0], sin[0, 0])
        (rows, size), index = position_ids.shape, position_ids.flatten()
        cos, sin = (part.index_select(0, index).view(rows, 1, size, -1) for part in table[2:])
        return cos, sin


class M6RecLocalRotaryEmbedding(M6RecRotaryEmbedding):
    """Cosines and sines of positions in `local_layers`, whose base differs."""

    @staticmethod
    def kind_of(config: M6RecConfig) -> str:
        """Return the library's default."""
        return "default"

    @staticmethod
    def compute_default_rope_parameters(config: M6RecConfig, **_: Any) -> tuple[torch.Tensor, float]:
        """Return D/2 inverse frequencies and the scale of the result."""
        assert config.local_rope_theta is not None
        return _frequencies(config.local_rope_theta, config.head_dim), 1.0


def _frequencies(base: float, dim: int) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate B x H x Q x D queries or keys by their positions."""
    # In-place writes to parts of a tensor are slow to differentiate, and become transpositions in an ONNX graph.
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        first, second = states.chunk(2, -1)
        return states * cos + torch.cat((-second, first), -1) * sin
    half, turned = states.shape[-1] // 2, states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned


def _into(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Add `old` to `new`, which has no other use: in place if gradients and number types permit it."""
    return new + old if torch.is_grad_enabled() or new.dtype != old.dtype else new.add_(old)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute eager attention; returns B x Q x H x D and the B x H x Q x K weights."""
    (rows, heads, queries, dim), (groups, keys) = query.shape, key.shape[1:3]
    # The heads of a group are rows of one product, so that its keys are not copied per head.
    folded = query.reshape(rows, groups, -1, dim)
    scores = (folded @ key.transpose(2, 3)).view(rows, groups, -1, queries, keys)
    scores = torch.add(attention_mask[:, None], scores, alpha=scaling)
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training).view(rows, heads, queries, keys)
    # The product uses the returned tensor itself, so that its gradient can be computed.
    attended = (weights.view(rows, groups, -1, keys) @ value).view(rows, heads, queries, dim)
    return attended.transpose(1, 2).contiguous(), weights


def shared_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    shared: SharedKeys,
) -> torch.Tensor:
    """Attend from each candidate to its user's keys, stored once, and to its own keys, without copies.

    Args:
        query: U*N x H x Q x D.
        key: U*N x G x K x D.
        value: U*N x G x K x D.
        attention_mask: U*N x 1 x Q x K, added to scores.
        scaling: Factor of the scores.
        shared: The users' keys.

    Returns:
        U*N x Q x H x D.
    """
    (rows, heads, queries, dim), (users, groups, far_keys) = query.shape, shared.key.shape[:3]
    each, keys, slots = heads // groups * queries, key.shape[2], rows // users
    folded = (query * scaling).reshape(rows, groups, each, dim)
    near = (folded @ key.transpose(2, 3)).view(rows, groups, -1, queries, keys) + attention_mask[:, None]
    folded, near = (states.reshape(users, slots, groups, each, -1).transpose(1, 2) for states in (folded, near))
    own_value = value.view(users, slots, groups, keys, dim).transpose(1, 2)
    # Candidates' own scores and weights follow the shared ones in one table, in the room of keys and values of zeros:
    # concatenating and splitting two tables would copy both.
    far_key, far_value = (nn.functional.pad(states, (0, 0, 0, keys)) for states in (shared.key, shared.value))
    far_key = far_key.transpose(2, 3)
    attended = []
    step = max(SCORES_AT_ONCE // (users * heads * queries * (far_keys + keys)), 1)
    for start in range(0, slots, step):
        part = slice(start, start + step)
        scores = folded[:, :, part].reshape(users, groups, -1, dim) @ far_key  # U x G x n*(H/G)*Q x S+K
        if shared.bias is not None:
            scores[..., :far_keys] += shared.bias
        scores[..., far_keys:] = near[:, :, part].reshape(users, groups, -1, keys)
        weights = scores.softmax(-1)
        own = weights[..., far_keys:].unflatten(2, (-1, each)) @ own_value[:, :, part]
        attended.append((weights @ far_value).view(own.shape) + own)
    found = torch.cat(attended, 2).transpose(1, 2)  # U x N x G x (H/G)*Q x D
    return found.reshape(rows, heads, queries, dim).transpose(1, 2)


class M6RecAttention(nn.Module):
    """Grouped-query attention, with biases, head norms and rotary positions as configured."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__()
        self.config = config
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm  # reading an attribute of a configuration is slow
        self.scaling = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.is_causal = True
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = M6RecRMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = M6RecRMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor,
        layer_idx: int = 0,
        key_cache: Cache | None = None,
        shared: SharedKeys | None = None,
        output_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; `layer_idx` is an argument of the call, since layers of the cache may share weights.

        With `output_mask` (B x n indices) only these tokens attend to all Q, and the mask is B x 1 x n x K.
        """
        own = hidden_states if output_mask is None else gather_tokens(hidden_states, output_mask)
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim))
            for projection, states in ((self.q_proj, own), (self.k_proj, hidden_states), (self.v_proj, hidden_states))
        )
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if rotary is not None:
            cos, sin = (
                rotary if output_mask is None else (gather_tokens(part[:, 0], output_mask)[:, None] for part in rotary)
            )
            query, key = rotate(query, cos, sin), rotate(key, *rotary)
        if key_cache is not None:
            key, value = key_cache.update(key, value, layer_idx)
            if shared is not None:  # each row goes on after keys of its own
                key, value, attention_mask = shared.before(key, value, attention_mask)
                shared = None
        weights = None
        if shared is not None:
            attended = shared_attention(query, key, value, attention_mask, self.scaling, shared)
        else:
            attend = self._attention_function(key, key_cache is not None and query.shape[2] == 1)
            dropout = self.config.attention_dropout if self.training else 0.0
            attended, weights = attend(
                self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
            )
        return self.o_proj(attended.flatten(2)), weights

    def _attention_function(
        self, key: torch.Tensor, writes: bool
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """Choose the function; `writes` = the queries are one token of each row that is written with a cache."""
        name = self.config._attn_implementation
        # An exported graph must accept all lengths. For a single query the library's function is the faster one.
        short = not torch.compiler.is_exporting() and not writes and key.shape[2] <= SHORT
        if short and name == "sdpa" and key.device.type == "cpu":
            return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


class M6RecMLP(nn.Module):
    """Two linear layers with an activation between them, or the gated form."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map B x Q x hidden_size to itself."""
        up = self.up_proj(hidden_states)
        if self.gate_proj is None:
            return self.down_proj(self.activation(up))
        gate = self.activation(self.gate_proj(hidden_states))
        return self.down_proj(gate * up if torch.is_grad_enabled() else gate.mul_(up))


class M6RecLayer(GradientCheckpointingLayer):
    """One block, with norms as configured; segment layers and joint layers differ only in their masks."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.self_attn = M6RecAttention(config)
        self.mlp = M6RecMLP(config)
        self.attention_norm = make_norm(config, config.hidden_size)
        self.mlp_norm = make_norm(config, config.hidden_size)
        both = config.norm_position == "both"
        self.attention_out_norm = make_norm(config, config.hidden_size) if both else None
        self.mlp_out_norm = make_norm(config, config.hidden_size) if both else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor,
        output_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map B x Q x hidden_size to itself, or to B x n x hidden_size, the outputs of the tokens at `output_mask`."""
        inner = hidden_states if self.post_norm else self.attention_norm(hidden_states)
        attended, _ = self.self_attn(inner, rotary, attention_mask, output_mask=output_mask, **kwargs)
        hidden_states = hidden_states if output_mask is None else gather_tokens(hidden_states, output_mask)
        attended = attended if self.attention_out_norm is None else self.attention_out_norm(attended)
        hidden_states = _into(self.dropout(attended) if self.training else attended, hidden_states)
        hidden_states = self.attention_norm(hidden_states) if self.post_norm else hidden_states
        inner = hidden_states if self.post_norm else self.mlp_norm(hidden_states)
        inner = self.mlp(inner)
        inner = inner if self.mlp_out_norm is None else self.mlp_out_norm(inner)
        hidden_states = _into(self.dropout(inner) if self.training else inner, hidden_states)
        return self.mlp_norm(hidden_states) if self.post_norm else hidden_states


class M6RecEmbeddings(nn.Module):
    """Token embeddings, with a type row, learned positions, norm and widening projection as configured."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__()
        self.config = config
        size = config.embedding_size
        self.tokens = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.types = nn.Embedding(config.type_vocab_size, size) if config.type_vocab_size else None
        learned = config.position_embedding_type == "learned"
        self.positions = nn.Embedding(config.max_position_embeddings, size) if learned else None
        self.norm = make_norm(config, size) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)
        wider = size != config.hidden_size
        self.projection = nn.Linear(size, config.hidden_size, bias=False) if wider else nn.Identity()

    def forward(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Convert B x Q x embedding_size token embeddings at B x Q positions to B x Q x hidden_size."""
        if self.config.embedding_scale != 1:
            embeds = embeds * self.config.embedding_scale
        if self.types is not None:
            embeds = embeds + self.types.weight[0]
        if self.positions is not None:
            # An exported graph cannot raise this error: its look-up of the position fails instead.
            exporting = torch.compiler.is_exporting()
            if not exporting and positions.numel() and int(positions.max()) >= self.positions.num_embeddings:
                raise ValueError(
                    f"position {int(positions.max())} is beyond max_position_embeddings={self.positions.num_embeddings}"
                    ": shorten the request"
                )
            embeds = embeds + self.positions(positions)
        return self.projection(self.dropout(self.norm(embeds)))


class LMHeadTransform(nn.Module):
    """Maps the last state to the input of the writing head: BERT's dense layer, a narrowing layer, or the identity."""

    def __init__(self, config: M6RecConfig) -> None:
        super().__init__()
        narrow, full = config.embedding_size != config.hidden_size, config.lm_head_transform
        sizes = config.hidden_size, config.embedding_size
        self.dense = nn.Linear(*sizes, bias=full) if narrow or full else nn.Identity()
        self.activation = ACT2FN[config.hidden_act] if full else nn.Identity()
        self.norm = make_norm(config, config.embedding_size) if full else nn.Identity()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map ... x H to ... x embedding_size."""
        return self.norm(self.activation(self.dense(states)))


def all_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """List modules and all modules inside them; one that stands in several places may be listed several times.

    It precedes every call of a model; `Module.modules` takes four times as long.
    """
    parts = list(modules)
    for part in parts:
        if part._modules:
            parts += [inner for inner in part._modules.values() if inner is not None]
    return parts


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout and gradients; afterwards restore the mode of each module."""
    training = [module for module in all_modules([model]) if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


__all__ = [
    "LMHeadTransform",
    "M6RecAttention",
    "M6RecEmbeddings",
    "M6RecLayer",
    "M6RecLocalRotaryEmbedding",
    "M6RecMLP",
    "M6RecRMSNorm",
    "M6RecRotaryEmbedding",
    "SharedKeys",
    "all_modules",
    "inference_mode",
    "make_norm",
]
