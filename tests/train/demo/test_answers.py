"""What a demo answers is what the pipeline answers; a visitor's products are theirs alone; bad input is named."""

import copy
import dataclasses

import pytest

from m6rec import Catalogue, Evidence, RecommendationPipeline
from m6rec.train.demo import answers
from m6rec.train.demo.answers import Demo, add_evidence, factors, product_id, weighed
from m6rec.writing_m6rec import WRITING_TASKS
from tests.modeling_m6rec.shop import ITEMS, TITLES, build, processor

MORE = [{"item_id": f"p{n}", "title": f"{TITLES[n % 8]} {n}", "price": n} for n in range(30)]
EVENTS = [{"user_id": f"u{n % 7}", "item_id": f"p{(3 * n + n % 5) % 29}"} for n in range(70)]  # nobody meets p29
HISTORY = ["i1", "p4", "p9"]
TENT = "a red tent for hiking"


def make(evidence=None, events=None, **fields):
    """A pipeline over 38 items, from tiny random weights."""
    own = processor()
    model = build(**fields)
    catalogue = Catalogue.from_dataset([*ITEMS, *MORE], model, own, progress=False, evidence=evidence)
    if events:
        catalogue.observe(events)
    return RecommendationPipeline(model=model, processor=own, device="cpu", catalogue=catalogue)


@pytest.fixture(scope="module")
def recommend():
    return make(Evidence(learnt=0.7), EVENTS)


@pytest.fixture(scope="module")
def demo(recommend):
    return Demo(recommend, {"event": "bought"}, "shop")


def visit(history=HISTORY, **more):
    return {"history": [{"item_id": item} if item in ids() else {"text": item} for item in history], **more}


def ids():
    return {item["item_id"] for item in [*ITEMS, *MORE]}


def events(history=HISTORY):
    return {"history": [{"event": "bought", "item": {"item_id": item}} for item in history]}


def shown(rows):
    return [(row["rank"], row["item_id"], row["item"], round(row["score"], 4)) for row in rows]


def test_lists_are_the_pipelines_at_every_weight(demo, recommend):
    both = recommend(events(), task="retrieval")
    bare = copy.copy(recommend)
    bare.catalogue = copy.copy(recommend.catalogue)
    bare.catalogue.set_evidence(dataclasses.replace(Evidence(learnt=0.7), words=0, transitions=0))
    learnt = bare(events(), task="retrieval")
    bare.catalogue.set_evidence(Evidence(learnt=0))
    words = bare(events(), task="retrieval")
    found = [own["rows"] for own in demo.lists(visit(weights=[0, 1]))["readings"]]
    found += [own["rows"] for own in demo.lists(visit(weights=[0.5]))["readings"]]
    for rows, expected in zip(found, (words, learnt, both), strict=True):
        assert shown(rows) == shown(expected) and len(rows) == 10
    assert len({tuple(row["item_id"] for row in rows) for rows in found}) == 3


def test_a_removed_event_changes_the_list(demo):
    (whole,) = demo.lists(visit(weights=[0.5]))["readings"]
    (part,) = demo.lists(visit(HISTORY[:2], weights=[0.5]))["readings"]
    assert shown(whole["rows"]) != shown(part["rows"])
    assert not {row["item_id"] for row in whole["rows"]} & {*HISTORY}


def test_reasons_sum_to_scores_and_are_the_pipelines(demo, recommend):
    for weight in (0.0, 0.3, 0.5, 1.0):
        (reading,) = demo.lists(visit(weights=[weight]))["readings"]
        names = [row["item_id"] for row in reading["rows"]]
        reasons = demo.reasons(visit(items=names))["items"]
        for row in reading["rows"]:
            parts = {name: reading["factors"][name] * value for name, value in reasons[row["item_id"]]["parts"].items()}
            assert sum(parts.values()) == pytest.approx(row["score"], abs=5e-4)
    expected = {row["item_id"]: row for row in recommend(events(), task="retrieval", explain=True)}
    reasons = demo.reasons(visit(items=list(expected)))["items"]
    for name, row in expected.items():
        for because in row["because"]:
            own = reasons[name]["events"][HISTORY.index(because["item_id"])]
            assert sum(own.values()) == pytest.approx(because["contribution"], abs=5e-4)
            assert own["transitions"] == pytest.approx(because["transitions"], abs=1e-4)
    assert demo.reasons(visit())["items"] == {}


