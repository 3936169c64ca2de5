"""A fine-tuning from its arguments to its end: weights, task, engine, run directory, loop."""

import copy
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from m3i_large.assembly import restore
from m3i_large.checkpoint.reader import sha256
from m3i_large.ds_file import optimizer_device
from m3i_large.errors import UserError
from m3i_large.export import Weights, read_weights
from m3i_large.export.files import tensor_file
from m3i_large.export.weights import IMAGENET_MEAN, IMAGENET_STD
from m3i_large.finetune.data import Evaluated, Trained
from m3i_large.finetune.layer_decay import param_groups
from m3i_large.finetune.loop import Loop, Root
from m3i_large.finetune.recipe import FinetuneRecipe, validate_finetune
from m3i_large.finetune.sampling import Order, steps_of
from m3i_large.finetune.task import Task
from m3i_large.metrics import environment, require_wandb
from m3i_large.models import create_model
from m3i_large.optim import decays
from m3i_large.parallel.comm import Rank, barrier
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.engine import Engine, partition
from m3i_large.parallel.optimizer import build_optimizer
from m3i_large.parallel.partitions import full_shape
from m3i_large.parallel.remat import rematerialize
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.watchdog import Beat, Watchdog, describe
from m3i_large.progress import Progress
from m3i_large.report import report_at_the_end
from m3i_large.run import (
    EXIT,
    Outcome,
    Run,
    begin,
    checkpoint_writer,
    failures_recorded,
    open_run,
    read_exit,
    resolve,
    resume_point,
)
from m3i_large.stop_signals import StopSignals, stopping_at_once


def finetune(
    recipe: FinetuneRecipe, *, ds: Path, out: Path, resume: str, rank: Rank, evaluate_only: bool = False
) -> Outcome:
    """Fine-tunes in the run directory `out` until the last step, a stop signal or a failure.

    Args:
        ds: DeepSpeed JSON file (sharding only).
        resume: `auto`, `never`, or a run or checkpoint directory.
        evaluate_only: measure the newest checkpoint, or the weights as they begin, and train nothing.

    Raises:
        UserError: something in the input is wrong; nothing was written then.
        DivergenceError: gradients are not finite, step after step.
        OutageError: the data cannot be read, or the last checkpoint not be saved.
        Stopped: by a signal before the first step.
    """
    began = time.time()
    require_wandb(recipe.train.wandb_project)
    recipe = resolve(recipe, out, rank.device, parse=validate_finetune)
    torch.set_num_threads(recipe.train.threads or 1)
    run = open_run(out, recipe, resume=resume, parse=validate_finetune, report=report_at_the_end)
    with failures_recorded(run):
        with stopping_at_once():
            loop, start = _set_up(recipe, run, ds=ds, resume=resume, rank=rank)
        if start >= loop.steps and not evaluate_only and read_exit(out).get("outcome") == "finished":
            loop.progress.say(f"{out} is finished: {start} of {loop.steps} steps; nothing to do")
            return "finished"
        _begin(loop, rank, keep_exit=evaluate_only)
        on_hang = partial(_report_hang, run)
        timeout = recipe.train.timeout_s
        watchdog = Watchdog(run.directory, rank=rank, attempt=run.attempt, timeout_s=timeout, on_hang=on_hang)
        with loop.saver, StopSignals() as stop, watchdog:
            if evaluate_only:
                loop.evaluate_only(start, watchdog=watchdog)
                return "finished"
            return loop.run(start=start, stop=stop, watchdog=watchdog, setup_s=time.time() - began)


def _set_up(recipe: FinetuneRecipe, run: Run, *, ds: Path, resume: str, rank: Rank) -> tuple[Loop, int]:
    """From an opened run directory, without writing into it, to the loop and its first step."""
    if recipe.data is None or not Path(recipe.data).is_dir():
        raise UserError(f"--data: got {recipe.data}, which is no directory; needed: the data set's")
    train = recipe.train
    ds_config = read_ds_config(ds, _step_sizes(recipe, rank), world=rank.world)
    weights = _weights(recipe)
    # A task's package is named as its kind, so that only one's libraries are imported.
    package = import_module(f"m3i_large.finetune.{recipe.task.kind}.task")
    task: Task = package.build_task(recipe.task, data=Path(recipe.data))
    order = Order(len(task.train), repeats=task.train.repeats(), seed=train.seed)
    steps = train.steps or steps_of(order, epochs=train.epochs or 0, global_batch=train.global_batch)
    saved, found = resume_point(run, resume=resume, rank=rank)
    progress = Progress(run.directory, total=steps, enabled=rank.is_first, every=train.log_every)
    engine, average = build_engine(recipe, task, weights, ds_config, rank, fresh=saved is None)
    if saved:
        restore(saved, engine, average)
    place = (rank.rank, rank.world)
    rows = (train.global_batch, train.accumulation)
    loop = Loop(
        recipe=recipe,
        directory=run,
        task=task,
        engine=engine,
        average=average,
        trained=Trained(task, order, seed=train.seed, rows=rows, place=place),
        evaluated=Evaluated(task, size=train.eval_batch, place=place),
        rank=rank,
        steps=steps,
        progress=progress,
        saver=checkpoint_writer(run, rank),
        reports=found,
        origin=_origin(recipe, weights),
    )
    return loop, saved.step if saved else 0


