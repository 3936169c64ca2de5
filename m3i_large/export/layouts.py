"""The layouts: which names a file's tensors have, how it wraps them, and who reads it how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from m3i_large.errors import UserError
from m3i_large.export.branch import BRIDGE, PRETRAINING, Branch
from m3i_large.export.keys import Tensors, prefixed, to_hub_intern_image, to_torchvision, to_transformers

VIT, INTERN_IMAGE = "vit", "internimage"
# Of the official classifier of InternImage-H and G; other sizes have another one, which is not pre-trained here.
POOL_WIDTH, POOL_HEADS = 768, 16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to write a backbone down.

    Attributes:
        names: kinds of backbone that it exists for, each with its map from our names.
        suffix: of the file; empty for a directory.
        wrapper: key that the tensors lie under in a .pth file; None: at the top.
        reader: who reads it.
        line: how it is read, with `{file}` in it.
        drop: names (ours) that the reader has no place for.
        head: whether the official classifier can go along.
        whole: whether everything of the pre-training goes along, under the names of M3I's authors.
    """

    name: str
    names: Mapping[str, Callable[[Tensors], Tensors]]
    suffix: str
    reader: str
    line: str
    wrapper: str | None = None
    drop: tuple[str, ...] = ()
    head: bool = False
    whole: bool = False

    def tensors(self, backbone: Tensors, kind: str) -> Tensors:
        """A backbone's tensors, given under our names, under this layout's."""
        return self.names[kind]({name: x for name, x in backbone.items() if not name.startswith(self.drop)})


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _of_detector(tensors: Tensors) -> Tensors:
    return prefixed(tensors, "backbone.")


def _of_m3i(tensors: Tensors) -> Tensors:
    return prefixed(tensors, "dcnv3.")


_TABLE = (
    Layout(
        name="internimage",
        names={INTERN_IMAGE: _same},
        suffix=".pth",
        wrapper="model",
        head=True,
        reader="OpenGVLab/InternImage: classification, detection, segmentation",
        line="model.backbone.init_cfg = dict(type='Pretrained', checkpoint='{file}')",
    ),
    Layout(
        name="mmdet",
        names={INTERN_IMAGE: _of_detector},
        suffix=".pth",
        wrapper="state_dict",
        reader="mmdetection, mmsegmentation (mmengine)",
        line="init_cfg=dict(type='Pretrained', prefix='backbone.', checkpoint='{file}')",
    ),
    Layout(
        name="hf",
        names={INTERN_IMAGE: to_hub_intern_image, VIT: to_transformers},
        suffix="",
        reader="transformers",
        line="transformers.AutoModel.from_pretrained('{file}')",
    ),
    Layout(
        name="timm",
        names={VIT: _same},
        suffix=".safetensors",
        reader="timm",
        line="timm.create_model('vit_base_patch16_224', num_classes=0, checkpoint_path='{file}')",
    ),
    Layout(
        name="mae",
        names={VIT: _same},
        suffix=".pth",
        wrapper="model",
        reader="MAE's and SiameseIM's fine-tuning, mmdetection's ViTDet, ViT-Adapter",
        line="main_finetune.py --model vit_base_patch16 --finetune {file}",
    ),
    Layout(
        name="detectron2",
        names={VIT: _same},
        suffix=".pth",
        wrapper="model",
        # ViTDet has no last norm, and detectron2 matches names by their ends: `norm.weight` fits many.
        drop=("norm.",),
        reader="detectron2's ViTDet",
        line="train.init_checkpoint='{file}?matching_heuristics=True'",
    ),
    Layout(
        name="torchvision",
        names={VIT: to_torchvision},
        suffix=".pth",
        reader="torchvision's VisionTransformer",
        line="model = torchvision.models.vit_b_16(); model.heads = nn.Identity(); "
        "model.load_state_dict(torch.load('{file}'))",
    ),
    Layout(
        name="safetensors",
        names={INTERN_IMAGE: _same, VIT: _same},
        suffix=".safetensors",
        reader="this project: fine-tuning, `m3i eval`, backbone.weights of a recipe",
        line="launchers/finetune_detection.py --weights {file}",
    ),
    Layout(
        name="m3i",
        names={INTERN_IMAGE: _of_m3i},
        suffix=".pth",
        wrapper="model",
        whole=True,
        reader="OpenGVLab/InternImage, as the M3I authors' own pre-training checkpoint",
        line="classification/main.py --pretrained {file}",
    ),
)
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in _TABLE}


