"""A catalogue at one moment: its items and vectors, read and searched exactly or by an index.

Shapes: B users, N rows of vectors, M items of a call, D = vector_width.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .catalogue_index_m6rec import VectorIndex, nearest
from .items_m6rec import Item, Model, item_texts
from .values_m6rec import normalize_id

Predicate = Callable[[dict[str, Any]], bool]
"""Says of an item's fields whether the item may be recommended."""
Ranking = list[tuple[str, float]]
"""Ids and scores, the best first."""

ROUNDING = 1e-5
"""More than float32 products of normalised vectors are off by."""
EXTRA, WIDER, EXACT_SHARE = 16, 4, 1 / 16
"""An index is asked for so many rows more than wanted, then for so many times as many, up to this share of all."""


class Texts:
    """What a processor words the items of rows as; each row is worded once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processor: Any = None
        self._texts: list[str] = []  # of the first rows
        self._rows: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    def kept(self, rows: Sequence[int]) -> "Texts":
        """Return the same for rows that are left and have new numbers, as far as they have been worded."""
        new = Texts()
        with self._lock:
            new._processor = self._processor
            new._texts = [self._texts[row] for row in rows if row < len(self._texts)]
        for row, text in enumerate(new._texts):
            new._rows.setdefault(text, []).append(row)
        return new

    def rows(self, texts: Collection[str], processor: Any, items: Sequence[Item], count: int) -> list[int]:
        """Return the rows, among the first `count` and perhaps later ones, that are worded as one of the texts."""
        with self._lock:
            if self._processor is not processor:
                self._processor, self._texts, self._rows = processor, [], {}
            for text in item_texts(processor, items[len(self._texts) : count]):
                self._rows.setdefault(text, []).append(len(self._texts))
                self._texts.append(text)
            return [row for text in texts for row in self._rows.get(text, ())]


@dataclass(frozen=True)
class State:
    """All of a catalogue at one moment.

    A row keeps its place until all rows are put into one new base matrix. `ids`, `items`, `rows` and `texts` are shared
    with later states, which append to them and change nothing that belongs to the first N rows; all else is replaced.
    """

    fingerprint: str
    dimension: int
    ids: list[str]
    """Of at least N rows, in the order of insertion."""
    items: list[Item]
    """Of at least N rows."""
    rows: dict[str, tuple[int, ...]]
    """All rows that an id has had, the oldest first."""
    live: torch.Tensor
    """N, False where the item was removed or replaced."""
    base: torch.Tensor
    side: torch.Tensor
    count: int
    """Live rows."""
    index: VectorIndex | None = None
    """Over `base`."""
    wanted: dict[str, Any] | None = None
    """Kind and settings of the index, also where there is no FAISS."""
    texts: Texts = field(default_factory=Texts)
    next_number: int = 0
    """Id of the next item that is a text: past every whole number that was ever an id."""

    @classmethod
    def of(cls, items: dict[str, Item], vectors: torch.Tensor, fingerprint: str, **more: Any) -> "State":
        """Make a state of one base matrix."""
        rows: dict[str, tuple[int, ...]] = {item_id: (row,) for row, item_id in enumerate(items)}
        live, side = torch.ones(len(items), dtype=torch.bool), vectors[:0]
        every = list(items), list(items.values())
        return cls(fingerprint, vectors.shape[1], *every, rows, live, vectors, side, len(items), **more)

    def row(self, item_id: str) -> int | None:
        """Return the row of an item."""
        for row in reversed(self.rows.get(item_id, ())):
            if row < len(self.live) and self.ids[row] == item_id:  # else a later state's
                return row if self.live[row] else None
        return None

    def known(self, item_id: Any) -> int:
        """Return the row of an item that has to be there."""
        name = normalize_id(item_id, "item_id")
        row = self.row(name)
        if row is None:
            raise ValueError(f"item_id {name!r} is not among the {self.count} items of the catalogue")
        return row

    def live_rows(self) -> list[int]:
        """Return the rows of all items in the order of insertion."""
        return self.live.nonzero()[:, 0].tolist()

    def fields(self, row: int) -> dict[str, Any]:
        """Return an item's fields and its `item_id`."""
        item = self.items[row]
        return {"item_id": self.ids[row], "item": item} if isinstance(item, str) else dict(item)

    def gather(self, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return the vectors of rows, from the base and the side buffer."""
        index = torch.as_tensor(rows, dtype=torch.long)
        base = index < len(self.base)
        vectors = torch.empty(len(index), self.dimension)
        vectors[base], vectors[~base] = self.base[index[base]], self.side[index[~base] - len(self.base)]
        return vectors


class CatalogueView:
    """A catalogue as it was at one moment, for any number of threads: `Catalogue.snapshot` gives one."""

    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def fingerprint(self) -> str:
        """Digest of the model that made the vectors."""
        return self._state.fingerprint

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._state.dimension

    @property
    def index(self) -> VectorIndex | None:
        """The index that searches go by; None = they are exact."""
        return self._state.index

    def __len__(self) -> int:
        return self._state.count

    def __iter__(self) -> Iterator[str]:
        """Yield the ids in the order of insertion."""
        state = self._state
        return iter([state.ids[row] for row in state.live_rows()])

    def __contains__(self, item_id: Any) -> bool:
        return self._state.row(normalize_id(item_id, "item_id")) is not None

    def item(self, item_id: Any) -> Item:
        """Return an item as requests take it: its text, or its fields and its `item_id`."""
        state = self._state
        item = state.items[state.known(item_id)]
        return item if isinstance(item, str) else dict(item)

    def fields(self, item_id: Any) -> dict[str, Any]:
        """Return an item's fields and its `item_id`; the text of an item without fields is called `item`."""
        state = self._state
        return state.fields(state.known(item_id))

    def vectors(self, item_ids: Sequence[Any]) -> torch.Tensor:
        """Return the M x D vectors of items."""
        state = self._state
        return state.gather([state.known(each) for each in item_ids])

    def worded(self, texts: Collection[str], processor: Any) -> list[str]:
        """Return the ids of the items that the processor words as one of the texts."""
        state = self._state
        rows = state.texts.rows(texts, processor, state.items, len(state.live))
        return [state.ids[row] for row in rows if row < len(state.live) and state.live[row]]

    def check(self, model: Model) -> None:
        """Make sure that the vectors are this model's.

        Raises:
            ValueError: Another model made them.
        """
        check_fingerprint(self.fingerprint, model)

    def search(
        self,
        user_vectors: torch.Tensor,
        top_k: int = 10,
        exclude: Sequence[Collection[Any] | None] | None = None,
        filter: Predicate | None = None,
    ) -> list[Ranking]:
        """Find the items nearest to each user.

        Args:
            user_vectors: B x D.
            top_k: Items for each user; fewer where fewer are left.
            exclude: For each user the ids that are left out, of which the catalogue need not know all.
            filter: Which items may be found at all, by their `fields`.

        Returns:
            For each user (item_id, score) by falling score, equal ones in the order of insertion.
        """
        state = self._state
        users = torch.as_tensor(user_vectors).detach().float().cpu()
        if users.dim() != 2 or users.shape[1] != state.dimension:
            raise ValueError(f"user_vectors: expected B x {state.dimension}, got the shape {tuple(users.shape)}")
        if not users.isfinite().all():
            raise ValueError(
                "user_vectors hold NaN or infinity: read each user at a place that its row has; if you do, the model's "
                "weights are damaged"
            )
        if top_k < 1:
            raise ValueError(f"top_k={top_k} finds nothing: give 1 or more")
        exclude = [None] * len(users) if exclude is None else exclude
        if len(exclude) != len(users):
            raise ValueError(f"exclude has {len(exclude)} entries for {len(users)} users: give one for each")
        names = [{normalize_id(item_id, "exclude") for item_id in own or ()} for own in exclude]
        left_out = [[row for name in own if (row := state.row(name)) is not None] for own in names]
        found = _ask_index(state, users, top_k, left_out, filter)
        missing = [number for number, own in enumerate(found) if own is None]
        if missing:
            exact = _search_all(state, users[missing], top_k, [left_out[number] for number in missing], filter)
            for number, own in zip(missing, exact):
                found[number] = own
        return [own for own in found if own is not None]


def check_fingerprint(fingerprint: str, model: Model) -> None:
    """Raise if another model made the vectors."""
    found = model.fingerprint()
    if found != fingerprint:
        raise ValueError(
            f"the catalogue's vectors were made by a model with fingerprint {fingerprint[:12]}, this one has "
            f"{found[:12]} (other weights, adapters or number type): make them again with "
            "catalogue.encode(model, processor)"
        )


def cosines(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Multiply normalised B x D and M x D vectors: B x M, each rounded once, whatever stands beside it."""
    return (users.double()[:, None] * items.double()).sum(-1).float()


def _search_all(
    state: State, users: torch.Tensor, top_k: int, left_out: list[list[int]], predicate: Predicate | None
) -> list[Ranking]:
    """Search all N rows."""
    allowed = _allowed(state, predicate)
    scores = torch.cat((users @ state.base.T, users @ state.side.T), 1)
    found = []
    for user, own, rows in zip(users, scores, left_out):
        kept = allowed.clone()
        kept[rows] = False
        count = min(top_k, int(kept.sum()))
        own = own.masked_fill(~kept, -torch.inf)
        cut = own.topk(count).values[-1] - ROUNDING if count else torch.inf
        found.append(_ranked(state, user, (own >= cut).nonzero()[:, 0], count))
    return found


def _allowed(state: State, predicate: Predicate | None) -> torch.Tensor:
    """Say which of the N rows may be found."""
    if predicate is None:
        return state.live
    allowed = torch.zeros_like(state.live)
    allowed[[row for row in state.live_rows() if predicate(state.fields(row))]] = True
    return allowed


def _ask_index(
    state: State, users: torch.Tensor, top_k: int, left_out: list[list[int]], predicate: Predicate | None
) -> list[Ranking | None]:
    """Search by the index, ever more widely; None for a user whom it did not answer.

    What is removed, left out or filtered is dropped from what the index finds, so that the filter sees few items.
    """
    answers: list[Ranking | None] = [None] * len(users)
    if state.index is None:
        return answers
    verdicts: dict[int, bool] = {}

    def allowed(row: int) -> bool:
        if row not in verdicts:
            verdicts[row] = predicate is None or predicate(state.fields(row))
        return verdicts[row]

    waiting = list(range(len(users)))
    count, breadth = top_k + EXTRA + max(map(len, left_out), default=0), 1
    while waiting and count <= EXACT_SHARE * len(state.live):
        asked = users[waiting]
        for number, base, side in zip(
            waiting, state.index.search(asked, count, breadth), nearest(asked, state.side, count)
        ):
            scores = torch.cat((base.scores, side.scores))
            rows = torch.cat((base.rows, side.rows + len(state.base)))
            own = {*left_out[number]}
            live = state.live[rows].tolist()
            kept = [place for place, row in enumerate(rows.tolist()) if live[place] and row not in own and allowed(row)]
            floor = max(base.floor, side.floor)
            answers[number] = _certain(state, users[number], scores[kept], rows[kept], floor, top_k)
        waiting = [number for number in waiting if answers[number] is None]
        count, breadth = WIDER * count, WIDER * breadth
    return answers


def _certain(
    state: State, user: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor, floor: float, top_k: int
) -> Ranking | None:
    """Rank what was found, if there is enough of it and no other row can tie with the last."""
    if len(rows) < top_k:
        return None
    cut = scores.topk(top_k).values[-1] - ROUNDING
    return _ranked(state, user, rows[scores >= cut].sort().values, top_k) if cut > floor else None


def _ranked(state: State, user: torch.Tensor, rows: torch.Tensor, count: int) -> Ranking:
    """Rank the finalists, whose rows ascend.

    A matrix product rounds by the shape of the matrix and the place in it, and FAISS in its own way. The finalists'
    scores are therefore computed anew, so that equal items tie, and neither batch size nor other items nor the
    index change a score.
    """
    exact = cosines(user[None], state.gather(rows))[0]
    order = exact.argsort(descending=True, stable=True)[:count]
    return [(state.ids[row], score) for row, score in zip(rows[order].tolist(), exact[order].tolist())]


__all__ = ["CatalogueView", "Predicate", "State", "check_fingerprint", "cosines"]
