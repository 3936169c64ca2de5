"""The restart policy over a fake launcher and a fake training that do as a plan says."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m3i_large.errors import REQUEUE, OutageError, UserError
from m3i_large.metrics import append_row, read_rows
from m3i_large.supervise import Policy, processes, supervise, supervisor
from m3i_large.supervise.available import Available
from m3i_large.supervise.command import Command
from m3i_large.supervise.processes import MARK, marked

POLICY = Policy(failures=3, delay_s=0.01, grace_s=120.0, timeout_s=120.0, orphans_s=0.2, poll_s=0.02)

# Starts as many ranks as told and, like DeepSpeed's, exits 0 when one was killed by a signal.
LAUNCHER = """
import os, subprocess, sys
from pathlib import Path
world = int(sys.argv[sys.argv.index("--num_accelerators") + 1])
with (Path(__file__).parent / "worlds").open("a+") as file:
    file.seek(0)
    os.environ["START"] = str(len(file.readlines()))
    file.write(f"{world}\\n")
script = next(i for i, word in enumerate(sys.argv) if word.endswith("pretrain.py"))
ranks = [
    subprocess.Popen([sys.executable, *sys.argv[script:]], env={**os.environ, "RANK": str(r), "WORLD_SIZE": str(world)})
    for r in range(world)
]
if "--leave" in sys.argv[:script]:
    sys.exit(1)
sys.exit(max(0, *[rank.wait() for rank in ranks]))
"""

# Each start takes the next line of plan.json: rows to write, then what to do.
TRAINING = """
import json, os, signal, sys, time
from pathlib import Path
here, run, rank = Path(__file__).parent, Path(sys.argv[sys.argv.index("--out") + 1]), int(os.environ["RANK"])
start = int(os.environ["START"])
plan = json.loads((here / "plan.json").read_text())[start]
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
if rank == 0:
    if plan["steps"] is not None:
        run.mkdir(exist_ok=True)
        (run / "recipe.yaml").write_text("name: fake")
        if plan.get("begin", True):
            (run / "exit.json").unlink(missing_ok=True)
        for step in plan["steps"]:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "attempt": start}) + "\\n")
        for step in plan.get("saves", []):
            with (run / "events.jsonl").open("a") as file:
                file.write(json.dumps({"event": "save", "step": step, "attempt": start}) + "\\n")
(here / f"ready_{rank}").write_text(str(os.getpid()))
if plan["then"] == "kill" and rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if plan["then"] == "hang":
    time.sleep(600)
    time.sleep(600)
if plan["then"] == "save":
    while not signals:
        time.sleep(0.02)
    time.sleep(0.3)
    (here / f"signals_{rank}").write_text(json.dumps(signals))
if plan.get("exit") and rank == 0:
    (run / "exit.json").write_text(json.dumps(plan["exit"]))
sys.exit(plan.get("status", 0))
"""
FINISHED = {"outcome": "finished", "step": 6, "attempt": 0, "message": ""}
FINISH = {"steps": [5], "then": "exit", "exit": FINISHED}


class Bench:
    """A fake training in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "deepspeed").write_text(LAUNCHER)
        (folder / "pretrain.py").write_text(TRAINING)
        self.said: list[str] = []

    def supervise(
        self,
        plan: list[dict[str, Any]],
        *,
        policy: Policy = POLICY,
        available: Callable[[], Available] = lambda: Available(2),
        leave: bool = False,
    ) -> int:
        (self.folder / "plan.json").write_text(json.dumps(plan))
        option = ["--leave"] if leave else []
        head = [sys.executable, str(self.folder / "deepspeed"), *option, "--num_accelerators", "4"]
        return supervise(
            Command.parse([*head, str(self.folder / "pretrain.py"), "--out", str(self.run)]),
            run=self.run,
            worlds=[1, 2, 4],
            available=available,
            policy=policy,
            say=self.said.append,
        )

    @property
    def worlds(self) -> list[int]:
        return [int(line) for line in (self.folder / "worlds").read_text().split()]

    def log(self, *events: str) -> list[dict[str, Any]]:
        return [row for row in read_rows(self.run / "supervise.jsonl") if not events or row["event"] in events]

    def when_ready(self, action: Callable[[], None], *, ranks: int = 2) -> threading.Thread:
        def wait() -> None:
            while not all((self.folder / f"ready_{rank}").exists() for rank in range(ranks)):
                time.sleep(0.01)
            action()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    assert not marked(bench.run), "processes were left"


def test_a_killed_rank_is_a_crash_although_the_launcher_exits_0(bench: Bench) -> None:
    assert bench.supervise([{"steps": [0, 1], "saves": [2], "then": "kill"}, FINISH]) == 0
    assert bench.worlds == [2, 2]
    assert [row["event"] for row in bench.log() if row["event"] != "kill"] == ["start", "restart", "start", "finished"]
    restart = bench.log("restart")[0]
    assert (restart["step"], restart["saved"], restart["world"], restart["start"]) == (2, 2, 2, 1)
    assert "status 0" in restart["reason"] and 0.005 <= restart["delay_s"] <= 0.01
    assert len(bench.said) == len(bench.log())


