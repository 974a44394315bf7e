"""Explanations of a report are checked against the contributions of the model's own score."""

import pytest

from m6rec import RecommendationPipeline
from m6rec.train.evaluation.checked_texts import checks_report, contributions
from m6rec.writing_m6rec import Vocabulary
from tests.modeling_m6rec.shop import ITEMS, build, processor

PROCESSOR = processor()
REQUESTS = [
    {"history": [{"event": "clicked", "item": ITEMS[own]} for own in history], "candidates": [ITEMS[item]]}
    for history, item in [((1, 2), 0), ((3, 5), 6), ((6, 7), 2)]
]


@pytest.mark.parametrize(
    ("trained", "task"),
    [(["writing", "retrieval"], "retrieval"), (["click", "writing"], "click"), (["writing"], "plausibility")],
)
def test_contributions_are_those_of_the_first_trained_ranking_task(trained, task):
    model = build(trained_tasks=trained)
    recommend = RecommendationPipeline(model=model, processor=PROCESSOR, device="cpu")
    found = contributions(model, PROCESSOR, REQUESTS)
    expected = [recommend(request, task=task, explain=True)[0]["because"] for request in REQUESTS]
    for own, other in zip(found, expected):
        assert [event["event"] for event in own] == [event["event"] for event in other]
        assert [event["contribution"] for event in own] == pytest.approx(
            [event["contribution"] for event in other], abs=1e-5
        )


def test_rates_by_hand():
    events = [[f"clicked {ITEMS[own]['title']}" for own in history] for history in ((1, 2), (3, 5), (6, 7))]
    because = [[{"event": text, "contribution": 1 - place} for place, text in enumerate(own)] for own in events]
    vocabulary = Vocabulary.of(ITEMS, PROCESSOR)
    # Own: names the event that contributed; names the other one; names nothing. With the next request: 0 -> 1 names
    # its first event, 1 -> 2 none, 2 -> 0 none.
    texts = ["you like the men's hooded jacket and trekking poles", "a steel water bottle, sport", "good"]
    report = checks_report(texts, REQUESTS, because, vocabulary, PROCESSOR)
    assert report == {
        "naming_rate": pytest.approx(2 / 3),
        "agreement": 1 / 2,
        "unsupported": 0,
        "shuffled_naming_rate": pytest.approx(1 / 3),
        "shuffled_agreement": 1,
    }
    silent = checks_report(["x", "y"], REQUESTS[:2], because, vocabulary, PROCESSOR)
    assert silent == {"naming_rate": 0, "shuffled_naming_rate": 0, "unsupported": 0}
