"""A recipe: one experiment, the sum of the components' own configurations.

Resolution order: the file named by `extends` (one level), the recipe itself, `scale=demo`, dotted overrides; then the
ready specs of sources that say `like: NAME` (specs/), under what the recipe sets.
"""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from m3i_large.data.config import DataConfig
from m3i_large.errors import UserError
from m3i_large.guard import SpikeConfig
from m3i_large.models.config import BackboneConfig, DecoderConfig, PoolConfig, TextConfig
from m3i_large.objective.config import ObjectiveConfig
from m3i_large.optim import OptimConfig
from m3i_large.recipe_file import (
    header_of,
    locate,
    merge,
    names_in,
    one_line,
    parse_overrides,
    read_extended,
    read_yaml,
    set_dotted,
    yaml_text,
)
from m3i_large.schedule import MomentumConfig

RECIPES = Path(__file__).parent / "recipes"
SPECS = Path(__file__).parent / "specs"
# `scale=demo` takes these from recipes/demo.yaml: model size, data, batch and steps, so that only the objective stays.
DEMO_SCALE = ("backbone", "text", "decoder", "pool", "data", "train", "optim")


class TrainConfig(BaseModel):
    """Size and length of a run, precision, and how often things are written."""

    model_config = ConfigDict(extra="forbid")

    global_batch: int = Field(gt=0, description="N, samples per optimizer step")
    contrast_batch: int = Field(0, ge=0, description="samples that see each other as negatives; 0 = global_batch")
    micro_batch: int | None = Field(None, description="only asserts contrast_batch / number of ranks")
    contrast: Literal["direct", "cached"] = Field(
        "direct", description="rows pass the towers all at once, or chunk by chunk with the same losses and gradients"
    )
    chunk: int | None = Field(
        None, gt=0, description="cached: rows per rank and pass; default: at most 64 (docs/scale.md)"
    )
    steps: int | None = Field(None, gt=0, description="length in optimizer steps; replaces epochs")
    epochs: float | None = Field(None, gt=0, description="length in epochs of every source, weighted by its repeats")
    seed: int = Field(0, ge=0, description="of everything random: weights, order, crops, masks, partners")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="of the towers; auto: bf16 where the hardware has it. Masters, moments and averages stay fp32",
    )
    threads: int | None = Field(None, gt=0, description="CPU threads per rank; default: cores / local ranks")
    activation_checkpointing: bool = Field(True, description="recompute each block's activations in the backward pass")
    momentum_ema: MomentumConfig = MomentumConfig()
    checkpoint_every: int = Field(1000, gt=0, description="steps between checkpoints")
    checkpoint_keep: int = Field(2, gt=0, description="newest complete checkpoints kept")
    checkpoint_keep_every: int | None = Field(None, gt=0, description="checkpoints at its multiples stay for good")
    checkpoint_async: bool = Field(True, description="write a copy in memory while training goes on, where it fits")
    checkpoint_copy: str | None = Field(None, description="directory or URL that complete checkpoints are copied to")
    picture_every: int = Field(1000, ge=0, description="steps between pictures; 0 = none")
    signals_every: int = Field(50, gt=0, description="steps between collapse signals")
    log_every: int = Field(10, gt=0, description="steps between progress lines where there is no terminal")
    max_skipped: int = Field(5, gt=0, description="bad steps in a row after which the last good checkpoint is reloaded")
    max_reloads: int = Field(3, ge=0, description="reloads without a good step after which the run fails")
    skip_steps: list[int] = Field([], description="steps that are drawn but not applied")
    spike: SpikeConfig = SpikeConfig()
    timeout_s: float = Field(600.0, gt=0, description="a rank without progress for so long has hung")
    straggler: float = Field(1.3, gt=1, description="a rank is slow at so many times the median rank's time")
    report: bool = Field(True, description="write report.html when the run ends")
    tensorboard: bool = Field(
        True, description="also log to tensorboard/ of the run directory, where the package is installed"
    )
    wandb_project: str | None = Field(
        None, description="also log to this project of Weights & Biases; offline with WANDB_MODE=offline"
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.contrast_batch == 0:
            self.contrast_batch = self.global_batch
        if self.global_batch % self.contrast_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of contrast_batch {self.contrast_batch}"
            )
        if re.search(r"\?|://[^/]*:[^/]*@", self.checkpoint_copy or ""):
            raise ValueError("checkpoint_copy holds credentials; needed: a URL without, and them in the environment")
        if self.chunk is not None and self.contrast == "direct":
            raise ValueError(f"chunk: got {self.chunk} with contrast direct; needed: contrast cached, or no chunk")
        if self.steps is None and self.epochs is None:
            raise ValueError("neither steps nor epochs is set; needed: one of them")
        return self

    @property
    def accumulation(self) -> int:
        """A, micro-steps per optimizer step."""
        return self.global_batch // self.contrast_batch

    def micro_batch_at(self, world: int) -> int:
        """Rows per rank and micro-step on `world` ranks; UserError where it does not divide or is overridden."""
        if self.contrast_batch % world:
            need = [w for w in range(1, self.contrast_batch + 1) if self.contrast_batch % w == 0]
            raise UserError(
                f"train.contrast_batch: {self.contrast_batch} does not divide over {world} ranks; needed: one of {need}"
            )
        micro_batch = self.contrast_batch // world
        if self.micro_batch not in (None, micro_batch):
            raise UserError(
                f"train.micro_batch: got {self.micro_batch}, but contrast_batch {self.contrast_batch} on {world} ranks "
                f"makes it {micro_batch}; remove it or change train.contrast_batch"
            )
        return micro_batch