def test_an_invented_product_enters_its_visitors_lists_only(demo, recommend):
    before = demo.lists(visit(weights=[0, 0.5]))
    alone = demo.lists(visit(weights=[0, 0.5], products=[TENT, "steel bottle"]))
    assert [own["text"] for own in alone["products"]] == [TENT, "steel bottle"]
    for reading, old in zip(alone["readings"], before["readings"]):
        found = {row["item_id"]: row for row in reading["products"]}
        assert found.keys() == {product_id(TENT), product_id("steel bottle")}
        for row in found.values():
            assert row["new"] and row["cold"] and 1 <= row["rank"] <= 40 - len(HISTORY)
        kept = [row["item_id"] for row in reading["rows"] if not row["new"]]
        assert kept == [row["item_id"] for row in old["rows"]][: len(kept)]
    again = demo.lists(visit(weights=[0, 0.5]))["readings"]
    assert [shown(own["rows"]) for own in again] == [shown(own["rows"]) for own in before["readings"]]
    assert len(recommend.catalogue) == 38 and not any(row["new"] for own in again for row in own["rows"])


def test_the_rank_of_a_product_is_its_place_in_the_whole_ranking(demo, recommend, monkeypatch):
    own = copy.copy(recommend)
    own.catalogue = copy.copy(recommend.catalogue)
    own.catalogue.add([{"item_id": product_id(TENT), "title": TENT}], own.model, own.processor, progress=False)
    ranked = [row["item_id"] for row in own(events(), task="retrieval", top_k=100)]
    (reading,) = demo.lists(visit(products=[TENT], weights=[0.5]))["readings"]
    place = ranked.index(product_id(TENT)) + 1
    assert [row["rank"] for row in reading["products"]] == [place]
    monkeypatch.setattr(answers, "RANKED", place - 1)
    (reading,) = demo.lists(visit(products=[TENT], weights=[0.5]))["readings"]
    (row,) = reading["products"]
    assert (row["rank"], row["score"], row["item"], row["item_id"]) == (None, None, TENT, product_id(TENT))


def test_texts_and_products_may_be_in_the_history(demo):
    """At the weight of the learnt part alone: one more item changes how rare words are."""
    text = demo.lists(visit([*HISTORY, TENT], weights=[1.0]))
    history = [*visit()["history"], {"item_id": product_id(TENT)}]
    item = demo.lists({**visit(products=[TENT], weights=[1.0]), "history": history})
    assert shown(text["readings"][0]["rows"]) == shown(item["readings"][0]["rows"])
    assert item["readings"][0]["products"] == []  # seen, so that it is not recommended
    names = [row["item_id"] for row in text["readings"][0]["rows"]]
    reasons = demo.reasons(visit([*HISTORY, TENT], items=names))["items"]
    assert all(len(own["events"]) == 4 and all(own["events"]) for own in reasons.values())


def test_items_that_nobody_has_met_are_cold(demo):
    met = {event["item_id"] for event in EVENTS}
    (reading,) = demo.lists({"weights": [1.0]})["readings"]
    assert {row["item_id"] for row in reading["rows"] if row["cold"]} == {r["item_id"] for r in reading["rows"]} - met
    assert demo.about()["counted"]
    words = Demo(make())  # without events: those without an item embedding
    (reading,) = words.lists({"weights": [1.0]})["readings"]
    assert [row["cold"] for row in reading["rows"]] == [
        row["item_id"] not in ("i0", "i3", "i5") for row in reading["rows"]
    ]
    assert not words.about()["counted"]
    texts = Demo(make(num_item_embeddings=0))
    assert not any(row["cold"] for row in texts.lists({})["readings"][0]["rows"])


def test_a_catalogue_without_evidence_gets_words_and_keeps_its_ranking():
    plain = make()
    expected = plain({"history": [{"item": {"item_id": "i1"}}]}, task="retrieval")
    demo = Demo(plain)
    assert demo.about()["weights"] == [0.0, 1.0] and plain.catalogue.evidence is None
    evidence, learnt = demo.lists(visit(["i1"]))["readings"]
    assert shown(learnt["rows"]) == shown(expected)
    assert evidence["rows"][0]["item_id"] in ("p1", "p9", "p17", "p25")  # hooded jackets
    counted = make()
    add_evidence(counted, EVENTS)
    assert counted.catalogue.event_counts()["p3"] == 3 and Demo(counted).about()["weights"] == [0.0, 0.5]


def test_evidence_alone_has_one_reading():
    demo = Demo(make(Evidence(learnt=0), EVENTS))
    assert demo.about()["weights"] == [0.0] and len(demo.lists(visit())["readings"]) == 1


def test_weights_scale_the_parts():
    rule = Evidence(learnt=0.8, words=0.4, transitions=1.0, popularity=0.2, texts=0.1, again=0.3)
    assert weighed(rule, 0.5) == rule
    quarter = weighed(rule, 0.25)
    assert (quarter.learnt, quarter.words) == (0.4, 0.4) and factors(0.25) == (0.5, 1.0)
    late = weighed(rule, 1.0)
    assert late.learnt == 0.8
    assert {late.words, late.transitions, late.popularity, late.texts, late.again} == {0.0}


