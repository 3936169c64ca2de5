"""Reading a checkpoint at any world size, and finding out what is wrong with one."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from m3i_large.checkpoint.directory import MANIFEST
from m3i_large.errors import UserError
from m3i_large.parallel.state import State

FORMAT_VERSION = 1


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(directory: Path, *, part: int = 0, parts: int = 1) -> str:
    """Why a checkpoint must not be used, in a few words; empty where nothing is wrong.

    Args:
        part: which share of the files is compared with its checksums, of `parts` shares that cover all of them. What
            costs no reading (the manifest, sizes) is looked at in every share.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            return ""  # another release's, and not damaged: Checkpoint refuses it
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in sorted(manifest["files"].items())}
        if not isinstance(manifest["tensors"], dict) or int(manifest["step"]) < 0:
            return f"{MANIFEST} cannot be read"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (num_bytes, _) in files.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if (got := (directory / name).stat().st_size) != num_bytes:
            return f"{name} has {got} bytes, {MANIFEST} says {num_bytes}"
    for name in list(files)[part::parts]:
        try:
            if sha256(directory / name) != files[name][1]:
                return f"{name} differs from its checksum"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


class Checkpoint:
    """Reads one checkpoint directory.

    Args:
        directory: one that holds manifest.json.
        verify: compare every file with its sha256 first.

    Raises:
        UserError: no checkpoint, an unknown format, or a damaged one.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        if not (directory / MANIFEST).is_file():
            raise UserError(
                f"checkpoint: got {directory}, which holds no {MANIFEST}; needed: a directory step_NNNNNNNN"
            )
        if verify and (reason := damage(directory)):
            raise UserError(f"checkpoint: {directory} is damaged: {reason}; needed: an intact one")
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"checkpoint: {directory} has format {self.manifest.get('format_version')}; needed: {FORMAT_VERSION}"
            )
        self._files: dict[str, Any] = {}

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
        numel = math.prod(entry["shape"]) - offset if numel is None else numel
        out = torch.empty(numel, dtype=getattr(torch, entry["dtype"]))
        position, end = offset, offset + numel
        # Slices may overlap: buffers are whole on every rank.
        for file, start, length in sorted(entry["slices"], key=lambda piece: piece[1]):
            high = min(end, start + length)
            if start <= position < high:
                out[position - offset : high - offset] = self._open(file).get_slice(key)[
                    position - start : high - start
                ]
                position = high
        if position != end:
            raise UserError(f"checkpoint: {self.directory} holds {position - offset} of {numel} elements of {key}")
        return out

    def read_full(self, key: str) -> Tensor:
        """The whole tensor in its shape."""
        return self.read(key).reshape(self.manifest["tensors"][key]["shape"])

    def release(self) -> None:
        """Closes the files: they are mapped, so what was read of them stays resident otherwise."""
        self._files.clear()

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
            self.release()

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(str(self.directory / name), framework="pt")
        return self._files[name]
