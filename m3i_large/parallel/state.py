"""Training state as named runs of flattened tensors: what a rank holds of it, and what a checkpoint stores.

State may be larger than memory (optimizer states on disk), so it is visited in groups, one at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """This rank's run of one named tensor, without its values: elements [offset, offset + numel) of the flattened
    whole of `shape`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    numel: int


@dataclass(frozen=True)
class Slice:
    """This rank's run of one named tensor: a flat, writable view and where it lies in the flattened whole."""

    shape: tuple[int, ...]
    offset: int
    values: Tensor

    @property
    def layout(self) -> Layout:
        """The same without values."""
        return Layout(self.shape, self.values.dtype, self.offset, self.values.numel())


class State(Protocol):
    """Named slices in groups."""

    def layout(self) -> Mapping[str, Layout]:
        """Every tensor in the order of `groups`, without reading any values. Costs no I/O."""
        ...

    def groups(self, *, write: bool = False) -> Iterator[Mapping[str, Slice]]:
        """The slices, one group after the other; every name is in exactly one.

        A group's values are valid until the next one is asked for. With `write`, values written into a group become
        the state when the next one is asked for, or the last one ends; without, they must not be changed.
        """
        ...


class MemoryState:
    """State that lies in memory as it is: one group."""

    def __init__(self, slices: Mapping[str, Slice]) -> None:
        self._slices = slices

    def layout(self) -> dict[str, Layout]:
        """See State."""
        return {name: piece.layout for name, piece in self._slices.items()}

    def groups(self, *, write: bool = False) -> Iterator[Mapping[str, Slice]]:
        """See State; what is written is the state at once."""
        yield self._slices


class JoinedState:
    """Several states as one; their names must differ."""

    def __init__(self, parts: Sequence[State]) -> None:
        self._parts = parts

    def layout(self) -> dict[str, Layout]:
        """See State."""
        joined: dict[str, Layout] = {}
        for part in self._parts:
            layout = part.layout()
            if twice := joined.keys() & layout.keys():
                raise ValueError(f"state: two parts hold {sorted(twice)[0]}")
            joined |= layout
        return joined

    def groups(self, *, write: bool = False) -> Iterator[Mapping[str, Slice]]:
        """See State."""
        for part in self._parts:
            yield from part.groups(write=write)
