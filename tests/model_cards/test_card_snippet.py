"""The snippets of a card run as they stand, whatever the model can do and is called."""

import re

import pytest

from m6rec import Catalogue, M6RecConfig, M6RecForRecommendation, M6RecProcessor, M6RecTokenizer
from m6rec.model_cards import CardFacts, card, render_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, with processor and catalogue."""
    items = [{"item_id": str(number), "title": f"film {number}"} for number in range(12)]
    tokenizer = M6RecTokenizer.train([item["title"] for item in items], vocab_size=420)
    model = M6RecForRecommendation(M6RecConfig.preset("tiny", **tokenizer.structural_ids)).eval()
    processor = M6RecProcessor.from_template(tokenizer)
    path = tmp_path_factory.mktemp("cards") / "films"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    Catalogue.from_dataset(items, model, processor).save(path / "catalogue")
    return path


EXAMPLE = {"history": [{"event": "watched", "item": {"title": "film 1", "year": 1994}}], "candidates": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("language", "example", "tasks", "answer", "shape"),
    [
        ("en", None, ["retrieval", "click"], "scores", (1, 2)),
        ("zh", None, ["rating"], "scores", (1, 2)),
        ("en", EXAMPLE, ["interaction"], "scores", (1, 3, 3)),
        ("zh", EXAMPLE, ["retrieval"], "vectors", None),
        ("en", None, ["retrieval"], "vectors", None),
        ("en", EXAMPLE, [], "likelihoods", (1, 3)),
    ],
)
def test_the_snippet_runs(folder, language, example, tasks, answer, shape):
    facts = CardFacts(name="org/films", tasks=tasks, catalogue_size=12, example=example)
    text = render_card(facts, language)
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    code = "".join(snippets)
    assert code.count('"org/films"') == 3
    found = {}
    exec(code.replace('"org/films"', repr(str(folder))), found)
    candidates = (example or card.EXAMPLES[language])["candidates"]
    assert {row["item"] for row in found["ranked"]} == set(candidates) and "because" in found["ranked"][0]
    assert len(found["found"]) == 10
    assert type(found["model"]) is M6RecForRecommendation
    assert found[answer].shape == shape if shape else found[answer].shape[-1] == found["model"].config.embedding_dim


def test_without_a_catalogue_the_snippet_searches_none():
    said = [render_card(CardFacts(name="films", tasks=["retrieval"], catalogue_size=size)) for size in (None, 0, 20)]
    assert ["found = " in text for text in said] == [False, False, True]


def test_a_name_is_a_text_whatever_it_holds():
    text = render_card(CardFacts(name='a"b\\c {{ x }} 影'))
    code = re.search(r"pipeline\(.*", text)[0]
    assert eval(code, {"pipeline": lambda task, model, trust_remote_code: model}) == 'a"b\\c {{ x }} 影'
