"""The part of a DeepSpeed JSON file that decides memory and communication, with DeepSpeed 0.19's defaults."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_large.errors import UserError

STAGES = (0, 1, 2, 3)
PLACES = ("gpu", "cpu", "nvme")


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Sharding and offload; sizes in elements.

    Attributes:
        optimizer, parameters: where optimizer state and weights lie: gpu, cpu or nvme.
    """

    stage: int = 3
    optimizer: str = "gpu"
    parameters: str = "gpu"
    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    overlap: bool = True


_KEYS = {
    "reduce_bucket_size": "reduce_bucket",
    "allgather_bucket_size": "allgather_bucket",
    "stage3_prefetch_bucket_size": "prefetch_bucket",
    "stage3_param_persistence_threshold": "persistence",
    "stage3_max_live_parameters": "max_live",
    "stage3_max_reuse_distance": "max_reuse",
    "sub_group_size": "sub_group",
}


def read_zero(path: Path) -> Zero:
    """Reads a DeepSpeed JSON file; UserError where it is missing, no JSON, or has values that mean nothing."""
    if not path.is_file():
        raise UserError(
            f"--ds: got {path}, which does not exist; needed: a DeepSpeed JSON file such as ds_configs/zero3.json"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--ds: {path} is not valid JSON: {error}") from None
    given = values.get("zero_optimization") if isinstance(values, dict) else None
    if not isinstance(given, dict):
        raise UserError(f"--ds: {path} holds no zero_optimization; needed: a JSON object with one")
    stage = given.get("stage", 0)
    if stage not in STAGES:
        raise UserError(f"--ds: {path} sets zero_optimization.stage to {stage!r}; needed: one of {STAGES}")
    sizes = {}
    for key, name in _KEYS.items():
        if key not in given or given[key] == "auto":
            continue
        # DeepSpeed takes 1e8 as well as 100000000.
        if isinstance(given[key], bool) or not isinstance(given[key], int | float) or given[key] < 0:
            raise UserError(f"--ds: {path} sets {key} to {given[key]!r}; needed: a number of elements")
        sizes[name] = int(given[key])
    return Zero(
        stage=stage,
        optimizer=_place(given, "offload_optimizer", path),
        parameters=_place(given, "offload_param", path),
        overlap=bool(given.get("overlap_comm", stage == 3)),
        **sizes,
    )


def _place(given: dict[str, Any], key: str, path: Path) -> str:
    place = (given.get(key) or {}).get("device", "none")
    place = "gpu" if place == "none" else place
    if place not in PLACES:
        raise UserError(f"--ds: {path} sets {key}.device to {place!r}; needed: none, cpu or nvme")
    return place
