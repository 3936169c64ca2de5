"""`m3i export`: one branch of a checkpoint in a consumer's layout, with a model card; no GPU, no DeepSpeed."""

from pathlib import Path
from typing import Any

from m3i_large.errors import UserError
from m3i_large.export.branch import Branch
from m3i_large.export.card import DTYPES, described, trained
from m3i_large.export.files import card_path, save_pth, save_safetensors, whole
from m3i_large.export.hub import hub_config, preprocessor_config
from m3i_large.export.keys import Tensors
from m3i_large.export.layouts import VIT, Layout, check_kind, find_layout, official_head, pretraining_tensors
from m3i_large.export.weights import compare, resized, shapes_of
from m3i_large.metrics import write_json


def export(
    path: Path,
    *,
    to: str,
    out: Path | None = None,
    branch: str = "student",
    dtype: str = "fp32",
    image_size: int | None = None,
    with_head: bool = False,
    force: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Writes a branch of a run or checkpoint in a layout.

    Args:
        path: run or checkpoint directory, of any number of ranks and any ZeRO stage.
        to: name of a layout (LAYOUTS).
        out: file, or directory for `hf`; default: <run or checkpoint>/export/<backbone>_<branch>_<layout>.
        branch: `student`, or `target` for its moving average.
        dtype: fp32 or bf16.
        image_size: a Vision Transformer's position table is resized to it; an InternImage takes any size.
        with_head: also the official classifier, where the layout has one.
        force: replace what is at `out`.

    Returns:
        The file or directory, and its model card.

    Raises:
        UserError: one line about what does not fit; nothing was written then.
    """
    layout = find_layout(to)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: got {dtype!r}; needed: {' or '.join(DTYPES)}")
    if with_head and not layout.head:
        raise UserError(f"--with-head: the layout {layout.name} has none; needed: internimage, or no head")
    source = Branch(path, branch=branch)
    name = source.recipe.backbone.name
    kind = check_kind(layout, name)
    arch = source.arch
    out = out or _default_out(path, source, layout)
    with whole(out, force=force) as temporary:
        if layout.whole:
            tensors = pretraining_tensors(source, dtype=DTYPES[dtype])
        else:
            backbone = source.backbone(dtype=DTYPES[dtype])
            compare(shapes_of(name, arch), backbone, what=f"checkpoint {source.saved.directory}")
            if image_size is not None and image_size != arch["image_size"]:
                if kind == VIT:
                    backbone["pos_embed"] = resized(backbone["pos_embed"], name, arch, image_size)
                arch = arch | {"image_size": image_size}
            tensors = layout.tensors(backbone, kind)
        if with_head:
            tensors |= official_head(source, dtype=DTYPES[dtype])
        _write(temporary, tensors, layout, name=name, arch=arch, source=source)
        card = described(temporary, tensors, layout=layout.name, name=name, arch=arch) | trained(source)
        card["head"] = with_head or layout.whole
        write_json(card_path(out) if not temporary.is_dir() else card_path(temporary), card)
    return out, card


def _default_out(path: Path, source: Branch, layout: Layout) -> Path:
    directory = path / "export"
    directory.mkdir(exist_ok=True)
    return directory / f"{source.recipe.backbone.name}_{source.branch}_{layout.name}{layout.suffix}"


def _write(path: Path, tensors: Tensors, layout: Layout, *, name: str, arch: dict[str, Any], source: Branch) -> None:
    if layout.suffix == ".pth":
        save_pth(path, tensors, wrapper=layout.wrapper)
    elif layout.suffix:
        save_safetensors(path, tensors, metadata={"format": "pt"})
    else:
        path.mkdir()
        write_json(path / "config.json", hub_config(name, arch, tensors))
        data = source.recipe.data
        write_json(path / "preprocessor_config.json", preprocessor_config(arch["image_size"], data.mean, data.std))
        save_safetensors(path / "model.safetensors", tensors, metadata={"format": "pt"})
