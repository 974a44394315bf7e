"""Tiny random models and requests as lists of ids, shared by the tests of the model.

Padding is 3 here, not 0: an id that is used in place of the pad id would show.
"""

import itertools
import random

import pytest
import torch

from m6rec import M6RecConfig, M6RecForRecommendation
from m6rec.layout_m6rec import layout
from tests.fast import some

OTHER, UNK, MASK, PAD, SOURCE, SOURCE_END, BOS, EOS, SEG = range(9)
USER, EVENT, AGE, ITEM, NOW, STAT, FACT, TEXT, OPTION = range(9, 18)
OPTIONS = range(18, 29)
VOCAB, WORDS = 77, range(29, 77)
IDS = {
    "vocab_size": VOCAB,
    "unk_token_id": UNK,
    "mask_token_id": MASK,
    "pad_token_id": PAD,
    "source_token_id": SOURCE,
    "source_end_token_id": SOURCE_END,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "segment_token_id": SEG,
    "first_kind_token_id": USER,
    "first_option_token_id": OPTIONS[0],
    "num_options": len(OPTIONS),
}
PLANS = ("flat", "compact", "shared_prefix", "cached")

READINGS = [
    ("causal", "causal", "request"),
    ("causal", "bidirectional", "segment"),
    ("bidirectional", "causal", "segment"),
    ("bidirectional", "bidirectional", "request"),
]
"""History attention, segment attention and joint positions: half of the combinations, in which every two values meet.
The property tests draw from all."""
GRID = [
    {
        "num_joint_layers": joint,
        "history_attention": history,
        "segment_attention": segment,
        "segment_summary": summary,
        "joint_positions": positions,
    }
    for joint, (history, segment, positions) in itertools.product((1, 2, 4), READINGS)
    for summary in ((None,) if joint == 4 else (None, 1, 2))
]
BERT = {
    "norm_type": "layer",
    "norm_position": "post",
    "final_norm": False,
    "embedding_norm": True,
    "type_vocab_size": 2,
    "position_embedding_type": "learned",
    "joint_positions": "segment",
    "gated_mlp": False,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "lm_head_transform": True,
    "lm_head_bias": True,
}
BLOCKS = [
    {**BERT, "num_joint_layers": 2, "history_attention": "bidirectional", "segment_summary": 1, "bow_embeddings": True},
    {**BERT, "num_joint_layers": 4, "joint_positions": "request", "tie_word_embeddings": True},
    {"num_joint_layers": 3, "num_hidden_groups": 1, "embedding_size": 20, "tie_word_embeddings": True},
    {"num_joint_layers": 1, "num_hidden_groups": 2, "qk_norm": True, "score_head": "option", "segment_summary": 2},
    {
        "num_joint_layers": 2,
        "segment_summary": 1,
        "skipped_kinds": ["event"],
        "tfidf_weight": 0.3,
        "entry_norm": True,
    },
    {
        "num_joint_layers": 2,
        "exit_layers": [1],
        "rating_loss": "regression",
        "norm_type": "layer",
        "bow_embeddings": True,
    },
    {"num_joint_layers": 1, "written_attention": "source", "segment_summary": 1, "bow_embeddings": True},
    {
        "num_joint_layers": 2,
        "written_attention": "source",
        "norm_position": "both",
        "embedding_scale": 3.0,
        "attention_scale": 0.5,
        "local_layers": [0, 3],
        "local_window": 4,
        "local_rope_theta": 90.0,
    },
    {
        "num_joint_layers": 2,
        "written_attention": "source",
        "history_attention": "bidirectional",
        "segment_pooling": "mean",
        "skipped_kinds": ["event"],
    },
    {**BERT, "num_joint_layers": 2, "written_attention": "source", "segment_attention": "causal"},
]
SMALL = [
    GRID[0],
    {**GRID[0], "segment_summary": 1, "segment_attention": "bidirectional", "bow_embeddings": True, "entry_norm": True},
    {**GRID[0], "num_joint_layers": 2, "history_attention": "bidirectional", "segment_summary": 2},
    {"num_joint_layers": 4},
    {"num_joint_layers": 1, "written_attention": "source", "segment_summary": 2, "qk_norm": True},
]
ALL = GRID + BLOCKS


