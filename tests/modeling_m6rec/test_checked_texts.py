"""What an explanation names is found, compared with the contributions, and blocked texts are written anew."""

import functools
import re

import pytest

from m6rec import Catalogue, Guard, RecommendationPipeline
from m6rec.writing_m6rec import REWRITES, Vocabulary, Writer, WritingOptions, check
from tests.modeling_m6rec.shop import ITEMS, build, processor

PROCESSOR = processor()
FILMS = [
    {"item_id": "1", "title": "Alien", "year": 1979, "genre": "Horror"},
    {"item_id": "2", "title": "Alien 3", "year": 1992, "genre": "Horror, Action"},
    {"item_id": "3", "title": "The Silence of the Lambs", "year": 1991, "genre": "Crime, Thriller"},
    {"item_id": "4", "title": "Heat", "year": 1995, "genre": "Crime, Action", "plot": "a long sentence of many words"},
    {"item_id": "5", "title": "Fargo", "year": 1996, "genre": "Crime, Comedy"},
    {"item_id": "6", "title": "Robot Dreams", "year": 2023, "genre": "Animation"},
]
REQUEST = {
    "user": {"likes": "westerns"},
    "history": [
        {"event": "watched", "item": FILMS[0]},
        {"event": "watched", "item": FILMS[2]},
        {"event": "watched", "item": FILMS[3]},
        {"event": "searched", "query": "snowy murder mystery"},
    ],
}
WORDS = Vocabulary.of(FILMS, PROCESSOR)
BECAUSE = [
    {"event": "watched The Silence of the Lambs, 1991, Crime, Thriller", "contribution": 0.4},
    {"event": "watched Heat, 1995, Crime, Action", "contribution": 0.3},
    {"event": "searched snowy murder mystery", "contribution": 0.1},
    {"event": "watched Alien, 1979, Horror", "contribution": -0.2},
]


@pytest.mark.parametrize(
    ("text", "item", "names", "agrees"),
    [
        ("you loved the silence of THE lambs", 4, [0], True),
        ("as you watched Heat", 4, [1], True),
        ("because of the heat of the moment", 4, [], None),  # a title of one word has its own case
        ("you liked Alien", 4, [3], False),
        ("you liked Alien 3", 1, [], None),  # the title of the item itself, not of the event
        ("you liked Alien, and so Alien 3", 1, [3], False),
        ("you liked Aliens", 4, [], None),
        ("a snowy film about a murder", 4, [2], False),  # two rare words, and less than half of the largest
        ("a snowy film", 4, [], None),
        ("a film of 1991 about lambs", 4, [0], True),
        ("The Silence of the Lambs and Alien", 4, [0, 3], True),  # the longer title is the best named
        ("it is a good film", 4, [], None),
        ("", 4, [], None),
    ],
)
def test_named_events_are_compared_with_their_contributions(text, item, names, agrees):
    found = check(text, REQUEST, FILMS[item], BECAUSE, WORDS, PROCESSOR)
    assert (found.names, found.agrees) == (names, agrees)
    assert found.events == BECAUSE


def test_nothing_agrees_where_nothing_contributes():
    because = [{**event, "contribution": -0.1} for event in BECAUSE]
    assert check("you watched Heat", REQUEST, FILMS[4], because, WORDS, PROCESSOR).agrees is False
    assert check("you watched Heat", REQUEST, FILMS[4], [], WORDS, PROCESSOR).agrees is None
    assert check("you watched Heat", "a man", FILMS[4], [], WORDS, PROCESSOR).names == []


@pytest.mark.parametrize(
    ("text", "unsupported"),
    [
        ("a crime comedy of 1996", []),  # the item's own
        ("a horror, an animation", ["animation"]),  # horror is in the history
        ("a crime film of 2023 with many words, 2023", ["2023"]),  # a sentence holds no features
        ("a wonderful robot", []),  # no feature, part of a title
    ],
)
def test_features_that_nothing_supports_are_listed(text, unsupported):
    assert check(text, REQUEST, FILMS[4], BECAUSE, WORDS, PROCESSOR).unsupported == unsupported


def test_more_features_and_common_words():
    words = Vocabulary.of(FILMS, PROCESSOR, ["Funny ending"])
    assert check("a funny western", REQUEST, FILMS[4], [], words, PROCESSOR).unsupported == ["funny"]
    assert "crime" in words.features and "year" not in words.features  # "year" stands in each item's text
    assert words.counts["alien"] == 2 and not words.rare("alien")
    assert words.rare("heat") and words.rare("unheard") and not words.rare("crime")


