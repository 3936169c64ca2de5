"""Ranks from Slurm's variables: what `srun` sets for each task, by its manual and as a real one printed it."""

import stat
from pathlib import Path

import pytest

from m3i_large.errors import UserError
from m3i_large.parallel.slurm import slurm_environment

# The second task of the second of two machines, of a step with 2 and 3 tasks (srun's "OUTPUT ENVIRONMENT VARIABLES").
TASK = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_NODELIST": "a1,a2",
    "SLURM_NTASKS": "8",  # the job's
}


def test_a_task_of_srun_is_a_rank() -> None:
    assert slurm_environment(TASK) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "a1",
        "MASTER_PORT": "20290",
    }


def test_a_launcher_counts_more_and_a_batch_script_is_no_step() -> None:
    assert slurm_environment(TASK | {"RANK": "0"}) == {}
    script = {k: v for k, v in TASK.items() if k not in ("SLURM_STEP_NUM_TASKS",)}
    assert slurm_environment(script) == {}
    assert slurm_environment({}) == {}


def test_the_rendezvous_of_the_script_is_kept() -> None:
    made = slurm_environment(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert (made["MASTER_ADDR"], made["MASTER_PORT"]) == ("10.0.0.7", "29500")


def test_steps_of_one_job_and_neighbouring_jobs_do_not_meet() -> None:
    ports = {
        slurm_environment(TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in (41, 42, 43)
        for step in range(7)
    }
    assert len(ports) == 21


@pytest.mark.parametrize(
    ("text", "node", "expected"),
    [("2(x3)", 2, "2"), ("4(x2),3,1(x2)", 2, "3"), ("4(x2),3,1(x2)", 4, "1"), ("8", 0, "8")],
)
def test_tasks_per_machine_are_written_in_runs(text: str, node: int, expected: str) -> None:
    made = slurm_environment(TASK | {"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": str(node)})
    assert made["LOCAL_WORLD_SIZE"] == expected


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    assert slurm_environment(TASK | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert slurm_environment(TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2"})["LOCAL_RANK"] == "1"
    assert slurm_environment(TASK | {"CUDA_VISIBLE_DEVICES": ""})["LOCAL_RANK"] == "1"


def test_ranges_of_machines_are_expanded_by_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ranges = TASK | {"SLURM_STEP_NODELIST": "gpu[07-09,12]"}
    with pytest.raises(UserError, match=r"MASTER_ADDR: not set, and no scontrol to expand gpu\[07-09,12\]"):
        slurm_environment(ranges)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-09,12]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    assert slurm_environment(ranges)["MASTER_ADDR"] == "gpu07"
