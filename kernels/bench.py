"""Times every operator with every implementation that runs here, prints a table, appends rows to results/<op>.csv.

    python kernels/bench.py [--op NAME] [--device cpu|cuda] [--quick] [--results DIRECTORY]

GB/s counts the bytes an implementation cannot avoid: every input read once, every output written once. Peak MiB is
what a call allocates beyond its arguments, measured on CUDA only.
"""

import argparse
import csv
import datetime
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from m3i_kernels.dispatch import resolve, use_backend
from m3i_kernels.ema_update import ema_update
from m3i_kernels.patch_mix import patch_mix

HERE = Path(__file__).parent
TIMES = ("p20_ms", "p50_ms", "p80_ms")
KEY = ("date", "commit", "device", "versions", "op", "shape", "dtype", "pass", "provider")
COLUMNS = (*KEY, *TIMES, "gb_per_s", "peak_mib")
L2_FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2: each run finds its data in memory, as in training
Shape = tuple[int, ...]


class Case(NamedTuple):
    """One thing to time: what to call, and the bytes it must move."""

    call: Callable[[], object]
    num_bytes: int


def patch_mix_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """`shape` is (N, H, W, P)."""
    N, H, W, P = shape
    target, other = (torch.randint(0, 256, (N, H, W, 3), dtype=torch.uint8, device=device) for _ in range(2))
    call = functools.partial(
        patch_mix,
        target,
        other,
        colour_NV34=torch.eye(3, 4, device=device).expand(N, 2, 3, 4).contiguous(),
        solarize_NV=torch.rand(N, 2, device=device) * 2,
        flip_NV=torch.rand(N, 2, device=device) < 0.5,
        partner_N=torch.arange(N, device=device).roll(1),
        mask_NPP=torch.rand(N, P, P, device=device) < 0.5,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        dtype=dtype,
    )
    return Case(call, N * H * W * (6 + 6 * dtype.itemsize))


def ema_update_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """`shape` is (number of parameters,)."""
    ema, source = torch.randn(shape, device=device), torch.randn(shape, device=device)
    out = torch.empty(shape, dtype=dtype, device=device)
    call = functools.partial(ema_update, ema, source, momentum=0.999, out=out)
    return Case(call, ema.numel() * (12 + dtype.itemsize))


# op -> (how to build a case, shapes from small to large)
OPS: dict[str, tuple[Callable[[Shape, torch.dtype, torch.device], Case], list[Shape]]] = {
    "patch_mix": (patch_mix_case, [(96, 64, 64, 8), (64, 224, 224, 14), (256, 224, 224, 14)]),
    "ema_update": (ema_update_case, [(2**20,), (2**24 + 1,), (2**27,)]),
}


def milliseconds(call: Callable[[], object], device: torch.device, *, budget_s: float = 1.0) -> list[float]:
    """Returns the duration of each of 5 to 100 runs, about `budget_s` in all, after two that do not count."""
    cuda = device.type == "cuda"
    flush = torch.empty(L2_FLUSH_BYTES if cuda else 0, dtype=torch.uint8, device=device)
    durations: list[float] = []
    for _ in range(2):
        call()
    stop = time.perf_counter() + budget_s
    while len(durations) < 5 or (len(durations) < 100 and time.perf_counter() < stop):
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            durations.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            durations.append((time.perf_counter() - begin) * 1e3)
    return durations


def peak_mib(call: Callable[[], object], device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.1f}"


def providers(op: str, device: torch.device) -> Iterator[str]:
    """Yields the implementations of `op` that run on `device`."""
    for provider in ("reference", "triton"):
        with use_backend(provider):
            try:
                yield resolve(op, device)
            except ValueError:  # not written, or not for this device
                continue


def rows(op: str, device: torch.device, *, quick: bool) -> Iterator[dict[str, str]]:
    """Yields one result a shape, dtype and provider."""
    build, shapes = OPS[op]
    common = {"date": datetime.date.today().isoformat(), "commit": commit(), "device": device_name(device), "op": op}
    for shape in shapes[:1] if quick else shapes:
        for dtype in (torch.bfloat16, torch.float32):
            case = build(shape, dtype, device)
            for provider in providers(op, device):
                with use_backend(provider):
                    times = torch.tensor(milliseconds(case.call, device, budget_s=0.05 if quick else 1.0))
                    peak = peak_mib(case.call, device)
                quantiles = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8])).tolist()
                yield common | {
                    "versions": versions(provider),
                    "shape": "x".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": "forward",
                    "provider": provider,
                    **{name: f"{value:.4f}" for name, value in zip(TIMES, quantiles, strict=True)},
                    "gb_per_s": f"{case.num_bytes / quantiles[1] / 1e6:.2f}",
                    "peak_mib": peak,
                }


def commit() -> str:
    """Returns the short commit, `-dirty` where the tree differs from it, `unknown` outside a repository."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()}"


def versions(provider: str) -> str:
    found = f"torch {torch.__version__}"
    if provider == "triton":
        import triton

        found += f" triton {triton.__version__}"
    return found


def append(path: Path, result: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(result)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPS), help="one operator instead of all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="smallest shape, few runs: does it work?")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the CSV files")
    options = parser.parse_args(arguments)
    shown = ("op", "shape", "dtype", "provider", *TIMES, "gb_per_s", "peak_mib")
    sys.stdout.write("".join(f"{name:>16}" for name in shown) + "\n")
    for op in [options.op] if options.op else OPS:
        for result in rows(op, torch.device(options.device), quick=options.quick):
            append(options.results / f"{op}.csv", result)
            sys.stdout.write("".join(f"{result[name]:>16}" for name in shown) + "\n")


if __name__ == "__main__":
    main()
