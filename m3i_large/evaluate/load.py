"""From a run or checkpoint to a model that encodes, on the CPU, without DeepSpeed."""

from pathlib import Path

from m3i_large.build import build_objective
from m3i_large.checkpoint import MANIFEST, Checkpoint, newest
from m3i_large.errors import UserError
from m3i_large.objective import Objective
from m3i_large.recipe import Recipe, validate

BRANCHES = ("student", "target")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` is, or the newest one of the run directory that it is."""
    if (path / MANIFEST).is_file():
        return path
    if (found := newest(path / "checkpoints")) is not None:
        return found
    raise UserError(f"checkpoint: got {path}; needed: a run directory with a checkpoint, or a checkpoint directory")


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
    return build_objective(recipe).eval()


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
