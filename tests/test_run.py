"""The run directory: nothing is overwritten, and what is wrong is said in one line."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import recipe as tiny_recipe

from m3i_large import metrics
from m3i_large.errors import DivergenceError, UserError
from m3i_large.metrics import append_row, read_metrics, read_rows
from m3i_large.recipe import Recipe, validate
from m3i_large.report import report_at_the_end
from m3i_large.run import begin, failures_recorded, open_run, read_exit, resolve, resolve_precision


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return resolve(validate(tiny_recipe(tmp_path / "data")), tmp_path / "run", torch.device("cpu"))


def test_a_new_directory_is_attempt_zero_and_later_starts_count_up(recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", recipe, resume="auto")
    assert (run.attempt, run.resume_from) == (0, None) and not (tmp_path / "run").exists()
    begin(run, {"a": 1})
    append_row(run.directory / "events.jsonl", {"event": "start", "attempt": 0, "step": 0})
    again = open_run(tmp_path / "run", recipe, resume="auto")
    assert again.attempt == 1 and again.recipe == recipe


def test_another_recipe_or_foreign_files_are_refused_untouched(recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", recipe, resume="auto")
    begin(run, {})
    before = (run.directory / "recipe.yaml").read_bytes()
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 99})})
    with pytest.raises(UserError, match=r"another recipe \(train.steps is 6 there, 99 here\)"):
        open_run(run.directory, other, resume="auto")
    assert (run.directory / "recipe.yaml").read_bytes() == before
    with pytest.raises(UserError, match="already holds a run"):
        open_run(run.directory, recipe, resume="never")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    with pytest.raises(UserError, match="holds files but no run"):
        open_run(tmp_path / "thesis", recipe, resume="auto")
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_run(tmp_path / "new", recipe, resume=str(tmp_path / "thesis"))


def test_a_run_does_not_go_back_to_an_earlier_checkpoint_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", recipe, resume="auto")
    begin(run, {})
    for name in ("step_00000002", "step_00000004"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "manifest.json").write_text("{}")
    newest = run.checkpoints / "step_00000004"
    for resume in ("auto", str(newest), str(tmp_path / "elsewhere"), "s3://bucket/run"):
        assert open_run(run.directory, recipe, resume=resume).resume_from == newest
    earlier = str(run.checkpoints / "step_00000002")
    with pytest.raises(UserError, match=r"--resume: got .*2, but this run's newest checkpoint is step_00000004"):
        open_run(run.directory, recipe, resume=earlier)
    assert str(open_run(tmp_path / "new", recipe, resume=earlier).resume_from) == earlier


def test_precision_and_threads_are_settled_once_and_reused(tmp_path: Path) -> None:
    values = tiny_recipe(tmp_path, precision="auto", threads=None)
    first = resolve(validate(values), tmp_path / "run", torch.device("cpu"))
    assert first.train.precision in ("bf16", "fp32") and first.train.threads
    begin(open_run(tmp_path / "run", first, resume="auto"), {})
    moved = first.model_copy(update={"train": first.train.model_copy(update={"precision": "fp32", "threads": 7})})
    begin(open_run(tmp_path / "other", moved, resume="auto"), {})
    resumed = resolve(validate(values), tmp_path / "other", torch.device("cpu"))
    assert (resumed.train.precision, resumed.train.threads) == ("fp32", 7)


def test_precision_auto_follows_the_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in {"avx2 avx512_bf16": "bf16", "avx2 amx_bf16": "bf16", "avx2 avx512f": "fp32"}.items():
        monkeypatch.setattr("m3i_large.run._cpu_flags", lambda flags=flags: set(flags.split()))
        assert resolve_precision("auto", torch.device("cpu")) == expected
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_the_highest_attempt_counts_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    for step, attempt, loss in [(0, 0, 1.0), (1, 0, 2.0), (2, 0, 3.0), (1, 1, 20.0), (2, 1, float("nan"))]:
        append_row(tmp_path / "metrics.jsonl", {"step": step, "attempt": attempt, "loss": loss})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "att')
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(0, 1.0), (1, 20.0), (2, None)]
    append_row(tmp_path / "metrics.jsonl", {"step": 3, "attempt": 2, "loss": 4.0})
    assert read_metrics(tmp_path)[-1]["loss"] == 4.0, "the row after the cut one is whole"
    assert read_rows(tmp_path / "none.jsonl") == [] and read_exit(tmp_path) == {}


def test_only_one_creates_a_file_and_links_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "exit.json"
    assert metrics.create_json(path, 1) and not metrics.create_json(path, 2)
    with monkeypatch.context() as patch:  # what a rank sees that looked before the other one wrote
        patch.setattr(Path, "exists", lambda self: False)
        assert not metrics.create_json(path, 3)
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    assert not metrics.create_json(path, 4)
    path.unlink()
    assert metrics.create_json(path, 5) and path.read_text() == "5\n" and list(tmp_path.iterdir()) == [path]


def test_rows_that_a_full_disk_refuses_wait_for_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, append = [False], metrics.append_row

    def refusing(path: Path, row: dict) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        append(path, row)

    monkeypatch.setattr(metrics, "append_row", refusing)
    writer = metrics.MetricsWriter(tmp_path, attempt=0, enabled=True, tensorboard=False)
    for step in range(5):
        full[0] = step in (1, 2, 4)
        writer.log({"step": step})
        writer.event("skip", step=step)
    full[0] = False
    writer.close()
    for name in ("metrics.jsonl", "events.jsonl"):
        assert [row["step"] for row in read_rows(tmp_path / name)] == [0, 1, 2, 3, 4]


def test_the_last_rows_are_the_whole_ones_at_the_end(tmp_path: Path) -> None:
    for step in range(100):
        append_row(tmp_path / "metrics.jsonl", {"step": step})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 100')
    size = len('{"step": 99}\n')
    for num_bytes in range(3 * size, 4 * size):
        whole = (num_bytes - len('{"step": 100')) // size
        rows = metrics.last_rows(tmp_path / "metrics.jsonl", num_bytes=num_bytes)
        assert [row["step"] for row in rows] == list(range(100 - whole, 100))
    assert len(metrics.last_rows(tmp_path / "metrics.jsonl")) == 100


def test_stop_signals_are_remembered_and_handlers_restored() -> None:
    from m3i_large.stop_signals import StopSignals

    asking = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in asking]
    for first in asking:
        with StopSignals() as stop:
            assert stop.number == 0
            for number in (first, *asking):
                os.kill(os.getpid(), number)
            assert stop.number == first, "the first one is the reason"
    assert [signal.getsignal(number) for number in asking] == before


def test_a_signal_while_a_run_sets_itself_up_ends_it_at_once_and_is_no_failure(recipe: Recipe, tmp_path: Path) -> None:
    from m3i_large.stop_signals import Stopped, stopping_at_once

    run = open_run(tmp_path / "run", recipe, resume="auto")
    begin(run, {})
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        with pytest.raises(Stopped, match=f"{number.name} before the first step"):  # noqa: SIM117
            with failures_recorded(run), stopping_at_once():
                os.kill(os.getpid(), number)
        assert read_exit(run.directory) == {} and signal.getsignal(signal.SIGTERM) == before


def test_the_first_failure_is_the_one_in_exit_json_and_only_of_a_run_that_has_begun(
    recipe: Recipe, tmp_path: Path
) -> None:
    run = open_run(tmp_path / "run", recipe, resume="auto")
    with pytest.raises(UserError), failures_recorded(run):
        raise UserError("nothing is written")
    assert not run.directory.exists()
    begin(run, {})
    append_row(run.directory / "events.jsonl", {"event": "start", "attempt": 0, "step": 0, "time": 1.0})
    append_row(run.directory / "events.jsonl", {"event": "resume", "attempt": 1, "step": 4, "time": 2.0})
    append_row(run.directory / "metrics.jsonl", {"attempt": 1, "step": 4, "time": 3.0})
    with pytest.raises(ZeroDivisionError), failures_recorded(run):
        raise ZeroDivisionError("by zero\nand more")
    with pytest.raises(DivergenceError), failures_recorded(run):
        raise DivergenceError("connection closed by the peer that failed first")
    ended = read_exit(run.directory)
    assert (ended["outcome"], ended["step"], ended["attempt"]) == ("failed", 5, 1)
    assert ended["message"] == "ZeroDivisionError: by zero"
    events = read_rows(run.directory / "events.jsonl")
    assert [e["event"] for e in events] == ["start", "resume", "end"] and events[-1]["outcome"] == "failed"
    begin(run, {})
    assert read_exit(run.directory) == {}
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(run.failed, [f"rank {i}" for i in range(8)]))
    ends = [e["message"] for e in read_rows(run.directory / "events.jsonl") if e["event"] == "end"]
    assert ends[1:] == [read_exit(run.directory)["message"]], "all fail at once: one is the first"
    begin(run, {})
    with pytest.raises(DivergenceError), failures_recorded(run):
        raise DivergenceError("one line")
    assert read_exit(run.directory)["message"] == "one line"


def test_a_run_that_fails_leaves_a_report_and_one_that_cannot_be_written_hides_nothing(
    recipe: Recipe, tmp_path: Path
) -> None:
    assert not recipe.train.report
    assert open_run(tmp_path / "quiet", recipe, resume="auto", report=report_at_the_end).report is None
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"report": True})})
    run = open_run(tmp_path / "run", recipe, resume="auto", report=report_at_the_end)
    begin(run, {})
    for ends in ("before the first step", "after it"):
        (run.directory / "exit.json").unlink(missing_ok=True)
        with pytest.raises(DivergenceError, match=ends), failures_recorded(run):
            raise DivergenceError(ends)
        there = ends == "after it"
        assert (run.directory / "report.html").exists() == there
        append_row(run.directory / "metrics.jsonl", {"attempt": 0, "step": 0, "time": 3.0, "loss": 1.0})
    assert "failed after 1 of" in (run.directory / "report.html").read_text()
    (run.directory / "exit.json").unlink()

    def ended_by_the_launcher(directory: Path) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return report_at_the_end(directory / "nowhere")

    with (
        pytest.raises(DivergenceError, match="of all ranks"),
        failures_recorded(replace(run, report=ended_by_the_launcher)),
    ):
        raise DivergenceError("of all ranks at once, and another one has ended")
    (run.directory / "exit.json").unlink()
    (run.directory / "metrics.jsonl").write_text('{"attempt": 0, "step": 0, "loss": "seven"}\n')
    with pytest.raises(ZeroDivisionError), failures_recorded(run):
        raise ZeroDivisionError("the first")
    assert read_exit(run.directory)["message"] == "ZeroDivisionError: the first"


def test_a_hang_is_an_incident_and_the_end(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from m3i_large.parallel.watchdog import Beat
    from m3i_large.train import _report_hang

    run = open_run(tmp_path / "run", recipe, resume="auto")
    begin(run, {})
    append_row(run.directory / "metrics.jsonl", {"attempt": 0, "step": 30, "time": 3.0})
    _report_hang(run, [Beat(17, "node2", 400, 31, "forward", False)])
    incident, end = read_rows(run.directory / "events.jsonl")
    rank = {"rank": 17, "host": "node2", "step": 31, "phase": "forward"}
    assert (incident["event"], incident["what"], incident["step"], incident["ranks"]) == (
        "incident",
        "hang",
        31,
        [rank],
    )
    message = "no progress: rank 17 (node2) in forward of step 31"
    assert end.items() >= {"event": "end", "outcome": "failed", "step": 31, "message": message}.items()
    assert read_exit(run.directory)["message"] == message and message in capsys.readouterr().err
