"""A copy of the state in host memory, so that training may go on while the copy is written."""

from pathlib import Path

import torch
from torch import Tensor

from m3i_large.checkpoint.rank_file import FilePlan
from m3i_large.parallel.state import State

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class Staging:
    """One buffer that is the data section of a rank file, allocated once and filled anew by every save.

    Args:
        device: where the state lies; for a GPU the buffer is pinned.
        local_ranks: ranks that share this machine's memory.
    """

    def __init__(self, device: torch.device, *, local_ranks: int) -> None:
        self._device, self._local_ranks = device, local_ranks
        self._buffer: Tensor | None = None

    def fits(self, plan: FilePlan) -> bool:
        """Whether this machine has memory for the copies of all its ranks, and as much again left over."""
        if self._buffer is not None and self._buffer.numel() == plan.data_bytes:
            return True
        self._buffer = None
        return 2 * plan.data_bytes * self._local_ranks <= available_memory()

    def fill(self, plan: FilePlan, state: State) -> memoryview:
        """Copies a rank's slices to their places; they may change as soon as this returns."""
        on_gpu = self._device.type == "cuda"
        if self._buffer is None:
            self._buffer = torch.zeros(plan.data_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        filled = 0
        for group in state.groups():
            for name, piece in group.items():
                if piece.values.numel() == 0:
                    continue
                dtype, start, size = plan.places[name]
                self._buffer[start : start + size].view(dtype).copy_(piece.values.detach(), non_blocking=on_gpu)
                filled += 1
            if on_gpu:
                # A group's values are gone once the next one is asked for.
                torch.cuda.synchronize(self._device)
        if filled != len(plan.places):
            raise RuntimeError(f"state: the groups give {filled} tensors, the layout has {len(plan.places)}")
        return self._buffer.numpy().data


def available_memory(*, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that can be allocated without swapping: what the kernel says, or the container's limit where it is lower.

    A machine that does not say (no /proc) is taken to have enough.
    """
    found = []
    if meminfo.is_file():
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="utf-8").strip()) != "max":
        # The page cache counts as used but gives way.
        cache = [line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines()]
        found.append(int(most) - int(used.read_text()) + sum(int(n) for key, n in cache if key == "inactive_file"))
    return min(found, default=2**63)
