"""The commands `m3i ...`. Exit status 0 success, 2 user error (one line), 1 anything else."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from m3i_large.cli_data import data_app
from m3i_large.cli_export import export_command, import_command, verify_command
from m3i_large.cli_launch import guarded, pretrain_options
from m3i_large.cli_plan import plan_command
from m3i_large.errors import UserError

app = typer.Typer(
    help="M3I pre-training: recipes, data, evaluation, reports. Every command takes --debug (traceback of an error).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables
)
# What typer raises for a wrong command line; it carries click inside and exports this subclass only.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
bench_app = typer.Typer(help="Speed.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.command("plan")(plan_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("import")(import_command)


@app.command("recipes")
def recipes() -> None:
    """Lists the shipped recipes with their headers: of pre-training, then of fine-tuning."""
    from m3i_large.finetune.recipe import finetune_recipe_header, finetune_recipe_names
    from m3i_large.recipe import recipe_header, recipe_names

    headers = {name: recipe_header(name) for name in recipe_names()}
    headers |= {name: finetune_recipe_header(name) for name in finetune_recipe_names()}
    console = Console(soft_wrap=True, highlight=False)
    for name, header in headers.items():
        console.print(f"[bold]{name}[/bold]")
        console.print("\n".join(f"  {line}" for line in header.splitlines()), markup=False)


@app.command("scores")
def scores_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of fine-tunings.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Sets the last evaluations of fine-tuned runs beside each other."""
    from m3i_large.metrics import read_rows

    rows = {str(run): (read_rows(run / "eval.jsonl") or [{}])[-1] for run in runs}
    if missing := [run for run, row in rows.items() if "values" not in row]:
        raise UserError(f"scores: {missing[0]} holds no evaluation; needed: a run of a fine-tuning launcher")
    if as_json:
        print(json.dumps(rows))
        return
    names = list(dict.fromkeys(name for row in rows.values() for name in row["values"]))
    # Names of figures are told apart by their ends: where there is no room a long path is folded instead.
    table = Table(
        Column("run", overflow="fold"), "step", *(Column(name, no_wrap=True, min_width=len(name)) for name in names)
    )
    for run, row in rows.items():
        shown = (f"{row['values'][name]:.1%}" if name in row["values"] else "" for name in names)
        table.add_row(run, str(row["step"]), *shown)
    Console().print(table)


