"""Official InternImage checkpoints (classification, detection, segmentation, Hugging Face) into our models, strictly.

Our keys are the official ones, so loading is unwrapping, renaming and comparing; nothing is skipped in silence.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3i_large.errors import UserError

WRAPPERS = ("state_dict", "model", "module")
PREFIXES = ("module.", "backbone.", "model.")
# What official files hold beyond the backbone: classifiers, the bridge, and a detector's or segmenter's other parts.
HEADS = ("conv_head.", "head.", "dcnv3_head_x4.", "dcnv3_head_x3.", "clip_projector.", "fc_norm.")
OTHER_PARTS = ("neck.", "bbox_head.", "rpn_head.", "roi_head.", "mask_head.", "decode_head.", "auxiliary_head.")
HUGGING_FACE = {"layer_scale1": "gamma1", "layer_scale2": "gamma2"}
MIDDLE, POINTS = 4, 9


def load_official(model: nn.Module, source: str | Path | Mapping[str, Any]) -> list[str]:
    """Loads an official checkpoint into an InternImage from `create_model`; every tensor of the model gets a value.

    Args:
        model: built for what is wanted: a backbone alone takes a classifier's or detector's file too.
        source: a .pth, .pt or .safetensors file, or what is in it.

    Returns:
        The keys that the file holds beyond the model: of heads and of a detector's other parts only.

    Raises:
        UserError: no such file, a pickle with anything but tensors and plain values, a missing, unexpected or
            mis-shaped tensor (the first of each is named).
    """
    found = unwrap(source if isinstance(source, Mapping) else read_tensors(Path(source)))
    wanted = model.state_dict()
    found = {key: _without_middle(key, tensor, wanted.get(key)) for key, tensor in found.items()}
    extra = sorted(found.keys() - wanted.keys())
    unknown = [key for key in extra if not key.startswith((*HEADS, *OTHER_PARTS))]
    missing = [key for key in wanted if key not in found]
    if missing or unknown:
        parts = [
            f"{len(keys)} {what}, first {keys[0]}"
            for what, keys in (("missing", missing), ("unexpected", unknown))
            if keys
        ]
        raise UserError(f"checkpoint: {' and '.join(parts)}; needed: the model's {len(wanted)} tensors")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise UserError(f"checkpoint: {key} has shape {tuple(found[key].shape)}; needed: {tuple(tensor.shape)}")
    model.load_state_dict({key: found[key] for key in wanted})
    return extra


def read_tensors(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file; runs no code that the file might hold. UserError where it cannot be read."""
    if not path.is_file():
        raise UserError(f"checkpoint: {path} does not exist; needed: a .pth, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"checkpoint: {path} is not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {foreign[1]}" if foreign else "is not a torch checkpoint"
        raise UserError(f"checkpoint: {path} {what}; needed: tensors and plain values only") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint: {path} holds a {type(content).__name__}; needed: a mapping of names to tensors")
    return content


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flat official names to tensors, whatever the file was saved by."""
    while (
        inner := next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    ) is not None:
        content = inner
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    while True:
        # A detector keeps its other parts beside `backbone.`: those names have no prefix to take off.
        own = [key for key in tensors if not key.startswith(OTHER_PARTS)]
        prefix = next((p for p in PREFIXES if own and all(key.startswith(p) for key in own)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    renamed = {}
    for key, value in tensors.items():
        *path, last = key.split(".")
        renamed[".".join([*path, HUGGING_FACE.get(last, last)])] = value
    return renamed


def _without_middle(key: str, tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """Rows of nine points for a model of eight: the middle ones go, as in the official conversion."""
    per_point = {"dcn.offset": 2, "dcn.mask": 1}.get(".".join(key.split(".")[-3:-1]))
    if per_point is None or wanted is None or len(tensor) * (POINTS - 1) != len(wanted) * POINTS:
        return tensor
    rows = tensor.unflatten(0, (-1, POINTS, per_point))
    return torch.cat([rows[:, :MIDDLE], rows[:, MIDDLE + 1 :]], dim=1).flatten(0, 2)
