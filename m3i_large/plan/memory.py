"""Bytes on one GPU, by what they hold: sharded state, what ZeRO gathers and buffers, activations."""

from collections.abc import Mapping
from dataclasses import dataclass

from m3i_large.ds_file import Zero
from m3i_large.plan.comm import play_gathers
from m3i_large.plan.devices import GIB, Gpu
from m3i_large.plan.parameters import Table
from m3i_large.plan.walk import Walk

# Assumptions. CUDA context, NCCL channels, cuBLAS and Triton workspaces; and the share of a device's memory that the
# caching allocator holds without using it.
RESERVED, FRAGMENTED = 2 * GIB, 0.05
ASSUMED = ("CUDA, NCCL", "fragmentation")  # their rows


@dataclass(frozen=True)
class States:
    """Bytes per rank of what lives as long as the run.

    Attributes:
        gpu, host, disk: by what they hold: weights, gradients, master, moments, average, swap buffers.
        step: fp32 gradients on the GPU while the optimizer steps, when no activations are alive.
    """

    gpu: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    step: int


@dataclass(frozen=True)
class Memory:
    """Peak of one GPU.

    Attributes:
        rows: bytes by what they hold, in the order of the table; they sum to `total`.
        host, disk: bytes per rank of offloaded state.
    """

    rows: dict[str, int]
    host: int
    disk: int

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.rows.values())

    @property
    def allocated(self) -> int:
        """The part of `total` that torch.cuda.max_memory_allocated would show: without what is assumed."""
        return sum(size for what, size in self.rows.items() if what not in ASSUMED)


def states(table: Table, zero: Zero, *, world: int) -> States:
    """State of a rank: DeepSpeed's ZeRO stages, AdamW in fp32, and the average in fp32 on the same shards."""
    trained = [table.size[name] for name in table.trained]

    def shard(sizes: list[int]) -> int:
        return sum(-(-n // world) for n in sizes)

    per_rank = shard(trained)
    weights = shard(list(table.size.values())) if zero.stage == 3 else table.num
    gradients, summed = (per_rank, 4) if zero.stage >= 2 else (sum(trained), table.element)
    second = table.element * table.num // zero.hpz if zero.hpz > 1 else 0
    at_once = min(per_rank, zero.sub_group) if zero.stage == 3 else per_rank
    held = {
        "weights": (zero.weights, table.element * weights),
        "second copy of weights": ("none", second),
        # Sharded gradients are summed in fp32. An offloaded optimizer takes them along.
        "gradients": (("cpu", 4 * gradients) if zero.optimizer != "none" else ("none", summed * gradients)),
        "master": (zero.optimizer, 4 * per_rank),
        "moments": (zero.optimizer, 8 * per_rank),
        "average": (zero.optimizer, 4 * shard([table.size[name] for name in table.averaged])),
        "swap buffers": ("cpu", 4 * zero.buffer_count * at_once if zero.optimizer == "nvme" else 0),
    }
    places: dict[str, dict[str, int]] = {"none": {}, "cpu": {}, "nvme": {}}
    for what, (place, size) in held.items():
        if size:
            places[place][what] = size
    step = 4 * at_once if zero.optimizer == "none" and table.element < 4 else 0
    return States(gpu=places["none"], host=places["cpu"], disk=places["nvme"], step=step)


def gathered(walk: Walk, table: Table, zero: Zero, *, world: int) -> dict[str, int]:
    """What ZeRO holds beside its shards during a micro-step: gathered weights and communication buffers."""
    if world == 1 and zero.stage != 3:
        return {}
    held = {}
    if zero.stage == 3 and (world > 1 or zero.weights != "none"):  # one rank's shard is the whole weight already
        held["gathered weights"] = table.element * play_gathers(walk, table, zero, world=world).peak
        small = sum(n for n in table.size.values() if n <= zero.persistence)
        held["small weights kept whole"] = table.element * small
    # Stage 3: one bucket and its copy in the order of ranks; stages 1 and 2: two buckets in turn.
    buckets = 2 if zero.stage == 3 or zero.overlap else 1
    held["reduce buckets"] = table.element * buckets * zero.reduce_bucket
    return held


def memory(state: States, buffers: Mapping[str, int], *, activations: int, batch: int, gpu: Gpu) -> Memory:
    """Puts the parts together; the peak is in a backward pass or, where that is more, in the optimizer's step."""
    micro_step = {**buffers, "activations": activations}
    if state.step > sum(micro_step.values()):
        micro_step = {"fp32 gradients of the step": state.step}
    rows = {**state.gpu, **micro_step, "batches (2)": 2 * batch}
    rows |= dict(zip(ASSUMED, (RESERVED, round(FRAGMENTED * gpu.memory)), strict=True))
    return Memory(rows, host=sum(state.host.values()), disk=sum(state.disk.values()))
