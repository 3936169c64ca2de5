"""Everything that needs a GPU, in one command of under 8 minutes: are the kernels right here, how fast, and what they
give the model that they exist for. Needs torch and Triton; pytest, and m3i_large's packages, are used where they are.

    python kernels/gpu_check.py [--results DIRECTORY]        (make gpu-check)

1 every operator against its reference in float64; 2 the kernel tests, where pytest is installed; 3 the benchmark, rows
appended to kernels/results; 4 a training step of InternImage-H. The summary comes last.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
BENCH_SECONDS, TEST_SECONDS = 0.15, 150
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
                found.setdefault(case.pass_, {})[case.provider] = case.call()
            for name, results in found.items():
                pairs = zip(*(_as_list(results[p]) for p in ("triton", "reference")), strict=True)
                errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
                limit = 1e-5 if dtype == torch.float32 else 1e-2
                state = "ok" if max(errors) < limit else "WRONG"
                shown = " ".join(f"{error:.1e}" for error in errors)
                lines.append(f"{state:5} {op} {shape} {dtype} {name}: {shown}")
    return lines


def _as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def run(title: str, *command: str, seconds: float) -> str:
    """Runs a step with the kernels' sources importable; its last lines, or why it did not run."""
    paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    environment.pop("TRITON_INTERPRET", None)
    sys.stdout.write(f"\n== {title}\n")
    sys.stdout.flush()
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, status = done.stdout, f"status {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        output, status = stopped.stdout or b"", f"stopped after {seconds:.0f} s"
    sys.stdout.write(output.decode(errors="replace")[-6000:])
    return f"{title}: {status}, {time.monotonic() - begin:.0f} s"


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
    errors = compare()
    sys.stdout.write("\n".join(errors) + "\n")
    tests = (
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/kernels",
        "--deselect",
        "tests/kernels/test_aot.py",
    )
    bench = (str(HERE / "bench.py"), "--budget", str(BENCH_SECONDS), "--results", str(options.results))
    summary = [
        run("kernel tests", sys.executable, *tests, seconds=TEST_SECONDS),
        run("benchmark", sys.executable, *bench, seconds=240),
    ]
    try:
        summary.append(train_step())
    except Exception as error:
        summary.append(f"InternImage-H step: failed, {type(error).__name__}: {str(error).splitlines()[0]}")
    wrong = [line for line in errors if not line.startswith("ok")]
    sys.stdout.write("\n== summary\n" + torch.cuda.get_device_name() + "\n")
    sys.stdout.write(
        "\n".join([*summary, *wrong, f"{len(errors) - len(wrong)} of {len(errors)} comparisons ok"]) + "\n"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
