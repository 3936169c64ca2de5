"""`m3i data ...`: what one does with data sets before, during and after training."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table

from m3i_large.errors import UserError

data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
LOG_EVERY_S = 60.0
RecipeName = Annotated[str, typer.Argument(help="Recipe name or file: its data.sources are meant.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Recipe fields to change, a.b=value.")]
Jobs = Annotated[int, typer.Option(help="Processes.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@data_app.command("demo")
def data_demo(root: Annotated[Path, typer.Option(help="Directory to build.")] = Path("data/demo")) -> None:
    """Builds the embedded data set: two drawing styles of the same things, names and categories."""
    from m3i_large.data.demo import build_demo_data

    with _stages() as show:
        build_demo_data(root, progress=show)


@data_app.command("demo-detection")
def data_demo_detection(
    root: Annotated[Path, typer.Option(help="Directory to build.")] = Path("data/demo_detection"),
) -> None:
    """Composes a detection set in COCO's format of the embedded drawings: exact boxes and masks."""
    from m3i_large.data.demo_detection import build_demo_detection

    with _stages() as show:
        build_demo_detection(root, progress=show)


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage, as it begins."""
    with Progress() as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield show


@data_app.command("index")
def data_index(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    jobs: Jobs = 1,
    salvage: Annotated[bool, typer.Option(help="Keep what comes before the damage of a damaged shard.")] = False,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only part I (from 0) of N, on one of N machines; then once without --part."),
    ] = None,
    export: Annotated[
        list[str] | None, typer.Option(help="Also write other libraries' indexes: energon=DIR or dali=DIR.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Indexes a recipe's shards: one pass over each tar. Stopped, the same command goes on where it was."""
    from m3i_large.data.interchange import EXPORTS, export_index
    from m3i_large.data.manifest import build_manifest, index_shards, load_index
    from m3i_large.data.sources import expand

    exports = [choice.partition("=") for choice in export or []]
    if any(kind not in EXPORTS or not where for kind, _, where in exports):
        raise UserError(f"--export: got {export}; needed: {' or '.join(f'{kind}=DIR' for kind in EXPORTS)}")
    # Shards in turn, not in blocks: neighbours are of one download, and as large and slow as each other.
    shards = _part(part)
    work = index_shards if part else build_manifest
    data, storage, directory = _data_of(recipe, overrides)
    results = []
    for config in [*data.sources, *data.heldout]:
        names = expand(config, storage.root)[shards]
        with _shard_progress(config.name, len(names)) as show:
            manifest = work(config, names, storage, directory, jobs=jobs, salvage=salvage, progress=show)
        for row in manifest.shards if exports else ():
            for kind, _, where in exports:
                with _written_to("--export", where):
                    export_index(kind, load_index(row, directory), row.name, Path(where))
        results.append(_summary(manifest))
    if as_json:
        print(json.dumps(results))
        return
    table = Table("source", "shards", "GB", "samples", "eligible", "unusual", title=f"index: {directory.path}")
    for r in results:
        unusual = ", ".join(f"{count} {name.lower()}" for name, count in r["flags"].items()) or "none"
        unusual += f"; {r['damaged']} shards damaged" if r["damaged"] else ""
        gigabytes = f"{r['num_bytes'] / 1e9:.2f}"
        table.add_row(r["source"], f"{r['shards']:,}", gigabytes, f"{r['samples']:,}", f"{r['eligible']:,}", unusual)
    Console().print(table)


def _part(text: str | None) -> slice:
    """`1/8`: every eighth, from the second."""
    if text is None:
        return slice(None)
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--part: got {text}; needed: I/N with I from 0 to N - 1, such as 0/8")
    return slice(int(first), None, int(count))


def _summary(manifest: Any) -> dict[str, Any]:
    rows = manifest.shards
    flags: dict[str, int] = {}
    for row in rows:
        for name, count in row.flags.items():
            flags[name] = flags.get(name, 0) + count
    return {
        "source": manifest.source,
        "shards": len(rows),
        "num_bytes": sum(row.num_bytes for row in rows),
        "samples": sum(row.samples for row in rows),
        "eligible": sum(row.eligible for row in rows),
        "flags": flags,
        "damaged": sum(bool(row.damage) for row in rows),
    }


