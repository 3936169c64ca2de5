"""Recipes beside each other under the same conditions, and under several seeds: what is luck and what is not."""

import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from m3i_large.errors import UserError
from m3i_large.evaluate import KINDS, PROBES, evaluate
from m3i_large.metrics import read_metrics, read_rows, write_json
from m3i_large.objective import ObjectiveConfig
from m3i_large.recipe import load_recipe
from m3i_large.recipe_file import locate, names_in, one_line, read_yaml

STUDIES = Path(__file__).parent / "studies"
LAUNCHER = Path("launchers/pretrain.py")
# The first steps fill caches and are slower.
WARM_STEPS = 5

Row = dict[str, Any]


class StudyConfig(BaseModel):
    """What is compared: recipes, what is changed in all of them, how many seeds, and where they are measured."""

    model_config = ConfigDict(extra="forbid")

    recipes: list[str] = Field(min_length=1, description="names or YAML files")
    overrides: list[str] = Field([], description="a.b=value or scale=demo, for every recipe")
    seeds: int = Field(1, gt=0, description="seeds 0, 1, ... of every recipe")
    data: str = Field(description="directory of shards to evaluate on")
    train: str | None = Field(None, description="directory of shards that knn and linear learn from")


def load_study(name: str) -> StudyConfig:
    """Reads a study by name or path; UserError in one line."""
    values = read_yaml(locate(name, STUDIES, what="study"))
    values.pop("name", None)
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"study {name}: {one_line(error, StudyConfig)}") from None


def study_names() -> list[str]:
    """Names of the studies that ship with the package."""
    return names_in(STUDIES)


def run_study(study: StudyConfig, *, ds: Path, out: Path) -> list[Row]:
    """Trains and evaluates every recipe and seed one after the other; what is finished already is not repeated.

    Returns:
        One row per recipe and figure: {recipe, figure, mean, sd, values, untrained, chance}; fractions, except the
        figure `seconds per step`, which has neither untrained nor chance. sd is that of a sample. Also written to
        out/study.json, out/study.md and out/study.png.

    Raises:
        UserError: no launcher in the working directory, a recipe that does not exist, a run that ended badly.
    """
    recipes = {name: load_recipe(name, study.overrides) for name in study.recipes}  # refuses mistakes before any work
    if not LAUNCHER.is_file():
        raise UserError(f"study: {LAUNCHER} is not below the working directory; needed: the project's root")
    rows: list[Row] = []
    for file, recipe in recipes.items():
        name = Path(file).stem
        kinds = kinds_of(recipe.objective, probes=study.train is not None)
        runs = [out / name / f"seed_{seed}" for seed in range(study.seeds)]
        for seed, run in enumerate(runs):
            _train(file, [*study.overrides, f"train.seed={seed}"], ds=ds, run=run)
        rows += _rows(name, [_results(run, kinds, study) for run in runs], runs)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", rows)
    (out / "study.md").write_text(as_markdown(rows), encoding="utf-8")
    draw(rows, out / "study.png")
    return rows


def kinds_of(objective: ObjectiveConfig, *, probes: bool) -> list[str]:
    """The evaluations that an objective has the heads for."""
    needs = {"retrieval": "text", "zeroshot": "text", "categories": "category", "styles": None}
    has = {term.target for term in objective.terms} | {None}
    return [kind for kind in KINDS if needs[kind] in has] + (list(PROBES) if probes else [])


def _train(recipe: str, overrides: Sequence[str], *, ds: Path, run: Path) -> None:
    # A port of its own: another training on this machine has the launcher's default one.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(_free_port())]
    command = [*launcher, str(LAUNCHER), "--ds", str(ds), "--recipe", recipe, "--out", str(run), *overrides]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UserError(f"study: the run {run} ended with status {status}; its output says why")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _results(run: Path, kinds: list[str], study: StudyConfig) -> list[Row]:
    """Evaluations of a finished run: those in its eval.jsonl, the others now."""
    last = read_metrics(run)[-1]["step"] + 1
    done = {r["kind"]: r for r in read_rows(run / "eval.jsonl") if r["step"] == last and r["data"] == study.data}
    missing = [kind for kind in kinds if kind not in done]
    if missing:
        train = Path(study.train) if study.train else None
        done |= {r["kind"]: r for r in evaluate(missing, run, data=Path(study.data), train=train)}
    return [done[kind] for kind in kinds]


