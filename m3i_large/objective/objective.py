"""M3I: two inputs in one mixed image, up to four targets, one loss (METHOD sections 1-3; paper Eq. 3-5).

Legend: N local rows, L = G * G tokens, K own and L - K foreign tokens of a mixed image, D width, E pooled width,
F shared image-text width, T text tokens, V views, 2N = rows seen as image i (own part), then as image j (foreign part).

Every loss is a mean over all valid rows of all ranks. A rank returns world * (sum of its rows) / (global count), so
that the mean over ranks, which ZeRO takes of the gradients, is the global mean.
"""

from typing import Any

import torch
import torch.nn.functional as F
from m3i_kernels.patch_mix import patch_mix
from torch import Tensor, nn

from m3i_large.data.batch import OTHER_VIEW, TARGET_VIEW, Batch
from m3i_large.errors import UserError
from m3i_large.objective.collectives import Collectives
from m3i_large.objective.config import DENSE, ObjectiveConfig
from m3i_large.objective.geometry import grid_position, relative_position
from m3i_large.objective.posterior import boltzmann, effective_rank, gaussian, second_moment


class Objective(nn.Module):
    """Sum of the recipe's terms over one micro-batch.

    Args:
        config: mixing and terms.
        student, target: image encoders with `tokens(image_BCHW) -> (B, L, D)`; the target is frozen.
        text, pool, decoder, category_head, text_head: see models/; None where no term needs one.
        collectives: gather and reduce over the ranks of the contrast batch.
        mean, std: per channel, in [0, 1] units.
        num_sources: sources of the recipe, for per-source losses.
        compute_dtype: of the images handed to the encoders.

    Raises:
        UserError: a mask cell that is no multiple of a token, or does not tile the image.
    """

    # Towers are arguments with the interface of models/; torch would type these attributes as Tensor | Module.
    student: Any
    target: Any
    text: Any
    decoder: Any
    pool: Any
    category_head: Any
    text_head: Any

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        student: Any,
        target: nn.Module | None,
        text: nn.Module | None,
        decoder: nn.Module | None,
        pool: nn.Module | None,
        category_head: nn.Module | None,
        text_head: nn.Module | None,
        collectives: Collectives,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_sources: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.collectives = config, collectives
        self.student, self.target, self.text, self.decoder = student, target, text, decoder
        self.pool, self.category_head, self.text_head = pool, category_head, text_head
        self.mean, self.std, self.num_sources, self.compute_dtype = mean, std, num_sources, compute_dtype
        patch, stride, size = config.mix.patch, student.token_stride, student.image_size
        if patch % stride or size % patch:
            raise UserError(
                f"objective.mix.patch: got {patch}; needed: a multiple of the token stride {stride} that divides {size}"
            )
        self.grid: int = student.grid
        cells = (size // patch) ** 2
        self.num_own = round(config.mix.ratio * cells) * (patch // stride) ** 2

    def forward(self, batch: Batch, *, signals: bool = False) -> dict[str, Tensor]:
        """Losses of one micro-batch, keyed as in metrics.jsonl.

        Returns "loss" (with graph), "loss/<term>", "source/<term>" (num_sources, 2) with the sum and count of row
        losses, "optim/temperature" where there is a text term, and with `signals` "collapse/<term>/{std,rank}".
        """
        mixed, own = self._images(batch)
        token_NLD = self.student.tokens(mixed)
        own_NK, foreign_NK = self._split(batch.mask_NPP)
        image_of_j = torch.argsort(batch.partner_N)  # the mixed row whose foreign part shows image n
        out: dict[str, Tensor] = {}
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        if self.config.dense:
            feature_NLD, moment_DD = self._target(own)
            rows |= self._dense_rows(batch, token_NLD, own_NK, foreign_NK, image_of_j, feature_NLD, moment_DD)
            if signals:
                out |= self._signals(feature_NLD, moment_DD)
        if self.config.has("category") or self.config.has("text"):
            pooled_i, pooled_j = self._pooled(token_NLD, own_NK, foreign_NK)
            pooled_j = pooled_j[image_of_j]
            if self.config.has("category"):
                rows["category"] = self._category_rows(batch, pooled_i, pooled_j)
            if self.config.has("text"):
                rows["text"], out["optim/temperature"] = self._text_rows(batch, pooled_i, pooled_j)
        return out | self._sum(batch, rows)

    # -- the parts, in the order of forward ---------------------------------------------------------------------------

    @torch.no_grad()
    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """mixed_n = m_n * y_n + (1 - m_n) * x_partner(n), and y_n itself."""
        return patch_mix(
            batch.target_NHWC,
            batch.other_NHWC,
            colour_NV34=batch.colour_NV34,
            solarize_NV=batch.solarize_NV,
            flip_NV=batch.flip_NV,
            partner_N=batch.partner_N,
            mask_NPP=batch.mask_NPP,
            mean=self.mean,
            std=self.std,
            dtype=self.compute_dtype,
        )

    def _split(self, mask_NPP: Tensor) -> tuple[Tensor, Tensor]:
        """Token indices of the own and of the foreign part, each in raster order -> (N, K), (N, L - K)."""
        repeat = self.grid // mask_NPP.shape[-1]
        own_NL = mask_NPP.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2).flatten(1)
        order_NL = torch.argsort(own_NL.logical_not().to(torch.int8), dim=1, stable=True)
        return order_NL[:, : self.num_own], order_NL[:, self.num_own :]

    @torch.no_grad()
    def _target(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """LayerNorm (no affine) of the target's tokens, and their second moment over all ranks."""
        token_NLD = self.target.tokens(own)
        feature_NLD = F.layer_norm(token_NLD.float(), token_NLD.shape[-1:])
        tokens = feature_NLD.shape[0] * feature_NLD.shape[1] * self.collectives.world
        return feature_NLD, self.collectives.all_reduce_sum(second_moment(feature_NLD)) / tokens

    def _dense_rows(
        self,
        batch: Batch,
        token_NLD: Tensor,
        own_NK: Tensor,
        foreign_NK: Tensor,
        image_of_j: Tensor,
        feature_NLD: Tensor,
        moment_DD: Tensor,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Intra: features of image i from its own part. Inter: features of image j from the foreign part."""
        plain_L4 = grid_position(self.grid, device=token_NLD.device)
        query_i = plain_L4.expand(len(batch), -1, -1)
        boxes = (batch.box_NV4, batch.size_N2, batch.flip_NV)
        relative_NL4 = relative_position(*boxes, grid=self.grid, input_view=OTHER_VIEW, target_view=TARGET_VIEW)
        query_j = relative_NL4[batch.partner_N]
        predicted_i, predicted_j = self._decode(token_NLD, (own_NK, foreign_NK), (query_i, query_j), plain_L4)
        predicted = {"intra": predicted_i, "inter": predicted_j[image_of_j]}
        everyone = torch.ones(len(batch), dtype=torch.bool, device=token_NLD.device)
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for term in self.config.terms:
            if term.name in DENSE:
                moment = moment_DD if term.decorrelation else None
                loss_N = gaussian(
                    predicted[term.name], feature_NLD, moment_DD=moment, strength=term.decorrelation or 0.0
                )
                rows[term.name] = (loss_N, everyone)
        return rows

    def _decode(
        self, token_NLD: Tensor, parts: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], plain_L4: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both images' predictions; one call of the decoder where both parts have the same number of tokens."""
        context = [_take(token_NLD, part) for part in parts]
        position = [plain_L4[part] for part in parts]
        if parts[0].shape == parts[1].shape:
            both = self.decoder(torch.cat(context), torch.cat(position), torch.cat(queries))
            return both.chunk(2)
        own, foreign = (self.decoder(c, p, q) for c, p, q in zip(context, position, queries, strict=True))
        return own, foreign

    def _pooled(self, token_NLD: Tensor, own_NK: Tensor, foreign_NK: Tensor) -> tuple[Tensor, Tensor]:
        own, foreign = _take(token_NLD, own_NK), _take(token_NLD, foreign_NK)
        if own.shape == foreign.shape:
            return self.pool(torch.cat([own, foreign])).chunk(2)
        return self.pool(own), self.pool(foreign)

    def _category_rows(self, batch: Batch, pooled_i: Tensor, pooled_j: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over classes, as image i plus as image j, for rows with a label."""
        valid_N = batch.category_N >= 0
        index_n, real_n = _select(valid_N, batch.category_rows)
        logit = self.category_head(torch.cat([pooled_i[index_n], pooled_j[index_n]]))
        label_n = batch.category_N[index_n].clamp_min(0)
        logit_i, logit_j = logit.chunk(2)
        loss_n = boltzmann(logit_i, label_n) + boltzmann(logit_j, label_n)
        return _scatter(loss_n, index_n, real_n, len(batch)), valid_N

    def _text_rows(self, batch: Batch, pooled_i: Tensor, pooled_j: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """CLIP over all ranks, symmetric, as image i plus as image j: two separate N x N losses."""
        index_n, real_n = _select(batch.text_valid_N, batch.text_rows)
        token_nT = batch.text_NT[index_n]
        pooled = torch.cat([pooled_i[index_n], pooled_j[index_n]])
        image_2nF, text_nF, scale = self.text_head(pooled, self.text(token_nT))
        text_nF, scale = F.normalize(text_nF.float(), dim=-1), scale.float()
        gather = self.collectives.all_gather
        all_text, all_token, all_real = gather(text_nF), gather(token_nT), gather(real_n)
        label_n = torch.arange(len(index_n), device=index_n.device) + self.collectives.rank * len(index_n)
        # Equal captions are no negatives of each other; padded rows are nobody's.
        same_nM = (token_nT[:, None] == all_token[None]).all(-1)
        allowed_nM = (all_real[None] & ~same_nM).scatter(1, label_n[:, None], True)
        loss_n = torch.zeros_like(text_nF[:, 0])
        for image_nF in F.normalize(image_2nF.float(), dim=-1).chunk(2):
            all_image = gather(image_nF)
            to_text = boltzmann(scale * image_nF @ all_text.T, label_n, allowed_nM=allowed_nM)
            to_image = boltzmann(scale * text_nF @ all_image.T, label_n, allowed_nM=allowed_nM)
            loss_n = loss_n + (to_text + to_image) / 2
        return (_scatter(loss_n, index_n, real_n, len(batch)), batch.text_valid_N), (1 / scale).detach().squeeze()

    def _sum(self, batch: Batch, rows: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Means over the global number of valid rows, the weighted sum, and each source's share."""
        out: dict[str, Tensor] = {}
        total = torch.zeros((), device=batch.box_NV4.device)
        local = torch.stack([valid.sum() for _, valid in rows.values()]).float()
        counts = self.collectives.all_reduce_sum(local).clamp_min(1)
        weights: dict[str, float] = {term.name: term.weight for term in self.config.terms}
        for (name, (loss_N, valid_N)), count in zip(rows.items(), counts, strict=True):
            loss_N = torch.where(valid_N, loss_N, torch.zeros_like(loss_N))
            loss = self.collectives.world * loss_N.sum() / count
            out[f"loss/{name}"] = loss.detach()
            total = total + weights[name] * loss
            pairs = torch.stack([loss_N.detach(), valid_N.float()], dim=-1)
            out[f"source/{name}"] = pairs.new_zeros(self.num_sources, 2).index_add_(0, batch.source_N, pairs)
        return out | {"loss": total}

    @torch.no_grad()
    def _signals(self, feature_NLD: Tensor, moment_DD: Tensor) -> dict[str, Tensor]:
        """Standard deviation over tokens (mean over channels) and effective rank of the targets."""
        count = feature_NLD.shape[0] * feature_NLD.shape[1] * self.collectives.world
        mean_D = self.collectives.all_reduce_sum(feature_NLD.sum((0, 1))) / count
        covariance = moment_DD - torch.outer(mean_D, mean_D)
        std, rank = covariance.diagonal().clamp_min(0).sqrt().mean(), effective_rank(covariance)
        names = [term.name for term in self.config.terms if term.name in DENSE]
        return {f"collapse/{n}/{k}": v for n in names for k, v in (("std", std), ("rank", rank))}


def _take(token_NLD: Tensor, index_NK: Tensor) -> Tensor:
    return token_NLD.take_along_dim(index_NK[..., None], dim=1)


def _select(valid_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Indices of the valid rows, padded with others to a fixed number, and which of them are real."""
    index = torch.argsort(valid_N.logical_not().to(torch.int8), stable=True)[:rows]
    return index, valid_N[index]


def _scatter(loss_n: Tensor, index_n: Tensor, real_n: Tensor, num_rows: int) -> Tensor:
    """Row losses back at their rows; padded ones add nothing (their graph stays, so every rank runs the same)."""
    kept = torch.where(real_n, loss_n, torch.zeros_like(loss_n))
    return kept.new_zeros(num_rows).index_add(0, index_n, kept)
