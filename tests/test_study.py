"""A study: what is trained, what is evaluated, and what the table says; nothing finished is done twice."""

import json
from pathlib import Path

import pytest
from tiny import ROOT, recipe, write_data, write_recipe

from m3i_large import study
from m3i_large.errors import UserError
from m3i_large.recipe import load_recipe
from m3i_large.study import StudyConfig, as_markdown, kinds_of, load_study, run_study, study_names


def test_shipped_studies_name_recipes_that_exist() -> None:
    assert study_names() == ["demo", "forms"]
    for name in study_names():
        config = load_study(name)
        assert all(load_recipe(recipe, config.overrides) for recipe in config.recipes)
    assert len(load_study("forms").recipes) == 16


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'forms'"):
        load_study("form")
    (tmp_path / "s.yaml").write_text("recipes: [demo]\ndata: x\nseed: 3\n")
    with pytest.raises(UserError, match=r"study .*seed: unknown key, did you mean 'seeds'"):
        load_study(str(tmp_path / "s.yaml"))
    with pytest.raises(UserError, match="did you mean 'demo'"):
        run_study(StudyConfig(recipes=["deom"], data="x"), ds=tmp_path, out=tmp_path)


def test_evaluations_follow_the_objective() -> None:
    kinds = {name: kinds_of(load_recipe(name).objective, probes=True) for name in ("demo", "table2_a", "wsp_clip")}
    assert kinds["demo"] == ["retrieval", "zeroshot", "categories", "styles", "knn", "linear"]
    assert kinds["table2_a"] == ["styles", "knn", "linear"]
    assert kinds["wsp_clip"] == ["retrieval", "zeroshot", "styles", "knn", "linear"]


def test_the_table_says_mean_and_spread() -> None:
    rows = [
        {"recipe": r, "figure": "knn top1", "mean": m, "sd": 0.01, "values": [m, m], "untrained": 0.1, "chance": 0.05}
        for r, m in (("a", 0.5), ("b", 0.25))
    ]
    rows.append({"recipe": "a", "figure": "seconds per step", "mean": 0.5, "sd": 0.0, "values": [0.5]})
    assert as_markdown(rows).splitlines() == [
        "| recipe | knn top1 | seconds per step |",
        "|---|---|---|",
        "| a | 50.0% ± 1.0% | 0.50 |",
        "| b | 25.0% ± 1.0% | - |",
        "| chance | 5.0% |  |",
        "| untrained | 10.0% |  |",
    ]
    assert "| knn top1 | 50.0% | 1.0% | 10.0% | 5.0% | 10.0 |" in as_markdown([rows[0], rows[2]])


@pytest.mark.slow
def test_two_recipes_train_once_and_are_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    data = write_data(tmp_path / "data")
    first, second = recipe(data, steps=7), recipe(data, steps=7)
    second["objective"] = load_recipe("table2_e", ["scale=demo"]).objective.model_dump()
    files = [str(write_recipe(tmp_path / f"{n}.yaml", r | {"name": n})) for n, r in (("a", first), ("b", second))]
    config = StudyConfig(recipes=files, data=str(data), train=str(data), overrides=["train.picture_every=0"])
    rows = run_study(config, ds=ROOT / "ds_configs/zero3.json", out=tmp_path / "out")
    assert json.loads((tmp_path / "out/study.json").read_text()) == rows
    assert (tmp_path / "out/study.md").read_text() == as_markdown(rows)
    assert (tmp_path / "out/study.png").stat().st_size > 5000
    figures = {(row["recipe"], row["figure"]): row for row in rows}
    assert {row["recipe"] for row in rows} == {"a", "b"}
    assert ("b", "knn top1") in figures and ("b", "zeroshot top1") not in figures
    assert figures["a", "seconds per step"]["mean"] > 0
    before = (tmp_path / "out/a/seed_0/metrics.jsonl").read_bytes()

    monkeypatch.setattr(study, "evaluate", None)  # everything is evaluated already
    monkeypatch.setattr(study, "_train", lambda *args, **more: None)
    assert run_study(config, ds=ROOT / "ds_configs/zero3.json", out=tmp_path / "out") == rows
    assert (tmp_path / "out/a/seed_0/metrics.jsonl").read_bytes() == before
