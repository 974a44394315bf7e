"""Evidence as sparse matrices, by which the weights of many users are multiplied at once.

The products equal those of `Transitions` and `Words`, which add one pair after the other, up to rounding in float32.
"""

import warnings

import numpy as np
import torch

from ...item_features_m6rec import WIDTH, Sparse, Transitions, Words

DENSE_SHARE = 0.125
"""Share of the cells from which a matrix is multiplied as a dense one."""
PAIR, STEP, SORTED = 40.0, 0.5, 150.0
"""Nanoseconds to add one pair by itself, to add it for one more user in a product, and to prepare it for products."""


class Product:
    """A matrix of R x C by which users' weights are multiplied.

    Args:
        rows: Row of each entry.
        columns: Its column; no two entries have the same row and column.
        values: Its value.
        shape: R and C.

    >>> Product(np.array([0, 0, 1]), np.array([2, 0, 1]), np.array([1.0, 2.0, 3.0]), (2, 3))(torch.ones(1, 2)).tolist()
    [[2.0, 3.0, 1.0]]
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.is_dense = len(values) > DENSE_SHARE * shape[0] * shape[1]
        if self.is_dense:
            self.matrix = torch.zeros(shape)
            self.matrix[torch.from_numpy(rows), torch.from_numpy(columns)] = torch.from_numpy(values).float()
        else:
            order = np.argsort(columns * shape[0] + rows, kind="stable")
            places = torch.from_numpy(np.stack((columns[order], rows[order])))
            entries, turned = torch.from_numpy(values[order]).float(), (shape[1], shape[0])
            self.matrix = torch.sparse_coo_tensor(places, entries, turned, check_invariants=False, is_coalesced=True)

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        """Multiply the weights of U users, U x R in float32: U x C."""
        if self.is_dense:
            return weights @ self.matrix
        return (self.matrix @ weights.T.contiguous()).T.contiguous()


class SparseRows:
    """A sparse matrix of R x C by its rows, for products of blocks.

    Args:
        rows: Row of each entry, ascending.
        columns: Its column.
        values: Its value.
        shape: R and C.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> None:
        self.columns, self.values, self.shape = columns, values.astype(np.float32), shape
        self.starts = np.searchsorted(rows, np.arange(shape[0] + 1))

    def block(self, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> torch.Tensor:
        """Return the block of some distinct rows and columns (None = all), in the order given, as a sparse tensor."""
        own = np.arange(self.shape[0]) if rows is None else rows
        lengths = self.starts[own + 1] - self.starts[own]
        owners = np.repeat(np.arange(len(own)), lengths)
        entries = np.arange(len(owners)) + np.repeat(self.starts[own] - np.cumsum(lengths) + lengths, lengths)
        places, values = self.columns[entries], self.values[entries]
        if columns is not None:
            new = np.full(self.shape[1], -1)
            new[columns] = np.arange(len(columns))
            places = new[places]
            kept = places >= 0
            owners, places, values = owners[kept], places[kept], values[kept]
        width = self.shape[1] if columns is None else len(columns)
        indices = torch.from_numpy(np.stack((owners, places)))
        return torch.sparse_coo_tensor(
            indices, torch.from_numpy(values), (len(own), width), check_invariants=False
        ).coalesce()


def transition_rows(transitions: Transitions) -> SparseRows:
    """Return the matrix P of transitions: M x M."""
    return SparseRows(*_entries(transitions), (transitions.num_items, transitions.num_items))


def word_rows(words: Words) -> SparseRows:
    """Return the TF-IDF vectors of texts, of length 1: M x W."""
    rows = np.repeat(np.arange(len(words.live)), np.diff(words.starts))
    values = words.rarity[words.columns] / words.norms[rows]
    return SparseRows(rows, words.columns, values, (len(words.live), len(words.rarity)))


def multiplied(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Multiply two sparse tensors; the product is dense."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse.mm(first, second).to_dense()


def _entries(own: Transitions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row, column and value of each entry of P, by row."""
    keys, totals = own.counts()
    first, second = np.divmod(keys, WIDTH)
    values = totals * own.unit / np.maximum(own.out * own.unit, 1)[first] ** own.rule.out_power
    return first, second, values / np.maximum(own.into * own.unit, 1)[second] ** own.rule.in_power


class Following:
    """Transitions, multiplied in the quicker way.

    Args:
        transitions: The transitions between M items.
    """

    def __init__(self, transitions: Transitions) -> None:
        self.transitions = transitions
        self._product: Product | None = None

    @property
    def product(self) -> Product:
        """The matrix P."""
        if self._product is None:
            size = self.transitions.num_items
            self._product = Product(*_entries(self.transitions), (size, size))
        return self._product

    def after(self, shares: Sparse, count: int) -> torch.Tensor:
        """Multiply the weights of `count` users at items with P: U x M."""
        own, levels = self.transitions, self.transitions.levels
        pairs = sum(len(level.keys) for level in levels)
        spans = (level.spans(shares.items, own.num_items) for level in levels)
        entries = sum(int((high - low).sum()) for low, high in spans)
        if PAIR * entries <= pairs * (STEP * count + SORTED * (self._product is None)):
            return torch.from_numpy(own.follow(shares).dense(count, own.num_items)).float()
        return self.product(dense(shares, count, own.num_items))


class Likeness:
    """Common words of M texts: the cosines of their TF-IDF vectors.

    Args:
        words: The words of the texts.
    """

    def __init__(self, words: Words) -> None:
        own = word_rows(words)
        rows = np.repeat(np.arange(own.shape[0]), np.diff(own.starts))
        self._vectors = Product(rows, own.columns, own.values, own.shape)
        self._rows = Product(own.columns, rows, own.values, (own.shape[1], own.shape[0]))

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        """Compare all texts with users' weighted texts: U x M -> U x M."""
        return self._rows(self._vectors(weights))


def dense(shares: Sparse, count: int, width: int) -> torch.Tensor:
    """Return weights of `count` users as a table: U x `width` in float32."""
    table = torch.zeros(count, width)
    table[torch.from_numpy(shares.users), torch.from_numpy(shares.items)] = torch.from_numpy(shares.values).float()
    return table


__all__ = ["Following", "Likeness", "Product", "SparseRows", "dense", "multiplied", "transition_rows", "word_rows"]
