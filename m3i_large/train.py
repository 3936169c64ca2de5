"""The training loop: one recipe, one run directory, any valid number of ranks."""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from m3i_large.assembly import build_engine, restore, training_state
from m3i_large.checkpoint import CheckpointWriter, Report
from m3i_large.data.batch import Batch
from m3i_large.data.loader import Loader
from m3i_large.data.mixture import Mixture
from m3i_large.data.sources import manifest_hash
from m3i_large.errors import OutageError
from m3i_large.metrics import MetricsWriter, append_row, environment, package_versions
from m3i_large.micro_step import MicroStep, chunk_rows, micro_step
from m3i_large.models import LOG_SCALE_BOUNDS
from m3i_large.objective.signals import collapsed
from m3i_large.parallel.comm import Rank, any_rank, barrier
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.engine import Engine
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.state import Slice
from m3i_large.pictures import write_input_picture
from m3i_large.progress import Progress
from m3i_large.recipe import Recipe
from m3i_large.run import Outcome, Run, begin, checkpoint_writer, open_run, read_exit, resolve, resume_point
from m3i_large.schedule import ema_momentum, learning_rate
from m3i_large.step_totals import StepTotals
from m3i_large.stop_signals import StopSignals
from m3i_large.stream import check_world, make_loader, plan_mixture, prepare_sources, restore_mixture

LOG_SCALE = "text_head.log_scale"
# A stop has a grace period (the launcher: 30 s); copies that are not finished by then are made by the next start.
COPIES_AT_STOP_S = 5.0


def train(recipe: Recipe, *, ds: Path, out: Path, resume: str, rank: Rank) -> Outcome:
    """Trains `recipe` in the run directory `out` until its last step, a stop signal or a failure.

    Args:
        ds: DeepSpeed JSON file (sharding only).
        resume: `auto`, `never`, a run or checkpoint directory, or the URL of copies.

    Returns:
        How the run ended; exit.json holds the same.

    Raises:
        UserError: something in the input is wrong; nothing was written then.
        OutageError: the last checkpoint could not be saved.
    """
    recipe = resolve(recipe, out, rank.device)
    torch.set_num_threads(recipe.train.threads or 1)
    run = open_run(out, recipe, resume=resume)
    sizes = StepSizes(
        micro_batch=recipe.train.micro_batch_at(rank.world),
        accumulation=recipe.train.accumulation,
        clip=recipe.optim.clip,
        bf16=recipe.train.precision == "bf16",
        chunked=recipe.train.contrast == "cached",
    )
    ds_config = read_ds_config(ds, sizes, world=rank.world)
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
    if saved and saved.step >= steps and read_exit(out).get("outcome") == "finished":
        progress.say(f"{out} is finished: {steps} of {steps} steps; nothing to do")
        return "finished"

    engine, target = build_engine(recipe, ds_config, rank)
    if saved:
        restore(saved, engine, target)
    barrier()
    if rank.is_first:
        begin(
            run,
            environment(
                world=rank.world, device=rank.device, precision=recipe.train.precision, threads=torch.get_num_threads()
            ),
        )
    saver = checkpoint_writer(run, rank)
    how = micro_step(engine, recipe, rows=chunk)
    loop = Loop(recipe, run, engine, how, target, mixture, manifest_hash(sources), rank, steps, progress, saver, found)
    start = saved.step if saved else 0
    loader = make_loader(recipe, mixture, sources, rank, run, start_step=start)
    with StopSignals() as stop, saver, loader as stream:
        return loop.run(stream, start=start, stop=stop)


