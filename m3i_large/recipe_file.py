"""Reading YAML files by name, with `extends` and dotted overrides: the one reader of YAML for recipes and studies."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Tag, ValidationError

from m3i_large.errors import UserError


def names_in(directory: Path) -> list[str]:
    """Stems of the YAML files of a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def header_of(path: Path) -> str:
    """The comment at the top of a YAML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


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


def read_extended(name: str, directory: Path, *, what: str) -> dict[str, Any]:
    """The values of a file by name or path, over those of the file that it `extends` (one level).

    A backbone of another name replaces the parent's whole: fields of one kind of model mean nothing to another.
    """
    path = locate(name, directory, what=what)
    values = read_yaml(path)
    if (base := values.pop("extends", None)) is None:
        return values
    parent = read_yaml(locate(str(base), directory, what=what))
    if "extends" in parent:
        raise UserError(f"{what}: {path} extends {base}, which extends {parent['extends']}; needed: one level")
    own = values.get("backbone", {}).get("name")
    if own and own != parent.get("backbone", {}).get("name"):
        parent.pop("backbone", None)
    return merge(parent, values)


def parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """`a.b=value` texts as (dotted key, YAML value); UserError on anything else."""
    layers = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override: got {override!r}; needed: key=value with a dotted key, such as train.steps=100")
        try:
            layers.append((key.strip(), yaml.safe_load(text)))
        except yaml.YAMLError:
            raise UserError(f"override {key}: {text!r} is not a YAML value") from None
    return layers


def yaml_text(values: dict[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.safe_dump(values, sort_keys=False)


def yaml_values(path: Path) -> dict[str, Any]:
    """What `yaml_text` wrote into a file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value at a dotted key, whose parts are keys or positions in lists; missing mappings are made."""
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
    parts, _ = _follow(first["loc"], model)
    where = ".".join(parts) or "values"
    got = first.get("input")
    if first["type"] == "extra_forbidden":
        _, parent = _follow(first["loc"][:-1], model)
        known = sorted(getattr(parent, "model_fields", {}))
        return f"{where}: unknown key{_nearest(parts[-1], known)}; needed: one of {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(got, dict | list | BaseModel) or first["type"] == "missing" else f" (got {got!r})"
    return f"{where}: {message}{shown}"


def _follow(location: tuple[int | str, ...], model: Any) -> tuple[list[str], Any]:
    """The location as a user writes it, without the tags of unions, and the model that is there."""
    shown: list[str] = []
    annotation = model
    for part in location:
        tagged = {
            tag.tag: option
            for option in getattr(annotation, "__args__", ())
            for tag in getattr(option, "__metadata__", ())
            if isinstance(tag, Tag)
        }
        if part in tagged:
            annotation = tagged[part]
            continue
        shown.append(str(part))
        if not isinstance(part, int):
            field = getattr(_model_in(annotation), "model_fields", {}).get(part)
            annotation = field.annotation if field else None
    return shown, _model_in(annotation)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, getattr(annotation, "__args__", ())) if m), None)
