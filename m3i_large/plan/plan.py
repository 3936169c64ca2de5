"""`m3i plan`: everything together, as plain values."""

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from m3i_large.ds_file import SUMS_REFUSED, Zero, safe_block_size, sums_refused
from m3i_large.errors import UserError
from m3i_large.plan.batch import mixture_of
from m3i_large.plan.comm import Traffic, collectives
from m3i_large.plan.devices import Gpu
from m3i_large.plan.fit import Option, Planner, accumulations, changed, lanes_of
from m3i_large.plan.flops import Flops, flops_of
from m3i_large.plan.parameters import Table, parameter_table
from m3i_large.recipe import Recipe

# Assumption, where --mfu is not given: share of the bf16 peak that the FLOPs of `Flops.model` reach. ViT: what NVIDIA
# published for g/14 on eight H100 (29 %); InternImage: a first goal, nobody has published its training speed.
ASSUMED_MFU = {"vit": 0.29, "internimage": 0.20}


@dataclass(frozen=True)
class Plan:
    """What a run will need; docs/plan.md says what follows from what.

    Attributes:
        cached: the recipe with train.contrast=cached, where it is direct and does not fit.
        block_size: aio.block_size in bytes; None without offload to NVMe.
    """

    recipe: str
    gpus: int
    gpu: Gpu
    zero: Zero
    mfu: float
    mfu_assumed: bool
    parts: dict[str, tuple[int, int]]
    flops: Flops
    options: list[Option]
    cached: Option | None
    largest_micro_batch: dict[bool, int]
    enough_gpus: int | None
    stages: dict[str, dict[str, int]]
    steps: int
    global_batch: int
    mean_bytes: float | None
    pixels: int
    batch_bytes: int
    checkpoint_bytes: int
    block_size: int | None
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
    passes = recipe.train.accumulation + (recipe.train.contrast == "cached")
    if sums_refused(zero.stage, bf16=table.element == 2, passes=passes):
        raise UserError(f"--ds: {SUMS_REFUSED}")
    planner = Planner(recipe, table, gpus=gpus, gpu=gpu, zero=zero)
    options = [option for a in accumulations(recipe, gpus) for option in planner.options(a)]
    step = planner.own_walk(planner.remat)
    flops = flops_of(step)
    return Plan(
        recipe=recipe.name,
        gpus=gpus,
        gpu=gpu,
        zero=zero,
        mfu=_assumed_mfu(recipe, flops) if mfu is None else mfu,
        mfu_assumed=mfu is None,
        parts=table.by_part(),
        flops=flops,
        options=options,
        cached=_cached(planner),
        largest_micro_batch={remat: planner.largest(remat) for remat in (True, False)},
        enough_gpus=planner.enough_gpus(),
        stages=planner.by_stage(),
        steps=_steps(recipe),
        global_batch=recipe.train.global_batch,
        mean_bytes=_mean_bytes(recipe),
        pixels=2 * recipe.data.image_size**2,
        batch_bytes=step.batch * planner.rows // step.rows,
        checkpoint_bytes=12 * table.num_trained + 4 * table.num_averaged + table.buffers,
        block_size=_block_size(table, zero, gpus),
        traffic=collectives(planner.in_full(step), table, zero, world=gpus, accumulation=recipe.train.accumulation),
    )


def _cached(planner: Planner) -> Option | None:
    """The recipe with contrast cached, where it is direct and does not fit; None where training would refuse it."""
    recipe, table, zero = planner.recipe, planner.table, planner.zero
    own = next(option for option in planner.options(recipe.train.accumulation) if not option.overrides)
    if own.fits or own.chunk or sums_refused(zero.stage, bf16=table.element == 2, passes=recipe.train.accumulation + 1):
        return None
    cached = Planner(changed(recipe, contrast="cached"), table, gpus=planner.gpus, gpu=planner.gpu, zero=zero)
    own = next(option for option in cached.options(recipe.train.accumulation) if not option.overrides)
    return replace(own, overrides=("train.contrast=cached",))


def _assumed_mfu(recipe: Recipe, flops: Flops) -> float:
    """What contrast cached computes twice is taken off."""
    kind = "internimage" if recipe.backbone.name.startswith("internimage") else "vit"
    return ASSUMED_MFU[kind] * (1 - flops.surveyed / flops.hardware)


def _steps(recipe: Recipe) -> int:
    if recipe.train.steps is not None:
        return recipe.train.steps
    if (mixture := mixture_of(recipe)) is None:
        raise UserError("data.sources: a source has no nominal size; needed: nominal, or train.steps")
    return mixture.steps_for_epochs(recipe.train.epochs or 0)


def _block_size(table: Table, zero: Zero, gpus: int) -> int | None:
    if zero.optimizer != "nvme":
        return None
    return safe_block_size(zero, [table.size[name] for name in table.trained], world=gpus)


def check_gpus(recipe: Recipe, gpus: int) -> None:
    """Refuses what training would refuse: ranks x accumulation must divide the lanes."""
    per_micro_step = lanes_of(recipe) // recipe.train.accumulation
    if per_micro_step % gpus:
        valid = [w for w in range(1, per_micro_step + 1) if per_micro_step % w == 0]
        raise UserError(f"--gpus: got {gpus}; needed: one of {', '.join(map(str, valid))}")


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
