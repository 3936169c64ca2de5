"""Fills micro-batches: plans the rows, reads, decodes and crops them, and draws what is random. No torch in here.

What a micro-batch holds is a pure function of (job, step, micro_step); threads only decide when parts of it are done.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from m3i_large.data import views
from m3i_large.data.config import DataConfig
from m3i_large.data.decode import blur, crop_resize, decode_rgb, whole_pixels
from m3i_large.data.letterbox import content_box
from m3i_large.data.mixture import Mixture, MixtureRows
from m3i_large.data.reader import BlockReader, SampleReader, reads_blocks
from m3i_large.data.slots import Slot, SlotLayout
from m3i_large.data.sources import Encoded, RawSample, Source
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.errors import UserError

MAX_SUBSTITUTES = 8
CHUNK = 16  # rows that one thread takes at a time: its own work, not the hand-over, should be what it does
BLOCKS_AHEAD = 16  # micro-steps that blocks are read before they are needed
TARGET, OTHER = "target_NHWC", "other_NHWC"


@dataclass(frozen=True, kw_only=True)
class LoaderJob:
    """Everything that decides one rank's batches; goes to the loader's process as it is.

    Attributes:
        config: sources' views and sizes.
        mixture: which sample goes where.
        sources: opened, in the recipe's order.
        context_length: T, tokens of a text.
        seed: of every random choice.
        mask: of the student's input (objective.input, objective.mix).
        rank, world: this rank's place.
        accumulation: micro-steps per step.
    """

    config: DataConfig
    mixture: Mixture
    sources: list[Source]
    context_length: int
    seed: int
    mask: views.MaskSpec
    rank: int
    world: int
    accumulation: int

    @property
    def lanes(self) -> int:
        """Whole lanes in each of this rank's micro-batches."""
        return self.mixture.lanes // self.accumulation // self.world

    @property
    def layout(self) -> SlotLayout:
        """The shape of its micro-batches."""
        rows = self.lanes * self.mixture.slots
        return SlotLayout(rows, self.config.image_size, self.mask.cells, self.context_length)

    def most_rows(self, kind: str) -> int:
        """The most rows of sources of a kind in any micro-batch."""
        quotas = dict(zip(self.mixture.source_names, self.mixture.max_quota, strict=True))
        drawn = self.lanes * sum(quotas[source.name] for source in self.sources if source.kind == kind)
        return min(self.layout.rows, drawn)

    def partners(self, lanes: np.ndarray, step: int) -> np.ndarray:
        """partner_N of a micro-batch; UserError where the mix block does not fit a lane."""
        if not self.mask.mix:
            return np.arange(len(lanes))
        slots, block = self.mixture.slots, self.mask.mix_block
        return views.draw_partners(lanes, seed=self.seed, step=step, slots=slots, block=block)


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be used and was replaced by another of its source."""

    source: str
    shard: str
    key: str
    id: int
    reason: str
    step: int


@dataclass
class Pending:
    """A micro-batch in the making."""

    index: int
    rows: MixtureRows
    slot: Slot
    draws_NVD: np.ndarray
    grey_NV: np.ndarray
    texts: list[str]
    parts: list[Future[None]] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)


class Producer:
    """Makes micro-batches of a job, by itself (`threads` 0) or with threads for reading and for decoding."""

    def __init__(self, job: LoaderJob) -> None:
        self.job = job
        config = job.config
        self._tokenizer = Tokenizer(context_length=job.context_length)
        cv2.setNumThreads(1)
        # What is wrong with a picture is told in quarantine.jsonl, not by a line of OpenCV's for each.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self._decoding = ThreadPoolExecutor(config.threads, "decode") if config.threads else None
        self._reading: ThreadPoolExecutor | None = None
        self._reader: SampleReader | BlockReader = SampleReader(job.sources)
        if config.threads and reads_blocks(config.read, job.sources):
            self._reading = ThreadPoolExecutor(config.io_threads, "read")
            capacity = int(config.cache_gib * 2**30)
            self._reader = BlockReader(job.sources, job.mixture, self._reading, capacity=capacity)
        self._planned: dict[int, MixtureRows] = {}

    def close(self) -> None:
        """Ends the threads."""
        for pool in (self._decoding, self._reading):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    @property
    def retries(self) -> int:
        """Reads repeated so far because the storage failed."""
        return sum(storage.retries for storage in {id(s.storage): s.storage for s in self.job.sources}.values())

    def start(self, index: int, slot: Slot) -> Pending:
        """Begins micro-batch `index` (step * accumulation + micro_step) in a slot."""
        job = self.job
        step = index // job.accumulation
        rows = self._rows(index)
        n = len(rows.id)
        keys = views.SampleKeys(job.seed, rows.epoch, rows.source, rows.id, np.zeros(n, np.int64))
        slot["source_N"][:], slot["epoch_N"][:], slot["id_N"][:] = rows.source, rows.epoch, rows.id
        slot["substitute_N"][:] = 0
        slot["partner_N"][:] = job.partners(rows.lane, step)
        slot["mask_NPP"][:] = views.draw_masks(keys.mask_keys(), job.mask)
        pending = Pending(index, rows, slot, keys.draws(), np.zeros((n, 2)), [""] * n)
        for begin in range(0, n, CHUNK):
            self._begin(pending, range(begin, min(begin + CHUNK, n)), step)
        return pending

    def finish(self, pending: Pending) -> list[BadSample]:
        """Waits for a micro-batch and completes it; the errors of its rows are raised here, first row first."""
        for part in pending.parts:
            part.result()
        slot, draws, config = pending.slot, pending.draws_NVD, self.job.config
        for view, chosen in enumerate((config.target_view, config.other_view)):
            slot["flip_NV"][:, view] = draws[:, view, views.FLIP] < chosen.flip
            slot["colour_NV34"][:, view] = views.colour_affine(draws[:, view], pending.grey_NV[:, view], chosen)
            inverted = draws[:, view, views.SOLARIZE] < chosen.solarize
            slot["solarize_NV"][:, view] = np.where(inverted, views.SOLARIZE_ABOVE, views.NO_SOLARIZE)
        slot["text_NT"][:] = self._tokenizer.encode(pending.texts)
        return sorted(pending.bad, key=lambda bad: (bad.source, bad.id, bad.reason))

    def _rows(self, index: int) -> MixtureRows:
        if self._reading is not None:
            # A start reads its first rows one by one while their successors' blocks are on the way.
            for later in range(index + 1, index + BLOCKS_AHEAD + 1):
                if later not in self._planned:
                    self._planned[later] = self._plan(later)
                    self._reader.ahead(self._planned[later])
        rows = self._planned.pop(index, None)
        return self._plan(index) if rows is None else rows

    def _plan(self, index: int) -> MixtureRows:
        step, micro_step = divmod(index, self.job.accumulation)
        return self.job.mixture.rows(step, micro_step, rank=self.job.rank, world=self.job.world)

    def _begin(self, pending: Pending, chunk: range, step: int) -> None:
        if self._decoding is None:
            self._fill(pending, chunk, step)
        else:
            pending.parts.append(self._decoding.submit(self._fill, pending, chunk, step))

    def _fill(self, pending: Pending, chunk: range, step: int) -> None:
        rows = pending.rows
        for i in chunk:
            # By the thread that decodes it: to hand bytes from thread to thread costs more than reading a local file.
            encoded = self._reader.read(int(rows.source[i]), int(rows.epoch[i]), int(rows.id[i]))
            self._fill_row(pending, i, step, encoded)

    def _fill_row(self, pending: Pending, i: int, step: int, encoded: Encoded) -> None:
        """Row i from its sample, or from the first usable substitute of it."""
        rows, job = pending.rows, self.job
        s, epoch, number = int(rows.source[i]), int(rows.epoch[i]), int(rows.id[i])
        source, reason = job.sources[s], ""
        for attempt in range(MAX_SUBSTITUTES + 1):
            if attempt:
                number = job.mixture.substitute(s, epoch=epoch, offset=int(rows.offset[i]), attempt=attempt - 1)
                encoded = source.fetch([number])[0]
            try:
                raw = source.parse(encoded)
                image = decode_rgb(raw.image, max_pixels=job.config.max_pixels)
            except ValueError as error:
                reason = str(error)
                pending.bad.append(
                    BadSample(
                        source=source.name,
                        shard=encoded.shard,
                        key=encoded.key,
                        id=number,
                        reason=reason,
                        step=step,
                    )
                )
                continue
            if attempt:
                self._redraw(pending, i, attempt)
            self._augment(pending, i, image, raw, source)
            return
        raise UserError(
            f"source {source.name}: sample {int(rows.id[i])} and {MAX_SUBSTITUTES} substitutes cannot be used: {reason}"
        )

    def _redraw(self, pending: Pending, i: int, attempt: int) -> None:
        """Gives a substitute random choices of its own, so that the crop is another when the sample's turn comes."""
        rows, one = pending.rows, slice(i, i + 1)
        number = np.array([attempt])
        keys = views.SampleKeys(self.job.seed, rows.epoch[one], rows.source[one], rows.id[one], number)
        pending.draws_NVD[one] = keys.draws()
        pending.slot["mask_NPP"][one] = views.draw_masks(keys.mask_keys(), self.job.mask)
        pending.slot["substitute_N"][one] = number

    def _augment(self, pending: Pending, i: int, image: np.ndarray, raw: RawSample, source: Source) -> None:
        slot, config = pending.slot, self.job.config
        if source.config.letterbox:
            top, left, h, w = content_box(image.shape[1], image.shape[0], raw.original)
            image = image[top : top + h, left : left + w]
        height, width = image.shape[:2]
        for view, (pixels, chosen) in enumerate(((TARGET, config.target_view), (OTHER, config.other_view))):
            draws, out = pending.draws_NVD[i, view], slot[pixels][i]
            box = whole_pixels(views.crop_box(draws, height, width, chosen), config.image_size)
            crop_resize(image, box, config.image_size, out=out)
            if sigma := views.blur_sigma(draws, config.image_size, chosen):
                out[:] = blur(out, sigma)
            pending.grey_NV[i, view] = float(np.dot(cv2.mean(out)[:3], views.LUMA)) / 255
            slot["box_NV4"][i, view] = box
        slot["size_N2"][i] = height, width
        category = -1 if raw.category is None else raw.category
        if category >= config.num_classes:
            raise UserError(
                f"source {source.name}: sample {raw.key} has class {category}; "
                f"needed: below data.num_classes {config.num_classes}"
            )
        slot["category_N"][i] = category
        pending.texts[i] = raw.text or ""
        slot["text_valid_N"][i] = bool(raw.text)


def private_slot(layout: SlotLayout) -> Slot:
    """A slot in memory of its own."""
    memory: Any = bytearray(layout.num_bytes)
    return layout.slot(memory)
