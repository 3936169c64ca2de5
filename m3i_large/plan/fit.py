"""Which batches of a recipe fit on so many GPUs: a few micro-batches are walked, others follow."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from m3i_large.data.mixture import default_lanes
from m3i_large.ds_file import STAGES, Zero, sums_refused
from m3i_large.errors import UserError
from m3i_large.plan.devices import Gpu
from m3i_large.plan.flops import flops_of
from m3i_large.plan.memory import Memory, gathered, memory, states
from m3i_large.plan.parameters import Table
from m3i_large.plan.walk import Walk, walk
from m3i_large.recipe import Recipe
from m3i_large.stream import chunk_rows

LEAST_ROWS = 2  # one image alone cannot be mixed


@dataclass(frozen=True)
class Option:
    """A way to run the recipe on this number of GPUs.

    Attributes:
        chunk: rows of a pass, contrast cached; None where it is direct.
        hardware: FLOPs per sample.
        overrides: what to add to the command line; empty for the recipe as it is.
    """

    contrast_batch: int
    accumulation: int
    micro_batch: int
    chunk: int | None
    checkpointing: bool
    memory: Memory
    hardware: float
    fits: bool
    overrides: tuple[str, ...]


def lanes_of(recipe: Recipe) -> int:
    """V of the sampler."""
    return recipe.data.lanes or default_lanes(recipe.train.global_batch)


def accumulations(recipe: Recipe, gpus: int) -> list[int]:
    """Numbers of micro-steps that the recipe's global batch and lanes allow on so many GPUs."""
    lanes, batch = lanes_of(recipe), recipe.train.global_batch
    return [a for a in range(1, lanes // gpus + 1) if lanes % (gpus * a) == 0 and batch // (a * gpus) >= LEAST_ROWS]


class Planner:
    """Memory of micro-batches of any size on this number of GPUs."""

    def __init__(self, recipe: Recipe, table: Table, *, gpus: int, gpu: Gpu, zero: Zero) -> None:
        self.recipe, self.table, self.gpus, self.gpu, self.zero = recipe, table, gpus, gpu, zero
        self.rows = recipe.train.contrast_batch // gpus
        self.remat = recipe.train.activation_checkpointing
        self.chunk = self.chunk_of(recipe, gpus)
        self._walks: dict[tuple[int, bool, int | None], Walk] = {}
        self._buffers: dict[tuple[Zero, int], dict[str, int]] = {}

    def chunk_of(self, recipe: Recipe, world: int) -> int | None:
        """Rows of a pass, as training derives them; None where the contrast is direct."""
        return chunk_rows(recipe, slots=recipe.train.global_batch // lanes_of(recipe), world=world)

    def walk(self, rows: int, remat: bool, chunk: int | None) -> Walk:
        """Walks a micro-batch, each once."""
        key = rows, remat, chunk
        if key not in self._walks:
            # All walks have the recipe's contrast batch, so that what lives grows linearly with the rows.
            world = max(1, self.recipe.train.contrast_batch // rows)
            self._walks[key] = walk(self.recipe, rows=rows, world=world, checkpointing=remat, chunk=chunk)
        return self._walks[key]

    def own_walk(self, remat: bool) -> Walk:
        """The recipe's own micro-batch; contrast cached: one chunk of it, as the others are the same."""
        return self.walk(self.chunk or self.rows, remat, self.chunk)

    def in_full(self, seen: Walk) -> Walk:
        """A walk's passes and exchanges in the numbers of the recipe's own micro-batch."""
        return replace(seen, rows=self.rows)

    def activations(self, rows: int, remat: bool, chunk: int | None) -> int:
        """Most bytes alive in a micro-step, from walks of few rows.

        In each phase bytes = fixed + a * rows of a pass + b * rows of the micro-batch; where the contrast is direct,
        both are the same rows.
        """
        if self.chunk is None or chunk is None:
            sizes = self.rows, 16 if self.rows > 32 else 4 * self.rows
            first, second = (self.walk(n, remat, None).peak for n in sizes)
            return math.ceil(first + (rows - sizes[0]) * (second - first) / (sizes[1] - sizes[0]))
        base = self.chunk
        other = base // 2 if base > 1 else 2
        one, two, half = (self.walk(n, remat, c).phases for n, c in ((base, base), (2 * base, base), (other, other)))
        peaks = []
        for name, phase in one.items():
            by_row = (two[name].peak - phase.peak) / base
            by_both = (half[name].peak - phase.peak) / (other - base)
            peaks.append(phase.peak + (rows - base) * by_row + (chunk - base) * (by_both - by_row))
        return math.ceil(max(peaks))

    def buffers(self, zero: Zero, world: int) -> dict[str, int]:
        """What ZeRO gathers and buffers; the same for every micro-batch."""
        if (zero, world) not in self._buffers:
            self._buffers[zero, world] = gathered(self.own_walk(self.remat), self.table, zero, world=world)
        return self._buffers[zero, world]

    def memory(self, rows: int, remat: bool, *, chunk: int | None, world: int | None = None) -> Memory:
        """Peak memory with `rows` rows, `chunk` of them in a pass."""
        own = self.own_walk(self.remat)
        return memory(
            states(self.table, self.zero, world=world or self.gpus),
            self.buffers(self.zero, world or self.gpus),
            activations=self.activations(rows, remat, chunk),
            batch=math.ceil(rows * own.batch / own.rows),
            gpu=self.gpu,
        )

    def fits(self, rows: int, remat: bool, *, chunk: int | None, world: int | None = None) -> bool:
        return self.memory(rows, remat, chunk=chunk, world=world).total <= self.gpu.memory

    def options(self, accumulation: int) -> Iterator[Option]:
        """The recipe with so many micro-steps, with and without recomputation; none where it would be refused."""
        contrast = self.recipe.train.global_batch // accumulation
        try:
            recipe = changed(self.recipe, contrast_batch=contrast, micro_batch=None)
            chunk = self.chunk_of(recipe, self.gpus)
        except UserError:  # a train.chunk that does not divide these rows
            return
        if sums_refused(self.zero.stage, bf16=self.table.element == 2, passes=accumulation + (chunk is not None)):
            return
        for remat in (True, False):
            yield self._option(changed(recipe, activation_checkpointing=remat), chunk)

    def _option(self, recipe: Recipe, chunk: int | None) -> Option:
        train, own = recipe.train, self.recipe.train
        rows, remat = train.contrast_batch // self.gpus, train.activation_checkpointing
        used = self.memory(rows, remat, chunk=chunk)
        differing = [
            (train.contrast_batch != own.contrast_batch, f"train.contrast_batch={train.contrast_batch}"),
            (remat != own.activation_checkpointing, f"train.activation_checkpointing={str(remat).lower()}"),
        ]
        return Option(
            contrast_batch=train.contrast_batch,
            accumulation=train.accumulation,
            micro_batch=rows,
            chunk=chunk,
            checkpointing=remat,
            memory=used,
            hardware=flops_of(self.own_walk(remat)).hardware,
            fits=used.total <= self.gpu.memory,
            overrides=tuple(text for change, text in differing if change),
        )

    def largest(self, remat: bool) -> int:
        """Most rows that fit, whatever the batch, in passes as large as the recipe's; 0 where none do."""
        low, high = 0, 2
        while high < 2**40 and self.fits(high, remat, chunk=self.chunk):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle, remat, chunk=self.chunk) else (low, middle)
        return low if low >= LEAST_ROWS else 0

    def enough_gpus(self) -> int | None:
        """Fewest GPUs on which the recipe fits as it is."""
        train = self.recipe.train
        lanes = lanes_of(self.recipe) // train.accumulation
        valid = [w for w in range(1, lanes + 1) if lanes % w == 0 and train.contrast_batch // w >= LEAST_ROWS]
        for world in valid:
            try:
                chunk = self.chunk_of(changed(self.recipe, micro_batch=None), world)
            except UserError:  # a train.chunk that does not divide these rows
                continue
            if self.fits(train.contrast_batch // world, self.remat, chunk=chunk, world=world):
                return world
        return None

    def by_stage(self) -> dict[str, dict[str, int]]:
        """State and buffers, without activations, under each stage and kind of offload."""
        plain = replace(self.zero, optimizer="none", weights="none", hpz=1)
        kinds = {f"stage {stage}": replace(plain, stage=stage) for stage in STAGES}
        kinds["stage 3, optimizer on cpu"] = replace(kinds["stage 3"], optimizer="cpu")
        kinds["stage 3, all on cpu"] = replace(kinds["stage 3"], optimizer="cpu", weights="cpu")
        kinds["stage 3, optimizer on nvme"] = replace(kinds["stage 3"], optimizer="nvme")
        if self.zero.hpz > 1:
            kinds[f"stage 3, hpZ of {self.zero.hpz}"] = replace(kinds["stage 3"], hpz=self.zero.hpz)
        rows = {}
        for name, zero in kinds.items():
            held = states(self.table, zero, world=self.gpus)
            buffers = sum(self.buffers(zero, self.gpus).values())
            gpu = {key: held.gpu.get(key, 0) for key in ("weights", "gradients", "master", "moments", "average")}
            gpu["weights"] += held.gpu.get("second copy of weights", 0)
            rows[name] = gpu | {
                "gathered and buckets": buffers,
                "gpu": sum(held.gpu.values()) + buffers,
                "host": sum(held.host.values()),
                "disk": sum(held.disk.values()),
            }
        return rows


def changed(recipe: Recipe, **train: object) -> Recipe:
    """The recipe with other values of `train`."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
