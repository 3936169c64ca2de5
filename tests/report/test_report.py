"""The report: one file, complete, valid, true to the run's files, and with nothing to fetch."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from drawn import curve, figures
from tiny import pretrain, write_data, write_recipe
from tiny import recipe as tiny_recipe

from m3i_large.errors import UserError
from m3i_large.metrics import append_row, write_json
from m3i_large.recipe import validate
from m3i_large.report import write_report
from m3i_large.run import begin, open_run, resolve

VOID = {"meta", "img", "use", "path", "rect"}


class Checker(HTMLParser):
    """Balanced tags, alternative text for every picture, no reference that leaves the file."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.drawings: list[dict] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        assert all(str(v).startswith(("#", "data:")) for k, v in values.items() if k in ("src", "href"))
        if tag in ("img", "svg"):
            (self.images if tag == "img" else self.drawings).append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(path: Path) -> tuple[str, Checker]:
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and len(html) < 10e6
    assert all(len(i["alt"]) > 10 and i["src"].startswith("data:image/webp") for i in checker.images)
    assert all(len(i["aria-label"]) > 20 for i in checker.drawings)
    return html, checker


def make_run(root: Path, name: str = "run", *, steps: int = 12, **train: object) -> Path:
    """The files of a run that was continued once and had an incident."""
    values = tiny_recipe(root / "data", **train)
    values["name"] = "tiny <&> run"
    recipe = resolve(validate(values), root / name, torch.device("cpu"))
    run = open_run(root / name, recipe, resume="auto")
    begin(run, {"device": "cpu: test", "world": 2, "precision": "fp32", "versions": {"torch": "x.y"}, "commit": "abc"})
    events = run.directory / "events.jsonl"
    sources = [{"name": "first", "samples": 60, "draws_per_step": 8.0}]
    append_row(events, {"event": "start", "step": 0, "attempt": 0, "time": 1e9, "setup_s": 10.0, "world": 2})
    for step in range(steps):
        row = {"step": step, "attempt": int(step > 5), "samples": 16 * (step + 1), "loss": 9.0 - step, "new/thing": 3.0}
        row |= {
            "loss/text": 4.0 - step / 9,
            "loss/text/first": 4.0,
            "loss/text/second": 4.0 - step / 5,
            "optim/lr": 0.1,
        }
        row |= {"optim/momentum_ema": 0.9, "optim/grad_norm": 1.0, "optim/temperature": 0.07, "data/retries": 0}
        row |= {"time/step_s": 0.5, "data/wait_s": 0.1, "perf/mem_gib": 1.5, "perf/samples_per_s": 32.0}
        append_row(run.directory / "metrics.jsonl", row | {"time": 1e9 + 90 + step + 1800 * (step > 5)})
    resumed = {"event": "resume", "step": 6, "attempt": 1, "time": 1e9 + 1800, "setup_s": 10.0, "world": 4}
    append_row(events, resumed | {"sources": sources, "data": "f00d", "steps": 12})
    append_row(
        events, {"event": "incident", "step": 8, "attempt": 1, "what": "spike", "loss": 77.0, "time": 1e9 + 1900}
    )
    result = {
        "step": 12,
        "kind": "retrieval",
        "data": "held",
        "num_samples": 30,
        "values": {"text_to_image/R@1": 0.4321},
    }
    beside = {"chance": {"text_to_image/R@1": 0.01}, "untrained": {"text_to_image/R@1": 0.02}}
    append_row(run.directory / "eval.jsonl", result | beside)
    bad = {"source": "first", "shard": "a-0.tar", "key": "k<1>", "id": 3, "reason": "got no picture", "step": 2}
    append_row(run.directory / "quarantine.jsonl", bad | {"attempt": 0})
    write_json(run.directory / "exit.json", {"outcome": "finished", "step": steps, "attempt": 1, "message": ""})
    return run.directory


def test_the_report_says_everything_and_needs_nothing(tmp_path: Path) -> None:
    html, checker = checked(write_report(make_run(tmp_path)))
    told = ("tiny <&> run", "43.2%", "2.0%", "1.0%", "43.2", "finished after 12 of 12 steps", "resume", "torch x.y")
    told += ("cpu: test, 2 then 4 ranks", "commit abc", "f00d", "spike (loss 77)", "k<1>", "got no picture")
    told += ("1 could not be used", "8", "1.6", "0 throughout: data/retries", "new/thing", "2 starts")
    for text in told:
        assert text in checker.text, text
    # From 10 s before the event (set-up) to the attempt's last trace: of the first a row, of the second step 11's.
    expected = (2 * (10 + 95) + 4 * (10 + 90 + 11)) / 3600
    assert f"{expected:.3g} device-hours" in checker.text
    (text,) = (d["aria-label"] for d in checker.drawings if "Loss of text" in d["aria-label"])
    assert "all sources from 4 to 2.778; first from 4 to 4; second from 4 to 1.8" in text
    assert html.count("var(--quiet)") > html.count("var(--bad)") > 3, "restarts and incidents are marked in every panel"


