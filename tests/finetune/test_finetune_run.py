"""Fine-tuning through its launcher: exact continuation, more ranks, the average, everything that is refused."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import coco_files
import pytest
import tiny
import torch
import tuned
import written
import yaml
from patience import PATIENCE_S
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from m3i_large.checkpoint import Checkpoint, find_checkpoint
from m3i_large.cli_launch import finetune_detection
from m3i_large.errors import UserError
from m3i_large.finetune.classification.config import ClassificationConfig
from m3i_large.finetune.classification.model import Classifier
from m3i_large.finetune.detection.config import RcnnConfig
from m3i_large.finetune.detection.detr import Detr
from m3i_large.finetune.detection.rcnn import RCNN
from m3i_large.finetune.recipe import (
    RECIPES,
    FinetuneRecipe,
    finetune_recipe_header,
    finetune_recipe_names,
    load_finetune_recipe,
)
from m3i_large.finetune.segmentation.config import SegmentationConfig
from m3i_large.finetune.segmentation.model import UPerNet
from m3i_large.finetune.task import TaskModel
from m3i_large.metrics import read_metrics, read_rows
from m3i_large.models import create_model
from m3i_large.report import write_report
from m3i_large.watch import view

ROOT = Path(__file__).parent.parent.parent
SCRIPT = str(ROOT / "launchers/finetune_detection.py")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, an export, a recipe."""
    root = tmp_path_factory.mktemp("given")
    coco_files.write_set(root / "data")
    tuned.write_weights(root, written.VIT)
    head = coco_files.HEAD | {"masks": True, "mask_convs": 1}
    task = {"data": coco_files.DATA, "augment": {"size": 64, "scale": [0.7, 1.3]}, "head": head}
    tuned.write_recipe(root / "recipe.yaml", task)
    return root


def command(given: Path, out: Path, *more: object, ranks: int = 1, weights: bool = True) -> list[str]:
    options = ["--data", given / "data", "--recipe", given / "recipe.yaml", "--out", out]
    options += ["--weights", given / "weights.safetensors"] if weights else []
    return tuned.command("detection", *options, *more, ranks=ranks)


def finetune(given: Path, out: Path, *more: object, **how: Any) -> subprocess.CompletedProcess[str]:
    return tiny.launch(command(given, out, *more, **how))


@pytest.fixture(scope="module")
def whole(given: Path) -> Path:
    done = finetune(given, given / "whole")
    assert done.returncode == 0, done.stderr
    assert "finished after 6 of 6 steps" in done.stdout
    return given / "whole"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def test_a_run_leaves_what_its_user_looks_for(given: Path, whole: Path) -> None:
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(6))
    parts = {"loss/classifier", "loss/box_reg", "loss/objectness", "loss/rpn_box_reg", "loss/mask"}
    for row in rows:
        assert parts <= row.keys() and row["loss"] == pytest.approx(sum(row[name] for name in parts), rel=1e-6)
        assert row["optim/grad_norm"] > 0 and row["optim/skipped"] == 0
    (scored,) = read_rows(whole / "eval.jsonl")
    assert scored["step"] == 6 and scored["branch"] == "average" and scored["num_samples"] == 4
    assert {"box/AP", "mask/AP"} <= scored["values"].keys()
    assert (whole / "results/step_00000006/results_segm.json").is_file()
    env = json.loads((whole / "env.json").read_text())
    card = json.loads((given / "weights.safetensors.json").read_text())
    assert env["weights"]["sha256"] == card["sha256"]
    assert json.loads((whole / "exit.json").read_text())["outcome"] == "finished"
    assert yaml.safe_load((whole / "recipe.yaml").read_text())["data"] == str(given / "data")
    assert "nothing to do" in finetune(given, whole).stdout


