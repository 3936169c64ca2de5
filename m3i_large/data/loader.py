"""Reads, decodes and crops samples in background threads and hands out batches in order.

`batch_at(step, micro_step)` is a pure function; the iterator only prepares its values ahead of time. Nothing depends on
the number of threads, ranks or processes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from m3i_large.data import views
from m3i_large.data.batch import OTHER_VIEW, TARGET_VIEW, Batch
from m3i_large.data.config import DataConfig
from m3i_large.data.decode import blur, crop_resize, decode_rgb
from m3i_large.data.mixture import Mixture, MixtureRows
from m3i_large.data.sources import RawSample, Source
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.errors import UserError

MAX_SUBSTITUTES = 8
# Called with source name, sample id, reason and step of a sample that could not be read.
OnBad = Callable[[str, int, str, int], None]


@dataclass(frozen=True)
class _Row:
    """One sample's arrays, in Batch's fields without their first letter."""

    pixels_VHWC: np.ndarray
    box_V4: np.ndarray
    size_2: np.ndarray
    flip_V: np.ndarray
    colour_V34: np.ndarray
    solarize_V: np.ndarray
    mask_PP: np.ndarray
    category: int
    text: str | None
    substitute: int


class Loader(Iterator[Batch]):
    """One rank's endless stream of micro-batches, from `start_step` on.

    Args:
        config: sources' views and sizes.
        mixture: which sample goes where.
        sources: opened, in the recipe's order.
        tokenizer: for captions.
        seed: of every random choice.
        mask: of the student's input (objective.input, objective.mix).
        rank, world: this rank's place.
        accumulation: micro-steps per step.
        start_step: first step to give out.
        on_bad: told about every sample that was replaced.

    Raises:
        UserError: a sample's class is not below num_classes, or a mix block does not fit a lane.
        ValueError: (from next) a sample and all its substitutes are unreadable.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        mixture: Mixture,
        sources: list[Source],
        tokenizer: Tokenizer,
        seed: int,
        mask: views.MaskSpec,
        rank: int,
        world: int,
        accumulation: int,
        start_step: int = 0,
        on_bad: OnBad | None = None,
    ) -> None:
        self._config, self._mixture, self._sources, self._tokenizer = config, mixture, sources, tokenizer
        self._seed, self._mask = seed, mask
        self._rank, self._world, self._accumulation, self._on_bad = rank, world, accumulation, on_bad
        lanes = mixture.lanes // accumulation // world
        quotas = dict(zip(mixture.source_names, mixture.max_quota, strict=True))
        rows = lanes * mixture.slots
        self._text_rows = min(rows, lanes * sum(quotas[s.name] for s in sources if s.kind == "image_text"))
        self._category_rows = min(rows, lanes * sum(quotas[s.name] for s in sources if s.kind == "image_category"))
        self._partners(np.zeros(mixture.slots, np.int64), 0)  # refuses a block that does not fit, before any work
        cv2.setNumThreads(1)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="loader")
        self._next = start_step * accumulation
        self._ahead: deque[tuple[int, MixtureRows, list[Future[_Row]]]] = deque()
        for _ in range(config.prefetch):
            self._submit()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was prepared and ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> Batch:
        index, rows, futures = self._ahead.popleft()
        self._submit()
        return self._batch(index, rows, [future.result() for future in futures])

    def batch_at(self, step: int, micro_step: int) -> Batch:
        """The batch of one micro-step, whatever was read before."""
        rows = self._mixture.rows(step, micro_step, rank=self._rank, world=self._world)
        ready = [self._row(rows, i, step) for i in range(len(rows.id))]
        return self._batch(step * self._accumulation + micro_step, rows, ready)

    def _submit(self) -> None:
        index, self._next = self._next, self._next + 1
        step, micro_step = divmod(index, self._accumulation)
        rows = self._mixture.rows(step, micro_step, rank=self._rank, world=self._world)
        self._ahead.append((index, rows, [self._pool.submit(self._row, rows, i, step) for i in range(len(rows.id))]))

    def _row(self, rows: MixtureRows, i: int, step: int) -> _Row:
        """Reads row i, or the first readable substitute of it."""
        s, epoch, offset = int(rows.source[i]), int(rows.epoch[i]), int(rows.offset[i])
        source, reason = self._sources[s], ""
        for attempt in range(MAX_SUBSTITUTES + 1):
            number = int(rows.id[i])
            if attempt:
                number = self._mixture.substitute(s, epoch=epoch, offset=offset, attempt=attempt - 1)
            try:
                raw = source.read(number)
                image = decode_rgb(raw.image)
            except ValueError as error:
                reason = str(error)
                if self._on_bad:
                    self._on_bad(source.name, number, reason, step)
                continue
            return self._augment(views.SampleKey(self._seed, epoch, s, int(rows.id[i]), attempt), image, raw, source)
        raise ValueError(
            f"source {source.name}: sample {int(rows.id[i])} and {MAX_SUBSTITUTES} substitutes are unreadable: {reason}"
        )

    def _augment(self, sample: views.SampleKey, image: np.ndarray, raw: RawSample, source: Source) -> _Row:
        height, width = image.shape[:2]
        size = self._config.image_size
        pixels, boxes, flips, colours, solarize = [], [], [], [], []
        for view, config in ((TARGET_VIEW, self._config.target_view), (OTHER_VIEW, self._config.other_view)):
            draws = sample.draws(view)
            box = views.crop_box(draws, height, width, config)
            crop = blur(crop_resize(image, box, size), views.blur_sigma(draws, size, config))
            grey_mean = float(crop.reshape(-1, 3).mean(0) @ views.LUMA) / 255
            pixels.append(crop)
            boxes.append(box)
            flips.append(draws[views.FLIP] < config.flip)
            colours.append(views.colour_affine(draws, grey_mean, config))
            inverted = draws[views.SOLARIZE] < config.solarize
            solarize.append(views.SOLARIZE_ABOVE if inverted else views.NO_SOLARIZE)
        category = -1 if raw.category is None else raw.category
        if category >= self._config.num_classes:
            raise UserError(
                f"source {source.name}: sample {raw.key} has class {category}; "
                f"needed: below data.num_classes {self._config.num_classes}"
            )
        return _Row(
            pixels_VHWC=np.stack(pixels),
            box_V4=np.array(boxes, np.int32),
            size_2=np.array([height, width], np.int32),
            flip_V=np.array(flips),
            colour_V34=np.stack(colours),
            solarize_V=np.array(solarize, np.float32),
            mask_PP=views.draw_mask(sample, self._mask),
            category=category,
            text=raw.text,
            substitute=sample.substitute,
        )

    def _partners(self, lanes: np.ndarray, step: int) -> np.ndarray:
        if not self._mask.mix:
            return np.arange(len(lanes))
        slots, block = self._mixture.slots, self._mask.mix_block
        return views.draw_partners(lanes, seed=self._seed, step=step, slots=slots, block=block)

    def _batch(self, index: int, rows: MixtureRows, ready: list[_Row]) -> Batch:
        step, micro_step = divmod(index, self._accumulation)
        partner = self._partners(rows.lane, step)

        def stacked(name: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(row, name) for row in ready]))

        pixels = stacked("pixels_VHWC")
        return Batch(
            target_NHWC=pixels[:, TARGET_VIEW].contiguous(),
            other_NHWC=pixels[:, OTHER_VIEW].contiguous(),
            box_NV4=stacked("box_V4"),
            size_N2=stacked("size_2"),
            flip_NV=stacked("flip_V"),
            colour_NV34=stacked("colour_V34"),
            solarize_NV=stacked("solarize_V"),
            partner_N=torch.from_numpy(partner),
            mask_NPP=stacked("mask_PP"),
            category_N=torch.tensor([row.category for row in ready]),
            text_NT=torch.as_tensor(self._tokenizer.encode([row.text or "" for row in ready])),
            text_valid_N=torch.tensor([row.text is not None for row in ready]),
            source_N=torch.from_numpy(rows.source),
            epoch_N=torch.from_numpy(rows.epoch),
            id_N=torch.from_numpy(rows.id),
            substitute_N=torch.tensor([row.substitute for row in ready]),
            step=step,
            micro_step=micro_step,
            text_rows=self._text_rows,
            category_rows=self._category_rows,
        )
