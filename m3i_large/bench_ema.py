"""What the target's average costs under ZeRO-3: on the partitions, gathered on every rank, or kept by the first one.

One engine takes real training steps on random pictures; after each, all designs update the same target in turn, and
what they leave in it is compared with the formula.
"""

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from m3i_large.bench import random_batch
from m3i_large.ds_file import optimizer_device, stage_of
from m3i_large.errors import UserError
from m3i_large.parallel.comm import Rank, barrier, gather_objects, start_distributed, stop_distributed
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.engine import Engine
from m3i_large.parallel.gathered_ema import CountedCollectives, GatheredEMA
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.state import Slice
from m3i_large.recipe import Recipe
from m3i_large.run import resolve_precision, resolve_threads

REPEATS, WARM = 7, 2
RIVALS = ("gathered", "first rank")
MOMENTUM = 0.9995
STILL_UPDATES = 100


def bench_ema(recipe: Recipe, *, ds: Path, ranks: int, rows: int) -> dict[str, Any]:
    """Times the average's update beside a whole step, on `ranks` new processes.

    Args:
        rows: samples of a rank's micro-batch.

    Returns:
        `step_ms` (without any average), `parameters` (averaged ones) and `designs`: rows {design, ms, share (of a step
        with that average), calls and bytes (of collectives in one update, on the first rank), resident_first,
        resident_others and gathered (bytes beside the weights: always there; during an update), difference (largest,
        of the target's weights to the formula in fp32)}; `bf16`: see `_joined`. Times are medians of 7 alternating
        runs, each the slowest rank's.

    Raises:
        UserError: the recipe averages nothing, or `ds` is not ZeRO-3 or offloads to NVMe.
    """
    if recipe.objective.encoder != "ema":
        raise UserError("objective.terms: got no term whose encoder is ema; needed: one, else there is no average")
    config = read_ds_config(ds, StepSizes(micro_batch=rows, accumulation=1, clip=1.0, bf16=True), world=ranks)
    if stage_of(config) != 3 or optimizer_device(config) == "nvme":
        raise UserError(f"--ds: got {ds}, stage {stage_of(config)}; needed: ZeRO-3 without offload to NVMe")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        mp.spawn(_process, args=(ranks, port, recipe, ds, rows, result), nprocs=ranks)
        return json.loads(result.read_text(encoding="utf-8"))


