"""`m3i plan`: everything together, as plain values."""

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from m3i_large.data.mixture import default_lanes
from m3i_large.errors import UserError
from m3i_large.plan.batch import mixture_of
from m3i_large.plan.comm import Traffic, collectives
from m3i_large.plan.devices import Gpu
from m3i_large.plan.flops import Flops, flops_of
from m3i_large.plan.memory import Memory, gathered, memory, states
from m3i_large.plan.parameters import Table, parameter_table
from m3i_large.plan.walk import Walk, walk
from m3i_large.plan.zero import STAGES, Zero
from m3i_large.recipe import Recipe

# Assumption, where --mfu is not given: share of the bf16 peak that the FLOPs of `Flops.model` reach. ViT: what NVIDIA
# published for g/14 on eight H100 (29 %); InternImage: a first goal, nobody has published its training speed.
ASSUMED_MFU = {"vit": 0.29, "internimage": 0.20}
LEAST_ROWS = 2  # one image alone cannot be mixed


@dataclass(frozen=True)
class Option:
    """A way to run the recipe on this number of GPUs.

    Attributes:
        overrides: what to add to the command line; empty for the recipe as it is.
    """

    contrast_batch: int
    accumulation: int
    micro_batch: int
    checkpointing: bool
    memory: Memory
    fits: bool
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a run will need; docs/plan.md says what follows from what."""

    recipe: str
    gpus: int
    gpu: Gpu
    zero: Zero
    mfu: float
    mfu_assumed: bool
    parts: dict[str, tuple[int, int]]
    flops: Flops
    options: list[Option]
    largest_micro_batch: dict[bool, int]
    enough_gpus: int | None
    stages: dict[str, dict[str, int]]
    steps: int
    global_batch: int
    mean_bytes: float | None
    pixels: int
    batch_bytes: int
    checkpoint_bytes: int
    traffic: list[Traffic]

    @property
    def as_it_is(self) -> Option:
        """The recipe's own contrast batch and choice of recomputation."""
        return next(option for option in self.options if not option.overrides)

    @property
    def best(self) -> Option | None:
        """The recipe as it is where it fits, else the largest contrast batch that does, without recomputation if
        both ways fit."""
        if self.as_it_is.fits:
            return self.as_it_is
        fitting = [option for option in self.options if option.fits]
        return max(fitting, key=lambda o: (o.contrast_batch, not o.checkpointing), default=None)

    @property
    def samples_per_s(self) -> float:
        """Of all GPUs together at `mfu`."""
        return self.gpus * self.mfu * self.gpu.peak / self.flops.model

    @property
    def hours(self) -> float:
        """Wall time of the whole recipe."""
        return self.steps * self.global_batch / self.samples_per_s / 3600

    def to_json(self) -> dict[str, Any]:
        """All values, derived ones included; sizes in bytes."""
        values = asdict(self)
        for option, row in zip(self.options, values["options"], strict=True):
            row["memory"] |= {"total": option.memory.total, "allocated": option.memory.allocated}
        values["parts"] = {k: {"trained": t, "frozen": f} for k, (t, f) in self.parts.items()}
        values["flops"] |= {"model": self.flops.model, "hardware": self.flops.hardware}
        values["largest_micro_batch"] = {
            "checkpointing" if key else "plain": rows for key, rows in self.largest_micro_batch.items()
        }
        samples = self.steps * self.global_batch
        return values | {
            "samples": samples,
            "samples_per_s": self.samples_per_s,
            "days": self.hours / 24,
            "gpu_hours": self.hours * self.gpus,
            "step_s": self.global_batch / self.samples_per_s,
        }


