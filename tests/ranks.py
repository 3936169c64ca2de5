"""Runs a function on several gloo ranks, each a process of its own, and returns what every rank returned.

The processes are forked from one that has imported DeepSpeed, which takes longer than most of what they are to do.
"""

import multiprocessing
import os
import runpy
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from m3i_large.parallel.comm import Rank, gather_objects
from m3i_large.parallel.state import State

if not Path("/dev/nvidiactl").exists():  # CUDA's driver does not outlive a fork
    multiprocessing.set_forkserver_preload(["m3i_large.train"])
FORKING = multiprocessing.get_context("forkserver")


def free_port() -> int:
    """Below the ports that Linux gives to connections: it is still free when a launcher comes to it, seconds later."""
    while True:
        port = 16_000 + secrets.randbelow(16_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def _main(
    index: int,
    world: int,
    port: int,
    inherited: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple,
    results: str,
) -> None:
    environment = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.clear()
    os.environ.update(inherited | {key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    from m3i_large.parallel.comm import start_distributed, stop_distributed

    rank = start_distributed(timeout_s=120)
    try:
        torch.save(function(rank, *arguments), Path(results) / f"{index}.pt")
    finally:
        stop_distributed()
    # Not through the interpreter's own exit, where on a busy machine a thread of torch's now and then aborts the
    # process ("terminate called without an active exception") after everything has been done and written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(rank, *arguments) on `world` ranks; a list of the results in rank order."""
    with tempfile.TemporaryDirectory() as results:
        given = (world, free_port(), dict(os.environ), function, arguments, results)
        mp.start_processes(_main, args=given, nprocs=world, start_method="forkserver")
        return [torch.load(Path(results) / f"{i}.pt", weights_only=False) for i in range(world)]


def _script(command: list[str], environment: dict[str, str], directory: Path, out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_script(
    command: list[str], *, environment: dict[str, str], directory: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run of `python command...` with its output captured."""
    with tempfile.TemporaryDirectory() as told:
        out, err = Path(told) / "out", Path(told) / "err"
        process = FORKING.Process(target=_script, args=(command, environment, directory, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def full(rank: Rank, state: State) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's slices."""
    mine = {k: (s.shape, s.offset, s.values.clone()) for group in state.groups() for k, s in group.items()}
    parts = gather_objects(mine, rank)
    whole = {}
    for key, (shape, _, _) in parts[0].items():
        flat = torch.full((int(torch.tensor(shape).prod()),), float("nan"))
        for part in parts:
            _, offset, values = part[key]
            flat[offset : offset + len(values)] = values
        whole[key] = flat.reshape(shape)
    return whole
