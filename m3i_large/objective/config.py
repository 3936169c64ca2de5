"""An objective as a list of terms; a term is a target, a posterior, what prevents collapse, and a weight."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TermName = Literal["intra", "inter", "category", "text"]
DENSE: tuple[TermName, ...] = ("intra", "inter")


class MixConfig(BaseModel):
    """Two images in one: own target view where the mask is set, the partner's other view elsewhere."""

    model_config = ConfigDict(extra="forbid")

    patch: int = Field(16, gt=0, description="side of a mask cell in pixels, a multiple of the encoder's token stride")
    ratio: float = Field(0.5, gt=0, lt=1, description="share of cells that show the own image")
    block: int | None = Field(None, ge=2, description="consecutive samples that exchange partners; default: one lane")


class TermConfig(BaseModel):
    """One addend of the loss, -log P(target | prediction).

    intra: dense features of the same view (Gaussian); inter: dense features of another view (Gaussian); category:
    the classifier's rows (Boltzmann over classes); text: the text tower (Boltzmann over the contrast batch).
    """

    model_config = ConfigDict(extra="forbid")

    name: TermName
    weight: float = Field(1.0, ge=0)
    decorrelation: float | None = Field(
        None, ge=0, description="lambda * D of the dense terms' anti-collapse part; default 15.36 (0.02 at D = 768)"
    )

    @model_validator(mode="after")
    def _check(self) -> "TermConfig":
        if self.name in DENSE:
            self.decorrelation = 15.36 if self.decorrelation is None else self.decorrelation
        elif self.decorrelation is not None:
            raise ValueError(f"decorrelation belongs to dense terms ({', '.join(DENSE)}), not to {self.name}")
        return self


class ObjectiveConfig(BaseModel):
    """M3I's objective: how inputs are mixed and which terms are summed."""

    model_config = ConfigDict(extra="forbid")

    mix: MixConfig = MixConfig()
    terms: list[TermConfig] = Field(
        default_factory=lambda: [TermConfig(name=n) for n in ("intra", "inter", "category", "text")]
    )

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError("terms is empty; needed: at least one of intra, inter, category, text")
        if len(set(names)) != len(names):
            raise ValueError(f"terms names one twice: {names}")
        return self

    def has(self, name: TermName) -> bool:
        """Whether the objective contains a term."""
        return any(term.name == name for term in self.terms)

    @property
    def dense(self) -> bool:
        """Whether any term predicts dense features, so that decoder and target are needed."""
        return any(term.name in DENSE for term in self.terms)
