"""What the objective needs of other ranks, as an argument: objective code never imports torch.distributed."""

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """Communication between the ranks that share one contrast batch."""

    rank: int
    world: int

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenates x (n, ...) of every rank along dim 0 in rank order -> (world * n, ...).

        Differentiable: the gradient of the result is summed over ranks, and each rank receives its own slice.
        """
        ...

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sums x over ranks into a new tensor. Not differentiable."""
        ...


class SingleProcess:
    """One rank: gathering and reducing change nothing."""

    rank = 0
    world = 1

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()
