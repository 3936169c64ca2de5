"""The import table of the README: who may import whom. Every import statement counts, lazy ones too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TASK = ("deepspeed", "torch.distributed", "m3i_large.parallel", "m3i_large.run")  # of fine-tuning
# layer -> what it must not import (prefixes of dotted names)
FORBIDDEN = {
    "kernels/m3i_kernels": ("m3i_large", "deepspeed"),
    "m3i_large/models": (
        "deepspeed",
        "torch.distributed",
        "m3i_large.objective",
        "m3i_large.data",
        "m3i_large.recipe",
        "m3i_large.parallel",
    ),
    "m3i_large/schedule.py": ("deepspeed", "torch", "m3i_large.recipe"),
    "m3i_large/objective": (
        "deepspeed",
        "torch.distributed",
        "m3i_large.models",
        "m3i_large.parallel",
        "m3i_large.recipe",
        "timm",
        "transformers",
    ),
    "m3i_large/data": (
        "deepspeed",
        "torch.distributed",
        "m3i_large.models",
        "m3i_large.objective",
        "m3i_large.parallel",
        "m3i_large.recipe",
    ),
    "m3i_large/parallel": ("m3i_large.models", "m3i_large.objective", "m3i_large.data", "m3i_large.recipe"),
    "m3i_large/ds_file.py": ("deepspeed", "torch", "m3i_large.parallel", "m3i_large.recipe"),
    "m3i_large/recipe.py": ("deepspeed", "m3i_large.parallel", "m3i_large.train", "m3i_large.build"),
    "m3i_large/plan": ("deepspeed", "torch.distributed", "m3i_large.parallel", "m3i_large.train"),
    "m3i_large/export": ("deepspeed", "torch.distributed", "m3i_large.build", "m3i_large.finetune", "m3i_large.train"),
    "m3i_large/finetune/detection": TASK,
    "m3i_large/finetune/classification": TASK,
    "m3i_large/finetune/segmentation": TASK,
    "m3i_large/pictures": ("deepspeed", "m3i_large.train", "m3i_large.loop", "m3i_large.report"),
    "m3i_large/report": ("deepspeed", "torch.distributed", "m3i_large.train", "m3i_large.loop", "m3i_large.build"),
    "m3i_large/watch.py": ("deepspeed", "torch.distributed", "m3i_large.train", "m3i_large.loop", "m3i_large.build"),
    "m3i_large/integrations": ("m3i_large.train", "m3i_large.objective", "m3i_large.data"),
    "m3i_large/build.py": ("deepspeed", "torch.distributed", "m3i_large.parallel"),
}
# modules that only these places may import
ONLY = {
    "deepspeed": ("m3i_large/parallel",),
    "triton": ("kernels/m3i_kernels",),
    "mmdet": ("m3i_large/integrations",),
    "mmengine": ("m3i_large/integrations",),
    "yaml": ("m3i_large/recipe_file.py",),
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reaches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def sources() -> list[Path]:
    return sorted(
        [
            *(ROOT / "m3i_large").rglob("*.py"),
            *(ROOT / "kernels/m3i_kernels").rglob("*.py"),
            *(ROOT / "launchers").rglob("*.py"),
        ]
    )


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_imports_nothing_above_it(layer: str) -> None:
    place = ROOT / layer
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files, f"{layer} does not exist"
    for path in files:
        wrong = [(n, f) for n in imported(path) for f in FORBIDDEN[layer] if reaches(n, f)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", ONLY)
def test_package_is_imported_in_one_place(package: str) -> None:
    users = [str(p.relative_to(ROOT)) for p in sources() if any(reaches(n, package) for n in imported(p))]
    assert all(user.startswith(ONLY[package]) for user in users), users


def test_launchers_hold_no_logic() -> None:
    for path in (ROOT / "launchers").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "sys.path" not in text and len(text.splitlines()) < 30, path
        local = {n for n in imported(path) if n.startswith("m3i")}
        assert local and all(n.startswith("m3i_large") for n in local), path


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("m3i_large.cli", ("torch", "numpy", "pydantic")),
        ("m3i_large.recipe", ("torch", "timm", "transformers")),
        ("m3i_large.report", ("deepspeed", "timm", "transformers", "torchvision")),
        ("m3i_large.watch", ("deepspeed", "timm", "transformers", "torchvision")),
    ],
)
def test_what_answers_at_once_imports_nothing_slow(module: str, without: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {without!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_lazy_packages_have_what_they_say() -> None:
    import m3i_large.models
    import m3i_large.objective

    for package in (m3i_large.models, m3i_large.objective):
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
            package.create_modle  # noqa: B018
