"""Pictures of a run: they change nothing of it, are the same on any number of ranks, and never end it."""

import errno
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import ROOT, recipe, write_data, write_recipe

from m3i_large.errors import OutageError, UserError
from m3i_large.metrics import MetricsWriter, read_metrics
from m3i_large.parallel.comm import Rank
from m3i_large.pictures import Album, Pictures, Sheet, look_steps, looks_of
from m3i_large.pictures.sheet import Cell, Strip
from m3i_large.recipe import load_recipe, validate
from m3i_large.stream import prepare_sources

OF_ALBUM = ("features", "attention", "retrieval", "neighbours")  # an album of one style has no other
HELDOUT = [{"name": "kept", "kind": "image_text", "shards": ["kept-000000.tar"]}]


def train_there(rank: Rank, path: Path, out: Path, broken: bool) -> str:
    from m3i_large.pictures.looks import Look
    from m3i_large.train import train

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    if broken:
        Look.save = Sheet.save = Album.save = full  # type: ignore
    return train(load_recipe(str(path)), ds=ROOT / "ds_configs/zero3.json", out=out, resume="auto", rank=rank)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    write_data(root / "data")
    other = write_data(root / "other", samples=24)
    shutil.move(other / "second-000000.tar", root / "data/kept-000000.tar")
    (root / "data/LICENSES.md").write_text("drawn by hand")
    return root / "data"


