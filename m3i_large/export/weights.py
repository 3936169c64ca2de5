"""Any file of backbone weights, exported here or published elsewhere, as a backbone under our names; strictly.

What a file is follows from its model card, else from its tensors: InternImage's official layouts, M3I's authors' own,
timm's, MAE's and SiameseIM's flat Vision Transformers, torchvision's, transformers'.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from m3i_large.errors import UserError
from m3i_large.export.card import described
from m3i_large.export.files import card_path, check_sum, read_card, save_safetensors, tensor_file, whole
from m3i_large.export.keys import Tensors, from_torchvision, from_transformers, unprefixed
from m3i_large.export.layouts import INTERN_IMAGE, VIT, kind_of
from m3i_large.metrics import write_json
from m3i_large.models import create_model
from m3i_large.models.factory import INTERN_IMAGE_SIZES, VIT_SIZES
from m3i_large.models.official import HEADS, OTHER_PARTS, read_tensors, unwrap

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_WIDTH = 64  # of an attention head, in every Vision Transformer that is published under these names
# What files of Vision Transformers hold beside the encoder: classifiers, and parts of their own pre-training.
VIT_EXTRAS = (
    *("head.", "heads.", "classifier.", "fc_norm.", "pre_logits.", "pooler.", "mask_token"),
    *("decoder", "mm_", "predictor_", "projector_"),
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file's backbone.

    Attributes:
        layout: of the card; `official`, `vit`, ... for files without one.
        name, arch: arguments of create_model; `arch` holds image_size.
        tensors: exactly those of create_model(name, **arch), by name and shape.
        mean, std: of the pixels (0 to 1, RGB) that it was trained on; ImageNet's without a card.
        card: the model card, None without one.
    """

    path: Path
    layout: str
    name: str
    arch: dict[str, Any]
    tensors: Mapping[str, Tensor]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    card: dict[str, Any] | None = None

    def build(self, **arch: Any) -> nn.Module:
        """The backbone in fp32 with every tensor loaded.

        Args:
            arch: fields that differ, such as drop_path; where image_size does, a position table is resized.

        Raises:
            UserError: a field that does not exist, or one that changes the tensors.
        """
        wanted = self.arch | arch
        tensors = dict(self.tensors)
        if kind_of(self.name) == VIT and wanted["image_size"] != self.arch["image_size"]:
            table = tensors["pos_embed"].float()
            tensors["pos_embed"] = resized(table, self.name, self.arch, int(wanted["image_size"]))
        model = create_model(self.name, **wanted)
        load_strictly(model, tensors, what=str(self.path))
        return model


def read_weights(path: Path, *, name: str | None = None, arch: dict[str, Any] | None = None) -> Weights:
    """Reads the backbone of an exported file or directory, or of a published one.

    Args:
        name: of create_model, for files without a card that do not tell; otherwise it must agree.
        arch: fields of that model, likewise.

    Raises:
        UserError: no such file, one that is damaged, not recognised or of another backbone, a tensor that is missing,
            unexpected or of another shape.
    """
    card = read_card(path)
    if path.is_dir() and not tensor_file(path).is_file():
        raise UserError(f"weights: got {path}, which holds no model.safetensors; needed: an exported file or directory")
    if card is not None:
        check_sum(path, card)
    layout, kind, tensors = _recognised(read_tensors(tensor_file(path)), path)
    if card is not None:
        layout, found, fields = str(card["layout"]), str(card["backbone"]["name"]), dict(card["backbone"]["arch"])
        if name not in (None, found):
            raise UserError(f"backbone.name: got {name}, but {path} is a {found}; needed: that, or none")
    elif kind == VIT:
        found, fields = _vit_of(tensors, name, arch or {})
    else:
        found, fields = _intern_image_of(tensors, name, arch or {}, path)
    if kind_of(found) == VIT and "norm.weight" not in tensors and layout == "detectron2":
        raise UserError(
            f"weights: {path} has no last norm, as ViTDet reads it; needed: another layout, such as safetensors"
        )
    read = Weights(path=path, layout=layout, name=found, arch=fields, tensors=tensors, card=card)
    _check(read)
    if card is None or "mean" not in card:
        return read
    return Weights(**(vars(read) | {"mean": tuple(card["mean"]), "std": tuple(card["std"])}))


def import_weights(
    path: Path, *, out: Path, name: str | None = None, arch: dict[str, Any] | None = None, force: bool = False
) -> tuple[Weights, dict[str, Any]]:
    """Writes a file's backbone as our safetensors with a card: what `backbone.weights` of a recipe starts from.

    Returns:
        What was read, and the new card.

    Raises:
        UserError: as `read_weights`; `out` exists and not `force`, or has another suffix.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out: got {out}; needed: a name that ends in .safetensors")
    read = read_weights(path, name=name, arch=arch)
    tensors = dict(read.tensors)
    with whole(out, force=force) as temporary:
        save_safetensors(temporary, tensors, metadata={"format": "pt"})
        card = described(temporary, tensors, layout="safetensors", name=read.name, arch=read.arch)
        card |= {"mean": list(read.mean), "std": list(read.std), "imported_from": path.name, "read_as": read.layout}
        kept = ("branch", "step", "steps", "losses", "data", "licence", "recipe")
        card |= {key: read.card[key] for key in kept if read.card and key in read.card}
        write_json(card_path(out), card)
    return read, card


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Loads every tensor of a model; UserError naming the first that is missing, unexpected or of another shape."""
    compare({name: x.shape for name, x in model.state_dict().items()}, tensors, what=what)
    model.load_state_dict(dict(tensors))


