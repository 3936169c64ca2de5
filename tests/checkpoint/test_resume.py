"""What a start finds: the newest intact checkpoint, damaged ones set aside, copies where nothing local is left."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from ranks import run_ranks
from states import at, memory_state, tensors

from m3i_large.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Copier,
    Remote,
    complete_checkpoints,
    newest,
    newest_intact,
    redacted,
)
from m3i_large.checkpoint.reader import damage
from m3i_large.errors import OutageError, UserError

ONE = at(0, 1)


def fill(root: Path, *steps: int, copier: Copier | None = None, keep: int = 9) -> Path:
    with CheckpointWriter(root, rank=ONE, attempt=0, keep=keep, copier=copier) as writer:
        for step in steps:
            writer.save(step, state=memory_state(tensors(step)), manifest={})
        assert writer.finish() == "" and writer.finish_copies(wait_s=None) == []
    return root


def rank_file(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


def flip(directory: Path) -> None:
    content = bytearray(rank_file(directory).read_bytes())
    content[-3] ^= 1
    rank_file(directory).write_bytes(content)


def edit(directory: Path, **fields: Any) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | fields))


DAMAGE = {
    "differs from its checksum": flip,
    "has 100 bytes": lambda d: os.truncate(rank_file(d), 100),
    "safetensors is missing": lambda d: rank_file(d).unlink(),
    "manifest.json is missing": lambda d: (d / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda d: os.truncate(d / "manifest.json", 40),
    "manifest.json cannot be": lambda d: edit(d, files=None),
    "manifest.json cannot b": lambda d: edit(d, tensors=[]),
    "manifest.json cannot ": lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe[]"),
    "manifest.json cannot": lambda d: (d / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_the_one_before_a_damaged_one_is_used_and_the_damaged_one_kept(tmp_path: Path, reason: str) -> None:
    fill(tmp_path, 1, 2, 3)
    DAMAGE[reason](tmp_path / "step_00000003")
    saved, reports = newest_intact(tmp_path, rank=ONE)
    assert saved is not None and saved.step == 2 and torch.equal(saved.read_full("master/a"), tensors(2)["master/a"])
    (report,) = reports
    assert (report.event, report.step, report.details["what"]) == ("incident", 3, "checkpoint")
    assert reason in report.details["reason"] and report.details["path"] == str(tmp_path / "step_00000003")
    assert (tmp_path / "damaged_step_00000003").is_dir() and newest(tmp_path) == tmp_path / "step_00000002"
    assert newest_intact(tmp_path, rank=ONE)[1] == [], "said once"


def test_all_damaged_is_said_and_never_a_new_beginning(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step_0000000{step}")
    for _ in range(2):
        with pytest.raises(UserError, match=r"all 2 in .* are damaged.*needed: --resume") as caught:
            newest_intact(tmp_path, rank=ONE)
        assert "\n" not in str(caught.value)
    assert newest_intact(tmp_path / "new", rank=ONE) == (None, [])


def test_a_checkpoint_that_is_named_must_be_intact(tmp_path: Path) -> None:
    flip(fill(tmp_path, 1) / "step_00000001")
    with pytest.raises(UserError, match=r"is damaged: rank_00000_of_00001.safetensors differs from its checksum"):
        Checkpoint(tmp_path / "step_00000001")


def test_shares_of_the_files_cover_all_of_them(tmp_path: Path) -> None:
    ranks = [CheckpointWriter(tmp_path, rank=at(r, 5), attempt=0, keep=1) for r in range(5)]
    for r, writer in enumerate(ranks):
        writer.save(1, state=memory_state(tensors(), rank=r, world=5), manifest={})
    for writer in ranks:
        writer.wait()
    (found,) = complete_checkpoints(tmp_path)
    path = found / "rank_00003_of_00005.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    shares = [damage(found, part=p, parts=2) for p in range(2)]
    assert shares == ["", f"{path.name} differs from its checksum"]


def find(rank: Any, root: str) -> tuple[int, list[str]]:
    saved, reports = newest_intact(Path(root), rank=rank)
    assert saved is not None
    return saved.step, [report.details["reason"] for report in reports]


@pytest.mark.slow
def test_ranks_agree_on_what_one_of_them_finds(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    flip(tmp_path / "step_00000002")
    results = run_ranks(2, find, str(tmp_path))
    assert results[0] == results[1] and results[0][0] == 1 and "differs" in results[0][1][0]


# -- copies --------------------------------------------------------------------------------------------------


def remote_url(kind: str, tmp_path: Path) -> str:
    return {"path": str(tmp_path / "far"), "file": f"file://{tmp_path}/far", "memory": f"memory://{tmp_path.name}"}[
        kind
    ]


@pytest.mark.parametrize("kind", ["path", "file", "memory", "obstore"])
def test_complete_checkpoints_are_copied_and_fetched_on_a_new_machine(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = remote_url("path" if kind == "obstore" else kind, tmp_path)
    if kind == "obstore":  # what s3, gs and az go through, here over local files
        store = pytest.importorskip("obstore.fsspec").FsspecStore("file")
        monkeypatch.setattr("m3i_large.checkpoint.remote._open", lambda url: (store, url))
    near = tmp_path / "near"
    fill(near, 1, 2, 3, copier=Copier(near, Remote(url), keep=2), keep=2)
    assert Remote(url).steps() == [2, 3]
    saved, reports = newest_intact(tmp_path / "new", rank=ONE, copy=url)
    assert saved is not None and saved.step == 3 and reports == [] and newest(tmp_path / "new") == saved.directory
    for name, tensor in tensors(3).items():
        assert torch.equal(saved.read_full(name), tensor), name
    assert newest_intact(near, rank=ONE, copy="memory://nothing")[0].step == 3, "its own come first"


def test_a_partial_or_damaged_copy_is_passed_over(tmp_path: Path) -> None:
    far = tmp_path / "far"
    fill(tmp_path / "near", 1, 2, 3, copier=Copier(tmp_path / "near", Remote(str(far)), keep=9))
    assert Remote(str(far)).steps() == [1, 2, 3]
    (far / "step_00000003" / "manifest.json").unlink()
    flip(far / "step_00000002")
    saved, (report,) = newest_intact(tmp_path / "new", rank=ONE, copy=str(far))
    assert saved is not None and saved.step == 1 and report.step == 2
    flip(far / "step_00000001")
    with pytest.raises(UserError, match="are damaged"):
        newest_intact(tmp_path / "newer", rank=ONE, copy=str(far))


def test_the_manifest_goes_last_and_comes_off_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = fill(tmp_path / "near", 1), Remote(f"memory://{tmp_path.name}_order")
    done: list[str] = []
    for name in ("put_file", "rm_file"):
        real = getattr(far._fs, name)
        monkeypatch.setattr(
            far._fs,
            name,
            lambda *a, real=real, name=name, **k: (done.append(f"{name} {a[-1].rpartition('/')[2]}"), real(*a, **k))[1],
        )
    first = complete_checkpoints(near)[0]
    far.mirror(first)
    far.mirror(first)
    edit(first, note="the same step, saved again")
    far.mirror(first)
    put = ["put_file rank_00000_of_00001.safetensors", "put_file manifest.json"]
    assert done == [*put, "rm_file manifest.json", *put]
    done.clear()
    far.remove(1)
    assert done == ["rm_file manifest.json", "rm_file rank_00000_of_00001.safetensors"] and far.steps() == []
    assert not far._fs.exists(far._path(1))


def test_a_place_that_fails_is_tried_again_and_then_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, url = tmp_path / "near", f"memory://user:secret@{tmp_path.name}"
    calls: list[int] = []

    def refuses(self: Any, *args: Any) -> None:
        calls.append(1)
        raise ConnectionError(f"{url} is not there\nsecond line")

    remote = Remote(url)
    monkeypatch.setattr(type(remote._fs), "put_file", refuses)
    copier = Copier(near, remote, keep=1, first_delay_s=0.01)
    with CheckpointWriter(near, rank=ONE, attempt=0, keep=1, copier=copier) as writer:
        writer.save(1, state=memory_state(tensors()), manifest={})
        assert writer.finish() == "", "the run does not depend on the copy"
        save, incident = writer.poll() + writer.finish_copies(wait_s=None)
    assert save.event == "save" and incident.details["what"] == "checkpoint_copy" and len(calls) == 4
    shown = f"memory://user:***@{tmp_path.name}"
    assert incident.details == {
        "what": "checkpoint_copy",
        "path": shown,
        "reason": f"{shown} is not there (4 tries)",
    }
    monkeypatch.setattr(type(remote._fs), "ls", lambda *a, **k: 1 / 0)
    with pytest.raises(OutageError, match="cannot be read") as caught:
        newest_intact(tmp_path / "new", rank=ONE, copy=url)
    assert "secret" not in str(caught.value) + repr(remote)


def test_a_copy_under_way_is_not_removed_by_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, remote = tmp_path / "near", Remote(f"memory://{tmp_path.name}_busy")
    begun, go, real = threading.Event(), threading.Event(), Remote.mirror
    monkeypatch.setattr(Remote, "mirror", lambda self, d: (begun.set(), go.wait(PATIENCE_S), real(self, d))[2])
    copier = Copier(near, remote, keep=1)
    with CheckpointWriter(near, rank=ONE, attempt=0, keep=1, copier=copier) as writer:
        for step in (1, 2):
            writer.save(step, state=memory_state(tensors(step)), manifest={})
            writer.wait()
            assert begun.wait(PATIENCE_S)
        assert [p.name for p in complete_checkpoints(near)] == ["step_00000001", "step_00000002"]
        assert writer.finish() == "", "the end of the saving does not wait for the place"
        go.set()
        writer.finish_copies(wait_s=None)
    assert remote.steps() == [2]


def test_a_stop_waits_for_a_copy_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(Remote, "mirror", lambda *_: go.wait(PATIENCE_S))
    copier = Copier(tmp_path, Remote(f"memory://{tmp_path.name}_slow"), keep=1)
    with CheckpointWriter(tmp_path, rank=ONE, attempt=0, keep=1, copier=copier) as writer:
        writer.save(1, state=memory_state(tensors(1)), manifest={})
        assert writer.finish() == ""
        (late,) = writer.finish_copies(wait_s=0.01)
        assert "not finished when the run ended" in late.details["reason"]
        go.set()


def test_secrets_are_not_shown() -> None:
    assert redacted("s3://key:secret@bucket/run?sig=abc") == "s3://key:***@bucket/run?***"
    assert redacted("sftp://me@host/run") == "sftp://me@host/run" and redacted("/a/b") == "/a/b"
    with pytest.raises(UserError, match="checkpoint copy: nonsense://x: "):
        Remote("nonsense://x")


def test_the_ten_lines_of_the_documentation_read_a_checkpoint(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    whole = {"master/a": torch.arange(35.0).reshape(7, 5), "buffer/count": torch.tensor(3)}
    ranks = [CheckpointWriter(tmp_path, rank=at(r, 3), attempt=0, keep=1) for r in range(3)]
    for r, writer in enumerate(ranks):
        writer.save(1, state=memory_state(whole, rank=r, world=3), manifest={})
    for writer in ranks:
        writer.wait()
    for name, tensor in whole.items():
        assert (names["read"](newest(tmp_path), name) == tensor.numpy()).all()
