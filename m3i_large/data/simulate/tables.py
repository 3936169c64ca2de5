"""The figures as tables for the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from m3i_large.data.simulate import Simulation
from m3i_large.data.simulate.verdicts import FAILED, IN_PART, PROVEN

COLOURS = {PROVEN: "green", IN_PART: "yellow", FAILED: "bold red"}


def print_tables(simulation: Simulation, console: Console, *, title: str) -> None:
    """Prints everything in the order in which it was computed, the verdicts last."""
    mixture, valid = simulation.mixture, ", ".join(map(str, simulation.mixture.valid_world_sizes()))
    console.print(
        f"[bold]{title}[/bold]: {simulation.counts.steps:,} steps of {simulation.global_batch:,} samples on "
        f"{simulation.world} ranks; {mixture.lanes} lanes of {mixture.slots} slots, "
        f"{mixture.accumulation} micro-steps; ranks that fit: {valid}"
    )
    for table in (_run(simulation), _once(simulation), _batches(simulation), _reads(simulation)):
        console.print(table)
    console.print(_cluster(simulation))
    console.print(_verdicts(simulation))


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def _run(simulation: Simulation) -> Table:
    table = _table(
        "The whole run, closed form (slots: samples per lane and step, mean and least to most)",
        *("source", "samples", "drawn", "epochs", "wanted", "over", "slots", "least-most", "drift"),
    )
    for source in simulation.counts.sources:
        table.add_row(
            source.name,
            f"{source.samples:,}",
            f"{source.drawn:,}",
            f"{source.epochs:.4f}",
            "-" if source.wanted is None else f"{source.wanted:g}",
            "-" if source.overshoot is None else f"{source.overshoot:,.0f}",
            f"{source.share:.3f}",
            f"{source.slots[0]}-{source.slots[1]}",
            f"{source.drift:.2f}",
        )
    return table


def _once(simulation: Simulation) -> Table:
    whole = all(part.complete for part in simulation.once)
    table = _table(
        "One late epoch of every source"
        + ("" if whole else ", QUICK: of large ones only the first and last 4 M draws"),
        *("source", "epoch", "draws seen", "of", "ids missing", "draws repeated", "exactly once"),
    )
    for part in simulation.once:
        table.add_row(
            part.name,
            str(part.epoch),
            f"{part.drawn:,}",
            f"{part.samples:,}",
            f"{part.missing:,}" if part.complete else "?",
            f"{part.repeated:,}",
            ("yes" if part.complete else "so far") if part.holds else "NO",
        )
    return table


def _batches(simulation: Simulation) -> Table:
    table = _table(
        f"Global batches: {simulation.batches.steps} steps, random and at epoch edges (others per sample)",
        *("source", "edges", "repeats", "neighbours", "expected", "(b-1)/T_w", "same shard", "expected", "ideal"),
    )
    for source in simulation.batches.sources:
        table.add_row(
            source.name,
            f"{source.edges[0]} of {source.edges[1]}",
            f"{source.duplicates:,}",
            f"{source.neighbours:.3f}",
            f"{source.neighbours_expected:.3f}",
            f"{source.neighbours_rule:.3f}",
            f"{source.mates:.3f}",
            f"{source.mates_expected:.3f}",
            f"{source.mates_ideal:.3f}",
        )
    return table


def _reads(simulation: Simulation) -> Table:
    reads, counts = simulation.reads, simulation.counts.sources
    seconds = (reads.last - reads.first) * simulation.step_seconds
    table = _table(
        f"Reads per rank, steps {reads.first:,} to {reads.last - 1:,}, at {simulation.gpu_rate:g} samples/s and GPU "
        "(samples and MB: of a request)",
        *(
            "source",
            "block",
            "K",
            "T_w",
            "requests/s",
            "samples",
            "MB",
            "read/used",
            "held MB",
            "expected",
        ),
    )
    for source, count in zip(reads.sources, counts, strict=True):
        table.add_row(
            source.name,
            str(count.block) if count.blocks_per_window else "single",
            str(count.blocks_per_window),
            f"{source.window_steps:.0f}" if source.window_steps else "-",
            f"{source.requests / seconds / simulation.world:.2f}",
            f"{source.samples_per_request:.2f}",
            f"{source.bytes_per_request / 1e6:.3f}",
            f"{source.amplification:.4f}",
            f"{source.held_bytes / 1e6:.1f}",
            f"{source.held_expected / 1e6:.1f}",
        )
    return table


def _cluster(simulation: Simulation) -> Table:
    figures, cost = simulation.cluster(), simulation.cost
    table = _table("Rank and cluster", "what", "a rank", "all ranks")
    table.add_row("requests/s", f"{figures['rank_requests_per_s']:.2f}", f"{figures['cluster_requests_per_s']:,.0f}")
    table.add_row("MB/s", f"{figures['rank_bytes_per_s'] / 1e6:.1f}", f"{figures['cluster_bytes_per_s'] / 1e6:,.0f}")
    table.add_row("most requests in 16 steps / mean", f"{figures['rank_burst']:.2f}", f"{figures['cluster_burst']:.2f}")
    held = figures["rank_held_bytes_mean"] / 1e9
    table.add_row("GB in memory, mean", f"{held:.3f}", f"{held * simulation.world:.1f}")
    table.add_row("GB in memory, most", f"{figures['rank_held_bytes_max'] / 1e9:.3f}", "")
    table.add_row("seconds a step", f"{figures['step_seconds']:.3f}", "")
    table.add_row("order: ms to plan", f"{1e3 * cost.plan_seconds:.2f}", "")
    table.add_row("order: MB of memory", f"{cost.plan_bytes / 1e6:.2f}", "")
    table.add_row("order: ms to seek the last step", f"{1e3 * cost.seek_seconds:.1f}", "")
    table.add_row("order: ms a step", f"{1e3 * cost.step_seconds:.2f}", "")
    return table


def _verdicts(simulation: Simulation) -> Table:
    table = _table("Verdicts", "verdict", "promise", "seen", left=3)
    for verdict in simulation.verdicts:
        colour = COLOURS.get(verdict.verdict, "dim")
        table.add_row(f"[{colour}]{verdict.verdict}[/{colour}]", verdict.promise, verdict.detail)
    return table
