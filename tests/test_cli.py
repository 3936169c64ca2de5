"""Commands as a user types them: exit statuses, one line for a mistake, nothing written over."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE_S
from tiny import ROOT, environment, pretrain, recipe, write_data, write_recipe

from m3i_large.cli_launch import pretrain as pretrain_entry
from m3i_large.recipe import recipe_names


def m3i(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from m3i_large.cli import main; main()"]
    return subprocess.run(
        [*program, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the training entry in this process with something wrong; returns its one line."""
    status = pretrain_entry(["--ds", str(ROOT / "ds_configs/zero3.json"), *map(str, arguments)])
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert (status, len(lines)) == (2, 1) and lines[0].startswith("error: ") and "Traceback" not in out + err, err
    return lines[0]


def test_recipes_lists_every_header() -> None:
    result = m3i("recipes")
    assert result.returncode == 0
    assert all(f"{name}\n" in result.stdout for name in recipe_names()) and "Table 3" in result.stdout


def test_mistakes_found_before_anything_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "did you mean 'demo'" in mistake(capsys, "--recipe", "deom")
    assert "did you mean 'steps'" in mistake(capsys, "train.stesp=3")
    assert "did you mean 'objective'" in mistake(capsys, "objectiv.mix=3")
    assert pretrain_entry(["--ds", str(tmp_path / "none.json")]) == 2
    assert "none.json, which does not exist" in capsys.readouterr().err


def test_a_mistake_is_noted_and_said_once_by_the_rank_that_meets_it_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    wrong = ["--ds", str(tmp_path / "none.json")]
    assert pretrain_entry(wrong) == 2 and not capsys.readouterr().err  # the machine's first rank says it
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pretrain_entry(wrong) == 2 and "none.json, which does not exist" in capsys.readouterr().err
    note = tmp_path / "mistake"
    monkeypatch.setenv("M3I_MISTAKE", str(note))
    assert pretrain_entry(wrong) == 2
    said = capsys.readouterr().err
    assert "none.json, which does not exist" in said and note.read_text() == said
    assert pretrain_entry(wrong) == 2 and not capsys.readouterr().err
    monkeypatch.setenv("M3I_MISTAKE", str(tmp_path / "nowhere/mistake"))
    assert pretrain_entry(wrong) == 2 and capsys.readouterr().err == said


@pytest.mark.slow
def test_mistakes_found_by_the_run_itself(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", samples=24)
    good = recipe(data)

    def said(values: dict, *more: object, ranks: int = 1, ds: dict | None = None) -> str:
        path = write_recipe(tmp_path / "r.yaml", values)
        arguments = ["--recipe", path, "--out", tmp_path / "out", *more]
        if ds is not None:
            (tmp_path / "ds.json").write_text(json.dumps(ds))
            arguments += ["--ds", tmp_path / "ds.json"]
        result = pretrain(*arguments, ranks=ranks)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, (
            result.stdout + result.stderr
        )
        assert not (tmp_path / "out").exists(), "a refused run writes nothing"
        return lines[0]

    nowhere = good | {"data": good["data"] | {"root": str(tmp_path / "nowhere")}}
    assert "nowhere, which is no directory" in said(nowhere, ranks=2)
    empty = [dict(good["data"]["sources"][0], shards=["labelled-*.tar"], name="empty", quota=4)]
    assert "no sample has" in said(good | {"data": good["data"] | {"sources": empty}})
    assert "ranks: got 3; needed: one of 1, 2, 4" in said(
        good
        | {
            "train": good["train"] | {"global_batch": 48, "contrast_batch": 48},
            "data": good["data"] | {"lanes": 4, "sources": [dict(s, quota=4) for s in good["data"]["sources"]]},
        },
        ranks=3,
    )
    assert "sum to 4; needed: 8" in said(good | {"data": good["data"] | {"lanes": 2}})
    assert "gradient_clipping" in said(good, ds={"zero_optimization": {"stage": 3}, "gradient_clipping": 9})
    assert "objective.input.patch: got 12" in said(good | {"objective": {"input": {"patch": 12}}})


def test_eval_and_report_refuse_what_is_no_run(tmp_path: Path) -> None:
    for command in (["eval", "styles", tmp_path, "--data", tmp_path], ["report", tmp_path]):
        result = m3i(*command)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_shipped_recipes_stay_small() -> None:
    for path in (ROOT / "m3i_large/recipes").glob("*.yaml"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
