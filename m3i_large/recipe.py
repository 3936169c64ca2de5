"""A recipe: one experiment, the sum of the components' own configurations. The only reader of YAML.

Resolution order: the file named by `extends` (one level), the recipe itself, `scale=demo`, dotted overrides; then the
ready specs of sources that say `like: NAME` (specs/), under what the recipe sets.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from m3i_large.data.config import DataConfig
from m3i_large.errors import UserError
from m3i_large.guard import SpikeConfig
from m3i_large.models.config import BackboneConfig, DecoderConfig, PoolConfig, TextConfig
from m3i_large.objective.config import ObjectiveConfig
from m3i_large.optim import OptimConfig
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
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
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
    tensorboard: bool = True
    wandb_project: str | None = None

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

    name: str
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
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return names_in(RECIPES)


def names_in(directory: Path) -> list[str]:
    """Stems of the YAML files of a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def recipe_header(name: str) -> str:
    """The comment at the top of a shipped recipe."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe by name or path and applies overrides `a.b=value` (and `scale=demo`), in the order given.

    Raises UserError in one line: unknown recipe or key (naming the nearest), a wrong type, an inconsistent value.
    """
    values, layers = _read(name), []
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override: got {override!r}; needed: key=value with a dotted key, such as train.steps=100")
        layers.append((key.strip(), _parse(text, key)))
    for key, value in layers:
        if key == "scale":
            if value != "demo":
                raise UserError(f"scale: got {value!r}; needed: demo")
            values = _at_demo_scale(values)
    for key, value in layers:
        if key != "scale":
            _set(values, key, value)
    return validate(values)


def validate(values: dict[str, Any]) -> Recipe:
    """Builds a Recipe from plain values; the first problem becomes a UserError of one line."""
    values = _with_specs(values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(one_line(error, Recipe)) from None


def _parse(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: {text!r} is not a YAML value") from None


def locate(name: str, directory: Path, *, what: str) -> Path:
    """The file that `name` means: a YAML file, or one in `directory` by its stem; UserError naming the nearest."""
    known = names_in(directory)
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(
                f"{what}: got {name}, which does not exist; needed: a YAML file or one of {', '.join(known)}"
            )
        return path
    path = directory / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"{what}: got {name!r}{_nearest(name, known)}; needed: one of {', '.join(known)}")
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file, with its stem as `name` where it has none; UserError where it is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping; needed: keys and values")
    values.setdefault("name", path.stem)
    return values


def _read(name: str) -> dict[str, Any]:
    path = locate(name, RECIPES, what="recipe")
    values = read_yaml(path)
    if (base := values.pop("extends", None)) is None:
        return values
    parent = read_yaml(locate(str(base), RECIPES, what="recipe"))
    if "extends" in parent:
        raise UserError(f"recipe: {path} extends {base}, which extends {parent['extends']}; needed: one level")
    name = values.get("backbone", {}).get("name")
    if name and name != parent.get("backbone", {}).get("name"):
        parent.pop("backbone", None)  # fields of one kind of model mean nothing to another
    return _merge(parent, values)


def _with_specs(values: dict[str, Any]) -> dict[str, Any]:
    """Fills in sources that say `like: NAME` from the ready specs; what they set themselves wins."""
    data: Any = values.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, list) or not any(isinstance(s, dict) and "like" in s for s in sources):
        return values
    filled = []
    for source in sources:
        if isinstance(source, dict) and "like" in source:
            own = {key: value for key, value in source.items() if key != "like"}
            source = _merge(read_yaml(locate(str(source["like"]), SPECS, what="data.sources.like")), own)
        filled.append(source)
    return {**values, "data": {**data, "sources": filled}}


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _at_demo_scale(values: dict[str, Any]) -> dict[str, Any]:
    demo = _read("demo")
    scaled = {**values, **{key: demo[key] for key in DEMO_SCALE if key in demo}}
    # The mask's patch is a size in pixels of the demo's images; what is masked and predicted stays the recipe's.
    scaled["objective"] = _merge(values.get("objective", {}), {"input": {"patch": demo["objective"]["input"]["patch"]}})
    scaled["name"] = f"{values['name']}_demo"
    return scaled


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = values
    for name in parents:
        node = (
            node[int(name)]
            if isinstance(node, list) and name.isdigit() and int(name) < len(node)
            else _child(node, name, key)
        )
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override: {key} does not exist in the recipe")


def _child(node: Any, name: str, key: str) -> Any:
    if not isinstance(node, dict):
        raise UserError(f"override: {key} does not exist in the recipe")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of values that should have been a `model`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "values"
    got = first.get("input")
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1], model)
        return f"{where}: unknown key{_nearest(str(first['loc'][-1]), known)}; needed: one of {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(got, dict | list | BaseModel) or first["type"] == "missing" else f" (got {got!r})"
    return f"{where}: {message}{shown}"


def _fields_at(location: tuple[int | str, ...], model: Any) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        model = _model_in(field.annotation) if field else None
    return sorted(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, getattr(annotation, "__args__", ())) if m), None)
