"""Each field of the configuration has a role, and the role is true: what changes vectors or states is in a digest."""

import pytest
import torch

from m6rec import M6RecConfig, M6RecForRecommendation
from m6rec.configuration_m6rec import ROLES
from m6rec.segment_cache_m6rec import IGNORED_BY_SEGMENTS, _digest
from tests.modeling_m6rec.shop import ITEMS, build, processor, tokenizer

BASE = {
    "num_hidden_groups": 2,
    "num_item_embeddings": 3,
    "bow_embeddings": True,
    "cold_item_bias": 0.3,
    "tfidf_weight": 0.5,
    "tfidf_dim": 64,
    "local_layers": [0],
    "local_window": 3,
    "local_rope_theta": 100.0,
}
IDS = {name: value for name, value in tokenizer().structural_ids.items() if name.endswith("_token_id")}
"""The tokenizer decides these; with other ones a row means something else."""
OTHER = {
    "vocab_size": 500,
    "hidden_size": 24,
    "intermediate_size": 60,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "hidden_act": "gelu",
    "gated_mlp": False,
    "embedding_size": 20,
    "num_hidden_groups": 4,
    "position_embedding_type": "learned",
    "max_position_embeddings": 600,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "norm_type": "layer",
    "norm_position": "post",
    "norm_eps": 1e-2,
    "final_norm": False,
    "embedding_norm": True,
    "type_vocab_size": 2,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "lm_head_transform": True,
    "lm_head_bias": True,
    "tie_word_embeddings": True,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "entry_norm": True,
    "entry_dropout": 0.1,
    "initializer_range": 0.1,
    "use_cache": False,
    "num_options": 17,
    "num_joint_layers": 1,
    "segment_attention": "causal",
    "history_attention": "bidirectional",
    "document_attention": "bidirectional",
    "joint_positions": "segment",
    "segment_pooling": "mean",
    "written_attention": "source",
    "embedding_scale": 2.0,
    "attention_scale": 0.1,
    "local_layers": [1],
    "local_window": 2,
    "local_rope_theta": 7.0,
    "segment_summary": 1,
    "skipped_kinds": ["event"],
    "max_events": 100,
    "embedding_dim": 12,
    "embedding_temperature": 0.1,
    "num_item_embeddings": 5,
    "item_embedding_dropout": 0.1,
    "bow_embeddings": False,
    "cold_item_bias": 1.0,
    "tfidf_weight": 1.0,
    "tfidf_dim": 32,
    "exit_layers": [1],
    "score_head": "option",
    "score_tasks": ["rating"],
    "rating_values": [1.0, 2.0],
    "rating_loss": "regression",
    "interactions": ["like"],
    "class_weights": {"click": [1.0, 2.0]},
    "label_smoothing": 0.1,
    "loss_weights": {"click": 2.0},
    "trained_tasks": ["click"],
    **{name: value + 1 for name, value in IDS.items()},
}
NEEDS = {"position_embedding_type": {"joint_positions": "segment"}, "norm_position": {"final_norm": False}}
"""Fields without which a value has no meaning."""
PROCESSOR = processor()


def read(model):
    """States and vectors of the shop's items, by whichever weights the model has."""
    padded = PROCESSOR.pad([{"input_ids": own} for own in PROCESSOR.encode_items(ITEMS)])
    ids, mask = padded["input_ids"], padded["attention_mask"]
    memory = torch.tensor([PROCESSOR.item_row(item) for item in ITEMS])
    model.model.word_sketch.fit([own.tolist() for own in ids])
    with torch.no_grad():
        return model.item_states(ids, mask), model.embed_items(ids, mask, memory_ids=memory)


def test_every_field_has_a_role_and_only_fields_have():
    fields = set(M6RecConfig.__annotations__)
    assert fields == set().union(*ROLES.values()), "a new field: say in ROLES what it decides"
    assert fields == set(OTHER), "a new field: give it another value here, so that its role can be tried"


@pytest.mark.parametrize("name", sorted(OTHER))
def test_what_changes_states_or_vectors_is_in_their_digest(name):
    fields = {**BASE, **NEEDS.get(name, {})}
    first = build(**fields)
    second = M6RecForRecommendation(M6RecConfig(**{**first.config.to_dict(), name: OTHER[name]})).eval()
    assert getattr(second.config, name) != getattr(first.config, name)
    weights = first.state_dict()
    shapes = [{key: tuple(value.shape) for key, value in own.state_dict().items()} for own in (first, second)]
    if shapes[0] != shapes[1]:
        assert name in ROLES["shapes"]
        return
    del weights["lm_head.weight"]  # tied, it would take the place of the embeddings
    second.load_state_dict(weights, strict=False)
    if name in IDS:
        assert name in ROLES["segments"]
        return
    (states, vectors), (other_states, other_vectors) = read(first), read(second)
    if not torch.equal(states, other_states):
        assert name in ROLES["segments"]
        assert name not in IGNORED_BY_SEGMENTS
        assert _digest(first.model) != _digest(second.model)
    if vectors.shape != other_vectors.shape or not torch.equal(vectors, other_vectors):
        assert name in ROLES["vectors"]
        assert first.fingerprint() != second.fingerprint()
    elif name != "max_position_embeddings":
        assert name not in ROLES["vectors"], "it makes catalogues stale for nothing"
        assert first.fingerprint() == second.fingerprint()


def test_settings_of_what_is_off_leave_catalogues_valid():
    """Version 0.1 had none of these: its catalogues load."""
    plain = build().fingerprint()
    assert build(tfidf_dim=32).fingerprint() == plain
    assert build(max_position_embeddings=600).fingerprint() == plain
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    lengths = [build(rope_parameters=dynamic, max_position_embeddings=length).fingerprint() for length in (512, 600)]
    assert len({plain, *lengths}) == 3
    sizes = [build(tfidf_weight=1.0, tfidf_dim=size).fingerprint() for size in (32, 1024)]
    assert len({plain, *sizes}) == 3
