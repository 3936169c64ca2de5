"""DeepSpeed's defects that this project works around are still there: where one is gone, a workaround can go."""

import subprocess
import sys

import pytest
from patience import PATIENCE_S
from tiny import ROOT, environment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("universal_checkpoint_groups", 1),
        ("universal_checkpoint_frozen", 1),
        ("leaf_module", 1),
        ("leaf_entered_twice", 1),
        ("nan_stays", 1),
        ("skipped_step", 0),
    ],
)
def test_a_script_says_what_docs_say_of_it(script: str, status: int) -> None:
    path = ROOT / "docs/deepspeed_defects" / f"{script}.py"
    ended = subprocess.run(
        [sys.executable, path], env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "deepspeed" in ended.stdout
