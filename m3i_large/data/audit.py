"""Proves from the audit files of a run, or of a chain of runs, that every sample was drawn exactly once an epoch."""

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from m3i_large.data.audit_files import (
    EPOCH,
    ID,
    RANK,
    SHOWN,
    SOURCE,
    STEP,
    SUBSTITUTE,
    Piece,
    lineage,
    read_attempts,
    read_sources,
    steps_of,
)
from m3i_large.errors import UserError


@dataclass(frozen=True)
class SourceAudit:
    """What was drawn of one source.

    Attributes:
        samples: n, its ids are 0 to n - 1.
        epochs_finished: epochs that hold every id exactly once.
        draws: samples drawn.
        distinct: different (epoch, id) among them, ids outside the source not counted.
        missing: ids that the epochs before the running one lack.
        repeated: draws of an id that its epoch held already.
        outside: draws of an id or epoch that does not exist.
        substitutes: draws whose sample was unreadable and replaced by another; they count as draws of their own id.
        skipped: draws in steps that were not applied; they count as draws all the same.
    """

    name: str
    samples: int
    epochs_finished: int
    draws: int
    distinct: int
    missing: int
    repeated: int
    outside: int
    substitutes: int
    skipped: int


@dataclass(frozen=True)
class Audit:
    """The verdict on a run or a chain of runs.

    Attributes:
        steps: 0 to steps - 1 were looked at.
        samples_per_step: N.
        attempts: {run, attempt, world, begin, end}: which attempt's rows count from step `begin` to before `end`.
        skipped: steps that were drawn but not applied.
        trimmed: what a kill left incomplete and was not counted.
        failures: everything found wrong; none means proven.
    """

    runs: list[str]
    steps: int
    samples_per_step: int
    attempts: list[dict[str, Any]]
    skipped: list[int]
    sources: list[SourceAudit]
    trimmed: list[str]
    failures: list[str]

    @property
    def proven(self) -> bool:
        """Whether every epoch drew every sample exactly once, in order, with nothing lost."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"proven": self.proven, **asdict(self)}

    def to_text(self) -> str:
        """The same for people to read."""
        lines = [
            f"{a['run']} attempt {a['attempt']}: steps {a['begin']} to {a['end'] - 1} on {a['world']} ranks"
            for a in self.attempts
        ]
        for s in self.sources:
            lines.append(
                f"source {s.name}: {s.samples} samples, {s.epochs_finished} epochs finished, {s.draws} draws, "
                f"{s.distinct} distinct, {s.missing} missing, {s.repeated} repeated, {s.outside} outside, "
                f"{s.substitutes} replaced, {s.skipped} not applied"
            )
        if self.skipped:
            more = ", ..." if len(self.skipped) > SHOWN else ""
            named = ", ".join(map(str, self.skipped[:SHOWN])) + more
            lines.append(f"not applied: {len(self.skipped)} steps, whose samples count as drawn: {named}")
        lines += [f"not counted: {what}" for what in self.trimmed] + [f"WRONG: {what}" for what in self.failures]
        drawn = f"{self.steps} steps, {sum(s.draws for s in self.sources)} draws"
        verdict = "every sample exactly once an epoch: proven" if self.proven else "exactly once an epoch: NOT PROVEN"
        return "\n".join([*lines, f"{verdict} ({drawn})"])


def audit_runs(runs: Sequence[Path]) -> Audit:
    """Audits one run directory, or several of which each continues the one before it.

    Raises:
        UserError: a directory without audit files, or whose events.jsonl does not name the sources.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"runs: got {', '.join(map(str, runs))}; needed: different directories, the oldest first")
    failures: list[str] = []
    trimmed: list[str] = []
    attempts = [attempt for run in runs for attempt in read_attempts(run, failures)]
    pieces = lineage(attempts, trimmed, failures)
    unused = [run for run in runs if all(piece.attempt.run != run for piece in pieces)]
    failures += [f"{run} holds no step that counts; needed: the runs in the order they were trained" for run in unused]
    sources = read_sources(pieces, failures)
    ledgers = [_Ledger(name, samples) for name, samples in sources]
    sizes = []
    for piece in pieces:
        failures += piece.gaps()
        sizes.append(_count(piece, ledgers, failures))
    failures += [
        f"{b.attempt.label} draws {m} samples a step, {a.attempt.label} {n}; needed: the same"
        for (a, n), (b, m) in pairwise((piece, size) for piece, size in zip(pieces, sizes, strict=True) if size)
        if n != m and a.attempt.run == b.attempt.run  # another run may have another batch
    ]
    steps = sum(piece.end - piece.begin for piece in pieces)
    failures += [] if steps else ["there is no complete step"]
    places = _places(pieces, {(i, *what) for i, ledger in enumerate(ledgers) for what in ledger.wrong[:SHOWN]})
    for i, ledger in enumerate(ledgers):
        failures += ledger.failures({(epoch, id): where for (s, epoch, id), where in places.items() if s == i})
    used = [piece.to_dict() for piece in pieces if piece.end > piece.begin]
    found = [ledger.result() for ledger in ledgers]
    skipped = [step for piece in pieces for step in piece.skipped]
    return Audit([str(run) for run in runs], steps, max(sizes, default=0), used, skipped, found, trimmed, failures)


