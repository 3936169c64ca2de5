"""DeepSpeed's JSON: what the file says of sharding and offload, and what the recipe decides, written out."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from m3i_large.errors import UserError
from m3i_large.parallel.partitions import full_shape

RECIPE_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.contrast_batch / number of ranks",
    "gradient_accumulation_steps": "train.global_batch / train.contrast_batch",
    "gradient_clipping": "optim.clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim",
}
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
DEVICES = ("none", "cpu", "nvme")
MIB = 2**20
BLOCK = "aio.block_size"


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What DeepSpeed must know of the batch: rows per rank and micro-step, and micro-steps per optimizer step.

    `chunked`: a micro-step has several backward passes.
    """

    micro_batch: int
    accumulation: int
    clip: float
    bf16: bool
    chunked: bool = False


def read_ds_config(path: Path, sizes: StepSizes, *, world: int) -> dict[str, Any]:
    """Reads a DeepSpeed JSON file (sharding and offload only) and adds what the recipe decides.

    Raises UserError where the file is missing, is no JSON, sets a recipe's key to another value, or asks for what
    cannot be done.
    """
    config = _read(path)
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise UserError(f"--ds: {path} sets zero_optimization.stage to {stage!r}; needed: 1, 2 or 3")
    ours: dict[str, Any] = {
        "train_batch_size": sizes.micro_batch * sizes.accumulation * world,
        "train_micro_batch_size_per_gpu": sizes.micro_batch,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": sizes.clip,
        # Explicit, because DeepSpeed's defaults for both clipping and this check have changed between releases.
        "bf16": {"enabled": sizes.bf16, "check_grad_overflow": True},
        "steps_per_print": 1_000_000_000,
        # torch's AdamW runs on the CPU as well; DeepSpeed would insist on its own, which needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage > 1 and sizes.bf16:
        # Sums of micro-steps, and on NVMe no second copy of the gradients.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    elif sizes.bf16 and (sizes.accumulation > 1 or sizes.chunked):
        raise UserError(
            f"--ds: {path} is ZeRO-1, which would add up the gradients of several backward passes in bf16; needed: "
            "stage 2 or 3, or contrast direct with train.contrast_batch equal to train.global_batch"
        )
    for key, source in RECIPE_KEYS.items():
        if key in config and config[key] not in ("auto", ours.get(key)):
            raise UserError(
                f"--ds: {path} sets {key} to {config[key]!r}, but the recipe ({source}) says {ours.get(key)!r}; "
                f"remove it from {path.name}"
            )
    _check_fixed(path, config)
    _check_offload(path, config)
    return {**config, **ours}


def _read(path: Path) -> dict[str, Any]:
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


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage."""
    return int(config["zero_optimization"]["stage"])


def optimizer_device(config: dict[str, Any]) -> str:
    """Where the optimizer's states lie: none (with the parameters), cpu or nvme."""
    return str((config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none"))


def swap_folder(config: dict[str, Any]) -> Path:
    """The folder for offload to NVMe."""
    return Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"])


def _check_fixed(path: Path, config: dict[str, Any]) -> None:
    for name, only in FIXED.items():
        value: Any = config
        for key in name.split("."):
            value = value.get(key, only) if isinstance(value, dict) else only
        if value != only:
            raise UserError(f"--ds: {path} sets {name} to {value!r}, which is not supported; needed: {only!r}, or none")


def _check_offload(path: Path, config: dict[str, Any]) -> None:
    zero = config["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in DEVICES:
            raise UserError(f"--ds: {path} sets {key}.device to {device!r}; needed: one of {', '.join(DEVICES)}")
        if device != "none" and stage_of(config) < 3 and (key, device) != ("offload_optimizer", "cpu"):
            raise UserError(f"--ds: {path} sets {key}.device to {device!r}; needed for that: zero_optimization.stage 3")
    if (zero.get("offload_param") or {}).get("device") == "nvme":
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


def with_safe_block_size(config: dict[str, Any], parameters: Iterable[nn.Parameter], *, world: int) -> dict[str, Any]:
    """Adds the `aio.block_size` at which offload to NVMe leaves gradients alone.

    DeepSpeed 0.19 writes a gradient's fp32 run to a file of its own when it is at least `aio.block_size` long, and
    reads it back wrong where its place in the sub-group is no multiple of 512 bytes (docs/deepspeed_defects.md). With
    a block larger than the largest run gradients stay in memory; sub-groups are longer: states still go to disk.

    Raises UserError where sub-groups are too small for that.
    """
    largest = (
        max(-(-math.prod(full_shape(parameter)) // world) for parameter in parameters if parameter.requires_grad) * 4
    )
    block = (largest // MIB + 1) * MIB
    sub_group = int(config["zero_optimization"].get("sub_group_size", 1e9))
    if sub_group * 4 < block:
        raise UserError(
            f"--ds: zero_optimization.sub_group_size: got {sub_group}; needed: at least {block // 4} elements, as the "
            f"largest gradient of a rank has {largest // 4} ({world} ranks)"
        )
    return {**config, "aio": {**(config.get("aio") or {}), "block_size": block}}
