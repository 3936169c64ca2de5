"""How many ranks can run now, and which numbers of ranks leave a recipe's batches as they are."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from m3i_large.data.mixture import default_lanes
from m3i_large.errors import OutageError, UserError
from m3i_large.recipe import Recipe
from m3i_large.supervise.command import Command, slots

PROBE = "import torch; torch.ones(8, device='cuda').sum().item()"
PROBE_S = 120.0  # importing torch on a cold disk takes a minute; a GPU that is gone may hang for ever


@dataclass(frozen=True)
class Available:
    """Ranks that can run now; `devices` are this machine's healthy GPUs where it has GPUs."""

    count: int
    devices: tuple[int, ...] = ()


def valid_world_sizes(recipe: Recipe) -> list[int]:
    """Numbers of ranks W on which every micro-step holds the same samples: W x accumulation divides the lanes."""
    train = recipe.train
    lanes = recipe.data.lanes or default_lanes(train.global_batch)
    sizes = [w for w in range(1, lanes + 1) if lanes % (w * train.accumulation) == 0 and train.contrast_batch % w == 0]
    return [w for w in sizes if train.micro_batch in (None, train.contrast_batch // w)]


def largest_world(valid: Sequence[int], available: int) -> int:
    """The largest valid number of ranks that fits; OutageError where none does."""
    fitting = [w for w in valid if w <= available]
    if not fitting:
        raise OutageError(f"{available} ranks available; needed: one of {', '.join(map(str, valid))}")
    return max(fitting)


def available_ranks(command: Command, *, ranks_command: str | None) -> Available:
    """What can run now, at most what `command` asks for.

    By `ranks_command` (a shell command that prints the number) where given, else the hostfile's slots, else this
    machine's GPUs that answer, else the number asked for. OutageError where that cannot be found out.
    """
    asked = command.count
    if ranks_command:
        found = Available(_printed_number(ranks_command))
    elif command.hostfile:
        found = Available(sum(slots(command.hostfile).values()))
    elif command.launcher != "python" and (listed := listed_devices()):
        devices = answering(listed)
        found = Available(len(devices), tuple(devices))
    else:
        return Available(asked or 1)
    return Available(min(found.count, asked or found.count), found.devices)


def _printed_number(command: str) -> int:
    try:
        result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        raise OutageError(f"--ranks-command: does not end within {PROBE_S:g} s") from None
    text = result.stdout.strip()
    if result.returncode or not text.isdigit():
        raise OutageError(f"--ranks-command: printed {text!r} with status {result.returncode}; needed: a number")
    return int(text)


def listed_devices() -> list[int]:
    """GPUs of this machine that may be used, by nvidia-smi and CUDA_VISIBLE_DEVICES; none on a CPU machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible == "" or not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        raise OutageError(f"nvidia-smi does not answer within {PROBE_S:g} s") from None
    found = [int(line) for line in result.stdout.split() if line.isdigit()]
    if visible is None:
        return found
    if not all(name.strip().isdigit() for name in visible.split(",")):
        raise UserError(f"CUDA_VISIBLE_DEVICES: got {visible!r}; needed: indexes such as 0,1")
    return [int(name) for name in visible.split(",") if int(name) in found]


def answering(devices: Sequence[int]) -> list[int]:
    """Those of `devices` that compute a sum in a process of their own; all are asked at the same time."""
    probes = {
        device: subprocess.Popen(
            [sys.executable, "-c", PROBE],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(device)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for device in devices
    }
    return [device for device, process in probes.items() if _answers(process)]


def _answers(process: "subprocess.Popen[bytes]") -> bool:
    try:
        return process.wait(timeout=PROBE_S) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        return False
