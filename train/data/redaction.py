"""Names of persons and addresses in texts of users, which a model that writes would learn by heart. Ours."""

import re
from collections.abc import Iterable

import pandas

from ...values_m6rec import WORD

REDACTED = "…"
"""What stands in place of a name or an address."""
FACTS = "facts"
"""Column of users with sentences that others wrote."""
ADDRESS = re.compile(
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"  # mail
    r"|(?:https?://|www\.)\S+[\w/]"
    r"|(?<![\w@])@\w{2,}"
    r"|(?<!\w)\+?\(?\d(?:[ ()./-]{0,2}\d){8,14}(?!\w)"  # telephone numbers have 9 to 15 digits
)
INSIDE = re.compile(r"(?<=[\w,;:)] )[^\W\d_]+")
"""A word that is not the first of a sentence."""


def names_in(texts: Iterable[str], items: Iterable[str]) -> frozenset[str]:
    """Find what may be names of persons: words inside sentences that are always capitalised and in no item's text.

    Capitals count in scripts that have them only. Names of places, days and languages are found as well.

    Args:
        texts: All texts of users.
        items: The texts of items.

    >>> sorted(names_in(["My sister Anna, a Levi's fan, likes it.", "I gave it to Rose.", "a rose"], ["jeans by Levi"]))
    ['Anna']
    """
    words: set[str] = set()
    inside: set[str] = set()
    for text in texts:
        words.update(WORD.findall(text))
        inside |= {word for word in INSIDE.findall(text) if len(word) > 1 and word.istitle()}
    known = {word.lower() for text in items for word in WORD.findall(text)}
    return frozenset(word for word in inside if word.lower() not in words and word.lower() not in known)


def redacted(text: str, names: frozenset[str]) -> str:
    """Replace addresses and names in a text.

    >>> redacted("Ann wrote to me@shop.example, call +1 (555) 123-4567.", frozenset(["Ann"]))
    '… wrote to …, call ….'
    """
    return WORD.sub(lambda word: REDACTED if word[0] in names else word[0], ADDRESS.sub(REDACTED, text))


def without_names(
    interactions: pandas.DataFrame, items: pandas.DataFrame, users: pandas.DataFrame | None
) -> tuple[pandas.DataFrame, pandas.DataFrame | None]:
    """Return the events and the users of a log without the names and addresses in events' texts and users' facts."""
    written = interactions["text"].unique().tolist() if "text" in interactions else []
    quoted = users[FACTS].unique().tolist() if users is not None and FACTS in users else []
    names = names_in([*written, *quoted], (text for column in items for text in items[column]))
    known = {text: redacted(text, names) for text in {*written, *quoted}}
    if written:
        interactions = interactions.assign(text=interactions["text"].map(known))
    if users is not None and quoted:
        users = users.assign(**{FACTS: users[FACTS].map(known)})
    return interactions, users


__all__ = ["names_in", "redacted", "without_names"]
