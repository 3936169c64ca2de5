"""The model card beside an exported file: where the weights come from, as JSON for people and for our own readers."""

from pathlib import Path
from typing import Any

import torch

from m3i_large.checkpoint.reader import sha256
from m3i_large.export.branch import Branch
from m3i_large.export.files import tensor_file
from m3i_large.export.keys import Tensors
from m3i_large.metrics import package_versions, read_metrics
from m3i_large.recipe import Recipe

UNKNOWN_LICENCE = "not stated in the recipe: that of the source"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def described(path: Path, tensors: Tensors, *, layout: str, name: str, arch: dict[str, Any]) -> dict[str, Any]:
    """What every card has: {layout, backbone, dtype, tensors, parameters, bytes, sha256, versions}."""
    file = tensor_file(path)
    floats = {x.dtype for x in tensors.values() if x.is_floating_point()}
    return {
        "layout": layout,
        "backbone": {"name": name, "arch": arch},
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats)),
        "tensors": len(tensors),
        "parameters": sum(x.numel() for x in tensors.values()),
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "versions": package_versions(),
    }


def trained(branch: Branch) -> dict[str, Any]:
    """What the training adds: {branch, step, steps, losses, data, licence, mean, std, recipe}."""
    recipe, manifest = branch.recipe, branch.saved.manifest
    return {
        "branch": branch.branch,
        "step": branch.saved.step,
        "steps": recipe.train.steps,
        "losses": _last_losses(branch),
        "data": manifest["sampler"]["data"],
        "licence": licences(recipe),
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "recipe": recipe.to_dict(),
    }


def licences(recipe: Recipe) -> dict[str, str]:
    """Licence of each source of the data."""
    return {source.name: source.licence or UNKNOWN_LICENCE for source in recipe.data.sources}


def _last_losses(branch: Branch) -> dict[str, float]:
    """Losses of the last step before the checkpoint, where its run's metrics are beside it."""
    rows = [row for row in read_metrics(branch.run) if row["step"] < branch.saved.step]
    return {k: v for k, v in rows[-1].items() if k == "loss" or k.startswith("loss/")} if rows else {}
