"""The training loop: what one optimizer step does, and what is saved, noticed and told on the way."""

import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch

from m3i_large.assembly import restore, training_state
from m3i_large.checkpoint import Checkpoint, CheckpointWriter, Report, newest_intact
from m3i_large.data.batch import Batch
from m3i_large.data.loader import Loader
from m3i_large.data.mixture import Mixture
from m3i_large.errors import DivergenceError, OutageError
from m3i_large.guard import Guard
from m3i_large.metrics import MetricsWriter, append_row, package_versions
from m3i_large.micro_step import MicroStep
from m3i_large.models import LOG_SCALE_BOUNDS
from m3i_large.objective.signals import collapsed
from m3i_large.parallel.comm import Rank, barrier, gather_objects, highest
from m3i_large.parallel.engine import Engine
from m3i_large.parallel.partitions import full_shape
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.state import Slice
from m3i_large.parallel.watchdog import Watchdog
from m3i_large.pictures import Pictures
from m3i_large.profiling import Profile
from m3i_large.progress import Progress
from m3i_large.recipe import Recipe
from m3i_large.run import Outcome, Run
from m3i_large.schedule import ema_momentum, learning_rate
from m3i_large.step_totals import StepTotals
from m3i_large.stop_signals import StopSignals
from m3i_large.stragglers import Stragglers, own_seconds, probe
from m3i_large.telemetry import Flops, StepClock, memory_gib, utilisation

LOG_SCALE = "text_head.log_scale"
COPIES_AT_STOP_S = 5.0


@dataclass(kw_only=True)
class Loop:
    """Everything one optimizer step touches."""

    recipe: Recipe
    directory: Run
    engine: Engine
    micro_step: MicroStep
    target: ShardedEMA | None
    mixture: Mixture
    data_hash: str
    rank: Rank
    steps: int
    progress: Progress
    saver: CheckpointWriter
    guard: Guard
    profile: Profile
    pictures: Pictures
    reports: list[Report] = field(default_factory=list)  # what was found when the checkpoint was looked for
    origin: Checkpoint | None = None  # where the run started from
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
            if self.pictures.due(step):
                self._look(step)
            self.clock.start(step)
            bad, row = self._step(stream, step)
            self.writer.log({"step": step, "samples": (step + 1) * self.recipe.train.global_batch, **row})
            self._alarm(row, step)
            self.progress.update(step, row)
            self._tell(self.saver.poll())
            number, undo = highest([stop.number, bad], self.rank)
            if undo and not number:
                return None
            done = step + 1
            due |= done % every == 0
            if done == self.steps or (number and not self.guard.spoiled) or (due and not self.guard.streak):
                with self.clock("checkpoint"):
                    self.save(done)
                due = False
            if number and done < self.steps:
                self.writer.event("preempt", step=done, signal=signal.Signals(number).name)
                return self._end("interrupted", step=done)
        if self.recipe.train.picture_every:
            self._look(self.steps)
        return self._end("finished", step=done)

    def _look(self, step: int) -> None:
        """Pictures of the state after `step` updates, and those that have gathered since the last ones."""
        with self.clock("pictures"):
            self.pictures.look(self.engine, step)
        self.writer.pictures(self.pictures.take(), step=step)

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
        follow = partial(self._after_update, momentum=momentum, measure=signals)
        for number in range(recipe.accumulation):
            batch = self._next(stream, step=step, micro_step=number).to(self.rank.device, non_blocking=True)
            losses = self.micro_step(batch, signals=signals, clock=clock)
            with clock("optimizer"):
                applied = engine.step(after_update=follow)
            totals.add(losses)
            self.pictures.losses(batch, losses)
        with clock("reduce"):
            row = totals.row(self.rank, self.mixture.source_names)
        if signals and applied and self.target:
            row["optim/ema_distance"] = self.target.distance()
        row |= {"optim/lr": engine.group_settings()[0]["lr"], "optim/momentum_ema": momentum}
        return applied, row | {"optim/grad_norm": engine.grad_norm}

    def _after_update(self, masters: Mapping[str, Slice], *, momentum: float, measure: bool) -> None:
        """What follows from new weights: the temperature's bounds, the target's moving average."""
        if LOG_SCALE in masters:
            self.engine.clamp(LOG_SCALE, *LOG_SCALE_BOUNDS)
        if self.target:
            with self.clock("ema"):
                self.target.update(masters, momentum, measure=measure)

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

    def _checkpoint_before(self, step: int) -> Checkpoint | None:
        """The newest undamaged checkpoint that continues with `step` or an earlier one; none is saved in a streak."""
        self.saver.wait()
        saved, reports = newest_intact(self.directory.checkpoints, rank=self.rank)
        self._tell(reports)
        saved = saved or self.origin
        return saved if saved and saved.step <= step else None

    def _tell(self, reports: list[Report]) -> None:
        """Checkpoints that are complete, failed or were found damaged go into the events, trouble on the screen too."""
        for report in reports:
            self.writer.event(report.event, step=report.step, **report.details)
            if report.line:
                self.progress.say(report.line)

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
        draws = self.mixture.position(self.steps)
        sources = [
            {"name": order.name, "samples": order.n, "draws_per_step": int(drawn) / self.steps}
            for order, drawn in zip(self.mixture.orders, draws, strict=True)
        ]
        sizes = {name: prod(full_shape(p)) for name, p in self.engine.trainable()}
        student = sum(size for name, size in sizes.items() if name.startswith("student."))
        parameters = {"student": student, "trained": sum(sizes.values())}
        begun = {
            "world": self.rank.world,
            "steps": self.steps,
            "sources": sources,
            "data": self.data_hash,
            "parameters": parameters,
        }
        self.writer.event("resume" if start else "start", step=start, **begun, setup_s=setup_s)
        self._tell(self.reports)
        self.reports = []

    def save(self, step: int) -> float:
        """Begins to save the checkpoint that continues with `step`; returns the seconds it held the training."""
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
        return self.saver.save(step, state=training_state(self.engine, self.target), manifest=manifest)

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
        if micro_step == 0 and self.pictures.due(step):
            self.pictures.inputs(batch, step)
            self.writer.pictures(self.pictures.take(), step=step)
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
        failure = self.saver.finish()
        self._tell(self.saver.poll())
        if outcome == "interrupted":
            self.finish_copies(wait_s=COPIES_AT_STOP_S)
        message = f"checkpoint: the last one, step {step}, could not be saved: {failure}" if failure else ""
        self.writer.close()
        if self.rank.is_first:
            ended = "failed" if failure else outcome
            for line in self.directory.ended(ended, step=step, steps=self.steps, message=message):
                self.progress.say(line)
        barrier()  # the launcher ends all ranks once one has ended otherwise than with 0
        if failure:
            raise OutageError(message)
        return outcome

    def finish_copies(self, *, wait_s: float | None = None) -> None:
        """Waits on the first rank for the copies of checkpoints elsewhere, and tells what went wrong with them.

        At the end of a run that may take long: the other ranks have left, no watchdog looks, a signal ends it.
        """
        self._tell(self.saver.finish_copies(wait_s=wait_s))
