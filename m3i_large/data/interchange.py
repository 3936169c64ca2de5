"""Other libraries' indexes of webdataset shards: written from ours, and read as a second opinion on sample counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3i_large.data.index import ShardIndex
from m3i_large.data.storage import relative_name, written_whole
from m3i_large.errors import UserError

TIMM_FILES, SIZES_FILE = ("_info.json", "info.json"), "sizes.json"


def write_energon(index: ShardIndex, path: Path) -> None:
    """Megatron-Energon's `<shard>.tar.idx`: uint64 offsets of each sample's first header, and of the end.

    The first is 0 by definition, whatever lies before the first sample.
    """
    offsets = index.columns["sample_offset"].copy()
    offsets[0] = 0
    _write(path, offsets.tobytes())


def write_dali(index: ShardIndex, path: Path) -> None:
    """DALI's index as `wds2idx` writes it, version 1.2: a line a sample of `extension offset size name`, by spaces.

    Raises:
        UserError: a name with a space or line break, which this format cannot hold.
    """
    lines = [f"v1.2 {len(index)}"]
    for row in range(len(index)):
        key = index.key(row)
        parts = [(place, e) for e in index.extensions if (place := index.part(row, e)) is not None]
        for _, e in parts:
            if f"{key}.{e}".split() != [f"{key}.{e}"]:
                raise UserError(f"{path}: {f'{key}.{e}'!r} has white space in its name, which DALI's index cannot hold")
        lines.append(" ".join(f"{e} {offset} {size} {key}.{e}" for (offset, size), e in sorted(parts)))
    _write(path, ("\n".join(lines) + "\n").encode())


EXPORTS: dict[str, tuple[str, Callable[[ShardIndex, Path], None]]] = {
    "energon": ("{name}.idx", write_energon),
    "dali": ("{stem}.idx", write_dali),
}


def export_index(kind: str, index: ShardIndex, name: str, directory: Path) -> Path:
    """Writes another library's index of shard `name` below a directory and returns its path."""
    pattern, write = EXPORTS[kind]
    name = relative_name(name)
    path = directory / pattern.format(name=name, stem=name.removesuffix(".tar"))
    write(index, path)
    return path


def expected_counts(directory: Path) -> dict[str, tuple[int, str]]:
    """Sample counts that files beside the shards state: timm's `_info.json`, `sizes.json`, Energon's `.tar.idx`.

    Returns:
        {shard's file name: (samples, the file that says so)}; files that cannot be read are passed over.
    """
    found: dict[str, tuple[int, str]] = {}
    for path in directory.glob("*.tar.idx"):
        found[path.name.removesuffix(".idx")] = (path.stat().st_size // 8 - 1, path.name)
    if isinstance(sizes := _json(directory / SIZES_FILE), dict):
        found |= {Path(name).name: (int(n), SIZES_FILE) for name, n in sizes.items() if str(n).isdecimal()}
    for name in TIMM_FILES:
        found |= {shard: (n, name) for shard, n in _timm(_json(directory / name))}
    return found


def _timm(info: Any) -> list[tuple[str, int]]:
    # info.json is a name that others use too: whatever it holds must do no harm.
    splits = info.get("splits", [info]) if isinstance(info, dict) else []
    entries = list(splits.values()) if isinstance(splits, dict) else splits
    counts: list[tuple[str, int]] = []
    for split in entries if isinstance(entries, list) else []:
        names, lengths = (split.get("filenames"), split.get("shard_lengths")) if isinstance(split, dict) else (0, 0)
        if isinstance(names, list) and isinstance(lengths, list) and len(names) == len(lengths):
            pairs = zip(names, lengths, strict=True)
            counts += [(Path(name).name, int(n)) for name, n in pairs if isinstance(name, str) and str(n).isdecimal()]
    return counts


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, data: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