def test_gives_up_after_failures_at_the_same_step(bench: Bench) -> None:
    crash = {"steps": [0, 1], "saves": [1], "then": "exit", "status": 1}
    crash["exit"] = {"outcome": "failed", "step": 1, "attempt": 0, "message": "loss is not finite"}
    assert bench.supervise([crash] * 4) == 1
    assert len(bench.worlds) == 3
    reason = bench.log("gave up")[0]["reason"]
    assert "3 failures in a row at step 2 (newest checkpoint: step 1)" in reason and "loss is not finite" in reason


@pytest.mark.parametrize("what", ["steps", "saves"])
def test_progress_forgives_earlier_failures(bench: Bench, what: str) -> None:
    plans = [{"steps": [9], "then": "kill"} | {what: [10 + i]} for i in range(4)]
    assert bench.supervise([*plans, FINISH], policy=Policy(**{**vars(POLICY), "failures": 2})) == 0
    assert len(bench.worlds) == 5
    delays = [row["delay_s"] for row in bench.log("restart")]
    assert all(0.005 <= delay <= 0.01 for delay in delays), "the back-off begins anew"


def test_a_mistake_in_the_input_is_not_repeated_and_writes_nothing(bench: Bench) -> None:
    assert bench.supervise([{"steps": None, "then": "exit", "status": 2}]) == 2
    assert len(bench.worlds) == 1 and not bench.run.exists()
    assert "exit status 2" in bench.said[-1]


def test_a_mistake_that_is_found_late_is_not_repeated_either(bench: Bench) -> None:
    failed = {"outcome": "failed", "step": 1, "attempt": 0, "message": "checkpoint: all 2 are damaged"}
    assert bench.supervise([{"steps": [0], "then": "exit", "status": 2, "exit": failed}]) == 2
    assert len(bench.worlds) == 1 and "all 2 are damaged" in bench.said[-1]


def test_a_full_disk_does_not_end_the_supervisor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def refusing(path: Path, row: dict[str, Any]) -> None:
        if next(calls) in (1, 2):
            raise OSError(28, "No space left on device")
        append_row(path, row)

    monkeypatch.setattr(supervisor, "append_row", refusing)
    assert bench.supervise([{"steps": [0], "then": "kill"}, FINISH]) == 0
    assert [row["event"] for row in bench.log()] == ["start", "restart", "start", "finished"]


def test_a_command_that_does_not_exist_is_a_mistake(tmp_path: Path) -> None:
    command, said = Command.parse([str(tmp_path / "deepspeed"), "pretrain.py"]), []
    arguments = {"worlds": [1], "available": lambda: Available(1), "policy": POLICY, "say": said.append}
    assert supervise(command, run=tmp_path / "run", **arguments) == 2
    assert "No such file" in said[-1]


def test_a_run_that_was_finished_before_is_finished(bench: Bench) -> None:
    bench.run.mkdir()
    (bench.run / "exit.json").write_text(json.dumps(FINISHED))
    assert bench.supervise([{"steps": None, "then": "exit"}]) == 0 and len(bench.worlds) == 1


@pytest.mark.parametrize("old", [FINISHED, FINISHED | {"outcome": "interrupted"}], ids=["finished", "interrupted"])
def test_an_earlier_starts_exit_file_does_not_count(bench: Bench, old: dict[str, Any]) -> None:
    bench.run.mkdir()
    (bench.run / "exit.json").write_text(json.dumps(old))
    early = {"steps": [], "begin": False, "then": "exit", "status": 1}
    assert bench.supervise([early, FINISH]) == 0 and len(bench.worlds) == 2


def test_a_crash_after_the_finish_is_a_finish(bench: Bench) -> None:
    assert bench.supervise([FINISH | {"status": 134}]) == 0 and len(bench.worlds) == 1


def test_a_run_that_writes_nothing_is_killed_and_restarted(bench: Bench) -> None:
    policy = Policy(**{**vars(POLICY), "timeout_s": 6.0})
    assert bench.supervise([{"steps": [0], "then": "hang"}, FINISH], policy=policy) == 0
    assert "no new row" in bench.log("restart")[0]["reason"]
    assert len(bench.log("kill")[0]["processes"]) == 3, "launcher and both ranks"


def test_a_run_that_writes_is_not_taken_for_hung(bench: Bench) -> None:
    def write() -> None:
        for _ in range(8):
            time.sleep(1.0)
            append_row(bench.run / "events.jsonl", {"event": "save", "step": 1})
        os.kill(int((bench.folder / "ready_0").read_text()), signal.SIGKILL)
        os.kill(int((bench.folder / "ready_1").read_text()), signal.SIGKILL)

    thread = bench.when_ready(write)
    policy = Policy(**{**vars(POLICY), "timeout_s": 6.0})
    assert bench.supervise([{"steps": [0], "then": "hang"}, FINISH], policy=policy) == 0
    thread.join()
    assert "no new row" not in bench.log("restart")[0]["reason"]


