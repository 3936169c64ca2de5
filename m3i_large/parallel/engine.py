"""The only door to DeepSpeed: partitions the objective's modules, steps the optimizer, exposes the local slices.

A ZeRO-3 partition of a parameter with n elements on world size W is the r-th run of ceil(n / W) elements of its
flattened value, the last one padded. Everything that reads or writes training state (the averaged target, the
checkpoint) does so through `Slice`s of these runs, without ever gathering a parameter.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3i_large.errors import UserError
from m3i_large.parallel.comm import Rank
from m3i_large.parallel.state import MemoryState, Slice, State

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
RECIPE_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.contrast_batch / number of ranks",
    "gradient_accumulation_steps": "train.global_batch / train.contrast_batch",
    "gradient_clipping": "optim.clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim",
}


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What DeepSpeed must know of the batch: rows per rank and micro-step, and micro-steps per optimizer step."""

    micro_batch: int
    accumulation: int
    clip: float
    bf16: bool


def read_ds_config(path: Path, sizes: StepSizes, *, world: int) -> dict[str, Any]:
    """Reads a DeepSpeed JSON file (sharding and offload only) and adds what the recipe decides.

    Raises UserError where the file is missing, is no JSON, or sets a recipe's key to another value.
    """
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
    ours: dict[str, Any] = {
        "train_batch_size": sizes.micro_batch * sizes.accumulation * world,
        "train_micro_batch_size_per_gpu": sizes.micro_batch,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": sizes.clip,
        # Explicit, because DeepSpeed's defaults for both clipping and this check have changed between releases.
        "bf16": {"enabled": sizes.bf16, "check_grad_overflow": True},
        "steps_per_print": 1_000_000_000,
    }
    for key, source in RECIPE_KEYS.items():
        if key in config and config[key] not in ("auto", ours.get(key)):
            raise UserError(
                f"--ds: {path} sets {key} to {config[key]!r}, but the recipe ({source}) says {ours.get(key)!r}; "
                f"remove it from {path.name}"
            )
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise UserError(f"--ds: {path} sets zero_optimization.stage to {stage!r}; needed: 3")
    if "offload_optimizer" in config["zero_optimization"] or "offload_param" in config["zero_optimization"]:
        raise UserError(
            f"--ds: {path} asks for offload, which is not supported yet; needed: a configuration without offload_*"
        )
    return {**config, **ours}


def partition(module: nn.Module, ds_config: dict[str, Any]) -> None:
    """Partitions every direct child of `module` over the ranks (ZeRO-3), one child after the other.

    Children are built and initialised whole before this call: initialisers that run inside `zero.Init` would see
    empty parameters. The transient cost is one whole child per rank.
    """
    import deepspeed

    for child in module.children():
        deepspeed.zero.Init(module=child, config_dict_or_path=ds_config)


