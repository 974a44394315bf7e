"""The list of item features: each owns its weights and settings, and a new one needs no other place."""

import peft
import pytest
import torch
from torch import nn

from m6rec import M6RecConfig, M6RecForRecommendation, SegmentCache
from m6rec.configuration_m6rec import ROLES
from m6rec.item_features_m6rec import (
    ITEM_FEATURES,
    ItemFeature,
    feature_weights,
    features_at,
    reads_item_rows,
    vector_width,
)
from m6rec.layout_m6rec import closes_item, item_layout
from m6rec.modeling_m6rec import load_adapted
from tests.modeling_m6rec.conversion.backbones import own_tokenizer, tiny
from tests.modeling_m6rec.tiny import EVENT, ITEM, PLANS, SEG, VOCAB, Writer, build, close, item_rows, pad

ON = {"num_item_embeddings": 9, "bow_embeddings": True, "tfidf_weight": 0.4, "cold_item_bias": 0.3}
OFF = {"num_item_embeddings": 0, "bow_embeddings": False, "tfidf_weight": 0.0, "cold_item_bias": 0.0}
TWO_STAGES = {"num_joint_layers": 2}


def test_each_feature_owns_its_settings_and_they_have_roles():
    owned = [name for feature in ITEM_FEATURES for name in feature.settings]
    assert len(owned) == len(set(owned))
    assert {feature.settings[0] for feature in ITEM_FEATURES} == set(ON)
    for feature in ITEM_FEATURES:
        own = [role for role, names in ROLES.items() if feature.settings[0] in names]
        assert (feature.weights is not None) == ("shapes" in own)
        assert feature.needs is None or any(feature.needs in other.settings for other in ITEM_FEATURES)


@pytest.mark.parametrize("feature", ITEM_FEATURES, ids=lambda feature: type(feature).__name__)
def test_a_feature_that_is_on_has_the_weights_that_it_declares_and_no_others(feature):
    needed = {} if feature.needs is None else {feature.needs: ON[feature.needs]}
    name = feature.settings[0]
    without, model = build({**TWO_STAGES, **OFF, **needed}), build({**TWO_STAGES, **OFF, **needed, name: ON[name]})
    assert not feature.is_on(without.config) and feature.is_on(model.config)
    more = model.state_dict().keys() - without.state_dict().keys()
    assert more or feature.weights is None
    assert all(key.startswith(f"model.{feature.weights}.") for key in more)
    added = feature.width(model.config) if "vectors" in feature.places else 0
    assert vector_width(model.config) == vector_width(without.config) + added
    assert reads_item_rows(model.config) or not feature.reads_rows


def test_all_that_version_0_1_names_is_in_the_list():
    assert feature_weights() == ("model.item_memory.", "model.word_memory.", "model.word_sketch.")


DECLARED = {"weights": None, "settings": ("cold_item_bias",), "places": ("vectors",)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": ...}, "does not declare weights"),
        ({"settings": ...}, "does not declare settings"),
        ({"places": ...}, "does not declare places"),
        ({"settings": ()}, r"settings=\(\)"),
        ({"places": ("somewhere",)}, "somewhere"),
        ({"settings": ("made_up",)}, r"without a role in ROLES of the configuration: \['made_up'\]"),
        ({"weights": "made_up"}, "needs the role 'shapes'"),
    ],
)
def test_a_feature_that_does_not_declare_what_it_owns_is_refused(changed, message):
    declared = {name: value for name, value in {**DECLARED, **changed}.items() if value is not ...}
    with pytest.raises(TypeError, match=message):
        type("Undeclared", (ItemFeature,), declared)()
    type("Declared", (ItemFeature,), DECLARED)()


def test_words_of_items_that_stand_alone_are_those_in_rows():
    network, writer = build({**TWO_STAGES, "bow_embeddings": True}).model, Writer(2)
    batch = pad([*(writer.segment(ITEM, 1, 6) for _ in range(9)), [ITEM, SEG]])
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    (feature,) = features_at("segments", network.config)
    with torch.no_grad():
        fast, slow = (
            of_items(feature, network, ids, item_layout(ids, valid))
            for of_items in (type(feature).of_items, ItemFeature.of_items)
        )
    assert torch.equal(fast, slow) and fast[:9].any(1).all() and not fast[9].any()


# ---------------------------------------------------------------------------------------------------- a made-up feature


class Shelf(nn.Module):
    """A number of each row and one of each word."""

    def __init__(self, rows, words):
        super().__init__()
        self.rows, self.words = nn.Parameter(torch.empty(rows)), nn.Parameter(torch.empty(words))


