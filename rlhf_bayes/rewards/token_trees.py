"""Texts that begin alike as trees of tokens, so that a causal classifier reads what they share only once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from torch import Tensor

_MOST_NODES = 2048  # of a tree: its mask has so many rows and columns
_READ_ONCE: ContextVar[bool] = ContextVar("read_once", default=False)


@contextmanager
def shared_beginnings() -> Iterator[None]:
    """
    A context in which classifiers that can do so read the beginnings that consecutive texts share only once.

    The logits are those of each text read by itself, but for rounding. It pays where texts are prefixes of one
    another: T of them cost one pass of a few T tokens, rather than T passes.
    """
    token = _READ_ONCE.set(True)
    try:
        yield
    finally:
        _READ_ONCE.reset(token)


def beginnings_are_shared() -> bool:
    """Whether the code runs within [`shared_beginnings`]."""
    return _READ_ONCE.get()


@final
@dataclass
class TokenTree:
    """Token ids of texts as a tree of L nodes: a node is a token with all that comes before it."""

    ids: list[int] = field(default_factory=list)
    """(L,): a token for each node, after its parent."""
    parents: list[int] = field(default_factory=list)
    """(L,): the node of the token before; -1 for the first token of a text."""
    ends: list[int] = field(default_factory=list)
    """(N,): the node of the last token of each text."""

    def add(self, tokens: Sequence[int], path: list[int]) -> list[int]:
        """Add a text whose first tokens are on `path`; returns its nodes, one for each token."""
        path = list(path)
        for token in tokens[len(path) :]:
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.ids))
            self.ids.append(token)
        self.ends.append(path[-1])
        return path

    def positions(self) -> list[int]:
        """(L,): how many tokens come before each node."""
        positions: list[int] = []
        for parent in self.parents:
            positions.append(positions[parent] + 1 if parent >= 0 else 0)
        return positions

    def sees(self) -> Tensor:
        """(L, L) bool: whether a node, in a row, reads another, in a column: itself and what comes before it."""
        sees = np.eye(len(self.ids), dtype=bool)  # numpy, which takes less time for a row than torch
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return torch.from_numpy(sees)


def token_trees(rows: Iterable[Sequence[int]], most_nodes: int = _MOST_NODES) -> Iterator[TokenTree]:
    """
    Trees that hold texts in order: a text is put to the one before it if it shares at least half of that one's tokens.

    Args:
        rows (`Iterable[Sequence[int]]`): Token ids of each text, at least one.
        most_nodes (`int`, *optional*): Nodes of a tree of several texts.
    """
    tree, before, path = TokenTree(), (), []
    for row in rows:
        shared = _num_shared(before, row)
        new_nodes = len(row) - shared
        if tree.ends and (2 * shared < len(before) or len(tree.ids) + new_nodes > most_nodes):
            yield tree
            tree, shared = TokenTree(), 0
        path, before = tree.add(row, path[:shared]), row
    if tree.ends:
        yield tree


def tree_inputs(trees: Sequence[TokenTree], pad_token_id: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """
    Inputs of a causal model that reads these trees, B of up to L nodes.

    Returns:
        `input_ids` and `position_ids` (B, L), and `attention_mask` (B, 1, L, L), which is added to the attention's
        scores: 0 where a node reads another, else the lowest number of `dtype`.
    """
    length = max(len(tree.ids) for tree in trees)
    ids = torch.full((len(trees), length), pad_token_id)
    positions = torch.zeros_like(ids)
    sees = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding reads itself, so no row is empty
    for row, tree in enumerate(trees):
        nodes = len(tree.ids)
        ids[row, :nodes] = torch.tensor(tree.ids)
        positions[row, :nodes] = torch.tensor(tree.positions())
        sees[row, :nodes, :nodes] = tree.sees()
    # a number rather than a bool, which attention without torch's kernels would add as it is
    hidden = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": hidden[:, None]}


def in_batches(trees: Iterable[TokenTree], most_entries: int = 4 * _MOST_NODES**2) -> Iterator[list[TokenTree]]:
    """Batches of trees, in order, whose masks have at most `most_entries` numbers, but at least one tree."""
    batch: list[TokenTree] = []
    longest = 0
    for tree in trees:
        longest = max(longest, len(tree.ids))
        if batch and (len(batch) + 1) * longest**2 > most_entries:
            yield batch
            batch, longest = [], len(tree.ids)
        batch.append(tree)
    if batch:
        yield batch


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return number
    return min(len(one), len(other))
