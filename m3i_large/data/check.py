"""Is the data still what was indexed? Looks at every shard again and says what has changed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from m3i_large.data.index import ShardIndex, index_shard
from m3i_large.data.interchange import expected_counts
from m3i_large.data.manifest import IndexDirectory, Manifest, ShardRow, eligibility, in_processes
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import expand
from m3i_large.data.storage import Storage, is_url
from m3i_large.errors import OutageError, UserError


def check_manifest(
    manifest: Manifest,
    storage: Storage,
    directory: IndexDirectory,
    *,
    quick: bool = False,
    jobs: int = 1,
    progress: Callable[[str, int], object] | None = None,
) -> list[str]:
    """Compares every shard of a source with its manifest, its index and the counts stated beside it.

    Args:
        quick: sizes and indexes only; else every byte is read and its checksum compared.
        progress: called with each shard's name and size in bytes when it is done.

    Returns:
        One line for each thing that is wrong; empty if all is as it was.
    """
    problems: list[str] = []
    work = partial(_check_shard, storage=storage, directory=directory, quick=quick)
    stated = _stated(manifest, storage)
    for row, found in zip(manifest.shards, in_processes(work, manifest.shards, jobs=jobs), strict=True):
        problems += [f"{storage.location(row.name)}: {problem}" for problem in found]
        count, origin = stated.get(row.name, (row.samples, ""))
        if count != row.samples:
            problems.append(f"{storage.location(row.name)}: {row.samples} samples; {origin} says {count}")
        if progress:
            progress(row.name, row.num_bytes)
    return problems


def check_configuration(config: SourceConfig, manifest: Manifest, root: str) -> list[str]:
    """Whether a source's manifest is of the shards and settings that the recipe names now; one line for each thing."""
    try:
        names = expand(config, root)
    except UserError as error:
        return [str(error)]
    known = {row.name for row in manifest.shards}
    problems = []
    if new := [name for name in names if name not in known]:
        problems.append(f"{config.name}: {len(new)} shards are not in the index, such as {new[0]}")
    if gone := known.difference(names):
        problems.append(f"{config.name}: {len(gone)} shards of the index are no longer named, such as {min(gone)}")
    if manifest.eligibility != eligibility(config):
        problems.append(f"{config.name}: the index was made under other fields or filters")
    return problems


def _check_shard(row: ShardRow, *, storage: Storage, directory: IndexDirectory, quick: bool) -> list[str]:
    try:
        stat = storage.stat(row.name)
    except UserError as error:
        return [_reason(error)]
    if stat.num_bytes != row.num_bytes:
        return [f"{stat.num_bytes} bytes; {row.num_bytes} when it was indexed"]
    index = ShardIndex.load(directory.shard(row.name))
    if index is None or index.checksum != row.checksum:
        return [f"its index {directory.shard(row.name)} is missing, damaged or of another version"]
    damage = [f"damaged: {row.damage}"] if row.damage else []
    if quick:
        return damage
    try:
        now = index_shard(row.name, storage)
    except (UserError, OutageError) as error:
        return [_reason(error)]
    if now.checksum != row.checksum:
        return [f"its bytes have changed (checksum {now.checksum}; {row.checksum} when it was indexed)"]
    same = (now.extensions, now.nsfw_values, len(now)) == (index.extensions, index.nsfw_values, row.samples) and all(
        name in index.columns and column.tobytes() == index.columns[name].tobytes()
        for name, column in now.columns.items()
    )
    return [*([] if same else ["its index does not fit its bytes"]), *damage]


def _reason(error: Exception) -> str:
    """What is wrong with a shard, without its name before and the advice after."""
    return str(error).partition(": ")[2].partition("; needed")[0]


def _stated(manifest: Manifest, storage: Storage) -> dict[str, tuple[int, str]]:
    """What files beside local shards say of their counts, by shard name."""
    stated: dict[str, tuple[int, str]] = {}
    beside: dict[Path, dict[str, tuple[int, str]]] = {}
    for row in manifest.shards:
        location = storage.location(row.name)
        if is_url(location):
            continue
        path = Path(location)
        if path.parent not in beside:
            beside[path.parent] = expected_counts(path.parent)
        if path.name in beside[path.parent]:
            stated[row.name] = beside[path.parent][path.name]
    return stated
