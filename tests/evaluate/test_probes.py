"""Probes: neighbours by brute force, regression beside its optimum, names of classes written out, exports as runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import written
from patience import PATIENCE_S
from ranks import free_port
from tiny import ROOT, environment, write_data
from torch import Tensor

from m3i_large.errors import UserError
from m3i_large.evaluate import evaluate, probes
from m3i_large.evaluate.features import Features, Samples, encode_texts
from m3i_large.evaluate.load import load_encoders
from m3i_large.evaluate.names import ClassNames, class_vectors, of_classes, read_names
from m3i_large.export import export


def blobs(count: int, *, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Points around one centre a class, in eight dimensions of very different scales."""
    centre = torch.randn(classes, 8, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (count,), generator=draws)
    return (centre[label] + 0.6 * torch.randn(count, 8, generator=draws)) * torch.logspace(-2, 2, 8), label


def test_neighbours_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "QUERIES", 7)  # several chunks and a last one
    (train, label), (test, _) = blobs(60, seed=1), blobs(20, seed=2)
    votes = probes.knn(test, train_MD=train, label_M=label, num_classes=4)
    for n in range(20):
        cosine = [F.cosine_similarity(test[n], train[m], dim=0).item() for m in range(60)]
        nearest = sorted(range(60), key=lambda m: -cosine[m])[:20]
        wanted = torch.zeros(4)
        for m in nearest:
            wanted[label[m]] += torch.tensor(cosine[m] / 0.07).exp()
        torch.testing.assert_close(votes[n], wanted, rtol=1e-3, atol=1e-3)


def test_many_samples_are_fitted_by_the_sweep_as_well_as_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, label), (test, truth) = blobs(6000, seed=1), blobs(2000, seed=2)

    def accuracy() -> float:
        logit = probes.linear(test, train_MD=train, label_M=label, num_classes=4)
        return (logit.argmax(1) == truth).double().mean().item()

    exact = accuracy()
    monkeypatch.setattr(probes, "EXACT", 100)
    assert exact > 0.75 and accuracy() > exact - 0.01


