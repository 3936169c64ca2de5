"""Columns of metrics: the same values as the rows, whatever attempts and gaps there are."""

import json
import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3i_large.metrics import append_row, read_metrics
from m3i_large.report.history import History

ROWS = st.lists(
    st.fixed_dictionaries(
        {"step": st.integers(0, 12), "attempt": st.integers(0, 3)},
        optional={name: st.none() | st.floats(-1e6, 1e6) for name in ("loss", "loss/a", "loss/a/s", "time")},
    ),
    max_size=40,
)


def longhand(rows: list[dict]) -> dict[int, dict]:
    """By step the last of the rows with the highest attempt."""
    best: dict[int, dict] = {}
    for row in rows:
        if row["step"] not in best or row["attempt"] >= best[row["step"]]["attempt"]:
            best[row["step"]] = row
    return best


@given(ROWS)
def test_columns_hold_what_counts(rows: list[dict]) -> None:
    rows = [{k: v for k, v in row.items() if not (k == "time" and v is None)} for row in rows]
    history, best = History.of(rows), longhand(rows)
    assert history.steps.tolist() == sorted(best)
    for name, column in history.columns.items():
        wanted = [best[step].get(name) for step in sorted(best)]
        np.testing.assert_array_equal(column, [math.nan if value is None else value for value in wanted])
    for name in ("loss", "loss/a", "loss/a/s"):
        there = [(step, best[step][name]) for step in sorted(best) if best[step].get(name) is not None]
        assert (name in history) == bool(there)
        if there:
            steps, values = history.series(name)
            assert list(zip(steps.tolist(), values.tolist(), strict=True)) == there
    for attempt, ended in history.ends.items():
        assert ended == max([0.0, *(row.get("time", 0.0) for row in rows if row["attempt"] == attempt)])


def test_a_file_is_read_as_the_rows_are_and_a_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    for step in range(6):
        append_row(tmp_path / "metrics.jsonl", {"step": step, "attempt": 0, "loss": 1.0 / (step + 1), "x": math.inf})
    for step in (4, 5, 6):
        append_row(tmp_path / "metrics.jsonl", {"step": step, "attempt": 1, "loss": 7.0 + step, "new": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "attempt": 1, "loss": 3})[:-4])
    history, rows = History.read(tmp_path), read_metrics(tmp_path)
    assert history.series("loss")[1].tolist() == [row["loss"] for row in rows]
    assert history.series("new")[0].tolist() == [4, 5, 6] and "x" not in history
    assert history.total("loss") == sum(row["loss"] for row in rows) and history.total("x") == 0
