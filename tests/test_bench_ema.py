"""The bench of the target's average: what it counts is what the designs must send and hold, and they agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S
from tiny import ROOT, environment, recipe, write_recipe

from m3i_large.bench_ema import bench_ema
from m3i_large.errors import UserError
from m3i_large.recipe import load_recipe, validate

ZERO3 = ROOT / "ds_configs/zero3.json"


@pytest.mark.slow
def test_what_is_counted_and_that_the_designs_agree(tmp_path: Path) -> None:
    ranks = 2
    found = bench_ema(validate(recipe(tmp_path)), ds=ZERO3, ranks=ranks, rows=8)
    sharded, gathered, first = found["designs"]
    assert [row["design"] for row in found["designs"]] == ["sharded", "gathered", "first rank"]
    whole = 4 * found["parameters"]
    assert (sharded["calls"], sharded["bytes"], sharded["gathered"]) == ({}, 0, 0)
    # A parameter's runs are of equal length, so at most ranks - 1 elements of it are padding.
    tensors = gathered["calls"]["broadcast"]
    assert whole / ranks - 4 * tensors <= sharded["resident_others"] <= sharded["resident_first"]
    assert sharded["resident_first"] <= whole / ranks + 4 * tensors
    for row in (gathered, first):
        assert row["calls"] == {"allgather_base": 2 * tensors, "broadcast": tensors}
        assert 3 * whole <= row["bytes"] <= 3 * whole + 2 * 4 * ranks * tensors
        assert row["gathered"] == 2 * whole
    assert (gathered["resident_first"], gathered["resident_others"]) == (whole, whole)
    assert (first["resident_first"], first["resident_others"]) == (whole, 0)
    assert all(0 <= row["difference"] < 2e-6 for row in found["designs"])
    assert 0 < found["bf16"]["moved"] < 0.5 and found["bf16"]["distance"] < 0.5


@pytest.mark.slow
def test_the_command_prints_json_alone(tmp_path: Path) -> None:
    # bf16: the gathered designs average rounded weights, ours the optimizer's.
    file = write_recipe(tmp_path / "tiny.yaml", recipe(tmp_path, precision="bf16"))
    command = [sys.executable, "-c", "from m3i_large.cli import main; main()", "bench", "ema", "--json", "--ranks", "1"]
    command += ["--recipe", str(file), "--ds", str(ZERO3)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)
    found = json.loads(done.stdout)
    assert (done.returncode, found["ranks"], found["precision"]) == (0, 1, "bf16")
    assert found["designs"][0]["difference"] < 2**-8  # half a unit in the last place of weights below 2


def test_what_has_no_such_average_is_refused(tmp_path: Path) -> None:
    tiny = validate(recipe(tmp_path))
    with pytest.raises(UserError, match="stage 2; needed: ZeRO-3"):
        bench_ema(tiny, ds=ROOT / "ds_configs/zero2.json", ranks=1, rows=8)
    classification = load_recipe("sp_classification", ["scale=demo"])
    with pytest.raises(UserError, match="got no term whose encoder is ema; needed: one"):
        bench_ema(classification, ds=ZERO3, ranks=1, rows=8)
