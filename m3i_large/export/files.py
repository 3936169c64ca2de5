"""Writing files of tensors: whole or not there, never over another one."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_large.checkpoint.rank_file import DTYPES, as_bytes
from m3i_large.checkpoint.reader import sha256
from m3i_large.errors import UserError

CARD_SUFFIX = ".json"


@contextmanager
def whole(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when all went well.

    Raises:
        UserError: `path` exists and `force` is false, or its directory does not exist.
    """
    if path.exists() and not force:
        raise UserError(f"--out: {path} exists; needed: another name, or --force")
    if not path.parent.is_dir():
        raise UserError(f"--out: {path.parent} is no directory; needed: an existing one")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """A safetensors file, tensor by tensor: the library's own function holds every tensor twice."""
    # Larger elements first, as the library does: then all lie at multiples of their size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        x = tensors[name]
        end = position + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(as_bytes(tensors[name].reshape(-1)))
        file.flush()
        os.fsync(file.fileno())


def save_pth(path: Path, tensors: Mapping[str, Tensor], *, wrapper: str | None) -> None:
    """A file for torch.load with weights_only: plain tensors in a dict, or in one under `wrapper`."""
    plain = dict(tensors)
    torch.save(plain if wrapper is None else {wrapper: plain}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def card_path(path: Path) -> Path:
    """Where the model card of an exported file or directory lies."""
    return path / f"model_card{CARD_SUFFIX}" if path.is_dir() else path.with_name(path.name + CARD_SUFFIX)


def tensor_file(path: Path) -> Path:
    """The file with the tensors: the one itself, or a directory's."""
    return path / "model.safetensors" if path.is_dir() else path


def read_card(path: Path) -> dict[str, Any] | None:
    """The model card of an exported file; None where there is none. UserError where it cannot be read."""
    card = card_path(path)
    if not card.is_file():
        return None
    try:
        content = json.loads(card.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"layout", "sha256", "backbone"} <= content.keys():
        raise UserError(f"model card: {card} is none of ours; needed: the file that `m3i export` wrote, or none")
    return content


def check_sum(path: Path, card: Mapping[str, Any]) -> None:
    """UserError where a file is not the one that its card describes."""
    got = sha256(tensor_file(path))
    if got != card["sha256"]:
        raise UserError(
            f"{tensor_file(path)}: got sha256 {got[:12]}, its model card says {str(card['sha256'])[:12]}; "
            "needed: the file as it was exported"
        )
