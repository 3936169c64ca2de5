"""Everything that needs a GPU, in one command of under 8 minutes: are the kernels right here, how fast, and what they
give the model that they exist for. Needs torch and Triton; pytest, and m3i_large's packages, are used where they are.

    python kernels/gpu_check.py [--results DIRECTORY]        (make gpu-check)

1 every operator against its reference; 2 the kernel tests, where pytest is installed; 3 the benchmark, rows appended to
kernels/results; 4 a training step of InternImage-H. The summary comes last. Exits 1 where a comparison or a test fails
or the benchmark does not end by itself, 2 without a GPU.
"""

import argparse
import csv
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
BENCH_SECONDS, TEST_SECONDS = 0.15, 150
OUTPUT_CHARACTERS = 2000  # of each step; the summary must survive a log that keeps only its end
H_GMAC = 181.0  # InternImage-H's forward pass at 224 pixels, backbone alone


def compare() -> list[str]:
    """Relative errors of each fused operator's results; a line each."""
    import torch
    from bench_cases import OPS

    lines = []
    for op, shape in (("dcnv3", (2, 13, 9, 3, 32)), ("dcnv3", (2, 7, 5, 2, 16)), ("patch_mix", (5, 32, 48, 4))):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            found: dict[str, dict[str, Any]] = {}
            for case in OPS[op][0](shape, dtype, torch.device("cuda")):
                if case.provider in ("triton", "reference"):
                    found.setdefault(case.pass_, {})[case.provider] = case.call()
            for name, results in found.items():
                pairs = zip(*(_as_list(results[p]) for p in ("triton", "reference")), strict=True)
                limit = 1e-5 if dtype == torch.float32 else 1e-2
                lines.append(_verdict(f"{op} {shape} {dtype} {name}", pairs, limit))
    return lines


def _verdict(what: str, pairs: Iterable[tuple[Any, Any]], limit: float) -> str:
    """`ok` or `WRONG`, what was compared, and the relative error of every pair of tensors."""
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    state = "ok" if max(errors) < limit else "WRONG"
    return f"{state:5} {what}: " + " ".join(f"{error:.1e}" for error in errors)


def _as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def compare_ema(device: str = "cuda") -> list[str]:
    """The same of ema_update, which works in place."""
    import torch
    from m3i_kernels.dispatch import use_backend
    from m3i_kernels.ema_update import ema_update

    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for name in ("triton", "reference"):
            torch.manual_seed(0)
            memory = torch.randn(2, 3, 20000, device=device)
            begins = ((0, 0), (3, 3), (5, 8))  # both aligned, aligned alike, differently
            ema, source = ([memory[k, i, b[k] : b[k] + 9999] for i, b in enumerate(begins)] for k in range(2))
            out = [torch.empty_like(x, dtype=dtype) for x in ema]
            with use_backend(name):
                ema_update(ema, source, momentum=0.75, out=out)
            results.append([*ema, *out])
        limit = 1e-6 if dtype == torch.float32 else 1e-3
        lines.append(_verdict(f"ema_update {dtype}", zip(*results, strict=True), limit))
    return lines


def run(title: str, *command: str, seconds: float) -> tuple[str, bool]:
    """Runs a step with the kernels' sources importable; how it ended in a line, and whether well."""
    paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    environment.pop("TRITON_INTERPRET", None)
    sys.stdout.write(f"\n== {title}\n")
    sys.stdout.flush()
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, status = done.stdout, f"status {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        output, status = stopped.stdout or b"", f"stopped after {seconds:.0f} s"
    sys.stdout.write(output.decode(errors="replace")[-OUTPUT_CHARACTERS:])
    return f"{title}: {status}, {time.monotonic() - begin:.0f} s", status == "status 0"


