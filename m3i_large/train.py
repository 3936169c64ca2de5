"""Training: one recipe, one run directory, any valid number of ranks. From the arguments to the end of the run."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3i_large.assembly import build_engine, restore
from m3i_large.checkpoint import Checkpoint
from m3i_large.checkpoint.reader import sha256
from m3i_large.data.loader import Loader
from m3i_large.data.sources import manifest_hash
from m3i_large.guard import Guard
from m3i_large.loop import Loop
from m3i_large.metrics import METRICS, environment, last_rows, require_wandb
from m3i_large.micro_step import micro_step
from m3i_large.parallel.comm import Rank, barrier, gather_objects
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.watchdog import Beat, Watchdog, describe
from m3i_large.pictures import Pictures
from m3i_large.plan import flops_per_sample, peak_flops
from m3i_large.profiling import Profile, Window
from m3i_large.progress import Progress
from m3i_large.recipe import Recipe
from m3i_large.report import report_at_the_end
from m3i_large.run import (
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
from m3i_large.stream import check_world, chunk_rows, make_loader, plan_mixture, prepare_sources, restore_mixture
from m3i_large.telemetry import Flops

RECALLED_BYTES = 2**24  # of metrics.jsonl: thousands of steps, more than a window and what was lost in a crash


def train(recipe: Recipe, *, ds: Path, out: Path, resume: str, rank: Rank, profile: Window | None = None) -> Outcome:
    """Trains `recipe` in the run directory `out` until its last step, a stop signal or a failure.

    Args:
        ds: DeepSpeed JSON file (sharding only).
        resume: `auto`, `never`, or a run or checkpoint directory.
        profile: steps to record with torch.profiler.

    Returns:
        How the run ended; exit.json holds the same.

    Raises:
        UserError: something in the input is wrong; nothing was written then.
        DivergenceError: the run does not get past steps that are not finite, or spike.
        OutageError: the last checkpoint could not be saved.
        Stopped: by a signal before the first step; there is nothing to save.
    """
    began = time.time()
    require_wandb(recipe.train.wandb_project)
    recipe = resolve(recipe, out, rank.device)
    torch.set_num_threads(recipe.train.threads or 1)
    run = open_run(out, recipe, resume=resume, report=report_at_the_end)
    with failures_recorded(run):
        with stopping_at_once():
            ready = _set_up(recipe, run, ds=ds, resume=resume, rank=rank, profile=profile)
        if ready is None:
            return "finished"
        loop, open_stream, start = ready
        with loop.saver:
            outcome = _attempts(loop, open_stream, start=start, began=began)
            if outcome == "finished":
                loop.finish_copies()
        return outcome


def _set_up(
    recipe: Recipe, run: Run, *, ds: Path, resume: str, rank: Rank, profile: Window | None
) -> tuple[Loop, Callable[..., Loader], int] | None:
    """From an opened run directory to the loop, its data and its first step; None where the run is finished."""
    ds_config = read_ds_config(ds, _step_sizes(recipe, rank), world=rank.world)
    sources = prepare_sources(recipe, rank)
    saved, found = resume_point(run, resume=resume, rank=rank)
    mixture = (
        restore_mixture(saved, sources, recipe)
        if saved
        else plan_mixture(recipe, [(s.num_samples, s.mean_bytes) for s in sources])
    )
    check_world(mixture, rank.world)
    chunk = chunk_rows(recipe, slots=mixture.slots, world=rank.world)
    steps = recipe.train.steps or mixture.steps_for_epochs(recipe.train.epochs or 0)
    progress = Progress(run.directory, total=steps, enabled=rank.is_first, every=recipe.train.log_every)
    if saved and saved.step >= steps and read_exit(run.directory).get("outcome") == "finished":
        progress.say(f"{run.directory} is finished: {steps} of {steps} steps; nothing to do")
        return None

    flops = _flops(recipe, rank)
    pictures = Pictures(recipe, run.directory, sources, rank)
    engine, target = build_engine(recipe, ds_config, rank, fresh=saved is None)
    if saved:
        restore(saved, engine, target)
    barrier()
    if rank.is_first:
        precision, threads = recipe.train.precision, torch.get_num_threads()
        found_here = environment(world=rank.world, device=rank.device, precision=precision, threads=threads)
        begin(run, found_here | _start_weights(recipe))
    barrier()  # from here on any rank may write exit.json
    loop = Loop(
        recipe=recipe,
        directory=run,
        engine=engine,
        micro_step=micro_step(engine, recipe, rows=chunk),
        target=target,
        mixture=mixture,
        data_hash=manifest_hash(sources),
        rank=rank,
        steps=steps,
        progress=progress,
        saver=checkpoint_writer(run, rank),
        guard=_guard(recipe, run, saved, rank),
        profile=Profile(profile, run=run.directory, rank=rank),
        pictures=pictures,
        reports=found,
        origin=saved,
        flops=flops,
    )
    return loop, partial(make_loader, recipe, mixture, sources, rank), saved.step if saved else 0


def _start_weights(recipe: Recipe) -> dict[str, Any]:
    """Name and checksum of the file that the student began with, for env.json."""
    path = recipe.backbone.weights
    return {"backbone_weights": {"file": path, "sha256": sha256(Path(path))}} if path and Path(path).is_file() else {}


def _step_sizes(recipe: Recipe, rank: Rank) -> StepSizes:
    """What the recipe says of a step, for DeepSpeed's configuration."""
    return StepSizes(
        micro_batch=recipe.train.micro_batch_at(rank.world),
        accumulation=recipe.train.accumulation,
        clip=recipe.optim.clip,
        bf16=recipe.train.precision == "bf16",
        chunked=recipe.train.contrast == "cached",
    )


