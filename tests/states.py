"""Small states with every dtype that a checkpoint stores, cut into the slices of some ranks."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from m3i_large.parallel.comm import Rank
from m3i_large.parallel.state import Layout, MemoryState, Slice

SHAPES = {
    "master/a": ((7, 5), torch.float32),
    "master/empty": ((0, 4), torch.float32),
    "exp_avg/a": ((7, 5), torch.bfloat16),
    "buffer/flags": ((3,), torch.bool),
    "buffer/count": ((), torch.int64),
    "buffer/bytes": ((5,), torch.uint8),
    "ema/half": ((9,), torch.float16),
    "ema/double": ((3, 3), torch.float64),
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Whole tensors of every dtype, an empty one and a scalar among them."""
    keyed = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=keyed).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def cut(whole: Mapping[str, Tensor], *, rank: int, world: int) -> dict[str, Slice]:
    """A rank's slices: the r-th run of ceil(n / world) elements, buffers whole on every rank."""
    slices = {}
    for name, tensor in whole.items():
        flat = tensor.clone().reshape(-1)
        per_rank = len(flat) if name.startswith("buffer/") else -(-len(flat) // world)
        start = 0 if name.startswith("buffer/") else min(rank * per_rank, len(flat))
        slices[name] = Slice(tuple(tensor.shape), start, flat[start : start + per_rank])
    return slices


def memory_state(whole: Mapping[str, Tensor], *, rank: int = 0, world: int = 1) -> MemoryState:
    return MemoryState(cut(whole, rank=rank, world=world))


class DiskState:
    """State whose groups exist one at a time: a group's values are spoilt once the next one is asked for."""

    def __init__(self, whole: Mapping[str, Tensor], *, rank: int = 0, world: int = 1) -> None:
        self._slices = cut(whole, rank=rank, world=world)

    def layout(self) -> dict[str, Layout]:
        return {name: piece.layout for name, piece in self._slices.items()}

    def groups(self, *, write: bool = False) -> Iterator[Mapping[str, Slice]]:
        for name, piece in self._slices.items():
            loaded = Slice(piece.shape, piece.offset, piece.values.clone())
            yield {name: loaded}
            if write:
                piece.values.copy_(loaded.values)
            loaded.values.zero_()


def at(rank: int, world: int) -> Rank:
    return Rank(rank, world, torch.device("cpu"))
