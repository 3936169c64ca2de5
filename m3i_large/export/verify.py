"""`m3i verify`: a file is loaded, strictly, into a model of its consumer that is built independently of the file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3i_large.errors import UserError
from m3i_large.export.branch import BRIDGE
from m3i_large.export.files import check_sum, read_card, tensor_file
from m3i_large.export.keys import Tensors, from_torchvision, from_transformers, to_transformers, unprefixed
from m3i_large.export.layouts import INTERN_IMAGE, VIT, Layout, check_kind, find_layout
from m3i_large.export.weights import compare, read_weights
from m3i_large.models import create_model
from m3i_large.models.config import ViTConfig
from m3i_large.models.factory import model_config
from m3i_large.models.official import read_tensors, unwrap
from m3i_large.recipe import validate

OFFICIAL_HEAD = (*BRIDGE, "clip_projector.", "fc_norm.", "head.")
WHOLE_EXTRAS = ("mask_token", "mm_dcnv3.", *BRIDGE, "clip_projector.", "clip.")


@dataclass(frozen=True)
class Verified:
    """What was found to be right: number of tensors and parameters, and what they were compared with."""

    tensors: int
    parameters: int
    against: str
    untrained: str


def verify(path: Path, *, layout: str, name: str | None = None, arch: dict[str, Any] | None = None) -> Verified:
    """Checks an exported file as its consumer would read it, and more strictly.

    Args:
        layout: name of the layout that the file is meant to be.
        name, arch: of create_model, for a file without a card.

    Raises:
        UserError: a tensor that is missing, unexpected, of another shape, not finite or still as it was initialised;
            another layout; a file that is not the one of its card.
    """
    wanted = find_layout(layout)
    card = read_card(path)
    if card is not None:
        check_sum(path, card)
        if card["layout"] != layout:
            raise UserError(f"--for: got {layout}, but {path} is of layout {card['layout']}; needed: that one")
        name, arch = str(card["backbone"]["name"]), dict(card["backbone"]["arch"])
    elif name is None and layout != "detectron2":
        read = read_weights(path, arch=arch)
        name, arch = read.name, read.arch
    if name is None:
        raise UserError(f"--name: {path} has no model card; needed: the backbone's name")
    kind = check_kind(wanted, name)
    tensors = _content(path, wanted)
    backbone, rest = _split(tensors, wanted)
    model, against = _consumer(wanted, kind, name, arch or {})
    compare({key: x.shape for key, x in model.state_dict().items()}, backbone, what=str(path))
    _check_head(rest, wanted, name, arch or {}, path)
    _check_finite(tensors, path)
    untrained = _check_trained(tensors, wanted, kind, name, arch or {}, card, path)
    return Verified(len(tensors), sum(x.numel() for x in tensors.values()), against, untrained)


def _content(path: Path, layout: Layout) -> Tensors:
    """The tensors of a file, found where the layout's reader looks for them and nowhere else."""
    file = tensor_file(path)
    if layout.suffix != file.suffix and (layout.suffix or not path.is_dir()):
        need = f"a {layout.suffix} file" if layout.suffix else "a directory with model.safetensors"
        raise UserError(f"{path}: got a file that {layout.name} is not written as; needed: {need}")
    content: Any = read_tensors(file)
    if layout.wrapper is not None:
        if layout.wrapper not in content:
            first = ", ".join(list(content)[:3])
            raise UserError(f"{path}: holds {first}; needed: the tensors under {layout.wrapper!r}, where they are read")
        content = content[layout.wrapper]
    odd = [key for key, x in content.items() if not isinstance(x, Tensor)]
    if odd:
        raise UserError(f"{path}: {odd[0]} is a {type(content[odd[0]]).__name__}; needed: tensors only")
    return dict(content)


def _split(tensors: Tensors, layout: Layout) -> tuple[Tensors, Tensors]:
    """The backbone's tensors as the consumer's model names them, and those of heads."""
    if layout.whole:
        return unprefixed(tensors, "dcnv3."), {k: x for k, x in tensors.items() if not k.startswith("dcnv3.")}
    if layout.head and any(key.startswith(OFFICIAL_HEAD) for key in tensors):
        return (
            {k: x for k, x in tensors.items() if not k.startswith(OFFICIAL_HEAD)},
            {k: x for k, x in tensors.items() if k.startswith(OFFICIAL_HEAD)},
        )
    return tensors, {}


def _consumer(layout: Layout, kind: str, name: str, arch: dict[str, Any]) -> tuple[nn.Module, str]:
    """A model of the layout's reader on the meta device, and what it is."""
    with torch.device("meta"):
        if kind == VIT:
            config = model_config(name, **arch)
            assert isinstance(config, ViTConfig)
            return _VITS[layout.name](config)
        model = create_model(name, **arch)
        if layout.whole:
            return model, f"our {name}, whose names are the official ones"
        return _Named(layout.tensors(model.state_dict(), kind)), f"our {name}, whose names are the official ones"


