"""m3i data index, check and stats as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from tiny import ROOT, environment, recipe, write_data, write_recipe

from m3i_large.cli import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", samples=12)


@pytest.fixture
def chosen(data: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml", recipe(data))


@pytest.fixture
def m3i(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in this process -> (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["m3i", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    def refused(*arguments: object) -> str:
        status, out, err = run(*arguments)
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
        return err

    run.refused = refused  # type: ignore[attr-defined]
    return run


def test_index_check_and_stats_of_whole_data(m3i: Any, chosen: Path, data: Path) -> None:
    status, out, _ = m3i("data", "index", chosen, "--json")
    results = json.loads(out)
    assert status == 0 and [r["source"] for r in results] == ["first", "second", "labelled"]
    size = os.path.getsize(data / "first-000000.tar")
    assert results[0] == {
        "source": "first", "shards": 1, "num_bytes": size, "samples": 12, "eligible": 12, "flags": {}, "damaged": 0,
    }  # fmt: skip
    assert sorted(p.name for p in (data / ".m3i").glob("*.jsonl")) == ["first.jsonl", "labelled.jsonl", "second.jsonl"]
    status, out, _ = m3i("data", "index", chosen, "data.sources.0.filters.min_size=1000")
    assert status == 0 and "none" in out and " 0 " in out
    assert m3i("data", "index", chosen)[0] == 0
    for more in ([], ["--quick"], ["--jobs", 2]):
        status, out, _ = m3i("data", "check", chosen, *more)
        assert (status, out.splitlines()) == (
            0,
            [f"{name}: 1 shards as indexed" for name in ("first", "second", "labelled")],
        )
    assert m3i("data", "check", chosen, "--json")[:2] == (0, '{"first": [], "second": [], "labelled": []}\n')
    status, out, _ = m3i("data", "stats", chosen, "--json")
    first, _, labelled = json.loads(out)
    assert status == 0 and first["eligible"] == 12 and first["quantiles"]["width"] == [48.0] * 7
    assert len(first["at"]) == 7 and labelled["classes"] == {"0": 4, "1": 4, "2": 4} and first["classes"] == {}


def test_what_check_finds_is_status_1(m3i: Any, chosen: Path, data: Path) -> None:
    assert m3i("data", "index", chosen)[0] == 0
    path = data / "second-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    assert m3i("data", "check", chosen, "--quick")[0] == 0
    status, out, err = m3i("data", "check", chosen)
    assert status == 1 and f"{path}: its bytes have changed" in out and "first: 1 shards as indexed" in out and not err
    status, out, _ = m3i("data", "check", chosen, "--json")
    assert status == 1 and [len(lines) for lines in json.loads(out).values()] == [0, 1, 0]
    (data / "first-000001.tar").write_bytes(bytes(10240))
    status, out, _ = m3i("data", "check", chosen, "--quick")
    assert status == 1 and out.startswith("first: 1 shards are not in the index, such as first-000001.tar\n")
    path.unlink()
    status, out, _ = m3i("data", "check", chosen, "--quick")
    assert status == 1 and f"{path}: No such file" in out and "there is no file" in out


def test_stats_in_words(m3i: Any, chosen: Path, data: Path, tmp_path: Path) -> None:
    status, out, _ = m3i("data", "stats", chosen, "--out", tmp_path / "plots")
    assert status == 0 and "first: 1 of 1 shards" in out and "12 samples, 12 eligible, 0.0% letterboxed" in out
    assert "classes: 3 of 3, samples each 4 to 4, half at most 4; largest index 2" in out and "NOT USABLE" not in out
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"first.png", "second.png", "labelled.png"}
    assert f"written: {tmp_path}/plots/first.png, " in out
    status, out, _ = m3i("data", "stats", chosen, "data.num_classes=2")
    assert status == 0 and "NOT USABLE: classes up to 2; needed: below data.num_classes 2" in out
    # Where .cls is not what is trained on, its values say nothing of num_classes.
    (data / "classes.json").write_text('{"0": 0, "1": 1, "2": 0}')
    values = recipe(data)
    values["data"]["num_classes"] = 2
    values["data"]["sources"][2]["class_map"] = "classes.json"
    status, out, _ = m3i("data", "stats", write_recipe(tmp_path / "mapped.yaml", values))
    assert status == 0 and "classes: 3, samples each 4 to 4" in out and "NOT USABLE" not in out


def test_salvage_and_export(m3i: Any, chosen: Path, data: Path, tmp_path: Path) -> None:
    path = data / "first-000000.tar"
    os.truncate(path, os.path.getsize(path) // 2)
    assert f"source first: shard {path}: the file ends" in m3i.refused("data", "index", chosen)
    assert "needed: m3i data index first" in m3i.refused("data", "check", chosen)
    status, out, _ = m3i("data", "index", chosen, "--salvage", "--json", "--export", f"energon={tmp_path}/e")
    (first, *_) = json.loads(out)
    assert status == 0 and first["damaged"] == 1 and 3 <= first["samples"] <= 6
    assert (tmp_path / "e/first-000000.tar.idx").stat().st_size == 8 * (first["samples"] + 1)
    status, out, _ = m3i("data", "index", chosen, "--salvage")
    assert status == 0 and "1 shards" in out and "damaged" in out
    status, out, _ = m3i("data", "check", chosen, "--quick")
    assert status == 1 and f"{path}: damaged: the file ends" in out
    both = ["--export", f"energon={tmp_path}/e", "--export", f"dali={tmp_path}/d"]
    assert m3i("data", "index", chosen, "--salvage", *both)[0] == 0
    assert sorted(p.name for p in (tmp_path / "d").iterdir())[0] == "first-000000.idx"


def test_parts_are_indexed_apart_and_joined(m3i: Any, chosen: Path, data: Path) -> None:
    for number in range(1, 5):  # five shards of the first source
        shutil.copy(data / "first-000000.tar", data / f"first-{number:06d}.tar")
    index, parts = data / ".m3i", []
    for part in range(3):
        status, out, _ = m3i("data", "index", chosen, "--part", f"{part}/3", "--json")
        assert status == 0
        parts.append([r["shards"] for r in json.loads(out)])
    assert parts == [[2, 1, 1], [2, 0, 0], [1, 0, 0]]
    assert not list(index.glob("*.jsonl"))
    written = {p: p.stat().st_mtime_ns for p in index.rglob("*.index")}
    status, out, _ = m3i("data", "index", chosen, "--json")
    assert status == 0 and [r["samples"] for r in json.loads(out)] == [60, 12, 12]
    assert len(written) == 7 and {p: p.stat().st_mtime_ns for p in index.rglob("*.index")} == written
    assert m3i("data", "check", chosen)[0] == 0
    for wrong in ("3/3", "1", "/2", "-1/3", "a/b", "0/0"):
        assert f"--part: got {wrong}; needed: I/N" in m3i.refused("data", "index", chosen, f"--part={wrong}")


def test_mistakes_are_one_line(m3i: Any, chosen: Path, data: Path, tmp_path: Path) -> None:
    refused = m3i.refused
    assert "--export: got ['arrow=x']; needed: energon=DIR or dali=DIR" in refused(
        "data", "index", chosen, "--export", "arrow=x"
    )
    assert "--export: got ['dali=']" in refused("data", "index", chosen, "--export", "dali=")
    (tmp_path / "file").write_text("")
    for option, command in (("--export", "index"), ("--out", "stats")):
        value = f"dali={tmp_path}/file/x" if option == "--export" else f"{tmp_path}/file/x"
        line = refused("data", command, chosen, option, value)
        assert f"{option}: got {tmp_path}/file/x (Not a directory); needed: a directory that can be written" in line
    assert "data.index: " in refused("data", "index", chosen, f"data.index={tmp_path}/file")
    assert "no index in" in refused("data", "check", chosen, f"data.index={tmp_path}/none")
    assert "which is no directory" in refused("data", "index", chosen, f"data.root={tmp_path}/none")
    assert "--jobs" in refused("data", "index", chosen, "--jobs", 0)
    assert "--shards" in refused("data", "stats", chosen, "--shards", -1)
    assert "did you mean 'demo'" in refused("data", "stats", "deom")
    (data / "second-000000.tar").write_text("no tar")
    assert "no uncompressed tar file: " in refused("data", "index", chosen)
    assert "no uncompressed tar file: " in refused("data", "stats", chosen)


def test_the_command_itself(chosen: Path) -> None:
    program = [sys.executable, "-c", "from m3i_large.cli import main; main()", "data", "index", str(chosen), "--json"]
    result = subprocess.run(program, env=environment(), capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    assert result.returncode == 0 and result.stderr == "" and json.loads(result.stdout)[2]["samples"] == 12
