"""The target encoder's average of the student, kept in fp32 on ZeRO-3 partitions: no gather, no communication.

An average in bf16 stands still (at momentum 0.999 a step is below the rounding), so each rank keeps an fp32 shadow of
its run of every target parameter, feeds it from the student's fp32 master weights after an applied optimizer step, and
rounds it into the run that the target's forward pass gathers.
"""

import math
from collections.abc import Mapping

import torch
from m3i_kernels.ema_update import ema_update
from torch import Tensor, nn

from m3i_large.parallel.comm import ProcessGroupCollectives
from m3i_large.parallel.engine import Engine, full_shape
from m3i_large.parallel.state import MemoryState, Slice, State


class ShardedEMA:
    """Exponential moving averages of sub-modules in copies of them, all inside one engine's module.

    Args:
        engine: the engine whose module holds them.
        copies: {name of the averaged copy: name of its source}. Every parameter and buffer of one must exist in the
            other with the same shape; a copy must not require gradients.

    Raises:
        ValueError: names, shapes or partitions of the two differ.
    """

    def __init__(self, engine: Engine, copies: Mapping[str, str]) -> None:
        self._engine = engine
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        for copy, name in copies.items():
            source, twin = engine.module.get_submodule(name), engine.module.get_submodule(copy)
            parameters = _match(dict(source.named_parameters()), dict(twin.named_parameters()))
            self._pairs |= {f"{copy}.{key}": pair for key, pair in parameters.items()}
            buffers = _match(dict(source.named_buffers()), dict(twin.named_buffers()))
            self._buffers |= {f"{copy}.{key}": pair for key, pair in buffers.items()}
        trained = [name for name, (_, parameter) in self._pairs.items() if parameter.requires_grad]
        if trained:
            raise ValueError(f"target parameters must not require gradients, got {trained[:3]}")
        self._shadow = {name: engine.master(p).values.clone() for name, (p, _) in self._pairs.items()}
        self._write()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * student; call it after an applied optimizer step only."""
        ema_update(
            list(self._shadow.values()),
            [self._engine.master(parameter).values for parameter, _ in self._pairs.values()],
            momentum=momentum,
            out=[self._engine.partition_of(twin).values for _, twin in self._pairs.values()],
        )
        for _, twin in self._pairs.values():
            self._engine.release(twin)
        for buffer, copy in self._buffers.values():
            copy.copy_(buffer)

    @torch.no_grad()
    def distance(self) -> float:
        """|student - target| / |student| in L2 over all averaged parameters; one reduction, every rank calls it."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._engine.rank.device)
        for name, (parameter, _) in self._pairs.items():
            student = self._engine.master(parameter).values
            apart = student - self._shadow[name].to(student.device)
            squares += torch.stack([apart.square().sum(), student.square().sum()]).to(squares)
        apart_2, student_2 = ProcessGroupCollectives(self._engine.rank).all_reduce_sum(squares).tolist()
        return math.sqrt(apart_2 / student_2) if student_2 else 0.0

    def state(self) -> State:
        """Slices of the fp32 average, keyed `ema/<name in the engine's module>`."""
        return MemoryState(
            {
                f"ema/{name}": Slice(full_shape(twin), self._engine.master(parameter).offset, self._shadow[name])
                for name, (parameter, twin) in self._pairs.items()
            }
        )

    def restored(self) -> None:
        """Takes over values written into `state()`."""
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for name, (_, twin) in self._pairs.items():
            self._engine.write_partition(twin, self._shadow[name])


def _match(source: dict, twin: dict) -> dict:
    """Pairs two modules' tensors by name; positions would hide a mismatch."""
    if source.keys() != twin.keys():
        raise ValueError(f"student and target differ in {sorted(source.keys() ^ twin.keys())[:5]}")
    pairs = {name: (source[name], twin[name]) for name in source}
    for name, (a, b) in pairs.items():
        shapes = (full_shape(a), full_shape(b)) if isinstance(a, nn.Parameter) else (tuple(a.shape), tuple(b.shape))
        if shapes[0] != shapes[1]:
            raise ValueError(f"student and target differ in the shape of {name}: {shapes[0]} and {shapes[1]}")
    return pairs
