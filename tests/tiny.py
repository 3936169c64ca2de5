"""A data set and a recipe small enough to train for real within a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import webdataset as wds
import yaml
from patience import PATIENCE_S
from ranks import free_port, run_script

ROOT = Path(__file__).parent.parent
COLOURS = {"red": (0, 0, 255), "green": (0, 200, 0), "blue": (255, 0, 0), "black": (0, 0, 0)}
SHAPES = ("disc", "square", "bar")


def picture(colour: str, shape: str, index: int) -> np.ndarray:
    """A coloured shape somewhere on white, 40 x 48 pixels."""
    image = np.full((40, 48, 3), 255, np.uint8)
    x, y = 12 + index % 20, 12 + index % 13
    if shape == "disc":
        cv2.circle(image, (x, y), 9, COLOURS[colour], -1)
    else:
        cv2.rectangle(image, (x - 8, y - 8), (x + 8, y + (8 if shape == "square" else -4)), COLOURS[colour], -1)
    return image


def write_data(root: Path, *, samples: int = 60) -> Path:
    """Two image-text sources and one image-category source, in webdataset shards."""
    root.mkdir(parents=True)
    names = [(c, s) for c in COLOURS for s in SHAPES]
    for source in ("first", "second", "labelled"):
        with wds.TarWriter(str(root / f"{source}-000000.tar"), mtime=0, user="", group="") as writer:
            for i in range(samples):
                colour, shape = names[i % len(names)]
                sample = {
                    "__key__": f"{source}{i:05d}",
                    "png": cv2.imencode(".png", picture(colour, shape, i))[1].tobytes(),
                }
                sample |= (
                    {"cls": str(SHAPES.index(shape))}
                    if source == "labelled"
                    else {"txt": f"a {colour} {shape} number {i}"}
                )
                sample["json"] = json.dumps({"concept": f"{colour}-{shape}", "style": source})
                writer.write(sample)
    return root


def recipe(data: Path, **train: object) -> dict:
    """The demo recipe's structure at the smallest size that has every part."""
    values = yaml.safe_load((ROOT / "m3i_large/recipes/demo.yaml").read_text(encoding="utf-8"))
    values["name"] = "tiny"
    values["backbone"] = {
        "name": "vit",
        "arch": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2},
    }
    values["text"] = values["text"] | {"width": 32, "layers": 1, "heads": 2, "context_length": 16, "embed": 16}
    values["decoder"] = {"layers": 1, "heads": 2}
    values["pool"] = {"width": 32, "heads": 2}
    values["data"] |= {
        "root": str(data),
        "embedded": False,
        "image_size": 32,
        "lanes": 4,
        "num_classes": 3,
        "threads": 1,
    }
    values["data"]["heldout"] = []
    values["data"]["sources"] = [
        {"name": "first", "kind": "image_text", "shards": ["first-*.tar"], "quota": 2},
        {"name": "second", "kind": "image_text", "shards": ["second-*.tar"], "quota": 1},
        {"name": "labelled", "kind": "image_category", "shards": ["labelled-*.tar"], "quota": 1},
    ]
    values["train"] = {
        "global_batch": 16,
        "contrast_batch": 16,
        "steps": 6,
        "seed": 3,
        "precision": "fp32",
        "threads": 1,
        "straggler": 1000.0,  # where ranks share cores, one truly is slow now and then
    }
    values["train"] |= {"checkpoint_every": 2, "picture_every": 4, "signals_every": 3, "log_every": 1, "report": False}
    values["train"] |= train
    return values


def write_recipe(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def command(*arguments: object, ranks: int = 1) -> list[str]:
    """The training command; one rank starts without the launcher, several through it."""
    script = [str(ROOT / "launchers/pretrain.py"), "--ds", str(ROOT / "ds_configs/zero3.json"), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *script]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), *script]


def environment() -> dict[str, str]:
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a training command to its end; a rank alone is forked from a process that has the imports."""
    if words[1].endswith(".py"):
        return run_script(words[1:], environment=environment(), directory=ROOT, timeout=PATIENCE_S)
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)


def pretrain(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return launch(command(*arguments, ranks=ranks))
