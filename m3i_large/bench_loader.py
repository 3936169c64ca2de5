"""Two-view samples per CPU-second: the loader beside what one would write without it, and beside its own primitives.

CPU-seconds are user and system time of this process and of all its children, so that neither threads nor processes hide
work. Every path takes the same pictures to two random crops of 224 x 224 uint8, one thread each.
"""

import io
import itertools
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from m3i_large.data.config import DataConfig, ViewConfig
from m3i_large.data.decode import crop_resize, decode_rgb, whole_pixels
from m3i_large.data.loader import Loader
from m3i_large.data.mixture import Mixture
from m3i_large.data.producer import LoaderJob
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import open_sources
from m3i_large.data.views import NUM_DRAWS, MaskSpec, crop_box
from m3i_large.errors import UserError

SIZE, BATCH = 224, 128
PICTURES, REPEATS = 256, 5
# (height, width) in turn; photos of the usual data sets are mostly 500 x 375 (q90: about 50 KB).
SHAPES = ((375, 500), (500, 375), (256, 256), (480, 640), (333, 500))
# Crops and flips only: the same work as the other paths do.
PLAIN = ViewConfig(blur=0, jitter_probability=0, grey=0, solarize=0)
# One endless stream per path; each item is the number of samples it has just made.
Stream = Generator[int, None, None]


def bench_loader(
    images: Path | None = None, *, samples: int = 512, repeats: int = REPEATS, pictures: int = PICTURES
) -> dict[str, Any]:
    """Times every path on the same JPEGs, in turns.

    Args:
        images: directory with JPEG files, searched recursively; default: generated pictures.
        samples: two-view samples per path and repeat, rounded up to whole batches of 128.
        pictures: how many are generated, or taken from `images` at most.

    Returns:
        pictures: {number, mean_bytes}. paths: rows {path, samples (per repeat), cpu_ms (per sample, median),
        samples_per_cpu_s}. ratios: `ours / <path>` in samples per CPU-second, the median over the repeats.

    Raises:
        UserError: no JPEG in `images`.
    """
    samples = -(-samples // BATCH) * BATCH
    threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="m3i-bench-") as directory, ExitStack() as stack:
            jpegs = _read_jpegs(images, pictures) if images else _photos(pictures)
            shard = write_shard(Path(directory) / "photo-000000.tar", jpegs)
            streams = {name: stack.enter_context(closing(path(shard, jpegs))) for name, path in PATHS.items()}
            seconds = _measure(streams, samples=samples, repeats=repeats)
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv2_threads)
    return _result(seconds, samples=samples, jpegs=jpegs)


def _result(seconds: dict[str, list[float]], *, samples: int, jpegs: Sequence[bytes]) -> dict[str, Any]:
    ours = seconds[OURS]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "pictures": {"number": len(jpegs), "mean_bytes": round(sum(map(len, jpegs)) / len(jpegs))},
        "paths": [
            {"path": name, "samples": samples, "cpu_ms": 1e3 * s / samples, "samples_per_cpu_s": samples / s}
            for name, s in medians.items()
        ],
        # Of turns next to one another: a machine that slows down slows both.
        "ratios": {
            f"{OURS} / {name}": statistics.median(other / own for other, own in zip(values, ours, strict=True))
            for name, values in seconds.items()
            if name != OURS
        },
    }


# -- CPU time -------------------------------------------------------------------------------------------------


@dataclass
class _Meter:
    """CPU-seconds of this process and its children."""

    # Listed once: to look for children is more work than what is measured between two looks.
    children: list[psutil.Process] = field(default_factory=lambda: psutil.Process().children(recursive=True))

    def now(self) -> float:
        """User and system seconds so far, of children that ended as well."""
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        total = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        for child in self.children:
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:  # it has ended and is in RUSAGE_CHILDREN
                continue
            total += times.user + times.system
        return total

    def at_rest(self) -> float:
        """The same once everything that works ahead has filled its queues, or after ten seconds.

        Between two such moments exactly the samples that were taken have been made.
        """
        before, quiet = self.now(), 0
        for _ in range(200):
            time.sleep(0.05)
            now = self.now()
            # Other processes' times come in ticks of 10 ms.
            quiet = quiet + 1 if now - before < 0.005 else 0
            before = now
            if quiet == 3:
                break
        return before