def test_its_report_and_watch_show_it(whole: Path, tmp_path: Path) -> None:
    html = write_report(whole, out=tmp_path / "report.html").read_text(encoding="utf-8")
    values = read_rows(whole / "eval.jsonl")[-1]["values"]
    assert "fine-tuning: detection" in html and "finished after 6 of 6 steps" in html
    for name, value in values.items():
        assert name in html and f"{value:.1%}" in html, name
    for name in read_metrics(whole)[-1]:
        assert name in ("step", "attempt", "time") or name in html, name
    Console(file=(tmp_path / "view.txt").open("w"), width=80).print(view(whole))
    assert "step 6 of 6 (100%)" in (tmp_path / "view.txt").read_text()


def test_it_begins_at_the_exported_weights_and_random_does_not(given: Path, tmp_path: Path) -> None:
    slow = ["train.steps=1", "optim.lr.peak=1e-9", "optim.lr.warmup=0"]
    start = load_file(given / "weights.safetensors")
    for name, more in (("loaded", []), ("random", ["backbone.init=random"])):
        done = finetune(given, tmp_path / name, *slow, *more)
        assert done.returncode == 0, done.stderr
        saved = Checkpoint(find_checkpoint(tmp_path / name))
        same = [
            torch.allclose(saved.read_full(f"master/model.backbone.{k}"), x, atol=1e-6)
            for k, x in start.items()
            if k != "pos_embed"
        ]
        assert all(same) if name == "loaded" else not any(same)
    assert json.loads((tmp_path / "random/env.json").read_text())["weights"] == "random"


@pytest.mark.slow
def test_a_continued_run_is_bit_identical(given: Path, whole: Path, tmp_path: Path) -> None:
    """Stopped by a signal at some step, then the same command."""
    import signal
    import time

    out = tmp_path / "stopped"
    running = subprocess.Popen(
        command(given, out, "--debug"),
        env=tiny.environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while running.poll() is None and not read_rows(out / "metrics.jsonl"):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    told, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 75, told
    done = len(read_metrics(out))
    assert 0 < done < 6 and f"interrupted after {done} of 6 steps" in told
    assert finetune(given, out).returncode == 0
    assert losses(out) == losses(whole)
    a, b = (Checkpoint(find_checkpoint(run)) for run in (whole, out))
    names = a.keys()
    assert names == b.keys() and any(name.startswith("ema/average.") for name in names)
    for key in names:
        assert torch.equal(a.read_full(key), b.read_full(key)), key
    assert read_rows(out / "eval.jsonl")[-1]["values"] == read_rows(whole / "eval.jsonl")[-1]["values"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "more"), [(3, []), (1, ["train.accumulation=2"])])
def test_two_ranks_train_on_the_same_images(
    given: Path, whole: Path, stage: int, more: list[str], tmp_path: Path
) -> None:
    """Which anchors and proposals are drawn differs with the ranks, so losses agree only where all are taken."""
    everything = ["task.head.rpn_samples=4096", "task.head.box_samples=4096", "train.steps=2", *more]
    ds = ["--ds", ROOT / f"ds_configs/zero{stage}.json"]
    one = finetune(given, tmp_path / "one", *ds, *everything)
    assert one.returncode == 0, one.stderr
    two = finetune(given, tmp_path / "two", *ds, *everything, ranks=2)
    assert two.returncode == 0, two.stderr + two.stdout
    a, b = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [row["samples"] for row in a] == [row["samples"] for row in b]
    # Means over a rank's anchors, then over ranks, are not means over all anchors: near, not equal.
    for x, y in zip(a, b, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=0.15)
    scored = read_rows(tmp_path / "two/eval.jsonl")
    assert len(scored) == 1 and scored[0]["num_samples"] == 4


