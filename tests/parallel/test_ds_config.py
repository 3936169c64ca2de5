"""What a DeepSpeed JSON may say, and what is written into it."""

import json
from pathlib import Path

import pytest
from torch import nn

from m3i_large.ds_file import FIXED, optimizer_device
from m3i_large.errors import UserError
from m3i_large.parallel.ds_config import StepSizes, read_ds_config, with_safe_block_size

SIZES = StepSizes(micro_batch=4, accumulation=2, clip=1.0, bf16=True)
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def file(directory: Path, *, stage: object = 3, zero: dict | None = None, **more: object) -> Path:
    path = directory / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **(zero or {})}, **more}))
    return path


def test_what_the_recipe_decides_is_written_and_a_contradiction_is_refused(tmp_path: Path) -> None:
    for key, value in {
        "train_batch_size": 7,
        "gradient_clipping": 3.0,
        "bf16": {"enabled": False},
        "optimizer": {"type": "Adam"},
        "data_types": {"grad_accum_dtype": "bf16"},
    }.items():
        with pytest.raises(UserError, match=key):
            read_ds_config(file(tmp_path, **{key: value}), SIZES, world=2)
    config = read_ds_config(file(tmp_path, train_batch_size=16), SIZES, world=2)
    assert (config["train_batch_size"], config["gradient_clipping"], config["bf16"]["enabled"]) == (16, 1.0, True)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(UserError, match="does not exist"):
        read_ds_config(tmp_path / "none.json", SIZES, world=1)
    for text, reason in (("{", "not valid JSON"), ("[1]", "holds a list")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=reason):
            read_ds_config(tmp_path / "bad.json", SIZES, world=1)


@pytest.mark.parametrize(
    ("stage", "zero", "reason"),
    [
        (0, {}, "stage to 0; needed: 1, 2 or 3"),
        ("3", {}, "stage to '3'"),
        (1, {}, "add up the gradients of several backward passes in bf16"),
        (2, {"offload_optimizer": {"device": "nvme"}}, "needed for that: zero_optimization.stage 3"),
        (2, {"offload_param": {"device": "cpu"}}, "needed for that: zero_optimization.stage 3"),
        (3, {"offload_optimizer": {"device": "disk"}}, "device to 'disk'; needed: one of none, cpu, nvme"),
        (3, {"offload_param": {"device": "nvme"}}, "weights on NVMe"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "no offload_optimizer.nvme_path"),
        (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/x", "pipeline_read": True}}, "pipeline_read"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path, stage: object, zero: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        read_ds_config(file(tmp_path, stage=stage, zero=zero), SIZES, world=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FIXED)
def test_what_would_be_computed_or_kept_differently_is_refused(tmp_path: Path, name: str) -> None:
    keys, bad = name.split("."), {True: False, False: True, None: {}}.get(FIXED[name], 0.5)
    nested: object = bad
    for key in reversed(keys[1:]):
        nested = {key: nested}
    given = {"zero": nested} if keys[0] == "zero_optimization" else {keys[0]: nested}
    with pytest.raises(UserError, match=rf"sets {name} to .*, which is not supported; needed: ") as error:
        read_ds_config(file(tmp_path, **given), SIZES, world=1)
    assert "\n" not in str(error.value)
    default = {"zero": {"offload_optimizer": {"device": "cpu", "ratio": 1}}, "torch_autocast": {"enabled": False}}
    read_ds_config(file(tmp_path, **default), SIZES, world=1)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_hold_sharding_and_offload_only(path: Path) -> None:
    read_ds_config(path, StepSizes(micro_batch=4, accumulation=1, clip=1.0, bf16=True), world=8)
    allowed = {"zero_optimization", "aio", "zero_allow_untested_optimizer"}
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values.keys() <= allowed
    explained = (path.parent / "README.md").read_text(encoding="utf-8")
    offload = [f"{key}.{inner}" for key in ("offload_optimizer",) for inner in values["zero_optimization"].get(key, {})]
    for key in [*values["zero_optimization"], *values.get("aio", {}), *offload]:
        assert f"`{key}`" in explained, f"{path.name}: {key} is not explained"


@pytest.mark.parametrize(("world", "block_mib"), [(1, 5), (2, 3), (4, 2), (8, 1)])
def test_no_gradient_is_as_long_as_a_block_and_sub_groups_are(world: int, block_mib: int) -> None:
    zero = {"stage": 3, "sub_group_size": 2_000_000}
    module = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(3, 5), nn.Linear(2048, 2048).requires_grad_(False))
    config = with_safe_block_size({"zero_optimization": zero}, module.parameters(), world=world)
    block = config["aio"]["block_size"]
    assert block == block_mib * 2**20
    assert 4 * -(-1024 * 1024 // world) < block <= 4 * 2_000_000
    small = {"zero_optimization": {"stage": 3, "sub_group_size": 1000}}
    with pytest.raises(UserError, match=f"sub_group_size: got 1000; needed: at least {block // 4}"):
        with_safe_block_size(small, module.parameters(), world=world)


def test_where_optimizer_states_lie(tmp_path: Path) -> None:
    config = read_ds_config(file(tmp_path, zero={"offload_optimizer": {"device": "cpu"}}), SIZES, world=1)
    assert optimizer_device(config) == "cpu" and config["zero_force_ds_cpu_optimizer"] is False
    assert optimizer_device(read_ds_config(file(tmp_path), SIZES, world=1)) == "none"
