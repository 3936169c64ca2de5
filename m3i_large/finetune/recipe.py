"""A fine-tuning recipe: task, backbone, optimizer and length. `--weights` and `--data` of the launchers complete it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, ValidationError, model_validator

from m3i_large.errors import UserError
from m3i_large.finetune.classification.config import ClassificationConfig
from m3i_large.finetune.detection.config import DetectionConfig
from m3i_large.finetune.segmentation.config import SegmentationConfig
from m3i_large.optim import OptimConfig
from m3i_large.recipe_file import header_of, names_in, one_line, parse_overrides, read_extended, set_dotted, yaml_text

RECIPES = Path(__file__).parent / "recipes"


class FinetuneBackbone(BaseModel):
    """The backbone that is fine-tuned; an export's card says which one it is, so most recipes leave the name out."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, description="of create_model; null: that of the weights, any other must agree")
    arch: dict[str, Any] = Field(default_factory=dict, description="fields of the model that differ, e.g. drop_path")
    init: Literal["weights", "random"] = Field("weights", description="random: the same network, untrained")


class FinetuneOptimConfig(OptimConfig):
    """AdamW with a learning rate that falls from head to stem."""

    betas: tuple[float, float] = Field((0.9, 0.999), description="of the two moments")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor from one layer to the one before it; 1: none")
    offset_scale: float = Field(1.0, gt=0, description="a further factor for InternImage's offsets (dcn_lr_mul)")


class FinetuneTrainConfig(BaseModel):
    """Size and length of a fine-tuning, precision, and how often things are written and measured."""

    model_config = ConfigDict(extra="forbid")

    global_batch: PositiveInt = Field(description="images per optimizer step, over all ranks and micro-steps")
    accumulation: PositiveInt = Field(1, description="micro-steps per optimizer step")
    steps: PositiveInt | None = Field(None, description="length in optimizer steps; replaces epochs")
    epochs: float | None = Field(None, gt=0, description="length in epochs of the training split")
    seed: int = Field(0, ge=0, description="of everything random")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="bf16: autocast over fp32 weights")
    threads: PositiveInt | None = Field(None, description="CPU threads per rank; default: cores / local ranks")
    workers: int = Field(4, ge=0, description="threads per rank that read and transform images; 0: none")
    activation_checkpointing: bool = Field(True, description="recompute each block's activations in the backward pass")
    ema: float = Field(0.9999, ge=0, lt=1, description="momentum of the weights' average; 0: none")
    eval_batch: PositiveInt = Field(1, description="images per rank that are evaluated at once")
    evaluate_every: PositiveInt | None = Field(None, description="steps between evaluations; null: at the end only")
    checkpoint_every: PositiveInt = Field(1000, description="steps between checkpoints")
    checkpoint_keep: PositiveInt = Field(2, description="newest complete checkpoints kept")
    checkpoint_keep_every: PositiveInt | None = Field(None, description="checkpoints at its multiples stay for good")
    checkpoint_async: bool = Field(True, description="write a copy in memory while training goes on, where it fits")
    checkpoint_copy: str | None = Field(None, description="directory or URL that complete checkpoints are copied to")
    log_every: PositiveInt = Field(10, description="steps between progress lines where there is no terminal")
    max_skipped: PositiveInt = Field(5, description="steps in a row with gradients that are not finite")
    timeout_s: float = Field(1800.0, gt=0, description="a rank without progress for so long has hung")
    report: bool = Field(True, description="write report.html when the run ends")
    tensorboard: bool = Field(
        True, description="also log to tensorboard/ of the run directory, where the package is installed"
    )
    wandb_project: str | None = Field(
        None, description="also log to this project of Weights & Biases; offline with WANDB_MODE=offline"
    )

    @model_validator(mode="after")
    def _check(self) -> "FinetuneTrainConfig":
        if self.global_batch % self.accumulation:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of accumulation {self.accumulation}")
        if self.steps is None and self.epochs is None:
            raise ValueError("neither steps nor epochs is set; needed: one of them")
        return self


def _kind_of_task(value: Any) -> str:
    """Recipes of detection may leave `kind` out; an unknown one is refused as one of detection."""
    kind = value.get("kind", "detection") if isinstance(value, dict) else value.kind
    return kind if kind in ("classification", "segmentation") else "detection"


Task = Annotated[
    Annotated[DetectionConfig, Tag("detection")]
    | Annotated[ClassificationConfig, Tag("classification")]
    | Annotated[SegmentationConfig, Tag("segmentation")],
    Discriminator(_kind_of_task),
]


class FinetuneRecipe(BaseModel):
    """One fine-tuning."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="what the run is called; its directory is runs/<name>")
    task: Task = DetectionConfig()
    backbone: FinetuneBackbone = FinetuneBackbone()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    train: FinetuneTrainConfig
    weights: str | None = Field(None, description="exported file; the launcher's --weights")
    data: str | None = Field(None, description="directory of the data set; the launcher's --data")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written into a run's recipe.yaml."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml_text(self.to_dict())


def finetune_recipe_names() -> list[str]:
    """Names of the fine-tuning recipes that ship with the package."""
    return names_in(RECIPES)


def finetune_recipe_header(name: str) -> str:
    """The comment at the top of a shipped fine-tuning recipe."""
    return header_of(RECIPES / f"{name}.yaml")


def load_finetune_recipe(name: str, overrides: list[str] | None = None) -> FinetuneRecipe:
    """Reads a fine-tuning recipe by name or path and applies overrides `a.b=value`; UserError in one line."""
    values = read_extended(name, RECIPES, what="recipe")
    for key, value in parse_overrides(overrides or []):
        set_dotted(values, key, value)
    return validate_finetune(values)


def validate_finetune(values: dict[str, Any]) -> FinetuneRecipe:
    """Builds a FinetuneRecipe from plain values; the first problem becomes a UserError of one line."""
    try:
        return FinetuneRecipe.model_validate(values)
    except ValidationError as error:
        raise UserError(one_line(error, FinetuneRecipe)) from None
