"""Probes: what a simple classifier on frozen features gets, trained on one directory and measured on another.

The feature is the mean of the backbone's tokens, which every objective trains. Legend: N test and M training samples,
D width, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, VOTE_TEMPERATURE = 20, 0.07  # as DINO evaluates
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
HOLDOUT = 5  # every so-many-th training sample chooses the weight decay, or the learning rate
QUERIES = 256  # compared with all training samples at once
# Beyond so many training samples regression is by stochastic gradients, as full passes take hours.
EXACT = 50_000
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
PASSES, SGD_BATCH, SGD_MOMENTUM = 10, 1024, 0.9


def knn(feature_ND: Tensor, *, train_MD: Tensor, label_M: Tensor, num_classes: int) -> Tensor:
    """Votes of the nearest training samples by cosine, weighted by exp(cosine / 0.07) -> (N, C)."""
    gallery_MD, rows = F.normalize(train_MD, dim=-1), []
    for query_nD in F.normalize(feature_ND, dim=-1).split(QUERIES):
        top = (query_nD @ gallery_MD.T).topk(min(NEIGHBOURS, len(train_MD)), dim=1)
        votes = feature_ND.new_zeros(len(query_nD), num_classes)
        rows.append(votes.scatter_add_(1, label_M[top.indices], (top.values / VOTE_TEMPERATURE).exp()))
    return torch.cat(rows)


def linear(feature_ND: Tensor, *, train_MD: Tensor, label_M: Tensor, num_classes: int) -> Tensor:
    """Logits (N, C) of multinomial regression on standardised features.

    Of few training samples it is exact: its weight decay is chosen on a part of them, then all are used. Of more than
    EXACT it is trained by `sweep`.
    """
    mean, std = train_MD.mean(0), train_MD.std(0).clamp_min(1e-6)
    x, train = (feature_ND - mean) / std, (train_MD - mean) / std
    held = torch.arange(len(train)) % HOLDOUT == 0
    if len(train) > EXACT:
        weight, bias = sweep(train, label_M, num_classes, held_M=held)
        return x @ weight + bias

    def accuracy(decay: float) -> float:
        weight, bias = _fit(train[~held], label_M[~held], num_classes, decay)
        return ((train[held] @ weight + bias).argmax(1) == label_M[held]).double().mean().item()

    weight, bias = _fit(train, label_M, num_classes, max(DECAYS, key=accuracy))
    return x @ weight + bias


def sweep(x_MD: Tensor, label_M: Tensor, num_classes: int, *, held_M: Tensor) -> tuple[Tensor, Tensor]:
    """Linear classifiers of several learning rates, trained side by side in the same passes by SGD with a cosine; the
    one that is best on the held samples, which none of them sees -> weight (D, C), bias (C,)."""
    rates_R11 = torch.tensor(RATES)[:, None, None]
    weight_RDC = torch.zeros(len(RATES), x_MD.shape[1], num_classes)
    bias_R1C = torch.zeros(len(RATES), 1, num_classes)
    speeds = [torch.zeros_like(weight_RDC), torch.zeros_like(bias_R1C)]
    own = torch.arange(len(x_MD))[~held_M]
    draws = torch.Generator().manual_seed(0)
    batches = [
        chunk for _ in range(PASSES) for chunk in own[torch.randperm(len(own), generator=draws)].split(SGD_BATCH)
    ]
    for step, rows in enumerate(batches):
        x_nD, rate_R11 = x_MD[rows], rates_R11 * (1 + math.cos(math.pi * step / len(batches))) / 2
        # The gradient of mean cross-entropy by the logits: probabilities minus targets, over n.
        error_RnC = (x_nD @ weight_RDC + bias_R1C).softmax(-1)
        error_RnC[:, torch.arange(len(rows)), label_M[rows]] -= 1
        gradients = (x_nD.T @ error_RnC / len(rows), error_RnC.mean(1, keepdim=True))
        for value, speed, gradient in zip((weight_RDC, bias_R1C), speeds, gradients, strict=True):
            speed.mul_(SGD_MOMENTUM).add_(gradient)
            value.sub_(rate_R11 * speed)
    right_R = torch.zeros(len(RATES))
    for rows in torch.arange(len(x_MD))[held_M].split(SGD_BATCH):
        right_R += ((x_MD[rows] @ weight_RDC + bias_R1C).argmax(-1) == label_M[rows]).sum(1)
    best = int(right_R.argmax())
    return weight_RDC[best], bias_R1C[best, 0]


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
