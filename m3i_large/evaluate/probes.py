"""Probes: what a simple classifier on frozen features gets, trained on one directory and measured on another.

The feature is the mean of the backbone's tokens, which every objective trains. Legend: N test and M training samples,
D width, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, VOTE_TEMPERATURE = 20, 0.07  # as DINO evaluates
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
HOLDOUT = 5  # every so-many-th training sample chooses the weight decay


def knn(feature_ND: Tensor, *, train_MD: Tensor, label_M: Tensor, num_classes: int) -> Tensor:
    """Votes of the nearest training samples by cosine, weighted by exp(cosine / 0.07) -> (N, C)."""
    cosine_NM = F.normalize(feature_ND, dim=-1) @ F.normalize(train_MD, dim=-1).T
    top = cosine_NM.topk(min(NEIGHBOURS, len(train_MD)), dim=1)
    votes = feature_ND.new_zeros(len(feature_ND), num_classes)
    return votes.scatter_add_(1, label_M[top.indices], (top.values / VOTE_TEMPERATURE).exp())


def linear(feature_ND: Tensor, *, train_MD: Tensor, label_M: Tensor, num_classes: int) -> Tensor:
    """Logits (N, C) of multinomial regression on standardised features; its weight decay is chosen on a part of the
    training samples, then all are used."""
    mean, std = train_MD.mean(0), train_MD.std(0).clamp_min(1e-6)
    x, train = (feature_ND - mean) / std, (train_MD - mean) / std
    held = torch.arange(len(train)) % HOLDOUT == 0

    def accuracy(decay: float) -> float:
        weight, bias = _fit(train[~held], label_M[~held], num_classes, decay)
        return ((train[held] @ weight + bias).argmax(1) == label_M[held]).double().mean().item()

    weight, bias = _fit(train, label_M, num_classes, max(DECAYS, key=accuracy))
    return x @ weight + bias


def _fit(x_MD: Tensor, label_M: Tensor, num_classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Minimises mean cross-entropy + decay / 2 * |weight|^2 by L-BFGS in float64."""
    x = x_MD.double()
    weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, label_M) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().to(x_MD.dtype), bias.detach().to(x_MD.dtype)


PROBES = {"knn": knn, "linear": linear}
