"""From a run, a checkpoint or an exported file to a model that encodes, without DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3i_large.build import build_objective
from m3i_large.checkpoint import Checkpoint, find_checkpoint
from m3i_large.errors import UserError
from m3i_large.export.branch import BRANCHES, PRETRAINING
from m3i_large.export.weights import compare, read_weights
from m3i_large.models.factory import create_model, model_config
from m3i_large.objective import Objective
from m3i_large.recipe import Recipe, validate


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model that is evaluated.

    Attributes:
        backbone: in fp32, evaluation mode.
        image_size: side of the pictures, pixels.
        mean, std: of their pixels (0 to 1, RGB).
        device: of the model.
        objective, recipe: of a run: pool, heads and texts; None for an exported backbone, which has none.
    """

    backbone: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    objective: Objective | None = None
    recipe: Recipe | None = None

    def tokens(self, pixels_NHWC: Tensor) -> Tensor:
        """uint8 pixels -> (N, L, D): the objective's tokens of the student, or a backbone's last map."""
        image_NCHW = as_image(pixels_NHWC.to(self.device), mean=self.mean, std=self.std)
        if self.objective is not None:
            return self.objective.student.tokens(image_NCHW)
        return self.backbone(image_NCHW)[-1].flatten(2).transpose(1, 2)

    def pool(self, token_NLD: Tensor) -> Tensor:
        """Attention pool, or the mean where there is none -> (N, E)."""
        pool = self.objective.pool if self.objective is not None else None
        return token_NLD.mean(1) if pool is None else pool(token_NLD)


def as_image(pixels_NHWC: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 pixels -> (N, 3, H, W), float32, normalised: a whole picture as an encoder is shown it."""
    centre, spread = (torch.tensor(values, device=pixels_NHWC.device) for values in (mean, std))
    return ((pixels_NHWC.float() / 255 - centre) / spread).permute(0, 3, 1, 2).contiguous()


def load_encoders(path: Path, *, branch: str = "student", device: torch.device | None = None) -> dict[str, Encoder]:
    """The model of a run, a checkpoint or an exported file as `values`, and as it was before training as `untrained`.

    Args:
        device: None: a GPU where there is one.

    Raises:
        UserError: as `load_trained` and `read_weights`.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.is_file() or (path / "config.json").is_file():
        weights = read_weights(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            networks = {"values": weights.build(), "untrained": create_model(weights.name, **weights.arch)}
        pixels = {"image_size": weights.arch["image_size"], "mean": weights.mean, "std": weights.std}
        return {k: Encoder(backbone=x.eval().to(device), device=device, **pixels) for k, x in networks.items()}
    recipe, trained = load_trained(path, branch=branch)
    pixels = {"image_size": recipe.data.image_size, "mean": recipe.data.mean, "std": recipe.data.std}
    towers = {"values": trained.to(device), "untrained": load_untrained(recipe).to(device)}
    return {
        name: Encoder(backbone=tower.student, objective=tower, recipe=recipe, device=device, **pixels)
        for name, tower in towers.items()
    }


def load_trained(path: Path, *, branch: str = "student") -> tuple[Recipe, Objective]:
    """Recipe and towers (fp32, evaluation mode) of a checkpoint, from its master weights.

    Args:
        path: run or checkpoint directory.
        branch: `student`, or `target` to put the moving average in the student's place.

    Raises:
        UserError: no checkpoint there, a damaged one, or one of another model; no such branch.
    """
    if branch not in BRANCHES:
        raise UserError(f"branch: got {branch!r}; needed: {' or '.join(BRANCHES)}")
    saved = Checkpoint(find_checkpoint(path))
    recipe = validate(saved.manifest["recipe"])
    objective = build_objective(recipe)
    if recipe.objective.encoder == "frozen":  # checkpoints do not repeat it, and nothing but training needs it
        objective.target = objective.target_pool = None
    state = {key.removeprefix("master/"): saved.read_full(key) for key in saved.keys("master/")}
    average = {key.removeprefix("ema/"): saved.read_full(key) for key in saved.keys("ema/")}
    state |= average | {key.removeprefix("buffer/"): saved.read_full(key) for key in saved.keys("buffer/")}
    if branch == "target":
        if not average:
            raise UserError(f"branch: {path} was trained without a target encoder; needed: student")
        copies = {"target": "student", "target_pool": "pool"}
        for name, value in average.items():
            copy, _, rest = name.partition(".")
            state[f"{copies[copy]}.{rest}"] = value
    try:
        objective.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint: {saved.directory} does not fit its own recipe: {str(error).splitlines()[1].strip()}"
        ) from None
    return recipe, objective.eval()


def load_untrained(recipe: Recipe) -> Objective:
    """The same towers as they were before the first step."""
    objective = build_objective(recipe)
    load_start(objective, recipe)
    return objective.eval()


def load_start(objective: Objective, recipe: Recipe) -> None:
    """Fills the student, and what is copied from it, from the file that the recipe starts from, where it names one.

    Raises:
        UserError: the file is no backbone, or another one than the recipe's.
    """
    if recipe.backbone.weights is None:
        return
    read = read_weights(Path(recipe.backbone.weights))
    student: Any = objective.student
    arch = {**recipe.backbone.arch, "image_size": student.image_size}
    here, there = (_function(*model) for model in ((recipe.backbone.name, arch), (read.name, read.arch)))
    if changed := [key for key in here if here.get(key) != there.get(key)]:
        got, need = there.get(changed[0]), here[changed[0]]
        raise UserError(
            f"backbone.weights: {read.path} is a {read.name} with {changed[0]} {got}; needed: the recipe's {need}"
        )
    tensors = read.build(image_size=student.image_size).state_dict()
    own = {key: x.shape for key, x in student.state_dict().items() if not key.startswith(PRETRAINING)}
    compare(own, tensors, what=f"backbone.weights: {read.path}")
    for tower in (student, objective.target):
        if tower is not None:
            tower.load_state_dict(tensors, strict=False)  # bridge and mask token stay as they were drawn


def _function(name: str, arch: dict[str, Any]) -> dict[str, Any]:
    """The fields of a backbone that decide what its tensors compute, at any image size."""
    config = model_config(name, **arch)
    other = {"image_size", "drop_path", "mask_token", "bridge_width", "head"}
    return {"kind": type(config).__name__, **config.model_dump(exclude=other)}


def load_frozen(objective: Objective, path: Path) -> None:
    """Fills the frozen target encoder (and its pool) with the moving average of another run, or its student.

    Raises:
        UserError: no checkpoint there, or one of another backbone.
    """
    saved = Checkpoint(find_checkpoint(path))
    for copy, source in (("target", "student"), ("target_pool", "pool")):
        module = getattr(objective, copy)
        if module is None:
            continue
        prefix = next((p for p in (f"ema/{copy}.", f"master/{source}.") if saved.keys(p)), None)
        state = {key.removeprefix(prefix): saved.read_full(key) for key in saved.keys(prefix)} if prefix else {}
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            detail = str(error).splitlines()[1].strip()
            raise UserError(
                f"objective.frozen_checkpoint: {saved.directory} holds no {source} like the recipe's: {detail}"
            ) from None
