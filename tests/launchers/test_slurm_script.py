"""launchers/slurm/pretrain.sbatch with stand-ins for srun and scontrol: what it does after which end."""

import os
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

SCRIPT = ROOT / "launchers/slurm/pretrain.sbatch"


@pytest.fixture
def job(tmp_path: Path):
    """Runs the script with an srun that ends with a status; returns its status and what srun and scontrol were told."""
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("")
    show = '[ "$1" = show ] && { printf "n7\\nn8\\n"; exit; }\n'
    for name, first, last in (
        ("srun", 'echo "$MASTER_ADDR $MASTER_PORT" >>"$TOLD"\n', 'exit "$STATUS"\n'),
        ("scontrol", show, ""),
    ):
        path = programs / name
        path.write_text(f'#!/bin/sh\n{first}echo "{name} $*" >>"$TOLD"\n{last}')
        path.chmod(0o755)

    def run(status: int, **more: str) -> tuple[int, list[str]]:
        told.write_text("")
        variables = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "TOLD": str(told),
            "STATUS": str(status),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NAME": "m3i",
            "SLURM_JOB_USER": "someone",
            "SLURM_JOB_NODELIST": "n[7-8]",
            "M3I_OUT": str(tmp_path / "run"),
            "M3I_VENV": str(tmp_path / "venv"),
        }
        command = ["bash", str(SCRIPT), "--ds", "ds_configs/zero3.json", "data.root=/a path"]
        done = subprocess.run(command, env=variables | more, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, told.read_text().splitlines()

    return run


def test_ranks_are_started_directly_and_meet_on_the_first_machine(job) -> None:
    status, told = job(0)
    assert status == 0 and told[0] == "n7 22345"
    assert told[1].startswith("srun --kill-on-bad-exit=0 --wait=60 python launchers/pretrain.py --out ")
    assert told[1].endswith("--ds ds_configs/zero3.json data.root=/a path") and len(told) == 2
    assert job(0, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")[1][0] == "10.0.0.1 29500"


def test_an_image_goes_around_python(job) -> None:
    (line,) = (line for line in job(0, M3I_IMAGE="m3i.sif")[1] if line.startswith("srun"))
    assert " apptainer exec --nv --bind " in line and " m3i.sif python launchers/pretrain.py --out " in line


def test_what_can_go_on_is_queued_again_and_a_mistake_is_not(job) -> None:
    requeue = "scontrol requeue 12345"
    assert requeue in job(75)[1] and requeue in job(75, SLURM_RESTART_COUNT="99")[1]
    assert job(2) == (2, job(2)[1]) and requeue not in job(2)[1]
    assert requeue in job(137)[1] and requeue in job(1, SLURM_RESTART_COUNT="4")[1]
    status, told = job(137, SLURM_RESTART_COUNT="5")
    assert status == 137 and requeue not in told
    assert requeue not in job(1, SLURM_RESTART_COUNT="2", M3I_CRASHES="2")[1]


def test_a_run_that_finished_is_no_crash(job, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/exit.json").write_text('{"outcome": "finished", "step": 7}')
    status, told = job(134)  # an abort while the process group is torn down
    assert status == 0 and not any(line.startswith("scontrol") for line in told)


def test_the_warning_goes_to_the_ranks_and_logs_are_kept() -> None:
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)  # B: would warn the script alone
    assert os.access(SCRIPT, os.R_OK) and len(SCRIPT.read_text().splitlines()) <= 70
