"""A plan as text: what a person asks first, on one screen."""

from rich import box
from rich.console import Console, Group
from rich.table import Table as Grid

from m3i_large.ds_file import MIB
from m3i_large.plan.devices import GIB
from m3i_large.plan.fit import Option
from m3i_large.plan.memory import ASSUMED
from m3i_large.plan.plan import Plan

MARK = "*"  # marks every figure that rests on an assumption


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the tables side by side where they fit, and the verdict last."""
    zero = plan.zero
    own = plan.as_it_is
    offload = f", optimizer on {zero.optimizer}" if zero.optimizer != "none" else ""
    if plan.block_size:
        offload += f" ({own.memory.disk / GIB:.2f} GiB of disk a rank, aio.block_size {plan.block_size // MIB} MiB)"
    offload += f", weights on {zero.weights}" if zero.weights != "none" else ""
    offload += f", hpZ of {zero.hpz}" if zero.hpz > 1 else ""
    chunks = f", contrast cached in chunks of {own.chunk}" if own.chunk else ""
    console.print(
        f"{plan.recipe} on {plan.gpus} x {plan.gpu.name} ({plan.gpu.memory / GIB:.1f} GiB, "
        f"{plan.gpu.peak / 1e12:,.0f} TFLOP/s dense bf16), ZeRO stage {zero.stage}{offload}{chunks}; {MARK} = assumed",
        soft_wrap=True,
    )
    sides = Grid.grid(padding=(0, 3))
    sides.add_row(Group(_parts(plan), _run(plan)), Group(_memory(plan), _traffic(plan)))
    console.print(sides, _stages(plan), _options(plan))
    console.print("\n".join(verdict(plan)), soft_wrap=True)


def verdict(plan: Plan) -> list[str]:
    """Does the recipe fit, and if not, what does."""
    own, best, rows = plan.as_it_is, plan.best, plan.largest_micro_batch
    name = f"contrast_batch {own.contrast_batch:,} on {plan.gpus} GPUs ({own.micro_batch} rows each)"
    most = f"At most {rows[True]:,} rows a GPU with activation checkpointing, {rows[False]:,} without."
    if own.fits:
        lines = [f"FITS: {name} takes {own.memory.total / GIB:.1f} of {plan.gpu.memory / GIB:.1f} GiB{MARK}.", most]
        if own.checkpointing and rows[False] >= own.micro_batch:
            spared = 1 - (plan.flops.hardware - plan.flops.recomputed) / plan.flops.hardware
            lines.append(f"train.activation_checkpointing=false fits too and computes {spared:.0%} less.")
        return lines
    lines = [f"DOES NOT FIT: {name} takes {own.memory.total / GIB:.1f} GiB{MARK}.", most]
    if best:
        lines.append(f"What fits here: {' '.join(best.overrides)}: {best.accumulation} micro-steps a step.")
    if plan.enough_gpus:
        lines.append(f"With the recipe as it is: {plan.enough_gpus} GPUs.")
    if plan.cached:
        lines.append(_with_cached(plan, plan.cached))
    return lines


def _with_cached(plan: Plan, cached: Option) -> str:
    """What contrast cached makes of a batch that does not fit."""
    way = f"contrast_batch {cached.contrast_batch:,} in chunks of {cached.chunk} rows"
    takes = f"{cached.memory.total / GIB:.1f} GiB{MARK}"
    if not cached.fits:
        return f"train.contrast=cached does not fit either: {way} takes {takes}."
    more = cached.hardware / plan.flops.hardware - 1
    return f"train.contrast=cached fits: {way} takes {takes} and computes {more:.0%} more."


def _grid(title: str, *columns: str, left: int = 1) -> Grid:
    grid = Grid(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(columns):
        grid.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return grid


def _parts(plan: Plan) -> Grid:
    grid = _grid("Parameters and FLOPs of a sample", "part", "M trained", "M frozen", "GF forward", "backward")
    flops = plan.flops
    for part in [*plan.parts, *(flops.forward.keys() - plan.parts.keys())]:
        trained, frozen = plan.parts.get(part, (0, 0))
        counts = (f"{n / 1e6:,.1f}" if n else "" for n in (trained, frozen))
        grid.add_row(
            part, *counts, f"{flops.forward.get(part, 0) / 1e9:,.1f}", f"{flops.backward.get(part, 0) / 1e9:,.1f}"
        )
    sums = (sum(n[i] for n in plan.parts.values()) / 1e6 for i in (0, 1))
    work = (sum(x.values()) / 1e9 for x in (flops.forward, flops.backward))
    grid.add_row("all", *(f"{n:,.1f}" for n in (*sums, *work)), style="bold")
    return grid


def _memory(plan: Plan) -> Grid:
    own = plan.as_it_is
    grid = _grid(f"GiB on a GPU, {own.micro_batch} rows", "what", "recomputed", "kept")
    same = {o.checkpointing: o for o in plan.options if o.micro_batch == own.micro_batch}
    both = [same[True], same[False]]
    rows = list(dict.fromkeys(key for o in both for key in o.memory.rows))
    for key in rows:
        mark = MARK if key in ASSUMED else ""
        grid.add_row(key + mark, *(f"{o.memory.rows.get(key, 0) / GIB:,.2f}" for o in both))
    grid.add_row("all", *(f"{o.memory.total / GIB:,.1f}" for o in both), style="bold")
    return grid


def _run(plan: Plan) -> Grid:
    rate, samples = plan.samples_per_s, plan.steps * plan.global_batch
    grid = _grid("The run", "", "")
    grid.show_header = False
    mark = MARK if plan.mfu_assumed else ""
    grid.add_row(f"samples/s at {plan.mfu:.0%} MFU{mark}", f"{rate:,.0f} ({rate / plan.gpus:,.1f} a GPU)")
    flops = plan.flops
    grid.add_row("GFLOP a sample, with recomputation", f"{flops.model / 1e9:,.0f}, {flops.hardware / 1e9:,.0f}")
    grid.add_row("seconds a step", f"{plan.global_batch / rate:.2f}")
    grid.add_row("samples, steps", f"{samples:,}, {plan.steps:,}")
    grid.add_row("days, GPU-hours", f"{plan.hours / 24:,.1f}, {plan.hours * plan.gpus:,.0f}")
    if plan.mean_bytes:
        read = rate * plan.mean_bytes
        grid.add_row("MB/s from storage", f"{read / 1e6:,.0f} ({read / plan.gpus / 1e6:,.2f} a GPU)")
    grid.add_row("megapixels/s of views", f"{rate * plan.pixels / 1e6:,.0f}")
    size = plan.checkpoint_bytes
    grid.add_row("GB of a checkpoint", f"{size / 1e9:,.2f} ({size / plan.gpus / 1e9:,.3f} a rank)")
    return grid


def _traffic(plan: Plan) -> Grid:
    grid = _grid("Collectives of a step", "what", "op", "calls", "GB", left=2)
    for row in plan.traffic:
        grid.add_row(row.what, row.op, f"{row.calls:,}" if row.calls else "", f"{row.bytes / 1e9:,.3f}")
    return grid


def _stages(plan: Plan) -> Grid:
    keys = ["weights", "gradients", "master", "moments", "average", "gathered and buckets", "gpu", "host", "disk"]
    grid = _grid("GiB a rank without activations", "ZeRO", *keys)
    for name, row in plan.stages.items():
        grid.add_row(name, *(f"{row[key] / GIB:,.2f}" for key in keys))
    return grid


def _options(plan: Plan) -> Grid:
    columns = ("contrast batch", "accumulation", "rows a GPU", "GiB recomputed", "GiB kept", "with")
    grid = _grid("Batches that the recipe allows on so many GPUs (! = does not fit)", *columns, left=0)
    grid.columns[-1].justify = "left"
    for recomputed, kept in zip(plan.options[::2], plan.options[1::2], strict=True):
        own = recomputed.contrast_batch == plan.as_it_is.contrast_batch
        grid.add_row(
            f"{recomputed.contrast_batch:,}",
            f"{recomputed.accumulation}",
            f"{recomputed.micro_batch:,}",
            *(f"{'' if o.fits else '!'}{o.memory.total / GIB:,.1f}" for o in (recomputed, kept)),
            "the recipe's own" if own else f"train.contrast_batch={recomputed.contrast_batch}",
            style="bold" if plan.best in (recomputed, kept) else None,
        )
    return grid