def test_a_running_run_without_evaluation_reports_too(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("exit.json", "eval.jsonl", "env.json", "quarantine.jsonl"):
        (run / name).unlink()
    _, checker = checked(write_report(run))
    assert "still running" in checker.text and "None yet" in checker.text
    assert "No sample was quarantined" in checker.text


def test_runs_beside_each_other(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two", steps=8, seed=5)
    recipe = (two / "recipe.yaml").read_text()
    changed = recipe.replace("quota: 2", "quota: 3").replace("weight: 1.0\n  frozen", "weight: 2.0\n  frozen")
    (two / "recipe.yaml").write_text(changed)
    html, checker = checked(write_report([one, two], out=tmp_path / "both.html"))
    assert not (one / "report.html").exists()
    for text in (
        "one beside two",
        "train.seed",
        "35",
        "objective.terms.text.weight1.02.0",
        "data.sources.first.quota23",
        "Loss of text on second",
        "finished after 8",
    ):
        assert text in checker.text, text
    drawn = figures(html)
    assert [len(curve(drawn["loss"], n)) for n in (0, 1)] == [12, 8]
    assert curve(drawn["loss/text/second"], 1)[-1] == pytest.approx((7, 4.0 - 7 / 5), abs=0.02)
    with pytest.raises(UserError, match="twice; needed: different runs"):
        write_report([one, two, one])


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run with a logged step"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="got no run"):
        write_report([])
    assert json.dumps(list(tmp_path.iterdir())) == "[]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with pictures, on its data's own samples, and a bad one among them."""
    root = tmp_path_factory.mktemp("report")
    values = tiny_recipe(write_data(root / "data"), steps=9, picture_every=4, report=True)
    path = write_recipe(root / "r.yaml", values)
    ended = pretrain("--recipe", path, "--out", root / "run")
    assert ended.returncode == 0 and f"report: {root / 'run/report.html'}" in ended.stdout, ended.stdout + ended.stderr
    return root / "run"


@pytest.mark.slow
def test_drawings_are_true_to_metrics(trained: Path) -> None:
    """Three figures, of the drawing's own axes, against the rows of metrics.jsonl."""
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    drawn = figures((trained / "report.html").read_text(encoding="utf-8"))
    shown = [figure for figure in drawn if figure.startswith("loss/intra ")] + ["loss", "optim/temperature"]
    assert len(shown) == 3
    for figure in shown:
        for number, name in enumerate(figure.split()):
            wanted = [(row["step"], row[name]) for row in rows if name in row]
            got, size = curve(drawn[figure], number), max(abs(v) for _, v in wanted)
            assert len(got) == len(wanted) >= 9 or name == "optim/temperature"
            for (x, y), (step, value) in zip(got, wanted, strict=True):
                assert x == pytest.approx(step, abs=0.05) and y == pytest.approx(value, abs=0.01 * size), name
    every = {name for row in rows for name in row} - {"step", "attempt", "samples", "time"}
    never = {name for name in every if not any(row.get(name) for row in rows)}
    never.add("loss/category/labelled")  # the only source of its term is the term
    assert all(row["loss/category/labelled"] == pytest.approx(row["loss/category"], rel=1e-6) for row in rows)
    assert {name for figure in drawn for name in figure.split()} == every - never, "every metric is drawn once"


@pytest.mark.slow
def test_pictures_of_a_run_are_all_there_and_outlive_its_data(trained: Path, tmp_path: Path) -> None:
    run = trained.rename(trained.with_name("moved"))
    (run.parent / "data").rename(tmp_path / "gone")
    try:
        html, checker = checked(write_report(run))
    finally:
        run.rename(trained)
        (tmp_path / "gone").rename(trained.parent / "data")
    for title in (
        "What the student sees",
        "Dense features through training",
        "What the attention pool looks at",
        "From a text to pictures",
        "From a picture to pictures",
        "The same thing in another style",
        "Worst losses",
    ):
        assert title in checker.text, title
    assert "pictures of the training data" in checker.text, "no held-out pictures are named in the recipe"
    steps = re.findall(r"<figcaption>(step \d+)</figcaption>", html)
    assert set(steps) == {"step 0", "step 4", "step 8", "step 9"}
    assert len(checker.images) > 100
