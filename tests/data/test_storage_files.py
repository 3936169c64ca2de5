"""Reads of local shards: the bytes asked for or an error, whatever happens to the file behind a path."""

import os
from pathlib import Path

import pytest

from m3i_large.data import storage as module
from m3i_large.data.storage import Storage
from m3i_large.errors import OutageError, UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"a" * 100)
    (tmp_path / "b").write_bytes(b"b" * 100)
    return tmp_path


def test_a_file_that_leaves_the_cache_is_read_to_its_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may push a file out of the cache, and its number may be given to another shard."""
    storage, pread, held = Storage(root), os.pread, []

    def late(descriptor: int, size: int, offset: int) -> bytes:
        storage._open.cache_clear()
        held.append(os.open(root / "b", os.O_RDONLY))
        return pread(descriptor, min(size, 7), offset)

    monkeypatch.setattr(module.os, "pread", late)
    assert storage.read("a", 10, 50) == b"a" * 50 and len(held) == 8
    monkeypatch.undo()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for descriptor in held:
        os.close(descriptor)
    storage.read("b", 0, 1)
    storage._open.cache_clear()
    assert before is None or len(os.listdir("/proc/self/fd")) == before - len(held), "and closed after that"


def test_what_no_waiting_mends_is_told_at_once(root: Path) -> None:
    storage = Storage(root)
    for name in ("none", "a/b", "."):
        with pytest.raises(UserError, match=r"needed: a tar file that can be read"):
            storage.stat(name)
        with pytest.raises(OutageError, match="it could be read when it was indexed"):
            storage.read(name, 0, 1)
    with pytest.raises(OutageError, match=r"the file ends: got 10 bytes at byte 90; needed: 11"):
        storage.read("a", 90, 11)
    assert storage.retries == 0 and storage.read("a", 90, 10) == b"a" * 10 and storage.read("none", 5, 0) == b""


def test_faults_that_pass_are_ridden_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    pread, faults = os.pread, [OSError(5, "Input/output error")] * 2

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if faults:
            raise faults.pop()
        return pread(descriptor, size, offset)

    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module.os, "pread", failing)
    storage = Storage(root)
    assert storage.read("a", 0, 3) == b"aaa" and storage.retries == len(waits) == 2
    assert 0.1 <= waits[0] <= 0.2 <= waits[1] <= 0.4
    faults += [OSError(5, "Input/output error")] * 5
    with pytest.raises(OutageError, match=r"Input/output error; gave up after 0 s of retries \(data.retry_s\)"):
        Storage(root, retry_s=0).read("a", 0, 3)


def test_a_stale_handle_is_opened_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network file system gives one out after its server was restarted."""
    pread, stale = os.pread, os.stat(root / "a").st_ino

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if os.fstat(descriptor).st_ino == stale:
            raise OSError(116, "Stale file handle")
        return pread(descriptor, size, offset)

    (root / "c").write_bytes(b"c" * 100)
    monkeypatch.setattr(
        module.time, "sleep", lambda seconds: (root / "c").exists() and os.replace(root / "c", root / "a")
    )
    monkeypatch.setattr(module.os, "pread", failing)
    storage = Storage(root, retry_s=2)
    assert storage.read("a", 0, 3) == b"ccc" and storage.retries == 1
