"""The same recipe under several seeds: what is luck and what is not."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from m3i_large.errors import UserError
from m3i_large.evaluate import KINDS, evaluate

LAUNCHER = Path("launchers/pretrain.py")


def run_study(
    recipe: str, *, data: Path, ds: Path, seeds: int, out: Path, overrides: list[str]
) -> list[dict[str, Any]]:
    """Trains seeds 0 to seeds - 1 one after the other (each resumes where it stopped) and evaluates every kind.

    Returns:
        One row per figure: {figure, mean, sd, values, untrained, chance}, fractions; sd is that of a sample. Also
        written to out/study.json.

    Raises:
        UserError: no launcher in the working directory, or a run that ended badly.
    """
    if not LAUNCHER.is_file():
        raise UserError(f"study: {LAUNCHER} is not below the working directory; needed: the project's root")
    figures: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        run = out / f"seed_{seed}"
        command = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            str(LAUNCHER),
            "--ds",
            str(ds),
            "--recipe",
            recipe,
        ]
        status = subprocess.run([*command, "--out", str(run), *overrides, f"train.seed={seed}"], check=False).returncode
        if status:
            raise UserError(f"study: the run {run} ended with status {status}; its output says why")
        for result in evaluate(list(KINDS), run, data=data):
            for name, value in result["values"].items():
                row = (value, result["untrained"][name], result["chance"][name])
                figures.setdefault(f"{result['kind']} {name}", []).append(row)
    rows = [_summary(name, values) for name, values in figures.items()]
    (out / "study.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _summary(figure: str, values: list[tuple[float, float, float]]) -> dict[str, Any]:
    trained, untrained, chance = (list(column) for column in zip(*values, strict=True))
    spread = statistics.stdev(trained) if len(trained) > 1 else 0.0
    summary = {"figure": figure, "mean": statistics.mean(trained), "sd": spread, "values": trained}
    return summary | {"untrained": statistics.mean(untrained), "chance": chance[0]}