class _Named(nn.Module):
    """Only a state dict."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._tensors


def _timm(config: ViTConfig) -> tuple[nn.Module, str]:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=0,
    )
    return model, "timm's VisionTransformer"


def _detectron2(config: ViTConfig) -> tuple[nn.Module, str]:
    model, _ = _timm(config)
    kept = {key: x for key, x in model.state_dict().items() if not key.startswith("norm.")}
    return _Named(kept), "ViTDet's encoder: timm's VisionTransformer without its last norm"


def _torchvision(config: ViTConfig) -> tuple[nn.Module, str]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=int(config.width * config.mlp_ratio),
    )
    model.heads = nn.Identity()
    return model, "torchvision's VisionTransformer"


def _transformers(config: ViTConfig) -> tuple[nn.Module, str]:
    return _Named(to_transformers(_timm(config)[0].state_dict())), "transformers' ViTModel, as its files name tensors"


def _ours(config: ViTConfig) -> tuple[nn.Module, str]:
    return _timm(config)[0], "timm's VisionTransformer, whose names are ours"


_VITS: Mapping[str, Callable[[ViTConfig], tuple[nn.Module, str]]] = {
    "timm": _timm,
    "mae": _timm,
    "safetensors": _ours,
    "detectron2": _detectron2,
    "torchvision": _torchvision,
    "hf": _transformers,
}


def _check_head(rest: Tensors, layout: Layout, name: str, arch: dict[str, Any], path: Path) -> None:
    """The official classifier's parts, or what M3I's authors' layout holds beside the student."""
    if not rest:
        return
    if layout.whole:
        if next(iter(rest)) != "mask_token":
            raise UserError(f"{path}: begins with {next(iter(rest))}; needed: mask_token, by which the layout is known")
        if odd := [key for key in rest if not key.startswith(WHOLE_EXTRAS)]:
            raise UserError(f"{path}: {len(odd)} unexpected, first {odd[0]}; needed: names of the layout {layout.name}")
        average = unprefixed(rest, "mm_dcnv3.")
        if average:
            with torch.device("meta"):
                shapes = {key: x.shape for key, x in create_model(name, **arch).state_dict().items()}
            compare(shapes, average, what=f"{path}, mm_dcnv3")
        return
    classes = len(rest["head.bias"]) if "head.bias" in rest else 0
    with torch.device("meta"):
        whole = create_model(name, num_classes=max(1, classes), **arch).state_dict()
    shapes = {key: x.shape for key, x in whole.items() if key.startswith(OFFICIAL_HEAD)}
    compare(shapes, rest, what=f"{path}, the classifier")


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; needed: finite numbers")


def _check_trained(
    tensors: Tensors,
    layout: Layout,
    kind: str,
    name: str,
    arch: dict[str, Any],
    card: dict[str, Any] | None,
    path: Path,
) -> str:
    """UserError if a tensor of the backbone is as it was before the first step; returns what was compared with.

    With a card that holds the recipe the run's own initial weights are drawn again, else any initial weights: those
    tell tensors that begin as constants.
    """
    recipe = validate(card["recipe"]) if card and "recipe" in card else None
    torch.manual_seed(recipe.train.seed if recipe else 0)
    if recipe is not None and recipe.backbone.weights is None:
        model = create_model(name, bridge=True, **recipe.backbone.arch)
        said = "the run's own initial weights"
    else:
        model, said = create_model(name, **arch), "initial constants"
    fresh = {key: x for key, x in model.state_dict().items() if x.is_floating_point()}
    backbone = _ours_again(tensors, layout, kind)
    for key in backbone.keys() & fresh.keys():
        got, begun = backbone[key], fresh[key]
        if got.shape != begun.shape:
            continue  # a resized position table
        # A run in bf16 begins at rounded weights.
        if torch.equal(got, begun.to(got.dtype)) or torch.equal(got, begun.bfloat16().to(got.dtype)):
            raise UserError(f"{path}: {key} is as it was initialised; needed: trained weights")
    return said


def _ours_again(tensors: Tensors, layout: Layout, kind: str) -> Tensors:
    """The file's backbone under our names."""
    if layout.whole:
        return unprefixed(tensors, "dcnv3.")
    if kind == INTERN_IMAGE:
        return unwrap(tensors)
    back: dict[str, Callable[[Tensors], Tensors]] = {"torchvision": from_torchvision, "hf": from_transformers}
    return back.get(layout.name, lambda same: same)(tensors)
