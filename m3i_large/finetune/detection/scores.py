"""Average precision of COCO and of LVIS, and the result files that their servers take.

Legend: K detections of an image, H W pixels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from m3i_large.errors import UserError
from m3i_large.finetune.detection.batch import Detections
from m3i_large.finetune.detection.coco import CocoSplit, Image

FILES = {"bbox": "results_bbox.json", "segm": "results_segm.json"}
PREFIX = {"bbox": "box", "segm": "mask"}
# Figures and their names in the library.
FIGURES = {
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
}
LVIS_FIGURES = FIGURES | {name: name for name in ("APr", "APc", "APf")}  # of rare, common and frequent categories


def server_rows(
    found: Detections, image: Image, *, scale: tuple[float, float], categories: Sequence[tuple[int, str]]
) -> list[dict[str, Any]]:
    """Detections of one image as COCO's server has them: pixels and ids of the file, boxes as (x, y, width, height).

    Args:
        scale: pixels of the detector's image per pixel of the file, in x and y.
    """
    x, y = scale
    limits = np.array([image.width, image.height] * 2, np.float32)
    boxes_K4 = (found.boxes_K4.numpy() / np.array([x, y, x, y], np.float32)).clip(0, limits)
    rows: list[dict[str, Any]] = [
        {
            "image_id": image.id,
            "category_id": categories[label][0],
            "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(score, 5),
        }
        for (x0, y0, x1, y1), label, score in zip(
            boxes_K4, found.labels_K.tolist(), found.scores_K.tolist(), strict=True
        )
    ]
    if found.masks_Kmm is not None:
        shape = (image.height, image.width)
        for row, mask_mm, box_4 in zip(rows, found.masks_Kmm.float(), torch.from_numpy(boxes_K4), strict=True):
            row["segmentation"] = _coded(paste_masks_in_image(mask_mm[None, None], box_4[None], shape)[0, 0] > 0.5)
    return rows


def score_coco(
    split: CocoSplit,
    rows: Sequence[Mapping[str, Any]],
    directory: Path,
    *,
    masks: bool,
    detections: int,
    lvis: bool = False,
) -> dict[str, float]:
    """Writes the result files into `directory` and scores them: `box/AP`, `box/AP50`, ..., `mask/AP`, ...; fractions.

    A figure of a size or frequency of which the file has no object is left out.

    Args:
        split: what was evaluated; images that were left out of it do not count.
        rows: of `server_rows`, of all its images.
        detections: most per image that count.
        lvis: by the rules of LVIS (arXiv 1908.03195): a detection counts where its category is known to be in the image
            or known not to be, and one without an object is no mistake where not all objects are annotated; figures of
            the rare, common and frequent categories too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, float] = {}
    for kind in FILES if masks else ["bbox"]:
        own = [{k: v for k, v in row.items() if kind == "segm" or k != "segmentation"} for row in rows]
        (directory / FILES[kind]).write_text(json.dumps(own), encoding="utf-8")
        for name, value in _summary(split, own, kind, detections, lvis=lvis).items():
            if value >= 0:
                values[f"{PREFIX[kind]}/{name}"] = float(value)
    return values


def _summary(
    split: CocoSplit, rows: Sequence[dict[str, Any]], kind: str, detections: int, *, lvis: bool
) -> dict[str, float]:
    """The figures; -1 where there is nothing to find."""
    library, figures = coco_library(), LVIS_FIGURES if lvis else FIGURES
    truth = library.COCO(_truth(split))
    if not rows:
        return dict.fromkeys(figures, 0.0)
    judged = library.COCOeval_faster(
        truth, truth.loadRes(list(rows)), kind, print_function=lambda *_: None, lvis_style=lvis
    )
    judged.params.imgIds = [image.id for image in split.images]
    judged.params.maxDets = [detections] if lvis else [1, 10, max(detections, 100)]
    judged.run()
    found = judged.stats_as_dict
    return {name: float(found[own]) for name, own in figures.items()}


def _truth(split: CocoSplit) -> dict[str, Any]:
    """The file's content with what the library insists on and files leave out."""
    content = json.loads(split.path.read_bytes())
    for row in content["annotations"]:
        row.setdefault("iscrowd", 0)
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    return content


def coco_library() -> Any:
    """faster-coco-eval; UserError where it is not installed."""
    try:
        import faster_coco_eval
    except ImportError:
        raise UserError(
            "detection: faster-coco-eval is not installed; needed: pip install 'm3i_large[detection]'"
        ) from None
    return faster_coco_eval


def _coded(mask_HW: torch.Tensor) -> dict[str, Any]:
    from pycocotools import mask as coder

    coded = coder.encode(np.asfortranarray(mask_HW.numpy().astype(np.uint8)))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}
