"""Facts of items from a table of knowledge: triples (head, relation, tail), worded and added to the items' texts.

A fact is part of the item's own segment: it is encoded and cached with the item, and enters its vector. (Segments of
their own for facts of items would have to be read together for the item's vector, and would change every saved
vector.) Only what can be said in words is used: a tail that is an id needs a name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas

from ...values_m6rec import normalize_id, short
from .tables import load_table

FACTS = "facts"
"""Column of the items that holds the facts."""
ID = re.compile(r"[mg]\.[0-9a-z_]+|[QP][0-9]+|https?://\S+")
"""Ids of Freebase and Wikidata, and addresses: they are no words."""
JOIN, BETWEEN = "; ", ", "


@dataclass(frozen=True)
class Knowledge:
    """Triples, and how they are worded.

    Attributes:
        triples: Table with columns head, relation, tail.
        relations: Relation -> wording with `{value}`; other relations are left out.
        links: Table with columns item_id and entity, the head of its triples; None: heads are item ids.
        names: Table with columns entity and name, of the tails; None: tails are words.
        max_values: Maximum number of values of a relation, the first ones of the table.
    """

    triples: str
    relations: Mapping[str, str]
    links: str | None = None
    names: str | None = None
    max_values: int = 3

    def __post_init__(self) -> None:
        if not self.relations:
            raise ValueError("data.knowledge_relations is empty; give each relation that is read its wording")
        for relation, wording in self.relations.items():
            if "{value}" not in str(wording):
                raise ValueError(
                    f"data.knowledge_relations: {relation} is {short(wording)}; expected a text with {{value}}"
                )
        if isinstance(self.max_values, bool) or not isinstance(self.max_values, int) or self.max_values < 1:
            raise ValueError(f"data.knowledge_values is {short(self.max_values)}; expected a whole number from 1 on")

    def facts(self, item_ids: Iterable[str]) -> dict[str, str]:
        """Return the facts of each item that has some: item id -> text.

        Raises:
            ValueError: A table lacks a column, tails are ids without names, or no item has a fact.
        """
        triples = _table(self.triples, "data.knowledge", ("head", "relation", "tail"))
        triples = triples[triples["relation"].isin(list(self.relations))]
        items = self._items(set(item_ids))
        triples = triples[triples["head"].isin(list(items))]
        names = self._names(triples["tail"])
        values: dict[str, dict[str, list[str]]] = {}
        for head, relation, tail in triples.itertuples(index=False):
            own = values.setdefault(head, {}).setdefault(relation, [])
            if tail in names and names[tail] not in own and len(own) < self.max_values:
                own.append(names[tail])
        found: dict[str, str] = {}
        for head, relations in values.items():
            said = [
                str(wording).format(value=BETWEEN.join(relations[relation]))
                for relation, wording in self.relations.items()
                if relations.get(relation)
            ]
            found |= {item_id: JOIN.join(said) for item_id in items[head] if said}
        if not found:
            raise ValueError(
                f"data.knowledge {self.triples!r} has no fact about any item: its relations and heads are others than "
                "those of data.knowledge_relations and of the items (data.knowledge_links joins entities to items)"
            )
        return found

    def _items(self, item_ids: set[str]) -> dict[str, list[str]]:
        """Return entity -> ids of its items."""
        if self.links is None:
            return {item_id: [item_id] for item_id in item_ids}
        found: dict[str, list[str]] = {}
        links = _table(self.links, "data.knowledge_links", ("item_id", "entity"))
        for item_id, entity in links.itertuples(index=False):
            if item_id in item_ids:
                found.setdefault(entity, []).append(item_id)
        return found

    def _names(self, tails: pandas.Series) -> dict[str, str]:
        """Return the words of each tail that has some."""
        if self.names is not None:
            names = _table(self.names, "data.knowledge_names", ("entity", "name"))
            wanted = set(tails)
            return {entity: name for entity, name in names.itertuples(index=False) if entity in wanted and name}
        ids = [tail for tail in tails if ID.fullmatch(tail)]
        if ids:
            raise ValueError(
                f"data.knowledge {self.triples!r}: {ids[0]!r} is an id ({len(ids)} of {len(tails)} tails are), and no "
                "words: give data.knowledge_names, a table with columns entity and name"
            )
        return {tail: tail for tail in tails if tail}


def with_facts(items: pandas.DataFrame, knowledge: Knowledge) -> pandas.DataFrame:
    """Return the texts of items with a column of facts.

    Raises:
        ValueError: The items have a column of that name, or `Knowledge.facts` fails.
    """
    if FACTS in items:
        raise ValueError(f"data.knowledge adds the column {FACTS!r}, which the items have: rename that one")
    found = knowledge.facts(items.index)
    return items.assign(**{FACTS: [found.get(item_id, "") for item_id in items.index]})


def _table(path: str, setting: str, columns: tuple[str, ...]) -> pandas.DataFrame:
    """Read columns of a table as stripped texts, ids as ids are read everywhere."""
    rows: Any = load_table(path)
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(f"{setting} {path!r} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}")
    frame = rows.select_columns(list(columns)).to_pandas()
    frame = frame.dropna()
    for name in columns:
        is_id = name in ("head", "item_id", "entity")
        frame[name] = [normalize_id(value, name) if is_id else str(value).strip() for value in frame[name].tolist()]
    return frame


__all__ = ["FACTS", "Knowledge", "with_facts"]