def _begin(loop: Loop, rank: Rank, *, keep_exit: bool) -> None:
    """Makes the directory this run's; `keep_exit`: nothing is trained, so how the training ended stays."""
    run, precision = loop.directory, loop.recipe.train.precision
    barrier()
    if rank.is_first and not (keep_exit and (run.directory / EXIT).is_file()):
        threads = torch.get_num_threads()
        here = environment(world=rank.world, device=rank.device, precision=precision, threads=threads)
        begin(run, here | {"weights": loop.origin})
    barrier()  # from here on any rank may write exit.json


def _step_sizes(recipe: FinetuneRecipe, rank: Rank) -> StepSizes:
    """What the recipe says of a step, for DeepSpeed's configuration: its weights are fp32, see Root."""
    train = recipe.train
    rows = train.global_batch // train.accumulation
    if rows % rank.world:
        need = [w for w in range(1, rows + 1) if rows % w == 0]
        raise UserError(
            f"train.global_batch: {train.global_batch} in {train.accumulation} micro-steps does not divide over "
            f"{rank.world} ranks; needed: one of {need}"
        )
    return StepSizes(
        micro_batch=rows // rank.world, accumulation=train.accumulation, clip=recipe.optim.clip, bf16=False
    )


def _weights(recipe: FinetuneRecipe) -> Weights | None:
    """The exported file; None only where a random beginning was asked for by name."""
    backbone = recipe.backbone
    if recipe.weights is None:
        if backbone.init == "random" and backbone.name is not None:
            return None
        raise UserError(
            "--weights: got none; needed: a file of `m3i export`, or backbone.init=random and backbone.name=NAME"
        )
    return read_weights(Path(recipe.weights), name=backbone.name)


def build_backbone(recipe: FinetuneRecipe, weights: Weights | None) -> nn.Module:
    """The network of the weights, or of the recipe's name, loaded or freshly drawn."""
    arch = recipe.backbone.arch
    if weights is None:
        assert recipe.backbone.name is not None, "checked by _weights"
        return create_model(recipe.backbone.name, **arch)
    if recipe.backbone.init == "random":
        return create_model(weights.name, **(weights.arch | arch))
    return weights.build(**arch)


def build_engine(
    recipe: FinetuneRecipe,
    task: Task,
    weights: Weights | None,
    ds_config: dict[str, Any],
    rank: Rank,
    *,
    fresh: bool = True,
) -> tuple[Engine, ShardedEMA | None]:
    """Model and average, then ZeRO partitions, then the optimizer. `train.seed` decides all fresh weights."""
    train, optim = recipe.train, recipe.optim
    torch.manual_seed(train.seed)
    backbone: Any = build_backbone(recipe, weights)
    mean, std = (weights.mean, weights.std) if weights else (IMAGENET_MEAN, IMAGENET_STD)
    model = task.build(backbone, mean=mean, std=std)
    average = copy.deepcopy(model).requires_grad_(False) if train.ema else None
    if train.activation_checkpointing:
        rematerialize(backbone.blocks, random=True)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    root = Root(model, average, dtype=dtype).to(rank.device)
    partition(root, ds_config)
    groups = param_groups(
        model.named_parameters(),
        backbone,
        layer_decay=optim.layer_decay,
        weight_decay=optim.weight_decay,
        decays=lambda name, parameter: decays(name, full_shape(parameter)),
        offset_scale=optim.offset_scale,
    )
    offload = optimizer_device(ds_config) != "none"
    optimizer = build_optimizer(groups, optim, device=rank.device, offload=offload)
    engine = Engine(root, optimizer=optimizer, ds_config=ds_config, rank=rank)
    return engine, ShardedEMA(engine, {"average": "model"}) if train.ema else None


def _origin(recipe: FinetuneRecipe, weights: Weights | None) -> Any:
    """What env.json says of the weights that it began with."""
    if weights is None or recipe.backbone.init == "random":
        return "random"
    return {"file": str(weights.path), "layout": weights.layout, "sha256": sha256(tensor_file(weights.path))}


def _report_hang(run: Run, behind: list[Beat]) -> None:
    message = f"no progress: {describe(behind)}"
    run.event("incident", step=max(0, behind[0].step), what="hang", ranks=[beat.rank for beat in behind])
    run.failed(message)
