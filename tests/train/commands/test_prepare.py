"""What is said of a recipe's data: the numbers counted by hand, the requests as the processor reads them."""

import pytest

from m6rec.train.commands import prepare as preparation
from m6rec.train.commands.prepare import prepare_report, report
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs.build import prepare
from tests.fast import meet
from tests.train.world import recipe_of, write_tables

# Four users: one with one event, one with two, two with four; b twice; the last events at the same moment.
EVENTS = [
    *[{"user_id": "u1", "item_id": item, "timestamp": f"2026-05-0{day}"} for day, item in enumerate("abcd", 1)],
    *[{"user_id": "u2", "item_id": item, "timestamp": f"2026-05-0{day}"} for day, item in enumerate("abae", 1)],
    {"user_id": "u3", "item_id": "a", "timestamp": "2026-05-01"},
    *[{"user_id": "u4", "item_id": item, "timestamp": "2026-05-10 12:30"} for item in "ab"],
]
ITEMS = [
    {"item_id": item, "title": title, "brand": brand}
    for item, title, brand in [
        *[("a", "red shoes", "K"), ("b", "轻便男士夹克", ""), ("c", "hat", ""), ("d", "hat", ""), ("e", "coat", "")],
        ("f", "never met", "K"),
    ]
]


@pytest.fixture
def make(tmp_path):
    def make_recipe(events=EVENTS, items=ITEMS, data=None, columns=None, **sections):
        rows = [{**event, **(columns(place) if columns else {})} for place, event in enumerate(events)]
        paths = write_tables(tmp_path / "own", interactions=rows, items=items)
        return load_recipe(recipe_of({**paths, **(data or {})}, tmp_path / "run", **sections))

    return make_recipe


def test_what_is_counted(make):
    found = prepare_report(make())
    events = found["events"]
    assert (events["rows"], events["users"], events["items met"]) == (11, 4, 5)
    assert events["of an item that the user has met before"] == 1  # u2 meets a again
    assert events["density"] == 10 / (4 * 6)
    assert events["time"] == {
        "first": "2026-05-01 00:00:00",
        "last": "2026-05-10 12:30:00",
        "days": 9 + 12.5 / 24,
        "same user and second": 1,
    }
    assert events["per user"] == {
        "fewest": 1,
        "median": 3.0,
        "most": 4,
        "users with one event": 1,
        "users with two events": 1,
    }
    assert found["items"] == {
        "rows": 6,
        "never met": 1,
        "with the same text as another": 2,
        "without": {"title": 0, "brand": 4},
    }
    assert found["dropped"] == {}
    assert found["warnings"] == ["2 items have the same text as another: by text no model can tell them apart"]


def test_where_everybody_goes(make):
    split = prepare_report(make())["split"]
    assert split == {
        "by": "leave-one-out",
        "train": {"events": 7, "users": 4},
        "valid": {"events": 2, "users": 2},
        "test": {"events": 2, "users": 2},
        "users in train only": 2,  # those with one event and with two
        "held-out users without a training event": 0,
        "cold items (held out, but not in train)": 3,  # c, d, e
        "held-out events of cold items": 3,
        "retrievals in the test": 2,
        "retrievals of an item that the user has met before": 0,
    }


def test_distributions(make):
    verbs = ["view", "buy", ""]
    recipe = make(columns=lambda place: {"event": verbs[place % 3], "rating": [1, 4.5, None][place % 3]})
    events = prepare_report(recipe)["events"]
    assert events["by event"] == {"view": 4, "buy": 4, "(empty)": 3}
    assert events["by rating"] == {"1": 4, "4.5": 4, "unknown": 3}
    assert events["by label"] == {"0": 4, "1": 4, "unknown": 3}
    many = make(
        columns=lambda place: {"event": f"e{place:02}", "rating": place, "text": "x" * (place % 2)}, events=EVENTS * 2
    )
    events = prepare_report(many)["events"]
    assert events["by rating"] == {"least": 0.0, "mean": 10.5, "most": 21.0}
    assert events["without text"] == 11
    assert len(events["by event"]) == 13
    assert events["by event"]["10 others"] == 10


