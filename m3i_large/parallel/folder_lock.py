"""One run at a time in a folder: on NVMe DeepSpeed's files have the same names in every run."""

import fcntl
from pathlib import Path
from typing import IO

from m3i_large.errors import UserError


def lock_folder(folder: Path, *, rank: int) -> IO[str]:
    """Takes a rank's place in `folder`, which is made if need be, for as long as the returned file stays open.

    The kernel gives it back when the process ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"rank{rank}.lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"--ds: offload_optimizer.nvme_path: {folder} is in use by another run, whose states would be overwritten; "
            "needed: a folder for this run alone"
        ) from None
    return file
