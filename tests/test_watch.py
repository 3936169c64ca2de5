"""The terminal's view: what it says is in the files, and every line fits."""

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from m3i_large.errors import UserError
from m3i_large.metrics import append_row, write_json
from m3i_large.watch import sparkline, view, watch

NOW = 1e9 + 500.0


def make_run(run: Path, *, steps: int = 90) -> Path:
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    events = run / "events.jsonl"
    append_row(events, {"event": "start", "step": 0, "attempt": 0, "world": 2, "steps": 300, "time": 1e9})
    for step in range(steps):
        row = {"step": step, "attempt": int(step > 50), "loss": 9 - step / 10, "loss/text": 4.0, "loss/text/a": 4.5}
        row |= {"optim/lr": 1e-3, "optim/skipped": 0, "time/step_s": 2.0, "time/forward_s": 1.0, "data/wait_s": 0.25}
        row |= {"perf/samples_per_s": 100.0 + step, "collapse/text/std": 0.5, "time": 1e9 + 5 * step}
        append_row(run / "metrics.jsonl", row)
    append_row(events, {"event": "resume", "step": 51, "attempt": 1, "world": 4, "steps": 300, "time": 1e9 + 250})
    incident = {
        "event": "incident",
        "step": 60,
        "attempt": 1,
        "what": "straggler",
        "host": "node-" + "9" * 90,
        "rank": 3,
    }
    append_row(events, incident | {"time": 1e9 + 300})
    append_row(events, {"event": "save", "step": 80, "attempt": 1, "time": 1e9 + 400})
    return run


def text_of(run: Path, *, width: int = 80, now: float = NOW) -> list[str]:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(view(run, now=now))
    return buffer.getvalue().splitlines()


def test_all_signals_in_80_columns(tmp_path: Path) -> None:
    lines = text_of(make_run(tmp_path / "runs" / ("a long name " * 9)))
    assert max(map(len, lines)) <= 80
    said = "\n".join(lines)
    assert "step 90 of 300 (30%), 0:07:00 left" in said, "210 steps of 2 s"
    assert "last step 0:00:55 ago; attempt 1, 4 ranks" in said
    values = {line.split()[0]: line.split()[1] for line in lines if line.startswith("   ") and "/" in line.split()[0]}
    values |= {line.split()[0]: line.split()[1] for line in lines if line.strip().startswith("loss ")}
    recent = np.arange(70, 90)
    assert float(values["loss"]) == pytest.approx(np.mean(9 - recent / 10), rel=1e-3)
    assert float(values["perf/samples_per_s"]) == pytest.approx(np.mean(100 + recent), rel=1e-3)
    assert values["optim/lr"] == "0.001" and values["collapse/text/std"] == "0.5"
    assert "optim/skipped" not in said and "loss/text/a" not in said and "time/forward_s" not in said
    assert "step 60 incident straggler" in said and "save" not in said


@pytest.mark.parametrize(
    ("outcome", "now", "told"),
    [(None, NOW + 600, "no step for 0:10:55"), ("finished", NOW, "finished;"), ("failed", NOW, "failed;")],
)
def test_whether_it_moves_is_said(tmp_path: Path, outcome: str | None, now: float, told: str) -> None:
    run = make_run(tmp_path / "run")
    if outcome:
        write_json(run / "exit.json", {"outcome": outcome, "step": 90})
    said = "\n".join(text_of(run, now=now))
    assert told in said and ("left" in said) == (outcome is None)


def test_a_curve_in_a_line() -> None:
    steps = np.arange(8)
    assert sparkline(steps, steps.astype(float), width=8) == "▁▂▃▄▅▆▇█"
    assert sparkline(steps, -steps.astype(float), width=4) == "█▆▃▁"
    assert sparkline(steps, np.ones(8), width=8) == "▁" * 8


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    run, buffer = make_run(tmp_path / "run"), io.StringIO()
    console = Console(file=buffer, width=80)
    ending = threading.Timer(0.5, write_json, (run / "exit.json", {"outcome": "finished", "step": 90}))
    ending.start()
    began = time.monotonic()
    watch(run, every=0.1, console=console)
    assert time.monotonic() - began < 60 and "finished; attempt 1" in buffer.getvalue()
    watch(run, every=0.1, once=True, console=console)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run; needed"):
        watch(tmp_path, every=1.0)


def test_a_run_that_sets_itself_up_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert text_of(tmp_path)[0].startswith("no step yet, the run sets itself up")
