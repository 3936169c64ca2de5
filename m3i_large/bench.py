"""Where the time of a training step goes: each part on its own at the recipe's sizes, beside a CLIP-only step.

No DeepSpeed and no data: the objective's own work, forward and backward, on random pictures.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from m3i_large.build import build_objective, use_plain_attention
from m3i_large.data.batch import Batch
from m3i_large.objective import Objective, ObjectiveConfig
from m3i_large.objective.objective import view_of
from m3i_large.objective.readings import Reading
from m3i_large.recipe import Recipe
from m3i_large.run import resolve_precision

CLIP_ONLY = {"input": {"mask": "none"}, "terms": [{"name": "text"}]}
REPEATS, WARM = 7, 2


def bench_step(recipe: Recipe, *, rows: int, device: torch.device) -> list[dict[str, Any]]:
    """Times one micro-batch of `rows` samples.

    Returns:
        Rows {part, ms, share}: encoders, decoder, text tower, `rest` (pool, heads, losses, geometry, mixing: a step
        whose towers have their results already), `step` (the whole, share 1), and `CLIP-only step` with its share of
        the whole. Medians of 7 alternating runs, milliseconds; on a busy machine the parts need not add up.
    """
    dtype = torch.bfloat16 if resolve_precision(recipe.train.precision, device) == "bf16" else torch.float32
    clip_only = recipe.model_copy(update={"objective": ObjectiveConfig.model_validate(CLIP_ONLY)})
    whole, clip = (build_objective(r, dtype=dtype).to(device) for r in (recipe, clip_only))
    if device.type == "cpu":
        for objective in (whole, clip):
            use_plain_attention(objective)
    batch = random_batch(recipe, rows).to(device)
    calls = _parts(whole, batch) | {
        "step": lambda: whole(batch)["loss"].backward(),
        "CLIP-only step": lambda: clip(batch)["loss"].backward(),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(WARM + REPEATS):
        for name, call in calls.items():
            duration = _milliseconds(call, device)
            if repeat >= WARM:
                times[name].append(duration)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [{"part": name, "ms": value, "share": value / medians["step"]} for name, value in medians.items()]


def random_batch(recipe: Recipe, rows: int, *, seed: int = 0) -> Batch:
    """A micro-batch of the recipe's shapes: three quarters with a text, one quarter with a category."""
    g = torch.Generator().manual_seed(seed)
    size, given = recipe.data.image_size, recipe.objective.input
    cells = size // given.patch
    order = torch.rand(rows, cells * cells, generator=g).argsort(1)
    texts = torch.arange(rows) % 4 != 3
    label = torch.randint(0, recipe.data.num_classes, (rows,), generator=g)
    images = torch.randint(0, 256, (2, rows, size, size, 3), generator=g).to(torch.uint8)
    token = torch.randint(1, recipe.text.vocab_size - 1, (rows, recipe.text.context_length), generator=g)
    token[:, recipe.text.context_length // 2] = recipe.text.vocab_size - 1
    return Batch(
        target_NHWC=images[0],
        other_NHWC=images[1],
        box_NV4=torch.tensor([[0, 0, size, size], [size // 8, 0, size // 2, size // 2]]).int().expand(rows, 2, 4),
        size_N2=torch.full((rows, 2), size, dtype=torch.int32),
        flip_NV=torch.rand(rows, 2, generator=g) < 0.5,
        colour_NV34=torch.eye(3, 4).expand(rows, 2, 3, 4).contiguous(),
        solarize_NV=torch.full((rows, 2), 2.0),
        partner_N=torch.arange(rows).roll(1),
        mask_NPP=(order < round(given.ratio * cells * cells)).reshape(rows, cells, cells),
        category_N=torch.where(texts, -1, label),
        text_NT=token,
        text_valid_N=texts,
        source_N=torch.zeros(rows, dtype=torch.int64),
        epoch_N=torch.zeros(rows, dtype=torch.int64),
        id_N=torch.arange(rows),
        substitute_N=torch.zeros(rows, dtype=torch.int64),
        step=0,
        micro_step=0,
        text_rows=int(texts.sum()),
        category_rows=rows - int(texts.sum()),
    )


def _parts(o: Objective, batch: Batch) -> dict[str, Callable[[], object]]:
    """The towers, each called as the objective calls it, and the objective with their results given to it."""
    image, own = o._images(batch)
    with torch.no_grad():
        readings = [_detached(reading) for reading in o._encode(batch, image)]
    calls: dict[str, Callable[[], object]] = {"student": lambda: _sum(o._encode(batch, image)).backward()}
    given: dict[str, Any] = {"_encode": readings}
    if o.target is not None:
        calls["target encoder"] = lambda: o._features(own)
        given["_features"] = o._features(own)
    if o.decoder is not None:
        wanted = {view_of(term): term.name for term in o.config.terms if term.dense}
        by_view = {reading.view: reading for reading in readings if reading.view in wanted}
        with torch.no_grad():
            given["_decode"] = {v: x.requires_grad_() for v, x in o._decode(batch, by_view, wanted).items()}
        calls["decoder"] = lambda: (
            torch.stack([x.float().sum() for x in o._decode(batch, by_view, wanted).values()]).sum().backward()
        )
    if o.text is not None:
        token = batch.text_NT[batch.text_valid_N]
        calls["text tower"] = lambda: o.text(token).float().sum().backward()
        given["text"] = o.text(token).detach().requires_grad_()
    rest = _with_results(o, given)
    return calls | {"rest": lambda: rest(batch)["loss"].backward()}


def _with_results(o: Objective, given: dict[str, Any]) -> Objective:
    """The objective with its encoders and its decoder replaced by their results."""
    shell = copy.copy(o)
    shell._modules = {name: module for name, module in o._modules.items() if name not in given}
    for name, result in given.items():
        # Into the instance itself, before the class's methods and past Module's bookkeeping.
        object.__setattr__(shell, name, lambda *_, result=result: result)
    return shell


def _sum(readings: list[Reading]) -> Tensor:
    return torch.stack([reading.token_NKD.float().sum() for reading in readings]).sum()


def _detached(reading: Reading) -> Reading:
    return replace(reading, token_NKD=reading.token_NKD.detach().requires_grad_())


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3