def measured(results: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each file in the directory, which only ever grows."""
    rows = {}
    for path in sorted(results.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows[path.name] = list(csv.DictReader(file))
    return rows


def digest(rows: list[dict[str, str]]) -> list[str]:
    """A line an operator, shape and pass in bf16: the fused kernel, its share of a copy's bandwidth, the others."""
    copy = max((float(row["gb_per_s"]) for row in rows if row["op"] == "device_copy"), default=float("nan"))
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["dtype"] == "bfloat16" and row["op"] != "device_copy":
            cases.setdefault((row["op"], row["shape"], row["pass"]), {})[row["provider"]] = row
    lines = [f"device copy {copy:.0f} GB/s; bf16, median ms, share of the copy's bandwidth, times slower than triton:"]
    for case, providers in cases.items():
        fused = providers.pop("triton", None)
        ours = float(fused["p50_ms"]) if fused else float("nan")
        share = float(fused["gb_per_s"]) / copy if fused else float("nan")
        others = " ".join(f"{name} x{float(row['p50_ms']) / ours:.1f}" for name, row in providers.items())
        lines.append(f"{' '.join(case)}: {ours:.3f} ms {share:.0%}; {others}")
    return lines


def train_step(batch: int = 64) -> str:
    """Images per second of InternImage-H forward and backward at 224 pixels in bf16, blocks recomputed."""
    import torch

    try:
        from m3i_large.models import create_model
        from m3i_large.parallel.remat import rematerialize
    except ImportError as error:
        return f"InternImage-H step: not run, {error}"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = create_model("internimage_h", bridge=True).bfloat16()
        image = torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16)
    rematerialize(model.blocks)

    def step() -> None:
        model.tokens(image).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    seconds = min(_seconds(step) for _ in range(4))
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    peak = 2 * 8192**3 / min(_seconds(lambda: a @ a) for _ in range(4))
    speed = 3 * 2e9 * H_GMAC * batch / seconds
    memory = torch.cuda.max_memory_allocated() / 2**30
    return (
        f"InternImage-H step, batch {batch}, 224 px, bf16, recomputed blocks: {batch / seconds:.0f} images/s, "
        f"{speed / 1e12:.0f} TFLOP/s without the recomputation = {speed / peak:.0%} of a large product's "
        f"{peak / 1e12:.0f}; peak {memory:.1f} GiB"
    )


def _seconds(call: Any) -> float:
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the CSV files")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.exit(
            2, "gpu-check: no CUDA device is visible to torch; needed: one NVIDIA GPU of capability 8.0 or more\n"
        )
    sys.path[:0] = [str(HERE), str(ROOT)]
    errors = compare() + compare_ema()
    sys.stdout.write("\n".join(errors) + "\n")
    steps = []
    if importlib.util.find_spec("pytest") is None:
        steps.append(("kernel tests: not run, pytest is not installed", True))
    else:
        tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "--ignore=tests/kernels/test_aot.py")
        steps.append(run("kernel tests", sys.executable, *tests, seconds=TEST_SECONDS))
    before = measured(options.results)
    bench = (str(HERE / "bench.py"), "--budget", str(BENCH_SECONDS), "--results", str(options.results.resolve()))
    steps.append(run("benchmark", sys.executable, *bench, seconds=240))
    new = [row for name, rows in measured(options.results).items() for row in rows[len(before.get(name, [])) :]]
    try:
        training = train_step()
    except Exception as error:
        training = f"InternImage-H step: failed, {type(error).__name__}: {str(error).splitlines()[0]}"
    wrong = [line for line in errors if not line.startswith("ok")]
    summary = [torch.cuda.get_device_name(), *digest(new), *(line for line, _ in steps), training, *wrong]
    summary.append(f"{len(errors) - len(wrong)} of {len(errors)} comparisons ok")
    sys.stdout.write("\n== summary\n" + "\n".join(summary) + "\n")
    sys.exit(1 if wrong or not all(ok for _, ok in steps) else 0)


if __name__ == "__main__":
    main()
