"""Batches: the same at every number of ranks, threads and micro-steps, and true to the pixels they came from."""

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset as wds

from m3i_large.data.batch import Batch
from m3i_large.data.config import DataConfig
from m3i_large.data.loader import Loader
from m3i_large.data.mixture import Mixture
from m3i_large.data.producer import BadSample, LoaderJob
from m3i_large.data.sources import open_sources
from m3i_large.data.views import MaskSpec
from m3i_large.errors import UserError

SIZE, LANES = 16, 24


def encoded(extension: str, image: np.ndarray) -> bytes:
    return cv2.imencode(extension, image)[1].tobytes()


def coordinates(height: int, width: int) -> np.ndarray:
    """A BGR image whose green tells the row and whose red tells the column (0 to 255 across)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 1] = np.linspace(0, 255, height)[:, None].round()
    image[..., 2] = np.linspace(0, 255, width)[None].round()
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, extension in (("text", "png"), ("label", "jpg")):
        with wds.TarWriter(str(root / f"{name}-000000.tar")) as writer:
            for i in range(70):
                image = coordinates(int(rng.integers(20, 90)), int(rng.integers(20, 90)))
                sample = {"__key__": f"{i:04d}", extension: encoded("." + extension, image)}
                writer.write(sample | ({"txt": f"number {i}"} if name == "text" else {"cls": str(i % 5)}))
    with wds.TarWriter(str(root / "broken-000000.tar")) as writer:
        for i in range(40):
            image = encoded(".png", coordinates(30, 30))
            image = image[: len(image) // 2] if i % 4 == 0 else image
            writer.write({"__key__": f"{i:04d}", "png": image, "txt": "x"})
    return root


def config(data: Path, **changes: object) -> DataConfig:
    sources = [
        {"name": "text", "kind": "image_text", "shards": "text-*.tar", "quota": 3},
        {"name": "label", "kind": "image_category", "shards": "label-*.tar", "quota": 1},
    ]
    return DataConfig(
        **(
            {"root": str(data), "image_size": SIZE, "threads": 0, "num_classes": 5, "lanes": LANES, "sources": sources}
            | changes
        )
    )


def loader(
    data: Path, *, rank: int = 0, world: int = 1, accumulation: int = 1, block: int | None = None, **more: object
) -> Loader:
    options = {k: more.pop(k) for k in ("start_step", "on_bad") if k in more}
    settings = config(data, **more)
    sources = open_sources(settings.sources, data)
    specs = [(s.name, s.num_samples, 1, s.mean_bytes, c.quota) for s, c in zip(sources, settings.sources, strict=True)]
    batch = LANES * sum(c.quota for c in settings.sources)
    job = LoaderJob(
        config=settings,
        mixture=Mixture.plan(4, sources=specs, global_batch=batch, lanes=LANES, accumulation=accumulation),
        sources=sources,
        context_length=8,
        seed=4,
        mask=MaskSpec(cells=4, ratio=0.5, mix_block=block),
        rank=rank,
        world=world,
        accumulation=accumulation,
    )
    return Loader(job, **options)


NAMES = [f.name for f in fields(Batch) if f.type is torch.Tensor and f.name != "partner_N"]


def global_batch(data: Path, step: int, *, world: int = 1, accumulation: int = 1, **more: object) -> list[str]:
    """A digest of every row of a step, in the canonical order: ids, pixels, draws, and the partner's identity."""
    found: dict[int, list[str]] = {}
    for rank in range(world):
        with loader(data, rank=rank, world=world, accumulation=accumulation, start_step=step, **more) as stream:
            for micro_step in range(accumulation):
                batch = next(stream)
                assert (batch.step, batch.micro_step) == (step, micro_step)
                for lane, digests in lanes_of(batch, rank, world, accumulation):
                    found[lane] = digests
    return [digest for lane in range(LANES) for digest in found[lane]]


def lanes_of(batch: Batch, rank: int, world: int, accumulation: int) -> Iterator[tuple[int, list[str]]]:
    per_rank = LANES // accumulation // world
    slots = len(batch) // per_rank
    for number in range(per_rank):
        rows = range(number * slots, (number + 1) * slots)
        yield (rank * per_rank + number) * accumulation + batch.micro_step, [digest_of(batch, i) for i in rows]


