"""The audit: whole runs, chains and kills of a real mixture are proven; every kind of loss is found and named."""

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE_S

from m3i_large.data.audit import Audit, audit_runs
from m3i_large.data.mixture import Mixture
from m3i_large.errors import UserError
from m3i_large.metrics import append_row, read_rows

# One source smaller than what a step takes of it (its epochs end within steps), one of several epochs, one unfinished.
SPECS = [("small", 7, 1, 4e4, 1), ("middle", 50, 1, 4e4, 2), ("large", 5000, 1, 4e4, 1)]
LANES, STEPS = 12, 20


@functools.cache
def samples(step: int, micro_step: int, *, rank: int, world: int, accumulation: int) -> str:
    """JSON of what a rank draws."""
    mixture = Mixture.plan(3, sources=SPECS, global_batch=4 * LANES, lanes=LANES, accumulation=accumulation)
    r = mixture.rows(step, micro_step, rank=rank, world=world)
    return json.dumps(np.stack([r.source, r.epoch, r.id, np.zeros_like(r.id)], 1).tolist())


def begin(run: Path, attempt: int, step: int, world: int) -> None:
    run.mkdir(exist_ok=True)
    sources = [{"name": name, "samples": n} for name, n, *_ in SPECS]
    row = {"event": "resume" if step else "start", "step": step, "attempt": attempt, "world": world}
    append_row(run / "events.jsonl", row | {"sources": sources})


def file(run: Path, attempt: int, rank: int, world: int) -> Path:
    return run / "audit" / f"attempt_{attempt}_rank_{rank}_of_{world}.jsonl"


def write(
    run: Path, attempt: int, steps: range, *, world: int, accumulation: int = 1, dies: int | None = None, shift: int = 0
) -> Path:
    """An attempt's event and rows.

    Args:
        dies: rows of one more step that the ranks still write before a kill, the last of them cut in its middle.
        shift: samples are those of this many steps later.
    """
    begin(run, attempt, steps.start, world)
    (run / "audit").mkdir(exist_ok=True)
    rows = [(step, a, rank) for step in steps for a in range(accumulation) for rank in range(world)]
    rows += [(steps.stop, a, rank) for a in range(accumulation) for rank in range(world)][: dies or 0]
    for step, a, rank in rows:
        drawn = samples(step + shift, a, rank=rank, world=world, accumulation=accumulation)
        path = file(run, attempt, rank, world)
        append_row(path, {"step": step, "micro_step": a, "samples": json.loads(drawn)})
    if dies:
        path.write_bytes(path.read_bytes()[:-20])
    return run


def edit(path: Path, change: Callable[[list[dict]], object]) -> None:
    rows = read_rows(path)
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def proven(*runs: Path, steps: int) -> Audit:
    audit = audit_runs(runs)
    assert audit.proven and audit.failures == [], audit.to_text()
    assert audit.steps == steps and audit.samples_per_step == 4 * LANES
    for s, (name, n, _, _, quota) in zip(audit.sources, SPECS, strict=True):
        assert (s.name, s.samples, s.missing, s.repeated, s.outside) == (name, n, 0, 0, 0)
        assert s.draws == s.distinct == steps * LANES * quota and s.epochs_finished == s.draws // n
    return audit


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (3, 1), (12, 1), (1, 2), (3, 2), (2, 3), (3, 4)])
def test_a_whole_run_is_proven_on_any_ranks(world: int, accumulation: int, tmp_path: Path) -> None:
    audit = proven(write(tmp_path / "a", 0, range(STEPS), world=world, accumulation=accumulation), steps=STEPS)
    assert audit.sources[0].epochs_finished == STEPS * LANES // 7 > 30
    assert audit.trimmed == [] and json.loads(json.dumps(audit.to_dict()))["proven"] is True
    assert "middle: 50 samples, 9 epochs finished, 480 draws" in audit.to_text() and "proven" in audit.to_text()