def kind_of(name: str) -> str:
    """Which kind of backbone a name of create_model is."""
    return VIT if name.startswith(VIT) else INTERN_IMAGE


def find_layout(name: str) -> Layout:
    """A layout by name; UserError naming the nearest."""
    if name not in LAYOUTS:
        near = get_close_matches(name, LAYOUTS, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"layout: got {name!r}{hint}; needed: one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def check_kind(layout: Layout, name: str) -> str:
    """The kind of the backbone `name`; UserError where the layout does not exist for it."""
    kind = kind_of(name)
    if kind not in layout.names:
        fitting = [other.name for other in LAYOUTS.values() if kind in other.names]
        raise UserError(f"layout: {layout.name} has no place for {name}; needed: one of {', '.join(fitting)}")
    return kind


def official_head(branch: Branch, *, dtype: torch.dtype) -> Tensors:
    """Bridge, pool and classifier under the official names (dcnv3_head_*, clip_projector, fc_norm, head).

    The category head is two linear maps here and one there: their product, computed in float64.

    Raises:
        UserError: the official classifier has no such parts: another size's, or of other widths.
    """
    pool, classifier = branch.pool(dtype=dtype), branch.part("category_head", dtype=torch.float32)
    config = branch.recipe.pool
    bridge = {k: x for k, x in branch.encoder(dtype=dtype).items() if k.startswith(BRIDGE)}
    if not bridge or not pool or not classifier:
        raise UserError("--with-head: the run trained no classifier on the bridge's tokens; needed: a category term")
    if (config.width, config.heads) != (POOL_WIDTH, POOL_HEADS):
        raise UserError(
            f"--with-head: got pool.width {config.width} and pool.heads {config.heads}; "
            f"needed: {POOL_WIDTH} and {POOL_HEADS}, the official classifier's"
        )
    return bridge | pool | prefixed(folded_classifier(classifier, dtype=dtype), "head.")


def folded_classifier(parts: Mapping[str, Tensor], *, dtype: torch.dtype) -> Tensors:
    """The category head's projection and classifier as one linear map: weight (classes, width), bias (classes)."""
    projection, bias = parts["projection.weight"].double(), parts["projection.bias"].double()
    weight = parts["head.weight"].double()
    folded = {"weight": weight @ projection, "bias": weight @ bias + parts["head.bias"].double()}
    return {name: x.to(dtype) for name, x in folded.items()}


def pretraining_tensors(branch: Branch, *, dtype: torch.dtype) -> Tensors:
    """Everything under the names of M3I's authors, as the official loader takes them apart; `mask_token` comes first,
    by which it knows them.

    dcnv3.* the student, mm_dcnv3.* its moving average, dcnv3_head_*, clip_projector.*, clip.classifier_ln.*,
    clip.classifier.*. UserError where the branch is not the student.
    """
    if branch.branch != "student":
        raise UserError("--branch: the layout m3i holds both branches; needed: student")
    encoder = branch.encoder(dtype=dtype)
    decoder = branch.part("decoder", dtype=dtype)
    width = next((len(x) for name, x in encoder.items() if name == f"{BRIDGE[1]}weight"), 1)
    found = {"mask_token": decoder.get("mask_token", torch.zeros(1, 1, width, dtype=dtype))}
    found |= _of_m3i({name: x for name, x in encoder.items() if not name.startswith(PRETRAINING)})
    if branch.saved.keys("ema/target."):
        average = Branch(branch.saved.directory, branch="target").backbone(dtype=dtype)
        found |= prefixed(average, "mm_dcnv3.")
    found |= {name: x for name, x in encoder.items() if name.startswith(BRIDGE)}
    for name, x in branch.pool(dtype=dtype).items():
        found[name.replace("fc_norm.0.", "clip.classifier_ln.")] = x
    classifier = branch.part("category_head", dtype=torch.float32)
    return found | (prefixed(folded_classifier(classifier, dtype=dtype), "clip.classifier.") if classifier else {})


def describe() -> list[dict[str, Any]]:
    """The table for people: {layout, backbones, file, reader, line}."""
    return [
        {
            "layout": layout.name,
            "backbones": ", ".join(layout.names),
            "file": layout.suffix or "directory",
            "reader": layout.reader,
            "line": layout.line,
        }
        for layout in LAYOUTS.values()
    ]
