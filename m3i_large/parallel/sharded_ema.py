"""The target encoder's average of the student, kept in fp32 on the optimizer's partitions: no parameter is gathered.

An average in bf16 stands still (at momentum 0.999 a step is below the rounding), so each rank keeps an fp32 shadow of
its run of every target parameter, feeds it from the student's fp32 master weights after an applied optimizer step, and
rounds it into the weights that the target's forward pass sees. Under ZeRO-3 that needs no communication at all; under
ZeRO-1 and 2, where every rank holds whole weights, one all-gather of the rounded ones.
"""

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from m3i_kernels.ema_update import ema_update
from torch import Tensor, nn

from m3i_large.ds_file import swap_folder
from m3i_large.parallel.comm import ProcessGroupCollectives
from m3i_large.parallel.engine import Engine
from m3i_large.parallel.partitions import full_shape
from m3i_large.parallel.state import Layout, Slice


class ShardedEMA:
    """Exponential moving averages of sub-modules in copies of them, all inside one engine's module.

    The average is State (see state.py), keyed `ema/<name in the engine's module>`.

    Args:
        engine: the engine whose module holds them.
        copies: {name of the averaged copy: name of its source}. Every parameter and buffer of one must exist in the
            other with the same shape; a copy must not require gradients, its source must.

    Raises:
        ValueError: names or shapes of the two differ, a copy is trained or its source is not.
    """

    def __init__(self, engine: Engine, copies: Mapping[str, str]) -> None:
        self._engine = engine
        self._source: dict[str, str] = {}
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        parameters: dict[str, nn.Parameter] = {}
        for copy, name in copies.items():
            source, twin = engine.module.get_submodule(name), engine.module.get_submodule(copy)
            for key, (_, parameter) in _match(dict(source.named_parameters()), dict(twin.named_parameters())).items():
                self._source[f"{copy}.{key}"], parameters[f"{copy}.{key}"] = f"{name}.{key}", parameter
            buffers = _match(dict(source.named_buffers()), dict(twin.named_buffers()))
            self._buffers |= {f"{copy}.{key}": pair for key, pair in buffers.items()}
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        if trained:
            raise ValueError(f"target parameters must not require gradients, got {trained[:3]}")
        followed = dict(engine.trainable())
        if fixed := [source for source in self._source.values() if source not in followed]:
            raise ValueError(f"sources of an average must be trained, got {fixed[:3]}")
        self._copy_of = {source: copy for copy, source in self._source.items()}
        self._twins = engine.twins({name: (self._source[name], twin) for name, twin in parameters.items()})
        self._shadow: dict[str, Tensor] = {}
        self._mapped: dict[str, MappedFile] = {}
        self._groups: list[list[str]] = []  # names by sub-group of the optimizer
        self._squares: list[Tensor] = []
        self._start()

    def update(self, masters: Mapping[str, Slice], momentum: float, *, measure: bool = False) -> None:
        """target = momentum * target + (1 - momentum) * student, for those parameters that `masters` has.

        Args:
            masters: what `Engine.step` hands to `after_update`: so it is called for applied steps only.
            measure: take in what `distance` reports.
        """
        names = [self._copy_of[source] for source in masters if source in self._copy_of]
        shadow = [self._shadow[name] for name in names]
        weights = [self._twins.weights(name) for name in names]
        source = [masters[self._source[name]].values for name in names]
        with torch.no_grad():
            together = not names or shadow[0].device == weights[0].device
            ema_update(shadow, source, momentum=momentum, out=weights if together else None)
            if not together:  # optimizer states on the CPU, weights on a GPU
                for values, run in zip(shadow, weights, strict=True):
                    run.copy_(values)
            for buffer, copy in self._buffers.values():
                copy.copy_(buffer)
            if measure:
                self._squares += [
                    torch.stack([(s - e).square().sum(), s.square().sum()]) for s, e in zip(source, shadow, strict=True)
                ]
        self._twins.publish(names)
        self._release(names)

    def distance(self) -> float:
        """|student - target| / |student| in L2 over all averaged parameters, of the last update that was measured.

        One reduction; every rank calls it.
        """
        device = self._engine.rank.device
        squares = torch.stack(self._squares).double().sum(0) if self._squares else torch.zeros(2).double()
        self._squares = []
        apart, student = ProcessGroupCollectives(self._engine.rank).all_reduce_sum(squares.to(device)).tolist()
        return math.sqrt(apart / student) if student else 0.0

    @property
    def source(self) -> Mapping[str, str]:
        """{name of an averaged parameter: name of its source}, both in the engine's module."""
        return self._source

    def layout(self) -> dict[str, Layout]:
        """See State."""
        names = [name for group in self._groups for name in group]
        return {f"ema/{name}": self._engine.piece(self._source[name]).layout for name in names}

    def groups(self, *, write: bool = False) -> Iterator[Mapping[str, Slice]]:
        """See State; one group for each sub-group of the optimizer. Every rank iterates with `write`."""
        layout = self.layout()
        for names in self._groups:
            keys = {f"ema/{name}": name for name in names}
            yield {key: Slice(layout[key].shape, layout[key].offset, self._shadow[name]) for key, name in keys.items()}
            if write:
                self._write(names)
            self._release(names)
        if write:
            self._twins.publish(self._shadow)

    @torch.no_grad()
    def _start(self) -> None:
        """Begins the average at the student's weights, sub-group by sub-group."""
        partitions = self._engine.partitions
        for index in range(partitions.num_groups):
            with partitions.resident(index, write=False):
                masters = partitions.masters(index)
                found = {self._copy_of[s]: masters[s].values for s in masters if s in self._copy_of}
                self._shadow |= self._storage(index, found)
                self._groups.append(list(found))
            self._write(found)
            self._release(found)
        self._twins.publish(self._shadow)

    def _storage(self, index: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `values`: in memory, or in a mapped file beside the optimizer's where that one is on NVMe."""
        total = sum(value.numel() for value in values.values())
        if not total or not self._engine.partitions.swapped(index):
            return {name: value.clone() for name, value in values.items()}
        folder = swap_folder(self._engine.ds_config) / "ema" / f"rank{self._engine.rank.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        file = MappedFile(folder / f"{index}.bin", numel=total)
        runs = file.values.split([value.numel() for value in values.values()])
        for run, value in zip(runs, values.values(), strict=True):
            run.copy_(value)
        self._mapped |= dict.fromkeys(values, file)
        return dict(zip(values, runs, strict=True))

    def _release(self, names: Iterable[str]) -> None:
        """Gives the memory of mapped files back."""
        for file in {id(file): file for file in map(self._mapped.get, names) if file}.values():
            file.release()

    @torch.no_grad()
    def _write(self, names: Iterable[str]) -> None:
        for name in names:
            self._twins.weights(name).copy_(self._shadow[name])


class MappedFile:
    """An fp32 vector that lies in a file and is in memory only while it is used.

    Args:
        path: created anew, in an existing folder.
        numel: elements, at least 1.
    """

    def __init__(self, path: Path, *, numel: int) -> None:
        path.unlink(missing_ok=True)
        with path.open("w+b") as file:
            file.truncate(4 * numel)
            self._map = mmap.mmap(file.fileno(), 4 * numel)
        self.values = torch.frombuffer(self._map, dtype=torch.float32)

    def release(self) -> None:
        """Gives the memory back; the values stay, in the page cache until they are on the disk."""
        self._map.madvise(mmap.MADV_DONTNEED)


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
