"""What a rank holds of DeepSpeed's training state, in the open: fp32 master weights, moments, low-precision weights.

DeepSpeed keeps the fp32 state of a rank in flat sub-groups. A parameter's part in them is a run of its flattened value:

- ZeRO-3: the r-th run of ceil(n / W) elements on rank r, of every parameter; the last run is padded.
- ZeRO-1 and 2: all parameters of an optimizer group lie in one flat vector that is cut into W equal partitions, so a
  rank holds whole parameters, the end of one, the beginning of another, and nothing of most.

Everything that reads or writes training state (the averaged target, checkpoints) goes through these runs; no parameter
is ever gathered for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_large.parallel.comm import Rank
from m3i_large.parallel.state import Layout, Slice


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Piece:
    """A parameter's run on this rank: which elements of it, its sub-group, and where they begin in that one's flat
    tensor."""

    name: str
    parameter: nn.Parameter
    layout: Layout
    group: int
    start: int

    def of(self, flat: Tensor) -> Slice:
        """The run inside a flat tensor laid out as the sub-group."""
        return Slice(self.layout.shape, self.layout.offset, flat.narrow(0, self.start, self.layout.numel))


class Partitions(ABC):
    """The sub-groups of one DeepSpeed ZeRO optimizer.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        named: name and parameter of everything that is trained.
        rank: this process.
    """

    def __init__(self, zero: Any, named: Iterable[tuple[str, nn.Parameter]], rank: Rank) -> None:
        self.zero, self.rank = zero, rank
        self.groups: list[list[Piece]] = [[] for _ in range(self.num_groups)]
        for name, parameter in named:
            piece = self._locate(name, parameter)
            self.groups[piece.group].append(piece)

    @property
    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The sub-groups' flat fp32 weights, the very tensors that the optimizer updates; empty while on NVMe."""

    @property
    def num_groups(self) -> int:
        """How many sub-groups there are."""
        return len(self.flats)

    @abstractmethod
    def _locate(self, name: str, parameter: nn.Parameter) -> Piece:
        """A parameter's run; an empty one where this rank holds none of it."""

    def master(self, index: int) -> Tensor:
        """Sub-group `index`'s flat fp32 weights; on NVMe only inside `resident`."""
        return self.flats[index].detach()

    def swapped(self, index: int) -> bool:
        """Whether sub-group `index` lies on NVMe between uses."""
        return False

    @contextmanager
    def resident(self, index: int, *, write: bool) -> Iterator[None]:
        """Keeps sub-group `index` in memory; with `write`, what changed stays."""
        yield

    def masters(self, index: int) -> dict[str, Slice]:
        """The runs of a resident sub-group by parameter name."""
        return {piece.name: piece.of(self.master(index)) for piece in self.groups[index]}

    @abstractmethod
    def weights(self, piece: Piece) -> Tensor:
        """The low-precision weights of a run, as the forward pass will see them after `publish`."""

    @abstractmethod
    def publish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Shows the forward pass what was written into `weights` of these parameters. Every rank calls it."""

    @abstractmethod
    def twins(self, pairs: Mapping[str, tuple[Piece, nn.Parameter]]) -> "Twins":
        """Low-precision weights of frozen copies, cut into the same runs as the parameters they are copies of."""

    @abstractmethod
    def clamp(self, piece: Piece, low: float, high: float) -> None:
        """Limits a resident parameter, master and low-precision weights alike. Every rank calls it."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forgets the gradients of a step that was not applied, where DeepSpeed would add the next step's to them."""


class Twins(ABC):
    """Frozen copies of trained parameters, written run by run without gathering their sources."""

    @abstractmethod
    def weights(self, name: str) -> Tensor:
        """This rank's run of the copy `name`."""

    @abstractmethod
    def publish(self, names: Iterable[str]) -> None:
        """Shows the forward pass what was written into these copies. Every rank calls it."""


# -- ZeRO-3 ------------------------------------------------------------------------------------------------------------


