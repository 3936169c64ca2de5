"""The audit files of runs as attempts with their rows, and which attempt counts in which step.

Files: `audit/attempt_A_rank_R_of_W.jsonl`, rows {step, micro_step, samples: [[source, epoch, id, substitute], ...]}.
Each start of a run is an attempt; it replaces what earlier ones drew from its first step on, as the weights it started
from have never seen that. What counts is therefore one line of attempts, each up to the step where the next begins.
"""

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from m3i_large.errors import UserError

FILE_NAME = re.compile(r"attempt_(\d+)_rank_(\d+)_of_(\d+)\.jsonl")
ROW_HEAD = re.compile(rb'\s*\{\s*"step"\s*:\s*(\d+)\s*,\s*"micro_step"\s*:\s*(\d+)\s*,\s*"samples"\s*:\s*(?=\[)')
STEP, MICRO_STEP, RANK, OFFSET, SIZE = range(5)  # columns of Attempt.rows
SOURCE, EPOCH, ID, SUBSTITUTE = range(4)  # columns of a row's samples
SHOWN = 5  # findings of one kind that are named; the others are counted


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        first: step it began with.
        reached: steps done according to the events (a checkpoint, the end), whatever the audit files hold.
        skipped: steps that were drawn but not applied, according to the events.
        sources: (name, samples) by source index; empty if the attempt's event names none.
        rows: int64 (rows, 5): step, micro-step, rank, and where the line lies in the rank's file (offset, size).
        files: by rank.
    """

    run: Path
    number: int
    world: int
    first: int
    reached: int
    skipped: frozenset[int]
    sources: list[tuple[str, int]]
    rows: np.ndarray
    files: dict[int, Path]

    @property
    def label(self) -> str:
        return f"{self.run} attempt {self.number}"

    @cached_property
    def micro_steps(self) -> int:
        """A, as many as any rank has seen."""
        return int(self.rows[:, MICRO_STEP].max(initial=0)) + 1

    @cached_property
    def complete(self) -> np.ndarray:
        """Steps of which every rank has every micro-step, sorted."""
        distinct = np.unique(self.keys(self.rows))
        steps, counts = np.unique(distinct // (self.world * self.micro_steps), return_counts=True)
        return steps[counts == self.world * self.micro_steps]

    @cached_property
    def end(self) -> int:
        """One more than the last step that left any trace."""
        return max(self.first, self.reached, int(self.rows[:, STEP].max(initial=-1)) + 1)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """One integer per (step, rank, micro-step)."""
        return (rows[:, STEP] * self.world + rows[:, RANK]) * self.micro_steps + rows[:, MICRO_STEP]


def read_attempts(run: Path, failures: list[str]) -> list[Attempt]:
    """All starts of a run, from its events and its audit files; damage goes into `failures`."""
    files: dict[int, list[tuple[int, int, Path]]] = {}
    for path in sorted((run / "audit").glob("*.jsonl")):
        if (match := FILE_NAME.fullmatch(path.name)) is not None:
            number, rank, world = map(int, match.groups())
            files.setdefault(number, []).append((world, rank, path))
    if not files:
        raise UserError(f"{run}: got no audit/attempt_*_rank_*_of_*.jsonl; needed: a run with data.audit=true")
    events = _read_events(run)
    attempts = [_attempt(run, n, files.get(n, []), events.get(n, []), failures) for n in sorted({*files, *events})]
    if not any(attempt.sources for attempt in attempts):
        raise UserError(
            f"{run}: got an events.jsonl whose start and resume rows name no sources; "
            'needed: "sources": [{"name": ..., "samples": ...}, ...] in them'
        )
    return attempts


def _attempt(
    run: Path, number: int, files: list[tuple[int, int, Path]], events: list[dict[str, Any]], failures: list[str]
) -> Attempt:
    label = f"{run} attempt {number}"
    began = [event for event in events if event.get("event") in ("start", "resume")][-1:]
    worlds = sorted({world for world, _, _ in files})
    world = int(began[0].get("world", 1)) if began else 0
    if len(worlds) > 1:
        failures.append(f"{label}: its files are of {' and of '.join(map(str, worlds))} ranks; needed: one number")
    elif worlds and world and worlds != [world]:
        failures.append(f"{label}: its files are of {worlds[0]} ranks, its event says {world}")
    world = world if not worlds or world in worlds else worlds[-1]
    by_rank = {rank: path for of, rank, path in files if of == world and rank < world}
    failures += [f"{path}: there is no rank {rank} of {of}" for of, rank, path in files if rank >= of]
    tables = [_index(path, rank, failures) for rank, path in sorted(by_rank.items())]
    rows = np.concatenate([np.empty((0, 5), np.int64), *tables])
    seen = int(rows[:, STEP].min()) if len(rows) else 0
    first = int(began[0]["step"]) if began else seen
    if len(rows) and seen != first:
        failures.append(f"{label}: its rows begin with step {seen}, its event says step {first}")
    sources = [(str(s["name"]), int(s["samples"])) for s in began[0].get("sources", [])] if began else []
    reached = max((int(e["step"]) for e in events if e.get("event") in ("save", "preempt", "end")), default=0)
    skipped = frozenset(int(e["step"]) for e in events if e.get("event") == "skip")
    first = min(first, seen) if len(rows) else first
    return Attempt(run, number, world, first, reached, skipped, sources, rows, by_rank)


def _read_events(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Rows of events.jsonl by attempt; a line cut by a crash is dropped."""
    found: dict[int, list[dict[str, Any]]] = {}
    path = run / "events.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            found.setdefault(int(row["attempt"]), []).append(row)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found


