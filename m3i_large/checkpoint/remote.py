"""Copies of checkpoints elsewhere: a path or any URL that fsspec opens (s3, gs and az through obstore).

A copy is complete when it has its manifest, which is sent last and, before a copy is overwritten or removed, goes
first. Nothing relies on renaming, which object stores lack; checksums are compared after fetching.
"""

import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec

from m3i_large.checkpoint.directory import (
    MANIFEST,
    complete_checkpoints,
    expired,
    into_place,
    step_directory,
    step_of,
    sync,
    temporary_directory,
)
from m3i_large.checkpoint.report import Report, brief, drain
from m3i_large.errors import OutageError, UserError

OBJECT_STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
TRIES, FIRST_DELAY_S = 4, 1.0


def redacted(url: str) -> str:
    """A URL without what may be secret in it: a password and the query."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    secret, at, host = parts.netloc.rpartition("@")
    user = secret.partition(":")[0] + ":***" if ":" in secret else secret
    return urlunsplit((parts.scheme, user + at + host, parts.path, "***" if parts.query else "", ""))


class Remote:
    """The checkpoints at one place.

    Args:
        url: directory or URL; credentials come from the environment.
    """

    def __init__(self, url: str) -> None:
        self.name, self._url = redacted(url), url
        self._fs, path = _open(url)
        self._root = path.rstrip("/")

    def __repr__(self) -> str:
        return f"Remote({self.name!r})"

    def reason(self, error: Exception) -> str:
        """What went wrong in one line, without secrets."""
        secrets = [self._url, urlsplit(self._url).query, urlsplit(self._url).password or ""]
        text = brief(error).replace(self._url, self.name)
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return text

    def steps(self) -> list[int]:
        """Steps of the complete copies, in order."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in found]
        steps = sorted(int(name[len("step_") :]) for name in names if re.fullmatch(r"step_\d+", name))
        return [step for step in steps if self._fs.exists(self._file(step, MANIFEST))]

    def mirror(self, directory: Path) -> None:
        """Copies a complete checkpoint there, unless the same is there already."""
        step, manifest = step_of(directory), (directory / MANIFEST).read_bytes()
        if self._fs.exists(self._file(step, MANIFEST)) and self._fs.cat_file(self._file(step, MANIFEST)) == manifest:
            return
        self._fs.makedirs(self._path(step), exist_ok=True)
        self._forget(step)
        for name in (*json.loads(manifest)["files"], MANIFEST):
            self._fs.put_file(str(directory / name), self._file(step, name))

    def fetch(self, step: int, root: Path) -> Path:
        """Copies a checkpoint from there into `root` and lets `latest` name it."""
        temporary = temporary_directory(root, step, "fetch")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self._get(step, MANIFEST, temporary)
        for name in _file_names(temporary / MANIFEST):
            self._get(step, name, temporary)
        final = step_directory(root, step)
        into_place(temporary, final)
        return final

    def remove(self, step: int) -> None:
        """Removes a copy."""
        self._forget(step)
        for path in self._fs.find(self._path(step)):
            self._fs.rm_file(path)
        with suppress(OSError, NotImplementedError):  # object stores have no directories
            self._fs.rmdir(self._path(step))

    def _get(self, step: int, name: str, directory: Path) -> None:
        try:
            self._fs.get_file(self._file(step, name), str(directory / name))
        except FileNotFoundError:
            return  # left to the check of what was fetched, which names it
        sync(directory / name)

    def _forget(self, step: int) -> None:
        if self._fs.exists(self._file(step, MANIFEST)):
            self._fs.rm_file(self._file(step, MANIFEST))

    def _path(self, step: int) -> str:
        return f"{self._root}/{step_directory(Path(), step).name}"

    def _file(self, step: int, name: str) -> str:
        return f"{self._path(step)}/{name}"


