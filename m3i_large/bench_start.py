"""What comes before the first batch: indexing, opening 442 M samples, a resume in the middle of a run."""

import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from m3i_large.bench_loader import PLAIN, _photos, loader_job, write_shard
from m3i_large.data.index import index_shard
from m3i_large.data.loader import Loader
from m3i_large.data.manifest import IndexDirectory, Manifest, ShardRow, eligibility
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.storage import Storage

# Samples and shards of the four sources of the 442 M recipe.
SOURCES = {
    "laion400m": (407_332_084, 41_455),
    "yfcc15m": (14_808_859, 4096),
    "cc12m": (10_968_539, 2176),
    "imagenet22k": (13_673_551, 4096),
}
STEP, RANKS, REPEATS = 3_000_000, 128, 3
OPEN = """
import sys, time
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import open_sources
configs = [SourceConfig.model_validate_json(text) for text in sys.argv[2:]]
began = time.perf_counter()
sources = open_sources(configs, sys.argv[1])
seconds = time.perf_counter() - began
import psutil
print(seconds, psutil.Process().memory_info().rss / 2**20)
"""


def bench_start() -> list[dict[str, Any]]:
    """Times each of them, medians of 3.

    Returns:
        Rows {what, value, unit}: members per CPU-second of `m3i data index` and of Python's tarfile, which only reads
        headers; seconds to open sources of 447 M samples in 51,823 shards, and the whole process's memory after it;
        seconds from creating a Loader at step 3,000,000 to its first batch (rank 5 of 128, 128 samples).
    """
    with tempfile.TemporaryDirectory(prefix="m3i-bench-") as name:
        directory = Path(name)
        shard = write_shard(directory / "photo-000000.tar", _photos(64) * 40)
        members = {
            "index: members a CPU-second, every byte read": lambda: index_shard(shard.name, Storage(directory)),
            "tarfile: members a CPU-second, headers only": lambda: _walk(shard),
        }
        rows = [{"what": what, "value": 2 * 64 * 40 / _cpu(call), "unit": "1/s"} for what, call in members.items()]
        seconds, memory = _open(directory / "many")
        rows.append({"what": "open 447 M samples in 51,823 shards", "value": seconds, "unit": "s"})
        rows.append({"what": "memory of a process that has them open", "value": memory, "unit": "MiB"})
        rows.append({"what": f"first batch of 128 at step {STEP:,}", "value": _first_batch(shard), "unit": "s"})
    return rows


def configs() -> list[SourceConfig]:
    """Sources of the 442 M recipe's size."""
    return [
        SourceConfig(name=name, kind="image_text", shards=f"{name}-{{00000..{shards - 1:05d}}}.tar")
        for name, (_, shards) in SOURCES.items()
    ]


def _walk(shard: Path) -> int:
    with tarfile.open(shard) as tar:
        return sum(1 for _ in tar)


def _cpu(call: Any) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return sorted(times)[REPEATS // 2]


def _open(directory: Path) -> tuple[float, float]:
    """Seconds and MiB, in a process of its own."""
    directory.mkdir()
    for config, (samples, shards) in zip(configs(), SOURCES.values(), strict=True):
        rows = []
        for i in range(shards):
            count = samples // shards + (i < samples % shards)
            rows.append(
                ShardRow(
                    name=f"{config.name}-{i:05d}.tar",
                    num_bytes=1 << 28,
                    mark=f"{i:x}",
                    checksum=f"{hash((config.name, i)) & (1 << 128) - 1:032x}",
                    samples=count,
                    eligible=count,
                    payload=40_000 * count,
                    damage="",
                    flags={},
                )
            )
        manifest = Manifest(source=config.name, eligibility=eligibility(config), shards=tuple(rows))
        manifest.save(IndexDirectory(directory).manifest(config.name))
    found = []
    for _ in range(REPEATS):
        result = subprocess.run(
            [sys.executable, "-c", OPEN, str(directory), *(c.model_dump_json() for c in configs())],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(tuple(map(float, result.stdout.split())))
    seconds, memory = sorted(found)[REPEATS // 2]
    return seconds, memory


def _first_batch(shard: Path) -> float:
    job = loader_job(shard, view=PLAIN, global_batch=128 * RANKS, threads=2, rank=5, world=RANKS)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with Loader(job, start_step=STEP) as stream:
            next(stream)
            times.append(time.perf_counter() - began)
    return sorted(times)[REPEATS // 2]
