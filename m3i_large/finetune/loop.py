"""The fine-tuning loop: what one optimizer step does, when it is measured, what is saved."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from m3i_large.assembly import training_state
from m3i_large.checkpoint import CheckpointWriter, Report
from m3i_large.errors import DivergenceError, OutageError
from m3i_large.finetune.data import Evaluated, Trained, ahead
from m3i_large.finetune.recipe import FinetuneRecipe
from m3i_large.finetune.task import Task
from m3i_large.metrics import MetricsWriter, append_row, package_versions
from m3i_large.parallel.comm import Rank, barrier, gather_on_first, highest
from m3i_large.parallel.engine import Engine
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.watchdog import Watchdog
from m3i_large.progress import Progress
from m3i_large.run import Outcome, Run
from m3i_large.schedule import learning_rate
from m3i_large.step_totals import StepTotals
from m3i_large.stop_signals import StopSignals
from m3i_large.telemetry import StepClock, memory_gib

EVALUATIONS, RESULTS = "eval.jsonl", "results"
MAX_BAD_SHARE, MAX_BAD = 0.01, 10  # of the images seen, and at least so many, may be unreadable


class Root(nn.Module):
    """What the engine holds: the model and its moving average.

    `dtype`: bf16 runs both under autocast; the weights are fp32 either way.
    """

    def __init__(self, model: nn.Module, average: nn.Module | None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.average = model, average
        self.dtype = dtype

    def forward(self, batch: Any, *, average: bool = False) -> Any:
        """See TaskModel."""
        model = self.average if average and self.average is not None else self.model
        device = next(self.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return model(batch)

    def set_training(self, training: bool) -> None:
        """Losses or predictions; the average only ever predicts."""
        self.model.train(training)
        if self.average is not None:
            self.average.eval()


@dataclass(kw_only=True)
class Loop:
    """Everything a step touches."""

    recipe: FinetuneRecipe
    directory: Run
    task: Task
    engine: Engine
    average: ShardedEMA | None
    trained: Trained
    evaluated: Evaluated
    rank: Rank
    steps: int
    progress: Progress
    saver: CheckpointWriter
    reports: list[Report] = field(default_factory=list)  # what was found when the checkpoint was looked for
    origin: Any = None  # the weights that it began with, as env.json has them
    skipped_in_a_row: int = 0
    bad: int = 0
    clock: StepClock = field(init=False)
    writer: MetricsWriter = field(init=False)

    def run(self, *, start: int, stop: StopSignals, watchdog: Watchdog, setup_s: float) -> Outcome:
        """Steps from `start` to the end; saves on the way, at a stop signal and at the end."""
        self._begin(start, watchdog, setup_s)
        train, done = self.recipe.train, start
        batches = self._batches(start)
        for step in range(start, self.steps):
            self.clock.start(step)
            row = self._step(step, batches)
            self.writer.log({"step": step, "samples": (step + 1) * train.global_batch, **row})
            self.progress.update(step, row)
            self._tell(self.saver.poll())
            done = step + 1
            number = highest([stop.number], self.rank)[0]
            if done == self.steps or number or done % train.checkpoint_every == 0:
                with self.clock("checkpoint"):
                    self.save(done)
            if number and done < self.steps:
                self.writer.event("preempt", step=done, signal=signal.Signals(number).name)
                return self._end("interrupted", step=done)
            if train.evaluate_every and done % train.evaluate_every == 0 and done < self.steps:
                self.evaluate(done)
        self.evaluate(done)
        return self._end("finished", step=done)

    def evaluate_only(self, step: int, *, watchdog: Watchdog) -> None:
        """Measures the weights as they are."""
        self._begin(step, watchdog, 0.0, event="evaluate")
        self.evaluate(step)
        self.progress.close()
        self.writer.close()

    def _step(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        train, totals, applied = self.recipe.train, StepTotals(), False
        self.engine.set_lr(learning_rate(step, steps=self.steps, config=self.recipe.optim.lr))
        follow = partial(self._after_update, momentum=momentum(self.engine.applied_steps, train.ema))
        root = self.engine.module
        assert isinstance(root, Root)
        root.set_training(True)
        for micro_step in range(train.accumulation):
            with self.clock("data"):
                batch, bad = next(batches)
                self._note_bad(step, bad)
                batch = batch.to(self.rank.device, non_blocking=True)
            # Samplers of boxes and drop path draw from torch's generator: a continued run draws the same.
            torch.manual_seed(hash((train.seed, step, micro_step, self.rank.rank)) % 2**63)
            with self.clock("forward"):
                losses = self.engine(batch)
                loss = torch.stack(list(losses.values())).sum()
            with self.clock("backward"):
                self.engine.backward(loss)
            with self.clock("optimizer"):
                applied = self.engine.step(after_update=follow)
            totals.add({"loss": loss, **{f"loss/{name}": x for name, x in losses.items()}})
        row = totals.row(self.rank, ())
        self._judge(step, applied)
        row |= self.clock.row()
        row |= {
            "optim/lr": learning_rate(step, steps=self.steps, config=self.recipe.optim.lr),
            "optim/grad_norm": self.engine.grad_norm,
            "optim/skipped": float(not applied),
            "perf/samples_per_s": train.global_batch / row["time/step_s"],
            "perf/mem_gib": memory_gib(self.rank.device),
        }
        return row

    def _after_update(self, masters: Any, *, momentum: float) -> None:
        if self.average is not None:
            with self.clock("ema"):
                self.average.update(masters, momentum)

    def _judge(self, step: int, applied: bool) -> None:
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if not applied:
            self.writer.event("skip", step=step, why="not finite")
            self.progress.say(f"step {step}: gradients are not finite; not applied")
        if self.skipped_in_a_row >= self.recipe.train.max_skipped:
            raise DivergenceError(
                f"{self.skipped_in_a_row} steps up to {step} have gradients that are not finite (train.max_skipped)"
            )

    def _note_bad(self, step: int, bad: list[str]) -> None:
        """Notes images that could not be read and were replaced; too many end the run."""
        for reason in bad:
            self.bad += 1
            row = {"step": step, "reason": reason, "attempt": self.directory.attempt}
            append_row(self.directory.directory / "quarantine.jsonl", row)
        seen = (step + 1) * self.recipe.train.global_batch / self.rank.world
        if self.bad > max(MAX_BAD, MAX_BAD_SHARE * seen):
            raise OutageError(f"data: {self.bad} of {seen:.0f} images cannot be read, the last: {bad[-1]}")

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores the evaluated split, with the average where there is one; a row of eval.jsonl, result files."""
        root = self.engine.module
        assert isinstance(root, Root)
        root.set_training(False)
        digests: dict[int, Any] = {}
        with torch.no_grad():
            rounds = range(len(self.evaluated))
            for indices, batch in ahead(self.evaluated, rounds, workers=self.recipe.train.workers):
                with self.clock("evaluate"):
                    found = root(batch.to(self.rank.device), average=self.average is not None)
                digests |= {i: self.task.digest(i, x) for i, x in zip(indices, found, strict=True)}
        gathered: dict[int, Any] = {}
        for part in gather_on_first(digests, self.rank):  # of LVIS gigabytes
            gathered |= part
        values: dict[str, float] = {}
        if self.rank.is_first:
            directory = self.directory.directory
            values = self.task.score(gathered, directory / RESULTS / f"step_{step:08d}")
            branch = "average" if self.average is not None else "model"
            kind, number = self.recipe.task.kind, len(gathered)
            row = {"step": step, "kind": kind, "branch": branch, "num_samples": number, "values": values}
            append_row(directory / EVALUATIONS, {**row, "attempt": self.directory.attempt})
            shown = ", ".join(f"{name} {value:.1%}" for name, value in values.items())
            self.progress.say(f"{directory} step {step}: {shown} ({number} images)")
        barrier()
        return values

    def save(self, step: int) -> None:
        """Begins to save the checkpoint that continues with `step`."""
        manifest = {
            "applied_steps": self.engine.applied_steps,
            "groups": self.engine.group_settings(),
            "rng": {"seed": self.recipe.train.seed},
            "recipe": self.recipe.to_dict(),
            "versions": package_versions(),
            "world": self.rank.world,
        }
        self.saver.save(step, state=training_state(self.engine, self.average), manifest=manifest)

    def _batches(self, start: int) -> Iterator[Any]:
        accumulation = self.recipe.train.accumulation
        micro_steps = range(start * accumulation, self.steps * accumulation)
        return ahead(self.trained, micro_steps, workers=self.recipe.train.workers)

    def _begin(self, start: int, watchdog: Watchdog, setup_s: float, *, event: str = "") -> None:
        train, run = self.recipe.train, self.directory
        self.writer = MetricsWriter(
            run.directory,
            attempt=run.attempt,
            enabled=self.rank.is_first,
            tensorboard=train.tensorboard,
            wandb_project=train.wandb_project,
        )
        self.clock = StepClock(self.rank.device, on_phase=watchdog.mark)
        event = event or ("resume" if start else "start")
        self.writer.event(event, step=start, world=self.rank.world, steps=self.steps, setup_s=setup_s)
        if self.rank.is_first:
            for note in self.task.notes:
                self.progress.say(note)
        self._tell(self.reports)

    def _tell(self, reports: list[Report]) -> None:
        for report in reports:
            self.writer.event(report.event, step=report.step, **report.details)
            if report.line:
                self.progress.say(report.line)

    def _end(self, outcome: Outcome, *, step: int) -> Outcome:
        self.progress.close()
        failure = self.saver.finish()
        self._tell(self.saver.poll())
        self.writer.close()
        message = f"checkpoint: the last one, step {step}, could not be saved: {failure}" if failure else ""
        if self.rank.is_first:
            ended = "failed" if failure else outcome
            for line in self.directory.ended(ended, step=step, steps=self.steps, message=message):
                self.progress.say(line)
        barrier()  # the launcher ends all ranks once one has ended otherwise than with 0
        if failure:
            raise OutageError(message)
        return outcome


def momentum(applied_steps: int, final: float) -> float:
    """Of the weights' average: (1 + t) / (10 + t) until that reaches `final`, so that a short run's average is not of
    its first steps."""
    return min(final, (1 + applied_steps) / (10 + applied_steps))
