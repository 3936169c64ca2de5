"""Plays a mixture's order at any scale without data, and proves what the sampler promises. Numpy and the mixture only.

Symbols as in SAMPLER: N global batch, V lanes, L = N / V slots per lane, W ranks, T steps, S sources, n samples and b
samples per block of a source.
"""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m3i_large.data.mixture import Mixture
from m3i_large.data.simulate.batches import Batches, look_at_batches
from m3i_large.data.simulate.counts import Counts, count
from m3i_large.data.simulate.once import Once, play_epoch
from m3i_large.data.simulate.reads import Reads, SourceSize, play_reads
from m3i_large.data.simulate.verdicts import FAILED, Cost, Verdict, judge
from m3i_large.errors import UserError

__all__ = ["Simulation", "SourceSize", "Verdict", "simulate"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """All figures and their verdicts."""

    mixture: Mixture
    world: int
    gpu_rate: float
    counts: Counts
    once: list[Once]
    batches: Batches
    reads: Reads
    cost: Cost
    verdicts: list[Verdict]

    @property
    def failed(self) -> bool:
        """Whether any promise is broken."""
        return any(verdict.verdict == FAILED for verdict in self.verdicts)

    @property
    def global_batch(self) -> int:
        return self.mixture.slots * self.mixture.lanes

    @property
    def step_seconds(self) -> float:
        """Duration of a step at `gpu_rate` samples per second and GPU."""
        return self.global_batch / self.world / self.gpu_rate

    def cluster(self) -> dict[str, float]:
        """Requests and bytes per second, bursts, and bytes in memory, of a rank and of all ranks."""
        requests, held = self.reads.requests_TW, self.reads.held_TW
        rank_burst, cluster_burst = self.reads.burst()
        read = sum(source.requests * source.bytes_per_request for source in self.reads.sources)
        per_second = requests.mean() / self.step_seconds
        return {
            "step_seconds": self.step_seconds,
            "rank_requests_per_s": float(per_second),
            "cluster_requests_per_s": float(per_second * self.world),
            "rank_bytes_per_s": read / (len(requests) * self.step_seconds * self.world),
            "cluster_bytes_per_s": read / (len(requests) * self.step_seconds),
            "rank_burst": rank_burst,
            "cluster_burst": cluster_burst,
            "rank_held_bytes_mean": float(held.mean()),
            "rank_held_bytes_max": float(held.max()),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the series that plots show."""
        counts = {f: getattr(self.counts, f) for f in ("steps", "looked_at", "filled", "shortest")}
        once = [asdict(o) | {f: getattr(o, f) for f in ("complete", "missing", "repeated", "holds")} for o in self.once]
        reads = {f: getattr(self.reads, f) for f in ("first", "last", "complete")}
        return {
            "ranks": self.world,
            "global_batch": self.global_batch,
            "lanes": self.mixture.lanes,
            "slots": self.mixture.slots,
            "accumulation": self.mixture.accumulation,
            "valid_ranks": self.mixture.valid_world_sizes(),
            "gpu_rate": self.gpu_rate,
            "counts": counts | {"sources": [asdict(source) for source in self.counts.sources]},
            "once": once,
            "batches": asdict(self.batches),
            "reads": reads | self.cluster() | {"sources": [asdict(source) for source in self.reads.sources]},
            "cost": asdict(self.cost),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "failed": self.failed,
        }


def simulate(
    plan: Callable[[], Mixture],
    *,
    sizes: Sequence[SourceSize],
    world: int,
    steps: int | None = None,
    epochs: float | None = None,
    gpu_rate: float = 182.0,
    quick: bool = False,
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Simulation:
    """Plays a run of `steps`, or else of `epochs`, on `world` ranks.

    plan: lays out the mixture; it is timed. sizes: in its order of sources. gpu_rate: samples per second and GPU.
    quick: plays only a part of each epoch. workers: processes; default: the cores. progress: stage, done, total.

    Raises UserError for a number of ranks that does not fit, or no length.
    """
    mixture, planned, memory = _planned(plan)
    if world not in (valid := mixture.valid_world_sizes()):
        raise UserError(f"--ranks: got {world}; needed: one of {', '.join(map(str, valid))}")
    length = steps or mixture.steps_for_epochs(epochs or 0)
    if length < 1:
        raise UserError(f"train: got {epochs} epochs and no steps; needed: a run of at least one step")
    random = np.random.default_rng(0)
    cost = _cost(mixture, world=world, step=length - 1, plan_seconds=planned, plan_bytes=memory)
    counts = count(mixture, steps=length, epochs=None if steps else epochs, progress=partial(progress, "split"))
    once = []
    for order, source in zip(mixture.orders, counts.sources, strict=True):
        last = max(1, int(source.epochs))
        epoch = int(random.integers((last + 1) // 2, last + 1))
        stage = partial(progress, f"an epoch of {order.name}")
        once.append(play_epoch(order, epoch=epoch, quick=quick, workers=workers, progress=stage))
    stage = partial(progress, "batches")
    batches = look_at_batches(mixture, sizes=sizes, counts=counts, world=world, random=random, progress=stage)
    start, stage = int(random.integers(length)), partial(progress, "reads")
    reads = play_reads(mixture, sizes=sizes, world=world, start=start, progress=stage)
    verdicts = judge(mixture, counts=counts, once=once, batches=batches, reads=reads, cost=cost)
    return Simulation(
        mixture=mixture,
        world=world,
        gpu_rate=gpu_rate,
        counts=counts,
        once=once,
        batches=batches,
        reads=reads,
        cost=cost,
        verdicts=verdicts,
    )


def _planned(plan: Callable[[], Mixture]) -> tuple[Mixture, float, int]:
    """The mixture, the seconds and the bytes of resident memory that laying it out took."""
    memory, start = _resident_bytes(), time.perf_counter()
    mixture = plan()
    return mixture, time.perf_counter() - start, max(0, _resident_bytes() - memory)


def _cost(mixture: Mixture, *, world: int, step: int, plan_seconds: float, plan_bytes: int) -> Cost:
    """Times a rank's first step, as after a resume at `step`, and the median of some before it, far apart."""
    seconds = []
    for at in [step, *np.linspace(0, step, 23).astype(int)[1:-1].tolist()]:
        start = time.perf_counter()
        mixture.rows(at, rank=world - 1, world=world)
        seconds.append(time.perf_counter() - start)
    return Cost(
        plan_seconds=plan_seconds,
        plan_bytes=plan_bytes,
        seek_seconds=seconds[0],
        step_seconds=float(np.median(seconds[1:])),
    )


def _resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, the most it ever had."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
