"""Zero-shot classification: pictures against the names of classes, each written into several templates (arXiv
2103.00020, section 3.1).

Legend: N samples, C classes, F shared width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from m3i_large.errors import UserError
from m3i_large.evaluate.features import Features, Samples, encode_texts
from m3i_large.evaluate.kinds import Evaluation, Values, accuracies, categories_chance
from m3i_large.evaluate.load import Encoder

IMAGENET, SIMPLE = "imagenet", "simple"


@dataclass(frozen=True, kw_only=True)
class ClassNames:
    """Names of classes, in the order of their numbers, and what turns one into a text."""

    names: Sequence[str]
    templates: Sequence[Callable[[str], str]]


def read_names(classes: str, templates: str | None) -> ClassNames:
    """Names and templates by name or file.

    Args:
        classes: `imagenet` (open_clip's 1000 names) or a text file, a name a line.
        templates: `imagenet` (the 80 of CLIP), `simple` (seven of them), or a text file, a template with {} a line;
            None: `imagenet` for its names, else the name itself.

    Raises:
        UserError: no such file, an empty one, or a template without {}.
    """
    from open_clip import zero_shot_metadata as published  # seconds: it imports every model

    shipped = {IMAGENET: published.OPENAI_IMAGENET_TEMPLATES, SIMPLE: published.SIMPLE_IMAGENET_TEMPLATES}
    names = published.IMAGENET_CLASSNAMES if classes == IMAGENET else _lines(Path(classes), "--classes")
    if templates is None:
        chosen: Sequence[Callable[[str], str]] = shipped[IMAGENET] if classes == IMAGENET else [str]
    elif templates in shipped:
        chosen = shipped[templates]
    else:
        lines = _lines(Path(templates), "--templates")
        if odd := [line for line in lines if line.count("{}") != 1]:
            raise UserError(f"--templates: got {odd[0]!r}; needed: one {{}} in every line of {templates}")
        chosen = [line.format for line in lines]
    return ClassNames(names=names, templates=chosen)


def _lines(path: Path, option: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"{option}: got {path}, which is no file; needed: {IMAGENET} or a text file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{option}: {path} is empty; needed: at least one line")
    return lines


def class_vectors(encoder: Encoder, classes: ClassNames) -> Tensor:
    """A vector of length 1 for each class (C, F): the mean of its templates' unit vectors."""
    texts = [template(name) for name in classes.names for template in classes.templates]
    text_CTF = encode_texts(encoder, texts).unflatten(0, (len(classes.names), len(classes.templates)))
    return F.normalize(text_CTF.mean(1), dim=-1)


def of_classes(classes: ClassNames) -> Evaluation:
    """Zero-shot classification of labelled pictures."""

    def values(samples: Samples, features: Features) -> Values:
        if (most := int(samples.labels_N.max())) >= len(classes.names):
            raise UserError(f"--classes: got {len(classes.names)} names, but a picture is of class {most}")
        if features.image_NF is None or features.encoder is None:
            raise UserError("evaluation: the recipe has no text term, so pictures and names share no space")
        score_NC = features.image_NF @ class_vectors(features.encoder, classes).T
        best = score_NC.topk(min(5, len(classes.names))).indices
        top5 = (best == samples.labels_N[:, None]).any(1).double().mean().item()
        return accuracies(samples, score_NC) | {"top5": top5}

    def chance(samples: Samples) -> Values:
        share = samples.labels_N.bincount(minlength=len(classes.names)) / len(samples)
        return categories_chance(samples) | {"top5": share.topk(min(5, len(share))).values.sum().item()}

    return Evaluation("image_category", values, chance)