def make_plan(recipe: Recipe, *, gpus: int, gpu: Gpu, zero: Zero, mfu: float | None = None) -> Plan:
    """Plans a run; UserError where the recipe cannot run on that number of GPUs or has no sizes to plan with."""
    check_gpus(recipe, gpus)
    table = parameter_table(recipe)
    planner = _Planner(recipe, table, gpus=gpus, gpu=gpu, zero=zero)
    options = [planner.option(a, remat) for a in accumulations(recipe, gpus) for remat in (True, False)]
    kind = "internimage" if recipe.backbone.name.startswith("internimage") else "vit"
    mixture = mixture_of(recipe)
    steps = recipe.train.steps
    if steps is None:
        if mixture is None:
            raise UserError("data.sources: a source has no nominal size; needed: nominal, or train.steps")
        steps = mixture.steps_for_epochs(recipe.train.epochs or 0)
    step = planner.walk(planner.rows, recipe.train.activation_checkpointing)
    return Plan(
        recipe=recipe.name,
        gpus=gpus,
        gpu=gpu,
        zero=zero,
        mfu=ASSUMED_MFU[kind] if mfu is None else mfu,
        mfu_assumed=mfu is None,
        parts=table.by_part(),
        flops=flops_of(step),
        options=options,
        largest_micro_batch={remat: planner.largest(remat) for remat in (True, False)},
        enough_gpus=planner.enough_gpus(),
        stages=planner.by_stage(),
        steps=steps,
        global_batch=recipe.train.global_batch,
        mean_bytes=_mean_bytes(recipe),
        pixels=2 * recipe.data.image_size**2,
        batch_bytes=step.batch,
        checkpoint_bytes=12 * table.num_trained + 4 * table.num_averaged + table.buffers,
        traffic=collectives(step, table, zero, world=gpus, accumulation=recipe.train.accumulation),
    )


def lanes_of(recipe: Recipe) -> int:
    """V of the sampler."""
    return recipe.data.lanes or default_lanes(recipe.train.global_batch)


def check_gpus(recipe: Recipe, gpus: int) -> None:
    """Refuses what training would refuse: ranks x accumulation must divide the lanes."""
    per_micro_step = lanes_of(recipe) // recipe.train.accumulation
    if per_micro_step % gpus:
        valid = [w for w in range(1, per_micro_step + 1) if per_micro_step % w == 0]
        raise UserError(f"--gpus: got {gpus}; needed: one of {', '.join(map(str, valid))}")


