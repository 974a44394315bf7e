"""Every template parses and words every task; wrong templates say what is wrong."""

import copy
import json

import pytest

from m6rec.formatting_m6rec import TASKS, check_template
from m6rec.tokenization import M6RecProcessor, available_templates, load_template

ALL = [(domain, language) for domain in ("ecommerce", "video", "social") for language in ("en", "zh")]


def test_all_templates_are_there():
    assert available_templates() == sorted(ALL)


@pytest.mark.parametrize(("domain", "language"), ALL)
def test_a_template_words_every_task(tokenizer, domain, language):
    processor = M6RecProcessor.from_template(tokenizer, domain, language)
    template = load_template(domain, language)
    assert (template["domain"], template["language"]) == (domain, language)
    assert json.loads(json.dumps(template, allow_nan=False)) == template
    request = {
        "user": {"gender": "女", "age": 31, "occupation": "editor"},
        "history": [
            {"event": verb, "item": "thing", "timestamp": 1.5**place}
            for place, verb in enumerate(template["events"]["verbs"])
        ],
        "candidates": [
            {
                "title": "boots",
                "description": None,
                "stats": {name: stat_of(pattern) for name, pattern in template["stats"]["names"].items()},
            }
        ],
    }
    for task in TASKS:
        reading = processor.read({**request, "candidates": []} if task == "next_item" else request, task)
        assert "{" not in reading.text and "None" not in reading.text
        for words in template["events"]["verbs"].values():
            assert ("event", words) in reading.segments
    assert (
        "user",
        {"en": "a female user in her early thirties, occupation editor", "zh": "一位女性用户，三十岁出头，职业editor"}[
            language
        ],
    ) in reading.segments


def stat_of(pattern):
    return {name: 2 for name in ("top_percent", "days", "times", "years", "percent") if f"{{{name}}}" in pattern}


@pytest.mark.parametrize(("domain", "language"), ALL)
def test_languages_say_the_same_things(domain, language):
    """Same fields, verbs, statistics and tables in both languages, so that no part of a request is lost in one."""
    ours, english = load_template(domain, language), load_template(domain, "en")
    for path in (("events", "verbs"), ("item", "fields"), ("stats", "names"), ("user", "fields"), ("tasks",)):
        left, right = ours, english
        for key in path:
            left, right = left[key], right[key]
        assert [*map(name_of, left)] == [*map(name_of, right)]
    for name in ("gaps", "ago"):
        assert [limit for limit, _ in ours[name]] == [limit for limit, _ in english[name]]
        assert len({words for _, words in ours[name]}) == len(ours[name]) in range(10, 15)


def name_of(entry):
    return entry[0] if isinstance(entry, list) else entry


def test_unknown_template():
    with pytest.raises(ValueError, match=r"'music'.*ecommerce/en"):
        load_template("music")


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("tasks", "query"), None, r"template\.tasks: missing key 'query'"),
        (("item", "colour"), "red", r"template\.item: unknown key 'colour'"),
        (("item", "fields", 0, 1), "{valeu}", r"template\.item\.fields\.name.*\{valeu\}"),
        (("item", "fields", 0, 1), "{value.__class__}", "__class__"),
        (("item", "fields", 0, 1), "{value!r}", "{value!r}"),
        (("item", "fields", 0, 1), "{value", "expected '}'"),
        (("tasks", "plausibility"), "also clicks", r"\{item\}"),
        (("tasks", "explanation_features"), "because", r"\{features\}"),
        (("tasks", "content"), {"title": "called"}, r"content\.other"),
        (("tasks", "content", "title"), 3, r"content\.title.*int"),
        (("stats", "names", "ctr"), "high", r"template\.stats\.names\.ctr.*'high'"),
        (("gaps",), [[60, "soon"], [30, "later"], [None, "late"]], r"\[60, 30, None\]"),
        (("gaps",), [[60, "soon"]], r"\[60\]"),
        (("gaps",), [], "gaps: the table is empty"),
        (("item", "fields"), {"name": "{value}"}, r"template\.item\.fields.*\[name, pattern\]"),
        (("item", "fields"), [["name", "{value}"]] * 2, "name, name"),
        (("gaps",), "soon", "'soon'"),
        (("now", "months"), ["January"], r"\['January'\]"),
        (("user", "genders"), {"x": "other"}, "other"),
        (("language",), 3, "int"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(path, value, error):
    template = copy.deepcopy(load_template())
    place = template
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises((ValueError, TypeError), match=error):
        check_template(template)
