"""From a recipe to modules: the one place that knows both the models and the objective. No DeepSpeed here."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from m3i_large.models import AttentionPool, CategoryHead, DenseDecoder, TextHead, TextTower, create_model
from m3i_large.objective import Objective
from m3i_large.objective.collectives import Collectives, SingleProcess
from m3i_large.recipe import Recipe


def build_objective(
    recipe: Recipe, *, collectives: Collectives | None = None, dtype: torch.dtype = torch.float32
) -> Objective:
    """The objective with freshly initialised towers; `train.seed` alone decides the weights.

    Every tower is built whole, in this numbered order, because the order decides which random numbers it gets:
    1 student, 2 target (a copy of the student), 3 text, 4 decoder, 5 pool, 6 category head, 7 text head.
    """
    torch.manual_seed(recipe.train.seed)
    student = create_model(recipe.backbone.name, **recipe.backbone.arch)
    target = copy.deepcopy(student).requires_grad_(False)
    text = TextTower(recipe.text)
    decoder = DenseDecoder(student.width, recipe.decoder)
    pool = AttentionPool(student.width, recipe.pool)
    category_head = CategoryHead(recipe.pool.width, recipe.data.num_classes)
    text_head = TextHead(recipe.pool.width, recipe.text.width, recipe.text.embed)
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
        yield from tower.blocks
