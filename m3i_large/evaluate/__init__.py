"""What a pre-trained model can do without fine-tuning, beside chance and beside the untrained model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3i_large.checkpoint import find_checkpoint
from m3i_large.data.source_config import Kind
from m3i_large.errors import UserError
from m3i_large.evaluate.features import Features, Pictures, Samples, encode
from m3i_large.evaluate.kinds import KINDS, Evaluation, accuracies, categories_chance
from m3i_large.evaluate.load import Encoder, load_encoders
from m3i_large.evaluate.names import ClassNames, of_classes
from m3i_large.evaluate.probes import PROBES
from m3i_large.metrics import append_row
from m3i_large.parallel.comm import Rank
from m3i_large.run import RECIPE

__all__ = ["KINDS", "PROBES", "ClassNames", "evaluate"]


def evaluate(
    kinds: Sequence[str],
    path: Path,
    *,
    data: Path,
    train: Path | None = None,
    branch: str = "student",
    classes: ClassNames | None = None,
    rank: Rank | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a run, a checkpoint or an exported backbone on the shards of a directory.

    Args:
        kinds: of KINDS and PROBES; a backbone alone has the probes only.
        train: directory of shards that the probes learn from.
        classes: names of the classes: `zeroshot` is then of labelled pictures.
        rank: each rank shows its share of the pictures to the model; the first one returns results.

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
    device = None if rank is None else rank.device
    models = _Models(load_encoders(path, branch=branch, device=device), rank)
    if models.encoders["values"].objective is None and (other := [kind for kind in kinds if kind not in PROBES]):
        raise UserError(f"eval: {path} is a backbone alone, got kind {other[0]!r}; needed: {' or '.join(PROBES)}")
    known = dict(KINDS) if classes is None else KINDS | {"zeroshot": of_classes(classes)}
    scores = [models.score(kind, known.get(kind), data, train) for kind in kinds]
    if rank is not None and not rank.is_first:
        return []
    results = [{"kind": kind, "data": str(data), **score} for kind, score in zip(kinds, scores, strict=True)]
    if (path / RECIPE).is_file():
        step = int(find_checkpoint(path).name.removeprefix("step_"))
        for result in results:
            append_row(path / "eval.jsonl", {"step": step, **result})
    return results


@dataclass
class _Models:
    """The trained and the untrained model, and the features that they were asked for, each computed once."""

    encoders: dict[str, Encoder]
    rank: Rank | None
    ready: dict[tuple[Path, Kind], tuple[Samples, dict[str, Features]] | None] = field(default_factory=dict)

    def features(self, directory: Path, kind: Kind) -> tuple[Samples, dict[str, Features]] | None:
        """None on all ranks but the first."""
        if (directory, kind) not in self.ready:
            pictures = Pictures(directory, kind, image_size=self.encoders["values"].image_size)
            found = encode(list(self.encoders.values()), pictures, rank=self.rank)
            named = None if found is None else (found[0], dict(zip(self.encoders, found[1], strict=True)))
            self.ready[directory, kind] = named
        return self.ready[directory, kind]

    def score(self, kind: str, known: Evaluation | None, data: Path, train: Path | None) -> dict[str, Any]:
        """{num_samples, values, untrained, chance}; nothing on all ranks but the first."""
        shown = self.features(data, "image_category" if known is None else known.reads)
        learned = None if known is not None or train is None else self.features(train, "image_category")
        if shown is None:
            return {}
        samples, features = shown
        if known is not None:
            values = {name: known.values(samples, own) for name, own in features.items()}
            return {"num_samples": len(samples), **values, "chance": known.chance(samples)}
        assert learned is not None, "checked by evaluate"
        seen, taught = learned
        num_classes = int(max(seen.labels_N.max(), samples.labels_N.max())) + 1
        row: dict[str, Any] = {"num_samples": len(samples)}
        for name, own in features.items():
            train_MD = taught[name].mean_ND
            logit_NC = PROBES[kind](own.mean_ND, train_MD=train_MD, label_M=seen.labels_N, num_classes=num_classes)
            row[name] = accuracies(samples, logit_NC)
        return row | {"chance": categories_chance(samples)}