class Shelves(ItemFeature):
    """Where an item lies: by its row in its state, by its last word in its segment, and as a part of its vector."""

    weights = "shelf"
    settings = ("shelf_height",)
    places = ("segments", "states", "vectors")
    reads_rows = True

    def make(self, config):
        return Shelf(config.num_item_embeddings + 1, config.vocab_size) if config.shelf_height else None

    def reset(self, module):
        if isinstance(module, Shelf):
            with torch.no_grad():
                module.rows.copy_(torch.arange(len(module.rows)) / 10)
                module.words.fill_(0.5)

    def resize_items(self, network, rows):
        self._resize(network, "rows", rows + 1)

    def resize_words(self, network, words):
        self._resize(network, "words", words)

    def _resize(self, network, name, size):
        module = self.module(network)
        if module is not None:
            old = getattr(module, name)
            new = nn.Parameter(torch.cat((old, old.new_zeros(size)))[:size].detach().clone())
            setattr(module, name, new)

    def in_rows(self, network, ids, lay):
        closing = closes_item(ids, lay, network.config)
        return (closing * self.module(network).words[ids.roll(1, 1)])[..., None].expand(-1, -1, 36)

    def add(self, network, states, embedding_ids):
        return states + self.module(network).rows[embedding_ids][..., None]

    def width(self, config):
        return 1

    def row_vectors(self, network, rows):
        return torch.ones(*rows.users.shape, 1), self._heights(network, rows.embedding_ids)

    def item_vectors(self, network, items):
        return self._heights(network, items.embedding_ids)

    def _heights(self, network, embedding_ids):
        return network.config.shelf_height * self.module(network).rows[embedding_ids][..., None]


@pytest.fixture
def shelves(monkeypatch):
    for role in ("shapes", "vectors"):
        monkeypatch.setitem(ROLES, role, (*ROLES[role], "shelf_height"))
    feature = Shelves()
    monkeypatch.setattr(M6RecConfig, "shelf_height", 0.0, raising=False)
    ITEM_FEATURES.append(feature)
    yield feature
    ITEM_FEATURES.remove(feature)


def tall(**more):
    return build({**TWO_STAGES, "shelf_height": 2.0, **more})


@pytest.mark.usefixtures("shelves")
def test_a_made_up_feature_is_read_in_every_plan_and_of_items_alone():
    model, writer = tall(), Writer(5)
    batch = pad([writer.source(n) + writer.candidate() for n in (3, 0, 5)])
    batch["item_embedding_ids"] = item_rows(batch["input_ids"])
    with torch.no_grad():
        flat = model(**batch, plan="flat")
        for plan in PLANS[1:]:
            out = model(**batch, plan=plan, segment_cache=SegmentCache())
            for field in ("scores", "user_vectors", "item_vectors"):
                close(getattr(out, field), getattr(flat, field))
        assert flat.item_vectors.shape[-1] == vector_width(model.config) == model.config.embedding_dim + 1
        segment = [ITEM, 40, 41, SEG]
        ids = torch.tensor([[*[4, EVENT, 30, SEG], *segment]])
        inside = model(input_ids=ids, item_embedding_ids=torch.tensor([[0] * 7 + [5]])).item_vectors[0]
        alone = model.embed_items(torch.tensor([segment]), memory_ids=torch.tensor([5]))
        close(inside, alone)
        assert alone[0, -1] == 2.0 * 0.5
        before = model.embed_items(torch.tensor([segment]), memory_ids=torch.tensor([5]))
        model.model.shelf.words[41] += 1
        assert not torch.allclose(model.embed_items(torch.tensor([segment]), memory_ids=torch.tensor([5])), before)


@pytest.mark.usefixtures("shelves")
def test_a_made_up_feature_is_initialised_saved_loaded_resized_and_in_the_fingerprint(tmp_path):
    model = tall()
    assert torch.equal(model.model.shelf.rows, torch.arange(10) / 10) and (model.model.shelf.words == 0.5).all()
    assert build(TWO_STAGES).model.shelf is None
    with torch.no_grad():
        model.model.shelf.rows[3] = 7.0
    model.save_pretrained(tmp_path)
    again = M6RecForRecommendation.from_pretrained(tmp_path)
    assert again.config.shelf_height == 2.0
    assert torch.equal(again.model.shelf.rows, model.model.shelf.rows)
    digest = model.fingerprint()
    assert again.fingerprint() == digest
    with torch.no_grad():
        again.model.shelf.words[1] += 1e-3
    assert again.fingerprint() != digest
    model.config.shelf_height = 1.0
    assert model.fingerprint() != digest
    model.resize_item_embeddings(12)
    model.resize_token_embeddings(VOCAB + 2)
    assert (len(model.model.shelf.rows), len(model.model.shelf.words)) == (13, VOCAB + 2)
    assert model.model.shelf.rows[3] == 7.0 and not model.model.shelf.rows[10:].any()


@pytest.mark.usefixtures("shelves")
def test_a_made_up_feature_comes_with_an_adapter_whose_base_has_none(tmp_path):
    build(TWO_STAGES).save_pretrained(tmp_path / "base")
    model = M6RecForRecommendation.from_pretrained(tmp_path / "base", shelf_height=2.0)
    with torch.no_grad():
        model.model.shelf.rows.fill_(3.0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["shelf"]))
    tuned.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    settings = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    loaded = load_adapted(M6RecForRecommendation, tmp_path / "adapter", settings)
    shelf = loaded.model.shelf
    assert (shelf.modules_to_save["default"].rows == 3.0).all()
    assert not shelf.original_module.rows.any(), "what stands in its place in the base is the same each time"


@pytest.mark.usefixtures("shelves")
def test_a_made_up_feature_is_new_to_a_backbone(monkeypatch):
    monkeypatch.setattr(M6RecConfig, "shelf_height", 2.0)
    model = M6RecForRecommendation.from_backbone(tiny("bert"), 1, own_tokenizer("bert"))
    assert (model.model.shelf.words == 0.5).all()
