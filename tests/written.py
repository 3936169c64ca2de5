"""Checkpoints of small models, written by two ranks through the real writer, without a training."""

from pathlib import Path
from typing import Any

import tiny
import torch
from states import at, memory_state
from torch import Tensor

from m3i_large.build import build_objective
from m3i_large.checkpoint import CheckpointWriter, find_checkpoint
from m3i_large.objective import Objective
from m3i_large.recipe import Recipe, validate

VIT: dict[str, Any] = {
    "backbone": {"name": "vit", "arch": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}}
}
# Every part of InternImage-H, and a pool as its official classifier has.
HUGE: dict[str, Any] = {
    "backbone": {
        "name": "internimage",
        "arch": {
            "channels": 16,
            "depths": [1, 1, 2, 1],
            "groups": [1, 2, 4, 8],
            "dw_kernel_size": 5,
            "res_post_norm": True,
            "level2_post_norm": [1],
            "center_feature_scale": True,
            "head": "pool",
            "bridge_width": 32,
            "image_size": 64,
        },
    },
    "pool": {"width": 768, "heads": 16},
    "data_image_size": 64,
}
# As sizes S to XL: layer scale and norms behind the branches.
LARGE: dict[str, Any] = {
    "backbone": {
        "name": "internimage",
        "arch": {
            "channels": 16,
            "depths": [1, 1, 1, 1],
            "groups": [1, 2, 4, 8],
            "layer_scale": 0.1,
            "post_norm": True,
            "offset_scale": 2.0,
            "bridge_width": 32,
            "image_size": 64,
        },
    },
    "pool": {"width": 32, "heads": 2},
    "data_image_size": 64,
}


def recipe_of(parts: dict[str, Any]) -> Recipe:
    """The tiny recipe with another backbone."""
    values = tiny.recipe(Path("/nowhere"))
    values |= {key: value for key, value in parts.items() if key != "data_image_size"}
    values["data"]["image_size"] = parts.get("data_image_size", 32)
    if values["backbone"]["name"].startswith("internimage"):
        values["objective"]["input"]["patch"] = 32
    return validate(values)


def perturbed(recipe: Recipe, seed: int = 1) -> Objective:
    """Towers whose every weight has moved, the target's by other amounts than the student's."""
    objective = build_objective(recipe)
    torch.manual_seed(seed)
    with torch.no_grad():
        for x in objective.parameters():
            x.add_(0.05 * torch.randn_like(x))
    return objective.eval()


def write(run: Path, parts: dict[str, Any], *, world: int = 2, step: int = 10) -> tuple[Objective, Recipe]:
    """A run directory with one checkpoint of `world` ranks; returns what it holds."""
    recipe = recipe_of(parts)
    objective = perturbed(recipe)
    whole: dict[str, Tensor] = {}
    for name, x in objective.named_parameters():
        whole[f"{'ema' if name.startswith('target') else 'master'}/{name}"] = x.detach()
    whole |= {f"exp_avg/{name}": torch.zeros_like(x) for name, x in objective.named_parameters() if x.requires_grad}
    whole |= {f"buffer/{n}": b for n, b in objective.named_buffers() if n in objective.state_dict()}
    manifest = {"recipe": recipe.to_dict(), "sampler": {"data": "0" * 64}, "applied_steps": step, "skip_steps": []}

    writers = [
        CheckpointWriter(run / "checkpoints", rank=at(rank, world), attempt=0, keep=2, background=False)
        for rank in range(world)
    ]
    for rank, writer in enumerate(writers):
        writer.save(step, state=memory_state(whole, rank=rank, world=world), manifest=manifest)
    for writer in writers:
        writer.wait()
        writer.__exit__()
    assert find_checkpoint(run).name == f"step_{step:08d}"
    return objective, recipe