def accumulations(recipe: Recipe, gpus: int) -> list[int]:
    """Numbers of micro-steps that the recipe's global batch and lanes allow on so many GPUs."""
    lanes, batch = lanes_of(recipe), recipe.train.global_batch
    return [a for a in range(1, lanes // gpus + 1) if lanes % (gpus * a) == 0 and batch // (a * gpus) >= LEAST_ROWS]


def _mean_bytes(recipe: Recipe) -> float | None:
    """Of a sample drawn, weighted by quotas or by size times repeats; None without nominal sizes."""
    sources = recipe.data.sources
    if any(source.nominal is None for source in sources):
        return None
    pairs = [
        (source.quota or Fraction(source.exact_repeats) * source.nominal.samples, source.nominal.mean_bytes)
        for source in sources
        if source.nominal
    ]
    return float(sum(w * b for w, b in pairs) / sum(w for w, _ in pairs))


class _Planner:
    """Memory of micro-batches of any size on this number of GPUs: a few are walked, others follow."""

    def __init__(self, recipe: Recipe, table: Table, *, gpus: int, gpu: Gpu, zero: Zero) -> None:
        self.recipe, self.table, self.gpus, self.gpu, self.zero = recipe, table, gpus, gpu, zero
        self.rows = recipe.train.contrast_batch // gpus
        self._walks: dict[tuple[int, bool], Walk] = {}
        self._buffers: dict[tuple[Zero, int], dict[str, int]] = {}

    def walk(self, rows: int, remat: bool) -> Walk:
        """Walks a micro-batch, each once."""
        key = rows, remat
        if key not in self._walks:
            # All walks have the recipe's contrast batch, so that what lives grows linearly with the rows.
            world = max(1, self.recipe.train.contrast_batch // rows)
            self._walks[key] = walk(self.recipe, rows=rows, world=world, checkpointing=remat)
        return self._walks[key]

    def slope(self, remat: bool) -> tuple[float, float]:
        """Bytes alive of a micro-step = fixed + rows * per_row, from the recipe's micro-batch and another one."""
        other = 16 if self.rows > 32 else 4 * self.rows
        first, second = (self.walk(rows, remat).peak for rows in (self.rows, other))
        per_row = (second - first) / (other - self.rows)
        return first - self.rows * per_row, per_row

    def buffers(self, zero: Zero, world: int) -> dict[str, int]:
        """What ZeRO gathers and buffers; the same for every micro-batch."""
        if (zero, world) not in self._buffers:
            step = self.walk(self.rows, self.recipe.train.activation_checkpointing)
            self._buffers[zero, world] = gathered(step, self.table, zero, world=world)
        return self._buffers[zero, world]

    def memory(self, rows: int, remat: bool, *, world: int | None = None) -> Memory:
        """Peak memory with `rows` rows."""
        fixed, per_row = self.slope(remat)
        return memory(
            states(self.table, self.zero, world=world or self.gpus),
            self.buffers(self.zero, world or self.gpus),
            activations=math.ceil(fixed + rows * per_row),
            batch=math.ceil(rows * self.walk(self.rows, remat).batch / self.rows),
            gpu=self.gpu,
        )

    def fits(self, rows: int, remat: bool, *, world: int | None = None) -> bool:
        return self.memory(rows, remat, world=world).total <= self.gpu.memory

    def option(self, accumulation: int, remat: bool) -> Option:
        """The recipe with so many micro-steps."""
        train = self.recipe.train
        contrast = train.global_batch // accumulation
        rows = contrast // self.gpus
        changed = [
            (contrast != train.contrast_batch, f"train.contrast_batch={contrast}"),
            (remat != train.activation_checkpointing, f"train.activation_checkpointing={str(remat).lower()}"),
        ]
        overrides = tuple(text for change, text in changed if change)
        used = self.memory(rows, remat)
        return Option(contrast, accumulation, rows, remat, used, used.total <= self.gpu.memory, overrides)

    def largest(self, remat: bool) -> int:
        """Most rows that fit, whatever the batch; 0 where none do."""
        _, per_row = self.slope(remat)
        left = self.gpu.memory - self.memory(0, remat).total
        rows = max(0, int(left // per_row))
        while rows and not self.fits(rows, remat):
            rows -= 1
        return rows if rows >= LEAST_ROWS else 0

    def enough_gpus(self) -> int | None:
        """Fewest GPUs on which the recipe fits as it is."""
        train = self.recipe.train
        lanes = lanes_of(self.recipe) // train.accumulation
        valid = [w for w in range(1, lanes + 1) if lanes % w == 0 and train.contrast_batch // w >= LEAST_ROWS]
        remat = train.activation_checkpointing
        return next((w for w in valid if self.fits(train.contrast_batch // w, remat, world=w)), None)

    def by_stage(self) -> dict[str, dict[str, int]]:
        """State and buffers, without activations, under each stage and kind of offload."""
        kinds = {f"stage {s}": replace(self.zero, stage=s, optimizer="gpu", parameters="gpu") for s in STAGES[1:]}
        kinds["stage 3, optimizer on cpu"] = replace(kinds["stage 3"], optimizer="cpu")
        kinds["stage 3, optimizer on nvme"] = replace(kinds["stage 3"], optimizer="nvme")
        kinds["stage 3, all on nvme"] = replace(kinds["stage 3"], optimizer="nvme", parameters="nvme")
        rows = {}
        for name, zero in kinds.items():
            held = states(self.table, zero, world=self.gpus)
            buffers = sum(self.buffers(zero, self.gpus).values())
            gpu = {key: held.gpu.get(key, 0) for key in ("weights", "gradients", "master", "moments", "average")}
            rows[name] = gpu | {
                "gathered and buckets": buffers,
                "gpu": sum(held.gpu.values()) + buffers,
                "host": sum(held.host.values()),
                "disk": sum(held.disk.values()),
            }
        return rows
