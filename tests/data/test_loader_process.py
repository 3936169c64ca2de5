"""The loader's process: what it says when it fails, dies or falls silent; what storage faults do to batches."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
import webdataset as wds
from http_server import serving
from patience import PATIENCE_S

from m3i_large.data.batch import Batch
from m3i_large.data.config import DataConfig
from m3i_large.data.loader import Loader
from m3i_large.data.mixture import Mixture
from m3i_large.data.producer import LoaderJob
from m3i_large.data.sources import open_sources
from m3i_large.data.views import MaskSpec
from m3i_large.errors import OutageError, UserError

SAMPLES, LANES = 1200, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough samples for windows of blocks: three shards of small pictures, all different."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with wds.TarWriter(str(root / f"s-{shard}.tar")) as writer:
            for i in range(shard * SAMPLES // 3, (shard + 1) * SAMPLES // 3):
                image = np.full((20, 24, 3), (i % 251, i // 251 * 40, 90), np.uint8)
                writer.write({"__key__": f"{i:05d}", "png": cv2.imencode(".png", image)[1].tobytes(), "txt": f"n {i}"})
    return root


def job(root: Path | str, *, index: Path, world: int = 1, rank: int = 0, **more: object) -> LoaderJob:
    source = {"name": "s", "kind": "image_text", "shards": "s-{0..2}.tar"}
    given = {"root": str(root), "index": str(index), "sources": [source], "image_size": 16, "threads": 2, "retry_s": 30}
    config = DataConfig(**(given | more))
    sources = open_sources(config.sources, root, index=index, retry_s=config.retry_s)
    specs = [(s.name, s.num_samples, 1, 50_000, None) for s in sources]  # 50 KB a sample: blocks of 26
    mixture = Mixture.plan(5, sources=specs, global_batch=32, lanes=LANES, window_steps=8)
    assert mixture.orders[0].K > 0
    return LoaderJob(
        config=config,
        mixture=mixture,
        sources=sources,
        context_length=8,
        seed=5,
        mask=MaskSpec(cells=4, ratio=0.5),
        rank=rank,
        world=world,
        accumulation=1,
    )


def same(a: Batch, b: Batch) -> bool:
    names = [name for name, value in vars(a).items() if isinstance(value, torch.Tensor)]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names) and len(names) == 16


def first_steps(made: LoaderJob, steps: int, *, start: int = 0) -> Iterator[Batch]:
    with Loader(made, start_step=start) as stream:
        for _ in range(steps):
            yield next(stream)


@pytest.mark.parametrize("start", [0, 7, 36])  # an epoch ends in step 37
def test_blocks_read_ahead_give_the_batches_of_single_reads(data: Path, tmp_path: Path, start: int) -> None:
    single, block = (job(data, index=tmp_path / "i", read=read) for read in ("sample", "block"))
    inline = Loader(job(data, index=tmp_path / "i", threads=0))
    pairs = zip(first_steps(single, 12, start=start), first_steps(block, 12, start=start), strict=True)
    for step, (a, b) in enumerate(pairs, start):
        assert same(a, b) and same(a, inline.batch_at(step, 0)) and a.step == step


def test_a_server_with_resets_errors_and_short_bodies_loses_nothing(data: Path, tmp_path: Path) -> None:
    local = Loader(job(data, index=tmp_path / "local", threads=0))
    with serving(data) as server:
        made = job(server.url, index=tmp_path / "remote")  # data.read auto: blocks, as the shards are remote
        server.plan = lambda i: ["503", "reset", "short", "reset_body"][i // 5 % 4] if i % 5 == 1 else None
        with Loader(made) as stream:
            for step in range(10):
                assert same(next(stream), local.batch_at(step, 0)), step
            assert stream.retries > 0
        assert len(set(server.faults)) == 4
        asked = sum(size for _, _, size in server.requests)
    assert asked < 4 * sum(path.stat().st_size for path in data.glob("s-*.tar"))


def test_an_outage_stops_with_a_clear_line_and_is_no_bad_sample(data: Path, tmp_path: Path) -> None:
    told: list[object] = []
    with serving(data) as server:
        made = job(server.url, index=tmp_path / "i", retry_s=0.5)
        with (
            Loader(made, on_bad=told.append) as stream,
            pytest.raises(OutageError, match=r"s-\d\.tar: .*gave up after \d+ s of retries \(data\.retry_s\)") as error,
        ):
            next(stream)
            server.plan = lambda i: "503"
            for _ in range(100):
                next(stream)
    assert told == [] and "\n" not in str(error.value)


def test_a_process_that_is_killed_is_named(data: Path, tmp_path: Path) -> None:
    with Loader(job(data, index=tmp_path)) as stream:
        next(stream)
        child(stream).kill()
        with pytest.raises(OutageError, match=r"the loader's process died \(signal 9\)"):
            for _ in range(10):
                next(stream)


def test_a_process_that_hangs_is_found_and_shows_its_stacks(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Loader(job(data, index=tmp_path, timeout_s=5.5, prefetch=1)) as stream:
        next(stream)
        child(stream).suspend()
        began = time.monotonic()
        with pytest.raises(OutageError, match=r"gave no batch for 6 s \(data\.timeout_s\); its stacks are above"):
            for _ in range(10):
                next(stream)
        assert time.monotonic() - began < 120
        child(stream).resume()  # its pending signal is answered now
        for _ in range(600):
            if "loader_process.py" in (text := capfd.readouterr().err):
                break
            time.sleep(0.1)
        assert "loader_process.py" in text and "Thread" in text


def test_signals_to_the_group_do_not_reach_it_and_it_ends_with_its_parent(data: Path, tmp_path: Path) -> None:
    with Loader(job(data, index=tmp_path)) as stream:
        next(stream)
        process = child(stream)
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        for _ in range(6):
            next(stream)
        assert process.is_running()
    process.wait(PATIENCE_S)


@pytest.mark.parametrize("how", ["kill", "exit", "raise"])
def test_no_process_is_left_behind(data: Path, tmp_path: Path, how: str) -> None:
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
from pathlib import Path
from test_loader_process import child, job
from m3i_large.data.loader import Loader
if __name__ == "__main__":
    stream = Loader(job(Path({str(data)!r}), index=Path({str(tmp_path)!r})))
    next(stream)
    print(child(stream).pid, flush=True)
    if {how!r} == "kill":
        import os; os.kill(os.getpid(), 9)
    if {how!r} == "raise":
        raise SystemError("x")
"""
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    pid = int(result.stdout.split()[0])
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"process {pid} outlived its parent")


