"""What the checks of cluster launchers (tests/cluster) leave behind when they fail: nothing. With stand-ins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE_S
from tiny import ROOT

pytestmark = pytest.mark.slow
CLUSTER = ROOT / "tests/cluster"
HEAD = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(CLUSTER)!r})
os.environ["PATH"] = sys.argv[1] + ":" + os.environ["PATH"]
told = Path(sys.argv[2])
def tell(*words):
    with told.open("a") as file:
        print(*words, file=file)
"""
# A launcher whose rank is in a session of its own, as DeepSpeed's and Slurm's are; it ignores SIGTERM.
LAUNCHER = "trap '' TERM; setsid sleep 1000 & while :; do sleep 0.1; done"
STARTED = """
import check
with check.checking("test") as one:
    one.until = lambda true, what: check.Check.until(one, true, what, timeout=600)
    check.GRACE_S = 0.5
    tell(one.directory)
    with one.started("sh", "-c", {launcher!r}) as process:
        one.until(lambda: len(one.left()) >= 3, "the rank")
        tell(*one.left())
        {body}
"""
SSHD = """
import check, hostfile, shutil
hostfile.SEPARATED = told.parent / "separated"
which = shutil.which
shutil.which = lambda name, path=None: which(name)
with check.checking("test") as one:
    one.until = lambda true, what: check.Check.until(one, true, what, timeout=10)
    tell(one.directory)
    with hostfile.sshd(one):
        tell(*one.left())
        one.expect(False, "something in the middle")
"""
SLURM = """
import check, shutil, slurm
shutil.chown = lambda *_: None
check.GRACE_S = 6
with check.checking("test") as one:
    one.until = lambda true, what: check.Check.until(one, true, what, timeout=600)
    tell(one.directory)
    one.environment["TOLD"], one.environment["CHECKED"] = str(told), str(one.directory)
    with slurm.slurm(one):
        tell(*one.left())
        one.expect(False, "something in the middle")
"""
# Daemons go to the background and write a pid file; n1 does not listen to SIGTERM.
DAEMON = """#!/bin/sh
name=$1; pid=$2; trap=$3
sh -c 'echo $$ >"$CHECKED/$1"; trap "$2" TERM; while :; do sleep 0.1; done' - "$pid" "$trap" >/dev/null 2>&1 &
while [ ! -s "$CHECKED/$pid" ]; do sleep 0.05; done
"""
PROGRAMS = {
    "runuser": 'exec daemon munged munge/pid "echo munged ended >>$TOLD; exit"',
    "slurmctld": 'echo 2 >"$CHECKED/jobs"; exec daemon slurmctld slurmctld.pid "echo slurmctld ended >>$TOLD; exit"',
    "slurmd": '[ "$2" = n0 ] && exec daemon n0 n0.pid "echo n0 ended >>$TOLD; exit"; exec daemon n1 n1.pid ""',
    "sinfo": "echo 2 idle",
    # The first scancel leaves a job that its script queues again.
    "squeue": 'echo JOBID; jobs=$(cat "$CHECKED/jobs"); [ "$jobs" = 0 ] || echo "$jobs"',
    "scancel": 'jobs=$(cat "$CHECKED/jobs"); echo $((jobs - 1)) >"$CHECKED/jobs"; echo scancel >>"$TOLD"',
    "ssh-keygen": "exit 0",
}


@pytest.fixture
def ended(tmp_path: Path):
    """Runs a check that ends in the middle; returns its status, what it told and what it said on standard error."""
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    for name, text in {**PROGRAMS, "daemon": DAEMON}.items():
        (programs / name).write_text(text if name == "daemon" else f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)

    def run(script: str, number: signal.Signals | None = None) -> tuple[int, list[str], str]:
        command = [sys.executable, "-c", HEAD + script, str(programs), str(told)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            while number and process.poll() is None:
                time.sleep(0.1)
                if told.is_file() and told.read_text().count("\n") >= 2:
                    process.send_signal(number)
                    number = None
            said = process.communicate(timeout=PATIENCE_S)[1]
        return process.returncode, told.read_text().splitlines(), said

    return run


def is_alive(pid: str) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def leaves_nothing(told: list[str]) -> bool:
    directory, pids = told[0], told[1].split()
    return len(pids) >= 1 and not any(map(is_alive, pids)) and not Path(directory).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_what_a_check_started_ends_with_it(ended, number: signal.Signals | None) -> None:
    body = "time.sleep(60)" if number else "one.expect(False, 'something in the middle')"
    status, told, said = ended(STARTED.format(launcher=LAUNCHER, body=body), number)
    assert status == (128 + number if number else 1), said
    assert leaves_nothing(told), said


@pytest.mark.parametrize("starts", [True, False])
def test_the_sshd_of_a_failed_check_is_ended_and_its_directory_removed(ended, tmp_path: Path, starts: bool) -> None:
    sshd = tmp_path / "bin/sshd"
    write = 'echo $$ >"${3%.conf}.pid"' if starts else f"echo $$ >>{tmp_path}/told"
    sshd.write_text(f"#!/bin/sh\n{write}\nwhile :; do sleep 0.1; done\n")
    sshd.chmod(0o755)
    status, told, said = ended(SSHD)
    assert status == 1 and ("something in the middle" if starts else "sshd: not within 10 s") in said
    assert leaves_nothing(told) and not (tmp_path / "separated").exists(), said


def test_the_queue_of_a_failed_check_is_emptied_before_the_daemons_end_one_by_one(ended) -> None:
    status, told, said = ended(SLURM)
    assert status == 1 and "something in the middle" in said
    assert told[2:] == ["scancel", "scancel", "slurmctld ended", "n0 ended", "munged ended"], said
    assert leaves_nothing(told), said
