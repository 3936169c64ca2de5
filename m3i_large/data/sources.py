"""Sources: named sets of shards, read sample by sample in a fixed order. No decoding, no randomness.

A sample's id is its position among the eligible samples of its source, shards sorted by name: 0 to num_samples - 1.
"""

import glob
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import numpy as np
from braceexpand import braceexpand

from m3i_large.data.index import IMAGE_EXTENSIONS, ShardIndex
from m3i_large.data.manifest import IndexDirectory, Manifest, ShardRow, eligible_rows, load_index, open_manifest
from m3i_large.data.source_config import JSON_FIELD, SourceConfig
from m3i_large.data.storage import Storage, is_url
from m3i_large.errors import UserError

OPEN_INDEXES = 64
# Parts are read as one range if at least this share of it is wanted, or if what is not wanted is so little a sample
# that another read would cost more: tar pads small parts to many times their size.
DENSE, SLACK = 0.5, 16 << 10
LONGEST_CAPTION = 1 << 16  # bytes; a text tower sees some hundreds
# HTML as Flickr users write it, and not what else stands in angle brackets, such as CC12M's <PERSON>.
_TAG = re.compile(r"</?(?:a|b|i|u|p|br|em|img|strong|span|div|font|blockquote|ul|ol|li)\b[^<>]{0,500}>", re.I)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample's parts as they are stored, not yet looked at.

    Attributes:
        shard, key: where it comes from, for messages.
        parts: content by extension; the image under "image".
        original: (width, height) before img2dataset resized it, zeros where not known.
    """

    shard: str
    key: str
    parts: dict[str, bytes]
    original: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample.

    Attributes:
        shard, key: where it comes from.
        image: the encoded picture.
        text: of image_text sources ("" where it has none), else None.
        category: class index of image_category sources, else None.
        original: as in Encoded.
        meta: the `.json` part where it was asked for, else {}.
    """

    shard: str
    key: str
    image: bytes
    text: str | None
    category: int | None
    original: tuple[int, int]
    meta: dict[str, Any]