def test_a_mistake_found_in_the_process_is_one_line_here(data: Path, tmp_path: Path) -> None:
    made = job(data, index=tmp_path)
    (tmp_path / "shards/s-1.tar.index").unlink()
    with Loader(made) as stream, pytest.raises(UserError, match=r"s-1\.tar\.index is missing; needed: m3i data index"):
        for _ in range(20):
            next(stream)


def test_a_defect_in_the_process_comes_with_its_traceback(data: Path, tmp_path: Path) -> None:
    made = job(data, index=tmp_path)
    made.sources[0].config.captions = None  # what no configuration allows
    with (
        Loader(made) as stream,
        pytest.raises(RuntimeError, match=r"(?s)in the loader's process:.*producer\.py.*TypeError"),
    ):
        next(stream)


def test_it_imports_no_torch() -> None:
    code = "import sys, m3i_large.data.loader_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_ring_is_reused_and_a_batch_stays_whole_until_the_next(data: Path, tmp_path: Path) -> None:
    with Loader(job(data, index=tmp_path, prefetch=1)) as stream:
        seen = []
        for step in range(12):
            batch = next(stream)
            time.sleep(0.02)  # time for a wrong hand-back to be written over
            assert same(batch, stream.batch_at(step, 0))
            seen.append(batch.target_NHWC.data_ptr())
        assert len(set(seen)) == 3, "one used, one prepared, one on its way"


def child(stream: Loader) -> psutil.Process:
    return psutil.Process(stream._maker._process.pid)
