"""`m3i plan`: what a run will need, before there is a GPU or any data."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from m3i_large.errors import UserError


def plan_command(
    recipe: Annotated[str, typer.Argument(help="Recipe name or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Recipe fields to change, a.b=value.")] = None,
    *,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="A known GPU (h100, a100-80, ...) or NAME:GiB:TFLOPS.")] = "h100",
    ds: Annotated[Path, typer.Option("--ds", help="DeepSpeed JSON file.")] = Path("ds_configs/zero3.json"),
    mfu: Annotated[float | None, typer.Option(help="Share of the bf16 peak that is reached, 0 to 1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only walk one micro-step; are shapes right?")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Parameters, FLOPs, memory, batches that fit, time, communication of a recipe on so many GPUs (docs/plan.md)."""
    from m3i_large.ds_file import read_ds_file, zero_of
    from m3i_large.plan.devices import find_gpu
    from m3i_large.plan.plan import make_plan
    from m3i_large.plan.tables import print_plan
    from m3i_large.recipe import load_recipe

    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu: got {mfu}; needed: more than 0, at most 1")
    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        _dry_run(loaded, gpus, as_json=as_json)
        return
    plan = make_plan(loaded, gpus=gpus, gpu=find_gpu(gpu), zero=zero_of(read_ds_file(ds)), mfu=mfu)
    if as_json:
        print(json.dumps(plan.to_json()))
        return
    console = Console(highlight=False)
    console.width = max(console.width, 140)  # narrower, and figures would be cut
    print_plan(plan, console)


def _dry_run(recipe: Any, gpus: int, *, as_json: bool) -> None:
    """One micro-step of the real objective without memory: forward and backward."""
    from m3i_large.plan.fit import lanes_of
    from m3i_large.plan.plan import check_gpus
    from m3i_large.plan.walk import walk
    from m3i_large.stream import chunk_rows

    check_gpus(recipe, gpus)
    began = time.perf_counter()
    rows = recipe.train.contrast_batch // gpus
    chunk = chunk_rows(recipe, slots=recipe.train.global_batch // lanes_of(recipe), world=gpus)
    seen = walk(recipe, rows=rows, world=gpus, chunk=chunk)
    values = {
        "recipe": recipe.name,
        "gpus": gpus,
        "rows": rows,
        "seconds": time.perf_counter() - began,
        "operators": seen.operators,
        "gradients": len(seen.gradients),
        "flops": sum(counts.total() for counts in (seen.forward, seen.backward, seen.recomputed, seen.surveyed)),
        "peak_bytes": seen.peak,
        "kept_bytes": seen.kept,
        "batch_bytes": seen.batch,
    }
    if as_json:
        print(json.dumps(values))
        return
    print(
        f"{recipe.name}: {rows:,} rows on each of {gpus} GPUs, forward and backward: shapes fit "
        f"({values['operators']:,} operators, {values['gradients']:,} gradients, {values['seconds']:.1f} s)\n"
        f"alive at most {seen.peak / 2**30:.2f} GiB, {seen.kept / 2**30:.2f} GiB between forward and backward, "
        f"batch {seen.batch / 2**30:.3f} GiB; {values['flops'] / 1e12:,.1f} TFLOP"
    )