def test_attempts_that_overlap_and_die_in_a_step_are_proven(tmp_path: Path) -> None:
    run = tmp_path / "a"
    write(run, 0, range(7), world=2, accumulation=2, dies=3)
    write(run, 1, range(4, 4), world=3, accumulation=2, dies=1)
    write(run, 2, range(4, 11), world=6, accumulation=2, dies=5)
    begin(run, 3, 10, 1)  # died before its first step
    write(run, 4, range(10, STEPS), world=1, accumulation=2)
    audit = proven(run, steps=STEPS)
    assert [(a["attempt"], a["begin"], a["end"], a["world"]) for a in audit.attempts] == [
        (0, 0, 4, 2),
        (2, 4, 10, 6),
        (4, 10, 20, 1),
    ]


def test_an_attempt_continues_the_newest_one_that_got_so_far(tmp_path: Path) -> None:
    run = write(tmp_path / "a", 0, range(9), world=2)
    write(run, 1, range(4, 6), world=2, dies=1)
    audit = proven(write(run, 2, range(8, STEPS), world=1), steps=STEPS)
    assert [(a["attempt"], a["end"]) for a in audit.attempts] == [(0, 8), (2, STEPS)]


def test_the_incomplete_step_of_the_newest_attempt_is_trimmed_and_reported(tmp_path: Path) -> None:
    for rows in range(1, 6):
        run = write(tmp_path / f"a{rows}", 0, range(9), world=2, accumulation=3, dies=rows)
        audit = proven(run, steps=9)
        # The last row was cut. If it was the only one, nothing tells that the step had begun.
        expected = [f"{run} attempt 0: step 9, of which a kill left {rows - 1} of 6 rows"] if rows > 1 else []
        assert audit.trimmed == expected
    # What an older attempt drew after the step where a newer one began belongs to weights that are gone.
    run = write(tmp_path / "a9", 0, range(9), world=2)
    assert proven(write(run, 1, range(4, 6), world=2, dies=2), steps=6).trimmed


def test_a_chain_of_runs_is_proven(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, range(6), world=2, dies=1)
    write(a, 1, range(4, 12), world=4)
    b = write(tmp_path / "b", 0, range(8, 15), world=1, dies=1)
    write(b, 1, range(12, 16), world=3)
    c = write(tmp_path / "c", 0, range(3, STEPS), world=12)  # from an early checkpoint of a's first attempt
    proven(a, steps=12)
    proven(a, b, steps=16)
    chained = proven(a, c, steps=STEPS)
    assert [(x["run"], x["attempt"], x["end"]) for x in chained.attempts] == [(str(a), 0, 3), (str(c), 0, 20)]
    wrong(b, names=[rf"steps 0 to 7: nothing lies before {b} attempt 0"])
    wrong(b, a, names=[rf"{b} holds no step that counts; needed: the runs in the order they were trained"])


def test_substitutes_are_counted_apart(tmp_path: Path) -> None:
    run = write(tmp_path / "a", 0, range(STEPS), world=2)

    def replace(rows: list[dict]) -> None:
        rows[3]["samples"][0][3] = 1
        rows[5]["samples"][1][3] = 4

    edit(file(run, 0, 1, 2), replace)
    assert sum(s.substitutes for s in proven(run, steps=STEPS).sources) == 2


# -- what must be found -----------------------------------------------------------------------------------


