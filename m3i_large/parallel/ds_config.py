"""DeepSpeed's JSON: what the file says of sharding and offload, and what the recipe decides, written out."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from m3i_large.ds_file import SUMS_REFUSED, read_ds_file, safe_block_size, stage_of, sums_refused, zero_of
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
    config = read_ds_file(path)
    stage = stage_of(config)
    if sums_refused(stage, bf16=sizes.bf16, passes=sizes.accumulation + sizes.chunked):
        raise UserError(f"--ds: {path}: {SUMS_REFUSED}")
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
    for key, source in RECIPE_KEYS.items():
        if key in config and config[key] not in ("auto", ours.get(key)):
            raise UserError(
                f"--ds: {path} sets {key} to {config[key]!r}, but the recipe ({source}) says {ours.get(key)!r}; "
                f"remove it from {path.name}"
            )
    return {**config, **ours}


def with_safe_block_size(config: dict[str, Any], parameters: Iterable[nn.Parameter], *, world: int) -> dict[str, Any]:
    """Adds the `aio.block_size` at which offload to NVMe is right; UserError where sub-groups are too small for it."""
    sizes = [math.prod(full_shape(parameter)) for parameter in parameters if parameter.requires_grad]
    block = safe_block_size(zero_of(config), sizes, world=world)
    return {**config, "aio": {**(config.get("aio") or {}), "block_size": block}}
