"""Saving: every rank writes its file and says so in a small one; the first rank puts the checkpoint together.

Nothing here is a collective, as most of it runs on a thread beside the training: ranks meet in the file system. The
training thread is held while the state is copied aside (or, where memory has no room for that, written). A save that
fails is given up whole: the checkpoint before it stays the newest, training goes on, the next save tries again.
"""

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_large.checkpoint.directory import (
    MANIFEST,
    complete_checkpoints,
    expired,
    into_place,
    remove,
    step_directory,
    step_of,
    temporary_directory,
    write_whole,
)
from m3i_large.checkpoint.rank_file import FilePlan, check_space, plan_file, stream, write_file
from m3i_large.checkpoint.reader import FORMAT_VERSION
from m3i_large.checkpoint.remote import Copier
from m3i_large.checkpoint.report import Report, brief, drain
from m3i_large.checkpoint.staging import Staging
from m3i_large.errors import OutageError
from m3i_large.parallel.comm import Rank, gather_objects, local_ranks
from m3i_large.parallel.state import Layout, State

FIRST_LOOK_S, LONGEST_LOOK_S = 0.01, 1.0
LEAVING_S = 20.0


@dataclass(frozen=True)
class Job:
    """One save of one rank, without the state's values."""

    step: int
    token: str
    layout: Mapping[str, Layout]
    plan: FilePlan
    manifest: Mapping[str, Any]
    held_from: float


class CheckpointWriter:
    """Saves checkpoints into `root`; every rank has one and calls it at the same steps.

    Args:
        root: the run's `checkpoints` directory, shared by all ranks.
        attempt: number of this start; with the count of saves it names temporary directories.
        keep: how many complete checkpoints stay, the one just saved (which `latest` names) included.
        keep_every: multiples of this step stay for good.
        background: write while training goes on, where memory has room for a copy of the state.
        copier: takes complete checkpoints elsewhere; the first rank's is used.
        patience_s: how long the first rank waits for the others' files, seconds, before it gives a save up.
    """

    def __init__(
        self,
        root: Path,
        *,
        rank: Rank,
        attempt: int,
        keep: int,
        keep_every: int | None = None,
        background: bool = True,
        copier: Copier | None = None,
        patience_s: float = 600.0,
    ) -> None:
        self._root, self._rank, self._attempt = root, rank, attempt
        self._keep, self._keep_every, self._patience_s = keep, keep_every, patience_s
        self._staging = Staging(rank.device, local_ranks=local_ranks()) if background else None
        self._copier = copier if rank.is_first else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._saves, self._failure = 0, ""
        self._reports: deque[Report] = deque()
        self._leave_by = math.inf

    def save(self, step: int, *, state: State, manifest: Mapping[str, Any]) -> float:
        """Begins to save `state` as the checkpoint that continues with `step`; the state may change at once after it.

        Waits first for the save before it. Failures of the storage are no exceptions: `poll` and `finish` tell them.

        Args:
            manifest: what else to record (step count, sampler, recipe, ...); must be JSON.

        Returns:
            Seconds for which the caller was held.
        """
        began = time.perf_counter()
        self.wait()
        self._failure, self._saves = "", self._saves + 1
        layout = state.layout()
        job = Job(step, f"attempt_{self._attempt}_save_{self._saves}", layout, plan_file(layout), manifest, began)
        staged = self._staging is not None and self._staging.fits(job.plan)
        if staged:
            assert self._staging is not None
            data = [self._staging.fill(job.plan, state)]
            held = time.perf_counter() - began
            self._running = self._thread.submit(lambda: self._finish(job, self._write(job, data), held))
        else:
            sidecar = self._write(job, stream(job.plan, state))
            held = time.perf_counter() - began
            self._running = self._thread.submit(self._finish, job, sidecar, held)
        return held

    def poll(self) -> list[Report]:
        """What has happened since the last call: complete saves, failed ones, failed copies. Empty but on the first
        rank."""
        if self._running is not None and self._running.done():
            self.wait()
        return drain(self._reports) + (self._copier.poll() if self._copier else [])

    def wait(self) -> None:
        """Waits until the running save is complete or given up, on this rank."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def finish(self) -> str:
        """Ends the saving; every rank calls it. `poll` can be asked afterwards.

        Returns:
            Why the last save failed, empty if it is complete; the same on every rank.
        """
        self.wait()
        self._thread.shutdown()
        return next((reason for reason in gather_objects(self._failure, self._rank) if reason), "")

    def finish_copies(self, *, wait_s: float | None) -> list[Report]:
        """Ends the copying elsewhere; the first rank waits, so nothing collective may wait for it.

        Args:
            wait_s: how long at most, seconds; None: until the copies are there or given up.

        Returns:
            What went wrong with them.
        """
        if self._copier is None:
            return []
        self._copier.close(wait_s=wait_s)
        return self._copier.poll()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: object) -> None:
        # After an exception the save before it still deserves to be completed, but ranks that died must not be awaited.
        self._leave_by = time.monotonic() + LEAVING_S
        self._thread.shutdown()
        if self._copier:
            self._copier.close(wait_s=0)

    # -- every rank -------------------------------------------------------------------------------------------------

    def _write(self, job: Job, data: Iterable[memoryview]) -> dict[str, Any]:
        """Writes this rank's file; what its sidecar says: the file and its slices, or why there is none."""
        temporary, name = temporary_directory(self._root, job.step, job.token), self._file_name()
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            # Ranks hold about the same; theirs count, as a save of which one file is missing is none.
            check_space(temporary, needed=job.plan.num_bytes * self._rank.world)
            digest = write_file(temporary / name, job.plan, data)
        except OSError as error:
            with suppress(OSError):
                (temporary / name).unlink()  # makes room for the sidecar
            return {"failed": f"rank {self._rank.rank}: {brief(error)}"}
        return {"file": name, "bytes": job.plan.num_bytes, "sha256": digest, "tensors": _entries(job.layout)}

    def _file_name(self) -> str:
        return f"rank_{self._rank.rank:05d}_of_{self._rank.world:05d}.safetensors"

    def _finish(self, job: Job, sidecar: dict[str, Any], held: float) -> None:
        """Tells the first rank; there, puts the checkpoint together."""
        temporary = temporary_directory(self._root, job.step, job.token)
        self._failure = sidecar.get("failed", "")
        if self._rank.is_first:
            return self._conclude(job, temporary, sidecar, held)
        try:
            write_whole(_sidecar(temporary, self._rank.rank), json.dumps(sidecar))
        except OSError as error:
            # The first rank has given up and removed the directory, or it will, having waited in vain.
            self._failure = self._failure or f"rank {self._rank.rank}: {brief(error)}"

    # -- the first rank ---------------------------------------------------------------------------------------------

    def _conclude(self, job: Job, temporary: Path, own: dict[str, Any], held: float) -> None:
        try:
            parts = [own, *self._collect(temporary)]
            if reason := next((part["failed"] for part in parts if "failed" in part), ""):
                raise OutageError(reason)
            num_bytes = self._publish(job, temporary, parts)
        except (OSError, OutageError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self._failure = self._failure or brief(error)
            self._reports.append(Report.incident(job.step, what="checkpoint", reason=self._failure))
            return
        seconds = time.perf_counter() - job.held_from
        self._reports.append(Report("save", job.step, {"bytes": num_bytes, "held_s": held, "seconds": seconds}))
        if self._copier:
            self._copier.notify()
        try:
            self._expire(job)
        except OSError as error:
            reason = f"old ones cannot be removed: {brief(error)}"
            self._reports.append(Report.incident(job.step, what="checkpoint", reason=reason))

    def _collect(self, temporary: Path) -> list[dict[str, Any]]:
        """The other ranks' sidecars, in rank order; waits for all, failed or not, so that nobody still writes."""
        deadline, pause = time.monotonic() + self._patience_s, FIRST_LOOK_S
        missing = set(range(1, self._rank.world))
        while missing := {rank for rank in missing if not _sidecar(temporary, rank).exists()}:
            if time.monotonic() > min(deadline, self._leave_by):
                raise OutageError(
                    self._failure or f"rank {min(missing)} has not written its part in {self._patience_s:.0f} s"
                )
            time.sleep(pause)
            pause = min(LONGEST_LOOK_S, 2 * pause)
        sidecars = [_sidecar(temporary, rank) for rank in range(1, self._rank.world)]
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in sidecars]
        for path in sidecars:
            path.unlink()
        return parts

    def _publish(self, job: Job, temporary: Path, parts: list[dict[str, Any]]) -> int:
        files = {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts}
        num_bytes = sum(part["bytes"] for part in parts)
        body = {
            "format_version": FORMAT_VERSION,
            "step": job.step,
            **job.manifest,
            "bytes": num_bytes,
            "files": files,
            "tensors": _merge(parts),
        }
        write_whole(temporary / MANIFEST, json.dumps(body, indent=1) + "\n")
        into_place(temporary, step_directory(self._root, job.step))
        return num_bytes

    def _expire(self, job: Job) -> None:
        complete = {step_of(path): path for path in complete_checkpoints(self._root)}
        for step in expired(complete, newest_step=job.step, keep=self._keep, keep_every=self._keep_every):
            if self._copier is None:
                remove(complete[step], job.token)
                continue
            with self._copier.not_copying(complete[step]) as idle:
                if idle:
                    remove(complete[step], job.token)


def save(root: Path, *, step: int, state: State, manifest: Mapping[str, Any], rank: Rank, keep: int) -> Path:
    """Writes one checkpoint and waits for it; every rank calls it. Returns its directory.

    Raises:
        OutageError: it could not be written.
    """
    with CheckpointWriter(root, rank=rank, attempt=0, keep=keep, background=False) as writer:
        writer.save(step, state=state, manifest=manifest)
        if reason := writer.finish():
            raise OutageError(f"checkpoint: step {step} could not be saved in {root}: {reason}")
    return step_directory(root, step)


def _sidecar(temporary: Path, rank: int) -> Path:
    return temporary / f"rank_{rank:05d}.json"


def _entries(layout: Mapping[str, Layout]) -> dict[str, list[Any]]:
    return {k: [list(s.shape), str(s.dtype).removeprefix("torch."), s.offset, s.numel] for k, s in layout.items()}


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for part in parts:
        for key, (shape, dtype, offset, numel) in part["tensors"].items():
            tensor = tensors.setdefault(key, {"shape": shape, "dtype": dtype, "slices": []})
            if numel:
                tensor["slices"].append([part["file"], offset, numel])
    return tensors