def test_search_as_you_type(demo):
    def found(words):
        return [own["item_id"] for own in demo.find(words)]

    assert found("") == found("  ") == [] and found("nothing such") == []
    assert found("HIKING") == found("hiking") and demo.find("yoga")[0]["item"].startswith("yoga mat")
    assert len(found("hiking")) == answers.FOUND and all("hiking" in own["item"] for own in demo.find("hiking"))
    assert found("登山") and all("登山" in own["item"] for own in demo.find("登山"))
    assert {*found("mat yoga")} == {*found("yoga mat")} and len(found("mat yoga")) == 5
    counts = [demo._counts[demo._ids.index(name)] for name in found("yoga mat")]
    assert counts == sorted(counts, reverse=True)


def test_the_page_learns_what_there_is(demo):
    about = demo.about()
    assert about["name"] == "shop" and about["items"] == 38 and about["tasks"] == []
    assert len(about["starters"]) == answers.STARTERS and {own["item_id"] for own in about["starters"]} <= ids()


def test_kept_catalogues_are_few(recommend, monkeypatch):
    monkeypatch.setattr(answers, "KEPT", 4)
    demo = Demo(recommend)
    for number in range(9):
        demo.lists(visit(products=[f"product {number}"], weights=[0, 0.5]))
        assert len(demo._kept) <= 4


BAD = [
    ([], TypeError, "expected an object"),
    ({"history": "i1"}, TypeError, "history: expected a list"),
    ({"history": ["i1"]}, TypeError, r"history\[0\]: expected an object"),
    ({"history": [{"item_id": "i1", "text": "x"}]}, TypeError, r"history\[0\]"),
    ({"history": [{"item_id": "nobody"}]}, ValueError, "nobody"),
    ({"history": [{"text": " "}]}, ValueError, r"history\[0\].text: empty"),
    ({"history": [{"text": "x" * 301}]}, ValueError, "301 characters"),
    ({"history": [{"item_id": "i1"}] * 2}, ValueError, "history: an entry is there twice"),
    ({"history": [{"text": str(n)} for n in range(51)]}, ValueError, "51 entries; the demo takes 50"),
    ({"products": [5]}, TypeError, r"products\[0\]: expected a text"),
    ({"products": ["a", "a"]}, ValueError, "products: an entry is there twice"),
    ({"weights": [2]}, ValueError, r"weights\[0\]: 2"),
    ({"weights": [True]}, ValueError, r"weights\[0\]: True"),
    ({"weights": [float("nan")]}, ValueError, r"weights\[0\]: nan"),
    ({"weights": [0, 0, 0]}, ValueError, "weights: 3 entries"),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD)
def test_invalid_states_are_refused(demo, given, kind, message):
    with pytest.raises(kind, match=message):
        demo.lists(given)


def test_a_model_without_a_catalogue_is_refused():
    own = processor()
    bare = RecommendationPipeline(model=build(), processor=own, device="cpu")
    with pytest.raises(ValueError, match="'empty' has no catalogue"):
        Demo(bare, name="empty")


def test_writing_tasks_are_there_if_the_model_has_learnt_them():
    assert {*answers.WRITING} <= {*WRITING_TASKS}
    demo = Demo(make(trained_tasks=["retrieval", "writing"]))
    assert demo.about()["tasks"] == list(answers.WRITING)
    history = visit(["i1"])
    why = demo.write({**history, "task": "explanation", "item_id": "i2"})
    assert isinstance(why["text"], str) and why["items"] == []
    assert isinstance(demo.write({**history, "task": "query"})["text"], str)
    assert isinstance(demo.write({**history, "task": "conversation", "message": "what now?"})["text"], str)
    following = demo.write({**history, "task": "next_item"})
    assert len(following["items"]) == 3
    assert {*following["items"]} <= {own["item"] for own in demo._recommend("x", top_k=38, exclude_seen=False)}
    with pytest.raises(ValueError, match="message: empty"):
        demo.write({**history, "task": "conversation", "message": ""})
    with pytest.raises(ValueError, match="task='content'"):
        demo.write({**history, "task": "content"})
    with pytest.raises(ValueError, match="this model writes nothing"):
        Demo(make(trained_tasks=["retrieval"])).write({**history, "task": "query"})


def test_settings_of_older_code_lack_a_term():
    @dataclasses.dataclass(frozen=True)
    class Older:
        learnt: float = 0.5
        words: float = 0.3

    assert weighed(Older(), 1.0) == Older(learnt=0.5, words=0.0)
