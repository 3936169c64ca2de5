"""Writes recipe_reference.md: every field of every recipe, from the models that read them.

`make docs` runs it; a test compares the page with what it would write.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from m3i_large.finetune.recipe import FinetuneRecipe
from m3i_large.models.config import InternImageConfig, ViTConfig
from m3i_large.recipe import Recipe

PAGE = Path(__file__).parent / "recipe_reference.md"
HEAD = """# Every recipe field

Made from the models that read a recipe ([docs/recipe_fields.py](recipe_fields.py)); `m3i recipes` lists the recipes,
[Write a recipe](write_a_recipe.md) says how they are put together. A field is changed on the command line by its dotted
name: `train.steps=100`, `data.sources.0.repeats=2`. Sizes are in the unit that is named; probabilities and shares are
from 0 to 1. Which defaults are the paper's and which are ours: [The paper](paper.md).
"""
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Pre-training\n"]
    parts += [section(path, model) for path, model in sections(Recipe, "", set())]
    parts.append("\n## `backbone.arch`\n\nFields of the backbone, by its name.\n")
    parts += [section(name, model) for name, model in (("vit*", ViTConfig), ("internimage*", InternImageConfig))]
    parts.append("\n## Fine-tuning\n\nRecipes of the launchers `finetune_*.py`.\n")
    parts += [section(path, model) for path, model in sections(FinetuneRecipe, "", set())]
    return "".join(parts)


def sections(model: type[BaseModel], path: str, seen: set[type]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those in it, each once, with the place of its fields."""
    if model in seen:
        return
    seen.add(model)
    yield path, model
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            listed = ".0" if get_origin(field.annotation) is list else ""
            yield from sections(inner, f"{path}.{name}{listed}".strip("."), seen)


def models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """Models that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from models_in(inner)


def section(path: str, model: type[BaseModel]) -> str:
    """A table of one model's fields."""
    about = re.sub(r" \(METHOD[^)]*\)", "", " ".join((model.__doc__ or "").split()))
    lines = [f"\n### {f'`{path}`' if path else 'At the top'}: {model.__name__}\n\n{about}\n"]
    lines.append("\n| field | values | default | what |\n|---|---|---|---|\n")
    lines += [row(name, field) for name, field in model.model_fields.items()]
    return "".join(lines)


def row(name: str, field: FieldInfo) -> str:
    """One field."""
    inner = list(models_in(field.annotation))
    what = field.description or (f"see {' or '.join(model.__name__ for model in inner)}" if inner else "")
    assert what, f"{name} has no description"
    values = "fields" if inner and get_origin(field.annotation) is not list else type_of(field.annotation)
    bounds = [f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in BOUNDS.items() if hasattr(m, key)]
    values = ", ".join([values, *bounds])
    return f"| `{name}` | {values} | {default_of(field)} | {what.replace('<', '&lt;')} |\n"


def type_of(kind: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_of(part) for part in inner)
    if origin in (list, tuple, dict):
        parts = [type_of(part) for part in inner if part is not Ellipsis]
        if origin is tuple and Ellipsis not in inner:
            return f"{len(parts)} x {parts[0]}" if len(set(parts)) == 1 else f"[{', '.join(parts)}]"
        return "mapping" if origin is dict else f"list of {parts[0]}"
    if hasattr(kind, "__metadata__"):  # Annotated
        bounds = [
            f"{sign} {getattr(m, key)}" for m in kind.__metadata__ for key, sign in BOUNDS.items() if hasattr(m, key)
        ]
        return ", ".join([type_of(inner[0]), *bounds])
    words = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return words.get(kind, "fields" if isinstance(kind, type) and issubclass(kind, BaseModel) else "any")


def default_of(field: FieldInfo) -> str:
    """A default as YAML would have it."""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "needed"
    if isinstance(default, BaseModel) or (isinstance(default, list) and default and isinstance(default[0], BaseModel)):
        return "its own"
    words = {None: "null", True: "true", False: "false"}
    shown = words[default] if default is None or isinstance(default, bool) else default
    return f"`{list(shown) if isinstance(shown, tuple) else shown}`" if shown != "" else "empty"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
