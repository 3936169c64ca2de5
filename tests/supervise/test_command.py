"""Commands rewritten for another number of ranks, and how many ranks there are."""

from pathlib import Path

import pytest

from m3i_large.data.mixture import Mixture
from m3i_large.errors import OutageError, UserError
from m3i_large.recipe import load_recipe, recipe_names
from m3i_large.supervise import available
from m3i_large.supervise.available import Available, available_ranks, largest_world, valid_world_sizes
from m3i_large.supervise.command import Command, shortened, slots

TAIL = "launchers/pretrain.py --ds z.json --out runs/x train.steps=3"


@pytest.mark.parametrize(
    ("given", "count", "on_3"),
    [
        ("deepspeed", None, "deepspeed --num_accelerators 3"),
        ("deepspeed --num_gpus 8 --master_port 1", 8, "deepspeed --master_port 1 --num_accelerators 3"),
        ("deepspeed --num_accelerators=8", 8, "deepspeed --num_accelerators 3"),
        ("python -m deepspeed.launcher.runner", None, "python -m deepspeed.launcher.runner --num_accelerators 3"),
        ("/opt/bin/torchrun --nproc_per_node=8", 8, "/opt/bin/torchrun --nproc-per-node 3"),
        ("torchrun --standalone --nproc-per-node gpu", None, "torchrun --standalone --nproc-per-node 3"),
        ("python3.11 -m torch.distributed.run", 1, "python3.11 -m torch.distributed.run --nproc-per-node 3"),
        ("python3", 1, "python3"),
    ],
)
def test_only_the_number_of_ranks_changes(given: str, count: int | None, on_3: str) -> None:
    command = Command.parse(f"{given} {TAIL}".split())
    assert command.count == count
    assert " ".join(command.on(3)) == f"{on_3} {TAIL}"


def test_deepspeed_gets_the_healthy_gpus_by_name_and_torchrun_by_variable() -> None:
    command = Command.parse(f"deepspeed --num_gpus 4 {TAIL}".split())
    assert " ".join(command.on(2, devices=(0, 2, 3))) == f"deepspeed --include localhost:0,2 {TAIL}"
    assert command.environment(2, devices=(0, 2, 3)) == {}
    command = Command.parse(f"torchrun --nproc_per_node 4 {TAIL}".split())
    assert command.environment(2, devices=(0, 2, 3)) == {"CUDA_VISIBLE_DEVICES": "0,2"}
    assert " ".join(command.on(2, devices=(0, 2, 3))) == f"torchrun --nproc-per-node 2 {TAIL}"


def test_a_hostfile_is_read_anew_and_shortened(tmp_path: Path) -> None:
    path, short = tmp_path / "hosts", tmp_path / "short"
    path.write_text("# rack 1\na slots=8\nb slots=4  # half\n\nc slots=8\n")
    command = Command.parse(f"deepspeed -H {path} {TAIL}".split())
    assert command.hostfile == path and available_ranks(command, ranks_command=None) == Available(20)
    assert shortened(slots(path), 10) == "a slots=8\nb slots=2\n"
    assert shortened(slots(path), 20) == "a slots=8\nb slots=4\nc slots=8\n"
    assert " ".join(command.on(10, hostfile=short)) == f"deepspeed --hostfile {short} {TAIL}"
    path.write_text("a slots=8\n")
    assert available_ranks(command, ranks_command=None) == Available(8)
    path.write_text("a 8\n")
    with pytest.raises(UserError, match="line 'a 8'"):
        available_ranks(command, ranks_command=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("deepspeed train.py", "needed: -- deepspeed"),
        ("", "needed: -- deepspeed"),
        (f"srun -n 8 {TAIL}", "the launcher 'srun'; needed: deepspeed, torchrun or python"),
        (f"deepspeed --include localhost:1 {TAIL}", "deepspeed --include"),
        (f"torchrun --nnodes=2 {TAIL}", "torchrun --nnodes"),
        (f"deepspeed --hostfile h --num_gpus 2 {TAIL}", "slots in the hostfile alone"),
    ],
)
def test_commands_that_cannot_be_followed_are_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Command.parse(given.split())


@pytest.mark.parametrize("name", recipe_names())
def test_valid_world_sizes_are_those_of_the_sampler(name: str) -> None:
    recipe = load_recipe(name)
    order = Mixture.plan(
        0,
        sources=[(s.name, 10_000, s.exact_repeats, 1.0, s.quota) for s in recipe.data.sources],
        global_batch=recipe.train.global_batch,
        lanes=recipe.data.lanes,
        accumulation=recipe.train.accumulation,
    )
    valid = valid_world_sizes(recipe)
    assert valid == order.valid_world_sizes()
    assert all(recipe.train.micro_batch_at(world) for world in valid)


def test_an_asserted_micro_batch_leaves_one_world_size() -> None:
    assert valid_world_sizes(load_recipe("demo")) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert valid_world_sizes(load_recipe("demo", ["train.micro_batch=24"])) == [4]
    assert valid_world_sizes(load_recipe("demo", ["train.contrast_batch=48"])) == [1, 2, 3, 4, 6, 12]


def test_the_largest_that_fits() -> None:
    assert [largest_world([1, 2, 4], n) for n in (1, 3, 4, 9)] == [1, 2, 4, 4]
    with pytest.raises(OutageError, match="1 ranks available; needed: one of 2, 4"):
        largest_world([2, 4], 1)


def test_the_number_of_ranks_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command = Command.parse(f"deepspeed --num_gpus 8 {TAIL}".split())
    assert available_ranks(command, ranks_command=None) == Available(8)
    assert available_ranks(Command.parse(f"deepspeed {TAIL}".split()), ranks_command=None) == Available(1)
    assert available_ranks(command, ranks_command="echo 6") == Available(6)
    assert available_ranks(command, ranks_command="echo 16") == Available(8), "never more than asked for"
    for wrong in ("echo six", "echo 6; exit 1", "true"):
        with pytest.raises(OutageError, match="needed: a number"):
            available_ranks(command, ranks_command=wrong)
    monkeypatch.setattr(available, "PROBE_S", 0.1)
    with pytest.raises(OutageError, match=r"--ranks-command: does not end within 0.1 s"):
        available_ranks(command, ranks_command="exec sleep 60")


def test_gpus_that_do_not_answer_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n3\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    broken = "import os, sys, time; d = os.environ['CUDA_VISIBLE_DEVICES']; d == '1' and time.sleep(60); "
    monkeypatch.setattr(available, "PROBE", broken + "sys.exit(d == '2')")
    monkeypatch.setattr(available, "PROBE_S", 2.0)
    command = Command.parse(f"deepspeed {TAIL}".split())
    assert available_ranks(command, ranks_command=None) == Available(2, (0, 3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2,7")
    assert available.listed_devices() == [3, 2]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert available.listed_devices() == []