def test_the_average_is_the_recurrence_in_fp32(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["train.steps=4", "train.checkpoint_every=1", "train.checkpoint_keep=9"]
    assert finetune(given, out, *more).returncode == 0
    points = [Checkpoint(out / f"checkpoints/step_{step:08d}") for step in range(1, 5)]
    names = [key.removeprefix("ema/average.") for key in points[0].keys("ema/average.")]
    assert len(names) > 20
    for before, after, applied in zip(points, points[1:], (1, 2, 3), strict=False):
        kept = min(0.9, (1 + applied) / (10 + applied))
        for name in names:
            wanted = kept * before.read_full(f"ema/average.{name}") + (1 - kept) * after.read_full(
                f"master/model.{name}"
            )
            torch.testing.assert_close(after.read_full(f"ema/average.{name}"), wanted, rtol=1e-5, atol=1e-7)


def test_bf16_is_autocast_over_fp32_weights(given: Path, tmp_path: Path) -> None:
    """In the module as the engine calls it: matrix products in bf16, everything that is saved in fp32."""
    done = finetune(
        given, tmp_path / "run", "train.precision=bf16", "train.steps=2", "--ds", ROOT / "ds_configs/zero3.json"
    )
    assert done.returncode == 0, done.stderr
    saved = Checkpoint(find_checkpoint(tmp_path / "run"))
    assert {entry["dtype"] for key, entry in saved.manifest["tensors"].items() if "/model." in key} == {"float32"}
    exact = finetune(given, tmp_path / "exact", "train.steps=2", "--ds", ROOT / "ds_configs/zero3.json")
    assert exact.returncode == 0
    a, b = losses(tmp_path / "run"), losses(tmp_path / "exact")
    assert a != b and a == pytest.approx(b, rel=0.1)


def test_autocast_reaches_the_model() -> None:
    from m3i_large.finetune.loop import Root

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.layer(batch)

    x = torch.ones(2, 4)
    assert Root(Model(), None, dtype=torch.bfloat16)(x).dtype == torch.bfloat16
    root = Root(Model(), Model(), dtype=torch.float32)
    assert root(x).dtype == torch.float32 and not torch.equal(root(x), root(x, average=True))


def test_unreadable_images_are_replaced_and_told(given: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(given / "data", tmp_path / "data")
    (tmp_path / "data/train/0003.png").write_bytes(b"\x89PNG broken")
    for name in ("recipe.yaml", "weights.safetensors", "weights.safetensors.json"):
        shutil.copy(given / name, tmp_path)
    done = finetune(tmp_path, tmp_path / "run", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert {"0003.png" in row["reason"] for row in read_rows(tmp_path / "run/quarantine.jsonl")} == {True}
    for file in (tmp_path / "data/train").iterdir():
        file.write_bytes(b"no image")
    done = finetune(tmp_path, tmp_path / "other", "train.steps=3")
    assert done.returncode == 1 and "cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["backbone.init=random", "backbone.name=vit_s16"], "is a vit; needed: that, or none"),
        (["backbone.arch.width=64"], "needed"),
        (["train.global_batch=3", "train.accumulation=2"], "not a multiple"),
        (["task.head.anchors=[8,16]"], "one side for each"),
        (["task.hed.width=3"], "unknown key, did you mean 'head'"),
        (["task.data.train.images=nowhere"], "which is no directory"),
        (["--ds", "nowhere.json"], "--ds: got nowhere.json"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    given: Path, more: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: nothing of it gets as far as an engine."""
    arguments = command(given, tmp_path / "run", *more)[2:]
    assert finetune_detection(arguments) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and line in errors[0], errors
    assert not (tmp_path / "run").exists()


def test_without_weights_nothing_is_trained(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune_detection(command(given, tmp_path / "run", weights=False)[2:]) == 2
    assert "--weights: got none; needed: a file of `m3i export`" in capsys.readouterr().err
    arch = ["backbone.init=random", "backbone.name=vit", "train.steps=1"]
    arch += ["backbone.arch={image_size: 64, patch_size: 8, width: 32, depth: 1, heads: 2}"]
    assert finetune(given, tmp_path / "run", *arch, weights=False).returncode == 0


def test_evaluate_measures_a_checkpoint_and_trains_nothing(given: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    done = finetune(given, whole, "--evaluate")
    assert done.returncode == 0, done.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before
    rows = read_rows(whole / "eval.jsonl")
    assert len(rows) == 2 and rows[0]["values"] == rows[1]["values"]


@pytest.mark.parametrize("name", finetune_recipe_names())
def test_every_recipe_reads_and_has_its_header(name: str) -> None:
    recipe = load_finetune_recipe(name)
    header = finetune_recipe_header(name)
    assert recipe.name == name and len((RECIPES / f"{name}.yaml").read_text().splitlines()) <= 60
    assert "Reproduces:" in header and "Run:" in header and f"--recipe {name}" in header
    if said := re.search(r"Parameters: ([\d.]+) M trained", header):
        parameters = sum(p.numel() for p in model_of(recipe).parameters())
        assert parameters / 1e6 == pytest.approx(float(said[1]), abs=0.05)
    else:
        assert name == "demo_detection"


def model_of(recipe: FinetuneRecipe) -> TaskModel:
    """The model of a shipped recipe on its data's number of classes, without weights."""
    pixels = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    name = "internimage_h" if recipe.name.endswith("internimage_h") else "vit_b16"
    task = recipe.task
    with torch.device("meta"):
        backbone = create_model(name, **recipe.backbone.arch)
        if isinstance(task, ClassificationConfig):
            return Classifier(backbone, task.head, num_classes=1000, smoothing=task.augment.smoothing, **pixels)
        if isinstance(task, SegmentationConfig):
            size = task.augment.size
            return UPerNet(backbone, task.head, num_classes=task.data.num_classes, size=size, **pixels)
        images_C = torch.ones({"coco": 80, "lvis": 1203}[task.data.format])
        detector = RCNN if isinstance(task.head, RcnnConfig) else Detr
        return detector(backbone, task.head, images_C=images_C, **pixels)


@pytest.mark.slow
def test_lvis_trains_continues_and_is_scored_by_its_rules(given: Path, tmp_path: Path) -> None:
    coco_files.write_lvis(tmp_path / "data", "train", 9)
    coco_files.write_lvis(tmp_path / "data", "val", 5, first=1000)
    values = yaml.safe_load((given / "recipe.yaml").read_text())
    values["task"]["data"] = coco_files.LVIS_DATA
    values["task"]["head"] |= {"classifier": "federated", "federated_categories": 3, "min_score": 0.001}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    shutil.copy(given / "weights.safetensors", tmp_path)
    shutil.copy(given / "weights.safetensors.json", tmp_path)
    done = finetune(tmp_path, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (scored,) = read_rows(tmp_path / "run/eval.jsonl")
    assert {"box/AP", "box/APr", "box/APc", "box/APf", "mask/APr"} <= scored["values"].keys()
    rows = json.loads((tmp_path / "run/results/step_00000006/results_segm.json").read_text())
    assert {row["category_id"] for row in rows} <= set(coco_files.FREQUENCIES)
    assert max(Counter(row["image_id"] for row in rows).values()) <= 10
    tuned.assert_continues(tmp_path / "run", lambda: finetune(tmp_path, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rt_detr_v2", "d_fine"])
def test_a_detector_of_transformers_trains_continues_and_is_sharded(given: Path, tmp_path: Path, kind: str) -> None:
    head = "width: 32, heads: 2, feedforward: 64, decoder_layers: 2, queries: 20, denoising: 10, detections: 10"
    more = [f"task.head={{kind: {kind}, {head}}}"]
    done = finetune(given, tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    assert {"loss/vfl", "loss/bbox", "loss/giou"} <= read_metrics(tmp_path / "run")[0].keys()
    (scored,) = read_rows(tmp_path / "run/eval.jsonl")
    assert "box/AP" in scored["values"] and "mask/AP" not in scored["values"]
    tuned.assert_continues(tmp_path / "run", lambda: finetune(given, tmp_path / "run", *more))
    if kind == "rt_detr_v2":
        more += ["train.precision=bf16", "--ds", str(ROOT / "ds_configs/zero3.json")]
        done = finetune(given, tmp_path / "two", *more, ranks=2)
        assert done.returncode == 0, done.stderr
        assert all(math.isfinite(loss) for loss in losses(tmp_path / "two"))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'demo_detection'"):
        load_finetune_recipe("demo_detecton")
