"""The launchers of fine-tuning: arguments, start and end of a distributed run."""

import argparse
import sys
from pathlib import Path

from m3i_large.cli import guarded
from m3i_large.errors import REQUEUE, UserError


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
        if not options.ds.is_file():
            raise UserError(
                f"--ds: got {options.ds}, which does not exist; needed: a file such as ds_configs/zero1.json"
            )
        # Importing the trainer takes seconds: only once the arguments make sense.
        from m3i_large.finetune.trainer import finetune
        from m3i_large.parallel.comm import start_distributed, stop_distributed
        from m3i_large.stop_signals import Stopped

        out = options.out or Path("runs") / loaded.name
        rank = start_distributed()
        try:
            outcome = finetune(
                loaded,
                ds=options.ds,
                out=out,
                resume=options.resume,
                rank=rank,
                evaluate_only=options.evaluate,
            )
        except Stopped as stopped:
            print(f"{out}: {stopped}", file=sys.stderr)
            outcome = "interrupted"
        finally:
            stop_distributed()
        return {"finished": 0, "interrupted": REQUEUE}.get(outcome, 1)

    return guarded(run, debug=options.debug)
