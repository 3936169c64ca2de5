"""launchers/slurm/pretrain.sbatch with stand-ins for srun and scontrol: what it does after which end."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

SCRIPT = ROOT / "launchers/slurm/pretrain.sbatch"
REQUEUE = "scontrol requeue 12345"


@pytest.fixture
def job(tmp_path: Path):
    """Runs the script with an srun that ends with a status, after a rank has said SAID, if anything; returns its status
    and what srun and scontrol were told. The script's own lines are in `log`."""
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("")
    meet = 'echo "$MASTER_ADDR $MASTER_PORT" >>"$TOLD"\n'
    show = '[ "$1" = show ] && { printf "n7\\nn8\\n"; exit; }\n'
    for name, first, last in (
        ("srun", meet, '[ -z "${SAID:-}" ] || echo "$SAID" >"$M3I_MISTAKE"\nexit "$STATUS"\n'),
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
        (tmp_path / "log").write_text(done.stdout)
        assert not done.stderr, done.stderr
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


def steps(run: Path, last: int) -> None:
    """Rows of a run up to this step."""
    run.mkdir(exist_ok=True)
    rows = [{"step": step, "samples": 8 * step, "loss": 3.5, "time/step_s": 0.5} for step in range(last + 1)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_what_can_go_on_is_queued_again_and_a_mistake_is_not(job, tmp_path: Path) -> None:
    assert REQUEUE in job(75)[1]
    assert (tmp_path / "log").read_text() == f"{tmp_path}/run: interrupted, queued again\n"
    status, told = job(2)
    assert status == 2 and REQUEUE not in told
    assert (tmp_path / "log").read_text() == f"{tmp_path}/run: a mistake in the input, not queued again\n"
    assert REQUEUE in job(137)[1] and REQUEUE in job(1)[1]


def test_a_mistake_of_one_rank_is_not_queued_again_though_the_others_were_killed(job, tmp_path: Path) -> None:
    status, told = job(137, SAID="error: train.stepz: unknown key")
    assert status == 2 and REQUEUE not in told
    assert not list(tmp_path.glob(".m3i-*"))
    (tmp_path / ".m3i-12345.mistake").write_text("error: of a start before this one\n")
    assert REQUEUE in job(137)[1]


def test_crashes_without_a_step_further_are_given_up(job, tmp_path: Path) -> None:
    for _ in range(5):
        assert REQUEUE in job(137)[1]
    log = (tmp_path / "log").read_text()
    assert log == f"{tmp_path}/run: status 137, queued again (crash 5 in a row, at most 5)\n"
    status, told = job(137)
    assert status == 137 and REQUEUE not in told and not list(tmp_path.glob(".m3i-*"))
    log = (tmp_path / "log").read_text()
    assert log == f"{tmp_path}/run: status 137, given up: crash 6 in a row, no step further\n"
    assert REQUEUE not in job(1, M3I_CRASHES="0")[1]


def test_a_step_further_begins_the_count_anew_and_the_same_step_again_does_not(job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for last, again in ((30, True), (20, True), (30, False), (31, True), (31, True), (31, False)):
        steps(run, last)
        assert (REQUEUE in job(1, M3I_CRASHES="2")[1]) == again, last
        if last == 31:  # a row cut short is none
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3')


def test_preemptions_are_no_crashes(job, tmp_path: Path) -> None:
    steps(tmp_path / "run", 9)
    for restarts in range(20):
        assert REQUEUE in job(75, SLURM_RESTART_COUNT=str(restarts))[1]
    assert REQUEUE in job(137, SLURM_RESTART_COUNT="20")[1]
    assert REQUEUE in job(75)[1] and REQUEUE in job(137, M3I_CRASHES="2")[1]
    assert REQUEUE not in job(137, M3I_CRASHES="2")[1]  # nor does a preemption alone make them forgotten


def test_a_run_that_finished_is_no_crash(job, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/exit.json").write_text('{"outcome": "finished", "step": 7}')
    status, told = job(134)  # an abort while the process group is torn down
    assert status == 0 and not any(line.startswith("scontrol") for line in told)


def test_the_warning_goes_to_the_ranks_and_logs_are_kept() -> None:
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)  # B: would warn the script alone
    assert os.access(SCRIPT, os.R_OK) and len(SCRIPT.read_text().splitlines()) <= 70
