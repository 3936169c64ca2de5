"""One branch of a checkpoint, student or target: its tensors are read when they are asked for, at any world size."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_large.checkpoint import Checkpoint, find_checkpoint
from m3i_large.errors import UserError
from m3i_large.recipe import Recipe, validate

BRANCHES = ("student", "target")
BRIDGE = ("dcnv3_head_x4.", "dcnv3_head_x3.")
# What a backbone holds for pre-training alone.
PRETRAINING = ("mask_token", *BRIDGE)


class Branch:
    """The backbone of a checkpoint and what stands on it.

    Args:
        path: run or checkpoint directory.
        branch: `student`, or `target` for its moving average.

    Raises:
        UserError: no checkpoint there, a damaged one, no such branch.
    """

    def __init__(self, path: Path, *, branch: str) -> None:
        if branch not in BRANCHES:
            raise UserError(f"--branch: got {branch!r}; needed: {' or '.join(BRANCHES)}")
        self.branch = branch
        self.saved = Checkpoint(find_checkpoint(path))
        self.recipe: Recipe = validate(self.saved.manifest["recipe"])
        self._prefix = "ema/target." if branch == "target" else "master/student."
        if not self.saved.keys(self._prefix):
            raise UserError(f"--branch: {self.saved.directory} was trained without a target encoder; needed: student")

    @property
    def run(self) -> Path:
        """The run directory that the checkpoint lies in, if it lies in one."""
        return self.saved.directory.parent.parent

    @property
    def arch(self) -> dict[str, Any]:
        """Arguments of create_model beside its name; what is for pre-training alone left out."""
        arch = {key: value for key, value in self.recipe.backbone.arch.items() if key != "mask_token"}
        return arch | {"image_size": self.recipe.data.image_size}

    def backbone(self, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """The backbone's tensors under their names, without bridge and mask token."""
        return {name: x for name, x in self.encoder(dtype=dtype).items() if not name.startswith(PRETRAINING)}

    def encoder(self, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """The whole encoder's tensors, in the order of the module."""
        tower = "target" if self.branch == "target" else "student"
        return self._read({self._prefix: "", f"buffer/{tower}.": ""}, dtype=dtype)

    def pool(self, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """The attention pool's tensors; of the student where the target has none of its own. Empty without a pool."""
        average = self.branch == "target" and self.saved.keys("ema/target_pool.")
        return self._read({"ema/target_pool." if average else "master/pool.": ""}, dtype=dtype)

    def part(self, name: str, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """Another module of the training, such as `category_head` or `decoder`; empty where there is none."""
        return self._read({f"master/{name}.": ""}, dtype=dtype)

    def _read(self, prefixes: dict[str, str], *, dtype: torch.dtype) -> dict[str, Tensor]:
        found = {}
        for prefix, new in prefixes.items():
            for key in self.saved.keys(prefix):
                tensor = self.saved.read_full(key)
                found[new + key.removeprefix(prefix)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
                self.saved.release()
        return found