def compare(wanted: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], *, what: str) -> None:
    """UserError naming the first tensor that is missing, unexpected or of another shape."""
    parts = []
    for odd, word in ((wanted.keys() - tensors.keys(), "missing"), (tensors.keys() - wanted.keys(), "unexpected")):
        if odd:
            parts.append(f"{len(odd)} {word}, first {min(odd)}")
    if parts:
        raise UserError(f"{what}: {' and '.join(parts)}; needed: exactly the model's {len(wanted)} tensors")
    wrong = [name for name, shape in wanted.items() if tensors[name].shape != shape]
    if wrong:
        got, need = tuple(tensors[wrong[0]].shape), tuple(wanted[wrong[0]])
        raise UserError(f"{what}: {len(wrong)} tensors of another shape, first {wrong[0]} {got}; needed: {need}")


def resized(table_1LD: torch.Tensor, name: str, arch: dict[str, Any], image_size: int) -> torch.Tensor:
    """A Vision Transformer's position table, class token first, for images of another size (bicubic, as timm's).

    Args:
        name, arch: of the model that it belongs to.

    Raises:
        UserError: not a multiple of the patch size.
    """
    with torch.device("meta"):
        old = create_model(name, **arch)
        new = create_model(name, **(arch | {"image_size": image_size}))
    grids = [[model.grid, model.grid] for model in (old, new)]
    return resample_abs_pos_embed(table_1LD, grids[1], old_size=grids[0], num_prefix_tokens=1)


def shapes_of(name: str, arch: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of a backbone's tensors."""
    with torch.device("meta"):
        return {key: x.shape for key, x in create_model(name, **arch).state_dict().items()}


def _check(read: Weights) -> None:
    compare(shapes_of(read.name, read.arch), read.tensors, what=f"weights: {read.path}")


def _recognised(content: Mapping[str, Any], path: Path) -> tuple[str, str, Tensors]:
    """Layout, kind of backbone and its tensors under our names, of what a file holds."""
    if any(name.startswith("dcnv3.") for name in _flat(content)):
        return "m3i", INTERN_IMAGE, unprefixed(_flat(content), "dcnv3.")
    tensors = unwrap(content)
    if any(name.startswith("levels.") for name in tensors):
        return "official", INTERN_IMAGE, _without(tensors, (*HEADS, *OTHER_PARTS))
    if "conv_proj.weight" in tensors:
        return "torchvision", VIT, from_torchvision(_without(tensors, VIT_EXTRAS))
    tensors = {name.removeprefix("vit."): x for name, x in tensors.items()}
    if "embeddings.cls_token" in tensors:
        return "transformers", VIT, from_transformers(_without(tensors, (*VIT_EXTRAS, "embeddings.mask_token")))
    if "cls_token" in tensors and "patch_embed.proj.weight" in tensors:
        return "vit", VIT, _folded(_without(tensors, VIT_EXTRAS))
    first = ", ".join(list(tensors)[:3]) or "no tensor"
    raise UserError(
        f"weights: {path} is no backbone that is known here (it begins with {first}); needed: an export, or a file of "
        "InternImage, timm, MAE, torchvision or transformers"
    )


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = content.get("model", content)
    return {k: v for k, v in inner.items() if isinstance(v, Tensor)} if isinstance(inner, Mapping) else {}


def _without(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> Tensors:
    return {name: x for name, x in tensors.items() if not name.startswith(prefixes)}


def _folded(tensors: Tensors) -> Tensors:
    """A layer scale becomes part of the matrix before it: gamma * (W x + b) = (gamma W) x + gamma b."""
    folded = {name: x for name, x in tensors.items() if not re.search(r"\.ls[12]\.gamma$", name)}
    for name in tensors.keys() - folded.keys():
        block, _, _ = name.rpartition(".ls")
        target = f"{block}.attn.proj" if ".ls1." in name else f"{block}.mlp.fc2"
        gamma = tensors[name]
        folded[f"{target}.weight"] = folded[f"{target}.weight"] * gamma[:, None]
        folded[f"{target}.bias"] = folded[f"{target}.bias"] * gamma
    return folded


def _vit_of(tensors: Tensors, name: str | None, arch: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The Vision Transformer that tensors without a card are of; heads are 64 wide where `arch` says nothing."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    blocks = [int(block[1]) for block in (re.match(r"blocks\.(\d+)\.", key) for key in tensors) if block]
    fields: dict[str, Any] = {"width": width, "depth": 1 + max(blocks, default=0), "heads": max(1, width // HEAD_WIDTH)}
    found = name or next((known for known, size in VIT_SIZES.items() if size == fields), VIT)
    if VIT_SIZES.get(found):
        fields = {}
    fields["image_size"] = round((tensors["pos_embed"].shape[1] - 1) ** 0.5) * patch
    fields["patch_size"] = patch
    if "blocks.0.mlp.fc1.bias" in tensors:
        fields["mlp_ratio"] = len(tensors["blocks.0.mlp.fc1.bias"]) / width
    return found, fields | arch


def _intern_image_of(
    tensors: Tensors, name: str | None, arch: dict[str, Any], path: Path
) -> tuple[str, dict[str, Any]]:
    """The InternImage that tensors without a card are of, among the published sizes.

    Its offset scale is in no tensor, so a size of one's own must be named with all its fields.
    """
    image_size = {"image_size": 224}
    if name is not None:
        return name, image_size | arch
    shapes = {key: x.shape for key, x in tensors.items()}
    for known, size in INTERN_IMAGE_SIZES.items():
        if not size or size["channels"] != shapes.get("patch_embed.conv2.bias", (0,))[0]:
            continue
        if shapes_of(known, {}) == shapes:
            return known, image_size | arch
    raise UserError(
        f"weights: {path} is an InternImage of none of the published sizes; needed: --name, such as internimage_l or "
        "internimage with channels, depths and groups"
    )