@app.command("eval")
def evaluate_command(
    kind: Annotated[
        str,
        typer.Argument(help="retrieval, zeroshot, categories, styles, knn or linear; several joined by commas."),
    ],
    path: Annotated[Path, typer.Argument(help="Run or checkpoint directory; for knn and linear also an export.")],
    data: Annotated[Path, typer.Option(help="Directory of shards.")],
    train: Annotated[Path | None, typer.Option(help="Directory of shards that knn and linear learn from.")] = None,
    branch: Annotated[str, typer.Option(help="student, or target for the moving average.")] = "student",
    classes: Annotated[
        str | None, typer.Option(help="zeroshot of labelled pictures: imagenet, or a file with a class's name a line.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="imagenet (80), simple (7), or a file with a text around {} a line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Evaluates without fine-tuning, beside chance and the untrained model."""
    from m3i_large.evaluate import evaluate
    from m3i_large.evaluate.names import read_names

    if templates is not None and classes is None:
        raise UserError("--templates: got it without --classes; needed: the names that go into them")
    names = None if classes is None else read_names(classes, templates)
    score = partial(evaluate, kind.split(","), path, data=data, train=train, branch=branch, classes=names)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from m3i_large.parallel.comm import start_distributed, stop_distributed

        rank = start_distributed()
        try:
            results = score(rank=rank)
        finally:
            stop_distributed()
        if not rank.is_first:
            return
    else:
        results = score()
    if as_json:
        print(json.dumps(results[0] if len(results) == 1 else results))
        return
    table = Table(
        Column("figure", no_wrap=True),
        "samples",
        "trained",
        "untrained",
        "chance",
        "x chance",
        title=f"{path} on {data}",
    )
    for result in results:
        for name, value in result["values"].items():
            chance = result["chance"][name]
            row = (value, result["untrained"][name], chance)
            table.add_row(
                f"{result['kind']} {name}",
                str(result["num_samples"]),
                *(f"{v:.1%}" for v in row),
                f"{value / chance:.1f}",
            )
    Console().print(table)


def evaluate_on_ranks(arguments: list[str]) -> None:
    """Entry of launchers/evaluate.py: `m3i eval` under DeepSpeed's launcher, which passes an option of its own."""
    sys.argv = ["m3i", "eval", *(word for word in arguments if not word.startswith("--local_rank"))]
    main()


@app.command("supervise")
def supervise_command(
    command: Annotated[list[str], typer.Argument(help="-- deepspeed [options] launchers/pretrain.py --ds FILE ...")],
    failures: Annotated[int, typer.Option(help="Failures in a row at the same step that end it.", min=1)] = 3,
    delay: Annotated[float, typer.Option(help="Seconds before the first restart; doubles up to 300.", min=0)] = 5.0,
    grace: Annotated[float, typer.Option(help="Seconds from a stop signal to the kill.", min=0)] = 120.0,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds without a new row after which a run hangs (4 x train.timeout_s).", min=1),
    ] = None,
    ranks_command: Annotated[str | None, typer.Option(help="Shell command that prints how many ranks can run.")] = None,
) -> int:
    """Restarts a training after a crash or a hang, on the ranks that are left, with the same batches."""
    from m3i_large.recipe import load_recipe
    from m3i_large.supervise import Policy, supervise
    from m3i_large.supervise.available import available_ranks, valid_world_sizes
    from m3i_large.supervise.command import Command

    parsed = Command.parse(command)
    options = pretrain_options(list(parsed.arguments))
    recipe = load_recipe(options.recipe, options.overrides)
    return supervise(
        parsed,
        run=options.out or Path("runs") / recipe.name,
        worlds=valid_world_sizes(recipe),
        available=lambda: available_ranks(parsed, ranks_command=ranks_command),
        policy=Policy(
            failures=failures,
            delay_s=delay,
            grace_s=grace,
            # The run itself finds a hang within three times its timeout, and names the rank: it comes first.
            timeout_s=4 * recipe.train.timeout_s if timeout is None else timeout,
        ),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are shown beside each other.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: RUN/report.html; report.html here for several runs).")
    ] = None,
) -> None:
    """Writes one HTML file that opens from disk about a run, or several, finished or going on."""
    from m3i_large.report import write_report

    print(f"report: {write_report(runs, out=out)}")


@app.command("watch")
def watch_command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print what there is now, and end.")] = False,
) -> None:
    """Shows a run in the terminal while it goes on: losses, speed, schedules, collapse, events."""
    from m3i_large.watch import watch

    watch(run, every=every, once=once)


