"""A billion parameters trained on a small machine without a GPU: the proof behind `make proof-1b`.

The recipe m3i_internimage_h_442m with every parameter real, on two CPU ranks under ZeRO-3 with optimizer states and the
average on disk: three optimizer steps, a checkpoint, then the processes are killed and the same command goes on in new
ones for a fourth step. The two checkpoints are then compared by hand: AdamW's formula and the average's, over every
element.

Run: python tests/proof_1b.py [--out DIR] [--backbone NAME] (a smaller one to try the script itself)
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import yaml

from m3i_large.checkpoint import Checkpoint, complete_checkpoints
from m3i_large.metrics import read_metrics, read_rows

ROOT = Path(__file__).parent.parent
RANKS, STEPS = 2, 4
DISK_GB = 60
# glibc keeps the memory of gathered parameters otherwise; two ranks of one thread do not wait for each other busily.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}
SOURCES = [
    {"name": "openmoji", "kind": "image_text", "shards": ["train/openmoji-*.tar"], "quota": 1},
    {"name": "category", "kind": "image_category", "shards": ["train/category-*.tar"], "quota": 1},
]


def write_recipe(out: Path, backbone: str) -> Path:
    """The 1.08 B recipe on the embedded pictures, two samples a rank, four steps."""
    values = {
        "name": "proof_1b",
        "extends": "m3i_internimage_h_442m",
        "backbone": {"name": backbone},
        "data": {"root": str(ROOT / "data/demo"), "embedded": True, "lanes": 2, "sources": SOURCES},
        "optim": {"lr": {"warmup": 0.0, "decay": "constant"}},
        "train": {"global_batch": 2 * RANKS, "steps": STEPS, "checkpoint_every": STEPS - 1, "checkpoint_keep": 2}
        | {"precision": "bf16", "threads": 1, "picture_every": 0, "signals_every": 1000, "log_every": 1}
        # Written sub-group by sub-group: there is no memory for a copy.
        | {"checkpoint_async": False, "tensorboard": False},
    }
    path = out / "proof_1b.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_ds(out: Path) -> Path:
    """ds_configs/zero3_nvme.json with its folder below `out`, and sub-groups for two ranks."""
    values = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text(encoding="utf-8"))
    values["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(out / "nvme")
    values["zero_optimization"]["sub_group_size"] = 50_000_000
    path = out / "zero3_nvme.json"
    path.write_text(json.dumps(values))
    return path


class Memory:
    """Peak memory of a process and all its descendants, sampled: resident, and what of it no file backs."""

    def __init__(self, root: int) -> None:
        self.peak_gib = {"all": 0.0, "all, not backed by files": 0.0, "largest process": 0.0}
        self._root, self._done = root, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Ends sampling; the peaks in GiB."""
        self._done.set()
        self._thread.join()
        return {name: round(value, 2) for name, value in self.peak_gib.items()}

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            sizes = [_status(pid) for pid in _descendants(self._root)]
            now = {
                "all": sum(rss for rss, _ in sizes),
                "all, not backed by files": sum(anonymous for _, anonymous in sizes),
                "largest process": max((rss for rss, _ in sizes), default=0.0),
            }
            self.peak_gib = {name: max(self.peak_gib[name], value) for name, value in now.items()}


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
    found, fresh = {root}, {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return sorted(found)


def _status(pid: int) -> tuple[float, float]:
    """(resident, anonymous) GiB of a process; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = {
        line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines if line.startswith(("VmRSS", "RssAnon"))
    }
    return sizes.get("VmRSS", 0.0), sizes.get("RssAnon", 0.0)


def launch(out: Path, recipe: Path, ds: Path, log: Path) -> subprocess.Popen[bytes]:
    """The README's command, in a session of its own."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS)]
    command += ["--master_port", "29655", str(ROOT / "launchers/pretrain.py"), "--ds", str(ds)]
    command += ["--recipe", str(recipe), "--out", str(out / "run")]
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    with log.open("wb") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 to the launcher and every rank."""
    for pid in reversed(_descendants(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(out: Path, recipe: Path, ds: Path, *, until: int, log: Path) -> dict[str, float]:
    """Runs until the checkpoint of step `until` is complete, then kills; to the end where that is the last."""
    began = time.time()
    process = launch(out, recipe, ds, log)
    memory = Memory(process.pid)
    final = out / "run/checkpoints" / f"step_{until:08d}/manifest.json"
    while process.poll() is None and not (until < STEPS and final.is_file()):
        time.sleep(0.5)
    if until < STEPS and process.poll() is None:
        kill_all(process)
    elif process.returncode != 0:
        sys.exit(f"the run ended with status {process.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")
    rows = read_rows(out / "run/metrics.jsonl")
    for row in (row for row in rows if row["attempt"] == rows[-1]["attempt"]):
        times = {key.removeprefix("time/"): round(row[key], 1) for key in row if key.startswith("time/")}
        say(f"step {row['step']}: loss {row['loss']:.4f} gradient norm {row['optim/grad_norm']:.3f} seconds {times}")
    peaks = memory.stop()
    say(f"attempt took {time.time() - began:.0f} s in all; peak GiB {peaks}")
    return peaks


def folder_gb(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9


def check(out: Path) -> None:
    """Fourth step = AdamW and the average, longhand in fp64, from the third's checkpoint; over every element."""
    before, after = (Checkpoint(path, verify=False) for path in complete_checkpoints(out / "run/checkpoints")[-2:])
    row = read_metrics(out / "run")[-1]
    groups = after.manifest["groups"]
    beta1, beta2, eps = *groups[0]["betas"], groups[0]["eps"]
    step, lr, momentum = before.manifest["applied_steps"] + 1, row["optim/lr"], row["optim/momentum_ema"]
    moved = elements = average_moved = averages = 0
    worst = worst_average = 0.0
    for key in before.keys("master/"):
        name = key.removeprefix("master/")
        old, new = before.read(key).double(), after.read(key).double()
        first, second = after.read(f"exp_avg/{name}").double(), after.read(f"exp_avg_sq/{name}").double()
        gradient = (first - beta1 * before.read(f"exp_avg/{name}").double()) / (1 - beta1)
        expected_second = beta2 * before.read(f"exp_avg_sq/{name}").double() + (1 - beta2) * gradient.square()
        shape = after.manifest["tensors"][key]["shape"]
        decay = 0.05 if sum(size > 1 for size in shape) > 1 and not name.endswith(("pos_embed", "cls_token")) else 0.0
        denominator = (second / (1 - beta2**step)).sqrt() + eps
        expected = old * (1 - lr * decay) - lr * (first / (1 - beta1**step)) / denominator
        if name != "text_head.log_scale":  # it is clamped afterwards
            worst = max(worst, ((new - expected).abs() / (new.abs() + lr)).max().item())
        scale = second.max().item() + 1e-30
        if (gap := (second - expected_second).abs().max().item()) > 1e-3 * scale:
            sys.exit(f"exp_avg_sq of {name} is {gap} off beta2 * before + (1 - beta2) * gradient^2")
        moved, elements = moved + int((new != old).sum()), elements + new.numel()
        copy = f"ema/target.{name.removeprefix('student.')}"
        if name.startswith("student.") and copy in before.manifest["tensors"]:
            was, now = before.read(copy).double(), after.read(copy).double()
            formula = momentum * was + (1 - momentum) * new
            worst_average = max(worst_average, ((now - formula).abs() / (now.abs() + 1e-6)).max().item())
            average_moved, averages = average_moved + int((now != was).sum()), averages + now.numel()
    say(f"{elements / 1e6:.1f} M trained weights, {moved / elements:.1%} moved in the step after the restart")
    say(f"AdamW longhand: largest difference {worst:.1e} of |weight| + learning rate")
    say(f"{averages / 1e6:.1f} M averaged weights, {average_moved / averages:.1%} moved; longhand: {worst_average:.1e}")
    if worst > 1e-4 or worst_average > 1e-5 or moved < 0.5 * elements or not math.isfinite(worst):
        sys.exit("the step does not follow its formula")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/proof_1b")
    parser.add_argument("--backbone", default="internimage_h")
    options = parser.parse_args()
    out = options.out.resolve()
    if out.exists():
        sys.exit(f"--out: {out} exists; needed: a new directory")
    out.mkdir(parents=True)
    free = shutil.disk_usage(out).free / 1e9
    if options.backbone == "internimage_h" and free < DISK_GB:
        out.rmdir()
        sys.exit(f"free disk: got {free:.0f} GB at {out.parent}; needed: {DISK_GB} GB")
    torch.set_num_threads(2)
    began = time.time()
    recipe, ds = write_recipe(out, options.backbone), write_ds(out)
    say(f"{options.backbone}, {RANKS} ranks, {torch.__version__}, {os.cpu_count()} cores, {free:.0f} GB free")
    first = run(out, recipe, ds, until=STEPS - 1, log=out / "first.log")
    say(f"checkpoint of step {STEPS - 1} is complete: {folder_gb(out / 'run/checkpoints'):.1f} GB; all ranks killed")
    say(f"on disk for optimizer and average: {folder_gb(out / 'nvme'):.1f} GB")
    second = run(out, recipe, ds, until=STEPS, log=out / "second.log")
    events = [row["event"] for row in read_rows(out / "run/events.jsonl")]
    if "resume" not in events:
        sys.exit("the second start did not resume")
    check(out)
    peak = max(first["all"], second["all"])
    say(f"peak of all processes together {peak:.2f} GiB; {(time.time() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
