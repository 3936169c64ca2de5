"""Runs launchers/slurm on a real Slurm: two slurmd on this machine, as root. `make slurm-check`.

Everything (configuration, keys, state, runs) is in a temporary directory; no daemon, job or rank is left behind,
whatever ends the check.
"""

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from check import LONG, PYTHON, ROOT, SHORT, Check, checking, cleaning_up_after, end

from m3i_large.metrics import read_rows

CONTROLLER, NODES = 17817, (17820, 17821)  # ports
DAEMONS = ("slurmctld.pid", "n0.pid", "n1.pid", "munge/pid")  # in the order in which they end
# cred_expire is also how long a job that was queued again waits (120 s without it).
CONFIGURATION = """
ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=10
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(check: Check) -> Iterator[None]:
    """A cluster of two machines that are this one."""
    directory = check.directory
    munge = directory / "munge"
    munge.mkdir()
    (directory / "state").mkdir()
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o600)
    for path in (munge, munge / "key"):
        shutil.chown(path, "munge", "munge")
    directory.chmod(0o755)  # munged runs as munge
    host = socket.gethostname().partition(".")[0]
    ports = {"controller": CONTROLLER, "first": NODES[0], "second": NODES[1]}
    (directory / "slurm.conf").write_text(CONFIGURATION.format(host=host, directory=directory, **ports))
    check.environment["SLURM_CONF"] = str(directory / "slurm.conf")
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    with cleaning_up_after(lambda: empty_queue(check), *(partial(end_daemon, directory / name) for name in DAEMONS)):
        check.run("runuser", "-u", "munge", "--", "munged", *options)
        for daemon in (["slurmctld"], ["slurmd", "-N", "n0"], ["slurmd", "-N", "n1"]):
            check.run(*daemon)
        check.until(lambda: "2 idle" in " ".join(check.run("sinfo", "-h", "-o", "%D %t").split()), "two idle machines")
        yield


def empty_queue(check: Check) -> None:
    """Cancels all jobs and waits for their ends: slurmctld and slurmd are still there, and see to it."""
    if not (check.directory / "slurmctld.pid").is_file():
        return
    # A job that is ending may just have been queued again by its script: cancelled until there is none.
    deadline = time.monotonic() + 60  # KillWait and more
    while "\n" in check.run("squeue", timeout=30).strip():
        check.expect(time.monotonic() < deadline, "the queue does not empty")
        check.run("scancel", "--user=root", timeout=30)
        time.sleep(1)


def end_daemon(pid_file: Path) -> None:
    if pid_file.is_file() and (pid := pid_file.read_text().strip()):
        end(int(pid))


class Job:
    """A job of launchers/slurm/pretrain.sbatch with a task on each of the two machines."""

    def __init__(self, check: Check, name: str, *arguments: str, venv: Path = PYTHON.parent.parent) -> None:
        self.check, self.out, self.log = check, check.directory / name, check.directory / f"{name}.log"
        check.environment |= {"M3I_OUT": str(self.out), "M3I_VENV": str(venv)}
        # The two machines have names that nobody resolves; a cluster's do.
        check.environment["MASTER_ADDR"] = "127.0.0.1"
        here = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.log}"]
        work = check.directory / "work"  # where the script leaves its notes
        for part in ("launchers", "ds_configs"):
            if not (work / part).exists():
                work.mkdir(exist_ok=True)
                (work / part).symlink_to(ROOT / part)
        script = ROOT / "launchers/slurm/pretrain.sbatch"
        self.id = check.run("sbatch", "--parsable", f"--chdir={work}", *here, script, *arguments).strip()

    def field(self, name: str) -> str:
        fields = self.check.run("scontrol", "show", "job", self.id).split()
        return next(value for key, _, value in (field.partition("=") for field in fields) if key == name)

    def ends(self, state: str, *, restarts: int, exit_code: str = "0:0") -> None:
        final = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.check.until(lambda: self.field("JobState") in final, f"the end of job {self.id}")
        seen = (self.field("JobState"), self.field("ExitCode"), int(self.field("Restarts")))
        self.check.expect(seen == (state, exit_code, restarts), f"job {self.id}: {seen}\n{self.log.read_text()}")

    def events(self) -> list[str]:
        return [row["event"] for row in read_rows(self.out / "events.jsonl")]


def direct(check: Check) -> None:
    """srun starts the ranks, then torchrun under srun, beside the deepspeed launcher."""
    srun, torchrun = (check.directory / name for name in ("srun", "torchrun"))
    arguments = check.arguments(SHORT)
    expected = check.on_one_machine("deepspeed", SHORT)
    check.environment["MASTER_ADDR"] = "127.0.0.1"
    check.run("srun", "-N2", "-n2", "python", "launchers/pretrain.py", "--out", srun, *arguments)
    check.expect(check.losses(srun, SHORT) == expected, "srun's losses are others than deepspeed's")
    check.proven(
        f"srun -N2 -n2 python launchers/pretrain.py: the {SHORT} losses of deepspeed on one machine, bit by bit"
    )
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:20999"]
    check.run("srun", "-N2", "-n2", "torchrun", *rendezvous, "launchers/pretrain.py", "--out", torchrun, *arguments)
    check.expect(check.losses(torchrun, SHORT) == expected, "torchrun's losses are others than deepspeed's")
    check.proven("srun -N2 -n2 torchrun --nnodes=2: the same losses")


def kill_a_rank(check: Check) -> None:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ours = f"SLURM_CONF={check.environment['SLURM_CONF']}".encode() in variables
        if ours and b"SLURM_PROCID=1" in variables and b"pretrain.py" in (path.parent / "cmdline").read_bytes():
            os.kill(int(path.parent.name), signal.SIGKILL)
            return
    check.expect(False, "rank 1 was not found")


def preempted_and_crashed(check: Check, expected: list[float]) -> None:
    check.environment["M3I_CRASHES"] = "1"
    job = Job(check, "preempted", *check.arguments(LONG))
    del check.environment["M3I_CRASHES"]
    check.reaches(job.out, 10)
    check.run("scontrol", "requeue", job.id)
    check.until(lambda: job.field("Restarts") == "1", "the preempted job queued again")
    check.until(lambda: "resume" in job.events(), "the preempted job's second start")
    check.reaches(job.out, 25)
    kill_a_rank(check)
    check.until(lambda: job.field("Restarts") == "2", "the crashed job queued again")
    check.expect("queued again (crash 1 in a row, at most 1)" in job.log.read_text(), job.log.read_text())
    check.proven("scontrol requeue, then kill -9 of a rank: the script counts one crash, and queues the job again")
    job.ends("COMPLETED", restarts=2)
    check.expect(check.losses(job.out, LONG) == expected, "the losses of the preempted job are others")
    events = job.events()
    check.expect((events.count("start"), events.count("resume"), events.count("preempt")) == (1, 2, 1), str(events))
    check.proven(f"saved on SIGTERM, resumed twice, {LONG} losses of the uninterrupted run, bit by bit")


def warned(check: Check, expected: list[float]) -> None:
    job = Job(check, "warned", *check.arguments(LONG))
    check.reaches(job.out, 5)
    check.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=5")  # the script asks for SIGUSR1 300 s before
    check.until(lambda: job.field("Restarts") == "1", "the warned job queued again")
    check.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.ends("COMPLETED", restarts=1)
    check.expect(f"{job.out}: interrupted, queued again" in job.log.read_text(), "status 75 was not seen")
    check.expect(check.losses(job.out, LONG) == expected, "the losses of the warned job are others")
    check.proven("time limit: SIGUSR1, status 75, queued again by the script, the same losses")


def mistaken(check: Check) -> None:
    job = Job(check, "mistaken", *check.arguments(SHORT, "train.stepz=1"))
    job.ends("FAILED", restarts=0, exit_code="2:0")
    lines = [line for line in job.log.read_text().splitlines() if line.startswith("error: ")]
    check.expect(len(lines) == 1 and "train.stepz" in lines[0], f"the log says {job.log.read_text()}")
    check.proven(f"a mistake: status 2, not queued again, one line: {lines[0].partition(';')[0]}")


def mistaken_alone(check: Check) -> None:
    """Rank 1 alone has a mistake: its `python` adds one. Rank 0 waits for it until srun kills it."""
    bin_directory = check.directory / "venv/bin"
    bin_directory.mkdir(parents=True)
    (bin_directory / "activate").write_text(f'PATH="{bin_directory}:$PATH"\n')
    python = bin_directory / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID" = 0 ] || set -- "$@" train.stepz=1\nexec "{PYTHON}" "$@"\n')
    python.chmod(0o755)
    job = Job(check, "mistaken-alone", *check.arguments(SHORT), venv=bin_directory.parent)
    job.ends("FAILED", restarts=0, exit_code="2:0")
    said = job.log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    check.expect(len(lines) == 1 and "train.stepz" in lines[0], f"the log says {said}")
    check.expect("Killed" in said and "a mistake in the input, not queued again" in said, f"the log says {said}")
    check.proven("a mistake of rank 1 alone: rank 0 was killed, status 2, not queued again, the same line")


def indexed(check: Check) -> None:
    script, data = ROOT / "launchers/slurm/index.sbatch", check.directory / "data"
    shutil.rmtree(data / ".m3i", ignore_errors=True)
    here = ["sbatch", "--parsable", "--cpus-per-task=1", "--mem=0", f"--output={check.directory}/index-%a.log"]
    parts = check.run(*here, "--array=0-1", script, "demo", f"data.root={data}").strip()
    after = ["--array=0", f"--dependency=afterok:{parts}", "--wait"]
    check.run(*here, *after, script, "demo", f"data.root={data}")
    check.run("m3i", "data", "check", "demo", f"data.root={data}")
    check.proven("m3i data index: an array of 2 parts, joined by a job that waits for them")


def main() -> None:
    with checking("slurm") as check, slurm(check):
        check.proven("a Slurm of two machines runs")
        direct(check)
        mistaken(check)
        mistaken_alone(check)
        expected = check.on_one_machine("whole", LONG)
        preempted_and_crashed(check, expected)
        warned(check, expected)
        indexed(check)


if __name__ == "__main__":
    main()
