"""The configuration comes back as it was, refuses what means nothing, and gives models their sizes and spread."""

import json

import pytest
import torch
from transformers import PreTrainedConfig

from m6rec import M6RecConfig, M6RecForRecommendation
from tests.modeling_m6rec.tiny import ALL, build


def test_configuration_round_trips_and_refuses():
    for settings in ALL:
        config = build(settings).config
        again = M6RecConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
        assert again.to_dict() == config.to_dict()
    refused = {
        "num_joint_layers": (0, "num_joint_layers=0"),
        "segment_summary": (0, "segment_summary=0"),
        "skipped_kinds": (["item"], "about"),
        "history_attention": ("both", "both"),
        "vocab_size": ("many", "many"),
        "exit_layers": ([3], r"exit_layers=\[3\]"),
        "rating_values": ([2.0, 1.0], r"\[2.0, 1.0\]"),
        "score_tasks": (["rating", "clicks"], r"'clicks'\] must name some of click, rating, interaction, each once"),
        "loss_weights": ({"clicks": 1.0}, "clicks"),
        "class_weights": ({"click": [1.0]}, "1 weights for 2"),
        "trained_tasks": (["clicking"], "clicking"),
        "label_smoothing": (1.0, "label_smoothing=1.0"),
        "embedding_temperature": (0.0, "embedding_temperature=0.0"),
        "num_key_value_heads": (4, "4"),
        "head_dim": (5, "5"),
        "num_hidden_groups": (9, "num_hidden_groups=9"),
        "norm_position": ("post", "final_norm"),
        "position_embedding_type": ("learned", "joint_positions='segment'"),
    }
    for field, (value, match) in refused.items():
        with pytest.raises(Exception, match=match):
            M6RecConfig.preset("tiny", **{field: value})
    with pytest.raises(Exception, match="segment layers"):
        M6RecConfig.preset("tiny", num_joint_layers=4, segment_summary=1)
    with pytest.raises(Exception, match="segment_pooling='mean' needs segment layers"):
        M6RecConfig.preset("tiny", num_joint_layers=4, segment_pooling="mean")
    with pytest.raises(Exception, match="chooses among classes"):
        M6RecConfig.preset("tiny", score_head="option", rating_loss="regression")
    with pytest.raises(Exception, match="num_options=3"):
        M6RecConfig.preset("tiny", score_head="option", num_options=3)
    with pytest.raises(ValueError, match="'huge'"):
        M6RecConfig.preset("huge")
    with pytest.raises(ValueError, match="segment layers"):
        build({"num_joint_layers": 4}).embed(input_ids=torch.tensor([[4, 40]]))


def test_new_weights_are_drawn_for_the_width_unless_it_is_said_otherwise(tmp_path):
    by_width = M6RecConfig.preset("tiny", vocab_size=500, hidden_size=144, embedding_size=12)
    M6RecForRecommendation(by_width).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["initializer_range"] == 1 / 12
    for range_of_width, given in ((1 / 12, None), (0.02, 0.02)):
        fields = by_width.to_dict() | {"initializer_range": given}
        model = M6RecForRecommendation(M6RecConfig.from_dict(fields))
        assert model.config.initializer_range == pytest.approx(range_of_width, rel=1e-12)
        for part in ("layers.0.self_attn.q_proj", "embeddings.tokens", "layers.3.mlp.down_proj"):
            spread = model.model.get_submodule(part).weight.std().item()
            assert spread == pytest.approx(range_of_width, rel=0.05), part


def test_presets_have_the_papers_sizes():
    with torch.device("meta"):
        base, edge = (M6RecForRecommendation(M6RecConfig.preset(size, vocab_size=30000)) for size in ("base", "edge"))
    assert 300e6 < base.num_parameters() < 360e6
    assert 10e6 < edge.num_parameters() < 14e6


@pytest.mark.parametrize(
    "given",
    [
        {"num_labels": 5},
        {"num_labels": 0},
        {"id2label": {0: "no", 1: "yes"}},
        {"id2label": {"0": "no click", "1": "watch"}},
        {"label2id": {"spam": 1}},
        {"num_labels": 10, "interactions": ["like"]},
    ],
)
def test_outputs_of_the_score_head_follow_from_what_is_scored(given):
    with pytest.raises(ValueError, match=r"num_labels|id2label"):
        M6RecConfig.preset("tiny", **given)
    if "num_labels" in given:
        with pytest.raises(ValueError, match="rating_values"):
            M6RecConfig.preset("tiny", interactions=given.get("interactions")).num_labels = given["num_labels"]


def test_the_number_of_outputs_is_that_of_their_names():
    config = M6RecConfig.preset("tiny", num_labels=10)
    assert config.num_labels == len(config.score_names) == 10
    config.num_labels = 10
    config.interactions = ["like"]
    assert config.num_labels == 8
    same = M6RecConfig.preset("tiny", id2label=M6RecConfig.preset("tiny").id2label)
    assert same.to_dict() == M6RecConfig.preset("tiny").to_dict()
    assert "num_labels" not in same.to_dict()


def test_the_score_head_has_the_outputs_of_its_tasks_in_their_order(tmp_path):
    assert M6RecConfig.preset("tiny").score_slices == {
        "click": slice(0, 2),
        "rating": slice(2, 7),
        "interaction": slice(7, 10),
    }
    config = M6RecConfig.preset("tiny", score_tasks=["interaction", "click"], interactions=["like"])
    assert config.score_names == ["like", "no click", "click"]
    assert config.score_slices == {"interaction": slice(0, 1), "click": slice(1, 3)}
    config.save_pretrained(tmp_path)
    assert M6RecConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    for wrong in ([], ["click", "click"], ["retrieval"]):
        with pytest.raises(ValueError, match="must name some of click, rating, interaction, each once"):
            M6RecConfig.preset("tiny", score_tasks=wrong)
    with pytest.raises(Exception, match=r"unknown task 'rating', choose from \['click'\]"):
        M6RecConfig.preset("tiny", score_tasks=["click"], class_weights={"rating": [1.0] * 5})


def test_the_number_of_outputs_is_refused_when_loading_too(tmp_path):
    M6RecConfig.preset("tiny").save_pretrained(tmp_path)
    assert M6RecConfig.from_pretrained(tmp_path, num_labels=10).num_labels == 10
    with pytest.raises(ValueError, match="num_labels=3"):
        M6RecConfig.from_pretrained(tmp_path, num_labels=3)


def test_attributes_are_read_as_the_library_reads_them():
    config = M6RecConfig.preset("tiny", vocab_size=99)
    assert M6RecConfig.attribute_map == {} and not getattr(config, "is_heterogeneous", False)
    for name in (*vars(config), "num_segment_layers", "kind_token_ids", "_attn_implementation", "to_dict"):
        assert getattr(config, name) == PreTrainedConfig.__getattribute__(config, name)
    with pytest.raises(AttributeError, match="absent"):
        config.absent