def test_a_catalogue_counts_its_words_once_for_each_state():
    catalogue = Catalogue.from_dataset(ITEMS, build(), PROCESSOR)
    first = Vocabulary.of_catalogue(catalogue.snapshot(), PROCESSOR)
    assert Vocabulary.of_catalogue(catalogue.snapshot(), PROCESSOR) is first
    assert first.counts["hiking"] == 2 and first.size == 8
    catalogue.remove(["i0"])
    assert Vocabulary.of_catalogue(catalogue.snapshot(), PROCESSOR).counts["hiking"] == 1


def test_the_contributions_of_a_pipeline_can_be_checked():
    model = build()
    recommend = RecommendationPipeline(
        model=model, processor=PROCESSOR, device="cpu", catalogue=Catalogue.from_dataset(ITEMS, model, PROCESSOR)
    )
    request = {"history": [{"event": "clicked", "item": ITEMS[number]} for number in (2, 6, 3)]}
    row = recommend(request, top_k=1, explain=True)[0]
    words = Vocabulary.of_catalogue(recommend.catalogue.snapshot(), PROCESSOR)
    item = recommend.catalogue.item(row["item_id"])
    for place, event in enumerate(row["because"]):
        title = next(own["title"] for own in ITEMS if own["item_id"] == event["item_id"])
        found = check(f"you clicked {title}", request, item, row["because"], words, PROCESSOR)
        assert found.names == [place]
        largest = row["because"][0]["contribution"]
        assert found.agrees == (event["contribution"] > 0 and event["contribution"] >= largest / 2)


# --------------------------------------------------------------------------------------------------------------- guard


@functools.cache
def model():
    return build(num_joint_layers=2, initializer_range=0.4)


REQUESTS = [{"user": f"user {number}", "history": ["yoga mat"] * number} for number in range(4)]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"temperature": 1.5, "seed": 3}], ids=str)
def test_a_blocked_text_is_written_anew(how):
    plain = [texts[0].text for texts in Writer(model(), PROCESSOR).write(REQUESTS, "query", max_new_tokens=8, **how)]
    blocked = {plain[1], plain[3]}
    guard = Guard(block_texts=lambda text: text in blocked)
    found = Writer(model(), PROCESSOR, guard).write(REQUESTS, "query", max_new_tokens=8, **how)
    assert [texts[0].text for texts in found][::2] == plain[::2]
    for place in (1, 3):
        (text,) = found[place]
        assert text.text not in blocked and text.finish != "blocked" and text.text
    again = Writer(model(), PROCESSOR, guard).write(REQUESTS, "query", max_new_tokens=8, **how)
    assert again == found


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"temperature": 1.5, "seed": 3}], ids=str)
def test_words_of_the_block_list_are_not_written(how):
    def texts(writer):
        return [own[0].text for own in writer._write(REQUESTS, "query", WritingOptions(max_new_tokens=8, **how))]

    plain = texts(Writer(model(), PROCESSOR))
    words = [re.search(r"\w+", text)[0] for text in plain]
    guard = Guard(block_texts=[rf"\b{words[1]}\b", re.compile(words[3])])
    assert {words[1].upper(), words[3]} <= {*guard.words}
    written = texts(Writer(model(), PROCESSOR, guard))
    assert not any(guard.text_reason(text) for text in written)
    assert all(now == was for now, was in zip(written, plain) if not guard.text_reason(was))


def test_what_stays_blocked_is_empty_and_says_why():
    seen = []
    guard = Guard(block_texts=lambda text: seen.append(text) or "no letters")
    found = Writer(model(), PROCESSOR, guard).write(REQUESTS[:2], "query", max_new_tokens=8)
    assert [(text.text, text.finish, text.reason) for (text,) in found] == [("", "blocked", "no letters")] * 2
    assert len(seen) == 2 * (1 + REWRITES)
    assert len(set(seen)) > 2


def test_only_the_blocked_texts_of_a_request_are_replaced():
    how = {"max_new_tokens": 8, "temperature": 1.5, "seed": 3, "num_texts": 3}
    plain = Writer(model(), PROCESSOR).write(REQUESTS[:1], "query", **how)[0]
    guard = Guard(block_texts=lambda text: text == plain[1].text)
    found = Writer(model(), PROCESSOR, guard).write(REQUESTS[:1], "query", **how)[0]
    assert [found[0], found[2]] == [plain[0], plain[2]]
    assert found[1].text not in (plain[1].text, "")
