"""Recall at k, by chance and as measured, where several gallery items can be right."""

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

TOP = (1, 5, 10)


def matches(queries: Sequence[Hashable], gallery: Sequence[Hashable]) -> Tensor:
    """Which gallery items are right for which query: those with an equal label -> bool (Q, M)."""
    numbers: dict[Hashable, int] = {}
    q = torch.tensor([numbers.setdefault(label, len(numbers)) for label in queries])
    m = torch.tensor([numbers.setdefault(label, len(numbers)) for label in gallery])
    return q[:, None] == m[None]


def recall(score_QM: Tensor, right_QM: Tensor, *, k: int) -> float:
    """Share of queries with a right item among the k best; ties count against the query.

    An item is placed behind every wrong one of the same score, so that a model whose scores are all equal gets nothing.
    """
    best_Q = score_QM.masked_fill(~right_QM, float("-inf")).amax(1)
    ahead_Q = ((score_QM >= best_Q[:, None]) & ~right_QM).sum(1)
    return ((ahead_Q < k) & right_QM.any(1)).double().mean().item()


def chance_recall(right_QM: Tensor, *, k: int) -> float:
    """Expected recall at k of a random order: 1 - C(M - r, k) / C(M, k) for a query with r right items of M."""
    size = right_QM.shape[1]
    k = min(k, size)
    counts = right_QM.sum(1).tolist()
    return sum(1 - math.comb(size - r, k) / math.comb(size, k) for r in counts) / max(1, len(counts))


def recalls(name: str, score_QM: Tensor, right_QM: Tensor) -> dict[str, float]:
    """`name/R@k` for every k."""
    return {f"{name}/R@{k}": recall(score_QM, right_QM, k=k) for k in TOP}


def chance_recalls(name: str, right_QM: Tensor) -> dict[str, float]:
    """The same names by chance."""
    return {f"{name}/R@{k}": chance_recall(right_QM, k=k) for k in TOP}


def averaged(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every value over the parts (galleries, directions)."""
    return {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