@data_app.command("check")
def data_check(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    jobs: Jobs = 1,
    quick: Annotated[bool, typer.Option(help="Sizes and indexes only; do not read the shards.")] = False,
    as_json: AsJson = False,
) -> int:
    """Compares the shards with their index and with counts stated beside them; status 1 if they differ."""
    from m3i_large.data.check import check_configuration, check_manifest
    from m3i_large.data.manifest import Manifest

    data, storage, directory = _data_of(recipe, overrides)
    problems: dict[str, list[str]] = {}
    for config in [*data.sources, *data.heldout]:
        manifest = Manifest.load(directory.manifest(config.name))
        if manifest is None:
            raise UserError(f"source {config.name}: no index in {directory.path}; needed: m3i data index first")
        with _shard_progress(config.name, len(manifest.shards)) as show:
            problems[config.name] = [
                *check_configuration(config, manifest, storage.root),
                *check_manifest(manifest, storage, directory, quick=quick, jobs=jobs, progress=show),
            ]
        if not as_json:
            print("\n".join(problems[config.name]) or f"{config.name}: {len(manifest.shards)} shards as indexed")
    if as_json:
        print(json.dumps(problems))
    return 1 if any(problems.values()) else 0


@data_app.command("stats")
def data_stats(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Directory for plots, one PNG a source.")] = None,
    shards: Annotated[
        int, typer.Option(help="Look at so many shards of a source, spread evenly (0: all).", min=0)
    ] = 500,
    as_json: AsJson = False,
) -> None:
    """Prints and plots what a recipe's samples are like: counts, sizes, shapes, captions, classes, letterboxes."""
    from m3i_large.data.sources import open_sources
    from m3i_large.data.stats import plot_stats, source_stats
    from m3i_large.recipe import load_recipe

    data = load_recipe(recipe, overrides or []).data
    results = []
    for source in open_sources(data.sources, data.root, index=data.index, retry_s=data.retry_s):
        with _shard_progress(source.name, min(len(source.shards), shards or len(source.shards))) as show:
            stats, values = source_stats(source, most_shards=shards or None, progress=show)
        if out is not None:
            with _written_to("--out", out):
                plot_stats(stats, values, out / f"{source.name}.png")
        results.append(stats)
    if as_json:
        print(json.dumps([stats.to_dict() for stats in results]))
        return
    console = Console(highlight=False)
    for config, stats in zip(data.sources, results, strict=True):
        # Elsewhere .cls is not read, or means something only through the map.
        trained_on = (config.kind, config.category_field, config.class_map) == ("image_category", "cls", None)
        _print_stats(stats, console, num_classes=data.num_classes if trained_on else None)
    if out is not None:
        print(f"written: {', '.join(str(out / f'{stats.name}.png') for stats in results)}")


def _print_stats(stats: Any, console: Console, *, num_classes: int | None) -> None:
    from m3i_large.data.stats import QUANTILES

    lines = [
        f"{stats.name}: {stats.shards[0]:,} of {stats.shards[1]:,} shards, {stats.num_bytes / 1e9:.2f} GB, "
        f"{stats.samples:,} samples, {stats.eligible:,} eligible, {stats.letterboxed:.1%} letterboxed"
    ]
    if stats.flags:
        lines.append("unusual: " + ", ".join(f"{count:,} {name.lower()}" for name, count in stats.flags.items()))
    if len(stats.nsfw) > 1 or "none given" not in stats.nsfw:
        lines.append("NSFW: " + ", ".join(f"{name} {count:,}" for name, count in stats.nsfw.most_common()))
    if stats.classes:
        counts = sorted(stats.classes.values())
        of = "" if num_classes is None else f" of {num_classes:,}"
        lines.append(
            f"classes: {len(counts):,}{of}, samples each {counts[0]:,} to {counts[-1]:,}, "
            f"half at most {counts[len(counts) // 2]:,}; largest index {max(stats.classes):,}"
        )
        if num_classes is not None and max(stats.classes) >= num_classes:
            lines.append(
                f"NOT USABLE: classes up to {max(stats.classes)}; needed: below data.num_classes {num_classes}"
            )
    table = Table("quantile", *(f"{q:.0%}" for q in QUANTILES))
    for name, values in stats.quantiles.items():
        table.add_row(name, *(f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in values))
    console.print("\n".join(lines), table, soft_wrap=True)