class Zero3(Partitions):
    """Parameters are partitioned one by one; the forward pass gathers them when it needs them."""

    @property
    def flats(self) -> list[Tensor]:
        """See Partitions."""
        return self.zero.fp32_partitioned_groups_flat

    def _locate(self, name: str, parameter: nn.Parameter) -> Piece:
        index, start, per_rank = self.zero.grad_position[self.zero.get_param_id(parameter)]
        total = parameter.ds_numel  # type: ignore[attr-defined]
        offset = min(self.rank.rank * per_rank, total)
        numel = max(0, min(per_rank, total - offset))
        return Piece(name, parameter, Layout(full_shape(parameter), torch.float32, offset, numel), index, start)

    def swapped(self, index: int) -> bool:
        """See Partitions."""
        return bool(self.zero._swappable_optimizer_subgroup(index))

    @contextmanager
    def resident(self, index: int, *, write: bool) -> Iterator[None]:
        """See Partitions."""
        if not self.swapped(index):
            yield
            return
        self.zero._optimizer_states_and_gradient_swap_in(index)
        try:
            yield
        finally:
            if write:
                self.zero._optimizer_states_and_gradient_swap_out(index)
            else:
                self.zero._release_swap_buffers(index)

    def weights(self, piece: Piece) -> Tensor:
        """See Partitions."""
        return _run(piece.parameter, piece.layout.numel)

    def publish(self, parameters: Iterable[nn.Parameter]) -> None:
        """See Partitions; drops gathered copies of small parameters that ZeRO-3 keeps resident, and of hpZ."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for parameter in parameters:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                parameter.partition()  # type: ignore[attr-defined]
            # Last, as partitioning fills hpZ's second copy from the weights that were gathered before.
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]

    def twins(self, pairs: Mapping[str, tuple[Piece, nn.Parameter]]) -> "Twins":
        """See Partitions."""
        return _Zero3Twins(self, pairs)

    def clamp(self, piece: Piece, low: float, high: float) -> None:
        """See Partitions."""
        values = piece.of(self.master(piece.group)).values
        values.clamp_(low, high)
        self.weights(piece).copy_(values)
        self.publish([piece.parameter])

    def drop_gradients(self) -> None:
        """See Partitions; DeepSpeed overwrites them."""


class _Zero3Twins(Twins):
    """A copy is partitioned as its source is, so a run of one is a run of the other."""

    def __init__(self, partitions: Zero3, pairs: Mapping[str, tuple[Piece, nn.Parameter]]) -> None:
        self._partitions = partitions
        self._twins = {name: twin for name, (_, twin) in pairs.items()}
        self._numel = {name: piece.layout.numel for name, (piece, _) in pairs.items()}

    def weights(self, name: str) -> Tensor:
        """See Twins."""
        return _run(self._twins[name], self._numel[name])

    def publish(self, names: Iterable[str]) -> None:
        """See Twins."""
        self._partitions.publish(self._twins[name] for name in names)


def _run(parameter: nn.Parameter, numel: int) -> Tensor:
    return parameter.ds_tensor.data.narrow(0, 0, numel)  # type: ignore[attr-defined]


# -- ZeRO-1 and ZeRO-2 -------------------------------------------------------------------------------------------------


class Zero12(Partitions):
    """Weights are whole on every rank, views into one flat vector for each optimizer group."""

    @property
    def flats(self) -> list[Tensor]:
        """See Partitions."""
        return self.zero.single_partition_of_fp32_groups

    def _locate(self, name: str, parameter: nn.Parameter) -> Piece:
        index = next(i for i, flat in enumerate(self.weight_flats) if _within(parameter, flat))
        begin = _position(parameter, self.weight_flats[index])
        size = self.zero.partition_size[index]
        low, high = max(begin, self.rank.rank * size), min(begin + parameter.numel(), (self.rank.rank + 1) * size)
        numel = max(0, high - low)
        offset, start = (low - begin, low - self.rank.rank * size) if numel else (0, 0)
        return Piece(name, parameter, Layout(tuple(parameter.shape), torch.float32, offset, numel), index, start)

    @property
    def weight_flats(self) -> list[Tensor]:
        """All weights of each optimizer group, of which the module's parameters are views."""
        return self.zero.bit16_groups_flat

    def weights(self, piece: Piece) -> Tensor:
        """See Partitions."""
        return piece.parameter.detach().view(-1).narrow(0, piece.layout.offset, piece.layout.numel)

    def publish(self, parameters: Iterable[nn.Parameter]) -> None:
        """See Partitions; gathers all weights, as DeepSpeed does after a step."""
        for flat in self.weight_flats:
            _gather_partitions(flat, self.rank)

    def twins(self, pairs: Mapping[str, tuple[Piece, nn.Parameter]]) -> "Twins":
        """See Partitions."""
        return _Zero12Twins(self, pairs)

    def clamp(self, piece: Piece, low: float, high: float) -> None:
        """See Partitions; rounding keeps order, so that clamping the rounded weights on every rank is exact."""
        piece.of(self.master(piece.group)).values.clamp_(low, high)
        piece.parameter.data.clamp_(low, high)

    def drop_gradients(self) -> None:
        """See Partitions; offloaded, the sums of a bf16 run would stay NaN for good (docs/deepspeed_defects.md)."""
        for index in self.zero.averaged_gradients:
            self.zero.averaged_gradients[index] = None