def test_ranks_that_outlive_their_launcher_are_killed_before_the_restart(bench: Bench) -> None:
    policy = Policy(**{**vars(POLICY), "failures": 1, "orphans_s": 1.5})
    assert bench.supervise([{"steps": [0], "then": "hang"}], leave=True, policy=policy) == 1
    assert len(bench.log("kill")[0]["processes"]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda n: n.name)
def test_a_stop_signal_goes_to_the_ranks_once_and_they_may_save(
    bench: Bench, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # these tests may themselves run under nohup
    request.addfinalizer(lambda: signal.signal(number, before))

    def stop() -> None:
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    thread = bench.when_ready(stop)
    interrupted = {"outcome": "interrupted", "step": 1, "attempt": 0, "message": ""}
    plan = {"steps": [0], "then": "save", "exit": interrupted, "status": 75}
    assert bench.supervise([plan, FINISH]) == REQUEUE == 75
    thread.join()
    assert [json.loads((bench.folder / f"signals_{rank}").read_text()) for rank in (0, 1)] == [[15], [15]]
    assert [row["event"] for row in bench.log()] == ["start", "signal", "interrupted"], "the launcher was not killed"
    assert bench.log("signal")[0]["reason"] == number.name
    assert signal.getsignal(number) == signal.SIG_DFL


def test_under_nohup_a_hangup_ends_nothing(bench: Bench, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    bench.when_ready(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGHUP, signal.SIGTERM)])
    interrupted = {"outcome": "interrupted", "step": 1, "attempt": 0, "message": ""}
    plan = {"steps": [0], "then": "save", "exit": interrupted, "status": 75}
    assert bench.supervise([plan, FINISH]) == REQUEUE
    assert [row["reason"] for row in bench.log("signal")] == ["SIGTERM"]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_ranks_that_do_not_end_within_the_grace_period_are_killed(bench: Bench) -> None:
    thread = bench.when_ready(lambda: os.kill(os.getpid(), signal.SIGTERM))
    policy = Policy(**{**vars(POLICY), "grace_s": 0.5})
    assert bench.supervise([{"steps": [0], "then": "hang"}], policy=policy) == REQUEUE
    thread.join()
    assert "still running 0.5 s after SIGTERM" in bench.log("kill")[0]["reason"]
    assert bench.log("interrupted")


def test_a_preemption_of_the_ranks_themselves_is_not_restarted(bench: Bench) -> None:
    plan = {"steps": [0], "then": "exit", "exit": {"outcome": "interrupted", "step": 1}, "status": 1}
    assert bench.supervise([plan, FINISH]) == REQUEUE and len(bench.worlds) == 1


def test_a_signal_during_the_back_off_ends_it(bench: Bench) -> None:
    def stop() -> None:
        while not bench.log("restart"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    policy = Policy(**{**vars(POLICY), "delay_s": 600.0, "delay_cap_s": 600.0})
    assert bench.supervise([{"steps": [0], "then": "kill"}, FINISH], policy=policy) == REQUEUE
    thread.join()
    assert len(bench.worlds) == 1


def test_continues_on_the_largest_valid_number_of_ranks_left(bench: Bench) -> None:
    left = iter([4, 3, 1, 2])
    crashes = [{"steps": [i], "then": "kill"} for i in range(3)]
    assert bench.supervise([*crashes, FINISH], available=lambda: Available(next(left))) == 0
    assert bench.worlds == [4, 2, 1, 2]
    assert [row["available"] for row in bench.log("start")] == [4, 3, 1, 2]


def test_waits_for_ranks_and_gives_up_without(bench: Bench) -> None:
    def unknown() -> Available:
        raise OutageError("nvidia-smi does not answer")

    assert bench.supervise([FINISH], available=unknown) == 1
    assert "3 failures in a row before the first step; the last: nvidia-smi does not answer" in bench.said[-1]
    left = iter([0, 0, 2])
    assert bench.supervise([FINISH], available=lambda: Available(next(left))) == 0 and bench.worlds == [2]


def test_refuses_a_run_that_still_has_processes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={MARK: str(bench.run)}) as left:
        while not marked(bench.run):
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"still trained by the processes {left.pid}; end them first"):
            bench.supervise([FINISH])
        left.kill()
    assert not (bench.folder / "worlds").exists()


def test_a_process_that_cannot_be_killed_ends_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "KILL_S", 0.5)
    monkeypatch.setattr(processes, "_send", lambda pid, number: None)
    policy = Policy(**{**vars(POLICY), "timeout_s": 1.0})
    assert bench.supervise([{"steps": [0], "then": "hang"}, FINISH], policy=policy) == 1
    assert "do not end 0.5 s after SIGKILL" in bench.log("gave up")[0]["reason"] and bench.worlds == [2]
    for pid in marked(bench.run):
        os.kill(pid, signal.SIGKILL)
    while marked(bench.run):
        time.sleep(0.02)


def test_the_back_off_doubles_up_to_its_cap() -> None:
    policy = Policy(delay_s=5.0, delay_cap_s=300.0)
    longest = [policy.delay(n, luck=1.0) for n in range(1, 9)]
    assert longest == [5, 10, 20, 40, 80, 160, 300, 300]
    assert [policy.delay(n, luck=0.0) for n in range(1, 9)] == [d / 2 for d in longest]
