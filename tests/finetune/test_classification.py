"""Classification: its augmentation beside timm's, mixing written out, folders and shards through the launcher."""

import csv
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shards
import torch
import tuned
import written
from PIL import Image
from timm.data import auto_augment
from tiny import launch

from m3i_large.cli_launch import finetune_classification, finetune_detection
from m3i_large.errors import UserError
from m3i_large.finetune.classification.config import AugmentConfig, ClassificationConfig
from m3i_large.finetune.classification.images import Folders
from m3i_large.finetune.classification.model import Mix, mixed, target_of
from m3i_large.finetune.classification.task import ClassificationTask, draw_mix
from m3i_large.finetune.classification.transforms import RAND_AUGMENT, augmented, centred, erased, rand_augment
from m3i_large.metrics import read_rows

COLOURS = {"blue": (30, 40, 200), "green": (20, 190, 40), "red": (200, 30, 30)}


def picture(number: int, colour: tuple[int, int, int]) -> Image.Image:
    rng = np.random.default_rng(number)
    pixels = np.full((40, 50, 3), colour) + rng.integers(-20, 20, (40, 50, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_folders(root: Path, *, train: int = 5, evaluated: int = 3) -> Path:
    for split, count in (("train", train), ("val", evaluated)):
        for number, (name, colour) in enumerate(COLOURS.items()):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                picture(1000 * number + index, colour).save(root / split / name / f"{index}.png")
    return root


def write_shards(root: Path) -> Path:
    for split in ("train", "val"):
        samples = []
        for index in range(9):
            held = io.BytesIO()
            picture(index, list(COLOURS.values())[index % 3]).save(held, "PNG")
            samples.append({"key": f"{index:04d}", "png": held.getvalue(), "cls": str(index % 3)})
        shards.write_shard(root / f"{split}-000.tar", samples)
    return root


def test_strengths_are_timms() -> None:
    """Both signs of every operation at several magnitudes, and its set of operations."""
    assert list(RAND_AUGMENT) == auto_augment._RAND_INCREASING_TRANSFORMS
    for name, arguments in RAND_AUGMENT.items():
        theirs = auto_augment.LEVEL_TO_ARG[name]
        for level in (0.0, 3.3, 9.0, 10.0):
            wanted = set()
            for seed in range(20):  # timm draws the sign from Python's generator
                random.seed(seed)
                wanted.add(theirs(level, {}) if theirs else ())
            got = {arguments(level / 10, sign) for sign in (1, -1)}
            assert _near(wanted, got), name


def _near(first: set[tuple[float, ...]], second: set[tuple[float, ...]]) -> bool:
    """Equal as sets of numbers up to rounding."""
    a, b = (sorted({tuple(round(abs(v) if v == 0 else v, 9) for v in one) for one in some}) for some in (first, second))
    return a == b


def test_augmentation_is_its_generators() -> None:
    image, config = np.asarray(picture(0, (100, 60, 30))), AugmentConfig(size=24, erase=0.5)
    one, again, other = (augmented(image, config, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (24, 24, 3) and one.dtype == np.uint8
    assert (one == again).all() and not (one == other).all()


def test_magnitudes_and_chances_of_rand_augment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations with a probability of one half each, of normal magnitudes, all fifteen equally often."""
    from m3i_large.finetune.classification import transforms

    seen: list[tuple[str, Any]] = []

    def note(name: str) -> Any:
        return lambda image, *arguments, **more: (seen.append((name, arguments)), image)[1]

    monkeypatch.setattr(transforms, "NAME_TO_OP", {name: note(name) for name in RAND_AUGMENT})
    rng, image = np.random.default_rng(0), np.zeros((4, 4, 3), np.uint8)
    for _ in range(3000):
        rand_augment(image, 6.0, 1.0, rng=rng)
    assert len(seen) / 3000 == pytest.approx(1.0, abs=0.05)
    counts = [sum(name == own for name, _ in seen) for own in RAND_AUGMENT]
    assert min(counts) > 0.7 * len(seen) / 15
    degrees = np.array([arguments[0] for name, arguments in seen if name == "Rotate"])
    assert abs(np.mean(degrees > 0) - 0.5) < 0.15
    assert np.abs(degrees).mean() == pytest.approx(18, abs=1) and np.abs(degrees).std() == pytest.approx(3, abs=0.8)


def test_an_erased_rectangle() -> None:
    image = np.full((60, 80, 3), 7, np.uint8)
    shares = []
    for seed in range(300):
        out = erased(image, np.random.default_rng(seed))
        changed = (out != 7).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        shares.append(area / changed.size)
        assert changed.sum() > 0.97 * area  # noise is 7 in all channels now and then
    assert (image == 7).all()
    assert 0.015 < min(shares) < 0.03 and 0.25 < max(shares) < 0.34


def test_the_evaluated_centre() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[5:35, 15:45] = 255  # three quarters of the shorter side, in the middle
    assert centred(image, AugmentConfig(size=30, evaluated_share=0.75)).min() > 250
    assert centred(image, AugmentConfig(size=40, evaluated_share=1.0))[:4].max() < 5


def test_mixing_written_out() -> None:
    torch.manual_seed(0)
    image, label = torch.randn(4, 3, 6, 8), torch.tensor([0, 1, 2, 1])
    for mix in (Mix(share=0.3, box=None), Mix(share=1 - 6 / 48, box=(1, 2, 3, 2))):
        got, target = mixed(image, mix), target_of(label, mix, num_classes=3, smoothing=0.2)
        for b in range(4):
            other = 3 - b
            for row in range(6):
                for column in range(8):
                    inside = mix.box is not None and 1 <= row < 4 and 2 <= column < 4
                    share = (0 if inside else 1) if mix.box else 0.3
                    wanted = share * image[b, :, row, column] + (1 - share) * image[other, :, row, column]
                    torch.testing.assert_close(got[b, :, row, column], wanted)
            for k in range(3):
                own, others = (0.8 * (label[i] == k).item() + 0.2 / 3 for i in (b, other))
                assert target[b, k].item() == pytest.approx(mix.share * own + (1 - mix.share) * others, abs=1e-6)
    assert target_of(label, None, num_classes=3, smoothing=0.0).tolist()[2] == [0, 0, 1]


def test_drawn_mixes() -> None:
    config = AugmentConfig(size=50, mixup=0.8, cutmix=1.0)
    found = [draw_mix(config, np.random.default_rng(seed)) for seed in range(2000)]
    boxes = [mix for mix in found if mix.box is not None]
    assert abs(len(boxes) / 2000 - 0.5) < 0.04
    for mix in boxes:
        top, left, height, width = mix.box
        assert top >= 0 and top + height <= 50 and left >= 0 and left + width <= 50
        assert mix.share == pytest.approx(1 - height * width / 2500)
    blends = [mix.share for mix in found if mix.box is None]
    variance = 1 / (4 * (2 * 0.8 + 1))  # of Beta(0.8, 0.8)
    assert np.mean(blends) == pytest.approx(0.5, abs=0.03) and np.var(blends) == pytest.approx(variance, rel=0.1)
    assert draw_mix(AugmentConfig(mixup=0, cutmix=0), np.random.default_rng(0)) is None


def test_batches_are_mixed_in_training_alone(tmp_path: Path) -> None:
    task = ClassificationTask(ClassificationConfig(), data=write_folders(tmp_path))
    rng = np.random.default_rng(0)
    batch = task.collate([task.train.read(k, rng) for k in range(4)], np.random.default_rng(3))
    assert batch.mix == draw_mix(AugmentConfig(), np.random.default_rng(3)) and batch.mix is not None
    assert batch.image_BCHW.shape == (4, 3, 224, 224) and batch.label_B.tolist() == [0, 0, 0, 0]
    assert task.collate([task.evaluated.read(k, None) for k in range(4)], None).mix is None


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda root: (root / "val/red").rename(root / "val/crimson"), "the splits differ in class crimson"),
        (lambda root: [p.unlink() for p in (root / "train/blue").iterdir()], "blue has no image"),
        (lambda root: (root / "val").rename(root / "valid"), "val, which is no directory"),
    ],
)
def test_data_that_cannot_be_meant(tmp_path: Path, spoil: Any, line: str) -> None:
    spoil(write_folders(tmp_path))
    with pytest.raises(UserError, match=line):
        ClassificationTask(ClassificationConfig(), data=tmp_path)


def test_shards_need_a_number_of_classes_and_keep_to_it(tmp_path: Path) -> None:
    write_shards(tmp_path)
    where = {"train": "train-*.tar", "evaluated": "val-*.tar"}
    with pytest.raises(UserError, match=r"task\.data\.num_classes: not set"):
        ClassificationTask(ClassificationConfig(data=where), data=tmp_path)
    task = ClassificationTask(ClassificationConfig(data=where | {"num_classes": 2}), data=tmp_path)
    with pytest.raises(ValueError, match="has class 2; needed: below 2"):
        task.evaluated.read(2, None)


def test_scores_by_hand(tmp_path: Path) -> None:
    task = ClassificationTask(ClassificationConfig(), data=write_folders(tmp_path / "data"))
    digests = {0: (0, [0, 1, 2]), 1: (0, [1, 0, 2]), 2: (0, [2, 1, 1]), 8: (2, [2, 0, 1])}
    assert task.score(digests, tmp_path / "out") == {"top1": 0.5, "top5": 0.75}
    rows = list(csv.reader((tmp_path / "out/predictions.csv").open()))
    assert rows[0] == ["image", "class", "predicted"] and rows[2] == ["blue/1.png", "blue", "green blue red"]
    assert len(Folders(tmp_path / "data/val")) == 9


@pytest.mark.slow
@pytest.mark.parametrize("parts", [written.VIT, written.LARGE], ids=["vit", "internimage"])
def test_it_learns_colours_continues_and_runs_on_two_ranks(tmp_path: Path, parts: dict[str, Any]) -> None:
    write_folders(tmp_path / "data")
    weights = tuned.write_weights(tmp_path, parts)
    task = {"kind": "classification", "augment": {"size": 64, "mixup": 0.8, "cutmix": 1.0}}
    recipe = tuned.write_recipe(tmp_path / "recipe.yaml", task, global_batch=6)
    options = ["--data", tmp_path / "data", "--recipe", recipe, "--weights", weights]
    if parts is written.VIT:
        done = launch(tuned.command("classification", *options, "--out", tmp_path / "none"))
        assert done.returncode == 2 and "got 64 for a ViT of 32 pixels" in done.stderr
        options.append("backbone.arch.image_size=64")
    run = tmp_path / "first"

    def first() -> Any:
        return launch(tuned.command("classification", *options, "--out", run))

    done = first()
    assert done.returncode == 0, done.stderr
    assert tuned.logged(run)[0] == pytest.approx(math.log(3), abs=0.02)  # nothing known of three classes
    (scored,) = read_rows(run / "eval.jsonl")
    assert scored["kind"] == "classification" and scored["num_samples"] == 9 and scored["values"]["top5"] == 1.0
    assert (run / "results/step_00000006/predictions.csv").is_file()
    tuned.assert_continues(run, first)
    if parts is written.VIT:
        plain = "{size: 64, mixup: 0, cutmix: 0, rand_augment: null, erase: 0}"
        more = ["train.steps=40", "train.checkpoint_every=40", f"task.augment={plain}", "task.head.std=0.02"]
        more += ["train.ema=0", "optim.lr.peak=3e-3", "--ds", tuned.ROOT / "ds_configs/zero3.json"]
        done = launch(tuned.command("classification", *options, *more, "--out", tmp_path / "two", ranks=2))
        assert done.returncode == 0, done.stderr
        assert read_rows(tmp_path / "two/eval.jsonl")[-1]["values"]["top1"] == 1.0


@pytest.mark.slow
def test_shards_through_the_launcher(tmp_path: Path) -> None:
    write_shards(tmp_path / "data")
    weights = tuned.write_weights(tmp_path, written.VIT)
    where = {"train": "train-*.tar", "evaluated": "val-*.tar", "num_classes": 3}
    task = {"kind": "classification", "augment": {"size": 32}, "data": where}
    recipe = tuned.write_recipe(tmp_path / "recipe.yaml", task, steps=2)
    options = ["--data", tmp_path / "data", "--recipe", recipe, "--weights", weights, "--out", tmp_path / "run"]
    done = launch(tuned.command("classification", *options))
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "run/eval.jsonl")[0]["num_samples"] == 9
    assert json.loads((tmp_path / "run/exit.json").read_text())["outcome"] == "finished"


def test_a_launcher_takes_recipes_of_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(tmp_path), "--weights", "none.pth", "--out", str(tmp_path / "run")]
    assert finetune_detection([*options, "--recipe", "ft_in1k_100ep"]) == 2
    assert "is one of classification; needed: launchers/finetune_classification.py" in capsys.readouterr().err
    assert finetune_classification([*options, "--recipe", "ft_coco_25ep"]) == 2
    assert "is one of detection; needed: launchers/finetune_detection.py" in capsys.readouterr().err