def test_what_was_dropped_is_told_with_its_reason(make):
    bad = [*EVENTS, EVENTS[0], {"user_id": "u5", "item_id": "nothing", "timestamp": "2026-05-01"}]
    text = report(make(events=bad, data={"drop_invalid": True}))
    assert "interactions: column 'item_id': not an item of the items table: 1\n" in text
    assert "interactions: repeats another row's user_id, item_id, timestamp: 1\n" in text


@pytest.mark.parametrize(("language", "learn"), meet(["en", "zh"], ["retrieval", "click"]))
def test_samples_are_what_the_model_reads(make, language, learn):
    labels = {"columns": lambda place: {"label": place % 2, "event": "buy"}}
    text = {"domain": "ecommerce", "language": language}
    recipe = make(**labels, text=text, task={"learn": [learn], "targets": 1})
    own = prepare_report(recipe)["requests"][learn]
    assert own["read"] == 4
    run = prepare(recipe)
    verb, jacket = {"en": "bought", "zh": "购买"}[language], "轻便男士夹克"
    assert len(own["samples"]) == 4
    history = f"[EVENT]{verb}[SEG][ITEM]red shoes"
    assert any(history in sample and jacket in sample for sample in own["samples"])
    for sample in own["samples"]:
        ids = run.processor.tokenizer.encode(sample, add_special_tokens=False)
        assert run.processor.tokenizer.decode(ids) == sample
        assert sample.startswith("[BOS']")
        assert ("[EOS'][BOS][ITEM]" in sample) == (learn == "click")
    assert report(recipe).count("\n  " + learn + ": [BOS']") == 4


def test_lengths_and_cuts(make):
    wide = prepare_report(make(text={"max_length": 256}))["requests"]["retrieval"]
    tokenizer = prepare(make()).processor.tokenizer
    lengths = [len(tokenizer.encode(sample, add_special_tokens=False)) for sample in wide["samples"]]
    assert wide["tokens, most"] == max(lengths)
    assert wide["share cut to max_length"] == 0
    tight = prepare_report(make(text={"max_length": max(lengths) - 1}))["requests"]["retrieval"]
    assert tight["share cut to max_length"] == lengths.count(max(lengths)) / 4
    assert tight["tokens, most"] < max(lengths)


def test_five_samples_are_shown_in_turn_of_the_tasks(make):
    recipe = make(
        columns=lambda place: {"rating": 1 + place % 5, "label": place % 2}, task={"learn": ["click", "rating"]}
    )
    lines = report(recipe).splitlines()
    shown = lines[lines.index("samples, as the model reads them") + 1 :][:6]
    assert [line.split(":")[0].strip() for line in shown] == ["click", "rating", "click", "rating", "click", "warning"]


@pytest.mark.parametrize(
    ("columns", "sections", "message"),
    [
        ({"label": 1}, {"task": {"learn": ["click"]}}, "all labels of 'click' are 1 in the training part"),
        (
            {"event": "view"},
            {"task": {"learn": ["interaction"], "interactions": {"view": ["view"], "buy": ["buy"]}}},
            "all labels of 'view' are 1",
        ),
        ({"label": 0}, {"task": {"learn": ["click"], "negatives_per_event": 1}}, "all labels of 'click' are 0"),
        ({}, {"task": {"learn": ["click"]}}, "learnt from column 'label', which the interactions do not have"),
        ({}, {"task": {"learn": ["writing"], "writing": {"query": ["search"]}}}, "learnt from column 'text'"),
        (
            {"event": "search", "text": ""},
            {"task": {"learn": ["writing"], "writing": {"query": ["search"]}}},
            "there is no training row of 'query'",
        ),
        ({}, {"evaluation": {"split": "time", "test_fraction": 0}}, "nothing is held out for test"),
    ],
)
def test_what_cannot_be_learnt_or_measured_is_a_warning(make, columns, sections, message):
    found = prepare_report(make(columns=lambda place: columns, **sections))
    assert any(message in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("year", "warning"),
    [("1970", "the first event is of 1970-01-01 00:00:00: "), ("2996", "the last event is of 2996-")],
)
def test_times_long_ago_and_to_come_are_suspected(make, year, warning):
    moved = [{**event, "timestamp": f"{year}-01-01 00:00:{place:02}"} for place, event in enumerate(EVENTS)]
    found = prepare_report(make(events=moved))["warnings"]
    assert sum(each.startswith(warning) for each in found) == 1
    assert not any(each.startswith(("the first event is of", "the last event is of")) for each in warnings_of(make()))


