"""From a run or checkpoint to a model that encodes, on the CPU, without DeepSpeed."""

from pathlib import Path
from typing import Any

from m3i_large.build import build_objective
from m3i_large.checkpoint import Checkpoint, find_checkpoint
from m3i_large.errors import UserError
from m3i_large.export.branch import BRANCHES, PRETRAINING
from m3i_large.export.weights import compare, read_weights
from m3i_large.models.factory import model_config
from m3i_large.objective import Objective
from m3i_large.recipe import Recipe, validate


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
