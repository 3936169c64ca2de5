"""The command to supervise: what it trains, on how many ranks, and the same command on another number of ranks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m3i_large.errors import UserError

SCRIPT = "pretrain.py"
COUNT = {
    "deepspeed": ("--num_gpus", "--num_accelerators"),
    "torchrun": ("--nproc_per_node", "--nproc-per-node"),
    "python": (),
}
# Options that choose hosts or devices in ways that a number of ranks cannot follow.
UNFOLLOWED = {
    "deepspeed": ("-i", "--include", "-e", "--exclude", "--num_nodes", "--autotuning", "--module", "--no_ssh"),
    "torchrun": ("--nnodes",),
    "python": (),
}


@dataclass(frozen=True)
class Command:
    """`[launcher and its options] pretrain.py [its arguments]`."""

    launcher: Literal["deepspeed", "torchrun", "python"]
    head: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Command":
        """Splits a command line; UserError where it is none that can be restarted on fewer ranks."""
        place = next((i for i, word in enumerate(words) if Path(word).name == SCRIPT), None)
        if place is None:
            raise UserError(
                f"command: got {' '.join(words)!r}; needed: -- deepspeed [options] launchers/{SCRIPT} --ds FILE ..."
            )
        head = tuple(words[:place])
        command = cls(_launcher(head), head, words[place], tuple(words[place + 1 :]))
        for name in UNFOLLOWED[command.launcher]:
            if command._option(name) not in (None, "1"):
                raise UserError(
                    f"command: got {command.launcher} {name}; needed: --num_gpus or a hostfile (deepspeed), "
                    "--nproc_per_node (torchrun, one machine)"
                )
        if command.hostfile and command.count:
            raise UserError("command: got a number of ranks beside --hostfile; needed: slots in the hostfile alone")
        return command

    @property
    def count(self) -> int | None:
        """Ranks that the command asks for; None for all that there are."""
        if self.launcher == "python":
            return 1
        value = next((v for name in COUNT[self.launcher] if (v := self._option(name))), None)
        if value is None or not value.isdigit():  # torchrun also takes gpu, cpu and auto
            return 1 if value is None and self.launcher == "torchrun" else None
        return int(value)

    @property
    def hostfile(self) -> Path | None:
        """DeepSpeed's list of machines, where one is given."""
        name = (self._option("--hostfile") or self._option("-H")) if self.launcher == "deepspeed" else None
        return Path(name) if name else None

    def on(self, world: int, *, devices: Sequence[int] = (), hostfile: Path | None = None) -> list[str]:
        """This command on `world` ranks.

        Args:
            devices: this machine's GPUs to use, where DeepSpeed may not choose the first ones.
            hostfile: where the shortened list of machines was written (`shortened`).
        """
        if self.launcher == "python":
            return [*self.head, self.script, *self.arguments]
        head = _without(self.head, (*COUNT[self.launcher], "--hostfile", "-H"))
        if hostfile:
            added = ["--hostfile", str(hostfile)]
        elif self.launcher == "deepspeed" and devices:
            added = ["--include", f"localhost:{','.join(map(str, devices[:world]))}"]
        else:
            added = [COUNT[self.launcher][-1], str(world)]
        return [*head, *added, self.script, *self.arguments]

    def environment(self, world: int, *, devices: Sequence[int]) -> dict[str, str]:
        """Variables to set beside `on`: torchrun takes the first visible devices."""
        if self.launcher != "torchrun" or not devices:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices[:world]))}

    def _option(self, name: str) -> str | None:
        for i, word in enumerate(self.head):
            if word == name:
                return self.head[i + 1] if i + 1 < len(self.head) else ""
            if name.startswith("--") and word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None


def _launcher(head: Sequence[str]) -> Literal["deepspeed", "torchrun", "python"]:
    names = {Path(word).name for word in head}
    if names & {"deepspeed", "deepspeed.launcher.runner"}:
        return "deepspeed"
    if names & {"torchrun", "torch.distributed.run"}:
        return "torchrun"
    if not head or re.fullmatch(r"python[\d.]*", Path(head[0]).name):
        return "python"
    raise UserError(f"command: got the launcher {head[0]!r}; needed: deepspeed, torchrun or python")


def _without(head: Sequence[str], names: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(head)
    for word in words:
        if word in names:
            next(words, None)
        elif not word.startswith(tuple(f"{name}=" for name in names if name.startswith("--"))):
            kept.append(word)
    return kept


def slots(hostfile: Path) -> dict[str, int]:
    """Ranks per machine of a DeepSpeed hostfile (`host slots=8` a line)."""
    if not hostfile.is_file():
        raise UserError(f"--hostfile: got {hostfile}, which does not exist; needed: lines such as host slots=8")
    found: dict[str, int] = {}
    for line in hostfile.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if text and not match:
            raise UserError(f"--hostfile: got the line {line!r} in {hostfile}; needed: host slots=8")
        if match:
            found[match[1]] = int(match[2])
    return found


def shortened(hosts: dict[str, int], world: int) -> str:
    """A hostfile for the first `world` slots of `hosts`."""
    lines, left = [], world
    for host, number in hosts.items():
        if used := min(number, left):
            lines.append(f"{host} slots={used}\n")
        left -= used
    return "".join(lines)