# -- counting -------------------------------------------------------------------------------------------------


@dataclass
class _Epoch:
    seen: np.ndarray | None  # bool (n,); None once all are seen: big sources need their n bytes only while they run
    draws: int = 0
    distinct: int = 0


@dataclass
class _Ledger:
    """Which ids of one source each epoch has drawn."""

    name: str
    samples: int
    epochs: dict[int, _Epoch] = field(default_factory=dict)
    draws: int = 0
    substitutes: int = 0
    skipped: int = 0
    outside: int = 0
    wrong: list[tuple[int, int]] = field(default_factory=list)  # (epoch, id) to be named
    disorder: list[str] = field(default_factory=list)

    def add(self, step: int, samples: np.ndarray, *, applied: bool) -> None:
        """Takes all of a step's samples of this source, int64 (rows, 4)."""
        self.draws += len(samples)
        self.skipped += 0 if applied else len(samples)
        self.substitutes += int((samples[:, SUBSTITUTE] > 0).sum())
        epoch, ids = samples[:, EPOCH], samples[:, ID]
        outside = (ids < 0) | (ids >= self.samples) | (epoch < 0)
        if outside.any():
            self.outside += int(outside.sum())
            self._remember(samples[outside])
            epoch, ids = epoch[~outside], ids[~outside]
        before = max(self.epochs, default=0)
        for e in np.unique(epoch):
            self._draw(int(e), ids[epoch == e])
        newest = max(self.epochs, default=0)
        # An epoch may begin within the step in which the one before ends, but no earlier.
        short = next((e for e in range(before, newest) if self._drawn(e) < self.samples), None)
        if short is not None and len(self.disorder) < SHOWN:
            self.disorder.append(
                f"source {self.name}: epoch {newest} begins in step {step}, when {self._drawn(short)} "
                f"of the {self.samples} samples of epoch {short} were drawn"
            )

    def _drawn(self, epoch: int) -> int:
        return self.epochs[epoch].draws if epoch in self.epochs else 0

    def _draw(self, e: int, ids: np.ndarray) -> None:
        epoch = self.epochs.get(e)
        if epoch is None:
            epoch = self.epochs[e] = _Epoch(np.zeros(self.samples, bool))
        epoch.draws += len(ids)
        different, times = np.unique(ids, return_counts=True)
        old = np.ones(len(different), bool) if epoch.seen is None else epoch.seen[different]
        epoch.distinct += int((~old).sum())
        if epoch.seen is not None:
            epoch.seen[different] = True
            epoch.seen = None if epoch.distinct == self.samples else epoch.seen
        again = different[old | (times > 1)]
        if again.size:
            self._remember(np.stack([np.zeros_like(again), np.full_like(again, e), again], axis=1))

    def _remember(self, samples: np.ndarray) -> None:
        room = SHOWN - len(self.wrong)
        new = [(int(row[EPOCH]), int(row[ID])) for row in samples[: max(0, room)]]
        self.wrong += [what for what in dict.fromkeys(new) if what not in self.wrong]

    def result(self) -> SourceAudit:
        """The figures; call after the last step."""
        distinct = sum(epoch.distinct for epoch in self.epochs.values())
        running = max(self.epochs, default=0)
        return SourceAudit(
            name=self.name,
            samples=self.samples,
            epochs_finished=sum(e.draws == e.distinct == self.samples for e in self.epochs.values()),
            draws=self.draws,
            distinct=distinct,
            missing=running * self.samples - sum(x.distinct for e, x in self.epochs.items() if e < running),
            repeated=self.draws - self.outside - distinct,
            outside=self.outside,
            substitutes=self.substitutes,
            skipped=self.skipped,
        )

    def failures(self, places: dict[tuple[int, int], list[str]]) -> list[str]:
        """Sentences on what is wrong; `places`: where the remembered draws are."""
        result, running = self.result(), max(self.epochs, default=0)
        lines = list(self.disorder)
        short = (e for e in range(running) if e not in self.epochs or self.epochs[e].seen is not None)
        for e in islice(short, SHOWN):
            seen = self.epochs[e].seen if e in self.epochs else None
            ids = np.arange(self.samples) if seen is None else np.flatnonzero(~seen)
            named = ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
            lines.append(f"source {self.name}: epoch {e} lacks {len(ids)} of {self.samples} ids: {named}")
        kinds = [f"{result.repeated} draws repeat an id"] if result.repeated else []
        kinds += [f"{result.outside} draws lie outside 0 to {self.samples - 1}"] if result.outside else []
        if kinds:
            named = "; ".join(f"epoch {e} id {i}: {', '.join(places.get((e, i), []))}" for e, i in self.wrong[:SHOWN])
            lines.append(f"source {self.name}: {' and '.join(kinds)}; {named}")
        return lines


