"""Everything that goes wrong with a training run, at random moments, and what becomes of it.

    python tests/soak_events.py --events 54

Trains the demo recipe in series of one number of ranks, and one whose number changes at every start. Ranks are killed
(one, all, or while starting), asked to stop by signals, find the disk full, the newest checkpoint corrupted, their loss
not finite in some steps (a streak of them leads to a reload). After each event the same command goes on. At the end the
audit must prove that every sample was drawn exactly as often as it should, and where the number of ranks did not change
every tensor must equal, bit for bit, that of a run that only had the same steps without a finite loss.

As root the checkpoints lie on a small file system of their own that is really full; otherwise that event is left out.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parent.parent
STEPS, SAVE_EVERY = 176, 8
# Steps with a loss that is not finite: alone, two in a row, and a streak of five, which is undone by a reload.
NAN_STEPS = (13, 37, 38, 70, 71, 72, 73, 74, 121)
KINDS = ("kill a rank", "kill all", "kill while starting", "SIGTERM", "SIGUSR1", "corrupt", "disk full")
OVERRIDES = [
    f"train.steps={STEPS}",
    f"train.checkpoint_every={SAVE_EVERY}",
    "train.checkpoint_keep=3",
    "train.picture_every=0",
    "train.threads=1",
    "train.tensorboard=false",
    "data.audit=true",
]


@dataclass
class Series:
    """One run directory and the numbers of ranks that its starts have, in turn."""

    name: str
    run: Path
    worlds: list[int]
    starts: int = 0
    table: list[dict[str, object]] = field(default_factory=list)

    @property
    def next_world(self) -> int:
        return self.worlds[self.starts % len(self.worlds)]


def rank_main(arguments: list[str]) -> int:
    """A rank of the training command whose loss is NaN in NAN_STEPS, as data that a model cannot take would do."""
    from m3i_large.cli_launch import pretrain
    from m3i_large.objective import Objective

    forward = Objective.forward

    def hurt(self: Objective, *inputs, **settings):  # type: ignore[no-untyped-def]
        losses = forward(self, *inputs, **settings)
        return losses | {"loss": losses["loss"] * float("nan")} if inputs[0].step in NAN_STEPS else losses

    Objective.forward = hurt  # type: ignore[method-assign]
    return pretrain(arguments)


def start(series: Series, log: Path) -> subprocess.Popen[bytes]:
    """The training command under the launcher, in a session of its own."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(series.next_world)]
    command += ["--master_port", str(29700 + series.starts % 200), __file__, "--rank"]
    command += ["--ds", str(ROOT / "ds_configs/zero3.json"), "--out", str(series.run), *OVERRIDES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    series.starts += 1
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launcher and everything it has started."""
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Its training processes."""
    found = []
    for member in family(process):
        try:
            words = member.cmdline()
        except psutil.Error:
            continue
        if "--rank" in words and any(word.startswith("--local_rank") for word in words):
            found.append(member)
    return found


def kill(processes: list[psutil.Process], number: int) -> None:
    for member in processes:
        try:
            member.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def rows(run: Path, name: str) -> list[dict]:
    from m3i_large.metrics import read_rows

    return read_rows(run / name)


def last_step(run: Path) -> int:
    """The step that the run is at, by its newest row."""
    found = rows(run, "metrics.jsonl")
    return found[-1]["step"] if found else -1


def saved_step(run: Path) -> int:
    """The step that the newest checkpoint continues with."""
    from m3i_large.checkpoint import newest

    found = newest(run / "checkpoints")
    return int(found.name.removeprefix("step_")) if found else 0


def wait_for(process: subprocess.Popen[bytes], run: Path, step: int) -> bool:
    """Waits until this start of the run has done `step`; False where it ended before."""
    begun = len(rows(run, "metrics.jsonl"))
    while len(rows(run, "metrics.jsonl")) == begun or last_step(run) < step:
        if process.poll() is not None:
            return False
        time.sleep(0.2)
    return True


def ended(process: subprocess.Popen[bytes], *, patience_s: float = 180.0) -> int:
    """The launcher's exit status; whatever is left of its family afterwards is killed."""
    members = family(process)
    try:
        status = process.wait(patience_s)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"the run did not end within {patience_s:.0f} s after an event") from None
    kill([member for member in members if member.is_running()], signal.SIGKILL)
    psutil.wait_procs(members, timeout=10)
    return status


