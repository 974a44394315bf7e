"""YAML of recipes: what is refused, and that it is refused quickly and with its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m6rec.train.config.plain_yaml import DEEPEST, MOST_CHARACTERS, read_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MERGED = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "holds more than 10000 values"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "collections within each other"),
        ("a:\n" + "".join(" " * depth + "a:\n" for depth in range(1, 200)), "collections within each other"),
        ("a: &a [*a]", r"\*a stands within what it stands for"),
        ("a: &a {b: {c: *a}}", r"\*a stands within what it stands for"),
        ("a: *b", "undefined alias 'b'"),
        ("# " + "x" * MOST_CHARACTERS, "1000002 characters; expected 1000000 at most"),
        ("[" + "1," * 10_001 + "1]", "holds more than 10000 values"),
        *[
            (f"a: {value}", rf"no valid YAML: {message} cannot be read as \w+: put a text into quotes")
            for value, message in {
                "!!timestamp abc": "'abc'",
                "2020-13-45": "'2020-13-45'",
                "2020-01-01 25:61:00": "'2020-01-01 25:61:00'",
                "!!int ''": "''",
                "!!int x": "'x'",
                "0b_": "'0b_'",
                "!!float 1.2.3": "'1.2.3'",
                "!!bool maybe": "'maybe'",
                "9" * 5000: f"'{'9' * 80}'",
            }.items()
        ],
        ("a: !!python/object/apply:os.system ['x']", "no valid YAML: could not determine a constructor"),
        ("a: !!int [1]", "no valid YAML"),
        ("? [1, {}]\n: 2", r"no valid YAML: [\s\S]*unhashable"),
        ("a: 1\nb: 2\na: 3", r"the key 'a' stands twice: once here[\s\S]*line 1, [\s\S]*and again here[\s\S]*line 3"),
        ('a: {b: 1, "b": 2}', "the key 'b' stands twice"),
        ("1: x\n1: y", "the key '1' stands twice"),
        ("a: \x00", "no valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_at_its_place(text, message):
    with pytest.raises(ValueError, match=f"^own.yaml [\\s\\S]*{message}"):
        read_yaml(text, "own.yaml")


def test_anchors_and_merged_keys_are_read():
    assert read_yaml(MERGED, "x") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}
    assert read_yaml("a: &a {<<: &b {x: 1}, x: 2}\nb: {<<: *a}\nc: {<<: *b}", "x")["b"] == {"x": 2}
    first = "a: &a {left: 1}\nb: &b {left: 2, right: 2}\n"
    assert read_yaml(first + "c: {<<: [*a, *b], top: 3}", "x")["c"] == {"left": 1, "right": 2, "top": 3}
    assert read_yaml(first + "c: {<<: [*b, *a]}\nd: {<<: *a, <<: *b}", "x")["d"] == {"left": 1, "right": 2}
    assert read_yaml("{=: =, a: 1}", "x") == {"=": "=", "a": 1}
    with pytest.raises(ValueError, match="<< merges a mapping or a list of mappings"):
        read_yaml("a: {<<: [1]}", "x")


def test_the_bounds_are_far_from_recipes():
    deep = "[" * (DEEPEST - 2) + "]" * (DEEPEST - 2)
    assert str(read_yaml(deep, "x")) == deep
    assert len(read_yaml("[" + "1," * 9_000 + "]", "x")) == 9_000


tokens = ["a: ", "b: ", "\n", "  ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<: ", "!!int ", "!!set ", "!x "]
tokens += [
    "!!omap ",
    "!!pairs ",
    "!!binary ",
    "!!timestamp ",
    "2020-01-01",
    "x",
    "1e3",
    "'",
    '"',
    "|\n",
    ": ",
    "#",
    "? ",
]


@given(st.lists(st.sampled_from(tokens), max_size=25).map("".join))
def test_any_document_is_read_or_refused(text):
    try:
        read_yaml(text, "own.yaml")
    except ValueError as error:
        assert str(error).startswith("own.yaml ")
