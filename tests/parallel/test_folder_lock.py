"""A folder for offload to NVMe belongs to one run."""

import subprocess
import sys
from pathlib import Path

import pytest

from m3i_large.errors import UserError
from m3i_large.parallel.folder_lock import lock_folder

HOLD = """
import sys
from pathlib import Path
from m3i_large.parallel.folder_lock import lock_folder
held = lock_folder(Path(sys.argv[1]), rank=0)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "nvme"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"nvme_path: .*/nvme is in use by another run") as error:
            lock_folder(folder, rank=0)
        assert "\n" not in str(error.value)
        lock_folder(folder, rank=1).close()
        other.kill()
    lock_folder(folder, rank=0).close()