@data_app.command("simulate")
def data_simulate(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    ranks: Annotated[int, typer.Option(help="Number of GPUs.", min=1)],
    gpu_rate: Annotated[float, typer.Option(help="Samples per second of one GPU.", min=1e-6)] = 182.0,
    out: Annotated[Path | None, typer.Option(help="Directory for plots and simulate.json.")] = None,
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option(help="Look at a part of each epoch only.")] = False,
) -> int:
    """Plays a recipe's data order without data: counts, exactly once, shuffle, reads. Status 1: a promise is broken."""
    from m3i_large.data.simulate import SourceSize, simulate
    from m3i_large.data.simulate.plots import draw_plots
    from m3i_large.data.simulate.tables import print_tables
    from m3i_large.recipe import load_recipe
    from m3i_large.stream import nominal_sizes, plan_mixture

    loaded = load_recipe(recipe, overrides or [])
    nominal = nominal_sizes(loaded)
    sizes = [SourceSize(shards=n.shards, mean_bytes=n.mean_bytes) for n in nominal]
    tasks: dict[str, TaskID] = {}
    # Without its refreshing thread: an epoch is played in forked processes, which must not inherit a held lock.
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as bar:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)
            if bar.console.is_terminal:
                bar.refresh()

        simulation = simulate(
            lambda: plan_mixture(loaded, [(n.samples, n.mean_bytes) for n in nominal]),
            sizes=sizes,
            world=ranks,
            steps=loaded.train.steps,
            epochs=loaded.train.epochs,
            gpu_rate=gpu_rate,
            quick=quick,
            progress=show,
        )
    values = {"recipe": loaded.name} | simulation.to_json()
    if as_json:
        print(json.dumps(values))
    else:
        console = Console(highlight=False)
        console.width = max(console.width, 112)  # narrower, and figures would be cut
        print_tables(simulation, console, title=loaded.name)
    if out is not None:
        paths = draw_plots(simulation, out)
        (out / "simulate.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if not as_json:
            print(f"written: {', '.join(map(str, paths))}, {out / 'simulate.json'}")
    return 1 if simulation.failed else 0


@data_app.command("audit")
def data_audit(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directory; or several, each resumed from the one before it, in order.")
    ],
    as_json: AsJson = False,
) -> int:
    """Proves that training drew every sample exactly once an epoch (runs with data.audit=true); status 1 if not."""
    from m3i_large.data.audit import audit_runs

    audit = audit_runs(runs)
    print(json.dumps(audit.to_dict()) if as_json else audit.to_text())
    return 0 if audit.proven else 1


def _data_of(recipe: str, overrides: list[str] | None) -> tuple[Any, Any, Any]:
    """A recipe's `data`, the storage of its shards and the directory of their indexes."""
    from m3i_large.data.manifest import IndexDirectory
    from m3i_large.data.storage import Storage
    from m3i_large.recipe import load_recipe

    data = load_recipe(recipe, overrides or []).data
    return data, Storage(data.root, retry_s=data.retry_s), IndexDirectory(data.root, data.index)


@contextmanager
def _written_to(option: str, directory: str | Path) -> Iterator[None]:
    """Turns a directory that cannot be written into one clear line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}: got {directory} ({error.strerror}); needed: a directory that can be written"
        ) from None


@contextmanager
def _shard_progress(name: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on standard error that counts shards and their bytes."""
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LogLines(name, total)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda shard, num_bytes: bar.advance(task)


class _LogLines:
    """The same for a log file: a line a minute."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._done = self._bytes = 0
        self._told = time.monotonic()

    def __call__(self, shard: str, num_bytes: int) -> None:
        self._done, self._bytes = self._done + 1, self._bytes + num_bytes
        if time.monotonic() - self._told >= LOG_EVERY_S:
            self._told = time.monotonic()
            print(
                f"{self._name}: {self._done:,} of {self._total:,} shards, {self._bytes / 1e9:,.1f} GB", file=sys.stderr
            )