def name(config):
    return "-".join(str(value)[:4] for value in config.values())


def pairwise(configs, size=2):
    """Some of the configurations, in which each two values meet that meet in any of them; or all that `size` says."""

    def fields(config):
        return set(itertools.combinations(((name, str(value)) for name, value in config.items()), size))

    found, missing = [], set().union(*map(fields, configs))
    while missing:
        found.append(max(configs, key=lambda config: len(fields(config) & missing)))
        missing -= fields(found[-1])
    return found


everywhere = pytest.mark.parametrize("settings", some(ALL, pairwise(ALL, 1)), ids=name)
"""Marks a test that holds for every configuration and is run, where time counts, for each value of each field."""
by_pairs = pytest.mark.parametrize("settings", some(ALL, [*pairwise(GRID), *BLOCKS]), ids=name)
"""Marks one that is run there for each two values that may meet."""
small = pytest.mark.parametrize("settings", SMALL, ids=name)
"""Marks a test for which a few configurations are enough."""
few = pytest.mark.parametrize("settings", some(SMALL, [SMALL[2], SMALL[-1]]), ids=name)
"""Marks a costly one of these: a history read in both directions, and a source that written tokens see."""
causal = [settings for settings in GRID if settings["history_attention"] == "causal"]
causal = pytest.mark.parametrize("settings", some(causal, pairwise(causal)), ids=name)
"""Marks a test of a history that is read causally."""


def build(settings, **more):
    """A tiny random model whose outputs vary: untied head, wide initial weights, memories that hold something."""
    torch.manual_seed(0)
    fields = {
        **IDS,
        "num_key_value_heads": 3,
        "num_item_embeddings": 9,
        "max_events": 8,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
    }
    config = M6RecConfig.preset("tiny", **{**fields, **settings, **more})
    model = M6RecForRecommendation(config).eval()
    if model.model.word_memory is not None:
        torch.nn.init.normal_(model.model.word_memory.weight)
    if model.model.word_sketch is not None:
        model.model.word_sketch.fit([[word for word in WORDS if word % rank == 0] for rank in range(1, 9)])
    return model


def close(left, right, **bounds):
    torch.testing.assert_close(left, right, **{"rtol": 1e-5, "atol": 1e-5, "equal_nan": True, **bounds})


def config_of_ids(**more):
    return M6RecConfig.preset("tiny", **IDS, **more)


class Writer:
    """Makes random requests as lists of ids."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def segment(self, kind, low=1, high=4):
        return [kind, *self.random.choices(WORDS, k=self.random.randint(low, high)), SEG]

    def event(self):
        age = self.segment(AGE) if self.random.random() < 0.5 else []
        return self.segment(EVENT, 1, 1) + age + self.segment(ITEM, 1, 5)

    def head(self, events):
        return [SOURCE, *self.segment(USER), *itertools.chain(*(self.event() for _ in range(events)))]

    def source(self, events=3):
        options = [OPTION, *OPTIONS[:2], SEG] if events % 2 else []
        return self.head(events) + self.segment(NOW) + options + [SOURCE_END]

    def candidate(self):
        stat = self.segment(STAT) if self.random.random() < 0.5 else []
        return [BOS, *self.segment(ITEM, 1, 5), *stat, EOS]

    def text(self):
        return [BOS, TEXT, *self.random.choices(WORDS, k=self.random.randint(1, 5)), EOS]

    def prompt(self, events=2):
        about = self.segment(ITEM) if events % 2 else []  # an explanation of a given item
        return self.source(events) + [BOS, *about, TEXT, *self.random.choices(WORDS, k=self.random.randint(0, 3))]


def pad(rows, side="right"):
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    rows = [row + extra if side == "right" else extra + row for row, extra in zip(rows, fill)]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def item_rows(ids):
    """A row of item memory at the [SEG] of each [ITEM] segment, by the ids before it."""
    lay = layout(ids, None, config_of_ids())
    return torch.where((ids == SEG) & (lay.kind == 4), torch.where(lay.valid, ids, 0).cumsum(1) % 9 + 1, 0)


def states(model, ids, **more):
    with torch.no_grad():
        return model.model(ids, **more).last_hidden_state


def scores(model, batch, **more):
    with torch.no_grad():
        return model(**batch, return_logits=False, **more).scores
