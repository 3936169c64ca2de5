"""The evaluations: what is asked of a model without any fine-tuning, as named fractions beside their chance level."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m3i_large.data.source_config import Kind
from m3i_large.errors import UserError
from m3i_large.evaluate.features import Features, Samples
from m3i_large.evaluate.ranking import averaged, chance_recalls, matches, recalls

Values = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """One kind: which samples it reads, and how it scores features."""

    reads: Kind
    values: Callable[[Samples, Features], Values]
    chance: Callable[[Samples], Values]


def _styles(samples: Samples) -> dict[str, Tensor]:
    """Sample indices by drawing style (one unnamed style where the data has none)."""
    names = [str(meta.get("style", "all")) for meta in samples.meta]
    return {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in sorted(set(names))}


def _captions(samples: Samples, index: Tensor) -> list[str]:
    return [samples.captions[i] for i in index.tolist()]


def _text_space(features: Features) -> tuple[Tensor, Tensor]:
    if features.image_NF is None or features.text_NF is None:
        raise UserError("evaluation: the recipe has no text term, so pictures and names share no space")
    return features.image_NF, features.text_NF


def retrieval(samples: Samples, features: Features) -> Values:
    """Names to pictures and back, one gallery per style, averaged; items with an equal caption count as right."""
    image_NF, text_NF = _text_space(features)
    parts = []
    for index in _styles(samples).values():
        captions = _captions(samples, index)
        score = text_NF[index] @ image_NF[index].T
        right = matches(captions, captions)
        parts.append(recalls("text_to_image", score, right) | recalls("image_to_text", score.T, right))
    return averaged(parts)


def retrieval_chance(samples: Samples) -> Values:
    """The same by chance."""
    parts = []
    for index in _styles(samples).values():
        captions = _captions(samples, index)
        right = matches(captions, captions)
        parts.append(chance_recalls("text_to_image", right) | chance_recalls("image_to_text", right))
    return averaged(parts)


def _names(samples: Samples) -> list[str]:
    return sorted(set(samples.captions))


def zeroshot(samples: Samples, features: Features) -> Values:
    """Every picture against all distinct names of the directory."""
    image_NF, text_NF = _text_space(features)
    names = _names(samples)
    first = torch.tensor([samples.captions.index(name) for name in names])
    result = recalls("x", image_NF @ text_NF[first].T, matches(samples.captions, names))
    return {"top1": result["x/R@1"], "top5": result["x/R@5"]}


def zeroshot_chance(samples: Samples) -> Values:
    """One of the distinct names, five of them."""
    size = len(_names(samples))
    return {"top1": 1 / size, "top5": min(1.0, 5 / size)}


def categories(samples: Samples, features: Features) -> Values:
    """Accuracy of the trained classifier."""
    if features.logit_NC is None:
        raise UserError("evaluation: the recipe has no category term, so there is no classifier")
    return accuracies(samples, features.logit_NC)


def accuracies(samples: Samples, logit_NC: Tensor) -> Values:
    """Share of right answers over all samples, and as the mean over classes."""
    hit = (logit_NC.argmax(1) == samples.labels_N).double()
    per_class = [hit[samples.labels_N == c].mean().item() for c in samples.labels_N.unique()]
    return {"top1": hit.mean().item(), "mean_per_class": sum(per_class) / len(per_class)}


def categories_chance(samples: Samples) -> Values:
    """Always the largest class: its share, and one class out of those present."""
    counts = samples.labels_N.bincount()
    return {"top1": (counts.max() / counts.sum()).item(), "mean_per_class": 1 / int((counts > 0).sum())}


def _style_pairs(samples: Samples) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(queries, gallery, right) for every ordered pair of styles; joined on concept, else on equal caption."""
    labels = [meta.get("concept") or caption for meta, caption in zip(samples.meta, samples.captions, strict=True)]
    styles = _styles(samples)
    if len(styles) < 2:
        raise UserError(f"--data: has the style {', '.join(styles)} only; needed: two styles (.json field style)")
    pairs = []
    for a in styles:
        for b in styles:
            if a != b:
                right = matches([labels[i] for i in styles[a].tolist()], [labels[i] for i in styles[b].tolist()])
                both = right.any(1)
                pairs.append((styles[a][both], styles[b], right[both]))
    return pairs


def style_search(samples: Samples, features: Features) -> Values:
    """Nearest neighbour from one drawing style in the other, by cosine of pooled features, both directions."""
    pooled = torch.nn.functional.normalize(features.pooled_NE, dim=-1)
    pairs = _style_pairs(samples)
    return averaged([recalls("style_to_style", pooled[q] @ pooled[g].T, right) for q, g, right in pairs])


def style_chance(samples: Samples) -> Values:
    """The same by chance."""
    return averaged([chance_recalls("style_to_style", right) for _, _, right in _style_pairs(samples)])


KINDS: dict[str, Evaluation] = {
    "retrieval": Evaluation("image_text", retrieval, retrieval_chance),
    "zeroshot": Evaluation("image_text", zeroshot, zeroshot_chance),
    "categories": Evaluation("image_category", categories, categories_chance),
    "styles": Evaluation("image_text", style_search, style_chance),
}
