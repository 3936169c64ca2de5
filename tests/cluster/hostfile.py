"""Runs the deepspeed launcher over a hostfile, pdsh and ssh: two addresses of this machine. `make hostfile-check`.

The sshd, its keys and the runs are in a temporary directory and on loopback addresses; none of it is left behind,
whatever ends the check.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from check import LONG, MARK, SHORT, Check, checking, cleaning_up_after, free_port

from m3i_large.metrics import read_rows

SEPARATED = Path("/run/sshd")  # the empty directory that sshd wants
PORT, HOSTS = 22022, ("127.0.0.1", "127.0.0.2")
SECRET = "not-a-key-but-secret-all-the-same"
SSHD = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {directory}/host
PidFile {directory}/sshd.pid
AuthorizedKeysFile {directory}/user.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin prohibit-password
StrictModes no
SetEnv {mark}={directory}
"""


@contextmanager
def sshd(check: Check) -> Iterator[None]:
    """Two addresses that let in who has the key."""
    directory = check.directory
    for name in ("host", "user"):
        check.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
    (directory / "sshd.conf").write_text(SSHD.format(port=PORT, directory=directory, mark=MARK))
    options = f"-i {directory}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    check.environment |= {"PDSH_SSH_ARGS_APPEND": options, "WANDB_API_KEY": SECRET}
    (directory / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    program = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    made = not SEPARATED.exists()
    with cleaning_up_after(lambda: SEPARATED.rmdir() if made and SEPARATED.exists() else None):
        SEPARATED.mkdir(exist_ok=True)
        # In the foreground it is a child of the check, known before it has a pid file.
        with check.started(program, "-D", "-f", directory / "sshd.conf"):
            check.until((directory / "sshd.pid").is_file, "sshd")
            yield


def launcher(check: Check) -> list[str]:
    # --no_ssh_check: the launcher's trial does not know where the key is.
    options = ["--hostfile", str(check.directory / "hosts"), "--ssh_port", str(PORT), "--no_ssh_check"]
    options += ["--master_addr", HOSTS[0], "--master_port", str(free_port())]
    return ["deepspeed", *options, "launchers/pretrain.py"]


def command_lines() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def reached(check: Check, out: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Waits for a step; meanwhile no command line may show the secret."""
    while not any(row["step"] >= step for row in read_rows(out / "metrics.jsonl")):
        check.expect(process.poll() is None, f"{out}: ended before step {step}")
        shown = [line for _, line in command_lines() if SECRET in line]
        check.expect(not shown, f"a command line shows WANDB_API_KEY: {shown}")
        time.sleep(0.1)


def equals_one_machine(check: Check) -> None:
    two, arguments = check.directory / "two", check.arguments(SHORT)
    expected = check.on_one_machine("one", SHORT)
    said = check.run(*launcher(check), "--out", two, *arguments)
    for host in HOSTS:
        check.expect(f"{host}: " in said, f"nothing was heard of {host}:\n{said}")
    check.expect(check.losses(two, SHORT) == expected, "the losses on two machines are others")
    check.proven(f"deepspeed --hostfile: two machines, the {SHORT} losses of one machine, bit by bit")
    check.expect("finished" in check.run(*launcher(check), "--out", two, *arguments), "a finished run does not say so")


def killed_and_supervised(check: Check) -> None:
    out, arguments = check.directory / "killed", check.arguments(LONG)
    expected = check.on_one_machine("whole", LONG)
    supervised = ["m3i", "supervise", "--delay", "1", "--", *launcher(check), "--out", str(out), *arguments]
    with check.started(*supervised) as supervisor:
        reached(check, out, 10, supervisor)
        ranks = [pid for pid, line in command_lines() if str(out) in line and "pretrain.py --local_rank" in line]
        check.expect(len(ranks) >= 2, f"ranks: {ranks}")
        os.kill(max(ranks), signal.SIGKILL)
        check.until(lambda: supervisor.poll() is not None, "the end of the supervised run", timeout=600)
    check.expect(supervisor.returncode == 0, f"m3i supervise ended with {supervisor.returncode}")
    events = [row["event"] for row in read_rows(out / "supervise.jsonl")]
    check.expect(events.count("start") == 2, f"supervise.jsonl has {events}")
    check.expect(check.losses(out, LONG) == expected, "the losses after a kill are others")
    check.proven(f"m3i supervise -- deepspeed --hostfile: kill -9 of a rank, started again, {LONG} losses bit by bit")
    check.proven("WANDB_API_KEY was in the environment and on no command line")


def main() -> None:
    with checking("hostfile") as check, sshd(check):
        equals_one_machine(check)
        killed_and_supervised(check)


if __name__ == "__main__":
    main()
