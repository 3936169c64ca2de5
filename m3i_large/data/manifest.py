"""What a source's data is: its shards, how many eligible samples each has, and checksums that identify them.

A manifest is made from the shards' indexes (data/index.py) by `m3i data index`, one file per source in the index
directory. Opening 59 thousand shards means reading one file of a few MB; no shard is touched.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from m3i_large.data.index import MOST_NSFW, OTHER_NSFW, Flag, ShardIndex, index_shard
from m3i_large.data.letterbox import content_size
from m3i_large.data.source_config import JSON_FIELD, SourceConfig
from m3i_large.data.storage import Storage, is_url, relative_name, written_whole
from m3i_large.errors import UserError

FORMAT = 1
DEFAULT_DIRECTORY = ".m3i"
# Opening a source indexes up to so many shards by itself; more is a job of its own.
FEW_SHARDS = 64
NOT_ELIGIBLE = Flag.NO_IMAGE | Flag.NO_HEADER | Flag.DUPLICATE_KEY
Progress = Callable[[str, int], object]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One shard in a manifest.

    Attributes:
        name: below data.root, or a URL.
        num_bytes, mark, checksum: of the tar (data/index.py).
        samples, eligible: how many it has, and how many of them the source uses.
        payload: bytes of all parts of the eligible samples.
        damage: why the rest of it cannot be read; "" for a whole one.
        flags: how many samples have each `Flag`.
    """

    name: str
    num_bytes: int
    mark: str
    checksum: str
    samples: int
    eligible: int
    payload: int
    damage: str
    flags: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All shards of a source, sorted by name, for one choice of fields and filters."""

    source: str
    eligibility: dict[str, Any]
    shards: tuple[ShardRow, ...]

    def save(self, path: Path) -> None:
        """Writes JSON lines: a header, then one shard each; whole or not at all."""
        head = {"format": FORMAT, "source": self.source, "eligibility": self.eligibility}
        lines = [json.dumps(head), *(json.dumps(list(asdict(row).values())) for row in self.shards)]
        with written_whole(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Manifest | None":
        """Reads a manifest; None where there is none or it is of another format."""
        try:
            head, *rows = path.read_text(encoding="utf-8").splitlines()
            values = json.loads(head)
            if values["format"] != FORMAT:
                return None
            names = tuple(ShardRow.__dataclass_fields__)
            shards = tuple(ShardRow(**dict(zip(names, row, strict=True))) for row in map(json.loads, rows))
            return cls(source=values["source"], eligibility=values["eligibility"], shards=shards)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None


class IndexDirectory:
    """Where indexes and manifests lie: `.m3i` in a local data root, or a directory of the user's choice."""

    def __init__(self, root: str | Path, directory: str | Path | None = None) -> None:
        if directory is None and is_url(str(root)):
            raise UserError(f"data.index: not set, and data.root is {root}; needed: a local directory for the index")
        self.path = Path(root) / DEFAULT_DIRECTORY if directory is None else Path(directory)

    def shard(self, name: str) -> Path:
        """The index file of a shard."""
        return self.path / "shards" / f"{relative_name(name)}.index"

    def manifest(self, source: str) -> Path:
        """The manifest file of a source."""
        return self.path / f"{source}.jsonl"


def eligibility(config: SourceConfig) -> dict[str, Any]:
    """The settings that decide which samples count; a manifest made under others is of no use."""
    chosen = {"kind", "captions", "category_field", "letterbox", "filters"}
    return json.loads(config.model_dump_json(include=chosen))


def eligible_rows(index: ShardIndex, config: SourceConfig) -> np.ndarray:
    """Rows of a shard's index that the source uses, in order -> int64; UserError for a filter it cannot answer."""
    columns, filters = index.columns, config.filters
    good = (columns["flags"] & NOT_ELIGIBLE.value) == 0
    if (fields := config.target_fields) is not None:
        extensions = {"json" if field.startswith(JSON_FIELD) else field for field in fields}
        good &= np.logical_or.reduce([index.has(extension) for extension in sorted(extensions)])
    width, height = (columns[name].astype(np.int64) for name in ("width", "height"))
    if config.letterbox:
        width, height = content_size(width, height, columns["original_width"], columns["original_height"])
    if filters.min_size is not None:
        good &= np.minimum(width, height) >= filters.min_size
    if filters.max_aspect is not None:
        good &= np.maximum(width, height) <= filters.max_aspect * np.minimum(width, height)
    if filters.min_similarity is not None:
        good &= columns["similarity"] >= filters.min_similarity  # nan, none given, is never enough
    if filters.nsfw is not None:
        if OTHER_NSFW in index.nsfw_values:
            raise UserError(
                f"data.sources.{config.name}.filters.nsfw: .json has more than {MOST_NSFW} different values of NSFW in "
                f"a shard, such as {index.nsfw_values[0]!r}; needed: a column with few"
            )
        meaning = (None, *index.nsfw_values)
        accepted = np.array([value in filters.nsfw for value in meaning])
        good &= accepted[columns["nsfw"]]
    if filters.min_caption is not None:
        field = next(name for name in config.captions if not name.startswith(JSON_FIELD))
        size = columns["part_size"][:, index.extensions.index(field)] if field in index.extensions else 0
        good &= size >= filters.min_caption
    return np.flatnonzero(good)


