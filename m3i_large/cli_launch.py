"""What the launchers call: arguments, start and end of a distributed run.

Exit status 0 success, 2 user error (one line), REQUEUE stopped by a signal with everything saved, 1 anything else.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from m3i_large.errors import REQUEUE, DivergenceError, OutageError, UserError

if TYPE_CHECKING:
    from m3i_large.parallel.comm import Rank


def guarded(command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command; a user's mistake becomes one line on standard error and status 2, an outage one and status 1."""
    try:
        return command()
    except (UserError, OutageError, DivergenceError) as error:
        line = f"error: {error}"
        first = _first_to_meet(line) if isinstance(error, UserError) else _rank() == 0
        if debug:
            traceback.print_exc()
        elif first or isinstance(error, OutageError):  # which may be one rank's alone
            print(line, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def _first_to_meet(mistake: str) -> bool:
    """Whether this rank is the one to print a mistake, which mostly all ranks meet, but sometimes one alone.

    Where M3I_MISTAKE names a file, the first rank to meet one makes it, and the job's script learns of it: the other
    ranks may be killed while they wait for this one, and the job's status is theirs. Elsewhere the first rank of each
    machine prints, as files that are missing are missing on one machine.
    """
    if path := os.environ.get("M3I_MISTAKE"):
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(f"{mistake}\n")
        except FileExistsError:
            return False
        except OSError:  # the mistake is to be printed, not why it cannot be noted
            return _local_rank() == 0
        return True
    return _local_rank() == 0


def _on_ranks(ds: Path, out: Path, work: "Callable[[Rank], str]") -> int:
    """Joins the ranks and does the work, which returns how the run ended -> exit status."""
    if not ds.is_file():
        raise UserError(f"--ds: got {ds}, which does not exist; needed: a file such as ds_configs/zero3.json")
    # Importing DeepSpeed and transformers takes seconds: only once the arguments make sense.
    from m3i_large.parallel.comm import start_distributed, stop_distributed
    from m3i_large.stop_signals import Stopped

    rank = start_distributed()
    try:
        outcome = work(rank)
    except Stopped as stopped:
        print(f"{out}: {stopped}", file=sys.stderr)
        outcome = "interrupted"
    finally:
        stop_distributed()
    return {"finished": 0, "interrupted": REQUEUE}.get(outcome, 1)


def pretrain_options(arguments: list[str]) -> argparse.Namespace:
    """The options of launchers/pretrain.py."""
    parser = argparse.ArgumentParser(prog="pretrain.py", description="Pre-train one recipe under DeepSpeed ZeRO-3.")
    parser.add_argument("--ds", type=Path, required=True, help="DeepSpeed JSON file: sharding and offload only")
    parser.add_argument("--recipe", default="demo", help="name of a shipped recipe or a YAML file (default: demo)")
    parser.add_argument("--out", type=Path, default=None, help="run directory (default: runs/<recipe>)")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto, never, a run or checkpoint directory, the URL of copies (default: auto)",
    )
    parser.add_argument(
        "--profile", default=None, metavar="START:STEPS", help="steps whose trace goes to <out>/profile"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="recipe fields to change, or scale=demo")
    return parser.parse_intermixed_args(arguments)


def pretrain(arguments: list[str]) -> int:
    """Entry of launchers/pretrain.py; returns the exit status."""
    options = pretrain_options(arguments)

    def run() -> int:
        from m3i_large.recipe import load_recipe

        recipe = load_recipe(options.recipe, options.overrides)
        out, profile = options.out or Path("runs") / recipe.name, None
        if options.profile:
            from m3i_large.profiling import Window

            profile = Window.parse(options.profile)

        def work(rank: "Rank") -> str:
            from m3i_large.train import train

            return train(recipe, ds=options.ds, out=out, resume=options.resume, rank=rank, profile=profile)

        return _on_ranks(options.ds, out, work)

    return guarded(run, debug=options.debug)


def finetune_options(arguments: list[str], *, recipe: str) -> argparse.Namespace:
    """The arguments of a launcher; no option is a prefix of one of DeepSpeed's launcher."""
    parser = argparse.ArgumentParser(description="Fine-tunes an exported backbone.", allow_abbrev=False)
    parser.add_argument("--weights", type=Path, default=None, help="file or directory that `m3i export` wrote")
    parser.add_argument("--data", type=Path, required=True, help="directory of the data set")
    parser.add_argument(
        "--ds", type=Path, default=Path("ds_configs/zero1.json"), help="DeepSpeed JSON file: sharding and offload only"
    )
    parser.add_argument("--recipe", default=recipe, help=f"name of a recipe or a YAML file (default: {recipe})")
    parser.add_argument("--out", type=Path, default=None, help="run directory (default: runs/<recipe>)")
    parser.add_argument("--resume", default="auto", help="auto, never, a run or checkpoint directory (default: auto)")
    parser.add_argument("--evaluate", action="store_true", help="measure the newest checkpoint, train nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="recipe fields to change")
    return parser.parse_intermixed_args(arguments)


def finetune_detection(arguments: list[str]) -> int:
    """Entry of launchers/finetune_detection.py; returns the exit status."""
    return _finetune(arguments, kind="detection", recipe="ft_coco_25ep")


def finetune_classification(arguments: list[str]) -> int:
    """Entry of launchers/finetune_classification.py; returns the exit status."""
    return _finetune(arguments, kind="classification", recipe="ft_in1k_100ep")


def finetune_segmentation(arguments: list[str]) -> int:
    """Entry of launchers/finetune_segmentation.py; returns the exit status."""
    return _finetune(arguments, kind="segmentation", recipe="ft_ade20k_25ep")


def _finetune(arguments: list[str], *, kind: str, recipe: str) -> int:
    options = finetune_options(arguments, recipe=recipe)

    def run() -> int:
        from m3i_large.finetune.recipe import load_finetune_recipe

        loaded = load_finetune_recipe(options.recipe, options.overrides)
        if loaded.task.kind != kind:
            raise UserError(
                f"--recipe: {options.recipe} is one of {loaded.task.kind}; "
                f"needed: launchers/finetune_{loaded.task.kind}.py"
            )
        update = {"data": str(options.data)} | ({"weights": str(options.weights)} if options.weights else {})
        loaded = loaded.model_copy(update=update)
        out = options.out or Path("runs") / loaded.name

        def work(rank: "Rank") -> str:
            from m3i_large.finetune.trainer import finetune

            more = {"resume": options.resume, "evaluate_only": options.evaluate}
            return finetune(loaded, ds=options.ds, out=out, rank=rank, **more)

        return _on_ranks(options.ds, out, work)

    return guarded(run, debug=options.debug)