def _measure(streams: dict[str, Stream], *, samples: int, repeats: int) -> dict[str, list[float]]:
    """CPU-seconds that each stream takes for `samples` samples, once per repeat, forwards and backwards in turn."""
    for stream in streams.values():
        _take(stream, 2 * BATCH)
    meter = _Meter()
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for repeat in range(repeats):
        for name in list(streams)[:: 1 if repeat % 2 == 0 else -1]:
            before = meter.at_rest()
            _take(streams[name], samples)
            seconds[name].append(meter.at_rest() - before)
    return seconds


def _take(stream: Stream, samples: int) -> None:
    while samples > 0:
        samples -= next(stream)
    if samples:
        raise ValueError(f"a path made {-samples} samples too many")


# -- the paths ------------------------------------------------------------------------------------------------


def _torchvision(shard: Path, jpegs: Sequence[bytes]) -> Stream:
    """DataLoader, one worker; webdataset; torchvision's transforms on Pillow images, as most code has it; bicubic."""
    bicubic = v2.InterpolationMode.BICUBIC
    view = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=bicubic),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    yield from _data_loader(shard, lambda data: Image.open(io.BytesIO(data)).convert("RGB"), view)


def _torchvision_tensors(shard: Path, jpegs: Sequence[bytes]) -> Stream:
    """The same at its best: torchvision's own JPEG decoder, transforms on uint8 tensors, bilinear with antialias."""
    view = v2.Compose([v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0), antialias=True), v2.RandomHorizontalFlip()])

    def decode(data: bytes) -> Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)

    yield from _data_loader(shard, decode, view)


def _data_loader(shard: Path, decode: Callable[[bytes], Any], view: Callable[[Any], Tensor]) -> Stream:
    def two_views(sample: tuple[bytes, bytes]) -> tuple[Tensor, Tensor, str]:
        image = decode(sample[0])
        return view(image), view(image), sample[1].decode()

    def collate(rows: list[tuple[Tensor, Tensor, str]]) -> tuple[Tensor, Tensor, list[str]]:
        first, second, texts = zip(*rows, strict=True)
        return torch.stack(first), torch.stack(second), list(texts)

    dataset = wds.WebDataset(str(shard), shardshuffle=False).repeat().to_tuple("jpg", "txt").map(two_views)
    # webdataset's own batches would end with the shard; these run on into the next round.
    batches = DataLoader(dataset, batch_size=BATCH, collate_fn=collate, num_workers=1)
    for first, _, _ in batches:
        yield len(first)


def _boxes(jpegs: Sequence[bytes]) -> Iterator[tuple[bytes, list[tuple[int, int, int, int]]]]:
    """The pictures again and again, each with two random crops; drawn beforehand, so that only pixels are timed."""
    rng = np.random.default_rng(0)
    sizes = [simplejpeg.decode_jpeg_header(data)[:2] for data in jpegs]
    drawn = [[crop_box(rng.random(NUM_DRAWS), height, width, PLAIN) for _ in range(2)] for height, width in sizes]
    drawn = [[whole_pixels(box, SIZE) for box in boxes] for boxes in drawn]
    return itertools.cycle(zip(jpegs, drawn, strict=True))


def _pillow(shard: Path, jpegs: Sequence[bytes]) -> Stream:
    """Pillow on bytes in memory: decode, then a bicubic resize of each crop."""
    pairs = _boxes(jpegs)
    while True:
        batch = []
        for data, boxes in itertools.islice(pairs, BATCH):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for top, left, height, width in boxes:
                box = (left, top, left + width, top + height)
                batch.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)))
        np.stack(batch)
        yield len(batch) // 2


def _primitives(shard: Path, jpegs: Sequence[bytes]) -> Stream:
    """The loader's own decoding and resizing on bytes in memory, and nothing else of it."""
    pairs = _boxes(jpegs)
    while True:
        batch = []
        for data, boxes in itertools.islice(pairs, BATCH):
            image = decode_rgb(data)
            batch += [crop_resize(image, box, SIZE) for box in boxes]
        np.stack(batch)
        yield len(batch) // 2