def _process(index: int, world: int, port: int, recipe: Recipe, ds: Path, rows: int, result: Path) -> None:
    environment: dict[str, object] = {
        "RANK": index,
        "LOCAL_RANK": index,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
    os.dup2(2, 1)  # DeepSpeed writes its log to standard output, where the command's JSON belongs
    rank = start_distributed()
    torch.set_num_threads(resolve_threads(recipe.train.threads))
    settled = recipe.train.model_copy(update={"precision": resolve_precision(recipe.train.precision, rank.device)})
    try:
        found = _measure(recipe.model_copy(update={"train": settled}), ds=ds, rows=rows, rank=rank)
        if rank.is_first:
            result.write_text(json.dumps(found), encoding="utf-8")
        barrier()
    finally:
        stop_distributed()
    sys.stderr.flush()
    os._exit(0)  # at the interpreter's own exit a thread of torch's now and then aborts the process


def _measure(recipe: Recipe, *, ds: Path, rows: int, rank: Rank) -> dict[str, Any]:
    from m3i_large.assembly import build_engine

    bf16 = recipe.train.precision == "bf16"
    sizes = StepSizes(micro_batch=rows, accumulation=1, clip=recipe.optim.clip, bf16=bf16)
    engine, ours = build_engine(recipe, read_ds_config(ds, sizes, world=rank.world), rank)
    assert ours is not None
    engine.set_lr(recipe.optim.lr.peak)
    masters: dict[str, Slice] = {}
    rivals = {name: GatheredEMA(engine, ours.source, everywhere=name == "gathered") for name in RIVALS}
    updates: dict[str, Callable[[], None]] = {"sharded": lambda: ours.update(masters, MOMENTUM)}
    updates |= {name: partial(rival.update, MOMENTUM) for name, rival in rivals.items()}
    batch = random_batch(recipe, rows, seed=rank.rank).to(rank.device)

    def step() -> None:
        engine.backward(engine(batch)["loss"])
        engine.step(after_update=masters.update)

    own = _alternate(step, updates, engine=engine, ours=ours, masters=masters, rank=rank)
    own["resident"] = {name: rival.resident_bytes for name, rival in rivals.items()}
    own["resident"]["sharded"] = sum(4 * layout.numel for layout in ours.layout().values())
    gathered = {name: rival.gathered_bytes for name, rival in rivals.items()}
    settings = {"recipe": recipe.name, "ranks": rank.world, "rows": rows, "device": rank.device.type}
    settings |= {"precision": recipe.train.precision}
    settings |= {"parameters": sum(torch.Size(layout.shape).numel() for layout in ours.layout().values())}
    return settings | _table(gather_objects(own, rank), gathered={"sharded": 0} | gathered)


def _alternate(
    step: Callable[[], None],
    updates: Mapping[str, Callable[[], None]],
    *,
    engine: Engine,
    ours: ShardedEMA,
    masters: Mapping[str, Slice],
    rank: Rank,
) -> dict[str, Any]:
    """Steps and updates in turn on this rank: milliseconds, collectives, differences; `masters` is filled by a step."""
    parameters = dict(engine.module.named_parameters())
    seen = engine.twins({copy: (name, parameters[copy]) for copy, name in ours.source.items()})
    group = {key: piece for part in ours.groups() for key, piece in part.items()}
    start = {copy: group[f"ema/{copy}"].values.clone() for copy in ours.source}
    longhand = {copy: value.clone() for copy, value in start.items()}
    times: dict[str, list[float]] = {name: [] for name in ("step", *updates)}
    counted = {name: CountedCollectives() for name in updates}
    difference = dict.fromkeys(updates, 0.0)
    for repeat in range(WARM + REPEATS):
        times["step"].append(_milliseconds(step, rank))
        for copy, name in ours.source.items():
            longhand[copy] = MOMENTUM * longhand[copy] + (1 - MOMENTUM) * masters[name].values
        for name, update in updates.items():
            if repeat < WARM:
                with counted[name] if repeat == 0 else nullcontext():
                    update()
            else:
                times[name].append(_milliseconds(update, rank))
            off = [float((seen.weights(c).float() - v).abs().max()) for c, v in longhand.items() if v.numel()]
            difference[name] = max(difference[name], *off)
    return {
        "times": {name: values[-REPEATS:] for name, values in times.items()},
        "calls": {name: mode.calls for name, mode in counted.items()},
        "bytes": {name: mode.bytes for name, mode in counted.items()},
        "difference": difference,
        "still": _stand_still(start, {copy: masters[name].values for copy, name in ours.source.items()}),
    }


def _table(ranks: list[dict[str, Any]], *, gathered: Mapping[str, int]) -> dict[str, Any]:
    """The slowest rank's times, the first rank's collectives, the largest difference."""
    slowest = {name: zip(*(r["times"][name] for r in ranks), strict=True) for name in ranks[0]["times"]}
    medians = {name: statistics.median(map(max, times)) for name, times in slowest.items()}
    rows = [
        {
            "design": name,
            "ms": medians[name],
            "share": medians[name] / (medians["step"] + medians[name]),
            "calls": ranks[0]["calls"][name],
            "bytes": ranks[0]["bytes"][name],
            "resident_first": ranks[0]["resident"][name],
            "resident_others": max((r["resident"][name] for r in ranks[1:]), default=0),
            "gathered": gathered[name],
            "difference": max(r["difference"][name] for r in ranks),
        }
        for name in gathered
    ]
    return {"step_ms": medians["step"], "designs": rows, "bf16": _joined([r["still"] for r in ranks])}


def _stand_still(start: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> dict[str, float]:
    """An average kept in bf16 and the same in fp32, 100 updates towards the student as it is: what each changed.

    Counts of elements that changed, largest changes, sums of squared changes.
    """
    begin, towards = torch.cat(list(start.values())), torch.cat(list(student.values()))
    coarse = begin.bfloat16()
    first, fine = coarse.clone(), coarse.float()
    for _ in range(STILL_UPDATES):
        coarse = (MOMENTUM * coarse.float() + (1 - MOMENTUM) * towards).bfloat16()
        fine = MOMENTUM * fine + (1 - MOMENTUM) * towards
    change, change_fp32 = (coarse.float() - first.float()).abs(), (fine - first.float()).abs()
    return {
        "elements": int((change_fp32 > 0).sum()),
        "moved": int((change > 0).sum()),
        "change": float(change.max()),
        "change_fp32": float(change_fp32.max()),
        "squares": float(change.square().sum()),
        "squares_fp32": float(change_fp32.square().sum()),
    }


def _joined(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Sums and maxima over ranks: share of elements that moved, largest changes, norm of the change beside fp32's."""
    total = {key: sum(r[key] for r in ranks) for key in ranks[0]}
    return {
        "updates": STILL_UPDATES,
        "momentum": MOMENTUM,
        "moved": total["moved"] / max(total["elements"], 1),
        "change": max(r["change"] for r in ranks),
        "change_fp32": max(r["change_fp32"] for r in ranks),
        "distance": (total["squares"] / max(total["squares_fp32"], 1e-30)) ** 0.5,
    }


def _milliseconds(call: Callable[[], object], rank: Rank) -> float:
    barrier()
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)
    begin = time.perf_counter()
    call()
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)
    return (time.perf_counter() - begin) * 1e3