def gather_whole(blocks: Iterable[nn.Module]) -> None:
    """Makes ZeRO-3 gather all parameters of a block at once when it is entered, instead of one layer after the other.

    Fewer and larger gathers, and no hooks inside. The input of a block that is trained must require a gradient:
    otherwise its backward pass finds the parameters already released. Call it before the engine is built.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Engine:
    """DeepSpeed's engine over one root module, with the local state in the open.

    Args:
        module: the root module, partitioned by `partition`; parameters to train have requires_grad.
        optimizer: torch optimizer over the module's trainable parameters (AdamW; its moments are in checkpoints).
        ds_config: from `read_ds_config`.
        rank: from `start_distributed`.
    """

    def __init__(self, module: nn.Module, *, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], rank: Rank):
        import deepspeed

        self.rank = rank
        self.module = module
        self._names = {id(p): name for name, p in module.named_parameters()}
        self.deepspeed, self._zero, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor, *, more: bool = False) -> None:
        """Accumulates gradients of loss / accumulation; reduces them over ranks as a mean.

        `more`: another backward pass of the same micro-step follows. Each pass must reach every trained parameter:
        ZeRO-3's first one of a step overwrites the last step's gradients, later ones add to what they find; stages 1
        and 2 would reduce a sum over ranks again in every pass that may be a step's last.
        """
        # None: by DeepSpeed's own count of micro-steps, which is of calls of `step`.
        self.deepspeed.set_gradient_accumulation_boundary(False if more else None)
        self.deepspeed.backward(loss)

    def step(self) -> bool:
        """Ends a micro-step; True when it was the last of its step and the optimizer changed the weights."""
        self.deepspeed.step()
        return bool(self.deepspeed.was_step_applied())

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping (inf where the step was not applied)."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every parameter group; a group's own `lr_scale` multiplies it."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def group_settings(self) -> list[dict[str, Any]]:
        """Each parameter group's hyper-parameters, without its tensors."""
        keep = (int, float, bool, str, tuple, list, type(None))
        groups = self._zero.optimizer.param_groups
        return [{k: v for k, v in g.items() if k != "params" and isinstance(v, keep)} for g in groups]

    # -- local state ------------------------------------------------------------------------------------------------

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything the optimizer trains."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def _slice(self, parameter: nn.Parameter, values: Tensor) -> Slice:
        per_rank = values.numel()
        total = parameter.ds_numel  # type: ignore[attr-defined]
        offset = min(self.rank.rank * per_rank, total)
        valid = max(0, min(per_rank, total - offset))
        return Slice(shape=full_shape(parameter), offset=offset, values=values.narrow(0, 0, valid))

    def partition_of(self, parameter: nn.Parameter) -> Slice:
        """This rank's run of the low-precision weights that the forward pass gathers."""
        return self._slice(parameter, parameter.ds_tensor.data)  # type: ignore[attr-defined]

    def master(self, parameter: nn.Parameter) -> Slice:
        """This rank's run of the fp32 weights that the optimizer updates."""
        from deepspeed.utils import safe_get_local_fp32_param

        return self._slice(parameter, safe_get_local_fp32_param(parameter).detach())

    def state(self) -> State:
        """Slices of master weights and AdamW moments, keyed `master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`.

        The moments exist once the first step was applied; before, they are created as zeros.
        """
        from deepspeed.utils import safe_get_local_optimizer_state

        self._create_moments()
        slices = {}
        for name, parameter in self.trainable():
            slices[f"{MASTER}/{name}"] = self.master(parameter)
            for key in MOMENTS:
                slices[f"{key}/{name}"] = self._slice(parameter, safe_get_local_optimizer_state(parameter, key))
        return MemoryState(slices)

    def _create_moments(self) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:
            state = self._zero.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                for key in MOMENTS:
                    state[key] = torch.zeros_like(flat)

    @property
    def applied_steps(self) -> int:
        """How many optimizer updates were applied (AdamW's bias-correction count)."""
        states = [s for s in self._zero.optimizer.state.values() if "step" in s]
        return int(states[0]["step"]) if states else 0

    def restored(self, *, applied_steps: int) -> None:
        """Takes over values written into `state()`: refreshes the low-precision weights and the step count."""
        self._create_moments()
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(applied_steps)
        for _, parameter in self.trainable():
            self.write_partition(parameter, self.master(parameter).values)

    def write_partition(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Rounds fp32 values into the low-precision run, so that the next forward pass sees them."""
        self.partition_of(parameter).values.copy_(values)
        self.release(parameter)

    def release(self, parameter: nn.Parameter) -> None:
        """Drops the gathered copy of a small parameter that ZeRO-3 keeps resident, so that it is gathered anew."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]

    def clamp(self, name: str, low: float, high: float) -> None:
        """Limits one parameter in place, master and low-precision weights alike."""
        parameter = self.module.get_parameter(name)
        values = self.master(parameter).values
        values.clamp_(low, high)
        self.write_partition(parameter, values)


def build_param_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, decays: Callable[[str, tuple[int, ...]], bool]
) -> list[dict[str, Any]]:
    """Two parameter groups, with and without weight decay, by a rule on (name, full shape)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        groups[decays(name, full_shape(parameter))].append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decay else 0.0} for decay, params in groups.items() if params
    ]