def digest_of(batch: Batch, i: int) -> str:
    digest = hashlib.sha256()
    for name in NAMES:
        digest.update(getattr(batch, name)[i].contiguous().numpy().tobytes())
    j = int(batch.partner_N[i])
    digest.update(str((int(batch.source_N[j]), int(batch.epoch_N[j]), int(batch.id_N[j]))).encode())
    return digest.hexdigest()


def digests(batch: Batch) -> list[str]:
    return [digest_of(batch, i) for i in range(len(batch))]


@pytest.mark.parametrize(
    ("world", "accumulation"), [(2, 1), (3, 1), (4, 1), (6, 1), (8, 1), (1, 2), (2, 2), (3, 2), (1, 3)]
)
def test_the_global_batch_is_the_same_at_every_world_size(data: Path, world: int, accumulation: int) -> None:
    for step in (0, 37):
        whole = global_batch(data, step)
        assert len(set(whole)) == 4 * LANES
        assert global_batch(data, step, world=world, accumulation=accumulation) == whole


@pytest.mark.parametrize(("threads", "world"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("read", ["sample", "block"])
def test_the_global_batch_is_the_same_from_a_process_with_any_threads(
    data: Path, threads: int, world: int, read: str
) -> None:
    assert global_batch(data, 5, world=world, threads=threads, read=read) == global_batch(data, 5)


def test_the_stream_gives_what_batch_at_says(data: Path) -> None:
    with loader(data, accumulation=2, start_step=3) as stream:
        for step, micro_step in [(3, 0), (3, 1), (4, 0)]:
            streamed, direct = next(stream), stream.batch_at(step, micro_step)
            assert digests(streamed) == digests(direct) and torch.equal(streamed.partner_N, direct.partner_N)


def test_shapes_and_types_are_the_contracts(data: Path) -> None:
    with loader(data, world=2) as stream:
        b = next(stream)
    n = 2 * LANES
    shapes = {
        "target_NHWC": (n, SIZE, SIZE, 3),
        "other_NHWC": (n, SIZE, SIZE, 3),
        "box_NV4": (n, 2, 4),
        "size_N2": (n, 2),
        "flip_NV": (n, 2),
    }
    shapes |= {"colour_NV34": (n, 2, 3, 4), "solarize_NV": (n, 2), "mask_NPP": (n, 4, 4), "text_NT": (n, 8)}
    shapes |= dict.fromkeys(
        ("partner_N", "category_N", "text_valid_N", "source_N", "epoch_N", "id_N", "substitute_N"), (n,)
    )
    kinds = {
        "target_NHWC": torch.uint8,
        "box_NV4": torch.int32,
        "flip_NV": torch.bool,
        "colour_NV34": torch.float32,
        "solarize_NV": torch.float32,
    }
    kinds |= {
        "partner_N": torch.int64,
        "mask_NPP": torch.bool,
        "category_N": torch.int64,
        "text_NT": torch.int64,
        "text_valid_N": torch.bool,
    }
    assert {k: tuple(getattr(b, k).shape) for k in shapes} == shapes
    assert {k: getattr(b, k).dtype for k in kinds} == kinds
    assert (b.text_valid_N == (b.source_N == 0)).all() and ((b.category_N >= 0) == (b.source_N == 1)).all()
    assert (b.text_rows, b.category_rows) == (36, 12) and int(b.text_valid_N.sum()) == 36
    assert (b.mask_NPP.sum((1, 2)) == 8).all()


def test_boxes_tell_where_the_pixels_come_from(data: Path) -> None:
    """Through the whole pipeline: decode, crop, resize; the flip is applied afterwards, as patch_mix does."""
    plain = {"blur": 0.0, "jitter_probability": 0.0, "grey": 0.0, "solarize": 0.0, "crop_scale": [0.3, 1.0]}
    with loader(data, target_view=plain, other_view=plain) as stream:
        batch = next(stream)
    for view, pixels in enumerate((batch.target_NHWC, batch.other_NHWC)):
        for n in range(len(batch)):
            top, left, h, w = batch.box_NV4[n, view].tolist()
            height, width = batch.size_N2[n].tolist()
            image = pixels[n].float()
            for r, c in [(3, 3), (8, 8), (12, 5)]:
                y, x = top + (r + 0.5) / SIZE * h - 0.5, left + (c + 0.5) / SIZE * w - 0.5
                assert image[r, c, 1].item() == pytest.approx(255 * y / (height - 1), abs=9)
                assert image[r, c, 0].item() == pytest.approx(255 * x / (width - 1), abs=9)
    assert 0.3 < batch.flip_NV.float().mean() < 0.7


def test_bad_samples_are_replaced_and_reported(data: Path) -> None:
    told: list[BadSample] = []
    sources = [{"name": "broken", "kind": "image_text", "shards": "broken-*.tar", "quota": 2}]
    with loader(data, sources=sources, on_bad=told.append) as stream:
        batch = next(stream)
        again = stream.batch_at(0, 0)
    bad = batch.id_N % 4 == 0
    assert bad.any() and ((batch.substitute_N > 0) == bad).all()
    assert {t.id for t in told} >= set(batch.id_N[bad].tolist())
    assert all(t.reason.endswith("bytes of a damaged image") and t.key == f"{t.id:04d}" for t in told)
    assert digests(batch) == digests(again)


def test_what_is_hopeless_stops_with_a_name(data: Path, tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "all-000000.tar")) as writer:
        for i in range(40):
            writer.write({"__key__": f"{i:04d}", "png": encoded(".png", coordinates(30, 30))[:40], "txt": "x"})
    sources = [{"name": "all", "kind": "image_text", "shards": "all-*.tar", "quota": 2}]
    with (
        loader(tmp_path, sources=sources) as stream,
        pytest.raises(
            UserError, match=r"source all: sample \d+ and 8 substitutes cannot be used: 40 bytes of a damaged"
        ),
    ):
        next(stream)
    with (
        loader(data, num_classes=3) as stream,
        pytest.raises(UserError, match=r"has class [34]; needed: below data.num_classes 3"),
    ):
        next(stream)
    with pytest.raises(UserError, match=r"objective\.mix\.block: got 3"):
        loader(data, block=3)


def test_captions_that_are_empty_huge_or_somewhere_else(tmp_path: Path) -> None:
    image = encoded(".png", coordinates(30, 30))
    texts = ["", "   ", "word " * 200_000, "x" * (1 << 20), "plain", "&lt;b&gt; caf\u00e9"]
    with wds.TarWriter(str(tmp_path / "a-000000.tar")) as writer:
        for i in range(60):
            writer.write({"__key__": f"{i:04d}", "png": image, "txt": texts[i % 6], "json": {"alt": f"alt {i}"}})
    for captions, empty in ((["txt"], {0, 1}), (["txt", "json:alt"], set())):
        sources = [{"name": "a", "kind": "image_text", "shards": "a-*.tar", "quota": 2, "captions": captions}]
        with loader(tmp_path, sources=sources) as stream:
            batch = next(stream)
        for i in range(len(batch)):
            kind, tokens = int(batch.id_N[i]) % 6, batch.text_NT[i].tolist()
            assert bool(batch.text_valid_N[i]) == (kind not in empty)
            assert tokens[0] == 49406 and tokens.count(49407) == 1
            assert (tokens[1] == 49407) == (kind in empty)
            assert (tokens[-1] == 49407) == (kind in (2, 3)), "long ones are cut and keep their end"


def test_letterboxes_are_cut_and_boxes_lie_in_what_is_left(tmp_path: Path) -> None:
    picture = np.full((48, 48, 3), 255, np.uint8)
    picture[12:36] = (0, 0, 200)  # 96 x 48 shrunk to 48 x 24, padded with white
    with wds.TarWriter(str(tmp_path / "a-000000.tar")) as writer:
        for i in range(60):
            meta = {"original_width": 96, "original_height": 48}
            writer.write({"__key__": f"{i:04d}", "png": encoded(".png", picture), "txt": "t", "json": meta})
    for letterbox in (True, False):
        sources = [{"name": "a", "kind": "image_text", "shards": "a-*.tar", "quota": 2, "letterbox": letterbox}]
        with loader(tmp_path, sources=sources) as stream:
            batch = next(stream)
        white = (batch.target_NHWC.amin(3) > 200).any()
        assert bool(white) != letterbox
        assert set(map(tuple, batch.size_N2.tolist())) == ({(22, 48)} if letterbox else {(48, 48)})
        bottom = batch.box_NV4[..., 0] + batch.box_NV4[..., 2]
        assert (bottom <= batch.size_N2[:, None, 0]).all()
