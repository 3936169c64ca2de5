"""The training loop: one recipe, one run directory, any valid number of ranks."""

import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3i_large import checkpoint
from m3i_large.assembly import build_engine, restore, training_state
from m3i_large.data.batch import Batch
from m3i_large.data.loader import Loader
from m3i_large.data.mixture import Mixture
from m3i_large.data.sources import manifest_hash
from m3i_large.errors import DivergenceError, UserError
from m3i_large.goodput import goodput
from m3i_large.guard import Guard
from m3i_large.metrics import MetricsWriter, append_row, environment, package_versions, require_wandb
from m3i_large.models import LOG_SCALE_BOUNDS
from m3i_large.objective import Objective
from m3i_large.objective.signals import collapsed
from m3i_large.parallel.comm import Rank, barrier, gather_objects, highest
from m3i_large.parallel.engine import Engine, StepSizes, read_ds_config
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.watchdog import Beat, Watchdog, describe
from m3i_large.pictures import write_input_picture
from m3i_large.profiling import Profile, Window
from m3i_large.progress import Progress
from m3i_large.recipe import Recipe
from m3i_large.run import EVENTS, Outcome, Run, begin, failures_recorded, open_run, read_exit, resolve
from m3i_large.schedule import ema_momentum, learning_rate
from m3i_large.step_totals import StepTotals
from m3i_large.stop_signals import StopSignals
from m3i_large.stragglers import Stragglers, own_seconds, probe
from m3i_large.stream import check_world, make_loader, plan_mixture, prepare_sources, restore_mixture
from m3i_large.telemetry import Flops, StepClock, memory_gib, utilisation

