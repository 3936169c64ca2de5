"""Every kernel compiles for every GPU we know, keeps its values in registers, and moves 16 bytes at a time."""

import json
import os
import subprocess
import sys

import pytest
from patience import PATIENCE_S

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "m3i_kernels.aot", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_operator_compiles_for_every_capability_without_a_spill(compiled: list[dict]) -> None:
    assert {(row["op"], row["capability"]) for row in compiled} == {
        (op, capability) for op in ("dcnv3", "ema_update", "patch_mix") for capability in (80, 90, 100)
    }
    assert [row for row in compiled if row["spill_bytes"]] == []
    assert all(0 < row["registers"] <= 255 for row in compiled)


@pytest.mark.slow
def test_loads_are_as_wide_as_claimed(compiled: list[dict]) -> None:
    assert {row["op"] for row in compiled if row["wide_loads"]} >= {"ema_update"}
    for row in compiled:
        wide = sum(
            n for kind, n in row["accesses"].items() if kind.startswith(("ld.global.v4.b32", "ld.global.v2.b64"))
        )
        assert wide >= row["wide_loads"], row


@pytest.mark.slow
def test_ema_update_and_patch_mix_move_vectors_and_keep_values_in_their_threads(compiled: list[dict]) -> None:
    for row in (row for row in compiled if row["op"] in ("ema_update", "patch_mix")):
        kinds, width = row["accesses"], "v2" if row["variant"].endswith("16") else "v4"
        assert row["shared_bytes"] == 0 and row["registers"] <= 112, row
        if row["variant"].startswith("words"):  # four pixels a thread: three words, and one store in each plane
            assert kinds[f"st.global.{width}.b32"] == 12 and not any(k.startswith("st.global.b") for k in kinds), row
            assert kinds["ld.global.b8"] <= 4, row
        if row["op"] == "ema_update":
            assert kinds["ld.global.v4.b32"] == 8 and kinds["st.global.v4.b32"] >= 4, row


@pytest.mark.slow
def test_dcnv3_reads_values_and_adds_gradients_in_vectors(compiled: list[dict]) -> None:
    for row in (row for row in compiled if row["op"] == "dcnv3" and row["variant"].startswith(("forward", "backward"))):
        wide = sum(count for kind, count in row["accesses"].items() if kind.startswith("ld.global.v4"))
        assert wide >= 36, row  # nine points, four corners
        assert "st.global.v4.b32" in row["accesses"] or row["variant"].startswith("backward"), row
        if row["variant"].startswith("backward") and row["capability"] >= 90:
            kinds = [kind for kind in row["accesses"] if kind.startswith(("atom", "red"))]
            assert kinds and all(".v4.f32" in kind for kind in kinds), row


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "m3i_kernels.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr
