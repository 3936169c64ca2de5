"""InternImage-H, 1.08 billion parameters with random weights, through the real way out: checkpoint, export, verify.

    python tests/export_h.py DIRECTORY        12 GB of disk and of memory (the export itself: see `peak`)

The checkpoint is written by the training's own writer, as one of four ranks would leave it; moments are left out.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RECIPE, RANKS, STEP = "m3i_internimage_h_442m", 4, 1
LAYOUTS = {"internimage": ".pth", "mmdet": ".pth", "hf": ""}


def write(run: Path) -> None:
    """The student alone, every tensor moved away from where it began."""
    from m3i_large.checkpoint import CheckpointWriter
    from m3i_large.models import create_model
    from m3i_large.parallel.comm import Rank
    from m3i_large.parallel.state import MemoryState, Slice
    from m3i_large.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    torch.manual_seed(recipe.train.seed)
    student: Any = create_model(recipe.backbone.name, bridge=True, **recipe.backbone.arch)
    with torch.no_grad():
        for x in student.parameters():
            x.add_(1e-3)
    manifest = {"recipe": recipe.to_dict(), "sampler": {"data": "none"}, "applied_steps": STEP, "skip_steps": []}
    writers = []
    for rank in range(RANKS):
        slices = {}
        for name, x in student.named_parameters():
            size = -(-x.numel() // RANKS)
            start = min(rank * size, x.numel())
            part = x.detach().view(-1)[start : start + size]
            slices[f"master/student.{name}"] = Slice(tuple(x.shape), start, part)
        here = Rank(rank, RANKS, torch.device("cpu"))
        writers.append(CheckpointWriter(run / "checkpoints", rank=here, attempt=0, keep=1, background=False))
        writers[-1].save(STEP, state=MemoryState(slices), manifest=manifest)
    for writer in writers:
        writer.wait()
        writer.__exit__()


def main(root: Path) -> None:
    m3i = [str(Path(sys.executable).parent / "m3i")]
    if not (root / "run").exists():
        subprocess.run([sys.executable, __file__, str(root), "write"], check=True)
    for layout, suffix in LAYOUTS.items():
        out = str(root / f"h_{layout}{suffix}")
        told = subprocess.run(
            [*m3i, "export", str(root / "run"), "--to", layout, "--out", out, "--json"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        found = json.loads(told)
        size, parameters = found["card"]["bytes"] / 1e9, found["card"]["parameters"]
        print(
            f"{layout}: {found['card']['tensors']} tensors, {parameters:,} parameters, {size:.2f} GB in "
            f"{found['seconds']:.1f} s, peak {found['peak_gib']:.2f} GiB",
            flush=True,
        )
        subprocess.run([*m3i, "verify", out, "--for", layout], check=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["write"]:
        write(Path(sys.argv[1]) / "run")
    else:
        main(Path(sys.argv[1]))