def _count(piece: Piece, ledgers: list[_Ledger], failures: list[str]) -> int:
    """Enters a piece's samples step by step; returns the samples of one of its steps."""
    label, lengths, strange, skipped = piece.attempt.label, array("q"), 0, set(piece.skipped)
    for step, _, tables in steps_of(piece, failures):
        lengths.extend(map(len, tables))
        samples = np.concatenate(tables)
        known = 0
        for index, ledger in enumerate(ledgers):
            mine = samples[samples[:, SOURCE] == index]
            known += len(mine)
            if len(mine):
                ledger.add(step, mine, applied=step not in skipped)
        strange += len(samples) - known
    if strange:
        failures.append(f"{label}: {strange} samples of a source that is none of 0 to {len(ledgers) - 1}")
    if not lengths:
        return 0
    # All ranks and micro-steps hold equally many whole lanes, so every row is as long as most rows are.
    values, counts = np.unique(lengths, return_counts=True)
    usual = int(values[counts.argmax()])
    for i in np.flatnonzero(np.array(lengths) != usual)[:SHOWN]:
        step, rank = piece.rows[i, STEP], piece.rows[i, RANK]
        failures.append(f"{label}: step {step} of rank {rank} holds {lengths[i]} samples; needed: {usual} as elsewhere")
    return usual * piece.attempt.world * piece.attempt.micro_steps


def _places(pieces: list[Piece], wanted: set[tuple[int, int, int]]) -> dict[tuple[int, int, int], list[str]]:
    """Where the wanted (source, epoch, id) were drawn; reads the files once more, only if there are any."""
    found: dict[tuple[int, int, int], list[str]] = {what: [] for what in wanted}
    if not wanted:
        return found
    ids = np.array(sorted({id for _, _, id in wanted}))
    for piece in pieces:
        for step, rows, tables in steps_of(piece, []):
            for row, table in zip(rows, tables, strict=True):
                for sample in table[np.isin(table[:, ID], ids)]:
                    if (what := (int(sample[SOURCE]), int(sample[EPOCH]), int(sample[ID]))) in found:
                        found[what].append(f"step {step} rank {row[RANK]}")
    return found
