"""Our names of a backbone's tensors to those of other libraries, and back.

Ours are the official InternImage's and timm's flat Vision Transformer's, so most layouts need a prefix at most.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

TORCHVISION = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "norm.": "encoder.ln.",
}
TORCHVISION_BLOCK = {
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "attn.qkv.": "self_attention.in_proj_",
    "attn.proj.": "self_attention.out_proj.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.3.",
}
TORCHVISION_LAYER = "encoder.layers.encoder_layer_{}."

# The names of files on the hub; transformers renames them to its modules' own when it reads.
TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
TRANSFORMERS_BLOCK = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
TRANSFORMERS_QKV = [f"attention.attention.{part}." for part in ("query", "key", "value")]
TRANSFORMERS_LAYER = "encoder.layer.{}."

# transformers once rewrote every name with `gamma` in it.
INTERN_IMAGE_SCALES = {"gamma1": "layer_scale1", "gamma2": "layer_scale2"}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The same tensors with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unprefixed(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """Those tensors whose names have the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def to_hub_intern_image(tensors: Mapping[str, Tensor]) -> Tensors:
    """The names of InternImage on the Hugging Face hub."""
    return {"model." + _last(name, INTERN_IMAGE_SCALES): tensor for name, tensor in tensors.items()}


def to_torchvision(tensors: Mapping[str, Tensor]) -> Tensors:
    """The names of torchvision's VisionTransformer; shapes are the same."""
    return {_renamed(name, TORCHVISION, TORCHVISION_BLOCK, TORCHVISION_LAYER): x for name, x in tensors.items()}


def from_torchvision(tensors: Mapping[str, Tensor]) -> Tensors:
    """The way back from `to_torchvision`."""
    layer = re.compile(r"encoder\.layers\.encoder_layer_(\d+)\.(.*)")
    return {_restored(name, TORCHVISION, TORCHVISION_BLOCK, layer): x for name, x in tensors.items()}


def to_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """The names of transformers' ViTModel files: query, key and value are three matrices there."""
    found = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if block is None:
            found[_renamed(name, TRANSFORMERS, TRANSFORMERS_BLOCK, TRANSFORMERS_LAYER)] = tensor
            continue
        for part, third in zip(TRANSFORMERS_QKV, tensor.chunk(3), strict=True):
            found[TRANSFORMERS_LAYER.format(block[1]) + part + block[2]] = third.contiguous()
    return found


def from_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """The way back from `to_transformers`."""
    layer = re.compile(r"encoder\.layer\.(\d+)\.(.*)")
    found = {}
    for name, tensor in tensors.items():
        if ".attention.attention." not in name:
            found[_restored(name, TRANSFORMERS, TRANSFORMERS_BLOCK, layer)] = tensor
        elif TRANSFORMERS_QKV[0] in name:
            number, kind = name.split(".")[2], name.rpartition(".")[2]
            thirds = [tensors[name.replace(TRANSFORMERS_QKV[0], part)] for part in TRANSFORMERS_QKV]
            found[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(thirds)
    return found


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str], layer: str) -> str:
    found = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
    if found is None:
        return _replaced(name, top)
    return layer.format(found[1]) + _replaced(found[2], block)


def _restored(name: str, top: Mapping[str, str], block: Mapping[str, str], layer: re.Pattern[str]) -> str:
    found = layer.fullmatch(name)
    if found is None:
        return _replaced(name, {new: old for old, new in top.items()})
    return f"blocks.{found[1]}." + _replaced(found[2], {new: old for old, new in block.items()})


def _replaced(name: str, names: Mapping[str, str]) -> str:
    old = next((old for old in names if name.startswith(old)), None)
    if old is None:
        raise ValueError(f"{name}: got a tensor that this layout has no name for, needed one of {', '.join(names)}")
    return names[old] + name.removeprefix(old)


def _last(name: str, names: Mapping[str, str]) -> str:
    *path, last = name.split(".")
    return ".".join([*path, names.get(last, last)])
