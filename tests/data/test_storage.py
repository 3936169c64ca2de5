"""Reading ranges: local files and a local HTTP server that fails as object stores do."""

import os
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import ShardServer, serving
from shards import fake_image, write_shard

from m3i_large.data import storage as storage_module
from m3i_large.data.index import index_shard
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import open_sources
from m3i_large.data.storage import Storage
from m3i_large.errors import OutageError, UserError

CONTENT = random.Random(0).randbytes(200_000)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(storage_module, "LONGEST_DELAY_S", 0.05)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def server(root: Path) -> Iterator[ShardServer]:
    with serving(root) as running:
        yield running


@pytest.mark.parametrize("remote", [False, True])
def test_ranges_are_exact(root: Path, server: ShardServer, remote: bool) -> None:
    storage = Storage(server.url if remote else root)
    stat = storage.stat("a.tar")
    assert stat.num_bytes == len(CONTENT)
    for offset, size in [(0, 1), (0, len(CONTENT)), (199_999, 1), (1234, 5678), (7, 0)]:
        assert storage.read("a.tar", offset, size, mark=stat.mark) == CONTENT[offset : offset + size]
    assert storage.retries == 0


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_not_there(root: Path, server: ShardServer, remote: bool) -> None:
    storage = Storage(server.url if remote else root, retry_s=120)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"shard .*none\.tar: .*needed: a tar file that can be read"):
        storage.stat("none.tar")
    with pytest.raises(OutageError, match=r"none\.tar: .*it could be read when it was indexed"):
        storage.read("none.tar", 0, 5)
    with pytest.raises(OutageError, match=r"the file ends: got 10 bytes at byte 199990; needed: 11\. .*m3i data check"):
        storage.read("a.tar", 199_990, 11)
    assert time.monotonic() - began < 60, "what no waiting mends is not waited for"


@pytest.mark.parametrize("fault", ["503", "429", "reset", "short", "reset_body"])
def test_a_fault_that_passes_loses_nothing(server: ShardServer, fault: str) -> None:
    storage = Storage(server.url, retry_s=120)
    server.plan = lambda i: fault if i < 3 else None
    assert storage.read("a.tar", 1000, 50_000) == CONTENT[1000:51_000]
    assert storage.retries == 3 and server.faults == [fault] * 3


def test_an_outage_ends_with_a_clear_line_in_bounded_time(server: ShardServer) -> None:
    storage = Storage(server.url, retry_s=0.3)
    server.plan = lambda i: "503"
    began = time.monotonic()
    with pytest.raises(OutageError, match=r"a\.tar: .*503.*; gave up after \d+ s .*data\.retry_s") as error:
        storage.read("a.tar", 0, 10)
    assert time.monotonic() - began < 60 and "\n" not in str(error.value)


def test_a_server_that_is_gone(root: Path) -> None:
    with serving(root) as server:
        storage = Storage(server.url, retry_s=0.2)
    with pytest.raises(OutageError, match="gave up after"):
        storage.read("a.tar", 0, 3)


def test_a_shard_that_was_replaced_is_refused(root: Path, server: ShardServer) -> None:
    storage = Storage(server.url, retry_s=120)
    mark = storage.stat("a.tar").mark
    (root / "a.tar").write_bytes(bytes(len(CONTENT)))
    os.utime(root / "a.tar", ns=(1, 1))
    with pytest.raises(OutageError, match=r"changed since it was indexed"):
        storage.read("a.tar", 0, 3, mark=mark)


def test_a_stale_handle_is_opened_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, fails, real = Storage(root, retry_s=120), [116, 5], os.pread

    def pread(file: int, size: int, offset: int) -> bytes:
        if fails:
            raise OSError(fails.pop(), "stale")
        return real(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert storage.read("a.tar", 5, 5) == CONTENT[5:10] and storage.retries == 2


def test_a_read_that_comes_in_pieces(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: real(file, min(size, 7), offset))
    assert Storage(root).read("a.tar", 11, 100) == CONTENT[11:111]


def test_locations_and_copies(root: Path) -> None:
    local, remote = Storage(root, retry_s=3), Storage("s3://bucket/prefix/", retry_s=4)
    assert local.location("b/c.tar") == f"{root}/b/c.tar" and local.location("/x.tar") == "/x.tar"
    assert remote.location("b/c.tar") == "s3://bucket/prefix/b/c.tar"
    assert remote.location("http://h/x.tar") == "http://h/x.tar"
    copy = pickle.loads(pickle.dumps(local))
    assert (copy.root, copy.retry_s) == (str(root), 3) and copy.read("a.tar", 0, 4) == CONTENT[:4]


def test_a_remote_source_is_indexed_and_read_like_a_local_one(tmp_path: Path) -> None:
    for i in range(2):
        names = [f"{i}{j}" for j in range(9)]
        write_shard(
            tmp_path / f"data/s-{i}.tar", [{"key": n, "jpg": fake_image(n * 7000), "txt": f"text {n}"} for n in names]
        )
    config = SourceConfig(name="s", kind="image_text", shards="s-{0..1}.tar")
    (local,) = open_sources([config], tmp_path / "data", index=tmp_path / "a")
    with serving(tmp_path / "data") as server:
        server.plan = lambda i: ["503", "reset", "short", None, None, None][i % 6]
        (remote,) = open_sources([config], server.url, index=tmp_path / "b", retry_s=30)
        assert [remote.read(i) for i in range(18)] == [local.read(i) for i in range(18)]
        assert [(r.name, r.checksum, r.eligible) for r in remote.shards] == [
            (r.name, r.checksum, r.eligible) for r in local.shards
        ]
        server.plan, server.requests[:] = lambda i: None, []
        block = remote.fetch(range(5, 14))  # over the border of the two shards
        assert [b.parts for b in block] == [local.fetch([i])[0].parts for i in range(5, 14)]
        assert [name for name, _, _ in server.requests] == ["s-0.tar", "s-1.tar"], "one range each"
        with pytest.raises(UserError, match=r"data\.index: not set, and data\.root is http.*; needed: a local"):
            open_sources([config], server.url)
        with pytest.raises(UserError, match=r"s-\*\.tar'; needed: braces for remote shards"):
            open_sources([config.model_copy(update={"shards": "s-*.tar"})], server.url, index=tmp_path / "c")


def test_a_chunk_that_comes_late_is_still_in_the_checksum(root: Path, server: ShardServer) -> None:
    write_shard(root / "b.tar", [{"key": "k", "jpg": fake_image(CONTENT), "txt": "t"}])
    server.plan = lambda i: "reset_body" if i % 2 else None
    remote, local = (index_shard("b.tar", Storage(where, retry_s=120)) for where in (server.url, root))
    assert remote.checksum == local.checksum and remote.stat.num_bytes == local.stat.num_bytes
