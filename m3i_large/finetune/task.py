"""What a task gives the fine-tuning loop. The loop knows nothing of boxes, classes or masks; a task nothing of ranks,
steps, precision or checkpoints.

Every random choice of a sample is drawn from the generator that the loop hands in, keyed by (seed, epoch, index), so
that a run that continues, or continues on another number of ranks, trains on the same images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


class Samples(Protocol):
    """One split of a data set."""

    def __len__(self) -> int: ...

    def read(self, index: int, rng: np.random.Generator | None) -> Any:
        """Sample `index`, augmented by draws from `rng`; as it is evaluated where that is None."""
        ...

    def repeats(self) -> np.ndarray | None:
        """How often each sample counts in an epoch, float64 >= 1 (LVIS); None: once each."""
        ...


class Batch(Protocol):
    """A collated micro-batch of one rank."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch": ...


class TaskModel(nn.Module):
    """Backbone and head.

    In training mode `model(batch)` returns {name: scalar loss}, already weighted, so that their sum is trained; in
    evaluation mode a list with one prediction, on the CPU, for each of the batch's samples in order. `model.backbone`
    is the pre-trained part, and the only attribute of that name.
    """

    backbone: nn.Module

    def forward(self, batch: Any) -> dict[str, Tensor] | list[Any]:
        raise NotImplementedError


class Task(Protocol):
    """A data set, a model and its scores; built by the task's package from its own config, data directory and seed."""

    @property
    def train(self) -> Samples: ...

    @property
    def evaluated(self) -> Samples: ...

    @property
    def notes(self) -> list[str]:
        """Lines about the data that are told once at the start, such as what was left out."""
        ...

    def build(self, backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> TaskModel:
        """The model around a backbone from `create_model`, weights of the rest freshly drawn.

        mean, std: of the pixels (0 to 1, RGB) that the backbone was trained on; batches hold uint8 images.
        """
        ...

    def collate(self, samples: Sequence[Any], rng: np.random.Generator | None) -> Batch:
        """One rank's micro-batch; `rng` for what mixes samples, keyed by (seed, step, micro_step); None: evaluation."""
        ...

    def digest(self, index: int, prediction: Any) -> Any:
        """What `score` needs of the prediction for sample `index` of `evaluated`; small, as one rank gathers all."""
        ...

    def score(self, digests: Mapping[int, Any], directory: Path) -> dict[str, float]:
        """Scores {index in `evaluated`: digest}, of all of them, and writes result files into `directory`."""
        ...
