"""Sources: named sets of shards, read sample by sample in a fixed order. No decoding, no randomness.

A sample's id is its position among the eligible samples of its source, shards sorted by name: 0 to num_samples - 1.
"""

import bisect
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from braceexpand import braceexpand
from pydantic import BaseModel, ConfigDict, Field, field_validator

from m3i_large.data.index import SampleIndex, index_shard, read_part
from m3i_large.errors import UserError

Kind = Literal["image_text", "image_category", "image"]
IMAGE_EXTENSIONS = ("jpg", "jpeg", "webp", "png")
OPEN_SHARDS = 64


class Nominal(BaseModel):
    """Size of a source as published: what planning uses where the data is not there."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(gt=0)
    shards: int = Field(gt=0)
    mean_bytes: int = Field(gt=0, description="bytes of a sample")


class SourceConfig(BaseModel):
    """One entry of `data.sources`."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    kind: Kind
    shards: list[str] | str = Field(description="paths relative to data.root; {000000..000003} and * expand")
    repeats: int | float | str = Field(
        1, description="weight: passes over this source per epoch; exact, '1/3' and 0.1 too"
    )
    quota: int | None = Field(None, gt=0, description="samples per lane and step, fixed; replaces the share by repeats")
    caption_field: str = Field("txt", description="extension that holds the text")
    category_field: str = Field("cls", description="extension that holds the class index")
    nominal: Nominal | None = None

    @field_validator("repeats", mode="before")
    @classmethod
    def _check_repeats(cls, value: Any) -> Any:
        try:
            good = not isinstance(value, bool) and Fraction(str(value)) > 0
        except (ValueError, ZeroDivisionError):
            good = False
        if not good:
            raise ValueError("needed: a positive number or fraction such as 2, 0.5 or '1/3'")
        return value

    @property
    def exact_repeats(self) -> Fraction:
        """`repeats` as written: 0.1 is 1/10."""
        return Fraction(str(self.repeats))

    @property
    def target_field(self) -> str | None:
        """Extension that a sample must have beside its image."""
        return {"image_text": self.caption_field, "image_category": self.category_field, "image": None}[self.kind]


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample as stored.

    Attributes:
        key: its name in the shard.
        image: the encoded picture.
        text: of image_text sources, else None.
        category: class index of image_category sources, else None.
        meta: the `.json` part, {} if there is none.
    """

    key: str
    image: bytes
    text: str | None = None
    category: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard of a source: name below data.root, size in bytes, eligible samples, sha256 of its index."""

    name: str
    path: Path
    num_bytes: int
    samples: list[SampleIndex]
    digest: str


