"""What a pre-trained model can do without fine-tuning, beside chance and beside the untrained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3i_large.errors import UserError
from m3i_large.evaluate.features import Features, Samples, encode, read_samples
from m3i_large.evaluate.kinds import KINDS
from m3i_large.evaluate.load import find_checkpoint, load_trained, load_untrained
from m3i_large.metrics import append_row
from m3i_large.run import RECIPE

__all__ = ["KINDS", "evaluate"]


def evaluate(kinds: Sequence[str], path: Path, *, data: Path, branch: str = "student") -> list[dict[str, Any]]:
    """Evaluates a run or checkpoint on the shards of a directory.

    Returns:
        One result per kind: {kind, data, num_samples, values, chance, untrained}, all values fractions. Where `path` is
        a run directory the results are also appended to its eval.jsonl, with the step.

    Raises:
        UserError: an unknown kind, no checkpoint, no fitting data.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"eval: got kind {kind!r}; needed: one of {', '.join(KINDS)}")
    recipe, trained = load_trained(path, branch=branch)
    untrained = load_untrained(recipe)
    ready: dict[str, tuple[Samples, Features, Features]] = {}
    results = []
    for kind in kinds:
        evaluation = KINDS[kind]
        if evaluation.reads not in ready:
            samples = read_samples(data, evaluation.reads, image_size=recipe.data.image_size)
            ready[evaluation.reads] = (samples, encode(trained, recipe, samples), encode(untrained, recipe, samples))
        samples, after, before = ready[evaluation.reads]
        results.append(
            {
                "kind": kind,
                "data": str(data),
                "num_samples": len(samples),
                "values": evaluation.values(samples, after),
                "chance": evaluation.chance(samples),
                "untrained": evaluation.values(samples, before),
            }
        )
    if (path / RECIPE).is_file():
        step = int(find_checkpoint(path).name.removeprefix("step_"))
        for result in results:
            append_row(path / "eval.jsonl", {"step": step, **result})
    return results