@app.command("study")
def study_command(
    study: Annotated[str, typer.Argument(help="Name of a shipped study or a YAML file.")],
    ds: Annotated[Path, typer.Option(help="DeepSpeed JSON file.")] = Path("ds_configs/zero3.json"),
    out: Annotated[Path | None, typer.Option(help="Directory for the runs (default: runs/study_<name>).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Trains and evaluates recipes beside each other and under several seeds; continues where it was stopped."""
    from m3i_large.study import as_markdown, load_study, run_study

    directory = out or Path("runs") / f"study_{Path(study).stem}"
    rows = run_study(load_study(study), ds=ds, out=directory)
    print(json.dumps(rows) if as_json else f"{as_markdown(rows)}\nwritten: {directory}/study.md, .json, .png")


@bench_app.command("loader")
def bench_loader_command(
    images: Annotated[Path | None, typer.Option(help="Directory of JPEG files (default: generated ones).")] = None,
    samples: Annotated[int, typer.Option(help="Two-view samples per path and repeat.", min=1)] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Two-view samples per CPU-second, beside torchvision, Pillow and bare decoding; and what comes before a batch."""
    from m3i_large.bench_loader import bench_loader
    from m3i_large.bench_start import bench_start

    result = bench_loader(images, samples=samples) | {"start": bench_start()}
    if as_json:
        print(json.dumps(result))
        return
    pictures = result["pictures"]
    title = f"{pictures['number']} JPEGs of {pictures['mean_bytes'] / 1e3:.0f} KB, two views of 224 x 224"
    table = Table("path", "CPU ms a sample", "samples per CPU-second", "ours / it", title=title)
    for row in result["paths"]:
        ratio = result["ratios"].get(f"ours / {row['path']}", 1.0)
        table.add_row(row["path"], f"{row['cpu_ms']:.2f}", f"{row['samples_per_cpu_s']:.0f}", f"{ratio:.2f}")
    start = Table("before the first batch", "", "")
    for row in result["start"]:
        start.add_row(
            row["what"], f"{row['value']:,.3g}" if row["value"] < 1000 else f"{row['value']:,.0f}", row["unit"]
        )
    Console().print(table, start)


@bench_app.command("step")
def bench_step_command(
    recipe: Annotated[str, typer.Option(help="Recipe name or file.")] = "demo",
    rows: Annotated[int, typer.Option(help="Samples in the micro-batch.", min=4)] = 96,
    overrides: Annotated[list[str] | None, typer.Argument(help="Recipe fields to change, a.b=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Shares of a step's parts, beside a CLIP-only step."""
    import torch

    from m3i_large.bench import bench_step
    from m3i_large.recipe import load_recipe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = bench_step(load_recipe(recipe, overrides or []), rows=rows, device=device)
    if as_json:
        print(json.dumps(results))
        return
    table = Table("part", "ms", "share of the step", title=f"{recipe}, {rows} samples, {device}")
    for row in results:
        table.add_row(row["part"], f"{row['ms']:.0f}", f"{row['share']:.1%}")
    Console().print(table)


@bench_app.command("ema")
def bench_ema_command(
    recipe: Annotated[str, typer.Option(help="Recipe name or file.")] = "demo",
    ds: Annotated[Path, typer.Option(help="DeepSpeed JSON file, ZeRO-3.")] = Path("ds_configs/zero3.json"),
    ranks: Annotated[int, typer.Option(help="Processes on this machine.", min=1)] = 2,
    rows: Annotated[int, typer.Option(help="Samples in a rank's micro-batch.", min=4)] = 8,
    overrides: Annotated[list[str] | None, typer.Argument(help="Recipe fields to change, a.b=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Cost, communication and memory of the target's average under ZeRO-3, beside two ways that gather."""
    from m3i_large.bench_ema import bench_ema
    from m3i_large.recipe import load_recipe

    result = bench_ema(load_recipe(recipe, overrides or []), ds=ds, ranks=ranks, rows=rows)
    if as_json:
        print(json.dumps(result))
        return
    title = "{recipe}, {parameters:,} parameters averaged, {ranks} ranks, {rows} rows, {precision}, {device}"
    names = ("of step", "calls", "MiB sent", "MiB first", "others", "gathered")
    table = Table(
        Column("average", no_wrap=True),
        "ms",
        *names,
        Column("error", no_wrap=True),
        title=title.format(**result),
        caption=f"a step without it: {result['step_ms']:.0f} ms",
    )
    for row in result["designs"]:
        sizes = (row[key] / 2**20 for key in ("bytes", "resident_first", "resident_others", "gathered"))
        sent, *held = (f"{size:.1f}" for size in sizes)
        calls = str(sum(row["calls"].values()))
        table.add_row(
            row["design"], f"{row['ms']:.1f}", f"{row['share']:.1%}", calls, sent, *held, f"{row['difference']:.1e}"
        )
    Console().print(table)
    still = "kept in bf16: {moved:.1%} of the elements move in {updates} updates at momentum {momentum}, "
    still += "the average covers {distance:.1%} of fp32's way"
    print(still.format(**result["bf16"]))


def main() -> None:
    """Entry of the `m3i` command."""
    # What follows `--` is another command's.
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    debug = "--debug" in own
    arguments = [argument for argument in own if argument != "--debug"] + sys.argv[1 + len(own) :]

    def run() -> int:
        # standalone_mode=False hands exceptions over instead of printing them.
        try:
            result = app(arguments, standalone_mode=False)
        except UsageError as error:
            message = error.format_message()  # type: ignore[attr-defined]
            if not message:  # `m3i` or `m3i data` alone: the help is already on the screen
                return 0
            raise UserError(f"{' '.join(message.split())} See m3i --help.") from None
        return result if isinstance(result, int) else 0

    try:
        sys.exit(guarded(run, debug=debug))
    except typer.Abort:
        sys.exit(1)