def wrong(*runs: Path, names: list[str]) -> Audit:
    """The runs are not proven, and the failures contain every one of `names` (patterns)."""
    audit = audit_runs(runs)
    assert not audit.proven and "NOT PROVEN" in audit.to_text()
    for name in names:
        assert any(re.search(name, failure) for failure in audit.failures), (name, audit.failures)
    return audit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Killed in step 9 and resumed from step 6 on another number of ranks."""
    run = write(tmp_path / "run", 0, range(9), world=2, accumulation=2, dies=2)
    proven(write(run, 1, range(6, STEPS), world=3, accumulation=2), steps=STEPS)
    return run


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_lost_row_is_found(run: Path, attempt: int) -> None:
    world, at = (2, 5) if attempt == 0 else (3, 9)
    lost = 2 if attempt == 0 else 10
    edit(file(run, attempt, 1, world), lambda rows: rows.pop(at))
    audit = wrong(run, names=[rf"attempt {attempt}: rank 1 of {world} lacks rows of step {lost}$", "epoch . lacks"])
    assert audit.sources[1].missing > 0


@pytest.mark.parametrize("at", [2, 27])
def test_a_row_that_is_there_twice_is_found(run: Path, at: int) -> None:
    edit(file(run, 1, 2, 3), lambda rows: rows.insert(at, rows[at]))
    step, a = 6 + at // 2, at % 2
    audit = wrong(run, names=[rf"attempt 1: rank 2 has step {step}, micro-step {a} more than once", "repeat an id"])
    assert all(s.repeated > 0 and s.missing == 0 for s in audit.sources)


def test_a_lost_or_repeated_sample_is_found_in_any_epoch(run: Path) -> None:
    path, saved = file(run, 1, 0, 3), file(run, 1, 0, 3).read_bytes()
    for at in (0, 2, 27):  # early steps and the last one, whose epochs are still running
        edit(path, lambda rows, at=at: rows[at]["samples"].pop(0))
        wrong(run, names=[rf"attempt 1: step {6 + at // 2} of rank 0 holds 7 samples; needed: 8"])
        path.write_bytes(saved)
        edit(path, lambda rows, at=at: rows[at]["samples"].append(rows[at]["samples"][-1]))
        place = f"step {6 + at // 2} rank 0"
        wrong(run, names=[r"holds 9 samples; needed: 8", rf"1 draws repeat an id; epoch \d+ id \d+: {place}, {place}$"])
        path.write_bytes(saved)


def test_a_swapped_id_is_found_and_named_with_both_places(run: Path) -> None:
    rows = read_rows(file(run, 1, 0, 3))
    first, second = (next(x for x in rows[at]["samples"] if x[0] == 2) for at in (2, 21))
    second[2] = first[2]
    file(run, 1, 0, 3).write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong(run, names=[rf"source large: 1 draws repeat an id; epoch 0 id {first[2]}: step 7 rank 0, step 16 rank 0"])


@pytest.mark.parametrize("at", [4, 24])
def test_an_id_of_a_finished_epoch_swapped_for_another_is_missing_and_repeated(run: Path, at: int) -> None:
    def swap(rows: list[dict]) -> None:
        mine = [x for x in rows[at]["samples"] if x[0] == 1]
        mine[0][2] = mine[1][2]

    before = next(x for x in read_rows(file(run, 1, 1, 3))[at]["samples"] if x[0] == 1)
    assert before[1] == (3 if at == 4 else 8), "epoch 8 is the last one that ends, epoch 9 is running"
    edit(file(run, 1, 1, 3), swap)
    audit = wrong(run, names=[rf"source middle: epoch {before[1]} lacks 1 of 50 ids: {before[2]}$", "1 draws repeat"])
    middle = audit.sources[1]
    assert (middle.missing, middle.repeated, middle.epochs_finished) == (1, 1, STEPS * LANES * 2 // 50 - 1)


def test_a_draw_of_an_epoch_that_ended_long_ago_is_found(run: Path) -> None:
    def change(rows: list[dict]) -> None:
        next(x for x in rows[24]["samples"] if x[0] == 1)[1:3] = [0, 17]

    edit(file(run, 1, 1, 3), change)
    wrong(run, names=[r"source middle: 1 draws repeat an id; epoch 0 id 17: step \d rank \d, step 18 rank 1$"])


@pytest.mark.parametrize(("attempt", "rank", "world"), [(0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 2, 3)])
def test_a_lost_file_of_a_rank_is_found(run: Path, attempt: int, rank: int, world: int) -> None:
    file(run, attempt, rank, world).unlink()
    steps = "0 to 5" if attempt == 0 else "6 to 19"
    wrong(run, names=[rf"attempt {attempt}: rank {rank} of {world} lacks rows of steps {steps} \(it has no file\)"])


def test_a_lost_file_of_an_attempt_between_is_not_covered_by_an_older_one(run: Path) -> None:
    write(run, 2, range(12, STEPS + 3), world=1, accumulation=2)
    proven(run, steps=STEPS + 3)
    long = write(run.parent / "long", 0, range(15), world=1)
    write(long, 1, range(4, 14), world=3)
    write(long, 2, range(13, 15), world=2)
    file(long, 1, 2, 3).unlink()
    wrong(long, names=[r"attempt 1: rank 2 of 3 lacks rows of steps 4 to 12 \(it has no file\)"])


@pytest.mark.parametrize("step", [0, 4, 6, 11, 19])
def test_a_step_that_nobody_has_is_found(run: Path, step: int) -> None:
    append_row(run / "events.jsonl", {"event": "end", "step": STEPS, "attempt": 1, "outcome": "finished"})
    for path in (run / "audit").glob("*.jsonl"):
        edit(path, lambda rows: rows.__setitem__(slice(None), [row for row in rows if row["step"] != step]))
    wrong(run, names=[rf"attempt {int(step >= 6)}: no rank has step {step}$"])


def test_several_incomplete_steps_at_the_end_are_no_kill(run: Path) -> None:
    edit(file(run, 1, 1, 3), lambda rows: rows.__delitem__(slice(-3, None)))
    wrong(run, names=[r"attempt 1: rank 1 of 3 lacks rows of steps 18 to 19$"])


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_resume_whose_samples_are_a_step_off_is_found(tmp_path: Path, shift: int) -> None:
    run = write(tmp_path / "a", 0, range(8), world=2)
    write(run, 1, range(6, STEPS), world=2, shift=shift)
    audit = wrong(run, names=["source middle: epoch . lacks" if shift > 0 else "source large: .* draws repeat an id"])
    assert audit.sources[1].missing if shift > 0 else audit.sources[2].repeated == LANES


@pytest.mark.parametrize("first", [5, 7])
def test_a_resume_that_begins_at_another_step_than_its_event_says_is_found(tmp_path: Path, first: int) -> None:
    run = write(tmp_path / "a", 0, range(9), world=2)
    write(run, 1, range(first, STEPS), world=2)
    events = read_rows(run / "events.jsonl")
    events[1]["step"] = 6
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    wrong(run, names=[rf"attempt 1: its rows begin with step {first}, its event says step 6"])


def test_a_resume_after_a_gap_is_found(tmp_path: Path) -> None:
    run = write(tmp_path / "a", 0, range(5), world=2, dies=2)
    write(run, 1, range(6, STEPS), world=2)
    wrong(run, names=[r"attempt 0: rank 1 of 2 lacks rows of step 5$"])
    run = write(tmp_path / "b", 0, range(5), world=2)
    write(run, 1, range(6, STEPS), world=2)
    wrong(run, names=[r"attempt 0: no rank has step 5$"])


def test_a_wrong_number_of_ranks_between_is_found(tmp_path: Path) -> None:
    run = write(tmp_path / "a", 0, range(5), world=2)
    write(run, 1, range(5, 9), world=3)
    write(run, 2, range(9, STEPS), world=2)
    proven(run, steps=STEPS)
    # The slices of rank 0 and 1 of 3, in files that say they are all.
    for rank in range(3):
        old = file(run, 1, rank, 3)
        old.rename(file(run, 1, rank, 2)) if rank < 2 else old.unlink()
    audit = wrong(
        run,
        names=[
            r"attempt 1: its files are of 2 ranks, its event says 3",
            r"attempt 1 draws 32 samples a step, \S+ attempt 0 48; needed: the same",
            r"source middle: epoch . lacks",
        ],
    )
    assert all(s.missing for s in audit.sources[:2])
    shutil.copy(file(run, 1, 0, 2), file(run, 1, 0, 4))
    wrong(run, names=[r"attempt 1: its files are of 2 and of 4 ranks; needed: one number"])


def test_an_epoch_that_begins_too_early_is_found(tmp_path: Path) -> None:
    """Every id exactly once, but one draw of epoch 1 comes steps before epoch 0 has ended."""
    run = write(tmp_path / "a", 0, range(STEPS), world=1)

    def change(rows: list[dict]) -> None:
        early = next(x for x in rows[0]["samples"] if x[0] == 1)
        late = next(x for x in rows[4]["samples"] if x[0] == 1 and x[1] >= 1)
        early[:], late[:] = late[:], early[:]

    edit(file(run, 0, 0, 1), change)
    audit = wrong(run, names=[r"source middle: epoch . begins in step 0, when 23 of the 50 samples of epoch 0"])
    assert audit.sources[1].missing == audit.sources[1].repeated == 0


def test_an_epoch_that_is_skipped_is_found(tmp_path: Path) -> None:
    run = write(tmp_path / "a", 0, range(STEPS), world=1)

    def change(rows: list[dict]) -> None:
        for row in rows:
            for x in row["samples"]:
                x[1] += (x[0] == 1 and x[1] > 0) * 10**12

    edit(file(run, 0, 0, 1), change)
    wrong(run, names=[r"source middle: epoch 10{11}1 begins in step 2, when 0 of the 50 samples of epoch 1 were"])


def test_damage_and_unknown_sources_are_found(run: Path) -> None:
    path = file(run, 1, 0, 3)
    lines, saved = path.read_bytes().splitlines(keepends=True), path.read_bytes()
    path.write_bytes(b"".join([*lines[:3], lines[3][:40] + b"\n", *lines[4:]]))
    wrong(run, names=[r"rank_0_of_3\.jsonl, line 4: no audit row", "rank 0 of 3 lacks rows of step 7$"])
    path.write_bytes(saved)
    edit(path, lambda rows: rows[4]["samples"].__setitem__(0, [0, 1, 2]))
    wrong(run, names=[r"rank_0_of_3\.jsonl: step 8 holds no \[source, epoch, id, substitute\] rows"])
    edit(path, lambda rows: rows[4]["samples"].__setitem__(1, [0, 1, 2, 0, 0]))
    wrong(run, names=[r"rank_0_of_3\.jsonl: step 8 holds no \[source, epoch, id, substitute\] rows"])
    path.write_bytes(saved)
    edit(path, lambda rows: rows[4]["samples"].__setitem__(0, [3, 0, 2, 0]))
    wrong(run, names=[r"attempt 1: 1 samples of a source that is none of 0 to 2"])
    path.write_bytes(saved)
    for id in (-1, 50, 10**12):
        edit(path, lambda rows, id=id: rows[4]["samples"].__setitem__(0, [1, 0, id, 0]))
        wrong(run, names=[rf"source middle: 1 draws lie outside 0 to 49; epoch 0 id {id}: step 8 rank 0"])
        path.write_bytes(saved)
    shutil.copy(path, file(run, 1, 3, 3))
    wrong(run, names=[r"there is no rank 3 of 3"])


def test_other_data_between_attempts_is_found(run: Path) -> None:
    events = read_rows(run / "events.jsonl")
    events[1]["sources"][1]["samples"] = 51
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    wrong(run, names=[r"attempt 1 has the sources .*51.* needed: the same data"])


# -- the command ------------------------------------------------------------------------------------------


def test_what_cannot_be_audited_is_a_users_mistake(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needed: a run with data\.audit=true"):
        audit_runs([tmp_path / "nothing"])
    with pytest.raises(UserError, match="needed: different directories"):
        audit_runs([run, run])
    (run / "events.jsonl").unlink()
    with pytest.raises(UserError, match="name no sources"):
        audit_runs([run])


def m3i(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from m3i_large.cli import main; main()"]
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_command_says_it_in_its_status_text_and_json(run: Path, tmp_path: Path) -> None:
    good = m3i("data", "audit", run)
    assert good.returncode == 0 and "exactly once an epoch: proven" in good.stdout, good.stderr
    assert json.loads(m3i("data", "audit", run, "--json").stdout)["proven"] is True
    file(run, 1, 1, 3).unlink()
    bad = m3i("data", "audit", run)
    assert bad.returncode == 1 and "NOT PROVEN" in bad.stdout and bad.stderr == ""
    (tmp_path / "empty").mkdir()
    none = m3i("data", "audit", tmp_path / "empty")
    assert none.returncode == 2 and "data.audit=true" in none.stderr and len(none.stderr.splitlines()) == 1


def test_the_audit_needs_no_torch() -> None:
    check = "import sys, m3i_large.data.audit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=PATIENCE_S).returncode == 0
