"""A compiled model gives the same answers: its stages are compiled, what is kept between calls stays Python."""

import copy

import peft
import pytest
import torch

from m6rec import RecommendationPipeline, SegmentCache
from m6rec.layout_m6rec import SegmentKey
from tests.modeling_m6rec import shop
from tests.modeling_m6rec.tiny import GRID, ITEM, SEG, build, close

SMALL = {"num_hidden_layers": 2, "num_joint_layers": 1}
REQUESTS = [{**shop.REQUEST, "candidates": shop.ITEMS[:count]} for count in (3, 6)]
KEPT = ("hits", "misses", "segments", "bytes")
HOW = {"backend": "eager", "dynamic": True}


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def texts(first, count):
    """Segments of 4 to 9 tokens."""
    return [SegmentKey(0, (ITEM, *range(first, first + 2 + number % 6), SEG)) for number in range(count)]


def kept(cache):
    return {name: cache.stats()[name] for name in KEPT}


def test_segments_are_read_and_kept_as_without_and_none_is_compiled_for_itself(tmp_path):
    network = build({**GRID[0], "num_hidden_layers": 2}).model
    caches = [SegmentCache(), SegmentCache(directory=tmp_path)]
    plain, compiled = caches
    read = torch.compile(lambda segments: network.encode_segments(segments, compiled), **HOW)
    graphs = []
    with torch.no_grad():
        for segments in (texts(30, 5), texts(30, 5), texts(40, 6), texts(50, 4) + texts(30, 5), texts(60, 3)):
            states, offsets = read(segments)
            expected, places = network.encode_segments(segments, plain)
            close(states, expected)
            assert offsets.tolist() == places.tolist()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert kept(compiled) == kept(plain)
    assert compiled.hits == 10
    assert graphs[0] and graphs == graphs[:1] * len(graphs)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, **HOW), peft.PeftModel], ids=["compiled", "tuned"])
def test_what_was_warmed_for_a_wrapped_network_serves_the_network(wrap):
    network, cache = build({**GRID[0], "num_hidden_layers": 2}).model, SegmentCache()
    more = () if wrap is not peft.PeftModel else (peft.LoraConfig(target_modules=["q_proj"]),)
    wrapped = wrap(network, *more)
    cache.warm(wrapped, texts(30, 5), progress=False)
    assert len(cache.find(cache.serve(network), texts(30, 5))) == 5


def answers(model, compiled=lambda pipeline: None, users=False):
    """Answer each request twice, so that the second answer is of what was kept; also say what is kept."""
    recommend = RecommendationPipeline(model, processor=shop.processor(), user_states=users)
    compiled(recommend)
    found = [recommend(request, task="click") for request in REQUESTS for _ in range(2)]
    return found, kept(recommend.segment_cache), users and recommend.user_states.stats()


def in_place(pipeline):
    pipeline.model.compile(**HOW)


def wrapped(pipeline):
    pipeline.model = torch.compile(pipeline.model, **HOW)


@pytest.mark.slow
@pytest.mark.parametrize("users", [False, True])
def test_answers_of_a_compiled_model_are_those_of_the_model(users):
    model = shop.build(**SMALL)
    expected, *counted = answers(model, users=users)
    assert counted[0]["hits"]
    assert not users or counted[1]["hits"]
    for how in (wrapped, in_place):
        found, *counted_by_it = answers(copy.deepcopy(model), how, users)
        assert counted_by_it == counted
        for rows, others in zip(found, expected):
            assert [row["item"] for row in rows] == [row["item"] for row in others]
            close([row["score"] for row in rows], [row["score"] for row in others])
