"""What a cache returns is what the model would compute, or nothing: in memory, on disk, and whatever has changed."""

import copy
import errno
import json
import pickle
import threading
from collections import OrderedDict

import peft
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from transformers import pipeline

from m6rec import Catalogue, M6RecForRecommendation, RecommendationPipeline, SegmentCache, segment_cache_m6rec
from m6rec.layout_m6rec import SegmentKey
from tests.fast import examples, meet
from tests.modeling_m6rec import shop
from tests.modeling_m6rec.faults import Faults, finish, fork
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, processor
from tests.modeling_m6rec.tiny import EVENT, GRID, ITEM, TEXT, Writer, build, close, pad, scores

TWO_STAGES = next(s for s in GRID if s["num_joint_layers"] == 2 and s["segment_attention"] == "causal")
NETWORK = build(TWO_STAGES).model


def texts(count=12, seed=0):
    """Distinct segments: given, and written or a document with the same ids."""
    writer = Writer(seed)
    found = [SegmentKey(0, tuple(writer.segment(kind, 1, 9))) for kind in (ITEM, EVENT) for _ in range(count // 2)]
    same = found[0].ids
    return list(dict.fromkeys([*found, *(SegmentKey(mode, same) for mode in (1, 2)), SegmentKey(0, (TEXT,))]))


def read(network, segments, cache=None):
    """States of segments that are read one by one, so that each is computed in the same shape."""
    with torch.no_grad():
        return [network.encode_segments([segment], cache)[0] for segment in segments]


def equal(left, right):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def counted(cache):
    return cache.hits, cache.misses, cache.disk_hits


# --------------------------------------------------------------------------------------------------------- in memory


class MemoryTier(RuleBasedStateMachine):
    """Puts and gets at random, against a plain table that keeps the same order."""

    def __init__(self):
        super().__init__()
        self.cache, self.table = SegmentCache(max_bytes=100), OrderedDict()
        self.hits = self.misses = 0

    @initialize()
    def begin(self):
        self.owner = self.cache.serve(NETWORK)

    @rule(name=st.integers(0, 9), size=st.integers(1, 30), value=st.floats(width=32, allow_nan=False))
    def put(self, name, size, value):
        states = torch.full((size, 1), value)
        self.cache.put(self.owner, SegmentKey(0, (name,)), states)
        states.fill_(7.5)  # what a caller does to its own is no matter
        if 4 * size <= 100:
            self.table.pop(name, None)
            self.table[name] = (size, value)
            while sum(4 * size for size, _ in self.table.values()) > 100:
                self.table.pop(next(iter(self.table)))

    @rule(name=st.integers(0, 9))
    def get(self, name):
        found = self.cache.get(self.owner, SegmentKey(0, (name,)))
        if name not in self.table:
            self.misses += 1
            assert found is None
            return
        self.hits += 1
        self.table.move_to_end(name)
        size, value = self.table[name]
        assert torch.equal(found, torch.full((size, 1), value))
        found.fill_(7.5)

    @rule()
    def clear(self):
        self.cache.clear()
        self.table.clear()
        self.owner = self.cache.serve(NETWORK)

    @invariant()
    def it_keeps_and_counts_the_same(self):
        size = sum(4 * size for size, _ in self.table.values())
        asked = self.hits + self.misses
        assert self.cache.stats() == {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / asked if asked else 0.0,
            "segments": len(self.table),
            "bytes": size,
        }
        assert size <= 100


TestMemoryTier = MemoryTier.TestCase
TestMemoryTier.settings = settings(max_examples=examples(60), stateful_step_count=30, deadline=None)


def test_callers_cannot_change_what_is_kept(tmp_path):
    segments, cache = texts(), SegmentCache(directory=tmp_path)
    cold = read(NETWORK, segments)
    for _ in range(2):  # put, then found in memory
        for states in read(NETWORK, segments, cache):
            states.fill_(0)
    again = SegmentCache(directory=tmp_path)
    owner = again.serve(NETWORK)
    for segment in segments:  # found on disk
        again.get(owner, segment).fill_(0)
    assert equal(read(NETWORK, segments, cache), cold) and equal(read(NETWORK, segments, again), cold)


def test_two_models_at_once_in_two_threads_each_get_their_own():
    cache, segments, wrong = SegmentCache(), texts(), []
    networks = [build(TWO_STAGES).model, build(TWO_STAGES).model]
    with torch.no_grad():
        networks[1].layers[0].mlp.down_proj.weight.mul_(1.5)
    cold = [read(network, segments) for network in networks]

    def work(number):
        for _ in range(15):
            if not equal(read(networks[number], segments, cache), cold[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.hits + cache.misses == 2 * 15 * len(segments)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="max_bytes=0"):
        SegmentCache(0)
    with pytest.raises(ValueError, match="max_disk_bytes=-1"):
        SegmentCache(directory=tmp_path, max_disk_bytes=-1)
    for model in (torch.nn.Linear(2, 2), build({"num_joint_layers": 4})):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no segment layers"):
            SegmentCache().warm(model, texts())


# ----------------------------------------------------------------------------------------------- cached against cold


@pytest.mark.parametrize(
    ("kind", "how"),
    meet((torch.float32, torch.bfloat16, torch.float16), ("memory", "disk", "evicting")),
    ids=str,
)
def test_states_are_those_of_a_cold_model_to_the_bit(tmp_path, kind, how):
    network, segments = build(TWO_STAGES).model.to(kind), texts(20)
    cold = read(network, segments)
    assert cold[0].dtype == kind
    bounds = {"max_bytes": 1500, "max_disk_bytes": 6000} if how == "evicting" else {}
    directory = None if how == "memory" else tmp_path
    cache = SegmentCache(directory=directory, **bounds)
    assert equal(read(network, segments, cache), cold) and counted(cache) == (0, len(segments), 0)
    segments, cold = segments[::-1], cold[::-1]  # the last are still there when not all can be
    assert equal(read(network, segments, cache), cold)
    again = SegmentCache(directory=directory, **bounds)  # as after a restart
    segments, cold = segments[::-1], cold[::-1]
    assert equal(read(network, segments, again), cold)
    if how == "memory":
        assert counted(cache) == (len(segments), len(segments), 0)
    elif how == "disk":
        assert cache.disk_hits == 0 and counted(again) == (len(segments), 0, len(segments))
    else:
        assert 0 < again.misses < len(segments) and cache.disk_hits > 0
        assert cache.num_bytes <= 1500 and cache.stats()["disk_bytes"] <= 6000


def test_scores_from_disk_are_those_of_the_flat_plan(tmp_path):
    model, writer = build(TWO_STAGES), Writer(1)
    batch = pad([writer.source(n) + writer.candidate() + writer.candidate() for n in (3, 0, 2)])
    flat = scores(model, batch, plan="flat")
    for _ in range(2):
        cache = SegmentCache(directory=tmp_path)
        close(scores(model, batch, plan="cached", segment_cache=cache), flat)
    assert cache.misses == 0 < cache.disk_hits


def test_a_damaged_file_is_read_anew_and_replaced(tmp_path):
    segments = texts()
    cold = read(NETWORK, segments, SegmentCache(directory=tmp_path))
    for path in tmp_path.glob("??/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    cache = SegmentCache(directory=tmp_path)
    assert equal(read(NETWORK, segments, cache), cold)
    assert cache.misses == cache.stats()["disk_damaged"] == len(segments)
    again = SegmentCache(directory=tmp_path)
    assert equal(read(NETWORK, segments, again), cold) and again.misses == 0


@pytest.mark.parametrize("error", (errno.ENOSPC, errno.EIO))
def test_a_failing_disk_costs_time_only(tmp_path, error):
    recommend = RecommendationPipeline(model=shop.build(), processor=processor(), device="cpu")
    expected = recommend(REQUEST)
    for first in (1, 2, 30):
        cache = SegmentCache(directory=tmp_path / str(first))
        recommend.segment_cache = cache
        with Faults(first, error, lasting=True)():
            assert recommend(REQUEST) == expected
        assert cache.stats()["disk_failures"] > 5


# ------------------------------------------------------------------------------------------------- what has changed


def lora(network):
    config = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(network, peft.LoraConfig(**config))
    model.add_adapter("other", peft.LoraConfig(**config))
    return model.eval()


CHANGES = {
    "weights in place": lambda model, _: model.layers[0].mlp.down_proj.weight.mul_(1.5),
    "an embedding": lambda model, _: model.embeddings.tokens.weight[ITEM].add_(0.5),
    "other weights": lambda model, _: model.load_state_dict(
        {name: value + 0.1 for name, value in model.state_dict().items()}, assign=True
    ),
    "number type": lambda model, _: model.to(torch.bfloat16),
    "configuration": lambda model, _: setattr(model.config, "segment_attention", "bidirectional"),
    "another adapter": lambda _, tuned: tuned.set_adapter("other"),
    "no adapter": lambda _, tuned: tuned.base_model.disable_adapter_layers(),
    "a merged adapter": lambda _, tuned: tuned.merge_adapter(),
    "another scale": lambda model, _: model.layers[0].mlp.down_proj.set_scale("default", 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_gets_no_old_state(tmp_path, change):
    network, segments = build(TWO_STAGES).model, texts()
    tuned = lora(network) if "adapter" in change or "scale" in change else None
    caches = [SegmentCache(), SegmentCache(directory=tmp_path)]
    before, _ = (read(network, segments, cache) for cache in caches)
    with torch.no_grad():
        CHANGES[change](network, tuned)
    cold = read(network, segments)
    assert not equal(cold, before)
    for cache in (*caches, SegmentCache(directory=tmp_path)):
        hits = cache.hits
        assert equal(read(network, segments, cache), cold)
        assert cache.hits - hits == (0 if cache in caches else len(segments))


def test_a_state_of_another_precision_is_not_taken(tmp_path):
    caches, segments = [SegmentCache(), SegmentCache(directory=tmp_path)], texts()
    for cache in caches:
        exact = read(NETWORK, segments, cache)
        with torch.autocast("cpu", torch.bfloat16):
            rough = read(NETWORK, segments, cache)
            assert equal(rough, read(NETWORK, segments)) and not equal(rough, exact)
        assert cache.hits == 0 and equal(read(NETWORK, segments, cache), exact)


def test_a_model_in_the_place_of_a_dead_one_gets_none_of_its_states():
    """Python and PyTorch give new objects the addresses of old ones."""
    cache, segments, places = SegmentCache(), texts(4), []
    for seed in range(12):
        network = build(TWO_STAGES).model
        with torch.no_grad():
            for weight in network.parameters():
                weight.data = weight + seed / 10
        places.append((id(network), *(weight.data_ptr() for weight in network.parameters())))
        assert equal(read(network, segments, cache), read(network, segments))
        del network, weight
    assert cache.hits == 0


def test_a_model_made_in_inference_mode_is_read_anew_each_time(caplog):
    with torch.inference_mode():
        network, segments, cache = build(TWO_STAGES).model, texts(), SegmentCache()
        before = read(network, segments, cache)
        network.layers[0].mlp.down_proj.weight.mul_(1.5)  # which nothing counts
        assert equal(read(network, segments, cache), read(network, segments))
        assert not equal(read(network, segments, cache), before)
    assert cache.hits == 0 and "inference_mode" in caplog.text


def test_the_same_model_is_known_again_whatever_does_not_matter(tmp_path):
    """Saved and loaded, its joint layers, heads and what they read changed, adapters above: the states are the same."""
    model, segments = build(TWO_STAGES), texts()
    cold = read(model.model, segments, SegmentCache(directory=tmp_path / "cache"))
    model.save_pretrained(tmp_path / "model")
    loaded = M6RecForRecommendation.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        loaded.model.layers[3].mlp.down_proj.weight.add_(1)
        loaded.item_projection.weight.add_(1)
    loaded.config.trained_tasks, loaded.config.segment_summary = ["click"], 1
    peft.get_peft_model(loaded, peft.LoraConfig(target_modules=r".*layers\.[23].*q_proj"))
    cache = SegmentCache(directory=tmp_path / "cache")
    assert equal(read(loaded.model, segments, cache), cold) and counted(cache) == (len(segments), 0, len(segments))


@pytest.mark.filterwarnings("ignore:torch.*quantiz")
def test_a_quantized_model_is_known_by_its_packed_weights(tmp_path):
    """PyTorch keeps them in no parameter or buffer, and beside them what is no tensor."""

    def quantized(change=0.0):
        model = build(TWO_STAGES)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] += change
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    model, same, other = quantized(), quantized(), quantized(0.3)
    assert model.fingerprint() == same.fingerprint() != other.fingerprint()
    segments = texts()
    cold = read(model.model, segments, SegmentCache(directory=tmp_path))
    cache = SegmentCache(directory=tmp_path)
    assert equal(read(same.model, segments, cache), cold) and counted(cache) == (len(segments), 0, len(segments))
    cache = SegmentCache(directory=tmp_path)
    assert not equal(read(other.model, segments, cache), cold) and cache.hits == 0


def test_it_takes_no_part_while_segments_learn_or_drop_out(tmp_path):
    network, segments, cache = build(TWO_STAGES, hidden_dropout=0.5).model, texts(), SegmentCache(directory=tmp_path)
    network.encode_segments(segments, cache)  # gradients are on
    network.train()
    read(network, segments, cache)
    assert len(cache) == 0 and not any(tmp_path.iterdir())
    network.freeze_segments()  # read as in serving, also while the rest is trained
    network.encode_segments(segments, cache)
    assert len(cache) == len(segments)


def test_fields_of_a_key_do_not_run_into_each_other():
    owner = SegmentCache().serve(NETWORK)
    keys = {
        segment_cache_m6rec._key(owner._replace(digest=digest), SegmentKey(mode, ids, payload))
        for digest in (b"", b"a")
        for mode in (0, 1, 2)
        for ids in ((1,), (1, 0), (0, 1), (256,), (1, 1), ())
        for payload in (b"", b"a", b"\0", b"\0" * 8)
    }
    assert len(keys) == 2 * 3 * 6 * 4


def test_states_without_a_payload_keep_the_names_that_they_had():
    owner = segment_cache_m6rec.Owner(b"owner", 36, torch.device("cpu"))
    name = "d5fda7b19254007cd4b7029391cd4a417891a05b9fb8a7c79ea8c7a792e80df4"
    assert segment_cache_m6rec._key(owner, SegmentKey(1, (8, 300, 7))) == name


# ------------------------------------------------------------------------------------------------------- the pipeline


def make(cache=None, model=None):
    model, own = model or shop.build(), processor()
    catalogue = Catalogue.from_dataset(ITEMS, model, own, progress=False)
    return RecommendationPipeline(model=model, processor=own, catalogue=catalogue, segment_cache=cache, device="cpu")


NAMES = [{"item_id": item["item_id"]} for item in ITEMS]
ASKED = {"user": "a man", "history": [{"event": "clicked", "item": ITEMS[1]}, {"item": NAMES[6]}], "candidates": NAMES}


def missed_items(recommend, monkeypatch, task):
    """The items that a request has to read."""
    cache, missed = recommend.segment_cache, []
    find, item = type(cache).find, recommend.model.config.kind_token_ids["item"]

    def watched(self, owner, segments):
        found = find(self, owner, segments)
        missed.extend(own for number, own in enumerate(segments) if number not in found and own[1][0] == item)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "find", watched)
        recommend(ASKED, task=task)
    return missed


@pytest.mark.parametrize("tuned", (False, True), ids=("plain", "tuned"))
@pytest.mark.parametrize("where", ("memory", "disk"))
def test_after_warming_no_request_misses_an_item(tmp_path, monkeypatch, where, tuned):
    model = shop.build()
    if tuned:
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    folder = None if where == "memory" else tmp_path
    for task in ("click", "retrieval"):
        recommend = make(SegmentCache(directory=folder), model)
        assert len(missed_items(make(model=model), monkeypatch, task)) == len(ITEMS)  # cold
        recommend.warm(progress=False)
        if where == "disk":
            recommend = make(SegmentCache(directory=folder), model)
        assert missed_items(recommend, monkeypatch, task) == []
        assert recommend.segment_cache.hits >= len(ITEMS)


def test_warming_shows_its_progress_and_says_when_it_cannot_keep_all(monkeypatch, caplog):
    bars = []

    class Bar:
        def __init__(self, total, disable, **_):
            self.total, self.disable, self.done = total, disable, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.done.append(count)

    monkeypatch.setattr(segment_cache_m6rec.logging, "tqdm", Bar)
    monkeypatch.setattr(segment_cache_m6rec, "WARMED_AT_ONCE", 5)
    model, segments = build(TWO_STAGES).train(), texts()
    SegmentCache().warm(model, segments * 2)
    SegmentCache().warm(model.model, segments, progress=False)
    whole, rest = divmod(len(segments), 5)
    for bar in bars:
        assert bar.done == [5] * whole + [rest] * (rest > 0) and bar.total == len(segments)
    assert [bar.disable for bar in bars] == [False, True] and model.training and not caplog.records
    cache = SegmentCache(max_bytes=1500)
    cache.warm(model, segments)
    assert f"max_bytes=1500 holds {len(cache)} of {len(segments)} texts" in caplog.text


def test_a_pipeline_without_items_cannot_be_warmed():
    with pytest.raises(ValueError, match="catalogue"):
        RecommendationPipeline(model=shop.build(), processor=processor(), device="cpu").warm()


def test_processes_share_what_they_read(tmp_path):
    """Three at once on an empty folder, then one that finds everything; all answer the same."""
    shop.build().save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    expected = [row["score"] for row in make()(REQUEST)]

    def work(name):
        cache = SegmentCache(directory=tmp_path / "cache")
        recommend = pipeline("recommendation", model=str(tmp_path / "model"), segment_cache=cache, device="cpu")
        answers = [row["score"] for row in recommend(REQUEST)]
        (tmp_path / name).write_text(json.dumps([answers, cache.stats()]))

    assert [finish(process) for process in [fork(work, name) for name in "abc"]] == [0, 0, 0]
    assert finish(fork(work, "d")) == 0
    found = {name: json.loads((tmp_path / name).read_text()) for name in "abcd"}
    for answers, _ in found.values():  # texts that are read together are rounded together
        assert answers == pytest.approx(expected, abs=1e-5)
    stats = found["d"][1]
    assert stats["misses"] == stats["disk_damaged"] == stats["disk_failures"] == 0
    assert stats["disk_hits"] == stats["hits"] == found["a"][1]["segments"] and stats["hit_rate"] == 1.0
    assert stats["disk_bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").glob("??/*"))
    # 33 bytes of each file are the number type and the digest.
    assert stats["disk_bytes"] == stats["bytes"] + 33 * stats["segments"]


def test_a_pipeline_takes_a_folder(tmp_path):
    make(str(tmp_path))(REQUEST)
    recommend = make(tmp_path)
    recommend(REQUEST, task="retrieval")  # candidates are embedded from the same states
    recommend(REQUEST)
    assert recommend.segment_cache.misses == 0 < recommend.segment_cache.disk_hits


def test_retrieval_among_candidates_reads_texts_once():
    recommend = make()
    first = recommend(REQUEST, task="retrieval")
    misses = recommend.segment_cache.misses
    assert recommend(REQUEST, task="retrieval") == first and recommend.segment_cache.misses == misses
    recommend(SOURCE, task="retrieval")
    assert recommend.segment_cache.misses == misses


@pytest.mark.parametrize(
    "how", (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))), ids=("copy", "pickle")
)
def test_copies_start_empty_and_share_the_folder(tmp_path, how):
    cache = SegmentCache(1234567, tmp_path / "cache", 7654321)
    segments = texts()
    cold = read(NETWORK, segments, cache)
    other = how(cache)
    assert len(other) == 0 and other.max_bytes == 1234567 and other._store.max_bytes == 7654321
    assert equal(read(NETWORK, segments, other), cold) and other.disk_hits == len(segments)
    assert len(how(SegmentCache(99))) == 0 and how(SegmentCache(99)).max_bytes == 99
