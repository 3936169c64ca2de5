"""Checkpoints: named tensors in safetensors slices plus one manifest; any world size and ZeRO stage can load them.

`checkpoints/step_00000400/` holds one file per rank and `manifest.json` (shapes, dtypes, slice offsets, sha256 of every
file, step, ...). A save is written under a temporary name, fsynced, hashed and renamed; the text file `latest` is moved
last. A directory with a manifest under its final name is therefore complete. docs/checkpoints.md has the format.

    rank_file   one rank's safetensors file, written and hashed in one pass
    staging     the copy of the state that is written while training goes on
    directory   names, and moves that a crash cannot tear
    writer      saves: each rank its file, the first rank the manifest
    reader      a checkpoint, and what is wrong with one
    resume      the newest checkpoint that is intact
    remote      copies elsewhere (fsspec)
"""

from m3i_large.checkpoint.directory import (
    LATEST,
    MANIFEST,
    complete_checkpoints,
    find_checkpoint,
    newest,
    step_directory,
)
from m3i_large.checkpoint.reader import Checkpoint
from m3i_large.checkpoint.remote import Copier, Remote, redacted
from m3i_large.checkpoint.report import Report
from m3i_large.checkpoint.resume import newest_intact, verify
from m3i_large.checkpoint.writer import CheckpointWriter, save

__all__ = [
    "LATEST",
    "MANIFEST",
    "Checkpoint",
    "CheckpointWriter",
    "Copier",
    "Remote",
    "Report",
    "complete_checkpoints",
    "find_checkpoint",
    "newest",
    "newest_intact",
    "redacted",
    "save",
    "step_directory",
    "verify",
]