def _ours(shard: Path, jpegs: Sequence[bytes], *, view: ViewConfig = PLAIN) -> Stream:
    """The loader from shards to batches: with the order, keyed draws, masks, partners and tokens of a training run."""
    job = loader_job(shard, view=view, global_batch=BATCH, threads=1)
    with Loader(job) as stream:
        for batch in stream:
            yield len(batch)


def loader_job(
    shard: Path, *, view: ViewConfig, global_batch: int, threads: int, rank: int = 0, world: int = 1
) -> LoaderJob:
    """Batches from one shard of captioned pictures, with both views drawn as `view`."""
    source = SourceConfig(name="photo", kind="image_text", shards=[shard.name])
    config = DataConfig(
        root=str(shard.parent), sources=[source], image_size=SIZE, threads=threads, target_view=view, other_view=view
    )
    sources = open_sources(config.sources, shard.parent)
    specs = [(s.name, s.num_samples, 1, s.mean_bytes, None) for s in sources]
    return LoaderJob(
        config=config,
        mixture=Mixture.plan(0, sources=specs, global_batch=global_batch),
        sources=sources,
        context_length=77,
        seed=0,
        mask=MaskSpec(cells=SIZE // 16, ratio=0.5),
        rank=rank,
        world=world,
        accumulation=1,
    )


def _ours_augmented(shard: Path, jpegs: Sequence[bytes]) -> Stream:
    """The same with the default second view, blurred every time, for both views."""
    return _ours(shard, jpegs, view=ViewConfig(blur=1.0))


OURS = "ours"
# The worker processes of the first two are forked before any other path has threads.
PATHS: dict[str, Callable[[Path, Sequence[bytes]], Stream]] = {
    "torchvision": _torchvision,
    "torchvision, tensors": _torchvision_tensors,
    "pillow": _pillow,
    "primitives": _primitives,
    OURS: _ours,
    "ours, blurred": _ours_augmented,
}


# -- pictures -------------------------------------------------------------------------------------------------


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture that compresses like a photo: noise at every scale, falling as in nature, and edges -> uint8 HWC."""
    image = np.full((height, width, 3), 128, np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = rng.standard_normal((max(2, cells * height // width), cells, 3), np.float32)
        noise = 0.8 * 3**0.5 * noise.mean(2, keepdims=True) + 0.4 * noise  # mostly grey, as pictures are
        image += 90 * (cells / 2) ** -0.7 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        corners = rng.integers(0, (width, height), (rng.integers(3, 7), 2)).astype(np.int32)
        layer = cv2.fillPoly(image.copy(), [corners], rng.uniform(0, 255, 3).tolist(), lineType=cv2.LINE_AA)
        image = 0.5 * (image + layer)
    image += 4 * rng.standard_normal(image.shape, np.float32)  # the sensor's
    return np.clip(image, 0, 255).astype(np.uint8)


def _photos(number: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    images = (photo(rng, *shape) for shape in itertools.islice(itertools.cycle(SHAPES), number))
    return [simplejpeg.encode_jpeg(image, quality=90, colorspace="RGB", colorsubsampling="420") for image in images]


def _read_jpegs(directory: Path, most: int) -> list[bytes]:
    names = sorted(os.path.join(where, name) for where, _, files in os.walk(directory) for name in files)
    jpegs = (Path(name).read_bytes() for name in names if name.lower().endswith((".jpg", ".jpeg")))
    found = list(itertools.islice(filter(simplejpeg.is_jpeg, jpegs), most))
    if not found:
        raise UserError(f"--images: got {directory}, which holds no JPEG; needed: a directory with .jpg files")
    return found


def write_shard(path: Path, jpegs: Sequence[bytes]) -> Path:
    """The pictures with a caption each, as a webdataset shard."""
    with wds.TarWriter(str(path)) as writer:
        for i, data in enumerate(jpegs):
            writer.write({"__key__": f"{i:06d}", "jpg": data, "txt": f"a photo, number {i} of many, of nothing at all"})
    return path
