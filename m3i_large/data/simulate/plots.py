"""The figures as pictures: split, order, shuffle, reads."""

from pathlib import Path
from typing import Any

import numpy as np

from m3i_large.data.simulate import Simulation

POINTS, WINDOWS = 4000, 3  # of a source in the picture of its order: the more of the two
STRETCH = 16  # steps over which requests are summed


def draw_plots(simulation: Simulation, directory: Path) -> list[Path]:
    """Writes split.png, order.png, shuffle.png and reads.png; returns their paths."""
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    num, paths = len(simulation.mixture.orders), []
    panels = {"split": (_split, 2, 1), "order": (_order, 1, num), "shuffle": (_shuffle, 1, 2), "reads": (_reads, 2, 1)}
    for name, (draw, rows, columns) in panels.items():
        size = (max(9.0, 3.2 * columns), 6.5 if rows == 2 else 4.2)
        figure = Figure(figsize=size, layout="constrained")
        draw(simulation, figure.subplots(rows, columns, squeeze=False).flatten())
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _split(simulation: Simulation, axes: Any) -> None:
    """Slots per lane of each source, and how far the split strays from exact proportions."""
    counts = simulation.counts
    names = [source.name for source in counts.sources]
    share = np.array([source.share for source in counts.sources])
    low, high = np.array([source.slots for source in counts.sources]).T
    axes[0].barh(names, share, xerr=[share - low, high - share], color="tab:blue", capsize=4)
    for i, source in enumerate(counts.sources):
        axes[0].annotate(
            f"{source.slots[0]} to {source.slots[1]}, mean {source.share:.2f}",
            (high[i], i),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes[0].set(xlabel="samples per lane and step (bar: mean, line: least to most)", xlim=(0, 1.35 * high.max()))
    axes[0].invert_yaxis()
    for s, name in enumerate(names):
        axes[1].step(counts.at_T, counts.drift_TS[:, s], where="post", label=name, linewidth=1.2)
    axes[1].set(
        xlabel="step",
        ylabel="slots per lane",
        ylim=(0, 2),
    )
    axes[1].set_title("Furthest from exact proportions, per stretch of steps")
    axes[1].legend(ncols=4, loc="upper left")


def _order(simulation: Simulation, axes: Any) -> None:
    """Ids of one lane's draws in part of an epoch: runs of colour are blocks, columns are windows."""
    for order, once, panel in zip(simulation.mixture.orders, simulation.once, axes, strict=True):
        rows = max(1, order.n // order.V)
        window = order.Kt * order.b / order.F if order.F else 0
        most = max(POINTS, int(WINDOWS * window))
        shown = np.arange(min(rows, most)) if order.K else np.arange(rows)[:: max(1, rows // POINTS)]
        position = once.epoch * order.n + shown * order.V
        _, offset, ids = order.ids(position)
        size = 1.5 if shown.size <= POINTS else 0.6
        panel.scatter(offset / order.V, ids / 1e6, s=size, linewidths=0, color="tab:blue")
        panel.set_title(f"{order.name}, epoch {once.epoch}" + ("" if order.K else ", single reads"), fontsize=9)
        panel.set(xlabel="draw of lane 0", ylim=(0, order.n / 1e6))
        for edge in np.arange(window, shown[-1] + 1, window) if window else ():
            panel.axvline(edge, color="tab:red", linewidth=0.6, alpha=0.6)
    axes[0].set_ylabel("id, millions (a row of dots: a block; red: windows)")


def _shuffle(simulation: Simulation, axes: Any) -> None:
    """Neighbours and same-shard mates per sample: measured, expected, and by the rule or of an ideal shuffle."""
    sources = simulation.batches.sources
    place, names = np.arange(len(sources)), [source.name for source in sources]
    columns = {
        "Neighbours in the global batch, |id difference| < b": (
            ("measured", "neighbours"),
            ("expected", "neighbours_expected"),
            ("(b - 1) / T_w", "neighbours_rule"),
        ),
        "Of the same shard in the global batch": (
            ("measured", "mates"),
            ("expected", "mates_expected"),
            ("ideal shuffle", "mates_ideal"),
        ),
    }
    for panel, (title, bars) in zip(axes, columns.items(), strict=True):
        for i, (label, name) in enumerate(bars):
            values = [getattr(source, name) for source in sources]
            drawn = panel.bar(place + 0.27 * (i - 1), values, 0.25, label=label)
            panel.bar_label(drawn, fmt="%.2f", fontsize=6)
        panel.set_xticks(place, names, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_ylabel("others per sample")
        panel.legend(fontsize=8)


def _reads(simulation: Simulation, axes: Any) -> None:
    """Requests per second in stretches of steps, and memory, of the first rank and over all ranks."""
    reads = simulation.reads
    stretch = min(STRETCH, len(reads.requests_TW))
    summed_TW = np.concatenate([np.zeros((1, simulation.world)), reads.requests_TW.cumsum(0)])
    per_second_TW = (summed_TW[stretch:] - summed_TW[:-stretch]) / (stretch * simulation.step_seconds)
    held_TW = reads.held_TW / 1e9
    middles = reads.first + stretch / 2 + np.arange(len(per_second_TW))
    labels = (f"requests/s, means of {stretch} steps", "raw samples in memory, GB")
    shown = ((middles, per_second_TW), (np.arange(reads.first, reads.last), held_TW))
    for panel, (steps, values_TW), label in zip(axes, shown, labels, strict=True):
        panel.fill_between(steps, values_TW.min(1), values_TW.max(1), alpha=0.25, label="all ranks, least to most")
        panel.plot(steps, values_TW[:, 0], linewidth=1, color="tab:orange", label="rank 0")
        panel.plot(steps, values_TW.mean(1), linewidth=1.4, color="black", label="mean of the ranks")
        panel.set(ylabel=label, ylim=(0, None))
        panel.ticklabel_format(axis="x", useOffset=False, style="plain")
        panel.legend(fontsize=8, ncols=3, loc="upper right")
    axes[0].set_ylim(0, 1.2 * per_second_TW.max())
    axes[1].set_ylim(0, 1.2 * held_TW.max())
    axes[0].set_title(f"{simulation.world} ranks at {simulation.gpu_rate:g} samples/s and GPU", fontsize=10)
    axes[1].set_xlabel("step")
