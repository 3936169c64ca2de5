"""Recall and its chance level against counting by hand and against random orders."""

import itertools

import pytest
import torch

from m3i_large.evaluate.ranking import averaged, chance_recall, matches, recall


def recall_by_hand(score: list[list[float]], right: list[list[bool]], k: int) -> float:
    hits = 0
    for row, good in zip(score, right, strict=True):
        # the worst order that the scores allow: among equals the wrong ones come first
        order = sorted(range(len(row)), key=lambda i: (-row[i], good[i]))
        hits += any(good[i] for i in order[:k])
    return hits / len(score)


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_recall_equals_counting_with_ties_against_the_model(k: int) -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (40, 12), generator=g).float()
    right = torch.rand(40, 12, generator=g) < 0.15
    right[3] = False
    assert recall(score, right, k=k) == pytest.approx(recall_by_hand(score.tolist(), right.tolist(), k))
    assert recall(torch.zeros(5, 5), torch.eye(5, dtype=torch.bool), k=1) == 0


def test_chance_is_the_mean_over_all_orders() -> None:
    right = torch.tensor([[True, False, False, False], [True, True, False, False], [False] * 4])
    for k in (1, 2, 3):
        orders = list(itertools.permutations(range(4)))
        hits = [any(row[i] for i in order[:k]) for row in right.tolist() for order in orders]
        assert chance_recall(right, k=k) == pytest.approx(sum(hits) / len(hits))
    assert chance_recall(torch.eye(171, dtype=torch.bool), k=1) == pytest.approx(1 / 171)


def test_labels_match_by_value() -> None:
    assert matches(["a", "b"], ["b", "a", "b"]).tolist() == [[False, True, False], [True, False, True]]
    assert averaged([{"x": 1.0}, {"x": 0.0}]) == {"x": 0.5}