def _guard(recipe: Recipe, run: Run, saved: Checkpoint | None, rank: Rank) -> Guard:
    """What judges the steps, with what the steps before the checkpoint have taught."""
    listed = [*recipe.train.skip_steps, *(saved.manifest["skip_steps"] if saved else [])]
    guard = Guard(max_skipped=recipe.train.max_skipped, spike=recipe.train.spike, skip_steps=listed)
    start = saved.step if saved else 0
    rows = last_rows(run.directory / METRICS, num_bytes=RECALLED_BYTES) if rank.is_first else []
    losses = {row["step"]: row["loss"] for row in rows if row.get("loss") is not None and row["step"] < start}
    guard.recall(gather_objects(losses, rank)[0])  # of rows with the same step the later one counts
    return guard


def _flops(recipe: Recipe, rank: Rank) -> Flops | None:
    """Operations of a sample and the device's peak, None where that is unknown: on CPUs, and in fp32."""
    if rank.device.type != "cuda" or recipe.train.precision != "bf16":
        return None
    if (peak := peak_flops(torch.cuda.get_device_name(rank.device))) is None:
        return None
    needed = flops_per_sample(recipe)
    return Flops(model=needed.model, hardware=needed.hardware, peak=peak)


def _attempts(loop: Loop, open_stream: Callable[..., Loader], *, start: int, began: float) -> Outcome:
    """Runs the loop to its end; after a reload of a checkpoint it goes on as a new attempt in the same process."""
    setup_s = time.time() - began
    with StopSignals() as stop:
        while True:
            run = loop.directory
            watchdog = Watchdog(
                run.directory,
                rank=loop.rank,
                attempt=run.attempt,
                timeout_s=loop.recipe.train.timeout_s,
                on_hang=partial(_report_hang, run),
            )
            with watchdog, open_stream(run, start_step=start) as stream:
                outcome = loop.run(stream, start=start, stop=stop, watchdog=watchdog, setup_s=setup_s)
            if outcome is not None:
                return outcome
            start, setup_s = loop.reload(), 0.0


def _report_hang(run: Run, behind: list[Beat]) -> None:
    """Events and exit status of a run that a rank holds up; the first rank may be the one that hangs."""
    message = f"no progress: {describe(behind)}"
    ranks = [{"rank": beat.rank, "host": beat.host, "step": beat.step, "phase": beat.phase} for beat in behind]
    run.event("incident", step=max(0, behind[0].step), what="hang", ranks=ranks)
    sys.stderr.write(f"error: {message}; stacks of all ranks: {run.directory / 'stacks'}\n")
    run.failed(message)
