"""Every command of the README and the pages is run here, or says which test runs it, or what it needs.

A comment in front of a block of commands says which: `run: GROUP` (in the order of the pages, trainings cut to a few
steps), `tested: FILES`, `needs: cluster`, GPU, data, or something else that is not here.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from patience import PATIENCE_S
from ranks import free_port
from test_docs import written
from tiny import ROOT, environment

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docker/README.md",
    ROOT / "ds_configs/README.md",
]
BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAMS = ("deepspeed", "m3i", "make", "python", "sbatch", "srun", "kubectl", "docker", "pip", "torchrun", "source")
PROGRAMS += ("img2dataset", "git", "wandb", "wget", "apptainer")
MARKS = ("run", "tested", "needs")
# Of a group, what it needs beside a copy of the repository: the page whose files are written there.
GROUPS = {"demo": "", "plan": "", "recipe": "write_a_recipe.md", "source": "add_a_source.md"}
GROUPS |= {"backbone": "add_a_backbone.md", "term": "add_a_term.md"}
SHORT = "train.steps=2 train.checkpoint_every=2 train.picture_every=2"
NOT_HERE = ("make test", "source .venv/bin/activate")  # what runs this test; this test's environment


class Block(NamedTuple):
    page: str
    mark: str
    commands: list[str]


def blocks() -> Iterator[Block]:
    """Blocks that hold a command."""
    for page in PAGES:
        for mark, kind, body in BLOCK.findall(page.read_text(encoding="utf-8")):
            lines = body.replace("\\\n", " ").splitlines()
            commands = [line.removeprefix("$ ") for line in lines if is_command(line.removeprefix("$ "))]
            if commands and kind in ("", "sh", "bash", "console"):
                yield Block(str(page.relative_to(ROOT)), mark, commands)


def is_command(line: str) -> bool:
    first, _, rest = line.partition(" ")
    return first in PROGRAMS and not rest.startswith(("on ", "0.19"))  # titles of tables that a command printed


def test_every_block_of_commands_says_who_runs_it() -> None:
    found = list(blocks())
    assert len(found) > 30 and sum(len(block.commands) for block in found) > 60
    for block in found:
        kind, _, rest = block.mark.partition(": ")
        where = f"{block.page}: {block.commands[0]}"
        assert kind in MARKS and rest, f"{where}: no mark, of {MARKS}, in front of it"
        if kind == "run":
            assert rest in GROUPS, where
        if kind == "tested":
            for name in re.findall(r"tests/[\w/]+\.py", rest):
                assert (ROOT / name).is_file(), f"{where}: {name}"
            assert "tests/" in rest, where


def test_what_only_a_cluster_can_run_is_little() -> None:
    needs = [block.mark for block in blocks() if block.mark.startswith("needs")]
    assert 0 < len(needs) < len(list(blocks())) / 2


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: the files of the repository, and nothing that was made since."""
    root = tmp_path_factory.mktemp("clone") / "m3i"
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    (root / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return root


def as_run(command: str) -> str | None:
    """A command as it is run here: short, alone on its port, without an installation; None where it is not."""
    words = shlex.split(command, comments=True)
    line = shlex.join(words)
    if line.startswith(NOT_HERE):
        return None
    if line == "make demo":
        launcher = f"--master_port {free_port()}"
        return f"make -o .venv/.installed demo DEMO={shlex.quote(SHORT)} LAUNCHER={shlex.quote(launcher)}"
    if words[0] == "deepspeed":
        kept = shlex.join(word for word in words[1:] if not word.startswith("train.steps="))
        return f"deepspeed --master_port {free_port()} {kept} {SHORT}"
    return line


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_commands_of_a_group_work(group: str, clone: Path) -> None:
    chosen = [block for block in blocks() if block.mark == f"run: {group}"]
    assert chosen
    if GROUPS[group]:
        written(GROUPS[group], clone)
    if group == "source":
        subprocess.run([sys.executable, "write_shards.py"], cwd=clone, check=True, timeout=PATIENCE_S)
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = set()
    for block in chosen:
        for command in block.commands:
            if (line := as_run(command)) is None or command in done:
                continue
            done.add(command)
            ended = subprocess.run(
                line, shell=True, cwd=clone, env=variables, capture_output=True, text=True, timeout=PATIENCE_S
            )
            assert ended.returncode == 0, f"{block.page}: {line}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    if group == "demo":
        for name in ("runs/demo/report.html", "comparison.html"):
            assert (clone / name).stat().st_size > 200_000