class Source:
    """An open source. Reading is safe from any number of threads; a copy in another process opens its own files.

    Attributes:
        name, kind: from its configuration.
        num_samples: eligible samples (data/manifest.py).
        mean_bytes: mean payload of a sample, bytes, rounded, at least 1.
        shards: in order.
    """

    def __init__(self, config: SourceConfig, manifest: Manifest, storage: Storage, directory: IndexDirectory) -> None:
        self.config, self.storage, self.directory = config, storage, directory
        self.name, self.kind = config.name, config.kind
        self.shards: tuple[ShardRow, ...] = manifest.shards
        self._ends = np.cumsum([row.eligible for row in self.shards])
        self.num_samples = int(self._ends[-1])
        self.mean_bytes: int = max(1, round(sum(row.payload for row in self.shards) / self.num_samples))
        self._classes = _read_class_map(config, storage)
        self._indexes = lru_cache(maxsize=OPEN_INDEXES)(self._load)

    def __reduce__(self) -> tuple[Any, ...]:
        manifest = Manifest(source=self.name, eligibility={}, shards=self.shards)
        return type(self), (self.config, manifest, self.storage, self.directory)

    @classmethod
    def open(cls, config: SourceConfig, storage: Storage, directory: IndexDirectory) -> "Source":
        """Finds the shards of `config` and reads, or where they are few makes, their manifest.

        Raises:
            UserError: no such directory or shard, a shard named twice or damaged, no eligible sample, no index.
        """
        manifest = open_manifest(config, expand(config, storage.root), storage, directory)
        if not any(row.eligible for row in manifest.shards):
            need = " and ".join(filter(None, ("/".join(IMAGE_EXTENSIONS), " or ".join(config.target_fields or ()))))
            chosen = config.filters.model_dump(exclude_none=True)
            filtered = f" that passes filters {chosen}" if chosen else ""
            where = f"data.sources.{config.name}.shards"
            raise UserError(f"{where}: got {config.shards}, where no sample has {need}{filtered}; needed: at least one")
        return cls(config, manifest, storage, directory)

    def __len__(self) -> int:
        return self.num_samples

    def locate(self, id: int) -> tuple[int, int]:
        """(shard number, row in its index) of sample `id`; IndexError where there is none."""
        if not 0 <= id < self.num_samples:
            raise IndexError(f"source {self.name}: got id {id}; needed: 0 to {self.num_samples - 1}")
        number = int(np.searchsorted(self._ends, id, side="right"))  # right: shards without samples are passed over
        _, rows = self.index(number)
        return number, int(rows[id - int(self._ends[number]) + len(rows)])

    def fetch(self, ids: Sequence[int], *, meta: bool = False) -> list[Encoded]:
        """Reads samples; those that lie together in a shard in one range.

        Args:
            ids: any; neighbours are found where they follow each other.
            meta: also the `.json` part.

        Raises:
            OutageError: the storage failed or the shard has changed.
        """
        found: list[Encoded] = []
        run: list[tuple[int, int]] = []
        for place in [*map(self.locate, ids), (-1, -1)]:
            if run and place[0] != run[-1][0]:
                found += self._fetch(run[0][0], [row for _, row in run], meta=meta)
                run = []
            run.append(place)
        return found

    def parse(self, encoded: Encoded) -> RawSample:
        """The text or class of a sample; ValueError naming it where its parts are broken."""
        config, parts = self.config, encoded.parts
        try:
            meta = _meta(parts["json"]) if "json" in parts else {}
            text = category = None
            if self.kind == "image_text":
                text = self._text(parts, meta)
            elif self.kind == "image_category":
                category = self._category(_field(config.category_field, parts, meta))
        except ValueError as error:
            raise ValueError(f"{self._label(encoded)}: {error}") from error
        return RawSample(
            shard=encoded.shard,
            key=encoded.key,
            image=parts["image"],
            text=text,
            category=category,
            original=encoded.original,
            meta=meta,
        )

    def read(self, id: int, *, meta: bool = False) -> RawSample:
        """One sample; IndexError, ValueError and OutageError as `locate`, `parse` and `fetch`."""
        return self.parse(self.fetch([id], meta=meta)[0])

    def _label(self, encoded: Encoded) -> str:
        return f"source {self.name}: sample {encoded.key} of {encoded.shard}"

    def index(self, number: int) -> tuple[ShardIndex, np.ndarray]:
        """The index of a shard and the rows of it that count, kept open for a while."""
        return self._indexes(number)

    def _load(self, number: int) -> tuple[ShardIndex, np.ndarray]:
        row = self.shards[number]
        index = load_index(row, self.directory)
        rows = eligible_rows(index, self.config)
        if len(rows) != row.eligible:
            raise UserError(
                f"shard {row.name}: {len(rows)} eligible samples, manifest {row.eligible}; needed: m3i data index"
            )
        return index, rows

    def _fetch(self, number: int, rows: list[int], *, meta: bool) -> list[Encoded]:
        """Reads rows of one shard."""
        index, _ = self.index(number)
        shard = self.shards[number]
        wanted = [self._wanted(index, row, meta=meta) for row in rows]
        places = [place for parts in wanted for place in parts.values()]
        begin, end = min(o for o, _ in places), max(o + s for o, s in places)
        wanted_bytes = sum(s for _, s in places)
        if wanted_bytes >= DENSE * (end - begin) or end - begin - wanted_bytes <= SLACK * len(rows):
            data = self.storage.read(shard.name, begin, end - begin, mark=shard.mark)
            content = [{e: data[o - begin : o - begin + s] for e, (o, s) in parts.items()} for parts in wanted]
        elif len(rows) > 1:
            return [self._fetch(number, [row], meta=meta)[0] for row in rows]
        else:
            read = self.storage.read
            content = [{e: read(shard.name, o, s, mark=shard.mark) for e, (o, s) in wanted[0].items()}]
        original = (index.columns["original_width"], index.columns["original_height"])
        return [
            Encoded(
                shard=shard.name,
                key=index.key(row),
                parts=parts,
                original=(int(original[0][row]), int(original[1][row])),
            )
            for row, parts in zip(rows, content, strict=True)
        ]

    def _wanted(self, index: ShardIndex, row: int, *, meta: bool) -> dict[str, tuple[int, int]]:
        fields = self.config.target_fields or []
        places = {"image": next(p for e in IMAGE_EXTENSIONS if (p := index.part(row, e)))}
        extensions = {"json" if field.startswith(JSON_FIELD) else field for field in fields} | (
            {"json"} if meta else set()
        )
        places |= {e: place for e in extensions if (place := index.part(row, e)) is not None}
        longest = LONGEST_CAPTION if self.kind == "image_text" else None
        return {
            e: (o, min(s, longest)) if longest and e in self.config.captions else (o, s) for e, (o, s) in places.items()
        }

    def _text(self, parts: dict[str, bytes], meta: dict[str, Any]) -> str:
        for field in self.config.captions:
            # A text cut at LONGEST_CAPTION may end inside a character.
            value = _field(field, parts, meta)
            text = value.decode("utf-8", "ignore" if len(value) == LONGEST_CAPTION else "strict") if value else ""
            if self.config.caption_clean:
                text = _TAG.sub(" ", html.unescape(unquote_plus(text)))
            if text := text.strip():
                return text
        return ""

    def _category(self, value: bytes | None) -> int:
        if value is None:
            raise ValueError(f"no {self.config.category_field}")
        text = value.decode("utf-8").strip()
        if self._classes is not None:
            if text not in self._classes:
                raise ValueError(f"class {text[:80]!r} is not in class_map {self.config.class_map}")
            return self._classes[text]
        category = int(text)
        if category < 0:
            raise ValueError(f"got category {category}; needed: an index from 0")
        return category