LOG_SCALE = "text_head.log_scale"


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
    """
    began = time.time()
    require_wandb(recipe.train.wandb_project)
    recipe = resolve(recipe, out, rank.device)
    torch.set_num_threads(recipe.train.threads or 1)
    run = open_run(out, recipe, resume=resume)
    with failures_recorded(run):
        return _start(recipe, run, ds=ds, rank=rank, profile=profile, began=began)


def _start(recipe: Recipe, run: Run, *, ds: Path, rank: Rank, profile: Window | None, began: float) -> Outcome:
    """From an opened run directory to the end of the run."""
    sizes = StepSizes(
        micro_batch=recipe.train.micro_batch_at(rank.world),
        accumulation=recipe.train.accumulation,
        clip=recipe.optim.clip,
        bf16=recipe.train.precision == "bf16",
    )
    ds_config = read_ds_config(ds, sizes, world=rank.world)
    sources = prepare_sources(recipe, rank)
    saved = checkpoint.Checkpoint(run.resume_from) if run.resume_from else None
    mixture = (
        restore_mixture(saved, sources, recipe)
        if saved
        else plan_mixture(recipe, [(s.num_samples, s.mean_bytes) for s in sources])
    )
    check_world(mixture, rank.world)
    steps = recipe.train.steps or mixture.steps_for_epochs(recipe.train.epochs or 0)
    progress = Progress(run.directory, total=steps, enabled=rank.is_first, every=recipe.train.log_every)
    if saved and saved.step >= steps and read_exit(run.directory).get("outcome") == "finished":
        progress.say(f"{run.directory} is finished: {steps} of {steps} steps; nothing to do")
        return "finished"

    engine, target = build_engine(recipe, ds_config, rank)
    if saved:
        restore(saved, engine, target)
    barrier()
    if rank.is_first:
        precision, threads = recipe.train.precision, torch.get_num_threads()
        begin(run, environment(world=rank.world, device=rank.device, precision=precision, threads=threads))
    barrier()  # from here on any rank may write exit.json
    listed = [*recipe.train.skip_steps, *(saved.manifest["skip_steps"] if saved else [])]
    guard = Guard(max_skipped=recipe.train.max_skipped, spike=recipe.train.spike, skip_steps=listed)
    trace = Profile(profile, run=run.directory, rank=rank)
    loop = Loop(recipe, run, engine, target, mixture, manifest_hash(sources), rank, steps, progress, guard, trace)
    open_stream = partial(make_loader, recipe, mixture, sources, rank)
    return _attempts(loop, open_stream, start=saved.step if saved else 0, began=began)


def _attempts(loop: "Loop", open_stream: Callable[..., Loader], *, start: int, began: float) -> Outcome:
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
    event = {"event": "incident", "step": max(0, behind[0].step), "attempt": run.attempt, "time": time.time()}
    append_row(run.directory / EVENTS, event | {"what": "hang", "ranks": ranks})
    run.failed(message)
    sys.stderr.write(f"error: {message}; stacks of all ranks: {run.directory / 'stacks'}\n")


@dataclass
class Loop:
    """Everything one optimizer step touches."""

    recipe: Recipe
    directory: Run
    engine: Engine
    target: ShardedEMA | None
    mixture: Mixture
    data_hash: str
    rank: Rank
    steps: int
    progress: Progress
    guard: Guard
    profile: Profile
    flops: Flops | None = None
    collapsed: set[str] = field(default_factory=set)
    drawn: list[Any] = field(default_factory=list)  # this rank's samples of the running step
    clock: StepClock = field(init=False)
    writer: MetricsWriter = field(init=False)
    stragglers: Stragglers = field(init=False)

    def run(
        self, stream: Loader, *, start: int, stop: StopSignals, watchdog: Watchdog, setup_s: float
    ) -> Outcome | None:
        """Steps from `start` to the end; saves on the way, at a stop signal and at the end.

        Returns None where the last steps are to be undone: `reload`, then run again.
        """
        self._begin(start, watchdog, setup_s)
        every, due = self.recipe.train.checkpoint_every, False
        done = start
        for step in range(start, self.steps):
            self.profile.at(step)
            self.clock.start(step)
            bad, row = self._step(stream, step)
            self.writer.log({"step": step, "samples": (step + 1) * self.recipe.train.global_batch, **row})
            self._alarm(row, step)
            self.progress.update(step, row)
            number, undo = highest([stop.number, bad], self.rank)
            if undo and not number:
                return None
            done = step + 1
            due |= done % every == 0
            if number or done == self.steps or (due and not self.guard.streak):
                self._save(done)
                due = False
            if number and done < self.steps:
                self.writer.event("preempt", step=done, signal=signal.Signals(number).name)
                return self._end("interrupted", step=done)
        return self._end("finished", step=done)

    def _step(self, stream: Loader, step: int) -> tuple[bool, dict[str, float]]:
        """One step, trained or left out -> whether it and those before it are to be undone; its metrics."""
        self.drawn.clear()
        if step in self.guard.skip_steps:
            for micro_step in range(self.recipe.train.accumulation):
                self._next(stream, step=step, micro_step=micro_step)
            self._note_skip(step, why="listed")
            return False, self._measured(stream, step)
        applied, row = self._train(stream, step)
        judgement = self.guard.judge(step, applied=applied, loss=row["loss"])
        if judgement.kind == "skipped":
            self._note_skip(step, why="not finite")
        elif judgement.kind == "spike":
            self._incident(step, f"the loss has a spike: {row['loss']:.4g}", what="spike", loss=row["loss"])
        row |= self._measured(stream, step)
        if self.rank.world > 1 and (step + 1) % self.recipe.train.log_every == 0:
            row |= self._compare_ranks(row, step)
        return judgement.reload, row

    def _train(self, stream: Loader, step: int) -> tuple[bool, dict[str, float]]:
        """Micro-steps, update and moving average -> whether the update was applied; losses and signals."""
        recipe, engine, clock = self.recipe.train, self.engine, self.clock
        signals = step % recipe.signals_every == 0
        engine.set_lr(learning_rate(step, steps=self.steps, config=self.recipe.optim.lr))
        momentum = ema_momentum(step, steps=self.steps, config=recipe.momentum_ema)
        totals, applied = StepTotals(), False
        for micro_step in range(recipe.accumulation):
            batch = self._next(stream, step=step, micro_step=micro_step)
            with clock("forward"):
                losses = engine(batch.to(self.rank.device, non_blocking=True), signals=signals)
            with clock("backward"):
                engine.backward(losses["loss"])
                losses |= self.objective.gradient_signals(micro_steps=recipe.accumulation)
            with clock("optimizer"):
                applied = engine.step()
            totals.add(losses)
        if applied:
            self._clamp_temperature()
            if self.target:
                with clock("ema"):
                    self.target.update(momentum)
        with clock("reduce"):
            row = totals.row(self.rank, self.mixture.source_names)
        if signals and self.target:
            row["optim/ema_distance"] = self.target.distance()
        row |= {"optim/lr": engine.group_settings()[0]["lr"], "optim/momentum_ema": momentum}
        return applied, row | {"optim/grad_norm": engine.grad_norm}

    def reload(self) -> int:
        """Back to the newest checkpoint from before the bad steps, which are left out from now on.

        Returns the step to continue with.

        Raises:
            DivergenceError: there is none, or train.max_reloads reloads led to no good step after the bad ones.
        """
        streak, most = self.guard.streak, self.recipe.train.max_reloads
        bad = f"steps {streak[0]} to {streak[-1]}" if len(streak) > 1 else f"step {streak[0]}"
        saved = self._checkpoint_before(streak[0])
        if saved is None:
            raise DivergenceError(
                f"{bad} are bad (gradients not finite, or spikes), and no checkpoint lies before them "
                f"(train.checkpoint_every={self.recipe.train.checkpoint_every}); events.jsonl names their samples"
            )
        if self.guard.rewinds >= most:
            raise DivergenceError(
                f"{bad} are bad (gradients not finite, or spikes), and so were those before them for {most} reloads "
                "(train.max_reloads); events.jsonl names their samples"
            )
        restore(saved, self.engine, self.target)
        self.guard.rewind(saved.step)
        said = f"{bad} left out; back to the checkpoint of step {saved.step}"
        self._incident(streak[-1], said, what="reload", checkpoint=saved.step, skip_steps=sorted(self.guard.skip_steps))
        self.writer.close()
        self.directory = replace(self.directory, attempt=self.directory.attempt + 1)
        return saved.step

    def _checkpoint_before(self, step: int) -> checkpoint.Checkpoint | None:
        """The newest undamaged checkpoint that continues with `step` or an earlier one."""
        resumed = self.directory.resume_from
        found = [*([resumed] if resumed else []), *checkpoint.complete_checkpoints(self.directory.checkpoints)]
        for directory in reversed(found):
            try:
                saved = checkpoint.Checkpoint(directory)
            except UserError as error:
                self.progress.say(str(error))
                continue
            if saved.step <= step:
                return saved
        return None

    def _save(self, done: int) -> None:
        began = time.perf_counter()
        with self.clock("checkpoint"):
            self.save(done)
        self.writer.event("save", step=done, seconds=time.perf_counter() - began)

    def _begin(self, start: int, watchdog: Watchdog, setup_s: float) -> None:
        """What an attempt starts with."""
        run, recipe = self.directory, self.recipe.train
        self.writer = MetricsWriter(
            run.directory,
            attempt=run.attempt,
            enabled=self.rank.is_first,
            tensorboard=recipe.tensorboard,
            wandb_project=recipe.wandb_project,
        )
        if recipe.tensorboard and self.rank.is_first and not self.writer.has_board:
            self.progress.say("train.tensorboard: the package is not installed; metrics.jsonl has everything")
        self.clock = StepClock(self.rank.device, on_phase=watchdog.mark)
        self.stragglers = Stragglers(factor=recipe.straggler)
        # The order of the sources is that of the audit's source column.
        sources = [{"name": order.name, "samples": order.n} for order in self.mixture.orders]
        self.writer.event(
            "resume" if start else "start", step=start, world=self.rank.world, sources=sources, setup_s=setup_s
        )

    @property
    def objective(self) -> Objective:
        """The engine's root module."""
        assert isinstance(self.engine.module, Objective)
        return self.engine.module

    def save(self, step: int) -> None:
        """Writes the checkpoint that continues with `step`."""
        recipe = self.recipe
        manifest = {
            "applied_steps": self.engine.applied_steps,
            "skip_steps": sorted(self.guard.skip_steps),
            "groups": self.engine.group_settings(),
            "sampler": {"layout": self.mixture.to_state(), "data": self.data_hash},
            # Every random number is drawn from keys made of this seed, so there is no generator state to keep.
            "rng": {"seed": recipe.train.seed},
            "recipe": recipe.to_dict(),
            "versions": package_versions(),
            "world": self.rank.world,
        }
        checkpoint.save(
            self.directory.checkpoints,
            step=step,
            state=training_state(self.engine, self.target),
            manifest=manifest,
            rank=self.rank,
            keep=recipe.train.checkpoint_keep,
        )

    def _clamp_temperature(self) -> None:
        if self.recipe.objective.has("text"):
            self.engine.clamp(LOG_SCALE, *LOG_SCALE_BOUNDS)

    def _note_skip(self, step: int, *, why: str) -> None:
        """Tells, with its samples, of a step that was not applied: the weights and the average stay as they were."""
        samples = [sample for drawn in gather_objects(self.drawn, self.rank) for sample in drawn]
        self.writer.event("skip", step=step, why=why, samples=samples)

    def _incident(self, step: int, said: str, **details: Any) -> None:
        self.writer.event("incident", step=step, **details)
        self.progress.say(f"step {step}: {said}")

    def _alarm(self, row: dict[str, float], step: int) -> None:
        """Says which term's target has collapsed, once for each term and start."""
        for name in collapsed(row, self.recipe.objective):
            if name not in self.collapsed:
                self.collapsed.add(name)
                rank, std = row[f"collapse/{name}/rank"], row[f"collapse/{name}/std"]
                said = f"the target of term {name} has collapsed (rank {rank:.2f}, std {std:.3f})"
                self._incident(step, said, what="collapse", term=name, rank=rank, std=std)

    def _next(self, stream: Loader, *, step: int, micro_step: int) -> Batch:
        """The next batch, recorded before it is trained on."""
        with self.clock("data"):
            batch = next(stream)
        if (batch.step, batch.micro_step) != (step, micro_step):
            raise RuntimeError(f"the loader gave step {batch.step}.{batch.micro_step}, needed {step}.{micro_step}")
        samples = torch.stack([batch.source_N, batch.epoch_N, batch.id_N, batch.substitute_N], 1).tolist()
        self.drawn += samples
        run = self.directory
        if self.recipe.data.audit:
            name = f"attempt_{run.attempt}_rank_{self.rank.rank}_of_{self.rank.world}.jsonl"
            (run.directory / "audit").mkdir(exist_ok=True)
            append_row(run.directory / "audit" / name, {"step": step, "micro_step": micro_step, "samples": samples})
        every = self.recipe.train.picture_every
        if every and step % every == 0 and micro_step == 0 and self.rank.is_first:
            write_input_picture(run.directory / "pictures" / f"step_{step:08d}", batch, self.recipe)
        return batch

    def _measured(self, stream: Loader, step: int) -> dict[str, float]:
        """Times, memory and counts of a step."""
        row = self.clock.row()
        rate = self.recipe.train.global_batch / row["time/step_s"]
        row |= {"perf/samples_per_s": rate, "perf/mem_gib": memory_gib(self.rank.device)}
        row |= utilisation(rate, world=self.rank.world, flops=self.flops)
        return row | {"optim/skipped": self.guard.skipped(step), "data/retries": stream.retries}

    def _compare_ranks(self, row: dict[str, float], step: int) -> dict[str, float]:
        """How much the slowest rank is behind the median; an incident where it is the same one for a while."""
        alone = row["data/wait_s"] + row["time/ema_s"]
        together = sum(row[f"time/{phase}_s"] for phase in ("forward", "backward", "optimizer"))
        measured = gather_objects((alone, together, probe(self.rank.device), socket.gethostname()), self.rank)
        ratio, slow = self.stragglers.check(own_seconds(*list(zip(*measured, strict=True))[:3]))
        if slow is not None:
            host = measured[slow][3]
            said = f"rank {slow} ({host}) is slow: {ratio:.2f} times the median rank"
            self._incident(step, said, what="straggler", rank=slow, host=host, ratio=ratio)
        return {"straggler/max_over_median": ratio}

    def _end(self, outcome: Outcome, *, step: int) -> Outcome:
        self.profile.close()
        self.progress.close()
        if self.rank.is_first:
            ended = self.directory.ended(outcome, step=step)
            self.writer.event("end", step=step, outcome=outcome, goodput=ended["goodput"])
        self.writer.close()
        more = "" if outcome == "finished" else "; the same command continues from here"
        self.progress.say(f"{self.directory.directory} {outcome} after {step} of {self.steps} steps{more}")
        if self.rank.is_first:
            self.progress.say(goodput(self.directory.directory).to_text())
        barrier()
        return outcome