def index_shards(
    config: SourceConfig,
    names: Sequence[str],
    storage: Storage,
    directory: IndexDirectory,
    *,
    jobs: int = 1,
    salvage: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Indexes the shards that have no valid index yet; returns a manifest of these shards, not written.

    Stopped halfway, it goes on where it was: every shard's index is written when it is done. So many machines can each
    index a part of a source's shards.

    Args:
        names: the shards, sorted.
        jobs: processes.
        salvage: keep the samples before the damage of a damaged shard, instead of refusing it.
        progress: called with a shard's name and size in bytes when it is done.

    Raises:
        UserError: a shard is missing or damaged (all are looked at first), or the directory cannot be written.
    """
    rows, damaged = [], []
    work = partial(_row, config=config, storage=storage, directory=directory)
    for row in in_processes(work, names, jobs=jobs):
        rows.append(row)
        if row.damage:
            damaged.append(f"{storage.location(row.name)}: {row.damage}")
        if progress:
            progress(row.name, row.num_bytes)
    if damaged and not salvage:
        more = f" (and {len(damaged) - 1} more shards)" if len(damaged) > 1 else ""
        raise UserError(
            f"source {config.name}: shard {damaged[0]}{more}; needed: whole tar files, or m3i data index --salvage, "
            "which keeps what comes before the damage"
        )
    return Manifest(source=config.name, eligibility=eligibility(config), shards=tuple(rows))


def build_manifest(
    config: SourceConfig, names: Sequence[str], storage: Storage, directory: IndexDirectory, **options: Any
) -> Manifest:
    """`index_shards` of all the source's shards, and the manifest written."""
    manifest = index_shards(config, names, storage, directory, **options)
    with _writing(directory):
        manifest.save(directory.manifest(config.name))
    return manifest


def open_manifest(
    config: SourceConfig, names: Sequence[str], storage: Storage, directory: IndexDirectory, *, few: int = FEW_SHARDS
) -> Manifest:
    """The source's manifest if it fits `names` and the configuration; made here and now where the shards are few.

    Few shards are looked at again, so that a file that was replaced is noticed; many are trusted (`m3i data check`).

    Raises:
        UserError: there is none and the shards are many; or as `build_manifest`.
    """
    manifest = Manifest.load(directory.manifest(config.name))
    fits = (
        manifest is not None
        and manifest.eligibility == eligibility(config)
        and [row.name for row in manifest.shards] == list(names)
    )
    if (
        manifest is not None
        and fits
        and (len(names) > few or all(_is_current(row, storage, directory) for row in manifest.shards))
    ):
        return manifest
    if len(names) > few:
        why = "no index" if manifest is None else "an index of other shards or filters"
        raise UserError(
            f"data.sources.{config.name}: {len(names)} shards, {why} in {directory.path}; needed: m3i data index first"
        )
    return build_manifest(config, names, storage, directory)


def load_index(row: ShardRow, directory: IndexDirectory) -> ShardIndex:
    """The index of a manifest's shard; UserError where it is gone or of another file."""
    index = ShardIndex.load(directory.shard(row.name))
    if index is None or index.checksum != row.checksum:
        what = "is missing" if index is None else "belongs to another version of the shard"
        raise UserError(f"index {directory.shard(row.name)} {what}; needed: m3i data index, which mends it")
    return index


def _is_current(row: ShardRow, storage: Storage, directory: IndexDirectory) -> bool:
    if not directory.shard(row.name).is_file():
        return False
    stat = storage.stat(row.name)
    return (stat.num_bytes, stat.mark) == (row.num_bytes, row.mark)


def in_processes(work: Callable[[T], R], items: Sequence[T], *, jobs: int) -> Iterator[R]:
    """work(item) for every item, in order, on so many processes; in this one where one is enough."""
    if jobs == 1 or len(items) < 2:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(min(jobs, len(items)), multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is done is on disk; do not do the rest first
            raise


def _row(name: str, *, config: SourceConfig, storage: Storage, directory: IndexDirectory) -> ShardRow:
    """One shard's row, from its index if that is of the file as it is now, else from the tar."""
    path = directory.shard(name)
    index = ShardIndex.load(path)
    if index is None or index.stat != storage.stat(name):
        index = index_shard(name, storage)
        with _writing(directory):
            index.save(path)
    rows = eligible_rows(index, config)
    flags = {str(flag.name): int(((index.columns["flags"] & flag.value) > 0).sum()) for flag in Flag}
    return ShardRow(
        name=name,
        num_bytes=index.stat.num_bytes,
        mark=index.stat.mark,
        checksum=index.checksum,
        samples=len(index),
        eligible=len(rows),
        payload=int(index.columns["part_size"][rows].sum(dtype=np.int64)),
        damage=index.damage,
        flags={name: count for name, count in flags.items() if count},
    )


@contextmanager
def _writing(directory: IndexDirectory) -> Iterator[None]:
    """Turns a directory that cannot be written into one clear line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.index: {directory.path} cannot be written ({error.strerror}); needed: data.index=DIRECTORY"
        ) from None
