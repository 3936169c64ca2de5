"""The files beside the weights of a Hugging Face model directory."""

from collections.abc import Sequence
from typing import Any

from m3i_large.export.keys import Tensors
from m3i_large.export.layouts import VIT, kind_of
from m3i_large.models.config import InternImageConfig, ViTConfig
from m3i_large.models.factory import model_config

HUB_CODE = "OpenGVLab/internimage_t_1k_224"  # the repository whose remote code reads an InternImage


def hub_config(name: str, arch: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """config.json: a ViTModel's, or the constructor's arguments of the official remote code for InternImage.

    Args:
        name, arch: of create_model.
        tensors: what is in the file; of all dtypes the floating one is noted.
    """
    dtype = str(next(x.dtype for x in tensors.values() if x.is_floating_point())).removeprefix("torch.")
    config = model_config(name, **arch)
    if kind_of(name) == VIT:
        assert isinstance(config, ViTConfig)
        return _vit(config) | {"dtype": dtype, "torch_dtype": dtype}
    assert isinstance(config, InternImageConfig)
    return _intern_image(config) | {"dtype": dtype, "torch_dtype": dtype}


def _vit(config: ViTConfig) -> dict[str, Any]:
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }


def _intern_image(config: InternImageConfig) -> dict[str, Any]:
    code = {"AutoConfig": "configuration_internimage.InternImageConfig"}
    code["AutoModel"] = "modeling_internimage.InternImageModel"
    code["AutoModelForImageClassification"] = "modeling_internimage.InternImageModelForImageClassification"
    return {
        "architectures": ["InternImageModel"],
        "model_type": "internimage",
        "auto_map": {key: f"{HUB_CODE}--{value}" for key, value in code.items()},
        "core_op": "DCNv3",
        "channels": config.channels,
        "depths": list(config.depths),
        "groups": list(config.groups),
        "num_classes": 0,
        "mlp_ratio": config.mlp_ratio,
        "drop_rate": 0.0,
        "drop_path_rate": config.drop_path,
        "drop_path_type": "linear",
        "act_layer": "GELU",
        "norm_layer": "LN",
        "layer_scale": config.layer_scale,
        "offset_scale": config.offset_scale,
        "post_norm": config.post_norm,
        "cls_scale": 1.5,
        "with_cp": False,
        "dw_kernel_size": config.dw_kernel_size,
        "use_clip_projector": config.head == "pool",
        "level2_post_norm": bool(config.level2_post_norm),
        "level2_post_norm_block_ids": list(config.level2_post_norm) or None,
        "res_post_norm": config.res_post_norm,
        "center_feature_scale": config.center_feature_scale,
        "remove_center": config.remove_center,
    }


def preprocessor_config(image_size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """preprocessor_config.json: shorter side and centre crop to `image_size`, as CLIPImageProcessor does it."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }
