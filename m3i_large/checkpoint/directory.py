"""What lies in a run's `checkpoints` directory, and the moves by which it changes: a crash leaves the old or the new.

step_00000400/                        complete, as it carries a manifest under its final name
latest                                text file: the name of the newest one
.step_00000400.<token>.tmp/           being written, fetched or removed; rubbish after a crash
.step_00000400.replaced/              stood under the final name before; the answer if nothing does after a crash
damaged_step_00000400/                did not agree with its checksums; set aside, never removed
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from m3i_large.errors import UserError

MANIFEST, LATEST = "manifest.json", "latest"
REPLACED = ".replaced"


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` applied or skipped optimizer steps lies."""
    return root / f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(directory.name.rpartition("_")[2])


def temporary_directory(root: Path, step: int, token: str) -> Path:
    """Where a checkpoint is put together; the token keeps attempts and saves of the same step apart."""
    return root / f".{step_directory(root, step).name}.{token}.tmp"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` is, or the newest one of the run directory that it is; else UserError."""
    if (path / MANIFEST).is_file():
        return path
    if (found := newest(path / "checkpoints")) is not None:
        return found
    raise UserError(f"checkpoint: got {path}; needed: a run directory with a checkpoint, or a checkpoint directory")


def step_directories(root: Path) -> list[Path]:
    """Directories that have a checkpoint's name, complete or not, oldest step first."""
    return sorted((p for p in root.glob("step_*") if p.name[len("step_") :].isdigit()), key=step_of)


def complete_checkpoints(root: Path) -> list[Path]:
    """Directories under `root` that carry a manifest, oldest step first."""
    return [p for p in step_directories(root) if (p / MANIFEST).is_file()]


def named_latest(root: Path) -> Path | None:
    """The complete checkpoint that `latest` names, if any."""
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    return root / name if name and (root / name / MANIFEST).is_file() else None


def newest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest complete one where that is missing; None without any."""
    if (named := named_latest(root)) is not None:
        return named
    found = complete_checkpoints(root)
    return found[-1] if found else None


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """A small file that is there whole, and on the disk, or not at all; the directory is not synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def point_latest(root: Path, directory: Path) -> None:
    """Makes `latest` name a checkpoint."""
    write_whole(root / LATEST, directory.name + "\n")
    sync(root)


def into_place(temporary: Path, final: Path) -> None:
    """Gives a directory that is whole its final name, then lets `latest` name it.

    A checkpoint of the same step can be there from before a restart further back; it stays until the new one stands.
    """
    root = final.parent
    replaced = root / f".{final.name}{REPLACED}"
    sync(temporary)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync(root)
    point_latest(root, final)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(directory: Path, token: str) -> None:
    """Removes a checkpoint; its name goes first, so that a crash leaves no part of it under that name."""
    doomed = temporary_directory(directory.parent, step_of(directory), token)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(directory: Path) -> Path:
    """Renames a damaged checkpoint so that nothing takes it for one; returns where it lies."""
    root, number = directory.parent, 1
    while (aside := root / (f"damaged_{directory.name}" + (f"_{number}" if number > 1 else ""))).exists():
        number += 1
    os.rename(directory, aside)
    sync(root)
    return aside


def damaged_checkpoints(root: Path) -> list[Path]:
    """What was set aside."""
    return sorted(root.glob("damaged_step_*"))


def clean(root: Path) -> None:
    """Puts right what a crash left behind; only while nothing is being saved here."""
    for replaced in root.glob(f".step_*{REPLACED}"):
        final = root / replaced.name.removeprefix(".").removesuffix(REPLACED)
        if not final.exists():
            os.rename(replaced, final)
    for rubbish in (*root.glob(".step_*.tmp"), *root.glob(f".step_*{REPLACED}")):
        shutil.rmtree(rubbish, ignore_errors=True)
    (root / f".{LATEST}.tmp").unlink(missing_ok=True)


def expired(steps: Iterable[int], *, newest_step: int, keep: int, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints retention removes.

    Args:
        newest_step: the one just saved. Later ones are of a course that was given up; they stay until overwritten.
        keep: how many stay, `newest_step` included.
        keep_every: multiples of this stay for good.
    """
    counted = sorted(step for step in steps if step <= newest_step)
    return [step for step in counted[:-keep] if not (keep_every and step % keep_every == 0)]
