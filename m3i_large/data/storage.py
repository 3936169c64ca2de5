"""Byte ranges of shards: local files, or anything obstore opens (http, https, s3, gs, az).

A read either returns the bytes asked for or raises: faults that pass are retried with back-off, a shard that is not the
one that was indexed is refused at once. Nothing here goes through a shell or downloads a whole shard.
"""

import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from m3i_large.errors import OutageError, UserError

OPEN_FILES = 64
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 30.0
# Faults that no waiting mends: obstore's exceptions by name, so that obstore is imported only where it is used.
PERMANENT = ("NotFoundError", "PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "NotSupportedError")
LOCAL_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
T = TypeVar("T")


@dataclass(frozen=True)
class ShardStat:
    """Size in bytes and a mark (modification time or ETag) that changes when the shard does."""

    num_bytes: int
    mark: str


class Storage:
    """Shards below a root directory or URL. Safe from any number of threads; a copy in another process opens its own.

    Args:
        root: directory or URL that relative shard names belong to.
        retry_s: how long an outage is ridden out, seconds, before OutageError.
    """

    def __init__(self, root: str | Path, *, retry_s: float = 300.0) -> None:
        self.root, self.retry_s = str(root), retry_s
        self.retries = 0
        self._open = lru_cache(maxsize=OPEN_FILES)(_File)
        self._store = lru_cache(maxsize=None)(_object_store)

    def __reduce__(self) -> tuple[Callable[..., "Storage"], tuple[Any, ...]]:
        return partial(Storage, self.root, retry_s=self.retry_s), ()

    def location(self, name: str) -> str:
        """Where a shard is: `name` itself if it is a URL or an absolute path, else below the root."""
        if is_url(name) or os.path.isabs(name):
            return name
        return f"{self.root.rstrip('/')}/{name}" if is_url(self.root) else os.path.join(self.root, name)

    def stat(self, name: str) -> ShardStat:
        """Size and mark of a shard; UserError where there is none or it may not be read."""
        where = self.location(name)
        try:
            return self._patiently(lambda: self._stat(where), where)
        except LOCAL_PERMANENT as error:
            raise UserError(f"shard {where}: {error.strerror or error}; needed: a tar file that can be read") from None

    def read(self, name: str, offset: int, size: int, *, mark: str | None = None) -> bytes:
        """The bytes [offset, offset + size) of a shard.

        Args:
            mark: of the shard when it was indexed; for objects, whose servers check it with every read.

        Raises:
            OutageError: the storage failed for `retry_s`, or the shard is not the indexed one: gone, shorter, changed.
        """
        where = self.location(name)
        try:
            return self._patiently(lambda: self._read(where, offset, size, mark), where)
        except LOCAL_PERMANENT as error:
            raise OutageError(
                f"shard {where}: {error.strerror or error}; it could be read when it was indexed"
            ) from None

    def _stat(self, where: str) -> ShardStat:
        if not is_url(where):
            found = os.stat(where)
            if not os.path.isfile(where):
                raise IsADirectoryError(0, "not a file")
            return ShardStat(found.st_size, f"{found.st_mtime_ns:x}")
        store, path = self._object(where)
        meta = _translated(lambda: store.head(path))
        return ShardStat(meta["size"], meta["e_tag"] or str(meta["last_modified"]))

    def _read(self, where: str, offset: int, size: int, mark: str | None) -> bytes:
        if size == 0:
            return b""
        data = self._read_object(where, offset, size, mark) if is_url(where) else self._read_file(where, offset, size)
        if len(data) < size:
            raise OutageError(
                f"shard {where}: the file ends: got {len(data)} bytes at byte {offset}; needed: {size}. It has changed "
                "since it was indexed; see m3i data check"
            )
        return data

    def _read_file(self, where: str, offset: int, size: int) -> bytes:
        try:
            # The file and not its number alone is held: a number that was closed meanwhile may be another shard's.
            file = self._open(where)
            data = os.pread(file.descriptor, size, offset)
            while len(data) < size:  # a signal or a network file system may cut a read short
                more = os.pread(file.descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return data
        except OSError:
            self._open.cache_clear()  # a stale handle stays stale
            raise

    def _read_object(self, where: str, offset: int, size: int, mark: str | None) -> bytes:
        store, path = self._object(where)
        options: dict[str, Any] = {"range": (offset, offset + size)}
        if mark and mark.startswith(('"', "W/")):
            options["if_match"] = mark
        return _translated(lambda: bytes(store.get(path, options=options).bytes()))

    def _object(self, where: str) -> tuple[Any, str]:
        parts = urlsplit(where)
        return self._store(f"{parts.scheme}://{parts.netloc}"), parts.path.lstrip("/")

    def _patiently(self, call: Callable[[], T], where: str) -> T:
        """Repeats `call` while it fails in a way that may pass; full jitter, so that ranks do not return together."""
        began, delay = time.monotonic(), FIRST_DELAY_S
        while True:
            try:
                return call()
            except LOCAL_PERMANENT:
                raise
            except OSError as error:
                waited = time.monotonic() - began
                if waited + delay > self.retry_s:
                    raise OutageError(
                        f"shard {where}: {_brief(error)}; gave up after {waited:.0f} s of retries (data.retry_s)"
                    ) from None
            self.retries += 1
            time.sleep(delay * (0.5 + random.random() / 2))
            delay = min(LONGEST_DELAY_S, 2 * delay)


def is_url(name: str) -> bool:
    """Whether `name` is a URL rather than a path."""
    return "://" in name


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and renames it: the file is whole or not there.

    The name is drawn, as process numbers repeat between the nodes that share a file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def relative_name(name: str) -> str:
    """A shard's name as a path that stays below whatever directory it is put in."""
    parts = name.replace("://", "/").split("/")
    return "/".join("__" if part == ".." else part for part in parts if part)


class _File:
    """A descriptor that closes with its last user: leaving the cache never cuts a read in another thread."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _object_store(base: str) -> Any:
    """An obstore store for a scheme and host; credentials come from the environment."""
    try:
        from obstore.store import from_url
    except ImportError:
        raise UserError(f"shards at {base} need obstore; needed: pip install 'm3i_large[remote]'") from None
    client: Any = {"allow_http": True, "timeout": "120s", "connect_timeout": "20s"}
    # Retries are ours: one policy and one count for local and remote storage, and short bodies are retried too.
    once: Any = {"max_retries": 0, "retry_timeout": timedelta(0)}
    return from_url(base, client_options=client, retry_config=once)


def _translated(call: Callable[[], T]) -> T:
    """Runs an obstore call; its faults become the OSErrors of local files, its verdict on the mark an OutageError."""
    try:
        return call()
    except Exception as error:
        kind = type(error).__name__
        if kind == "PreconditionError":
            raise OutageError(
                f"the shard has changed since it was indexed ({_brief(error)}); see m3i data check"
            ) from None
        if kind == "NotFoundError" or isinstance(error, FileNotFoundError):
            raise FileNotFoundError(0, "not found") from None
        if kind in PERMANENT:
            raise PermissionError(0, _brief(error)) from None
        if isinstance(error, OSError):
            raise
        raise OSError(_brief(error)) from None


def _brief(error: Exception) -> str:
    """The first line of a message; obstore's go on with a dump of the request."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