def test_the_sweep_takes_the_rate_that_is_best_on_what_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    train, label = blobs(3000, seed=1)
    train = (train - train.mean(0)) / train.std(0)
    held = torch.arange(3000) % 5 == 0
    alone = {}
    for rate in (1e-4, 0.1, 30.0):
        monkeypatch.setattr(probes, "RATES", (rate,))
        alone[rate] = probes.sweep(train, label, 4, held_M=held)
    monkeypatch.setattr(probes, "RATES", (1e-4, 0.1, 30.0))
    weight, bias = probes.sweep(train, label, 4, held_M=held)
    right = {r: ((train[held] @ w + b).argmax(1) == label[held]).sum().item() for r, (w, b) in alone.items()}
    best = max(right, key=right.get)
    assert sorted(right.values())[-2] < right[best]
    torch.testing.assert_close(weight, alone[best][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bias, alone[best][1], rtol=1e-3, atol=1e-4)
    # The held samples change nothing but the choice.
    changed = label.clone()
    changed[held] = 0
    monkeypatch.setattr(probes, "RATES", (best,))
    torch.testing.assert_close(probes.sweep(train, changed, 4, held_M=held)[0], weight, rtol=1e-3, atol=1e-4)


def test_one_step_of_the_sweep_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    train, label = blobs(50, seed=3)
    monkeypatch.setattr(probes, "RATES", (0.3,))
    monkeypatch.setattr(probes, "PASSES", 1)
    weight, bias = probes.sweep(train, label, 4, held_M=torch.arange(50) >= 40)
    w, b = torch.zeros(8, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    F.cross_entropy(train[:40] @ w + b, label[:40]).backward()
    torch.testing.assert_close(weight, -0.3 * w.grad)
    torch.testing.assert_close(bias, -0.3 * b.grad)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given")
    written.write(root / "run", written.VIT)
    write_data(root / "data", samples=12)
    export(root / "run", to="safetensors", out=root / "ours.safetensors")
    export(root / "run", to="timm", out=root / "timm.safetensors")
    export(root / "run", to="hf", out=root / "hub")
    return root


@pytest.mark.parametrize("file", ["ours.safetensors", "timm.safetensors", "hub"])
def test_an_export_is_probed_as_its_run(given: Path, file: str) -> None:
    where = {"data": given / "data", "train": given / "data"}
    run = evaluate(["knn", "linear"], given / "run", **where)
    exported = evaluate(["knn", "linear"], given / file, **where)
    for mine, theirs in zip(exported, run, strict=True):
        assert mine["values"] == theirs["values"] and mine["chance"] == theirs["chance"]
        assert mine["num_samples"] == 12
    pixels_NHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    here, there = (load_encoders(given / name) for name in (file, "run"))
    with torch.no_grad():
        torch.testing.assert_close(here["values"].tokens(pixels_NHWC), there["values"].tokens(pixels_NHWC))
        assert not torch.allclose(here["untrained"].tokens(pixels_NHWC), there["values"].tokens(pixels_NHWC), atol=0.1)
    with pytest.raises(UserError, match="is a backbone alone, got kind 'retrieval'; needed: knn or linear"):
        evaluate(["knn", "retrieval"], given / file, **where)


def test_class_vectors_written_out(given: Path) -> None:
    encoder = load_encoders(given / "run")["values"]
    classes = ClassNames(names=["disc", "cross", "bar"], templates=["a {}".format, "a red {} here".format])
    vectors = class_vectors(encoder, classes)
    for row, name in enumerate(classes.names):
        texts = encode_texts(encoder, [f"a {name}", f"a red {name} here"])
        mean = (texts[0] / texts[0].norm() + texts[1] / texts[1].norm()) / 2
        torch.testing.assert_close(vectors[row], mean / mean.norm())
    samples = Samples([], torch.tensor([0, 1, 2, 2]), [{}] * 4)
    image = torch.cat([vectors, vectors[:1]])  # three right, one wrong
    features = Features(image, image, image_NF=image, encoder=encoder)
    evaluation = of_classes(classes)
    got, chance = evaluation.values(samples, features), evaluation.chance(samples)
    assert got["top1"] == 0.75 and got["mean_per_class"] == pytest.approx((1 + 1 + 0.5) / 3) and got["top5"] == 1.0
    assert chance["top1"] == 0.5 and chance["top5"] == 1.0
    with pytest.raises(UserError, match="got 3 names, but a picture is of class 3"):
        of_classes(classes).values(Samples([], torch.tensor([3]), [{}]), features)


def test_names_and_templates(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("disc\n\ncross\n")
    (tmp_path / "texts.txt").write_text("a photo of {}.\n")
    own = read_names(str(tmp_path / "names.txt"), str(tmp_path / "texts.txt"))
    assert own.names == ["disc", "cross"] and [t("disc") for t in own.templates] == ["a photo of disc."]
    assert [t("disc") for t in read_names(str(tmp_path / "names.txt"), None).templates] == ["disc"]
    imagenet = read_names("imagenet", None)
    assert len(imagenet.names) == 1000 and len(imagenet.templates) == 80
    assert len(read_names("imagenet", "simple").templates) == 7
    (tmp_path / "texts.txt").write_text("a photo\n")
    with pytest.raises(UserError, match=r"got 'a photo'; needed: one \{\} in every line"):
        read_names("imagenet", str(tmp_path / "texts.txt"))
    with pytest.raises(UserError, match=r"--classes: got none\.txt, which is no file"):
        read_names("none.txt", None)


def test_the_command(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from m3i_large.cli import main

    (tmp_path / "names.txt").write_text("disc\ncross\nbar\n")

    def run(*more: str) -> Any:
        words = ["m3i", "eval", "zeroshot", str(given / "run"), "--data", str(given / "data"), "--json", *more]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    assert run("--classes", str(tmp_path / "names.txt")) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["num_samples"] == 12 and row["values"].keys() == {"top1", "mean_per_class", "top5"}
    assert run("--templates", "simple") == 2
    assert "--templates: got it without --classes" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_have_one_ranks_results(given: Path, tmp_path: Path) -> None:
    """Runs of 64 pictures in turn, the last one short."""
    write_data(tmp_path / "data", samples=100)
    alone = evaluate(["knn", "retrieval"], given / "run", data=tmp_path / "data", train=given / "data")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    launcher += ["--master_port", str(free_port()), str(ROOT / "launchers/evaluate.py")]
    words = ["knn,retrieval", given / "run", "--data", tmp_path / "data", "--train", given / "data", "--json"]
    done = subprocess.run(
        [*launcher, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    assert json.loads(line) == alone