class Copier:
    """Keeps a remote place like the newest local checkpoints, on a thread of its own.

    Args:
        root: the run's `checkpoints` directory.
        remote: where copies go.
        keep: retention there, as for the local ones.
        keep_every: the same.
        first_delay_s: pause before the second of TRIES tries, seconds; it doubles.
    """

    def __init__(
        self,
        root: Path,
        remote: Remote,
        *,
        keep: int,
        keep_every: int | None = None,
        first_delay_s: float = FIRST_DELAY_S,
    ) -> None:
        self._root, self._remote, self._keep, self._keep_every = root, remote, keep, keep_every
        self._first_delay_s = first_delay_s
        self._reports: deque[Report] = deque()
        self._lock = threading.Lock()
        self._busy: Path | None = None
        self._wake, self._news, self._hurry = threading.Event(), threading.Event(), threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="checkpoint-copy", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """A checkpoint is complete."""
        self._news.set()
        self._wake.set()

    def poll(self) -> list[Report]:
        """What has gone wrong since the last call."""
        return drain(self._reports)

    @contextmanager
    def not_copying(self, directory: Path) -> Iterator[bool]:
        """Whether a local checkpoint is not being copied; it will not be while the context lasts."""
        with self._lock:
            yield directory != self._busy

    def close(self, *, wait_s: float | None) -> None:
        """Ends the thread after everything complete was copied or given up, but waits no longer than `wait_s`."""
        self._closing = True
        self._wake.set()
        self._thread.join(wait_s)
        self._hurry.set()
        if self._thread.is_alive() and self._busy:
            self._report(step_of(self._busy), "not finished when the run ended; the next start goes on with it")

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing
            if self._news.is_set():
                self._news.clear()
                self._copy_newest()

    def _copy_newest(self) -> None:
        for directory in reversed(complete_checkpoints(self._root)[-self._keep :]):
            if not self._hurry.is_set():
                self._copy(directory)

    def _copy(self, directory: Path) -> None:
        with self._lock:
            if not (directory / MANIFEST).is_file():
                return  # expired meanwhile
            self._busy = directory
        try:
            if self._patiently(step_of(directory), lambda: self._remote.mirror(directory)):
                self._patiently(step_of(directory), self._expire)
        finally:
            with self._lock:
                self._busy = None

    def _expire(self) -> None:
        steps = self._remote.steps()
        newest_step = max(steps, default=0)
        for step in expired(steps, newest_step=newest_step, keep=self._keep, keep_every=self._keep_every):
            self._remote.remove(step)

    def _patiently(self, step: int, call: Callable[[], None]) -> bool:
        """Calls until it works, TRIES times; a failure is reported, for training does not depend on the copy."""
        delay = self._first_delay_s
        for tries in range(1, TRIES + 1):
            try:
                call()
                return True
            except Exception as error:  # each storage has errors of its own
                if tries == TRIES or self._hurry.wait(delay):
                    self._report(step, f"{self._remote.reason(error)} ({tries} tries)")
                    break
            delay *= 2
        return False

    def _report(self, step: int, reason: str) -> None:
        self._reports.append(Report.incident(step, what="checkpoint_copy", path=self._remote.name, reason=reason))


def _file_names(manifest: Path) -> list[str]:
    """Names of a manifest's files; none where it cannot be read, which the check of what was fetched will say."""
    try:
        names = list(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if re.fullmatch(r"[\w.-]+", name)]


def _open(url: str) -> tuple[Any, str]:
    """A file system and the path in it."""
    scheme = urlsplit(url).scheme
    if scheme not in OBJECT_STORES:
        try:
            return fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint copy: {redacted(url)}: {brief(error)}; needed: a path or URL") from None
    try:
        from obstore.fsspec import FsspecStore
    except ImportError:
        raise UserError(
            f"checkpoint copy: {redacted(url)} needs obstore; needed: pip install 'm3i_large[remote]'"
        ) from None
    store: Any = FsspecStore
    return store(scheme), url.partition("://")[2]


def fetch_newest(remote: Remote, root: Path, *, below: int | None) -> Path | None:
    """Fetches the newest complete copy, or the newest before step `below`; None where there is none.

    Raises:
        OutageError: the place cannot be read. A run that should be continued must not begin anew for that.
    """
    try:
        steps = [step for step in remote.steps() if below is None or step < below]
        return remote.fetch(steps[-1], root) if steps else None
    except Exception as error:  # each storage has errors of its own
        raise OutageError(f"checkpoint copy: {remote.name} cannot be read: {remote.reason(error)}") from None
