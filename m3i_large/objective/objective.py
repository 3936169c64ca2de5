"""One step of any objective: input, student, targets, terms, one loss (METHOD sections 1-3; paper Eq. 3-5).

The same parts serve a micro-batch at once (here) and in chunks (cached.py).

Legend: N local rows, L = G * G tokens, K tokens of a reading, D width, E pooled width, C colours, H W pixels.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from m3i_kernels.patch_mix import patch_mix
from torch import Tensor, nn

from m3i_large.data.batch import OTHER_VIEW, TARGET_VIEW, Batch
from m3i_large.errors import UserError
from m3i_large.objective.collectives import Collectives
from m3i_large.objective.config import ObjectiveConfig, TermConfig
from m3i_large.objective.coupling import Chunk, Shared, Targets, cut, normalized, share, token_moment
from m3i_large.objective.geometry import grid_position, relative_position
from m3i_large.objective.readings import Reading, split_cells, take, visible_NL
from m3i_large.objective.signals import GradientNorms
from m3i_large.objective.terms import (
    Rows,
    Vectors,
    category_rows,
    dense_rows,
    global_rows,
    pixel_targets,
    select_texts,
    text_rows,
    text_vectors,
)
from m3i_large.objective.totals import Totals

VIEWS = {"target": TARGET_VIEW, "other": OTHER_VIEW}


class Objective(nn.Module):
    """Sum of the recipe's terms over one micro-batch.

    Args:
        config: input and terms.
        student: image encoder with `tokens(image_BCHW, keep_BK, hide_BL) -> (B, L or K, D)`.
        target, target_pool: encoder and pool that make image features into targets, frozen; None where no term needs
            one, or where it is the student itself (encoder shared).
        text, pool, decoder, category_head, text_head, global_head: see models/; None where no term needs one.
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
    target_pool: Any
    category_head: Any
    text_head: Any
    global_head: Any

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        student: Any,
        target: nn.Module | None = None,
        text: nn.Module | None = None,
        decoder: nn.Module | None = None,
        pool: nn.Module | None = None,
        target_pool: nn.Module | None = None,
        category_head: nn.Module | None = None,
        text_head: nn.Module | None = None,
        global_head: nn.Module | None = None,
        collectives: Collectives,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_sources: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.collectives = config, collectives
        self.student, self.target, self.text, self.decoder = student, target, text, decoder
        self.pool, self.target_pool = pool, target_pool
        self.category_head, self.text_head, self.global_head = category_head, text_head, global_head
        self.mean, self.std, self.num_sources, self.compute_dtype = mean, std, num_sources, compute_dtype
        patch, stride, size = config.input.patch, student.token_stride, student.image_size
        if config.input.mask != "none" and (patch % stride or size % patch):
            raise UserError(
                f"objective.input.patch: got {patch}; needed: a multiple of the token stride {stride} that divides "
                f"{size}"
            )
        self.grid: int = student.grid
        cells = (size // patch) ** 2
        self._gradients: GradientNorms | None = None
        self.num_visible = round(config.input.ratio * cells) * (patch // stride) ** 2

    @property
    def decoder_calls(self) -> int:
        """How often a forward pass runs the decoder: once where the readings of all dense terms have one shape."""
        views = {view_of(term) for term in self.config.terms if term.dense}
        return len(views) if len(views) < 2 or 2 * self.num_visible != self.grid**2 else 1

    def forward(self, *inputs: Any, run: Callable[..., Any] | None = None, **settings: Any) -> Any:
        """`losses` of the inputs, or `run(self, *inputs)`, a part of them (cached.py).

        One entry, because a sharded parameter is present only inside the root module's forward.
        """
        return self.losses(*inputs, **settings) if run is None else run(self, *inputs, **settings)

    def losses(self, batch: Batch, *, signals: bool = False) -> dict[str, Tensor]:
        """Losses of one micro-batch, keyed as in metrics.jsonl.

        Returns "loss" (with graph), "loss/<term>", "source/<term>" (num_sources, 2) with the sum and count of row
        losses, "optim/temperature" where there is a text term, and with `signals` "collapse/<term>/{std, rank,
        prediction_std, prediction_rank}" of image features and "cosine/<term>/{positive, negative}" of contrasted
        pairs; `gradient_signals` adds to those after the backward pass.
        """
        totals = self.totals(batch, signals=signals)
        texts = select_texts(batch) if self.config.has("text") else None
        (chunk,) = cut(batch, texts, rows=len(batch))
        image, own = self._images(batch)
        targets = self.targets(own)
        rows, vectors = self.rows(chunk, image, own, targets, self.share([targets], num_rows=len(batch)))
        if texts is not None and vectors is not None:
            term = self.config.text_term
            rows[term.name] = text_rows(term, texts, vectors, self.collectives)
        loss = totals.add(batch, rows)
        return totals.losses() | {"loss": loss}

    def gradient_signals(self, *, micro_steps: int) -> dict[str, Tensor]:
        """Keyed "gradient/<term>": the norm of the weighted term's gradient by the student's tokens.

        Of the last micro-batch with signals, after its backward pass; every rank calls it. `micro_steps` is what the
        loss was divided by.
        """
        if self._gradients is None:
            return {}
        names = [term.name for term in self.config.terms]
        return self._gradients.collect(names, collectives=self.collectives, scale=micro_steps)

    # -- the parts, in the order of `losses` --------------------------------------------------------------------------

    def totals(self, batch: Batch, *, signals: bool) -> Totals:
        """Begins a micro-batch."""
        self._gradients = GradientNorms() if signals else None
        return Totals(self.config, batch, collectives=self.collectives, num_sources=self.num_sources, signals=signals)

    @torch.no_grad()
    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's images before tokens are hidden, and the target views y.

        With mask mix: m_n * y_n + (1 - m_n) * x_partner(n). The views alone are mixes of a row with itself.
        """
        if self.config.input.mask != "mix":
            shown = torch.full_like(batch.mask_NPP, self.config.input.view == "target")
            alone = torch.arange(len(batch), device=batch.partner_N.device)
            batch = replace(batch, mask_NPP=shown, partner_N=alone)
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

    def _encode(self, batch: Batch, image: Tensor) -> list[Reading]:
        """The student's tokens: which show which image."""
        given = self.config.input
        cells = {"grid": self.grid, "num_visible": self.num_visible}
        if given.mask == "mix":
            token = self.student.tokens(image)
            own_NK, foreign_NK = split_cells(batch.mask_NPP, **cells)
            return [
                Reading(TARGET_VIEW, take(token, own_NK), own_NK),
                Reading(OTHER_VIEW, take(token, foreign_NK), foreign_NK, image_N=batch.partner_N),
            ]
        if given.fill == "drop":
            kept_NK, _ = split_cells(batch.mask_NPP, **cells)
            token = self.student.tokens(image, keep_BK=kept_NK)
            return [Reading(VIEWS[given.view], token, kept_NK)]
        hidden_NL = ~visible_NL(batch.mask_NPP, self.grid) if given.fill == "token" else None
        token = self.student.tokens(image, hide_BL=hidden_NL)
        every_NL = torch.arange(self.grid**2, device=token.device).expand(len(batch), -1)
        return [Reading(VIEWS[given.view], token, every_NL)]

    @torch.no_grad()
    def targets(self, own: Tensor) -> Targets:
        """What the target encoder, or the student where they share weights, makes of the target views."""
        if self.config.encoder is None:
            return Targets()
        feature = self._features(own)
        pooled = self._pooled_target(feature) if self.config.has("global") else None
        return Targets(feature if self.config.dense else None, pooled, token_moment(self.config, feature))

    def share(self, targets: list[Targets], *, num_rows: int) -> Shared:
        """What all rows of all ranks share, of the targets of this rank's `num_rows` rows."""
        return share(self.config, targets, num_tokens=num_rows * self.grid**2, collectives=self.collectives)

    def rows(
        self, chunk: Chunk, image: Tensor, own: Tensor, targets: Targets, shared: Shared
    ) -> tuple[dict[str, Rows], Vectors | None]:
        """Row losses of every term but text, whose rows have their losses together: of that the vectors.

        Args:
            image, own: from `_images`.
        """
        batch = chunk.batch
        readings = self._encode(batch, image)
        rows = self._dense_rows(batch, own, readings, targets, shared) if self.config.dense else {}
        if self.config.has("global"):
            rows |= self._global_rows(chunk, readings, targets, shared)
        vectors = None
        labelled = [term for term in self.config.terms if term.target in ("category", "text")]
        # One vector per image from every reading: as image i and as image j. Its gradient tells terms apart only where
        # each has its own.
        apart = self._gradients is not None
        pooled = self._pooled("+".join(term.name for term in labelled), readings) if labelled and not apart else []
        for term in labelled:
            read = self._pooled(term.name, readings) if apart else pooled
            if term.target == "category":
                rows[term.name] = category_rows(term, batch, read, self.category_head)
            else:
                vectors = self._vectors(read, chunk)
        return rows, vectors

    def vectors(self, chunk: Chunk, image: Tensor) -> Vectors:
        """Images and texts in their shared space."""
        return self._vectors(self._pooled(self.config.text_term.name, self._encode(chunk.batch, image)), chunk)

    def _vectors(self, pooled: list[Tensor], chunk: Chunk) -> Vectors:
        assert chunk.token_nT is not None, "cut with the texts that the recipe has"
        return text_vectors(pooled, chunk.token_nT, self.text, self.text_head)

    def _dense_rows(
        self, batch: Batch, own: Tensor, readings: list[Reading], targets: Targets, shared: Shared
    ) -> dict[str, Rows]:
        """Terms that predict every patch: pixels or features."""
        by_view = {reading.view: reading for reading in readings}
        dense = [term for term in self.config.terms if term.dense]
        predicted = self._decode(batch, by_view, {view_of(term): term.name for term in dense})
        if dense[0].target == "pixels":
            target = pixel_targets(own, patch=self.student.token_stride)
        else:
            assert targets.feature_NLD is not None, "checked with the recipe"
            target = normalized(targets.feature_NLD)
        return {t.name: dense_rows(t, predicted[view_of(t)], target, shared.moment_DD) for t in dense}

    def _global_rows(self, chunk: Chunk, readings: list[Reading], targets: Targets, shared: Shared) -> dict[str, Rows]:
        """The term that predicts one vector of an image."""
        (term,) = (term for term in self.config.terms if term.target == "global")
        reading = next(reading for reading in readings if reading.view == view_of(term))
        token = self._tap(term.name, reading.token_NKD)
        predicted_NE = reading.by_image(self.global_head(self.pool(token)))
        assert targets.pooled_NE is not None, "checked with the recipe"
        first = shared.first + chunk.begin
        return {term.name: global_rows(term, predicted_NE, targets.pooled_NE, shared.candidate_ME, first=first)}

    @torch.no_grad()
    def _features(self, own: Tensor) -> Tensor:
        """Tokens of the target views by the target encoder, or by the student where they share weights."""
        return (self.student if self.config.encoder == "shared" else self.target).tokens(own)

    def _pooled_target(self, feature_NLD: Tensor) -> Tensor:
        return (self.pool if self.config.encoder == "shared" else self.target_pool)(feature_NLD)

    def _tap(self, name: str, token: Tensor) -> Tensor:
        return token if self._gradients is None else self._gradients.tap(name, token)

    def _decode(self, batch: Batch, by_view: dict[int, Reading], wanted: dict[int, str]) -> dict[int, Tensor]:
        """Predictions of every patch of the target view, by view read; one call of the decoder where shapes agree.

        `wanted`: the term that reads each view.
        """
        plain_L4 = grid_position(self.grid, device=batch.box_NV4.device)
        inputs = []
        for view in sorted(wanted):
            reading = by_view[view]
            query = plain_L4.expand(len(batch), -1, -1)
            if view == OTHER_VIEW:
                boxes = (batch.box_NV4, batch.size_N2, batch.flip_NV)
                query = reading.of_image(
                    relative_position(*boxes, grid=self.grid, input_view=OTHER_VIEW, target_view=TARGET_VIEW)
                )
            inputs.append((self._tap(wanted[view], reading.token_NKD), plain_L4[reading.cell_NK], query))
        if len({context.shape for context, _, _ in inputs}) == 1:
            columns = (torch.cat(column) for column in zip(*inputs, strict=True))
            decoded = self.decoder(*columns).chunk(len(inputs))
        else:
            decoded = tuple(self.decoder(*one) for one in inputs)
        return {view: by_view[view].by_image(out) for view, out in zip(sorted(wanted), decoded, strict=True)}

    def _pooled(self, name: str, readings: list[Reading]) -> list[Tensor]:
        """The pool of every reading, by image; one call where shapes agree."""
        tokens = [self._tap(name, reading.token_NKD) for reading in readings]
        if len({token.shape for token in tokens}) == 1:
            vectors = self.pool(torch.cat(tokens)).chunk(len(tokens))
        else:
            vectors = tuple(self.pool(token) for token in tokens)
        return [reading.by_image(vector) for reading, vector in zip(readings, vectors, strict=True)]


def view_of(term: TermConfig) -> int:
    """The view from which a term predicts the target view."""
    return TARGET_VIEW if term.view == "same" else OTHER_VIEW