def warnings_of(recipe):
    return prepare_report(recipe)["warnings"]


def test_an_order_is_named_and_its_gaps_are_not_worded(make):
    places = [{**event, "timestamp": place} for place, event in enumerate(EVENTS)]
    text = report(make(events=places, data={"time_format": "order"}))
    assert "time: none: each user's events stand in the order of the column 'timestamp'" in text
    assert "within a minute" not in text and "[AGE]" not in text


def test_ids_that_nearly_are_the_same_are_suspected(make):
    items = [
        *ITEMS,
        {"item_id": "A", "title": "gown"},
        {"item_id": "007", "title": "x"},
        {"item_id": "7", "title": "y"},
    ]
    told = "4 items have ids that others nearly have too, such as '007' and '7'"
    assert any(warning.startswith(told) for warning in warnings_of(make(items=items)))


def test_without_times_the_order_of_the_table_is_named(make):
    untimed = [{name: event[name] for name in ("user_id", "item_id")} for event in EVENTS]
    assert "time: none: each user's events keep the order of the table" in report(make(events=untimed))


def test_writing_is_read_with_its_text(make):
    recipe = make(
        columns=lambda place: {"event": "review", "text": f"好评 number{place}"},
        task={"learn": ["writing"], "writing": {"explanation": ["review"], "item_text": []}},
        text={"domain": "ecommerce"},
    )
    requests = prepare_report(recipe)["requests"]
    assert set(requests) == {"explanation", "item_text"}
    assert requests["explanation"]["read"] == 7
    titles = {item["item_id"]: item["title"] for item in ITEMS}
    for sample in requests["explanation"]["samples"]:
        target, written = sample.partition("[EOS'][BOS][ITEM]")[2].split("because 好评 number")
        place = int(written.removesuffix("[EOS]"))
        assert target.startswith(titles[EVENTS[place]["item_id"]])
        assert f"number{place}[" not in sample.partition("[EOS']")[0]


def test_no_more_is_read_than_is_needed(make, monkeypatch):
    monkeypatch.setattr(preparation, "READ", 2)
    assert prepare_report(make())["requests"]["retrieval"]["read"] == 2


def test_raw_texts_with_a_log_and_without(make, tmp_path):
    (tmp_path / "texts.txt").write_text(
        "".join(f"一件衬衫 shirt number {row}\n" for row in range(200)), encoding="utf-8"
    )
    pretraining = {"texts": [str(tmp_path / "texts.txt")], "valid_fraction": 0.2}
    found = prepare_report(make(pretraining=pretraining))
    own = found["texts"][str(tmp_path / "texts.txt")]
    assert own["texts"] + own["held out"] == 200
    assert "一件衬衫 shirt number" in own["sample"]
    assert found["events"]["rows"] == 11
    alone = load_recipe(recipe_of({}, tmp_path / "run", pretraining=pretraining))
    assert set(prepare_report(alone)) == {"texts"}
    assert "sample: 一件衬衫 shirt number" in report(alone)
    assert prepare_report(make(pretraining={**pretraining, "streaming": True}))["texts"]


def test_the_template_of_own_data_reads_own_data(make, tmp_path):
    paths = write_tables(tmp_path / "shop", interactions=EVENTS, items=ITEMS)
    overrides = [f"data.{name}={path}" for name, path in paths.items()]
    recipe = load_recipe("own-data", [*overrides, f"training.output_dir={tmp_path / 'run'}"])
    assert prepare_report(recipe)["requests"]["retrieval"]["read"] == 4