def open_sources(
    configs: Sequence[SourceConfig], root: str | Path, *, index: str | Path | None = None, retry_s: float = 300.0
) -> list[Source]:
    """Opens all sources, in the order given.

    Args:
        root: data.root, a directory or URL.
        index: directory of indexes; default `.m3i` in the root.

    Raises:
        UserError: as `Source.open`; no source; two of one name; a shard that belongs to two sources (its samples would
            not be seen exactly once an epoch).
    """
    if not configs:
        raise UserError("data.sources: got none; needed: at least one")
    names: set[str] = set()
    for config in configs:
        if config.name in names:
            raise UserError(f"data.sources: two are named {config.name}; needed: different names")
        names.add(config.name)
    storage, directory = Storage(root, retry_s=retry_s), IndexDirectory(root, index)
    sources = [Source.open(config, storage, directory) for config in configs]
    owners: dict[str, tuple[str, str]] = {}
    for source in sources:
        for row in source.shards:
            if not row.eligible:
                continue
            # By content: a copy or a link under another name is the same samples again.
            other = owners.setdefault(row.checksum, (source.name, row.name))
            if other != (source.name, row.name):
                where = f"data.sources.{source.name}.shards"
                raise UserError(f"{where}: {row.name} is also shard {other[1]} of {other[0]}; needed: every shard once")
    return sources


def manifest_hash(sources: Sequence[Source]) -> str:
    """sha256 in hexadecimal of what gives every (source, id) its meaning: names, sizes, counts, checksums."""
    rows = [
        [source.name, [[shard.name, shard.num_bytes, shard.eligible, shard.checksum] for shard in source.shards]]
        for source in sources
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def expand(config: SourceConfig, root: str) -> list[str]:
    """Shard names of a source, sorted: relative to `root`, or URLs.

    Raises:
        UserError: no such directory, braces that do not close, a pattern that finds nothing, a name twice.
    """
    where = f"data.sources.{config.name}.shards"
    patterns = [config.shards] if isinstance(config.shards, str) else config.shards
    local = not is_url(root)
    if local and not Path(root).is_dir() and not all(map(is_url, patterns)):
        raise UserError(f"data.root: got {root}, which is no directory; needed: the directory with the shards")
    names: list[str] = []
    for pattern in patterns:
        try:
            expanded = list(braceexpand(pattern))
        except ValueError:
            raise UserError(
                f"{where}: got {pattern!r} with unbalanced braces; needed: such as a-{{000000..000003}}.tar"
            ) from None
        for name in expanded:
            if not glob.has_magic(name):
                names.append(name)
                continue
            if not local or is_url(name):
                raise UserError(f"{where}: got {name!r}; needed: braces for remote shards, such as a-{{0..9}}.tar")
            found = glob.glob(name, root_dir=root)
            if not found:
                raise UserError(
                    f"{where}: got {pattern!r}, but there is no file {Path(root) / name}; needed: tar files"
                )
            names += found
    if not names:
        raise UserError(f"{where}: got {config.shards!r}; needed: at least one shard")
    names.sort()
    for name, following in pairwise(names):
        if name == following:
            raise UserError(f"{where}: {name} is listed twice in {config.shards!r}; needed: every shard once")
    return names


def _read_class_map(config: SourceConfig, storage: Storage) -> dict[str, int] | None:
    if config.class_map is None:
        return None
    where = f"data.sources.{config.name}.class_map"
    path = Path(config.class_map) if is_url(storage.root) else Path(storage.root) / config.class_map
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        classes = {str(label): int(index) for label, index in values.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: got {path} ({error}); needed: a JSON file {{label: class index}}") from None
    if min(classes.values(), default=-1) < 0:
        raise UserError(f"{where}: {path} has no labels or a negative index; needed: indexes from 0")
    return classes


def _field(name: str, parts: dict[str, bytes], meta: dict[str, Any]) -> bytes | None:
    """The content of a part or of a key of the .json part."""
    if not name.startswith(JSON_FIELD):
        return parts.get(name)
    value = meta.get(name.removeprefix(JSON_FIELD))
    return None if value is None else str(value).encode()[:LONGEST_CAPTION]


def _meta(raw: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(raw)
    except RecursionError:
        raise ValueError("got .json that is nested too deeply") from None
    if not isinstance(meta, dict):
        raise ValueError(f"got .json with a {type(meta).__name__}; needed: an object")
    return meta