class _Zero12Twins(Twins):
    """Copies become views into flat vectors laid out as their sources', so that one all-gather a group publishes them.

    Weights that every rank holds whole and that are made from sharded fp32 state cannot do without that gather; it is
    of the size of the one that DeepSpeed does for the student.
    """

    def __init__(self, partitions: Zero12, pairs: Mapping[str, tuple[Piece, nn.Parameter]]) -> None:
        self._rank = partitions.rank
        self._mirrors = [torch.zeros_like(flat) for flat in partitions.weight_flats]
        self._used: set[int] = set()
        self._runs: dict[str, Tensor] = {}
        for name, (piece, twin) in pairs.items():
            begin = _position(piece.parameter, partitions.weight_flats[piece.group])
            view = self._mirrors[piece.group].narrow(0, begin, twin.numel())
            view.copy_(twin.detach().view(-1))
            twin.data = view.view(twin.shape)
            self._runs[name] = view.narrow(0, piece.layout.offset, piece.layout.numel)
            self._used.add(piece.group)

    def weights(self, name: str) -> Tensor:
        """See Twins."""
        return self._runs[name]

    def publish(self, names: Iterable[str]) -> None:
        """See Twins; all of them at once."""
        for index in sorted(self._used):
            _gather_partitions(self._mirrors[index], self._rank)


def _gather_partitions(flat: Tensor, rank: Rank) -> None:
    """Every rank's partition of a flat vector to every rank, in place."""
    if rank.world > 1:
        dist.all_gather_into_tensor(flat, flat.chunk(rank.world)[rank.rank].clone())


def _within(parameter: nn.Parameter, flat: Tensor) -> bool:
    return flat.data_ptr() <= parameter.data_ptr() < flat.data_ptr() + flat.numel() * flat.element_size()


def _position(parameter: nn.Parameter, flat: Tensor) -> int:
    return (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()


def visit_after_update(zero: Any, partitions: Partitions, visit: Callable[[int], None]) -> None:
    """Calls visit(index) for each swapped sub-group of ZeRO-3 after its update, before it goes back to NVMe.

    Its fp32 weights are in memory then; to read them later would mean to read weights and moments from disk again.
    """
    release = zero._release_sub_group

    def release_after_visit(index: int, timer_names: Any) -> None:
        if partitions.swapped(index):
            visit(index)
        release(index, timer_names)

    zero._release_sub_group = release_after_visit