def told_steps(run: Path) -> dict[str, list[int]]:
    """Steps at which TensorBoard was given each sheet."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    return {tag.removeprefix("pictures/"): [i.step for i in board.Images(tag)] for tag in board.Tags()["images"]}


@pytest.mark.slow
def test_pictures_change_nothing_and_are_the_same_on_any_number_of_ranks(data: Path, tmp_path: Path) -> None:
    ended = {}
    for name, ranks, every, broken in (
        ("none", 2, 0, False),
        ("two", 2, 2, False),
        ("one", 1, 2, False),
        ("full", 1, 2, True),
    ):
        values = recipe(data, steps=4, picture_every=every, checkpoint_every=9, tensorboard=name == "one")
        values["data"]["heldout"] = HELDOUT
        path = write_recipe(tmp_path / f"{name}.yaml", values)
        ended[name] = run_ranks(ranks, train_there, path, tmp_path / name, broken)
    assert all(set(outcome) == {"finished"} for outcome in ended.values())
    losses = {name: [row["loss"] for row in read_metrics(tmp_path / name)] for name in ended}
    assert losses["none"] == losses["two"] and losses["one"] == losses["full"], "to the bit"
    assert not (tmp_path / "none/pictures").exists()
    assert not list((tmp_path / "full/pictures").rglob("*.*"))

    album = Album.load(tmp_path / "two/pictures")
    assert album is not None and album.held_out and album.credits == "drawn by hand"
    assert {item.source for item in album.items} == {"kept"} and len(album) == 24
    directories = {name: tmp_path / name / "pictures" for name in ("two", "one")}
    assert all(look_steps(directory) == [0, 2, 4] for directory in directories.values())
    two, one = (looks_of(directory, [0, 2, 4]) for directory in directories.values())
    assert told_steps(tmp_path / "one") == {"input": [0, 2], "worst": [2, 4]} | {name: [0, 2, 4] for name in OF_ALBUM}
    for step, mine in two.items():
        for field in ("pooled_NE", "image_NF", "text_NF", "attention_KGG"):
            a, b = (getattr(x, field).astype(np.float32) for x in (mine, one[step]))
            np.testing.assert_allclose(a, b, atol=4e-3, err_msg=f"{field} after step {step}")
    assert np.abs(two[0].image_NF.astype(np.float32) - two[4].image_NF).max() > 0.05, "the network has learned"
    for step, names in ((0, {"input"}), (2, {"input", "worst"}), (4, {"worst"})):
        found = {p.stem for p in (tmp_path / f"two/pictures/step_{step:08d}").glob("*.webp")}
        assert found == names, step


def open_pictures(data: Path, heldout: list[dict], run: Path) -> Pictures:
    values = recipe(data)
    values["data"]["heldout"] = heldout
    settled, rank = validate(values), Rank(0, 1, torch.device("cpu"))
    return Pictures(settled, run, prepare_sources(settled, rank), rank)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("none-*.tar", r"data.heldout.kept.shards: got 'none-\*.tar', but there is no file"),
        ("first-000000.tar", "data.heldout.kept.shards: first-000000.tar is also a shard of first; needed: shards not"),
        ("copy.tar", "data.heldout.kept.shards: copy.tar is also a shard of second; needed: shards not trained on"),
    ],
)
def test_held_out_pictures_must_be_there_and_not_be_trained_on(
    data: Path, tmp_path: Path, shards: str, message: str
) -> None:
    if shards == "copy.tar":
        shutil.copy(data / "second-000000.tar", data / "copy.tar")
    with pytest.raises(UserError, match=message):
        open_pictures(data, [{"name": "kept", "kind": "image_text", "shards": [shards]}], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_continued_run_keeps_its_album_whatever_becomes_of_the_data(data: Path, tmp_path: Path) -> None:
    first = open_pictures(data, HELDOUT, tmp_path / "run")
    assert first._album is not None
    first._album.save(tmp_path / "run/pictures")
    again = open_pictures(data, [{**HELDOUT[0], "shards": ["gone.tar"]}], tmp_path / "run")
    assert again._album is not None and again._album.items == first._album.items


class Unreliable:
    """A source of which some pictures are broken, and whose storage fails after a while."""

    name = "unreliable"

    def __init__(self, fails_at: int) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 10

    def read(self, number: int, *, meta: bool) -> Any:
        import cv2

        if number >= self.fails_at:
            raise OutageError("storage is gone")
        image = (
            b"no picture" if number % 2 else cv2.imencode(".png", np.full((20, 30, 3), number, np.uint8))[1].tobytes()
        )
        return SimpleNamespace(
            image=image, shard="s.tar", key=str(number), text="t", category=None, meta={"style": "x"}
        )


def test_an_album_is_of_what_can_be_read() -> None:
    album = Album.read([Unreliable(7), Unreliable(0)], image_size=16, held_out=True)  # type: ignore[list-item]
    assert album is not None and [item.key for item in album.items] == ["0", "2", "4", "6"]
    assert Album.read([Unreliable(0)], image_size=16, held_out=True) is None  # type: ignore[list-item]


def sheets() -> list[Sheet]:
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    return [
        Sheet("input", "T", "About.", (Strip("a row", (Cell(pixels, "one"), Cell(pixels[::-1], "two", right=True))),))
    ]


def test_tensorboard_is_given_the_same_pictures_under_the_same_names(tmp_path: Path) -> None:
    import cv2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, attempt=0, enabled=True)
    writer.log({"step": 3, "loss/text": 2.5, "perf/mfu": 0.25})
    writer.pictures(sheets(), step=3)
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"loss/text", "perf/mfu"} and board.Tags()["images"] == ["pictures/input"]
    (image,) = board.Images("pictures/input")
    pixels = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert image.step == 3 and (pixels == sheets()[0].image()).all()
    (text,) = board.Tensors("pictures/input/text_summary")
    assert "a row: one | two" in text.tensor_proto.string_val[0].decode()


def test_a_run_without_mirrors_draws_nothing_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sheet, "image", lambda sheet: pytest.fail("composed for nobody"))
    writer = MetricsWriter(tmp_path, attempt=0, enabled=True, tensorboard=False)
    writer.pictures(sheets(), step=3)
    writer.close()


def log_records(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log behind wandb's header of 7 bytes: in blocks of 32 KiB, a record in one or more parts."""
    place, parts = 7, b""
    while place + 7 <= len(log):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", log[place : place + 7])
        parts += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_an_offline_run_of_wandb_holds_metrics_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `wandb sync` sends: the records of the run's log, and the files that they name."""
    import cv2
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = MetricsWriter(tmp_path / "run", attempt=0, enabled=True, tensorboard=False, wandb_project="p")
    (tmp_path / "run").mkdir(exist_ok=True)
    writer.log({"step": 3, "loss/text": 2.5, "perf/mfu": 0.25})
    writer.pictures(sheets(), step=3)
    writer.close()
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    logged: dict[str, str] = {}
    for data in log_records(next(offline.glob("run-*.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            logged["/".join(item.nested_key) or item.key] = item.value_json
    assert logged["loss/text"] == "2.5" and logged["perf/mfu"] == "0.25" and logged["step"] == "3"
    assert "a row: one | two" in logged["pictures/input/caption"] and logged["pictures/input/_type"] == '"image-file"'
    (file,) = (offline / "files/media/images/pictures").glob("input_*.png")
    assert file == offline / "files" / json.loads(logged["pictures/input/path"])
    assert (cv2.imread(str(file))[..., ::-1] == sheets()[0].image()).all()
