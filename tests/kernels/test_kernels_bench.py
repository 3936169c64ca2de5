"""The benchmark runs on a CPU and only ever appends."""

import csv
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S

# Before a test changes the environment: Triton's own functions are made for its interpreter, or not, on import.
pytest.importorskip("m3i_kernels.dcnv3.fused")

BENCH = Path(__file__).parents[2] / "kernels" / "bench.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # whose times mean nothing
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("kernels_bench", BENCH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_appends_one_row_a_measurement(bench, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--quick", "--device", "cpu", "--op", "ema_update", "--results", str(tmp_path)]
    bench.main(arguments)
    first = (tmp_path / "ema_update.csv").read_text()
    bench.main(arguments)
    second = (tmp_path / "ema_update.csv").read_text()
    assert second.startswith(first) and second.count("date,commit,device") == 1
    rows = list(csv.DictReader(second.splitlines()))
    assert len(rows) == 8 and {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        assert tuple(row) == bench.COLUMNS
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        bytes_per_parameter = {"bfloat16": 14, "float32": 16}[row["dtype"]]
        assert float(row["gb_per_s"]) == pytest.approx(
            2**20 * bytes_per_parameter / float(row["p50_ms"]) / 1e6, rel=0.05
        )
        assert (row["op"], row["pass"], row["peak_mib"]) == ("ema_update", "forward", "")
        assert row["provider"] in ("reference", "torch foreach")
    assert capsys.readouterr().out.count("ema_update") == 8
    copies = list(csv.DictReader((tmp_path / "device_copy.csv").read_text().splitlines()))
    assert float(copies[0]["gb_per_s"]) == pytest.approx(2**24 * 4 / float(copies[0]["p50_ms"]) / 1e6, rel=0.05)


@pytest.mark.parametrize("op", ["dcnv3", "ema_update", "patch_mix"])
def test_every_provider_computes_the_same(bench, op: str) -> None:
    """What is timed side by side must be the same work."""
    build, shapes = bench.OPS[op]
    shape = (2, 5, 4, 2, 8) if op == "dcnv3" else shapes[0] if op == "ema_update" else (4, 8, 8, 2)
    results: dict[str, dict[str, list[torch.Tensor]]] = {}
    for case in build(shape, torch.float32, torch.device("cpu")):
        found = case.call()
        if op != "ema_update":  # which works in place
            results.setdefault(case.pass_, {})[case.provider] = list(found if isinstance(found, tuple) else [found])
    for by_provider in results.values():
        first, *others = by_provider.values()
        for other in others:
            for a, b in zip(other, first, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert set(results) == {"dcnv3": {"forward", "backward", "both"}, "patch_mix": {"forward"}}.get(op, set())


def test_every_operator_has_cases(bench) -> None:
    package = BENCH.parent / "m3i_kernels"
    assert set(bench.OPS) - {"device_copy"} == {path.parent.name for path in package.glob("*/op.py")}


def test_a_backward_pass_is_timed_on_the_implementation_it_is_named_after(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if device.type == "cpu" else "0")
    ran: list[str] = []
    for name in ("reference", "fused"):
        module = importlib.import_module(f"m3i_kernels.dcnv3.{name}")
        real = module.dcnv3_backward
        monkeypatch.setattr(module, "dcnv3_backward", lambda *x, n=name, f=real: ran.append(n) or f(*x))
    build, _ = bench.OPS["dcnv3"]
    for case in build((1, 3, 2, 1, 8), torch.float32, device):
        ran.clear()
        case.call()
        expected = {"reference": ["reference"], "triton": ["fused"]}.get(case.provider, [])
        assert ran == (expected if case.pass_ != "forward" else []), case


def test_what_cannot_be_timed_is_named_and_the_rest_goes_on(bench, tmp_path: Path, monkeypatch, capsys) -> None:
    def cases(shape, dtype, device):
        def fails() -> None:
            raise torch.OutOfMemoryError("too large\nby far")

        yield bench_cases.Case("big", "forward", fails, 8)
        yield bench_cases.Case("small", "forward", lambda: None, 8)

    bench_cases = importlib.import_module("bench_cases")
    monkeypatch.setitem(bench.OPS, "ema_update", (cases, [(2,)]))
    bench.main(["--quick", "--device", "cpu", "--op", "ema_update", "--results", str(tmp_path)])
    assert {row["provider"] for row in csv.DictReader((tmp_path / "ema_update.csv").open())} == {"small"}
    assert "big: not timed, OutOfMemoryError: too large\n" in capsys.readouterr().err


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))
    return importlib.import_module("gpu_check")


def test_a_step_of_the_gpu_check_shows_its_end_and_how_it_ended(gpu_check, capsys: pytest.CaptureFixture) -> None:
    command = (sys.executable, "-c", "print('first' * 9999); import sys; sys.exit('last')")
    line, well = gpu_check.run("a step", *command, seconds=60)
    assert line.startswith("a step: status 1, ") and not well
    shown = capsys.readouterr().out
    assert shown.endswith("last\n") and len(shown) < gpu_check.OUTPUT_CHARACTERS + 100
    line, well = gpu_check.run("good", sys.executable, "-c", "import m3i_kernels, bench_cases", seconds=60)
    assert line.startswith("good: status 0, ") and well
    line, well = gpu_check.run("slow", sys.executable, "-c", "import time; time.sleep(60)", seconds=1)
    assert line.startswith("slow: stopped after 1 s") and not well


def test_the_gpu_check_compares_averages(gpu_check, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = gpu_check.compare_ema(device)
    assert len(lines) == 2 and all(line.startswith("ok") for line in lines), lines
    fused = importlib.import_module("m3i_kernels.ema_update.fused")
    right = fused.ema_update
    monkeypatch.setattr(fused, "ema_update", lambda *x, momentum, **more: right(*x, momentum=momentum * 1.01, **more))
    assert all(line.startswith("WRONG") for line in gpu_check.compare_ema(device))


def test_the_digest_compares_with_the_fused_kernel_and_a_copy(gpu_check, bench, tmp_path: Path) -> None:
    row = dict.fromkeys(bench.COLUMNS, "") | {"dtype": "bfloat16", "pass": "forward", "shape": "4x2"}
    for op, provider, p50, speed in (
        ("device_copy", "torch", "1", "2000"),
        ("patch_mix", "reference", "3", "500"),
        ("patch_mix", "triton", "1", "1500"),
        ("ema_update", "reference", "1", "100"),
    ):
        bench.append(tmp_path / f"{op}.csv", row | {"op": op, "provider": provider, "p50_ms": p50, "gb_per_s": speed})
    lines = gpu_check.digest([row for rows in gpu_check.measured(tmp_path).values() for row in rows])
    assert lines[0].startswith("device copy 2000 GB/s")
    assert lines[1:] == [
        "ema_update 4x2 forward: nan ms nan%; reference xnan",
        "patch_mix 4x2 forward: 1.000 ms 75%; reference x3.0",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_the_gpu_check_without_a_gpu_is_one_line() -> None:
    command = [sys.executable, str(BENCH.with_name("gpu_check.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "gpu-check: no CUDA device is visible to torch; needed: one NVIDIA GPU of capability 8.0 or more\n"
    )
