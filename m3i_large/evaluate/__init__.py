"""What a pre-trained model can do without fine-tuning, beside chance and beside the untrained model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3i_large.checkpoint import find_checkpoint
from m3i_large.data.source_config import Kind
from m3i_large.errors import UserError
from m3i_large.evaluate.features import Features, Samples, encode, read_samples
from m3i_large.evaluate.kinds import KINDS, Values, accuracies, categories_chance
from m3i_large.evaluate.load import load_trained, load_untrained
from m3i_large.evaluate.probes import PROBES
from m3i_large.metrics import append_row
from m3i_large.objective import Objective
from m3i_large.recipe import Recipe
from m3i_large.run import RECIPE

__all__ = ["KINDS", "PROBES", "evaluate"]


def evaluate(
    kinds: Sequence[str], path: Path, *, data: Path, train: Path | None = None, branch: str = "student"
) -> list[dict[str, Any]]:
    """Evaluates a run or checkpoint on the shards of a directory.

    Args:
        kinds: of KINDS and PROBES.
        train: directory of shards that the probes learn from.

    Returns:
        One result per kind: {kind, data, num_samples, values, chance, untrained}, all values fractions. Where `path` is
        a run directory the results are also appended to its eval.jsonl, with the step.

    Raises:
        UserError: an unknown kind, a probe without `train`, no checkpoint, no fitting data.
    """
    for kind in kinds:
        if kind not in KINDS and kind not in PROBES:
            raise UserError(f"eval: got kind {kind!r}; needed: one of {', '.join([*KINDS, *PROBES])}")
        if kind in PROBES and train is None:
            raise UserError(f"eval: {kind} learns from labelled samples; needed: --train with a directory of shards")
    recipe, trained = load_trained(path, branch=branch)
    models = {"values": _Model(recipe, trained), "untrained": _Model(recipe, load_untrained(recipe))}
    results = []
    for kind in kinds:
        row: dict[str, Any] = {"kind": kind, "data": str(data)}
        for name, model in models.items():
            samples, values = model.score(kind, data, train)
            row |= {"num_samples": len(samples), name: values}
        row["chance"] = KINDS[kind].chance(samples) if kind in KINDS else categories_chance(samples)
        results.append(row)
    if (path / RECIPE).is_file():
        step = int(find_checkpoint(path).name.removeprefix("step_"))
        for result in results:
            append_row(path / "eval.jsonl", {"step": step, **result})
    return results


@dataclass
class _Model:
    """One model and the features it was asked for, each computed once."""

    recipe: Recipe
    objective: Objective
    ready: dict[tuple[Path, Kind], tuple[Samples, Features]] = field(default_factory=dict)

    def features(self, directory: Path, kind: Kind) -> tuple[Samples, Features]:
        if (directory, kind) not in self.ready:
            samples = read_samples(directory, kind, image_size=self.recipe.data.image_size)
            self.ready[directory, kind] = (samples, encode(self.objective, self.recipe, samples))
        return self.ready[directory, kind]

    def score(self, kind: str, data: Path, train: Path | None) -> tuple[Samples, Values]:
        if kind in KINDS:
            samples, features = self.features(data, KINDS[kind].reads)
            return samples, KINDS[kind].values(samples, features)
        assert train is not None, "checked by evaluate"
        samples, features = self.features(data, "image_category")
        known, learned = self.features(train, "image_category")
        num_classes = int(max(known.labels_N.max(), samples.labels_N.max())) + 1
        logit_NC = PROBES[kind](
            features.mean_ND, train_MD=learned.mean_ND, label_M=known.labels_N, num_classes=num_classes
        )
        return samples, accuracies(samples, logit_NC)
