"""The bench of the loader: every path makes the same samples of the same pictures. No timing is asserted."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from typer.testing import CliRunner

from m3i_large import bench_loader as bench
from m3i_large.cli import app
from m3i_large.errors import UserError


@pytest.fixture(scope="module")
def result() -> dict:
    return bench.bench_loader(samples=40, repeats=1, pictures=40)


def test_every_path_and_ratio_is_there_and_positive(result: dict) -> None:
    assert [row["path"] for row in result["paths"]] == list(bench.PATHS)
    assert {row["samples"] for row in result["paths"]} == {128}, "rounded up to whole batches"
    assert all(row["cpu_ms"] > 0 and row["samples_per_cpu_s"] > 0 for row in result["paths"])
    assert list(result["ratios"]) == [f"ours / {name}" for name in bench.PATHS if name != "ours"]
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert json.loads(json.dumps(result)) == result and result["pictures"]["number"] == 40


@pytest.mark.parametrize("name", bench.PATHS)
def test_a_path_makes_whole_batches_for_ever(name: str, tmp_path: Path) -> None:
    jpegs = bench._photos(5)  # fewer than a batch
    stream = bench.PATHS[name](bench.write_shard(tmp_path / "photo-000000.tar", jpegs), jpegs)
    assert [next(stream) for _ in range(3)] == [bench.BATCH] * 3
    stream.close()


def test_threads_are_as_before(result: dict) -> None:
    before = torch.get_num_threads(), cv2.getNumThreads()
    with pytest.raises(UserError, match="holds no JPEG"):
        bench.bench_loader(Path(__file__).parent)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before


def test_the_meter_counts_this_process_and_its_children() -> None:
    context = torch.multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()

    def work() -> None:
        ready.set()
        go.wait()
        np.linalg.svd(np.random.default_rng(0).random((700, 700)))
        ready.set()
        go.clear()
        go.wait()

    child = context.Process(target=work)
    child.start()
    ready.wait()
    ready.clear()
    meter = bench._Meter()
    before = meter.at_rest()
    go.set()
    ready.wait()
    done = meter.at_rest()
    assert done - before > 0.05
    go.set()
    child.join()
    assert meter.now() >= done - 0.02, "what an ended child used is kept (in ticks of 10 ms)"


def test_pictures_are_as_big_as_photos() -> None:
    sizes = [len(data) for data in bench._photos(10)]
    assert 40e3 < np.median(sizes) < 60e3
    image = bench.photo(np.random.default_rng(1), 375, 500)
    assert image.shape == (375, 500, 3) and image.dtype == np.uint8 and image.std() > 30


def test_a_directory_of_pictures_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for i, data in enumerate(bench._photos(3)):
        (tmp_path / "sub" / f"{i}.JPG").write_bytes(data)
    (tmp_path / "0.jpg").write_bytes(b"no image")
    found = bench._read_jpegs(tmp_path, 2)
    assert len(found) == 2 and all(simplejpeg.is_jpeg(data) for data in found)


def test_the_command_prints_a_table_and_json(monkeypatch: pytest.MonkeyPatch, result: dict) -> None:
    monkeypatch.setattr(bench, "bench_loader", lambda images, *, samples: result | {"asked": [images, samples]})
    shown = CliRunner().invoke(app, ["bench", "loader", "--samples", "64", "--json"])
    assert json.loads(shown.stdout)["asked"] == [None, 64]
    table = CliRunner().invoke(app, ["bench", "loader"])
    assert all(name in table.stdout for name in bench.PATHS) and table.exit_code == 0