def _index(path: Path, rank: int, failures: list[str]) -> np.ndarray:
    """Where each row of a file lies -> int64 (rows, 5); a last line that was cut is dropped, any other is a failure."""
    found, offset, bad = array("q"), 0, []
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            head = ROW_HEAD.match(line)
            # A row that was cut cannot end like this: only its end holds these two together.
            if head is not None and line.rstrip().endswith(b"]}"):
                found.extend((int(head[1]), int(head[2]), rank, offset, len(line)))
            elif line.strip():
                bad.append(number)
            offset += len(line)
    failures += [f"{path}, line {line}: no audit row" for line in bad[:SHOWN] if line != number]
    return np.array(found, np.int64).reshape(-1, 5)


# -- which attempt counts where -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The steps `begin` to before `end` of an attempt, which no later attempt replaced."""

    attempt: Attempt
    begin: int
    end: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        a = self.attempt
        return {"run": str(a.run), "attempt": a.number, "world": a.world, "begin": self.begin, "end": self.end}

    @cached_property
    def rows(self) -> np.ndarray:
        """The attempt's rows of these steps, by step, then micro-step, then rank."""
        rows = self.attempt.rows
        rows = rows[(rows[:, STEP] >= self.begin) & (rows[:, STEP] < self.end)]
        return rows[np.lexsort((rows[:, RANK], rows[:, MICRO_STEP], rows[:, STEP]))]

    @property
    def skipped(self) -> list[int]:
        """Its steps that were drawn but not applied."""
        return sorted(step for step in self.attempt.skipped if self.begin <= step < self.end)

    def gaps(self) -> list[str]:
        """Rows that are missing or there twice."""
        a, rows = self.attempt, self.rows
        found, counts = np.unique(a.keys(rows), return_counts=True)
        per_step = a.world * a.micro_steps
        lines = []
        for key in found[counts > 1][:SHOWN]:
            (step, rank, micro_step) = np.unravel_index(key, (self.end, a.world, a.micro_steps))
            lines.append(f"{a.label}: rank {rank} has step {step}, micro-step {micro_step} more than once")
        if len(found) == (self.end - self.begin) * per_step:
            return lines
        lost = np.setdiff1d(np.arange(self.begin, self.end), rows[:, STEP])
        if lost.size:
            lines.append(f"{a.label}: no rank has {_steps(lost)}")
        lacking = np.setdiff1d(np.arange(self.begin * per_step, self.end * per_step), found)
        lacking = lacking[~np.isin(lacking // per_step, lost)]
        ranks = lacking // a.micro_steps % a.world
        for rank in np.unique(ranks)[:SHOWN]:
            file = "" if int(rank) in a.files else " (it has no file)"
            steps = np.unique(lacking[ranks == rank] // per_step)
            lines.append(f"{a.label}: rank {rank} of {a.world} lacks rows of {_steps(steps)}{file}")
        more = len(np.unique(ranks)) - SHOWN
        return [*lines, f"{a.label}: {more} more ranks lack rows"] if more > 0 else lines


def _steps(steps: np.ndarray) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    if int(steps[-1] - steps[0]) == len(steps) - 1:
        return f"steps {steps[0]} to {steps[-1]}"
    return f"{len(steps)} steps: {', '.join(map(str, steps[:SHOWN]))}{', ...' if len(steps) > SHOWN else ''}"


def lineage(attempts: list[Attempt], trimmed: list[str], failures: list[str]) -> list[Piece]:
    """The attempts that the newest one descends from, back to step 0, each up to where the next one begins.

    An attempt can have continued only one that got as far as its first step: the newest of those is its parent.
    """
    newest = attempts[-1]
    pieces = [Piece(newest, newest.first, _trimmed_end(newest, trimmed))]
    older = attempts[:-1]
    while (need := pieces[-1].begin) > 0:
        earlier = [i for i, attempt in enumerate(older) if attempt.first < need]
        if not earlier:
            failures.append(f"{_steps(np.arange(need))}: nothing lies before {pieces[-1].attempt.label}")
            break
        # Where none got so far, the newest is taken and its missing steps are reported.
        parent = next((i for i in reversed(earlier) if older[i].end >= need), earlier[-1])
        pieces.append(Piece(older[parent], older[parent].first, need))
        older = older[:parent]
    return pieces[::-1]


def _trimmed_end(newest: Attempt, trimmed: list[str]) -> int:
    """Where the newest attempt's complete steps end.

    Ranks meet in every step, so that a kill interrupts one step only; whatever else is incomplete was lost and counts.
    """
    end = int(newest.complete[-1]) + 1 if len(newest.complete) else newest.first
    if newest.end != end + 1 or newest.reached > end:
        return newest.end
    partial = newest.rows[newest.rows[:, STEP] == end]
    rows = f"{len(partial)} of {newest.world * newest.micro_steps} rows"
    trimmed.append(f"{newest.label}: step {end}, of which a kill left {rows}")
    return end


def read_sources(pieces: list[Piece], failures: list[str]) -> list[tuple[str, int]]:
    """(name, samples) by source index, the same in every attempt that names them."""
    named = [piece.attempt for piece in pieces if piece.attempt.sources]
    if not named:
        raise UserError(f"{pieces[-1].attempt.label}: its event names no sources")
    failures += [
        f"{a.label} has the sources {a.sources}, {named[0].label} has {named[0].sources}; needed: the same data"
        for a in named[1:]
        if a.sources != named[0].sources
    ]
    return named[0].sources


# -- reading samples ------------------------------------------------------------------------------------------


def steps_of(piece: Piece, failures: list[str]) -> Iterator[tuple[int, np.ndarray, list[np.ndarray]]]:
    """Step, its index rows and their samples, int64 (n, 4) each."""
    rows = piece.rows
    if not len(rows):
        return
    for part in np.split(rows, np.flatnonzero(np.diff(rows[:, STEP])) + 1):
        tables = [_read_samples(piece.attempt.files[int(row[RANK])], row, failures) for row in part]
        yield int(part[0, STEP]), part, tables


def _read_samples(path: Path, row: np.ndarray, failures: list[str]) -> np.ndarray:
    """One row's samples -> int64 (n, 4); what is no list of four integers becomes a failure and no samples."""
    with path.open("rb") as file:
        file.seek(int(row[OFFSET]))
        line = file.read(int(row[SIZE])).rstrip()
    head = ROW_HEAD.match(line)
    assert head is not None  # the index holds no other line
    body = line[head.end() : -1]
    # Python's JSON takes four times as long, most of a big audit's time; it is asked only where this does not fit.
    count = body.count(b"[") - 1
    if count and body.translate(None, b"0123456789 ") == b"[" + b",".join([b"[,,,]"] * count) + b"]":
        values = np.fromstring(body.translate(bytes.maketrans(b"[],", b"   ")), np.int64, sep=" ")
        if len(values) == 4 * count:
            return values.reshape(-1, 4)
    try:
        samples = json.loads(line)["samples"]
        if {len(sample) for sample in samples} <= {4}:
            return np.array(list(chain.from_iterable(samples)), np.int64).reshape(-1, 4)
    except (ValueError, TypeError, OverflowError):
        pass
    failures.append(f"{path}: step {row[STEP]} holds no [source, epoch, id, substitute] rows")
    return np.empty((0, 4), np.int64)
