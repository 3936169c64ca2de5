"""Times every operator with every implementation that runs here, prints a table, appends rows to results/<op>.csv.

    python kernels/bench.py [--op NAME] [--device cpu|cuda] [--quick] [--budget SECONDS] [--results DIRECTORY]

GB/s counts the bytes an implementation cannot avoid: every input read once, every output written once. `of copy` is
its share of a large copy's GB/s in the same run. Peak MiB is what a call allocates beyond its arguments, measured on
CUDA only. On a CPU only the first shape of each operator is timed, and no larger one.
"""

import argparse
import csv
import datetime
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_cases import OPS

HERE = Path(__file__).parent
TIMES = ("p20_ms", "p50_ms", "p80_ms")
KEY = ("date", "commit", "device", "versions", "op", "shape", "dtype", "pass", "provider")
COLUMNS = (*KEY, *TIMES, "gb_per_s", "peak_mib")
L2_FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2: each run finds its data in memory, as in training


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


def rows(op: str, device: torch.device, *, quick: bool, budget_s: float) -> Iterator[dict[str, str]]:
    """Yields one result a shape, dtype, provider and pass."""
    build, shapes = OPS[op]
    common = {"date": datetime.date.today().isoformat(), "commit": commit(), "device": device_name(device), "op": op}
    for shape in shapes[:1] if quick or device.type == "cpu" else shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for case in build(shape, dtype, device):
                try:
                    times = torch.tensor(milliseconds(case.call, device, budget_s=budget_s))
                except RuntimeError as error:  # out of memory, or a peer's compiler: the others still count
                    why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                    sys.stderr.write(f"{op} {shape} {dtype} {case.pass_} {case.provider}: not timed, {why}\n")
                    continue
                quantiles = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8])).tolist()
                yield common | {
                    "versions": versions(case.provider),
                    "shape": "x".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": case.pass_,
                    "provider": case.provider,
                    **{name: f"{value:.4f}" for name, value in zip(TIMES, quantiles, strict=True)},
                    "gb_per_s": f"{case.num_bytes / quantiles[1] / 1e6:.2f}",
                    "peak_mib": peak_mib(case.call, device),
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
    if provider in ("triton", "torch.compile"):
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
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each measurement (default 1)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the CSV files")
    options = parser.parse_args(arguments)
    shown = ("op", "shape", "dtype", "pass", "provider", *TIMES, "gb_per_s", "peak_mib")
    sys.stdout.write("".join(f"{name:>15}" for name in (*shown, "of copy")) + "\n")
    copy = 0.0  # GB/s of the largest copy so far
    budget_s = 0.05 if options.quick else options.budget
    for op in OPS if options.op is None else dict.fromkeys(("device_copy", options.op)):
        for result in rows(op, torch.device(options.device), quick=options.quick, budget_s=budget_s):
            append(options.results / f"{op}.csv", result)
            speed = float(result["gb_per_s"])
            copy = max(copy, speed) if op == "device_copy" else copy
            line = "".join(f"{result[name]:>15}" for name in shown) + f"{speed / copy:>15.0%}\n"
            sys.stdout.write(line)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
