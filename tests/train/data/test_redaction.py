"""Names of persons and addresses do not reach a model that learns to write."""

import pytest

from m6rec.train.data.redaction import REDACTED, names_in, redacted
from tests.train.data.test_log import log_of

ITEMS = ["Mary Poppins", "a film of Spain"]
TEXTS = [
    "My husband Boris, who hates musicals, loved it. Boris cried.",
    "I saw Poppins with Mary. We cried and Émile laughed; in Spain it rained.",
    "THE BEST, and OMG so LONG. I will see it again.",
    "Boring? No! Will you come, Will?",
    "为什么 Boris 喜欢",
]


def test_names_are_capitalised_within_sentences_and_never_in_lower_case():
    assert names_in(TEXTS, ITEMS) == {"Boris", "Émile"}  # not Mary, Poppins, Spain (items), Will (will), No, LONG, I
    assert names_in([], ITEMS) == names_in(["Anna alone. Anna"], []) == frozenset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Boris cried, borisson did not; Boris's dog", "… cried, borisson did not; …'s dog"),
        ("mail a.b+c@d-e.example.com!", "mail …!"),
        ("see https://shop.example/a?b=1, or www.shop.example.", "see …, or …."),
        ("thanks @anna_b, 50@ each", "thanks …, 50@ each"),
        ("call +44 20 7946 0958 or (555) 123-4567.", "call … or …."),
        ("in 1997, 10-12 of 1,000,000 for 12.50", "in 1997, 10-12 of 1,000,000 for 12.50"),
        ("", ""),
    ],
)
def test_names_and_addresses_are_replaced_and_nothing_else(text, expected):
    assert redacted(text, frozenset(["Boris"])) == expected


def test_a_log_is_redacted_if_wanted():
    given = {"text": ["a gift for Boris", None, "Good. me@x.example"]}
    users = {"user_id": ["u1"], "facts": ["as Émile said"], "name": ["Boris"]}
    plain, log = (log_of(given, users=users, redact=own) for own in (False, True))
    assert plain.interactions["text"].tolist() == ["a gift for Boris", "", "Good. me@x.example"]
    assert log.interactions["text"].tolist() == [f"a gift for {REDACTED}", "", f"Good. {REDACTED}"]
    assert log.user_fields("u1") == {"facts": f"as {REDACTED} said", "name": "Boris"}
    assert log.items.equals(plain.items) and log_of(redact=True).interactions.equals(log_of().interactions)
