"""Runs a function on several gloo ranks, each a fresh process, and returns what every rank returned."""

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from m3i_large.parallel.comm import Rank, gather_objects
from m3i_large.parallel.state import State


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _main(index: int, world: int, port: int, function: Callable[..., Any], arguments: tuple, results: str) -> None:
    environment = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
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
        mp.spawn(_main, args=(world, free_port(), function, arguments, results), nprocs=world)
        return [torch.load(Path(results) / f"{i}.pt", weights_only=False) for i in range(world)]


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
