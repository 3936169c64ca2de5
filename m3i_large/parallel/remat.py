"""Activation checkpointing: blocks recompute their activations in the backward pass instead of keeping them."""

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def rematerialize(blocks: Iterable[nn.Module], *, random: bool = False) -> None:
    """Wraps each block's forward in non-reentrant checkpointing.

    Applied before the engine is built, so that ZeRO-3's hooks, which gather a block's parameters, run again around the
    recomputation.

    `random`: something random happens in a block (drop path), so the generators' state is kept for the second pass.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=random)
