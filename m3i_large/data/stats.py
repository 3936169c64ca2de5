"""What a source's samples are like, from its indexes alone: counts, sizes, shapes, captions, classes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3i_large.data.index import IMAGE_EXTENSIONS, ShardIndex
from m3i_large.data.letterbox import content_size
from m3i_large.data.source_config import JSON_FIELD
from m3i_large.data.sources import Source

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
MOST_KEPT = 2_000_000  # values behind each quantile; more are thinned out evenly


@dataclass
class SourceStats:
    """One source.

    Attributes:
        shards: (looked at, all).
        samples, eligible: in the shards looked at.
        num_bytes: of those shards.
        flags: samples with each unusual property (data/index.py), and shards with damage under DAMAGED_SHARDS.
        nsfw: eligible samples by their NSFW value.
        letterboxed: share of eligible samples that look like letterboxes: square, of originals that were not. So do
            img2dataset's centre crops: look at some before `letterbox: true`.
        quantiles: by quantity, values at QUANTILES: width, height, short_side (pixels, without padding), aspect
            (width / height), image_bytes, caption_bytes (of the first caption field that a sample has as a part, 0
            where it has none), similarity.
        classes: eligible samples by class, of .cls.
    """

    name: str
    shards: tuple[int, int]
    samples: int = 0
    eligible: int = 0
    num_bytes: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    nsfw: Counter[str] = field(default_factory=Counter)
    letterboxed: float = 0.0
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    classes: Counter[int] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return vars(self) | {"at": list(QUANTILES), "classes": {str(k): v for k, v in sorted(self.classes.items())}}


def source_stats(
    source: Source, *, most_shards: int | None = None, progress: Callable[[str, int], object] | None = None
) -> tuple[SourceStats, dict[str, np.ndarray]]:
    """Reads a source's indexes.

    Args:
        most_shards: look at so many shards, spread evenly; default all.

    Returns:
        The figures, and the values behind the quantiles, for plots.
    """
    total = len(source.shards)
    chosen = np.unique(np.linspace(0, total - 1, min(total, most_shards or total)).round().astype(int)).tolist()
    stats = SourceStats(source.name, (len(chosen), total))
    keep = max(1, MOST_KEPT // len(chosen))
    values: dict[str, list[np.ndarray]] = {}
    padded = 0
    for number in chosen:
        row = source.shards[number]
        index, rows = source.index(number)
        stats.samples += row.samples
        stats.eligible += row.eligible
        stats.num_bytes += row.num_bytes
        stats.flags.update(row.flags)
        stats.flags.update({"DAMAGED_SHARDS": 1} if row.damage else {})
        names = np.array(["none given", *index.nsfw_values])
        stats.nsfw.update(Counter(names[index.columns["nsfw"][rows]].tolist()))
        stats.classes.update(Counter(c for c in index.columns["category"][rows].tolist() if c >= 0))
        found = _values(index, rows, source)
        padded += int(found.pop("padded").sum())
        for name, column in found.items():
            values.setdefault(name, []).append(column[:: max(1, -(-len(column) // keep))])
        if progress:
            progress(row.name, row.num_bytes)
    stats.letterboxed = padded / max(1, stats.eligible)
    joined = {name: np.concatenate(columns) for name, columns in values.items()}
    joined = {name: column[~np.isnan(column)] for name, column in joined.items()}
    stats.quantiles = {name: np.quantile(v, QUANTILES).tolist() for name, v in joined.items() if v.size}
    return stats, joined


def _values(index: ShardIndex, rows: np.ndarray, source: Source) -> dict[str, np.ndarray]:
    column = {name: index.columns[name][rows] for name in ("width", "height", "original_width", "original_height")}
    width, height = content_size(*column.values())
    padded = (width != column["width"]) | (height != column["height"])
    if not source.config.letterbox:
        width, height = column["width"].astype(np.int64), column["height"].astype(np.int64)
    captions = [f for f in source.config.captions if not f.startswith(JSON_FIELD)]
    values = {
        "padded": padded,
        "width": width,
        "height": height,
        "short_side": np.minimum(width, height),
        "aspect": width / np.maximum(height, 1),
        "image_bytes": _first_size(index, rows, IMAGE_EXTENSIONS),
        "similarity": index.columns["similarity"][rows],
    }
    if source.kind == "image_text" and captions:
        values["caption_bytes"] = _first_size(index, rows, captions)
    return {name: np.asarray(v, bool if name == "padded" else np.float64) for name, v in values.items()}


def _first_size(index: ShardIndex, rows: np.ndarray, extensions: Sequence[str]) -> np.ndarray:
    """Bytes of the first of some parts that has any, 0 where none has -> (len(rows),) int64."""
    found = np.zeros(len(rows), np.int64)
    for extension in extensions:
        if extension in index.extensions:
            size = index.columns["part_size"][rows, index.extensions.index(extension)]
            found = np.where(found == 0, size, found)
    return found


def plot_stats(stats: SourceStats, values: dict[str, np.ndarray], path: Path) -> None:
    """Histograms of a source into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = [
        ("short_side", "shorter side, pixels", "log"),
        ("aspect", "width / height", "log"),
        ("image_bytes", "bytes of the image", "log"),
        ("caption_bytes", "bytes of the caption", "log"),
        ("similarity", "similarity of image and text", "linear"),
    ]
    shown = [panel for panel in panels if panel[0] in stats.quantiles]
    columns = max(1, len(shown) + bool(stats.classes))  # the shards looked at may hold no sample
    figure, axes = pyplot.subplots(1, columns, figsize=(3.6 * columns, 3.2), squeeze=False)
    for axis, (name, label, scale) in zip(axes[0], shown, strict=False):
        data = np.maximum(values[name], 1e-2 if name == "aspect" else 1) if scale == "log" else values[name]
        low, high = float(data.min()), float(data.max())
        high = high if high > low else low + 0.1 * abs(low) + 1e-6
        wide = scale == "log" and high > 4 * low
        axis.hist(data, bins=np.geomspace(low, high, 60) if wide else np.linspace(low, high, 60), color="#3465a4")
        if wide:
            axis.set_xscale("log")
            steps = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=steps))
            axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel(label)
        axis.set_ylabel("samples")
    if stats.classes:
        axes[0][-1].plot(sorted(stats.classes.values(), reverse=True), color="#3465a4")
        axes[0][-1].set_xlabel("classes, the largest first")
        axes[0][-1].set_ylabel("samples")
        axes[0][-1].set_ylim(bottom=0)
    figure.suptitle(f"{stats.name}: {stats.eligible:,} samples in {stats.shards[0]:,} of {stats.shards[1]:,} shards")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
