"""What the figures say about each of the sampler's promises."""

import math
from dataclasses import dataclass

from m3i_large.data.mixture import Mixture
from m3i_large.data.simulate.batches import Batches
from m3i_large.data.simulate.counts import Counts
from m3i_large.data.simulate.once import Once
from m3i_large.data.simulate.reads import Reads

PROVEN, IN_PART, FAILED, NOT_JUDGED = "PROVEN", "IN PART", "FAILED", "NOT JUDGED"
DRIFT = 2.0  # slots per lane (SAMPLER 3)
SHUFFLE_TOLERANCE, HELD_TOLERANCE, READ_TWICE = 0.05, 0.15, 0.02
PLAN_SECONDS, PLAN_BYTES, SEEK_SECONDS = 1.0, 200e6, 0.2  # SAMPLER 8, T11


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One promise: PROVEN, IN PART (all that was looked at holds), FAILED or NOT JUDGED (there was nothing to see)."""

    promise: str
    verdict: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the order itself takes: time and memory to plan it, time of a rank's first step at the run's end, and of
    one step after another. Seconds and bytes.
    """

    plan_seconds: float
    plan_bytes: int
    seek_seconds: float
    step_seconds: float


def judge(
    mixture: Mixture, *, counts: Counts, once: list[Once], batches: Batches, reads: Reads, cost: Cost
) -> list[Verdict]:
    """One verdict for each promise, in the order of the figures."""
    return [
        _split(counts),
        _length(mixture, counts),
        *(_once(part) for part in once),
        *_duplicates(batches),
        _ranks(batches),
        *_shuffle(batches),
        *_reads(reads),
        _cost(cost),
    ]


def _verdict(promise: str, holds: bool, detail: str, *, whole: bool = True) -> Verdict:
    return Verdict(promise=promise, verdict=(PROVEN if whole else IN_PART) if holds else FAILED, detail=detail)


def _split(counts: Counts) -> Verdict:
    worst = max(counts.sources, key=lambda source: source.drift)
    detail = f"{counts.looked_at:,} of {counts.steps:,} steps; at most {worst.drift:.2f} slots off, {worst.name}"
    return _verdict(
        f"every step fills every lane, and the split never drifts by {DRIFT:g} slots",
        counts.filled and worst.drift < DRIFT,
        detail if counts.filled else f"{detail}; a step does not fill its lanes",
        whole=counts.looked_at == counts.steps,
    )


def _length(mixture: Mixture, counts: Counts) -> Verdict:
    """Every source gets what it was to get; the last to get there is late by its drift in a split by weight."""
    promise = "the run ends with the first step that gives every source its epochs"
    if counts.shortest is None:
        return Verdict(promise=promise, verdict=NOT_JUDGED, detail="the recipe fixes the number of steps")
    batch = mixture.slots * mixture.lanes
    over = sum(source.overshoot or 0.0 for source in counts.sources) / batch
    bound = math.inf if mixture.quotas else 1 + DRIFT / min(source.share for source in counts.sources)
    short = [source.name for source in counts.sources if (source.overshoot or 0.0) < 0]
    detail = f"{over:.2f} batches more than asked for"
    if short:
        detail += f"; short: {', '.join(short)}"
    elif not counts.shortest:
        detail += "; fewer steps would do"
    return _verdict(promise, counts.shortest and not short and over <= bound, detail)


def _once(once: Once) -> Verdict:
    place = f"epoch {once.epoch}: {once.drawn:,} draws"
    if once.complete:
        detail = f"{place}, {once.distinct:,} distinct; {once.missing:,} ids missing, {once.repeated:,} draws repeated"
    else:
        detail = f"{place} (first and last) of {once.samples:,}, {once.repeated:,} repeated; the rest was not played"
    if once.drawn < once.wanted:
        detail += f"; {once.wanted - once.drawn:,} positions gave no id of this epoch"
    return _verdict(f"{once.name}: every id exactly once an epoch", once.holds, detail, whole=once.complete)


def _duplicates(batches: Batches) -> list[Verdict]:
    result = []
    for source in batches.sources:
        promise = f"{source.name}: no sample twice in a global batch"
        seen, edges = source.edges
        detail = f"{source.duplicates:,} repeats in {batches.steps} steps, with {seen} of {edges} epoch edges"
        if source.large:
            result.append(_verdict(promise, source.duplicates == 0, detail, whole=seen == edges))
        else:
            detail += "; the source is smaller than 3 batches of its share"
            result.append(Verdict(promise=promise, verdict=NOT_JUDGED, detail=detail))
    return result


def _ranks(batches: Batches) -> Verdict:
    promise = "all ranks have the same split and make up the same batch at every number of ranks"
    detail = f"{batches.rank_steps} steps at this number of ranks, one at every valid number"
    if batches.unequal:
        step, ranks = batches.unequal[0]
        detail += f"; not at step {step} on {ranks} ranks, and {len(batches.unequal) - 1} more"
    return _verdict(promise, not batches.unequal, detail)


def _shuffle(batches: Batches) -> list[Verdict]:
    result = []
    for source in batches.sources:
        promise = f"{source.name}: neighbours and same-shard mates in a batch as of blocks shuffled in windows"
        detail = (
            f"{source.neighbours:.3f} neighbours per sample, expected {source.neighbours_expected:.3f}; "
            f"{source.mates:.3f} mates, expected {source.mates_expected:.3f}"
        )
        if not source.large or source.judged == 0:
            result.append(Verdict(promise=promise, verdict=NOT_JUDGED, detail=detail))
            continue
        pairs = ((source.neighbours, source.neighbours_expected), (source.mates, source.mates_expected))
        result.append(_verdict(promise, all(_near(a, b, draws=source.judged) for a, b in pairs), detail))
    return result


def _near(measured: float, expected: float, *, draws: int) -> bool:
    """Within the tolerance, and six deviations of a count: pairs come in twos, mates of one block together."""
    chance = 6 * math.sqrt(2 * expected * draws) + 12
    return abs(measured - expected) * draws <= SHUFFLE_TOLERANCE * expected * draws + chance


def _reads(reads: Reads) -> list[Verdict]:
    result = []
    for source in reads.sources:
        promise = f"{source.name}: every byte is read by one rank once, and soon used up"
        held = f"{source.held_bytes / 1e6:.1f} MB held per rank, expected {source.held_expected / 1e6:.1f}"
        detail = f"{source.amplification:.4f} x the bytes used; {held}"
        if not reads.complete or source.requests == 0:
            detail += "; windows are longer than what was played" if not reads.complete else "; nothing was read"
            result.append(Verdict(promise=promise, verdict=NOT_JUDGED, detail=detail))
            continue
        soon = source.held_bytes <= (1 + HELD_TOLERANCE) * source.held_expected
        result.append(_verdict(promise, soon and source.amplification <= 1 + READ_TWICE, detail))
    return result


def _cost(cost: Cost) -> Verdict:
    return _verdict(
        "planning and seeking take no time and no memory",
        cost.plan_seconds < PLAN_SECONDS and cost.plan_bytes < PLAN_BYTES and cost.seek_seconds < SEEK_SECONDS,
        f"{1e3 * cost.plan_seconds:.2f} ms and {cost.plan_bytes / 1e6:.1f} MB to plan, "
        f"{1e3 * cost.seek_seconds:.1f} ms to the run's last step, {1e3 * cost.step_seconds:.2f} ms a step and rank",
    )
