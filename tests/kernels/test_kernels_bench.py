"""The benchmark runs on a CPU and only ever appends."""

import csv
import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench.py"


@pytest.fixture
def bench():
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
    assert len(rows) == 4 and {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        assert tuple(row) == bench.COLUMNS
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        bytes_per_parameter = {"bfloat16": 14, "float32": 16}[row["dtype"]]
        assert float(row["gb_per_s"]) == pytest.approx(
            2**20 * bytes_per_parameter / float(row["p50_ms"]) / 1e6, rel=0.05
        )
        assert (row["op"], row["provider"], row["pass"], row["peak_mib"]) == ("ema_update", "reference", "forward", "")
    assert capsys.readouterr().out.count("ema_update") == 4


def test_every_operator_has_cases(bench) -> None:
    package = BENCH.parent / "m3i_kernels"
    assert set(bench.OPS) == {path.parent.name for path in package.glob("*/op.py")}