class Recipe(BaseModel):
    """One experiment."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="what the run is called; its directory is runs/<name>")
    backbone: BackboneConfig
    text: TextConfig = TextConfig()
    decoder: DecoderConfig = DecoderConfig()
    pool: PoolConfig = PoolConfig()
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _backbone_fits_the_objective(self) -> "Recipe":
        name, mask = self.backbone.name, self.objective.input.mask
        if name.startswith("internimage") and mask not in ("none", "mix"):
            raise ValueError(
                f"objective.input.mask {mask} leaves patches out, which {name} cannot; needed: none or mix"
            )
        if self.backbone.arch.get("drop_path"):
            raise ValueError("backbone.arch.drop_path is for fine-tuning; pre-training needs 0")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written into a run's recipe.yaml."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml_text(self.to_dict())


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return names_in(RECIPES)


def recipe_header(name: str) -> str:
    """The comment at the top of a shipped recipe."""
    return header_of(RECIPES / f"{name}.yaml")


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe by name or path and applies overrides `a.b=value` (and `scale=demo`), in the order given.

    Raises UserError in one line: unknown recipe or key (naming the nearest), a wrong type, an inconsistent value.
    """
    values = read_extended(name, RECIPES, what="recipe")
    layers = parse_overrides(overrides or [])
    for key, value in layers:
        if key == "scale":
            if value != "demo":
                raise UserError(f"scale: got {value!r}; needed: demo")
            values = _at_demo_scale(values)
    for key, value in layers:
        if key != "scale":
            set_dotted(values, key, value)
    return validate(values)


def validate(values: dict[str, Any]) -> Recipe:
    """Builds a Recipe from plain values; the first problem becomes a UserError of one line."""
    values = _with_specs(values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(one_line(error, Recipe)) from None


def _with_specs(values: dict[str, Any]) -> dict[str, Any]:
    """Fills in sources that say `like: NAME` from the ready specs; what they set themselves wins."""
    data: Any = values.get("data")
    if not isinstance(data, dict):
        return values
    given = {key: data[key] for key in ("sources", "heldout") if isinstance(data.get(key), list)}
    filled = {key: [_with_spec(source, key) for source in sources] for key, sources in given.items()}
    return {**values, "data": {**data, **filled}}


def _with_spec(source: Any, key: str) -> Any:
    if not isinstance(source, dict) or "like" not in source:
        return source
    own = {name: value for name, value in source.items() if name != "like"}
    return merge(read_yaml(locate(str(source["like"]), SPECS, what=f"data.{key}.like")), own)


def _at_demo_scale(values: dict[str, Any]) -> dict[str, Any]:
    demo = read_extended("demo", RECIPES, what="recipe")
    scaled = {**values, **{key: demo[key] for key in DEMO_SCALE if key in demo}}
    # The mask's patch is a size in pixels of the demo's images; what is masked and predicted stays the recipe's.
    scaled["objective"] = merge(values.get("objective", {}), {"input": {"patch": demo["objective"]["input"]["patch"]}})
    scaled["name"] = f"{values['name']}_demo"
    return scaled
