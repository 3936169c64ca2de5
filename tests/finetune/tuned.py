"""Fine-tuning by its launchers, of small exports."""

import shutil
import sys
from pathlib import Path
from typing import Any

import written
import yaml
from ranks import free_port

from m3i_large.export import export
from m3i_large.metrics import read_rows

ROOT = Path(__file__).parent.parent.parent
TRAIN = {"global_batch": 4, "steps": 6, "seed": 5, "precision": "fp32", "threads": 1, "workers": 0, "ema": 0.9}
TRAIN |= {"checkpoint_every": 3, "eval_batch": 2, "log_every": 1, "tensorboard": False, "report": False}
OPTIM = {"lr": {"peak": 1e-3, "warmup": 0.2}, "layer_decay": 0.7}


def write_weights(root: Path, parts: dict[str, Any]) -> Path:
    """An export of a small model, <root>/weights.safetensors."""
    written.write(root / "pretrained", parts)
    export(root / "pretrained", to="safetensors", out=root / "weights.safetensors")
    return root / "weights.safetensors"


def write_recipe(path: Path, task: dict[str, Any], **train: Any) -> Path:
    values = {"name": "tiny", "task": task, "optim": OPTIM, "train": TRAIN | train}
    path.write_text(yaml.safe_dump(values))
    return path


def command(kind: str, *options: object, ranks: int = 1) -> list[str]:
    """launchers/finetune_<kind>.py, under DeepSpeed's launcher where there are more ranks."""
    script = [str(ROOT / f"launchers/finetune_{kind}.py"), *map(str, options)]
    if ranks == 1:
        return [sys.executable, *script]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), *script]


def logged(run: Path) -> list[float]:
    """Losses in the order in which they were logged, those of steps that were made again too."""
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def assert_continues(run: Path, again: Any) -> None:
    """Every draw is a step's own: what continues from step 3 ends as the whole run of 6."""
    shutil.rmtree(run / "checkpoints/step_00000006")
    done = again()
    assert done.returncode == 0, done.stderr
    rows = logged(run)
    assert len(rows) == 9 and rows[3:6] == rows[6:]
