"""From a recipe to an engine with its average, and to all of their state that a checkpoint holds."""

from pathlib import Path
from typing import Any

import torch

from m3i_large import checkpoint
from m3i_large.build import blocks_entered_once, build_objective, transformer_blocks, use_plain_attention
from m3i_large.ds_file import optimizer_device
from m3i_large.evaluate.load import load_frozen, load_start
from m3i_large.optim import decays
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank
from m3i_large.parallel.engine import Engine, build_param_groups, gather_whole, partition
from m3i_large.parallel.optimizer import build_optimizer
from m3i_large.parallel.remat import rematerialize
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.state import JoinedState, MemoryState, Slice, State
from m3i_large.recipe import Recipe


def build_engine(
    recipe: Recipe, ds_config: dict[str, Any], rank: Rank, *, fresh: bool = True
) -> tuple[Engine, ShardedEMA | None]:
    """Towers, then ZeRO partitions, then the optimizer and the target's average.

    `fresh`: the weights begin as the recipe says; where a checkpoint fills them next, backbone.weights is not read.
    """
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    objective = build_objective(recipe, collectives=ProcessGroupCollectives(rank), dtype=dtype)
    if fresh:
        load_start(objective, recipe)
    if recipe.objective.frozen_checkpoint is not None:
        load_frozen(objective, Path(recipe.objective.frozen_checkpoint))
    if rank.device.type == "cpu":
        use_plain_attention(objective)
    if recipe.train.activation_checkpointing:
        rematerialize(transformer_blocks(objective, frozen=False))
    for frozen in (False, True):
        gather_whole(blocks_entered_once(objective, frozen=frozen))
    partition(objective.to(rank.device), ds_config)
    trained = ((n, p) for n, p in objective.named_parameters() if p.requires_grad)
    groups = build_param_groups(trained, weight_decay=recipe.optim.weight_decay, decays=decays)
    offload = optimizer_device(ds_config) != "none"
    optimizer = build_optimizer(groups, recipe.optim, device=rank.device, offload=offload)
    engine = Engine(objective, optimizer=optimizer, ds_config=ds_config, rank=rank)
    copies = {"target": "student", "target_pool": "pool"} if recipe.objective.encoder == "ema" else {}
    copies = {copy: source for copy, source in copies.items() if getattr(objective, copy) is not None}
    return engine, ShardedEMA(engine, copies) if copies else None


def training_state(engine: Engine, target: ShardedEMA | None) -> State:
    """All that a checkpoint holds: weights, moments, the average, buffers."""
    average = [target] if target else []
    return JoinedState([engine.state(), *average, MemoryState(_buffers(engine))])


def _buffers(engine: Engine) -> dict[str, Slice]:
    """The module's persistent buffers, whole on every rank (the same values everywhere)."""
    found = {}
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                key = f"{prefix}.{name}" if prefix else name
                found[f"buffer/{key}"] = Slice(tuple(buffer.shape), 0, buffer.view(-1))
    return found


def restore(saved: checkpoint.Checkpoint, engine: Engine, target: ShardedEMA | None) -> None:
    """Continues from a checkpoint of any world size."""
    saved.restore(training_state(engine, target))
    engine.restored(applied_steps=int(saved.manifest["applied_steps"]))