@dataclass
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
    reports: list[Report]
    skipped: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    collapsed: set[str] = field(default_factory=set)

    def run(self, stream: Loader, *, start: int, stop: StopSignals) -> Outcome:
        """Steps from `start` to the end; saves on the way, at a stop signal and at the end."""
        recipe, engine = self.recipe.train, self.engine
        writer = self._writer()
        # The order of the sources is that of the audit's source column.
        sources = [{"name": order.name, "samples": order.n} for order in self.mixture.orders]
        writer.event("resume" if start else "start", step=start, world=self.rank.world, sources=sources)
        self._tell(self.reports, writer)
        outcome: Outcome = "finished"
        done = start
        for step in range(start, self.steps):
            began = time.perf_counter()
            engine.set_lr(learning_rate(step, steps=self.steps, config=self.recipe.optim.lr))
            momentum = ema_momentum(step, steps=self.steps, config=recipe.momentum_ema)
            totals, waited = StepTotals(), 0.0
            applied = False
            for number in range(recipe.accumulation):
                before = time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter() - before
                self._record(batch, step=step, micro_step=number)
                batch = batch.to(self.rank.device, non_blocking=True)
                losses = self.micro_step(batch, signals=step % recipe.signals_every == 0)
                applied = engine.step(after_update=partial(self._after_update, momentum=momentum))
                totals.add(losses)
            self._count(applied, step, writer)
            row = totals.row(self.rank, self.mixture.source_names)
            row |= self._timing(began, waited) | {"optim/momentum_ema": momentum, "optim/grad_norm": engine.grad_norm}
            row |= {"optim/lr": engine.group_settings()[0]["lr"], "optim/skipped": self.skipped}
            row |= {"data/retries": stream.retries}
            stopping = any_rank(stop.requested, self.rank)
            done = step + 1
            if stopping or done == self.steps or done % recipe.checkpoint_every == 0:
                row["time/checkpoint_s"] = self.save(done)
            writer.log({"step": step, "samples": (step + 1) * recipe.global_batch, **row})
            self._alarm(row, step, writer)
            self.progress.update(step, row)
            self._tell(self.saver.poll(), writer)
            if stopping and done < self.steps:
                outcome = "interrupted"
                writer.event("preempt", step=done, signal=stop.name)
                break
        return self._end(outcome, step=done, writer=writer)

    def save(self, step: int) -> float:
        """Begins to save the checkpoint that continues with `step`; returns the seconds it held the training."""
        recipe = self.recipe
        manifest = {
            "applied_steps": self.engine.applied_steps,
            "skip_steps": self.skipped_steps,
            "groups": self.engine.group_settings(),
            "sampler": {"layout": self.mixture.to_state(), "data": self.data_hash},
            # Every random number is drawn from keys made of this seed, so there is no generator state to keep.
            "rng": {"seed": recipe.train.seed},
            "recipe": recipe.to_dict(),
            "versions": package_versions(),
            "world": self.rank.world,
        }
        return self.saver.save(step, state=training_state(self.engine, self.target), manifest=manifest)

    def _tell(self, reports: list[Report], writer: MetricsWriter) -> None:
        """Checkpoints that are complete, failed or were found damaged go into the events, trouble on the screen too."""
        for report in reports:
            writer.event(report.event, step=report.step, **report.details)
            if report.line:
                self.progress.say(report.line)

    def _writer(self) -> MetricsWriter:
        run, project = self.directory, self.recipe.train.wandb_project
        return MetricsWriter(run.directory, attempt=run.attempt, enabled=self.rank.is_first, wandb_project=project)

    def _after_update(self, masters: Mapping[str, Slice], *, momentum: float) -> None:
        """What follows from new weights: the temperature's bounds, the target's average."""
        if LOG_SCALE in masters:
            self.engine.clamp(LOG_SCALE, *LOG_SCALE_BOUNDS)
        if self.target:
            self.target.update(masters, momentum)

    def _count(self, applied: bool, step: int, writer: MetricsWriter) -> None:
        """Counts steps whose gradients were not finite; the weights and the average stay as they were."""
        if applied:
            return
        self.skipped += 1
        self.skipped_steps.append(step)
        writer.event("skip", step=step)
        row = self.recipe.train.max_skipped
        if self.skipped_steps[-row:] == list(range(step - row + 1, step + 1)):
            raise FloatingPointError(
                f"{row} steps in a row had gradients that are not finite, the last one step {step}"
            )

    def _alarm(self, row: dict[str, float], step: int, writer: MetricsWriter) -> None:
        """Says which term's target has collapsed, once for each term and attempt."""
        for name in collapsed(row, self.recipe.objective):
            if name not in self.collapsed:
                self.collapsed.add(name)
                rank, std = row[f"collapse/{name}/rank"], row[f"collapse/{name}/std"]
                writer.event("incident", step=step, what="collapse", term=name, rank=rank, std=std)
                self.progress.say(
                    f"step {step}: the target of term {name} has collapsed (rank {rank:.2f}, std {std:.3f})"
                )

    def _record(self, batch: Batch, *, step: int, micro_step: int) -> None:
        """Audit rows and pictures of what is about to be trained on."""
        if (batch.step, batch.micro_step) != (step, micro_step):
            raise RuntimeError(f"the loader gave step {batch.step}.{batch.micro_step}, needed {step}.{micro_step}")
        run = self.directory
        if self.recipe.data.audit:
            samples = torch.stack([batch.source_N, batch.epoch_N, batch.id_N, batch.substitute_N], 1).tolist()
            name = f"attempt_{run.attempt}_rank_{self.rank.rank}_of_{self.rank.world}.jsonl"
            (run.directory / "audit").mkdir(exist_ok=True)
            append_row(run.directory / "audit" / name, {"step": step, "micro_step": micro_step, "samples": samples})
        every = self.recipe.train.picture_every
        if every and step % every == 0 and micro_step == 0 and self.rank.is_first:
            write_input_picture(run.directory / "pictures" / f"step_{step:08d}", batch, self.recipe)

    def _timing(self, began: float, waited: float) -> dict[str, float]:
        seconds = time.perf_counter() - began
        if self.rank.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.rank.device) / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rate = self.recipe.train.global_batch / seconds
        return {"data/wait_s": waited, "time/step_s": seconds, "perf/samples_per_s": rate, "perf/mem_gib": memory}

    def _end(self, outcome: Outcome, *, step: int, writer: MetricsWriter) -> Outcome:
        self.progress.close()
        failure = self.saver.finish(copies_s=None if outcome == "finished" else COPIES_AT_STOP_S)
        self._tell(self.saver.poll(), writer)
        message = f"checkpoint: the last one, step {step}, could not be saved: {failure}" if failure else ""
        writer.event("end", step=step, outcome="failed" if failure else outcome)
        writer.close()
        if self.rank.is_first:
            self.directory.ended("failed" if failure else outcome, step=step, message=message)
        if failure:
            raise OutageError(message)
        more = "" if outcome == "finished" else "; the same command continues from here"
        self.progress.say(f"{self.directory.directory} {outcome} after {step} of {self.steps} steps{more}")
        barrier()
        return outcome
