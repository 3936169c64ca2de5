"""AdamW and its schedule as a recipe says them; no decay on biases, norms and other one-dimensional tensors."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from m3i_large.schedule import LearningRateConfig


class OptimConfig(BaseModel):
    """AdamW and its schedule; the defaults are SiameseIM's published ViT-B recipe, as the paper is silent here."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["torch", "deepspeed", "apex"] = Field("torch", description="whose AdamW; the same formula")
    lr: LearningRateConfig = LearningRateConfig()
    betas: tuple[float, float] = Field((0.9, 0.95), description="of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.05,
        ge=0,
        description="times the learning rate, of matrices and kernels; none on biases, norms and other 1-D tensors",
    )
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: matrices and kernels yes, anything with a single dimension above 1 no."""
    return sum(size > 1 for size in shape) > 1 and not name.endswith(("pos_embed", "cls_token"))
