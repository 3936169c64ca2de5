"""The report: one file, complete, valid, and with nothing to fetch."""

import json
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny import recipe as tiny_recipe

from m3i_large.errors import UserError
from m3i_large.metrics import append_row
from m3i_large.recipe import validate
from m3i_large.report import write_report
from m3i_large.run import begin, open_run, resolve

VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Balanced tags, alternative text for every picture, no reference that leaves the file."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        assert not any(str(v).startswith(("http", "//")) for k, v in values.items() if k in ("src", "href"))
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(root: Path) -> Path:
    values = tiny_recipe(root / "data")
    values["name"] = "tiny <&> run"
    recipe = resolve(validate(values), root / "run", torch.device("cpu"))
    run = open_run(root / "run", recipe, resume="auto")
    begin(run, {"device": "cpu: test", "world": 2, "precision": "fp32", "versions": {"torch": "x.y"}})
    for step in range(12):
        row = {
            "step": step,
            "attempt": int(step > 5),
            "samples": 16 * (step + 1),
            "loss": 9.0 - step,
            "loss/text": 4.0 - step / 9,
        }
        row |= {
            "loss/text/first": 4.0,
            "optim/lr": 0.1,
            "optim/momentum_ema": 0.9,
            "optim/grad_norm": 1.0,
            "optim/temperature": 0.07,
        }
        append_row(run.directory / "metrics.jsonl", row | {"time/step_s": 0.5, "data/wait_s": 0.1, "perf/mem_gib": 1.5})
    append_row(run.directory / "events.jsonl", {"event": "resume", "step": 6, "attempt": 1})
    result = {
        "step": 12,
        "kind": "retrieval",
        "data": "held",
        "num_samples": 30,
        "values": {"text_to_image/R@1": 0.4321},
    }
    append_row(
        run.directory / "eval.jsonl",
        result | {"chance": {"text_to_image/R@1": 0.01}, "untrained": {"text_to_image/R@1": 0.02}},
    )
    (run.directory / "pictures/step_00000000").mkdir(parents=True)
    cv2.imwrite(str(run.directory / "pictures/step_00000000/input.png"), np.zeros((4, 4, 3), np.uint8))
    run.ended("finished", step=12)
    (root / "data").mkdir()
    (root / "data" / "LICENSES.md").write_text("drawn by <somebody>")
    return run.directory


def test_the_report_says_everything_and_needs_nothing(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and len(html) < 10e6
    assert len(checker.images) >= 4 and all(
        len(i["alt"]) > 20 and i["src"].startswith("data:image/png") for i in checker.images
    )
    for text in (
        "tiny <&> run",
        "43.2%",
        "2.0%",
        "1.0%",
        "43.2",
        "finished, 12 steps",
        "drawn by <somebody>",
        "resume",
        "torch x.y",
        "2 ranks",
    ):
        assert text in checker.text, text
    assert any("loss/text from 4 to 2.778" in i["alt"] for i in checker.images)


def test_a_running_run_without_evaluation_reports_too(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("exit.json", "eval.jsonl", "env.json"):
        (run / name).unlink()
    html = write_report(run).read_text(encoding="utf-8")
    assert "still running" in html and "None yet" in html


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run with a logged step"):
        write_report(tmp_path)
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
