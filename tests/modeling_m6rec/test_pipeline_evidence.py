"""The pipeline ranks by what is learnt and what is counted, and says exactly which is which."""

import copy
import dataclasses
import json

import pytest

from m6rec import Catalogue, Evidence, M6RecForRecommendation, RecommendationPipeline, ranking_m6rec
from m6rec.catalogue_m6rec import Past
from m6rec.ranking_m6rec import Scorer
from tests.modeling_m6rec.shop import ITEMS, REQUEST, SOURCE, build, processor

MODEL, PROCESSOR = build(), processor()
EVENTS = [
    {"user_id": f"u{user}", "item_id": f"i{(3 * user + step * step) % 8}", "timestamp": 1000.0 * step + user}
    for user in range(12)
    for step in range(5)
]
RULE = Evidence(learnt=0.4, popularity=0.1, again=0.2, texts=0.3)
TOLD = {"user": {"name": "hiking fan", "user_id": "yoga", "age": 3}, "facts": ["has a red tent"], "history": []}
REQUESTS = [SOURCE, {**SOURCE, "history": SOURCE["history"][:2]}, TOLD, "wool", REQUEST]


def make(rule=RULE):
    catalogue = Catalogue.from_dataset(ITEMS, MODEL, PROCESSOR, progress=False, evidence=rule)
    if rule is not None:
        catalogue.observe(EVENTS)
    return RecommendationPipeline(model=MODEL, processor=PROCESSOR, device="cpu", catalogue=catalogue)


@pytest.fixture(scope="module")
def recommend():
    return make()


def past(request):
    """Who the user is; two items with ids, and socks without, which count by their words; and a search."""
    if request is TOLD or request == "wool":
        return [Past(None, "hiking fan has a red tent" if request is TOLD else "wool", "profile")]
    socks = Past(None, PROCESSOR.item_texts(["merino hiking socks"])[0])
    events = ["i1", socks, Past(None, "winter hiking", "query"), "i3"]
    return [Past(None, "A woman in her thirties", "profile"), *events[: len(request["history"])]]


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_a_score_is_the_cosine_and_what_evidence_adds(recommend, request_):
    asked = {"task": "retrieval", "top_k": 8, "exclude_seen": False}
    cosines = {row["item"]: row["score"] for row in make(rule=None)(request_, **asked)}
    rows = recommend(request_, **asked)
    assert {row["item"] for row in rows} == cosines.keys()
    for row in rows:
        item = Past(row.get("item_id"), row["item"])
        added = recommend.catalogue.evidence_scores(past(request_), [item]).sum()[0]
        assert row["score"] == pytest.approx(RULE.learnt * cosines[row["item"]] + added, abs=1e-5)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
@pytest.mark.parametrize("rule", [RULE, Evidence(learnt=0)], ids=["both", "untrained"])
def test_parts_sum_to_the_score(rule, request_):
    rows = make(rule)(request_, task="retrieval", explain=True, top_k=4)
    assert rows
    for row in rows:
        parts = row["parts"]
        six = ("learnt", "words", "transitions", "texts", "popularity", "profile")
        assert sum(parts[name] for name in six) == pytest.approx(row["score"], abs=1e-9)
        for name in ("words", "transitions", "texts"):
            assert sum(reason[name] for reason in row["because"]) == pytest.approx(parts[name], abs=1e-9)
        whole = sum(reason["contribution"] for reason in row["because"]) + parts["together"] + parts["popularity"]
        whole += parts["profile"]
        assert whole == pytest.approx(row["score"], abs=1e-9)
        for reason in row["because"]:
            own = reason["learnt"] + reason["words"] + reason["transitions"] + reason["texts"]
            assert reason["contribution"] == pytest.approx(own, abs=1e-12)
    events = {reason["event"].split()[0]: reason for reason in rows[0]["because"]}
    if "searched" in events:
        assert events["searched"]["transitions"] == 0, "a query is no item"
        assert any(reason["words"] > 0 for row in rows for reason in row["because"] if "searched" in reason["event"])


@pytest.mark.parametrize("rule", [RULE, Evidence(learnt=0)], ids=["both", "untrained"])
def test_what_the_user_is_says_and_searches_finds_items(rule, monkeypatch):
    recommend = make(rule)
    for request in ("yoga", {"facts": ["a yoga fan"]}, {"history": [{"event": "searched", "query": "yoga"}]}):
        rows = recommend(request, explain=True, top_k=8)
        parts = {row["item_id"]: row["parts"] for row in rows}
        found = {name: own["profile"] + own["words"] + own["texts"] for name, own in parts.items()}
        assert max(found, key=found.get) == "i2" and found["i2"] > 0.02, request
    said = []
    monkeypatch.setattr(ranking_m6rec.logger, "warning_once", said.append)
    recommend({"facts": ["a yoga fan"]})
    assert not said, "evidence reads facts"
    quiet = make(dataclasses.replace(rule, profile=0, queries=0))
    quiet({"facts": ["a yoga fan"]})
    assert ["`facts`" in text for text in said] == [True]
    assert all(own["profile"] == own["words"] == 0 for own in (row["parts"] for row in quiet("yoga", explain=True)))