def _rows(recipe: str, seeds: list[list[Row]], runs: list[Path]) -> Iterator[Row]:
    for results in zip(*seeds, strict=True):
        for name, chance in results[0]["chance"].items():
            values = [result["values"][name] for result in results]
            untrained = statistics.mean(result["untrained"][name] for result in results)
            figure = f"{results[0]['kind']} {name}"
            yield _summary(recipe, figure, values) | {"untrained": untrained, "chance": chance}
    times = [statistics.median(row["time/step_s"] for row in read_metrics(run)[WARM_STEPS:]) for run in runs]
    yield _summary(recipe, "seconds per step", times)


def _summary(recipe: str, figure: str, values: list[float]) -> Row:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"recipe": recipe, "figure": figure, "mean": statistics.mean(values), "sd": spread, "values": values}


def as_markdown(rows: list[Row]) -> str:
    """One table for a single recipe (a figure a line), one with a recipe a line for several."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    if len(recipes) == 1:
        lines = ["| figure | mean | sd | untrained | chance | times chance |", "|---|---|---|---|---|---|"]
        for row in rows:
            if "chance" in row:
                shown = [f"{row[k]:.1%}" for k in ("mean", "sd", "untrained", "chance")]
                lines.append(f"| {row['figure']} | {' | '.join(shown)} | {row['mean'] / row['chance']:.1f} |")
        return "\n".join(lines) + "\n"
    figures = [f for f in dict.fromkeys(row["figure"] for row in rows) if _is_shown(f)]
    lines = ["| recipe | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for recipe in recipes:
        found = {row["figure"]: row for row in rows if row["recipe"] == recipe}
        lines.append(f"| {recipe} | " + " | ".join(_cell(found.get(f)) for f in figures) + " |")
    chance = {row["figure"]: row["chance"] for row in rows if "chance" in row}
    lines.append("| chance | " + " | ".join(f"{chance[f]:.1%}" if f in chance else "" for f in figures) + " |")
    untrained = {row["figure"]: row["untrained"] for row in rows if "untrained" in row}
    cells = (f"{untrained[f]:.1%}" if f in untrained else "" for f in figures)
    return "\n".join([*lines, "| untrained | " + " | ".join(cells) + " |"]) + "\n"


def _is_shown(figure: str) -> bool:
    """First choices only: a table of several recipes has one column for each kind."""
    return figure.endswith((" top1", "R@1", "seconds per step"))


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if "chance" not in row:
        return f"{row['mean']:.2f}"
    return f"{row['mean']:.1%}" + (f" ± {row['sd']:.1%}" if len(row["values"]) > 1 else "")


def draw(rows: list[Row], path: Path) -> None:
    """One panel for each figure, a bar for each recipe, with chance (dotted) and the untrained model (dashed)."""
    from matplotlib.figure import Figure

    figures = [f for f in dict.fromkeys(row["figure"] for row in rows) if _is_shown(f)]
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    picture = Figure(figsize=(11, 1.2 + 0.24 * len(recipes) * ((len(figures) + 2) // 3)), layout="constrained")
    axes = picture.subplots((len(figures) + 2) // 3, 3, squeeze=False, sharey=True).flatten()
    for panel, figure in zip(axes, figures, strict=False):
        found = {row["recipe"]: row for row in rows if row["figure"] == figure}
        panel.barh(recipes, [found[r]["mean"] if r in found else 0.0 for r in recipes], color="tab:blue")
        any_row = next(iter(found.values()))
        for key, style in (("chance", ":"), ("untrained", "--")):
            if key in any_row:
                panel.axvline(any_row[key], color="black", linestyle=style, linewidth=1)
        panel.set_title(figure, fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in axes[len(figures) :]:
        panel.set_axis_off()
    axes[0].invert_yaxis()
    picture.savefig(path, dpi=110)
