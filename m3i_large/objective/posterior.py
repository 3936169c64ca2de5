"""-log P of the formula: Gaussian (regression, with decorrelation against collapse) and Boltzmann (softmax).

Every function returns one loss per row; dividing by global counts is the objective's business.
Legend: n rows, M columns, L tokens, D width, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian(
    prediction_nLD: Tensor,
    target_nLD: Tensor,
    *,
    moment_DD: Tensor | None,
    strength: float,
    sigma: float | None = None,
) -> Tensor:
    """Row losses (n,) of a regression: (mean |p - t|^2 + lambda mean p^T C p) / D, lambda D = `strength`.

    moment_DD is C, the mean of t t^T over all tokens of all ranks; None leaves the second part out. It is evaluated as
    sum((P C) * P), never through an (n L) x (n L) matrix. Both means run over the L tokens. With `sigma` the factor
    1 / D becomes the Gaussian's own 1 / (2 sigma^2).
    """
    width = prediction_nLD.shape[-1]
    p, t = prediction_nLD.float(), target_nLD.float()
    loss_n = (p - t).square().sum(-1).mean(1)
    if moment_DD is not None:
        loss_n = loss_n + strength / width * ((p @ moment_DD) * p).sum(-1).mean(1)
    return loss_n / width if sigma is None else loss_n / (2 * sigma**2)


def boltzmann(logit_nM: Tensor, label_n: Tensor, *, allowed_nM: Tensor | None = None) -> Tensor:
    """Row losses (n,): cross-entropy of the label's column among the allowed columns, which must include it."""
    logit_nM = logit_nM.float()
    if allowed_nM is not None:
        logit_nM = logit_nM.masked_fill(~allowed_nM, float("-inf"))
    return F.cross_entropy(logit_nM, label_n, reduction="none")


def second_moment(feature_nLD: Tensor) -> Tensor:
    """Sum of t t^T over this rank's tokens (D, D), float32."""
    flat = feature_nLD.flatten(0, 1).float()
    return flat.T @ flat


def effective_rank(moment_DD: Tensor) -> Tensor:
    """exp of the entropy of the normalised eigenvalues: 1 is collapsed, D is isotropic."""
    values = torch.linalg.eigvalsh(moment_DD.double()).clamp_min(0)
    share = values / values.sum().clamp_min(1e-30)
    return torch.exp(-(share * share.clamp_min(1e-30).log()).sum()).float()
