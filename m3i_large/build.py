"""From a recipe to modules: the one place that knows both the models and the objective. No DeepSpeed here."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m3i_large.models import AttentionPool, CategoryHead, DenseDecoder, TextHead, TextTower, create_model
from m3i_large.objective import Objective
from m3i_large.objective.collectives import Collectives, SingleProcess
from m3i_large.recipe import Recipe


def build_objective(
    recipe: Recipe, *, collectives: Collectives | None = None, dtype: torch.dtype = torch.float32
) -> Objective:
    """The objective with freshly initialised towers; `train.seed` alone decides the weights.

    Every tower that a term needs is built whole, in this order, because the order decides which random numbers it
    gets: 1 student, 2 target (a copy of the student), 3 text, 4 decoder, 5 pool, 6 category head, 7 text head.
    """
    needs = recipe.objective
    pooled, labelled, texts = needs.has("category") or needs.has("text"), needs.has("category"), needs.has("text")
    torch.manual_seed(recipe.train.seed)
    student: Any = create_model(recipe.backbone.name, **recipe.backbone.arch)
    target = copy.deepcopy(student).requires_grad_(False) if needs.dense else None
    text = TextTower(recipe.text) if texts else None
    decoder = DenseDecoder(student.width, recipe.decoder) if needs.dense else None
    pool = AttentionPool(student.width, recipe.pool) if pooled else None
    category_head = CategoryHead(recipe.pool.width, recipe.data.num_classes) if labelled else None
    text_head = TextHead(recipe.pool.width, recipe.text.width, recipe.text.embed) if texts else None
    objective = Objective(
        recipe.objective,
        student=student,
        target=target,
        text=text,
        decoder=decoder,
        pool=pool,
        category_head=category_head,
        text_head=text_head,
        collectives=collectives or SingleProcess(),
        mean=recipe.data.mean,
        std=recipe.data.std,
        num_sources=len(recipe.data.sources),
        compute_dtype=dtype,
    )
    return objective.to(dtype)


def checkpointed_blocks(objective: Objective) -> Iterator[nn.Module]:
    """Transformer blocks of the towers that receive gradients, for activation checkpointing."""
    for tower in (objective.student, objective.text, objective.decoder):
        if tower is not None:
            yield from tower.blocks


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
