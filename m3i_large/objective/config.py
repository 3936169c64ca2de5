"""An objective as a list of terms. A term is -log P(target | prediction) of the paper's Eq. 3, and its fields are the
choices of that equation: which view the prediction is read from, what is predicted, by which encoder the target is
made, by which decoder the prediction, which distribution P is, what keeps the target from collapsing, and a weight.

Which of them fit together is checked here, when a recipe is read.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Mask = Literal["none", "random", "block", "mix"]
Target = Literal["pixels", "dense", "global", "category", "text"]
DENSE_TARGETS: tuple[Target, ...] = ("pixels", "dense")

# What METHOD section 5 reads a target as, where a recipe does not say otherwise: encoder, decoder, posterior, collapse.
DEFAULTS: dict[str, tuple[str, str, str, str]] = {
    "pixels": ("identity", "transformer", "gaussian", "none"),
    "dense": ("ema", "transformer", "gaussian", "decorrelation"),
    "global": ("ema", "pool", "boltzmann", "negatives"),
    "category": ("classifier", "pool", "boltzmann", "negatives"),
    "text": ("text_tower", "pool", "boltzmann", "negatives"),
}
# Names that say it all: M3I's four terms.
NAMED: dict[str, dict[str, str]] = {
    "intra": {"target": "dense", "view": "same"},
    "inter": {"target": "dense", "view": "other"},
    "category": {"target": "category"},
    "text": {"target": "text"},
}
ENCODERS: dict[str, tuple[str, ...]] = {
    "pixels": ("identity",),
    "dense": ("ema", "shared", "frozen"),
    "global": ("ema", "shared", "frozen"),
    "category": ("classifier",),
    "text": ("text_tower",),
}
DECODERS: dict[str, tuple[str, ...]] = {
    "pixels": ("transformer", "linear"),
    "dense": ("transformer", "linear"),
    "global": ("pool",),
    "category": ("pool",),
    "text": ("pool",),
}
NO_GEOMETRY = "has no positions, so it can predict a view only in its own patches, all of them visible"


class InputConfig(BaseModel):
    """The student's input: one view of the image, hidden in parts or mixed with another image (M3I section 3.4)."""

    model_config = ConfigDict(extra="forbid")

    view: Literal["target", "other"] = Field(
        "target", description="view shown without mixing; with mask mix the own part shows target, the partner's other"
    )
    mask: Mask = Field("mix", description="cells hidden: none, random ones, blocks of them, or filled by a partner")
    fill: Literal["drop", "token"] | None = Field(
        None, description="hidden cells of random and block: dropped before the encoder (default), or a learned token"
    )
    patch: int = Field(16, gt=0, description="side of a mask cell in pixels, a multiple of the encoder's token stride")
    ratio: float = Field(0.5, gt=0, lt=1, description="share of cells that stay visible (mix: that show the own image)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        hides = self.mask in ("random", "block")
        if self.fill is not None and not hides:
            raise ValueError(f"fill: got {self.fill} with mask {self.mask}; needed: mask random or block")
        if hides and self.fill is None:
            self.fill = "drop"
        if self.mask == "mix" and self.view != "target":
            raise ValueError("view: got other with mask mix, which shows both views; needed: no view, or another mask")
        return self

    @property
    def shows(self) -> tuple[str, ...]:
        """Views the student sees, of one image or the other."""
        return ("target", "other") if self.mask == "mix" else (self.view,)


class MixConfig(BaseModel):
    """Who is mixed with whom."""

    model_config = ConfigDict(extra="forbid")

    block: int | None = Field(None, ge=2, description="consecutive samples that exchange partners; default: one lane")


class PosteriorConfig(BaseModel):
    """P of Eq. 3: gaussian is a regression, boltzmann a softmax over candidates."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["gaussian", "boltzmann"] = Field(
        description="gaussian: a regression; boltzmann: a choice among candidates"
    )
    sigma: float | None = Field(None, gt=0, description="gaussian: |z - p|^2 / (2 sigma^2); default: divided by D only")
    tau: float | None = Field(None, gt=0, description="boltzmann, fixed temperature; text learns its own")
    negatives: Literal["local", "global", "classes"] | None = Field(
        None, description="boltzmann: candidates of this rank, of all ranks, or the classifier's rows"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = ("tau", "negatives") if self.kind == "gaussian" else ("sigma",)
        for name in wrong:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: got {getattr(self, name)} for a {self.kind} posterior, which has none")
        return self


class TermConfig(BaseModel):
    """One addend of the loss. `intra`, `inter`, `category` and `text` need only their name."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="key of its metrics")
    target: Target = Field(
        description="what is predicted: every patch's pixels or features, one feature of the image, its class, its text"
    )
    view: Literal["same", "other"] | None = Field(
        None, description="whether the student sees the view that is predicted, or the other one; images only"
    )
    encoder: Literal["identity", "ema", "shared", "frozen", "classifier", "text_tower"] = Field(
        description="what makes the target; default: ema for features, and the only possible one else"
    )
    decoder: Literal["transformer", "linear", "pool"] = Field(
        description="what makes the prediction; default: transformer for patches, pool for the rest"
    )
    posterior: PosteriorConfig
    collapse: Literal["none", "stop_gradient", "decorrelation", "negatives"] = Field(
        description="what keeps the target from becoming the same for all; default by target and posterior"
    )
    decorrelation: float | None = Field(
        None, ge=0, description="lambda * D of collapse decorrelation; default 15.36 (0.02 at D = 768)"
    )
    normalize_pixels: bool = Field(False, description="target pixels: mean 0, variance 1 in every patch")
    weight: float = Field(1.0, ge=0, description="factor of the term in the loss")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        values = {**NAMED.get(str(values.get("name")), {}), **values}
        if (target := values.get("target")) in DEFAULTS:
            encoder, decoder, posterior, collapse = DEFAULTS[str(target)]
            values = {"encoder": encoder, "decoder": decoder, "posterior": posterior, **values}
            if isinstance(values["posterior"], str):
                values["posterior"] = {"kind": values["posterior"]}
            kind = values["posterior"].get("kind") if isinstance(values["posterior"], dict) else None
            if target == "global" and kind == "gaussian":
                collapse = "stop_gradient"
            values.setdefault("collapse", collapse)
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        where = f"term {self.name}"
        for field, allowed in (("encoder", ENCODERS), ("decoder", DECODERS)):
            if (got := getattr(self, field)) not in allowed[self.target]:
                need = " or ".join(allowed[self.target])
                raise ValueError(f"{where}: {field} {got} cannot serve a {self.target} target; needed: {need}")
        if (self.view is None) != (self.target in ("category", "text")):
            need = "no view: every view of an image has its label" if self.view else "view same or other"
            raise ValueError(f"{where}: target {self.target} with view {self.view}; needed: {need}")
        self._check_posterior(where)
        self._check_collapse(where)
        if self.normalize_pixels and self.target != "pixels":
            raise ValueError(f"{where}: normalize_pixels belongs to target pixels, not to {self.target}")
        return self

    def _check_posterior(self, where: str) -> None:
        p = self.posterior
        if self.target in DENSE_TARGETS and p.kind != "gaussian":
            raise ValueError(f"{where}: a {self.target} target is a regression; needed: posterior gaussian")
        if self.target in ("category", "text") and p.kind != "boltzmann":
            raise ValueError(f"{where}: a {self.target} target is a choice; needed: posterior boltzmann")
        if self.target == "text" and p.tau is not None:
            raise ValueError(f"{where}: got tau {p.tau}, but the temperature between image and text is learned")
        if p.kind == "boltzmann":
            p.negatives = p.negatives or ("classes" if self.target == "category" else "global")
            if (p.negatives == "classes") != (self.target == "category"):
                raise ValueError(f"{where}: negatives {p.negatives} do not exist for a {self.target} target")
            if self.target == "category":
                p.tau = p.tau or 1.0
            if self.target == "global":
                p.tau = p.tau or 0.2

    def _check_collapse(self, where: str) -> None:
        fits = {
            "none": self.target == "pixels" or self.encoder == "frozen",
            "stop_gradient": self.encoder in ("ema", "shared") and self.posterior.kind == "gaussian",
            "decorrelation": self.target == "dense" and self.encoder in ("ema", "shared"),
            "negatives": self.posterior.kind == "boltzmann",
        }
        if not fits[self.collapse]:
            need = " or ".join(name for name, fit in fits.items() if fit)
            raise ValueError(
                f"{where}: collapse {self.collapse} does not fit target {self.target}, encoder {self.encoder}, "
                f"posterior {self.posterior.kind}; needed: {need}"
            )
        if self.collapse == "decorrelation":
            self.decorrelation = 15.36 if self.decorrelation is None else self.decorrelation
        elif self.decorrelation is not None:
            raise ValueError(f"{where}: decorrelation without collapse decorrelation (it is {self.collapse})")

    @property
    def dense(self) -> bool:
        """Whether something is predicted at every patch."""
        return self.target in DENSE_TARGETS


class ObjectiveConfig(BaseModel):
    """The student's input and the terms that are summed. The default is M3I."""

    model_config = ConfigDict(extra="forbid")

    input: InputConfig = InputConfig()
    mix: MixConfig = MixConfig()
    terms: list[TermConfig] = Field(
        default_factory=lambda: [TermConfig.model_validate({"name": name}) for name in NAMED]
    )
    frozen_checkpoint: str | None = Field(None, description="run or checkpoint of the targets with encoder frozen")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.terms:
            raise ValueError("terms is empty; needed: at least one, such as {name: intra}")
        names = [term.name for term in self.terms]
        if len(set(names)) != len(names):
            raise ValueError(f"terms names one twice: {names}")
        targets = [(term.target, term.view) for term in self.terms]
        for target, view in targets:
            if targets.count((target, view)) > 1:
                raise ValueError(f"terms predict target {target} twice{f' from view {view}' if view else ''}")
        for term in self.terms:
            self._check_term(term)
        choices: dict[str, set] = {
            "encoder": {t.encoder for t in self.terms if t.encoder in ("ema", "shared", "frozen")},
            "decoder": {t.decoder for t in self.terms if t.dense},
            "dense target": {t.target for t in self.terms if t.dense},
            "global view": {t.view for t in self.terms if t.target == "global"},
        }
        for what, used in choices.items():
            if len(used) > 1:
                raise ValueError(f"terms use more than one {what}: {', '.join(sorted(map(str, used)))}; needed: one")
        if (self.encoder == "frozen") != (self.frozen_checkpoint is not None):
            raise ValueError("frozen_checkpoint and a term with encoder frozen need each other")
        return self

    def _check_term(self, term: TermConfig) -> None:
        shown = {"same": "target", "other": "other", None: None}[term.view]
        if shown is not None and shown not in self.input.shows:
            raise ValueError(
                f"term {term.name}: view {term.view} needs an input that shows the {shown} view, "
                f"but input.view is {self.input.view}"
            )
        whole = self.input.mask == "none" or self.input.fill == "token"
        if term.decoder == "linear" and (term.view != "same" or not whole):
            raise ValueError(f"term {term.name}: decoder linear {NO_GEOMETRY}; needed: decoder transformer")

    def has(self, target: Target) -> bool:
        """Whether some term predicts this target."""
        return any(term.target == target for term in self.terms)

    @property
    def text_term(self) -> TermConfig:
        """The term that predicts texts; there must be one."""
        return next(term for term in self.terms if term.target == "text")

    @property
    def encoder(self) -> str | None:
        """How image features are made into targets: ema, shared or frozen; None where no term needs them."""
        return next((t.encoder for t in self.terms if t.encoder in ("ema", "shared", "frozen")), None)

    @property
    def dense(self) -> bool:
        """Whether any term predicts every patch, so that a decoder is needed."""
        return any(term.dense for term in self.terms)

    @property
    def pooled(self) -> bool:
        """Whether any term reads the attention pool."""
        return any(term.decoder == "pool" for term in self.terms)
