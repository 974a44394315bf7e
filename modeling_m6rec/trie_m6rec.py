"""Constrained writing: a trie of the texts of a catalogue's items, and a logits processor that follows it.

A trie is stored level by level in int32 arrays, so that the children of a node are consecutive. Texts are numbered in
lexicographic order, so that the texts below a node are consecutive too: how many of them are live is a difference of
two entries of one running sum. A filter or a removal therefore needs no change of the trie, only another running sum.

Beam search under a trie is plausibility ranking that is pruned: a beam's score is the mean log-likelihood of an item's
tokens and [EOS]. Ours; the paper ranks by plausibility, and does not constrain what is written.

Shapes: N texts (one for each row of a catalogue), M nodes of a piece, P pieces, B rows of a batch, R requests.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import LogitsProcessor

from .atomic_m6rec import atomic_file
from .values_m6rec import short

FORMAT = 1
"""Format of a saved trie."""

MERGED_SHARE = 0.1
"""A piece that has more than this share of the texts of the piece before it is merged into that one."""

UNLIKELY = -1e9
"""Score of padding where a text can go on. Where fewer texts are left than beams, beam search takes it, not a token
that is impossible, which might begin another segment."""

ARRAYS = ("token", "first", "low", "high", "order", "levels")


class Piece(NamedTuple):
    """A trie that does not change.

    Node 0 is the root. Nodes are numbered level by level, in lexicographic order within a level.
    """

    token: np.ndarray
    """M: the token that leads to a node; -1 for the root."""
    first: np.ndarray
    """M + 1: the children of node n are the nodes from first[n] up to, not including, first[n + 1]."""
    low: np.ndarray
    """M: the texts below node n, in lexicographic order, are those from low[n] up to, not including, high[n]."""
    high: np.ndarray
    """M."""
    order: np.ndarray
    """The row of each text, in lexicographic order."""
    levels: np.ndarray
    """The first node of each level, and M."""

    @property
    def depth(self) -> int:
        """The number of tokens of the longest text, including [EOS]."""
        return len(self.levels) - 2

    def step(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the child of each node by a token; -1 = there is none, or the node is -1."""
        low, high = self.first[nodes], self.first[nodes + 1]
        high, last = np.where(nodes < 0, low, high), high
        while (open_ := low < high).any():
            middle = (low + high) >> 1
            smaller = open_ & (self.token[np.minimum(middle, len(self.token) - 1)] < tokens)
            low, high = np.where(smaller, middle + 1, low), np.where(open_ & ~smaller, middle, high)
        found = (nodes >= 0) & (low < last) & (self.token[np.minimum(low, len(self.token) - 1)] == tokens)
        return np.where(found, low, -1)

    def texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of all texts one after another, and the length of each, in lexicographic order."""
        places, tokens = [], []
        for start, end in zip(self.levels[1:-1], self.levels[2:]):
            nodes = slice(start, end)
            sizes = self.high[nodes] - self.low[nodes]
            places.append(_ranges(self.low[nodes], sizes))
            tokens.append(np.repeat(self.token[nodes], sizes))
        lengths = np.bincount(np.concatenate(places), minlength=len(self.order))
        starts = np.cumsum(lengths) - lengths
        flat = np.empty(int(lengths.sum()), np.int32)
        for level, (place, own) in enumerate(zip(places, tokens)):
            flat[starts[place] + level] = own
        return flat, lengths


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return consecutive numbers from each start, so many as its size, one range after another."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def make_piece(flat: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> Piece:
    """Make a trie of texts.

    Args:
        flat: The tokens of all texts, one after another; the last of each is [EOS], which occurs nowhere else.
        lengths: The number of tokens of each text.
        rows: The row of each text.
    """
    vocabulary = int(flat.max()) + 1
    starts, node = np.cumsum(lengths) - lengths, np.zeros(len(lengths), np.int64)
    tokens, parents = [np.array([-1])], [np.array([], np.int64)]
    lows, sizes, levels = [np.array([0])], [np.array([len(lengths)])], [0, 1]
    for level in range(int(lengths.max())):
        longer = np.flatnonzero(lengths > level)
        keys, inverse, counts = np.unique(
            node[longer] * vocabulary + flat[starts[longer] + level], return_inverse=True, return_counts=True
        )
        parent = keys // vocabulary
        before = np.cumsum(counts) - counts
        eldest = np.maximum.accumulate(np.where(np.diff(parent, prepend=-1) != 0, np.arange(len(keys)), 0))
        lows.append(lows[-1][parent - levels[-2]] + before - before[eldest])
        sizes.append(counts)
        tokens.append(keys % vocabulary)
        parents.append(parent)
        node[longer] = levels[-1] + inverse
        levels.append(levels[-1] + len(keys))
    low = np.concatenate(lows)
    # All but the root are somebody's children, in the order of the parents.
    first = 1 + np.searchsorted(np.concatenate(parents), np.arange(levels[-1] + 1))
    order = rows[np.argsort(low[node], kind="stable")]
    arrays = (np.concatenate(tokens), first, low, low + np.concatenate(sizes), order, np.array(levels))
    return Piece(*(array.astype(np.int32) for array in arrays))


@dataclass(frozen=True)
class ItemTrie:
    """The texts of items as ids. A trie does not change: `add`, `remove` and `where` return another that shares arrays.

    Several items may have the same text. A state of a search is a row of P nodes, one of each piece, -1 = none.

    Attributes:
        pieces: The texts of all rows: of the first rows, and of rows added since.
        ids: The id of each row.
        live: N, False for rows that may not be written.
        eos_token_id: The id that ends a text.
    """

    pieces: tuple[Piece, ...]
    ids: Sequence[str]
    live: np.ndarray
    eos_token_id: int

    @classmethod
    def from_texts(cls, texts: Sequence[Sequence[int]], item_ids: Sequence[str], eos_token_id: int) -> "ItemTrie":
        """Make a trie.

        Args:
            texts: The ids of each item's text as it is written, that is tokenized with what stands before it, without
                [EOS].
            item_ids: The id of each item.
            eos_token_id: The id that ends a text.

        Raises:
            ValueError: If a text is empty or contains [EOS], or there are not as many ids as texts.
        """
        return cls((), [], np.zeros(0, bool), eos_token_id).add(texts, item_ids)

    # ------------------------------------------------------------------------------------------------ other tries of it

    def add(self, texts: Sequence[Sequence[int]], item_ids: Sequence[str]) -> "ItemTrie":
        """Add items; arguments and errors as in `from_texts`.

        The new texts are a piece of their own, until it has a tenth of the texts of the piece before it.
        """
        if len(texts) != len(item_ids):
            raise ValueError(f"there are {len(texts)} texts and {len(item_ids)} item ids: give one id for each text")
        flat, lengths = self._flat(texts, item_ids)
        if not len(lengths):
            return self
        start = len(self.live)
        pieces = [*self.pieces, make_piece(flat, lengths, start + np.arange(len(lengths)))]
        while len(pieces) > 1 and len(pieces[-1].order) > MERGED_SHARE * len(pieces[-2].order):
            pieces[-2:] = [_merged(pieces[-2:])]
        live = np.concatenate((self.live, np.ones(len(texts), bool)))
        return replace(self, pieces=tuple(pieces), ids=[*self.ids, *item_ids], live=live)

    def remove(self, item_ids: Iterable[str]) -> "ItemTrie":
        """Remove items.

        Raises:
            ValueError: If an id is unknown.
        """
        live = self.live.copy()
        for item_id in item_ids:
            rows = self._rows.get(item_id)
            if rows is None or not live[rows].any():
                raise ValueError(f"item_id {short(item_id)} is not among the {int(live.sum())} items of the trie")
            live[rows] = False
        found = replace(self, live=live)
        found.__dict__["_rows"] = self._rows
        return found

    def where(self, live: np.ndarray) -> "ItemTrie":
        """Return the trie in which only some rows may be written: at most N flags, rows without a flag may not."""
        return replace(self, live=np.concatenate((live, np.zeros(len(self.live) - len(live), bool))))

    def kept(self, rows: Sequence[int]) -> "ItemTrie":
        """Return a trie of some rows only, which get new numbers, in one piece."""
        if not self.pieces or not len(rows):
            return replace(self, pieces=(), ids=[], live=np.zeros(0, bool))
        numbers: np.ndarray = np.full(len(self.live), -1)
        numbers[np.asarray(rows)] = np.arange(len(rows))
        piece = _merged(self.pieces, numbers)
        return replace(self, pieces=(piece,), ids=[self.ids[row] for row in rows], live=self.live[np.asarray(rows)])

    def _flat(self, texts: Sequence[Sequence[int]], item_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of texts one after another, each with [EOS], and their lengths."""
        end = (self.eos_token_id,)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
        flat = np.fromiter(chain.from_iterable(chain(text, end) for text in texts), np.int64, int(lengths.sum()))
        places = np.cumsum(lengths) - 1
        wrong = lengths == 1
        ends = np.flatnonzero(flat == self.eos_token_id)
        if len(ends) != len(places):
            owner = np.searchsorted(places, ends[~np.isin(ends, places)])
            raise ValueError(f"the text of item {short(item_ids[int(owner[0])])} contains the id that ends a text")
        if wrong.any():
            raise ValueError(f"the text of item {short(item_ids[int(wrong.argmax())])} is empty: give the item a text")
        return flat, lengths

    # ------------------------------------------------------------------------------------------------------- searches

    def __len__(self) -> int:
        """Number of live items."""
        return int(self.live.sum())

    @property
    def depth(self) -> int:
        """The number of tokens of the longest text, including [EOS]."""
        return max((piece.depth for piece in self.pieces), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for piece in self.pieces for array in piece) + self.live.nbytes

    @property
    def root(self) -> np.ndarray:
        """The state before the first token: P nodes."""
        return np.zeros(len(self.pieces), np.int64)

    @cached_property
    def sums(self) -> list[np.ndarray]:
        """For each piece, the number of live texts before each text, in lexicographic order, and their number."""
        return [np.concatenate(([0], np.cumsum(self.live[piece.order]))).astype(np.int32) for piece in self.pieces]

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, item_id in enumerate(self.ids):
            rows.setdefault(item_id, []).append(row)
        return rows

    def step(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the states after one more token: B x P nodes and B tokens -> B x P nodes."""
        found = [piece.step(own, tokens) for piece, own in zip(self.pieces, nodes.T)]
        return np.stack(found, 1) if found else nodes

    def children(
        self, nodes: np.ndarray, sums: Sequence[np.ndarray] | None = None, owners: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that lead on to live texts.

        Args:
            nodes: B x P nodes.
            sums: Running sums of several tries of the same pieces: for each piece R x (texts + 1); None = this one's.
            owners: B: which of the R running sums counts for a row.

        Returns:
            The row (from 0 to B - 1) and the token of each continuation; a token may occur twice in a row.
        """
        sums = [own[None] for own in self.sums] if sums is None else sums
        owners = np.zeros(len(nodes), np.int64) if owners is None else owners
        rows, tokens = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for piece, own, counts in zip(self.pieces, nodes.T, sums):
            some = np.flatnonzero(own >= 0)
            starts = piece.first[own[some]].astype(np.int64)
            sizes = piece.first[own[some] + 1] - starts
            child, row = _ranges(starts, sizes), np.repeat(some, sizes)
            owner = owners[row]
            live = counts[owner, piece.high[child]] > counts[owner, piece.low[child]]
            rows.append(row[live])
            tokens.append(piece.token[child[live]])
        return np.concatenate(rows), np.concatenate(tokens)

    def items(self, written: Sequence[int]) -> list[int]:
        """Return the live rows whose text was written: ids up to and including [EOS]; empty if there are none."""
        nodes = self.root[None]
        for token in written:
            nodes = self.step(nodes, np.array([token]))
            if token == self.eos_token_id:
                break
        else:
            return []
        rows = [
            piece.order[piece.low[node] : piece.high[node]] for piece, node in zip(self.pieces, nodes[0]) if node > 0
        ]
        return sorted(int(row) for row in np.concatenate([*rows, np.empty(0, np.int32)]) if self.live[int(row)])

    # -------------------------------------------------------------------------------------------------------- keeping

    def save(self, path: str | Path) -> None:
        """Write the trie atomically to one safetensors file."""
        arrays = {
            f"{number}.{name}": own for number, piece in enumerate(self.pieces) for name, own in zip(ARRAYS, piece)
        }
        ids = np.frombuffer(json.dumps(list(self.ids)).encode(), np.uint8)
        settings = {"format": FORMAT, "eos_token_id": self.eos_token_id, "pieces": len(self.pieces)}
        with atomic_file(path) as partial:
            save_file(
                {**arrays, "live": self.live, "ids": ids}, partial, {name: str(own) for name, own in settings.items()}
            )

    @classmethod
    def load(cls, path: str | Path) -> "ItemTrie":
        """Read a trie.

        Raises:
            ValueError: If the file is damaged, or of a newer format.
        """
        try:
            with safe_open(path, "numpy") as file:
                given = file.metadata() or {}
                if "eos_token_id" not in given:
                    raise ValueError(f"{path} holds no trie: make one by ItemTrie.from_texts, and save it")
                settings = {name: int(own) for name, own in given.items()}
                if settings["format"] > FORMAT:
                    raise ValueError(
                        f"{path} has format {settings['format']}, which a newer version wrote: upgrade m6rec"
                    )
                numbers = range(settings["pieces"])
                pieces = tuple(Piece(*(file.get_tensor(f"{number}.{name}") for name in ARRAYS)) for number in numbers)
                ids = json.loads(file.get_tensor("ids").tobytes())
                return cls(pieces, ids, file.get_tensor("live"), settings["eos_token_id"])
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no trie: {error}. Make it again by ItemTrie.from_texts") from error


def _merged(pieces: Iterable[Piece], numbers: np.ndarray | None = None) -> Piece:
    """Merge pieces; `numbers` gives each row its new number, -1 = it is left out."""
    flats, lengths, rows = [], [], []
    for piece in pieces:
        (flat, own), row = piece.texts(), piece.order
        if numbers is not None:
            row = numbers[row]
            flat, own, row = flat[np.repeat(row >= 0, own)], own[row >= 0], row[row >= 0]
        flats.append(flat)
        lengths.append(own)
        rows.append(row)
    flat, own, row = (np.concatenate(each) for each in (flats, lengths, rows))
    oldest = np.argsort(row)  # so that items of one text keep their order
    starts = np.cumsum(own) - own
    return make_piece(flat[_ranges(starts[oldest], own[oldest])], own[oldest], row[oldest])


class TrieProcessor(LogitsProcessor):
    """Lets `generate` write only texts of a trie: greedily, by beams or by sampling.

    The state of a row depends on the ids it has written alone, so that beams may be reordered. A row that has ended, or
    can lead to no live text, may only be padded. (Beam search fills its places with such rows if there are fewer texts
    than beams; `found` leaves them out.)

    Args:
        tries: A trie for each request of a batch; all are made by `where` of one trie.
        prompt_length: The width of the prompts, which are padded on the left.
        pad_token_id: The id of padding.

    Raises:
        ValueError: If a trie has no live item.
    """

    def __init__(self, tries: Sequence[ItemTrie], prompt_length: int, pad_token_id: int) -> None:
        self.tries, self.trie = list(tries), tries[0]
        self.prompt_length, self.pad_token_id = prompt_length, pad_token_id
        self.finished = False
        """Whether no row could be continued at the last step."""
        for number, trie in enumerate(self.tries):
            if trie.pieces is not self.trie.pieces:
                raise ValueError("tries of one batch must be made of one trie, by `where`")
            if not trie.live.any():
                raise ValueError(f"request {number}: there is no item left that may be written: all are left out")
        self._sums = [np.stack(own) for own in zip(*(trie.sums for trie in self.tries))]
        self._past: _Step | None = None
        self._ended: dict[tuple[int, bytes], float] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores of all tokens but padding that lead to no live item to minus infinity.

        Args:
            input_ids: B x T ids so far; each request has the same number of consecutive rows.
            scores: B x V.

        Raises:
            ValueError: If another setting of `generate` forbids what the trie allows.
        """
        written = np.ascontiguousarray(input_ids[:, self.prompt_length :].cpu().numpy(), np.int64)
        owners = np.arange(len(written)) * len(self.tries) // len(written)
        step = self._past = self._next(written, owners, scores)
        if not written.shape[1]:
            return self._first(scores, len(written) // len(self.tries))
        rows, tokens = self.trie.children(step.nodes, self._sums, owners)
        where = torch.from_numpy(rows).to(scores.device), torch.from_numpy(tokens.astype(np.int64)).to(scores.device)
        allowed = scores[where]
        _refuse_forbidden(allowed)
        constrained = torch.full_like(scores, -torch.inf)
        constrained[where] = allowed
        for row in rows[tokens == self.trie.eos_token_id].tolist():
            total = float(step.total[row]) + float(scores[row, self.trie.eos_token_id])
            self._ended[step.keys[row]] = total / (written.shape[1] + 1)
        done = torch.ones(len(written), dtype=torch.bool, device=scores.device)
        done[where[0]] = False
        constrained[:, self.pad_token_id] = torch.where(done, 0.0, UNLIKELY).to(scores.dtype)
        self.finished = bool(done.all())
        return constrained

    def _first(self, scores: torch.Tensor, each: int) -> torch.Tensor:
        """Constrain the first token, which has many choices that all `each` rows of a request share."""
        roots = np.tile(self.trie.root, (len(self.tries), 1))
        rows, tokens = self.trie.children(roots, self._sums, np.arange(len(self.tries)))
        allowed = torch.zeros(len(self.tries), scores.shape[1], dtype=torch.bool)
        allowed[torch.from_numpy(rows), torch.from_numpy(tokens.astype(np.int64))] = True
        allowed = allowed.to(scores.device)
        _refuse_forbidden(scores[::each][allowed])
        constrained = scores.masked_fill(~allowed.repeat_interleave(each, 0), -torch.inf)
        constrained[:, self.pad_token_id] = UNLIKELY
        return constrained

    def found(self, sequences: torch.Tensor) -> list[list[tuple[list[int], float]]]:
        """Return the different texts that a beam search has found for each request, the best first.

        Args:
            sequences: B x T ids, the prompts included; each request has the same number of consecutive rows.

        Returns:
            For each request the ids of texts, without [EOS], and the mean log-likelihood of a text's tokens and [EOS].
        """
        written = sequences[:, self.prompt_length :].tolist()
        found: list[dict[tuple[int, ...], float]] = [{} for _ in self.tries]
        for number, row in enumerate(written):
            owner, end = number * len(self.tries) // len(written), self.trie.eos_token_id
            text = row[: row.index(end)] if end in row else row
            score = self._ended.get((owner, np.array(text, np.int64).tobytes()))
            if score is not None:
                found[owner][tuple(text)] = score
        return [[(list(text), own[text]) for text in sorted(own, key=lambda text: -own[text])] for own in found]

    def _next(self, written: np.ndarray, owners: np.ndarray, scores: torch.Tensor) -> "_Step":
        """Return the state of each row, by its state one token earlier if that is known."""
        keys = [(owner, row.tobytes()) for owner, row in zip(owners.tolist(), written)]
        if not written.shape[1]:
            nodes, total = np.tile(self.trie.root, (len(written), 1)), np.zeros(len(written))
            return _Step(dict(zip(keys, range(len(keys)))), keys, nodes, total, scores)
        past = self._past
        before = [(owner, row[:-1].tobytes()) for owner, row in zip(owners.tolist(), written)]
        if past is None or not past.rows.keys() >= set(before):  # several tokens at once
            nodes = np.concatenate([self._walk(row[:-1]) for row in written])
            total = np.full(len(written), np.nan)
        else:
            parents, last = [past.rows[key] for key in before], torch.from_numpy(written[:, -1])
            nodes = past.nodes[parents]
            gained = past.scores[torch.tensor(parents), last.to(past.scores.device)].double().cpu().numpy()
            total = past.total[parents] + gained
        return _Step(dict(zip(keys, range(len(keys)))), keys, self.trie.step(nodes, written[:, -1]), total, scores)

    def _walk(self, written: np.ndarray) -> np.ndarray:
        """Return the state after some ids: 1 x P nodes."""
        nodes = self.trie.root[None]
        for token in written:
            nodes = self.trie.step(nodes, np.array([token]))
        return nodes


def _refuse_forbidden(allowed: torch.Tensor) -> None:
    """Raise if tokens that the trie allows have no score left."""
    if (allowed == -torch.inf).any():
        raise ValueError(
            "another setting forbids tokens that an item's text needs: leave out no_repeat_ngram_size, bad_words_ids, "
            "min_length, suppress_tokens and the like where a trie constrains what is written"
        )


class _Step(NamedTuple):
    """The rows of a batch before a token is written."""

    rows: dict[tuple[int, bytes], int]
    """A row of each (request, written ids)."""
    keys: list[tuple[int, bytes]]
    """The same of each row."""
    nodes: np.ndarray
    """B x P."""
    total: np.ndarray
    """B: the sum of the scores of what is written."""
    scores: torch.Tensor
    """B x V."""


__all__ = ["ItemTrie", "Piece", "TrieProcessor", "make_piece"]
