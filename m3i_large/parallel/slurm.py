"""Ranks that `srun` started itself, one task a rank: torch's variables from Slurm's."""

import shutil
import subprocess
from collections.abc import Mapping

from m3i_large.errors import UserError

FIRST_PORT, NUM_PORTS = 20_000, 10_000  # below the ports that Linux gives to clients (32768 and up)


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT of a task of `srun`; {} elsewhere.

    A launcher's RANK counts more: `srun` may start torchrun or deepspeed, whose ranks inherit Slurm's variables. So do
    processes of a batch script outside any step, which have no SLURM_STEP_NUM_TASKS of their own.

    LOCAL_RANK chooses the device: 0 where Slurm shows each task its own GPU alone (`--gpus-per-task=1`).

    MASTER_ADDR and MASTER_PORT are taken over where the script set them; else the step's first machine, and a port by
    job and step, so that two steps on one machine do not meet.

    Raises:
        UserError: the first machine is not known, because `scontrol` is not there (in a container, say).
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return {}
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    tasks_here = _tasks_of_nodes(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    devices = environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = devices != "" and "," not in devices
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if bound else environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_here),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(FIRST_PORT + (job * 7 + step) % NUM_PORTS),
    }


def _tasks_of_nodes(text: str) -> list[int]:
    """`4(x2),3` -> [4, 4, 3]."""
    counts = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def _first_host(hosts: str) -> str:
    if "[" not in hosts:
        return hosts.partition(",")[0]
    if shutil.which("scontrol") is None:
        raise UserError(
            f"MASTER_ADDR: not set, and no scontrol to expand {hosts}; needed: MASTER_ADDR, set before srun"
        )
    shown = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]
