"""The only door to DeepSpeed: partitions the objective's modules, steps the optimizer, exposes the local state.

What a rank holds of the training state is described in partitions.py; here it is read, written and stepped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3i_large.ds_file import optimizer_device, stage_of, swap_folder
from m3i_large.parallel.comm import Rank
from m3i_large.parallel.ds_config import with_safe_block_size
from m3i_large.parallel.folder_lock import lock_folder
from m3i_large.parallel.optimizer import (
    MOMENTS,
    applied_steps,
    check_sub_groups,
    has_moments,
    moments,
    set_applied_steps,
)
from m3i_large.parallel.partitions import Partitions, Piece, Twins, Zero3, Zero12, full_shape, visit_after_update
from m3i_large.parallel.state import Layout, Slice

MASTER = "master"
# Called with the fp32 weights that an update changed, by parameter name: all at once, or sub-group by sub-group.
AfterUpdate = Callable[[Mapping[str, Slice]], None]


def partition(module: nn.Module, ds_config: dict[str, Any]) -> None:
    """Partitions the parameters of `module` over the ranks, one after the other (ZeRO-3); else nothing.

    The module is built and initialised whole before this call: initialisers that run inside `zero.Init` would see
    empty parameters.
    """
    import deepspeed

    if stage_of(ds_config) == 3:
        deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)


def gather_whole(blocks: Iterable[nn.Module]) -> None:
    """Makes ZeRO-3 gather all parameters of a block at once when it is entered, instead of one layer after the other.

    Fewer and larger gathers, and no hooks inside. Two conditions on blocks that are trained: the input must require a
    gradient, otherwise the backward pass finds the parameters already released; and a forward pass enters them once,
    as DeepSpeed reduces their gradients after each entry, losing some of them (docs/deepspeed_defects.md).
    Call it before the engine is built. Without ZeRO-3 it has no effect.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)


class Engine:
    """DeepSpeed's engine over one root module, with the local state in the open.

    Args:
        module: the root module, partitioned by `partition`; parameters to train have requires_grad.
        optimizer: from `build_optimizer`; AdamW of some kind, whose moments are in checkpoints.
        ds_config: from `read_ds_config`.
        rank: from `start_distributed`.

    Raises:
        UserError: offload to NVMe with sub-groups that are too small or into another run's folder; Apex with more
            sub-groups than parameter groups.
    """

    def __init__(self, module: nn.Module, *, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], rank: Rank):
        import deepspeed

        self.rank = rank
        self.module = module
        self.ds_config = ds_config
        if optimizer_device(ds_config) == "nvme":
            self.ds_config = with_safe_block_size(ds_config, module.parameters(), world=rank.world)
            self._lock = lock_folder(swap_folder(ds_config), rank=rank.rank)
        self.deepspeed, self._zero, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.ds_config
        )
        kind = Zero3 if stage_of(ds_config) == 3 else Zero12
        self.partitions: Partitions = kind(self._zero, self.trainable(), rank)
        self._pieces = {piece.name: piece for group in self.partitions.groups for piece in group}
        check_sub_groups(self._zero.optimizer, num_sub_groups=self.partitions.num_groups)
        self._after_update: AfterUpdate | None = None
        if any(map(self.partitions.swapped, range(self.partitions.num_groups))):
            visit_after_update(self._zero, self.partitions, self._visit)

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

    def step(self, after_update: AfterUpdate | None = None) -> bool:
        """Ends a micro-step; True when it was the last of its step and the optimizer changed the weights.

        Args:
            after_update: called with the fp32 weights that were changed, and only then. Offloaded to NVMe they come
                sub-group by sub-group, while each is in memory.
        """
        self._after_update = after_update
        last = bool(self.deepspeed.is_gradient_accumulation_boundary())
        self.deepspeed.step()
        applied = bool(self.deepspeed.was_step_applied())
        if last and not applied:
            self.partitions.drop_gradients()
        if applied and after_update is not None:
            resident = [i for i in range(self.partitions.num_groups) if not self.partitions.swapped(i)]
            after_update({name: piece for i in resident for name, piece in self.partitions.masters(i).items()})
        self._after_update = None
        return applied

    def _visit(self, index: int) -> None:
        if self._after_update is not None:
            self._after_update(self.partitions.masters(index))

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

    def clamp(self, name: str, low: float, high: float) -> None:
        """Limits one parameter, master and low-precision weights alike; where `after_update` was given its value."""
        self.partitions.clamp(self._pieces[name], low, high)

    # -- local state ------------------------------------------------------------------------------------------------

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything the optimizer trains."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def piece(self, name: str) -> Piece:
        """This rank's run of a trained parameter."""
        return self._pieces[name]

    def twins(self, copies: Mapping[str, tuple[str, nn.Parameter]]) -> Twins:
        """The low-precision weights of frozen copies {name: (name of its source, copy)}, cut as their sources are."""
        return self.partitions.twins({name: (self._pieces[source], twin) for name, (source, twin) in copies.items()})

    def state(self) -> "EngineState":
        """Master weights and moments, keyed `master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`.

        The moments exist once the first step was applied; before, they are created as zeros.
        """
        return EngineState(self.partitions, self._zero.optimizer)

    @property
    def applied_steps(self) -> int:
        """How many optimizer updates were applied (AdamW's bias-correction count)."""
        return applied_steps(self._zero.optimizer)

    def restored(self, *, applied_steps: int) -> None:
        """Takes over the count that belongs to what was written into `state()`."""
        set_applied_steps(self._zero.optimizer, applied_steps)


class EngineState:
    """State (see state.py) of an engine: one group for each sub-group of the optimizer."""

    def __init__(self, partitions: Partitions, optimizer: torch.optim.Optimizer) -> None:
        self._partitions, self._optimizer = partitions, optimizer

    def layout(self) -> dict[str, Layout]:
        """See State."""
        keys = (MASTER, *MOMENTS)
        pieces = [piece for group in self._partitions.groups for piece in group]
        return {f"{key}/{piece.name}": piece.layout for piece in pieces for key in keys}

    def groups(self, *, write: bool = False) -> Iterator[Mapping[str, Slice]]:
        """See State; every rank iterates with `write`: under ZeRO-1 and 2 what was written is gathered at the end."""
        partitions = self._partitions
        for index, pieces in enumerate(partitions.groups):
            created = not has_moments(self._optimizer, partitions.flats[index])
            with partitions.resident(index, write=write or created):
                master = partitions.master(index)
                flats = (master, *moments(self._optimizer, partitions.flats[index]))
                yield {
                    f"{key}/{piece.name}": piece.of(flat)
                    for piece in pieces
                    for key, flat in zip((MASTER, *MOMENTS), flats, strict=True)
                }
                if write:
                    for piece in pieces:
                        partitions.weights(piece).copy_(piece.of(master).values)
        if write:
            partitions.publish(piece.parameter for group in partitions.groups for piece in group)


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