class FullDisk:
    """A file system of its own for a run's checkpoints, with room for a few of them; root only."""

    def __init__(self, folder: Path, *, mib: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self._ballast = folder, folder / "ballast"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)

    def fill(self) -> None:
        """Leaves a megabyte free."""
        status = os.statvfs(self.folder)
        with self._ballast.open("wb") as file:
            for _ in range(max(0, status.f_bavail * status.f_frsize // 2**20 - 1)):
                file.write(bytes(2**20))

    def empty(self) -> None:
        self._ballast.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def corrupt(run: Path, chance: random.Random) -> str:
    """Damages the newest checkpoint in one of several ways; says how."""
    from m3i_large.checkpoint import newest

    found = newest(run / "checkpoints")
    if found is None:
        return "there was none"
    file = chance.choice(sorted(found.glob("rank_*.safetensors")))
    how = chance.choice(("a byte flipped", "cut in half", "removed", "manifest cut"))
    if how == "a byte flipped":
        with file.open("r+b") as stream:
            stream.seek(chance.randrange(file.stat().st_size))
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1]))
    elif how == "cut in half":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "removed":
        file.unlink()
    else:
        os.truncate(found / "manifest.json", 100)
    return f"step {int(found.name.removeprefix('step_'))}: {how}"


def one_event(series: Series, kind: str, disk: FullDisk | None, chance: random.Random, log: Path) -> bool:
    """Starts the run, lets the event happen, notes it; True once the run is finished."""
    world, before = series.next_world, saved_step(series.run)
    for old in (series.run / "checkpoints").glob("damaged_step_*"):  # the small file system has no room for them
        shutil.rmtree(old)
    process = start(series, log)
    what, at = kind, before
    if kind == "kill while starting":
        time.sleep(chance.uniform(0.5, 14.0))
        kill(family(process), signal.SIGKILL)
    elif not wait_for(process, series.run, at := before + chance.randint(2, 14)):
        refused = "all" in exit_of(series.run).get("message", "") and "damaged" in exit_of(series.run)["message"]
        what = "none: every checkpoint was damaged, refused" if refused else "none: it ended before"
    elif kind == "kill a rank":
        kill([chance.choice(ranks(process))], signal.SIGKILL)
    elif kind in ("kill all", "corrupt"):
        time.sleep(chance.uniform(0, 1))
        kill(family(process), signal.SIGKILL)
    elif kind in ("SIGTERM", "SIGUSR1"):
        kill(ranks(process), getattr(signal, kind))
    elif kind == "disk full" and disk is not None:
        disk.fill()
        failed = len(failures(series.run))
        while len(failures(series.run)) == failed and process.poll() is None:
            time.sleep(0.2)
        disk.empty()
        wait_for(process, series.run, last_step(series.run) + SAVE_EVERY + 1)
        kill(family(process), signal.SIGKILL)
    status = ended(process)
    if kind == "corrupt" and what == kind:
        what = f"kill all, then the newest checkpoint ({corrupt(series.run, chance)})"
    if (
        kind in ("SIGTERM", "SIGUSR1")
        and what == kind
        and exit_of(series.run).get("outcome")
        not in (
            "interrupted",
            "finished",
        )
    ):
        raise SystemExit(f"{series.name}: {kind} at step {at} ended with {exit_of(series.run)}; the log is {log}")
    note(series, world=world, what=what, at=at, status=status)
    return exit_of(series.run).get("outcome") == "finished"


def failures(run: Path) -> list[dict]:
    """Saves that failed."""
    return [e for e in rows(run, "events.jsonl") if e["event"] == "incident" and e.get("what") == "checkpoint"]


def exit_of(run: Path) -> dict:
    path = run / "exit.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def note(series: Series, *, world: int, what: str, at: int, status: int) -> None:
    begun = [e for e in rows(series.run, "events.jsonl") if e["event"] in ("start", "resume")]
    row = {"series": series.name, "ranks": world, "event": what, "at step": at, "status": status}
    row["this start began at"] = begun[-1]["step"] if begun else "-"
    series.table.append(row)
    print(f"{time.strftime('%H:%M:%S')} {row}", flush=True)


def finish(series: Series, log: Path) -> None:
    """Lets the run go to its end."""
    while exit_of(series.run).get("outcome") != "finished":
        process = start(series, log)
        status = ended(process, patience_s=1800)
        if status != 0 or exit_of(series.run).get("outcome") != "finished":
            raise SystemExit(f"{series.name}: without an event the run ended with {status}; the log is {log}")


