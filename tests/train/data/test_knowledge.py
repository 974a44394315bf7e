"""Facts of items: worded, named, at most so many, and never an id in the place of words."""

import dataclasses

import pandas
import pytest

from m6rec.train.config.recipe import load_recipe
from m6rec.train.data.knowledge import Knowledge, with_facts
from m6rec.train.data.log import DataArguments, items_log, read_log
from m6rec.train.runs.build import prepare
from tests.train.world import recipe_of, write_tables, write_world

TRIPLES = [
    ("m.1", "directed_by", "m.d1"),
    ("m.1", "actor", "m.a1"),
    ("m.1", "actor", "m.a2"),
    ("m.1", "actor", "m.a3"),
    ("m.1", "actor", "m.nameless"),
    ("m.2", "actor", "m.a2"),
    ("m.2", "sequel", "m.1"),
    ("m.9", "actor", "m.a1"),
]
NAMES = [("m.d1", "Ann Lee"), ("m.a1", "Bo"), ("m.a2", "Cy"), ("m.a3", "Di"), ("m.1", "Alien")]
LINKS = [("i1", "m.1"), ("i2", "m.2"), ("i3", "m.3"), ("i1b", "m.1")]
WORDS = {"directed_by": "directed by {value}", "actor": "with {value}"}


@pytest.fixture
def tables(tmp_path):
    return write_tables(
        tmp_path,
        triples=[dict(zip(("head", "relation", "tail"), row)) for row in TRIPLES],
        names=[dict(zip(("entity", "name"), row)) for row in NAMES],
        links=[dict(zip(("item_id", "entity"), row)) for row in LINKS],
    )


def test_facts_are_worded_in_the_order_of_the_relations_with_the_first_names(tables):
    knowledge = Knowledge(tables["triples"], WORDS, tables["links"], tables["names"], max_values=2)
    assert knowledge.facts(["i1", "i2", "i3", "i1b"]) == {
        "i1": "directed by Ann Lee; with Bo, Cy",
        "i1b": "directed by Ann Lee; with Bo, Cy",
        "i2": "with Cy",
    }
    assert dataclasses.replace(knowledge, max_values=9).facts(["i1"]) == {"i1": "directed by Ann Lee; with Bo, Cy, Di"}
    items = pandas.DataFrame({"title": ["a", "b"]}, index=["i2", "i3"])
    assert with_facts(items, knowledge)["facts"].tolist() == ["with Cy", ""]
    assert "facts" not in items


def test_tails_may_be_words_and_heads_may_be_items(tmp_path):
    rows = [("i1", "keyword", word) for word in ("pixar", " toys ", "pixar", "1995", "friends")]
    paths = write_tables(tmp_path, triples=[dict(zip(("head", "relation", "tail"), row)) for row in rows])
    assert Knowledge(paths["triples"], {"keyword": "about {value}"}).facts(["i1"]) == {"i1": "about pixar, toys, 1995"}


def test_what_cannot_be_said_in_words_is_refused(tables):
    with pytest.raises(
        ValueError, match=r"'m.d1' is an id \(6 of 6 tails are\), and no words: give data.knowledge_names"
    ):
        Knowledge(tables["triples"], WORDS, tables["links"]).facts(["i1", "i2"])
    with pytest.raises(ValueError, match="has no fact about any item"):
        Knowledge(tables["triples"], WORDS, names=tables["names"]).facts(["i1"])
    with pytest.raises(
        ValueError, match=r"data.knowledge_names .* has no column 'entity'; it has head, relation, tail"
    ):
        Knowledge(tables["triples"], WORDS, tables["links"], tables["triples"]).facts(["i1"])
    knowledge = Knowledge(tables["triples"], WORDS, tables["links"], tables["names"])
    with pytest.raises(ValueError, match="adds the column 'facts', which the items have"):
        with_facts(pandas.DataFrame({"facts": ["a"]}, index=["i1"]), knowledge)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"knowledge": "t.csv"}, "data.knowledge_relations is empty"),
        ({"knowledge_names": "n.csv"}, "data.knowledge_names goes with data.knowledge"),
        ({"knowledge": "t.csv", "knowledge_relations": {"a": "b"}}, r"a is 'b'; expected a text with {value}"),
        ({"knowledge": "t.csv", "knowledge_relations": WORDS, "knowledge_values": 0}, "data.knowledge_values is 0"),
    ],
)
def test_wrong_settings_are_refused(data, match):
    with pytest.raises(ValueError, match=match):
        DataArguments(**data)


def test_facts_enter_the_text_the_segment_and_the_vector_of_an_item(tmp_path):
    data = write_world(tmp_path / "data")
    rows = [{"head": "i3", "relation": "keyword", "tail": word} for word in ("lighthouse", "storm")]
    data |= {"knowledge": write_tables(tmp_path / "more", triples=rows)["triples"]}
    own = {**data, "knowledge_relations": {"keyword": "about {value}"}}
    log = read_log(DataArguments(**own))
    assert log.item_fields("i3")["facts"] == "about lighthouse, storm"
    assert "facts" not in log.item_fields("i1")
    assert (
        items_log(DataArguments(**{**own, "interactions": None})).item_fields("i3")["facts"]
        == "about lighthouse, storm"
    )
    run = prepare(load_recipe(recipe_of(own, tmp_path / "run")))
    item, plain = run.writer.item("i3"), {name: text for name, text in run.writer.item("i3").items() if name != "facts"}
    assert run.processor.item_texts([item]) == [f"{run.processor.item_texts([plain])[0]}, about lighthouse, storm"]
    rows = [run.processor.pad([{"input_ids": ids}]) for ids in run.processor.encode_items([item, plain])]
    vectors = [run.base_model.embed_items(row["input_ids"], row["attention_mask"]) for row in rows]
    assert (vectors[0] - vectors[1]).abs().max() > 1e-4
    saved = load_recipe(recipe_of(own, tmp_path / "run")).data
    assert saved.knowledge == data["knowledge"]
