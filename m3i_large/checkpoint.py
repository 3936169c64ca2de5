"""Checkpoints: named tensors in safetensors slices plus one manifest; any world size and ZeRO stage can load them.

`checkpoints/step_00000400/` holds one file per rank and `manifest.json` (shapes, dtypes, slice offsets, sha256 of every
file, step, ...). A save is written under a temporary name, fsynced, hashed and renamed; the text file `latest` is moved
last. A directory with a manifest under its final name is therefore complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3i_large.errors import UserError
from m3i_large.metrics import write_json
from m3i_large.parallel.comm import Rank, barrier, gather_objects
from m3i_large.parallel.state import State

FORMAT_VERSION = 1
MANIFEST, LATEST = "manifest.json", "latest"


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` applied or skipped optimizer steps lies."""
    return root / f"step_{step:08d}"


def save(root: Path, *, step: int, state: State, manifest: Mapping[str, Any], rank: Rank, keep: int) -> Path:
    """Writes one checkpoint; every rank calls it with its slices. Returns the final directory.

    Args:
        root: the run's `checkpoints` directory.
        state: this rank's slices (`master/...`, `exp_avg/...`, `exp_avg_sq/...`, `ema/...`, `buffer/...`).
        manifest: what else to record (step count, sampler, recipe, ...); must be JSON.
        keep: how many complete checkpoints stay; older ones are removed after the new one is in place.
    """
    final = step_directory(root, step)
    temporary = root / f".{final.name}.tmp"
    if rank.is_first:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    barrier()
    name = f"rank_{rank.rank:05d}_of_{rank.world:05d}.safetensors"
    # Slices are views into DeepSpeed's flat buffers; safetensors wants tensors that own their memory.
    values = {
        k: s.values.detach().cpu().clone() for group in state.groups() for k, s in group.items() if s.values.numel()
    }
    save_file(values, temporary / name)
    _fsync(temporary / name)
    entries = {
        k: {
            "shape": list(s.shape),
            "dtype": str(s.dtype).removeprefix("torch."),
            "offset": s.offset,
            "numel": s.numel,
        }
        for k, s in state.layout().items()
    }
    parts = gather_objects((name, sha256(temporary / name), entries), rank)
    if rank.is_first:
        tensors = _merge(parts)
        files = {file: {"sha256": digest} for file, digest, _ in parts}
        body = {"format_version": FORMAT_VERSION, "step": step, **manifest, "files": files, "tensors": tensors}
        write_json(temporary / MANIFEST, body)
        _fsync(temporary / MANIFEST)
        # A directory of the same step can exist when an earlier attempt got further before it was resumed from before.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _fsync(root)
        _point_latest(root, final.name)
        for old in complete_checkpoints(root)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def _merge(parts: list[tuple[str, str, dict[str, dict[str, Any]]]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file, _, entries in parts:
        for key, entry in entries.items():
            tensor = tensors.setdefault(key, {"shape": entry["shape"], "dtype": entry["dtype"], "slices": []})
            if entry["numel"]:
                tensor["slices"].append([file, entry["offset"], entry["numel"]])
    return tensors


def _point_latest(root: Path, name: str) -> None:
    temporary = root / f".{LATEST}.tmp"
    temporary.write_text(name + "\n", encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, root / LATEST)
    _fsync(root)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_checkpoints(root: Path) -> list[Path]:
    """Directories under `root` that carry a manifest, oldest step first."""
    return sorted(p for p in root.glob("step_*") if (p / MANIFEST).is_file())


def newest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest complete one where that is missing; None without any."""
    pointer = root / LATEST
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8").strip()
        if (named / MANIFEST).is_file():
            return named
    found = complete_checkpoints(root)
    return found[-1] if found else None


class Checkpoint:
    """Reads one checkpoint directory.

    Args:
        directory: one that holds manifest.json.
        verify: compare every file with its sha256 first.

    Raises:
        UserError: no checkpoint, an unknown format, or a file that is missing or differs from its checksum.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        if not (directory / MANIFEST).is_file():
            raise UserError(
                f"checkpoint: got {directory}, which holds no {MANIFEST}; needed: a directory step_NNNNNNNN"
            )
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"checkpoint: {directory} has format {self.manifest.get('format_version')}; needed: {FORMAT_VERSION}"
            )
        self._files: dict[str, Any] = {}
        for name, entry in self.manifest["files"].items():
            path = directory / name
            if not path.is_file() or (verify and sha256(path) != entry["sha256"]):
                raise UserError(f"checkpoint: {path} is missing or damaged (its sha256 differs from {MANIFEST})")

    @property
    def step(self) -> int:
        """The step to continue with."""
        return int(self.manifest["step"])

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the stored tensors that start with `prefix`."""
        return [key for key in self.manifest["tensors"] if key.startswith(prefix)]

    def read(self, key: str, *, offset: int = 0, numel: int | None = None) -> Tensor:
        """Elements [offset, offset + numel) of the flattened tensor `key`, put together from the ranks' slices."""
        entry = self.manifest["tensors"][key]
        total = 1
        for size in entry["shape"]:
            total *= size
        numel = total - offset if numel is None else numel
        out = torch.empty(numel, dtype=getattr(torch, entry["dtype"]))
        filled = 0
        for file, start, length in entry["slices"]:
            low, high = max(offset, start), min(offset + numel, start + length)
            if low < high:
                out[low - offset : high - offset] = self._open(file).get_slice(key)[low - start : high - start]
                filled += high - low
        if filled != numel:
            raise UserError(f"checkpoint: {self.directory} holds {filled} of {numel} elements of {key}")
        return out

    def read_full(self, key: str) -> Tensor:
        """The whole tensor in its shape."""
        return self.read(key).reshape(self.manifest["tensors"][key]["shape"])

    def restore(self, state: State) -> None:
        """Fills a rank's slices in place; refuses a checkpoint of another model before writing anything."""
        stored, layout = self.manifest["tensors"], state.layout()
        if missing := sorted(layout.keys() ^ stored.keys()):
            raise UserError(
                f"checkpoint: {self.directory} is of another model: {len(missing)} tensors differ, first {missing[0]}"
            )
        for key, piece in layout.items():
            if list(piece.shape) != stored[key]["shape"]:
                got, need = stored[key]["shape"], list(piece.shape)
                raise UserError(
                    f"checkpoint: {self.directory} is of another model: {key} has shape {got}, needed {need}"
                )
        for group in state.groups(write=True):
            for key, part in group.items():
                part.values.copy_(self.read(key, offset=part.offset, numel=part.values.numel()))

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(str(self.directory / name), framework="pt")
        return self._files[name]