def test_evidence_reads_items_and_queries_before_those_that_the_model_reads():
    recommend = make(Evidence(learnt=0, recency=(1, 1, 1)))
    recommend.processor = processor(max_events=1)
    history = [{"item": ITEMS[2]}, {"event": "searched", "query": "wool"}]
    history += [{"item": ITEMS[4]}, {"event": "looked"}, {"item": ITEMS[1]}]
    row = next(row for row in recommend({"history": history}, explain=True) if row["item_id"] == "i6")
    because = {reason["event"]: reason["words"] for reason in row["because"]}
    assert len(because) == 4, "the earlier verb is not read, and names nothing"
    assert max(because, key=because.get) == "wool"


def test_items_of_one_time_count_alike_also_before_those_that_the_model_reads():
    """A tie is read whole, however many of its events the ages and the model reach."""
    recommend = make(Evidence(learnt=0, recency=(1, 0.5), share_ties=True))
    recommend.processor = processor(max_events=1)
    times = ["2024-01-01", "2024-01-02", "2024-01-02T00:00Z", 1704153600, "2024-01-03"]
    history = [{"item": ITEMS[own], "timestamp": time} for own, time in zip((0, 2, 4, 5, 1), times)]
    history.insert(2, {"event": "searched", "query": "wool", "timestamp": "2024-01-02"})
    rows = recommend({"history": history}, explain=True, top_k=8, exclude_seen=False)
    tied = [Past(f"i{own}", time=1704153600.0) for own in (2, 4, 5)]
    expected = [tied[0], Past(None, "wool", "query"), *tied[1:], Past("i1", time=1704240000.0)]
    weights = [weight for _, weight in recommend.catalogue._state.counted.weighed(expected)]
    assert weights == pytest.approx([0.5 / 3, 0.0, 0.5 / 3, 0.5 / 3, 1.0])
    for row in rows:
        added = recommend.catalogue.evidence_scores(expected, [Past(row["item_id"])]).sum()[0]
        assert row["score"] == pytest.approx(added, abs=1e-9)
    untimed = [{name: value for name, value in own.items() if name != "timestamp"} for own in history]
    assert recommend({"history": untimed}, top_k=8) != recommend({"history": history}, top_k=8)
    with pytest.raises(ValueError, match=r"history\[0\].timestamp"):
        recommend({"history": [{**history[0], "timestamp": "then"}, *history[1:]]})


def test_the_learnt_part_of_an_event_is_the_cosine_without_it(recommend):
    row = recommend(SOURCE, explain=True, top_k=1)[0]
    asked = {**SOURCE, "candidates": [recommend.catalogue.item(row["item_id"])]}
    plain = make(rule=None)(asked, task="retrieval", explain=True)
    expected = {reason["event"]: reason["contribution"] for reason in plain[0]["because"]}
    for reason in row["because"]:
        assert reason["learnt"] == pytest.approx(RULE.learnt * expected[reason["event"]], abs=1e-6)


def test_an_untrained_catalogue_reads_no_model(monkeypatch):
    recommend = make(Evidence(learnt=0))

    def refuse(*_):
        raise AssertionError("the model was read")

    for name in ("users", "users_without", "scores", "scores_without"):
        monkeypatch.setattr(Scorer, name, refuse)
    rows = recommend(SOURCE, explain=True)
    rule = recommend.catalogue.evidence_scores(past(SOURCE), list(recommend.catalogue))
    scores = dict(zip(recommend.catalogue, rule.sum()))
    assert {row["item_id"]: row["score"] for row in rows} == pytest.approx(
        {name: score for name, score in scores.items() if name not in ("i1", "i3")}
    )


def meets(user, *names):
    return [{"user_id": user, "item_id": name, "timestamp": time} for time, name in enumerate(names)]


def test_new_events_count_in_the_next_answer():
    recommend = make()
    history = {"history": [{"event": "bought", "item": {"item_id": "i6"}}]}
    before = {row["item_id"]: row["score"] for row in recommend(history)}
    recommend.catalogue.observe(meets("x", "i6", "i2"))
    after = {row["item_id"]: row["score"] for row in recommend(history)}
    assert after["i2"] > before["i2"] + 0.05


def test_other_tasks_answer_as_without_evidence(recommend):
    for task in ("click", "rating"):
        rows, others = (each(REQUEST, task=task, explain=True) for each in (recommend, make(rule=None)))
        assert [{**row, "because": 0, "score": 0} for row in rows] == [
            {**row, "because": 0, "score": 0} for row in others
        ]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in others], abs=1e-5)


def test_a_checkpoint_keeps_its_evidence_and_observes_into_it(tmp_path):
    recommend = make()
    recommend.save_pretrained(tmp_path / "shop")
    expected = recommend(SOURCE, explain=True)

    def load():
        model = M6RecForRecommendation.from_pretrained(tmp_path / "shop")
        return RecommendationPipeline(model=model, processor=copy.copy(PROCESSOR), device="cpu")

    again = load()
    assert again(SOURCE, explain=True) == expected
    assert json.loads((tmp_path / "shop" / "catalogue" / "catalogue.json").read_text())["evidence"]["learnt"] == 0.4
    del recommend
    again.catalogue.observe(meets("x", "i3", "i7"))
    assert load()(SOURCE, explain=True) == again(SOURCE, explain=True) != expected