def tensors(run: Path) -> dict[str, torch.Tensor]:
    from m3i_large.checkpoint import Checkpoint, newest

    found = newest(run / "checkpoints")
    assert found is not None
    saved = Checkpoint(found)
    return {key: saved.read_full(key) for key in saved.keys()}  # noqa: SIM118


def judge(series: Series, reference: Path, *, bit_identical: bool) -> str:
    """The audit, the steps left out, the weights; a sentence, or SystemExit."""
    from m3i_large.checkpoint import Checkpoint, newest
    from m3i_large.data.audit import audit_runs
    from m3i_large.goodput import goodput

    audit = audit_runs([series.run])
    if not audit.proven:
        raise SystemExit(f"{series.name}: {audit.to_text()}")
    found = newest(series.run / "checkpoints")
    assert found is not None
    manifest = Checkpoint(found).manifest
    if tuple(manifest["skip_steps"]) != NAN_STEPS or manifest["applied_steps"] != STEPS - len(NAN_STEPS):
        raise SystemExit(f"{series.name}: left out {manifest['skip_steps']}, applied {manifest['applied_steps']}")
    mine, other = tensors(series.run), tensors(reference)
    different = [key for key in other if not torch.equal(mine[key], other[key])]
    if bit_identical and different:
        raise SystemExit(f"{series.name}: {len(different)} of {len(other)} tensors differ, first {different[0]}")
    trained = [key for key in other if key.startswith("master/")]
    gap = sum((mine[k] - other[k]).square().sum().item() for k in trained)
    gap = (gap / sum(other[k].square().sum().item() for k in trained)) ** 0.5
    same = f"all {len(other)} tensors bit-identical" if not different else f"weights differ by {gap:.1%} in norm"
    share = goodput(series.run).share
    return f"{series.starts} starts, audit proven ({audit.steps} steps), {same}, goodput {share:.0%}"


def drive(out: Path, *, events: int, seed: int) -> int:
    """All series; writes events.md."""
    chance, began = random.Random(seed), time.monotonic()
    out.mkdir(parents=True)
    log, root = out / "log.txt", os.geteuid() == 0
    share = events // 3
    plans = [
        ("1 rank", [1], share),
        ("2 ranks", [2], share),
        ("1 to 4 ranks", [1, 3, 2, 4, 2, 1, 4, 3], events - 2 * share),
    ]
    sentences, table = [], []
    for name, worlds, wanted in plans:
        series = Series(name, out / name.replace(" ", "_"), worlds)
        reference = Series(f"{name}, undisturbed", out / f"reference_{worlds[0]}", worlds[:1])
        if not reference.run.exists():
            finish(reference, log)
        disk = FullDisk(series.run / "checkpoints", mib=450) if root else None
        series.run.joinpath("recipe.yaml").write_text((reference.run / "recipe.yaml").read_text())
        kinds = [kind for kind in KINDS if kind != "disk full" or root]
        pending = [kinds[i % len(kinds)] for i in range(wanted)]
        chance.shuffle(pending)
        while pending:
            if one_event(series, pending.pop(), disk, chance, log):
                break
        if pending:
            raise SystemExit(f"{name}: the run was finished with {len(pending)} events to come; more steps are needed")
        finish(series, log)
        sentences.append(f"{name}: {judge(series, reference.run, bit_identical=len(set(worlds)) == 1)}")
        print(sentences[-1], flush=True)
        table += series.table
        if disk is not None:
            disk.close()
        minutes = (time.monotonic() - began) / 60
        counts = Counter(str(row["event"]).split(" (")[0] for row in table)
        total = f"{len(table)} events in {minutes:.0f} minutes: "
        total += ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        (out / "events.md").write_text(as_markdown(table, [*sentences, total]))
    print(f"{total}\nwritten: {out / 'events.md'}")
    return 0


def as_markdown(table: list[dict[str, object]], sentences: list[str]) -> str:
    lines = [
        *(f"- {sentence}" for sentence in sentences),
        "",
        f"| {' | '.join(table[0])} |",
        "|---" * len(table[0]) + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row.values()))} |" for row in table)]) + "\n"


def main() -> int:
    if "--rank" in sys.argv:
        return rank_main([word for word in sys.argv[1:] if word != "--rank"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=54)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / time.strftime("soak_events_%Y%m%d_%H%M%S"))
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"--out: {options.out} exists; needed: a new directory")
    return drive(options.out.resolve(), events=options.events, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
