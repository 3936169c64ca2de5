"""Where a step's time goes, and what share of the device's peak it uses."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# Parts of a step that run on the device, in the order of the metrics; waiting for data and saving are the host's.
DEVICE_PHASES = ("forward", "backward", "optimizer", "ema")
Phase = Callable[[str, int], None]


class StepClock:
    """Measures a step's phases: `with clock("forward"): ...`.

    On a GPU the phases of DEVICE_PHASES are timed by events, without waiting for the device: `row` is to be called
    after the step has waited for it, as the reduction of the losses does.

    Args:
        device: where the step runs.
        on_phase: told (phase, step) as each begins.
    """

    def __init__(self, device: torch.device, *, on_phase: Phase) -> None:
        self._on_phase, self._cuda = on_phase, device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self.step, self._began = 0, time.perf_counter()

    def start(self, step: int) -> None:
        """Begins a step."""
        self.step, self._began = step, time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._on_phase(phase, self.step)
        if self._cuda and phase in DEVICE_PHASES:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
            return
        began = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - began

    def row(self) -> dict[str, float]:
        """Seconds of the step so far, and of its phases; checkpoints and pictures count in the row that follows."""
        for phase, begin, end in self._events:
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        self._events.clear()
        self._seconds["optimizer"] -= self._seconds["ema"]  # which is done inside, while weights are in memory
        taken, self._seconds = self._seconds, defaultdict(float)
        times = {f"time/{phase}_s": taken[phase] for phase in (*DEVICE_PHASES, "checkpoint", "pictures")}
        return {"data/wait_s": taken["data"], "time/step_s": time.perf_counter() - self._began, **times}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a sample, forward and backward, and of a device per second at its best.

    Attributes:
        model: what the model needs.
        hardware: with what is computed twice (activation checkpointing).
        peak: of one device, in the precision of the run.
    """

    model: float
    hardware: float
    peak: float


def utilisation(samples_per_s: float, *, world: int, flops: Flops | None) -> dict[str, float]:
    """Shares of the devices' peak: model FLOPs (MFU) and all computed ones (HFU); empty where the peak is unknown."""
    if flops is None:
        return {}
    share = samples_per_s / (world * flops.peak)
    return {"perf/mfu": share * flops.model, "perf/hfu": share * flops.hardware}


def memory_gib(device: torch.device) -> float:
    """The most that this process held: of the device's memory on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
