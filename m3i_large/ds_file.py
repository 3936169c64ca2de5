"""The DeepSpeed JSON file: the one reader of what it says of sharding and offload.

Here is neither DeepSpeed nor torch: training hands the values to DeepSpeed (parallel/ds_config.py), `m3i plan` reckons
with them, and both refuse the same.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_large.errors import UserError

STAGES = (1, 2, 3)
DEVICES = ("none", "cpu", "nvme")
# What would change the gradients, or keep state where neither the average nor checkpoints look for it: the only value.
FIXED: dict[str, Any] = {
    "torch_autocast.enabled": False,
    "managed_gradient_accumulation": True,
    "gradient_allreduce_op": "mean",
    "zero_optimization.zenflow": None,
    "zero_optimization.cpu_offload": None,
    "zero_optimization.cpu_offload_param": None,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
}
MIB = 2**20
BLOCK = "aio.block_size"
SUMS_REFUSED = (
    "ZeRO-1 would add up the gradients of several backward passes in bf16; needed: stage 2 or 3, or contrast direct "
    "with train.contrast_batch equal to train.global_batch"
)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Sharding and offload, with DeepSpeed 0.19's defaults; sizes in elements.

    Attributes:
        optimizer, weights: where they lie: none (on the device), cpu or nvme.
        buffer_count: buffers of a sub-group's size for what is read from NVMe.
        hpz: ranks that hold a second copy of the weights among them (ZeRO++ hpZ); 1 = no such copy.
    """

    stage: int = 3
    optimizer: str = "none"
    weights: str = "none"
    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    buffer_count: int = 4
    hpz: int = 1
    overlap: bool = True


_SIZES = {
    "reduce_bucket_size": "reduce_bucket",
    "allgather_bucket_size": "allgather_bucket",
    "stage3_prefetch_bucket_size": "prefetch_bucket",
    "stage3_param_persistence_threshold": "persistence",
    "stage3_max_live_parameters": "max_live",
    "stage3_max_reuse_distance": "max_reuse",
    "sub_group_size": "sub_group",
    "zero_hpz_partition_size": "hpz",
}


def read_ds_file(path: Path) -> dict[str, Any]:
    """The file's values as they are.

    Raises UserError where the file is missing, is no JSON, or asks for sharding or offload that mean nothing or cannot
    be done.
    """
    config = _json(path)
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in STAGES or isinstance(stage, bool):
        raise UserError(f"--ds: {path} sets zero_optimization.stage to {stage!r}; needed: 1, 2 or 3")
    for key in _SIZES:
        # DeepSpeed takes 1e8 as well as 100000000.
        value = config["zero_optimization"].get(key, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise UserError(f"--ds: {path} sets {key} to {value!r}; needed: a number of elements")
    _check_fixed(path, config)
    _check_offload(path, config)
    return config


def zero_of(config: dict[str, Any]) -> Zero:
    """The part of a file's values that decides memory and communication."""
    given = config["zero_optimization"]
    stage = stage_of(config)
    sizes = {name: int(given[key]) for key, name in _SIZES.items() if given.get(key, "auto") != "auto"}
    if (buffers := (given.get("offload_optimizer") or {}).get("buffer_count")) is not None:
        sizes["buffer_count"] = int(buffers)
    return Zero(
        stage=stage,
        optimizer=optimizer_device(config),
        weights=_device(given, "offload_param"),
        overlap=bool(given.get("overlap_comm", stage == 3)),
        **sizes,
    )


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage."""
    return int(config["zero_optimization"]["stage"])


def optimizer_device(config: dict[str, Any]) -> str:
    """Where the optimizer's states lie: none (with the parameters), cpu or nvme."""
    return _device(config["zero_optimization"], "offload_optimizer")


def swap_folder(config: dict[str, Any]) -> Path:
    """The folder for offload to NVMe."""
    return Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"])


def sums_refused(stage: int, *, bf16: bool, passes: int) -> bool:
    """ZeRO-1 sums the backward passes of an optimizer step in the weights' type, which is not done in bf16."""
    return stage == 1 and bf16 and passes > 1


def safe_block_size(zero: Zero, sizes: Iterable[int], *, world: int) -> int:
    """Bytes of `aio.block_size` at which offload to NVMe leaves gradients alone.

    DeepSpeed 0.19 writes a gradient's fp32 run to a file of its own when it is at least `aio.block_size` long, and
    reads it back wrong where its place in the sub-group is no multiple of 512 bytes (docs/deepspeed_defects.md). With
    a block larger than the largest run gradients stay in memory; sub-groups are longer: states still go to disk.

    Args:
        sizes: elements of the trained parameters, whole.

    Raises:
        UserError: sub-groups are too small for that.
    """
    largest = max(-(-size // world) for size in sizes) * 4
    block = (largest // MIB + 1) * MIB
    if zero.sub_group * 4 < block:
        raise UserError(
            f"--ds: zero_optimization.sub_group_size: got {zero.sub_group}; needed: at least {block // 4} elements, as "
            f"the largest gradient of a rank has {largest // 4} ({world} ranks)"
        )
    return block


def _check_fixed(path: Path, config: dict[str, Any]) -> None:
    for name, only in FIXED.items():
        value: Any = config
        for key in name.split("."):
            value = value.get(key, only) if isinstance(value, dict) else only
        if value != only:
            raise UserError(f"--ds: {path} sets {name} to {value!r}, which is not supported; needed: {only!r}, or none")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"--ds: got {path}, which does not exist; needed: a DeepSpeed JSON file such as ds_configs/zero3.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--ds: {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--ds: {path} holds a {type(config).__name__}; needed: a JSON object")
    return config


def _device(zero: dict[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))


def _check_offload(path: Path, config: dict[str, Any]) -> None:
    zero = config["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        device = _device(zero, key)
        if device not in DEVICES:
            raise UserError(f"--ds: {path} sets {key}.device to {device!r}; needed: one of {', '.join(DEVICES)}")
        if device != "none" and stage_of(config) < 3 and (key, device) != ("offload_optimizer", "cpu"):
            raise UserError(f"--ds: {path} sets {key}.device to {device!r}; needed for that: zero_optimization.stage 3")
    if _device(zero, "offload_param") == "nvme":
        raise UserError(
            f"--ds: {path} asks for weights on NVMe (offload_param), which is not supported; needed: device cpu or none"
        )
    if optimizer_device(config) != "nvme":
        return
    if not zero["offload_optimizer"].get("nvme_path"):
        raise UserError(f"--ds: {path} has no offload_optimizer.nvme_path; needed: a folder on a fast local disk")
    if (config.get("aio") or {}).get("block_size"):
        raise UserError(
            f"--ds: {path} sets {BLOCK}; it follows from the model and the number of ranks, remove it from {path.name}"
        )
    if any(zero["offload_optimizer"].get(key) for key in ("pipeline_read", "pipeline_write", "fast_init")):
        raise UserError(
            f"--ds: {path} sets pipeline_read, pipeline_write or fast_init of offload_optimizer, whose gradients have "
            "not been proven right; needed: none of them"
        )