class _File:
    """A descriptor that closes with its last user: leaving the cache never cuts a read in another thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Source:
    """An open source. Reading is safe from any number of threads.

    Attributes:
        name, kind: from its configuration.
        num_samples: eligible samples: those with an image and the part its kind needs.
        mean_bytes: mean payload of a sample, bytes, rounded, at least 1.
        shards: in order.
    """

    def __init__(self, config: SourceConfig, shards: Sequence[Shard]) -> None:
        self.config = config
        self.name: str = config.name
        self.kind: Kind = config.kind
        self.shards = list(shards)
        self._ends = list(accumulate(len(shard.samples) for shard in self.shards))
        self.num_samples: int = self._ends[-1]
        payload = sum(size for shard in self.shards for sample in shard.samples for _, size in sample.parts.values())
        self.mean_bytes: int = max(1, round(payload / self.num_samples))
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_File)

    @classmethod
    def open(cls, config: SourceConfig, root: Path) -> "Source":
        """Finds and indexes the shards of `config` below `root`.

        Raises:
            UserError: no such directory or shard, a shard named twice, no eligible sample.
            ValueError: a damaged shard.
        """
        shards = [_open_shard(name, root, config) for name in _expand(config, root)]
        if not any(shard.samples for shard in shards):
            need = " and ".join(filter(None, ("/".join(IMAGE_EXTENSIONS), config.target_field)))
            where = f"data.sources.{config.name}.shards"
            raise UserError(f"{where}: got {config.shards}, in which no sample has {need}; needed: at least one")
        return cls(config, shards)

    def __len__(self) -> int:
        return self.num_samples

    def locate(self, id: int) -> tuple[Shard, SampleIndex]:
        """The shard and the entry of sample `id`."""
        if not 0 <= id < self.num_samples:
            raise IndexError(f"source {self.name}: got id {id}; needed: 0 to {self.num_samples - 1}")
        number = bisect.bisect_right(self._ends, id)  # right: shards without samples are passed over
        shard = self.shards[number]
        return shard, shard.samples[id - self._ends[number] + len(shard.samples)]

    def read(self, id: int) -> RawSample:
        """Reads sample `id`.

        Raises:
            IndexError: no such id.
            ValueError: a broken sample (no UTF-8, a category that is no index, a shard cut short); names it.
        """
        shard, sample = self.locate(id)
        file, config = self._open(shard.path), self.config

        def part(extension: str) -> bytes:
            return read_part(file.descriptor, *sample.parts[extension])

        try:
            return RawSample(
                key=sample.key,
                image=part(next(e for e in IMAGE_EXTENSIONS if e in sample.parts)),
                text=part(config.caption_field).decode("utf-8").strip() if self.kind == "image_text" else None,
                category=_category(part(config.category_field)) if self.kind == "image_category" else None,
                meta=_meta(part("json")) if "json" in sample.parts else {},
            )
        except ValueError as error:
            raise ValueError(f"source {self.name}: sample {sample.key} of {shard.path}: {error}") from error


def open_sources(configs: Sequence[SourceConfig], root: Path) -> list[Source]:
    """Opens all sources, in the order given.

    Raises:
        UserError: as `Source.open`; no source; two of one name; a shard that belongs to two sources (its samples would
            not be seen exactly once an epoch).
    """
    if not configs:
        raise UserError("data.sources: got none; needed: at least one")
    owners: dict[Path, str] = {}
    names: set[str] = set()
    for config in configs:
        if config.name in names:
            raise UserError(f"data.sources: two are named {config.name}; needed: different names")
        names.add(config.name)
        for name in _expand(config, root):
            if (other := owners.setdefault((root / name).resolve(), config.name)) != config.name:
                where = f"data.sources.{config.name}.shards"
                raise UserError(f"{where}: {name} is also a shard of {other}; needed: one source per shard")
    return [Source.open(config, root) for config in configs]


def manifest_hash(sources: Sequence[Source]) -> str:
    """sha256 in hexadecimal of what gives every (source, id) its meaning: names, sizes, counts, indexes; no pixels."""
    rows = [
        [source.name, [[shard.name, shard.num_bytes, len(shard.samples), shard.digest] for shard in source.shards]]
        for source in sources
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _expand(config: SourceConfig, root: Path) -> list[str]:
    """Shard names sorted, relative to `root` where they lie below it."""
    where = f"data.sources.{config.name}.shards"
    if not root.is_dir():
        raise UserError(f"data.root: got {root}, which is no directory; needed: the directory with the shards")
    patterns = [config.shards] if isinstance(config.shards, str) else config.shards
    names: list[str] = []
    for pattern in patterns:
        try:
            expanded = list(braceexpand(pattern))
        except ValueError:
            raise UserError(
                f"{where}: got {pattern!r} with unbalanced braces; needed: such as a-{{000000..000003}}.tar"
            ) from None
        for name in expanded:
            found = glob.glob(name, root_dir=root) if glob.has_magic(name) else [name]
            if not found or not all((root / path).is_file() for path in found):
                raise UserError(
                    f"{where}: got {pattern!r}, but there is no file {root / name}; needed: existing tar files"
                )
            names += found
    if not names:
        raise UserError(f"{where}: got {config.shards!r}; needed: at least one shard")
    seen: set[Path] = set()
    for name in names:
        if (path := (root / name).resolve()) in seen:
            raise UserError(f"{where}: {name} is listed twice in {config.shards!r}; needed: every shard once")
        seen.add(path)
    return sorted(names)


def _open_shard(name: str, root: Path, config: SourceConfig) -> Shard:
    index = index_shard(root / name)
    target = config.target_field
    samples = [
        sample
        for sample in index.samples
        if not sample.parts.keys().isdisjoint(IMAGE_EXTENSIONS) and (target is None or target in sample.parts)
    ]
    return Shard(name=name, path=index.path, num_bytes=index.num_bytes, samples=samples, digest=index.digest())


def _category(raw: bytes) -> int:
    category = int(raw)
    if category < 0:
        raise ValueError(f"got category {category}; needed: an index from 0")
    return category


def _meta(raw: bytes) -> dict[str, Any]:
    meta = json.loads(raw)
    if not isinstance(meta, dict):
        raise ValueError(f"got .json with a {type(meta).__name__}; needed: an object")
    return meta
