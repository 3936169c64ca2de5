"""A micro-batch of the recipe's shapes without contents, and how many of its rows have a text or a category."""

import math

import torch

from m3i_large.data.batch import Batch
from m3i_large.data.mixture import Mixture
from m3i_large.recipe import Recipe
from m3i_large.stream import nominal_sizes, plan_mixture


def mixture_of(recipe: Recipe) -> Mixture | None:
    """The recipe's order of samples over sources of nominal size; None where a source has no nominal size."""
    if any(source.nominal is None for source in recipe.data.sources):
        return None
    return plan_mixture(recipe, [(n.samples, n.mean_bytes) for n in nominal_sizes(recipe)])


def rows_of_kind(recipe: Recipe, kind: str, rows: int) -> int:
    """The most rows of sources of a kind in a micro-batch, as the loader counts them (data/producer.py).

    Without nominal sizes and quotas all rows are taken to be of every kind that occurs.
    """
    sources = recipe.data.sources
    of_kind = [i for i, source in enumerate(sources) if source.kind == kind]
    quotas = [source.quota for source in sources]
    if (mixture := mixture_of(recipe)) is not None:
        share = sum(mixture.max_quota[i] for i in of_kind) / mixture.slots
    elif all(quota is not None for quota in quotas):
        share = sum(quotas[i] or 0 for i in of_kind) / sum(quota or 0 for quota in quotas)
    else:
        share = float(bool(of_kind))
    return min(rows, math.ceil(rows * share - 1e-9))


def meta_batch(recipe: Recipe, rows: int) -> Batch:
    """`rows` rows on the meta device."""
    size = recipe.data.image_size
    cells = size // recipe.objective.input.patch

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device="meta")

    return Batch(
        target_NHWC=empty(size, size, 3, dtype=torch.uint8),
        other_NHWC=empty(size, size, 3, dtype=torch.uint8),
        box_NV4=empty(2, 4, dtype=torch.int32),
        size_N2=empty(2, dtype=torch.int32),
        flip_NV=empty(2, dtype=torch.bool),
        colour_NV34=empty(2, 3, 4, dtype=torch.float32),
        solarize_NV=empty(2, dtype=torch.float32),
        partner_N=empty(),
        mask_NPP=empty(cells, cells, dtype=torch.bool),
        category_N=empty(),
        text_NT=empty(recipe.text.context_length),
        text_valid_N=empty(dtype=torch.bool),
        source_N=empty(),
        epoch_N=empty(),
        id_N=empty(),
        substitute_N=empty(),
        step=0,
        micro_step=0,
        text_rows=rows_of_kind(recipe, "image_text", rows),
        category_rows=rows_of_kind(recipe, "image_category", rows),
    )
