"""From a recipe to modules: the one place that knows both the models and the objective. No DeepSpeed here."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m3i_large.errors import UserError
from m3i_large.models import (
    AttentionPool,
    CategoryHead,
    DenseDecoder,
    GlobalHead,
    LinearDecoder,
    TextHead,
    TextTower,
    create_model,
)
from m3i_large.objective import Objective
from m3i_large.objective.collectives import Collectives, SingleProcess
from m3i_large.recipe import Recipe


def build_objective(
    recipe: Recipe, *, collectives: Collectives | None = None, dtype: torch.dtype = torch.float32
) -> Objective:
    """The objective with freshly initialised towers; `train.seed` alone decides the weights.

    Every tower that a term needs is built whole, in this order, because the order decides which random numbers it
    gets: 1 student, 2 target (a copy of the student), 3 text, 4 decoder, 5 pool and its copy, 6 category head, 7 text
    head, 8 global head.
    """
    needs, width = recipe.objective, recipe.pool.width
    copies = needs.encoder in ("ema", "frozen")
    torch.manual_seed(recipe.train.seed)
    arch = recipe.backbone.arch | ({"mask_token": True} if needs.input.fill == "token" else {})
    # Cast at once: a billion parameters in fp32 and their copies in it would be the peak of a run's memory.
    student: Any = create_model(recipe.backbone.name, bridge=True, **arch).to(dtype)
    if student.image_size != recipe.data.image_size:
        raise UserError(
            f"data.image_size: got {recipe.data.image_size}; needed: backbone.arch.image_size {student.image_size}"
        )
    target = _frozen(student) if copies else None
    text = TextTower(recipe.text) if needs.has("text") else None
    decoder = _decoder(recipe, student) if needs.dense else None
    pool = AttentionPool(student.width, recipe.pool) if needs.pooled else None
    target_pool = _frozen(pool) if copies and needs.has("global") else None
    category_head = CategoryHead(width, recipe.data.num_classes) if needs.has("category") else None
    text_head = TextHead(width, recipe.text.width, recipe.text.embed) if needs.has("text") else None
    global_head = GlobalHead(width) if needs.has("global") else None
    objective = Objective(
        recipe.objective,
        student=student,
        target=target,
        text=text,
        decoder=decoder,
        pool=pool,
        target_pool=target_pool,
        category_head=category_head,
        text_head=text_head,
        global_head=global_head,
        collectives=collectives or SingleProcess(),
        mean=recipe.data.mean,
        std=recipe.data.std,
        num_sources=len(recipe.data.sources),
        compute_dtype=dtype,
    )
    return objective.to(dtype)


def _frozen(module: nn.Module | None) -> Any:
    return copy.deepcopy(module).requires_grad_(False) if module is not None else None


def _decoder(recipe: Recipe, student: Any) -> nn.Module:
    """What the recipe's dense terms share: kind, and output of a feature's or of a patch of pixels' width."""
    term = next(term for term in recipe.objective.terms if term.dense)
    out = 3 * student.token_stride**2 if term.target == "pixels" else None
    if term.decoder == "linear":
        return LinearDecoder(student.width, out=out)
    return DenseDecoder(student.width, recipe.decoder, out=out)


def transformer_blocks(objective: Objective, *, frozen: bool) -> Iterator[nn.Module]:
    """Blocks of the towers that receive gradients, or of those that do not."""
    for tower in (objective.target,) if frozen else (objective.student, objective.text, objective.decoder):
        if tower is not None:
            yield from tower.blocks


def blocks_entered_once(objective: Objective, *, frozen: bool) -> Iterator[nn.Module]:
    """Those of `transformer_blocks` that a forward pass enters at most once."""
    twice = set(objective.decoder.blocks) if objective.decoder is not None and objective.decoder_calls > 1 else set()
    return (block for block in transformer_blocks(objective, frozen=frozen) if block not in twice)


def use_plain_attention(objective: Objective) -> None:
    """Switches image and text blocks to attention by matrix products.

    On a CPU they are faster than torch's fused attention in bf16 (forward and backward, 2 cores with avx512_bf16: 1.8
    times on 96 images of 65 tokens, 1.7 times in the text tower on 72 texts of 24 tokens); the values differ by
    rounding only.
    """
    for module in objective.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 - torch types module attributes as tensors
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")
