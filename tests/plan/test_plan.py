"""The command as a user types it, what it concludes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import ROOT

from m3i_large.cli import main
from m3i_large.ds_file import Zero, read_ds_file, zero_of
from m3i_large.errors import UserError
from m3i_large.plan.devices import GIB, Gpu, find_gpu, known_gpus
from m3i_large.plan.plan import Plan, make_plan
from m3i_large.plan.tables import verdict
from m3i_large.recipe import load_recipe
from m3i_large.stream import nominal_sizes, plan_mixture


def m3i(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Status, output and error output of the command in this process."""
    monkeypatch.setattr("sys.argv", ["m3i", "plan", *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def zero_of_file(path: Path) -> Zero:
    return zero_of(read_ds_file(path))


def plan_of(name: str, *overrides: str, gpus: int = 8, gpu: str = "h100", zero: Zero | None = None) -> Plan:
    return make_plan(load_recipe(name, list(overrides)), gpus=gpus, gpu=find_gpu(gpu), zero=zero or Zero())


def test_tables_fit_one_screen_and_say_what_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = m3i(monkeypatch, capsys, "m3i", "--gpus", "8", "--gpu", "a100-40")
    lines = out.splitlines()
    assert status == 0 and len(lines) < 75 and max(map(len, lines)) <= 140 and "…" not in out
    assert "FITS: contrast_batch 4,096 on 8 GPUs (512 rows each)" in out


def test_json_holds_every_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = m3i(monkeypatch, capsys, "m3i", "train.steps=1000", "--gpus", "4", "--mfu", "0.5", "--json")
    values = json.loads(out)
    assert status == 0 and values["samples"] == 1000 * 4096
    forward, backward = (sum(values["flops"][key].values()) for key in ("forward", "backward"))
    assert values["flops"]["model"] == pytest.approx(forward + backward)
    assert values["samples_per_s"] == pytest.approx(4 * 0.5 * 989.5e12 / values["flops"]["model"])
    assert values["gpu_hours"] == pytest.approx(4 * values["samples"] / values["samples_per_s"] / 3600)
    assert values["parts"]["student"]["trained"] == values["parts"]["target"]["frozen"] > 85e6
    trained = sum(part["trained"] for part in values["parts"].values())
    assert values["checkpoint_bytes"] == 12 * trained + 4 * values["parts"]["target"]["frozen"]
    for option in values["options"]:
        used = option["memory"]
        assert used["total"] == sum(used["rows"].values()) > used["allocated"]
        assert option["contrast_batch"] * option["accumulation"] == 4096
        assert option["fits"] == (used["total"] <= values["gpu"]["memory"])


def test_the_billion_parameters_walk_one_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = m3i(monkeypatch, capsys, "m3i_internimage_h_442m", "--gpus", "128", "--dry-run", "--json")
    values = json.loads(out)
    assert status == 0 and values["rows"] == 128 and values["gradients"] > 1500
    # 1.08 billion parameters under 128 images: what is kept is 80 MB an image, whatever is counted on the way.
    assert 8 * GIB < values["kept_bytes"] < values["peak_bytes"] < 14 * GIB


def test_a_batch_that_does_not_fit_comes_with_what_does() -> None:
    plan = plan_of("m3i", "train.activation_checkpointing=false", gpu="small:30:300")
    own, best = plan.as_it_is, plan.best
    assert not own.fits and best is not None and best.fits and best.overrides
    assert best.contrast_batch == 4096  # recomputation is enough
    assert plan.enough_gpus is not None and plan.enough_gpus > 8
    text = "\n".join(verdict(plan))
    assert "DOES NOT FIT" in text and "train.activation_checkpointing=true" in text and "train.contrast=cached" in text
    again = plan_of("m3i", *best.overrides, gpu="small:30:300")
    assert again.as_it_is.fits and again.as_it_is.memory.total == pytest.approx(best.memory.total, rel=0.02)
    more = plan_of("m3i", "train.activation_checkpointing=false", gpu="small:30:300", gpus=plan.enough_gpus)
    assert more.as_it_is.fits


def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    plan = plan_of("m3i", gpu="small:20:300")
    for remat, rows in plan.largest_micro_batch.items():
        flag = f"train.activation_checkpointing={str(remat).lower()}"
        for size, fits in ((rows, True), (rows + 1, False)):
            batch = [f"train.global_batch={8 * size}", "data.lanes=8", "train.steps=1", flag]
            assert plan_of("m3i", *batch, gpu="small:20:300").as_it_is.fits == fits, (remat, size)


def test_contrast_cached_is_offered_with_what_it_takes_itself() -> None:
    given = ("backbone.arch.depth=4", "text.layers=2", "decoder.layers=1", "train.activation_checkpointing=false")
    plan = plan_of("m3i_vit_b16_yfcc15m", *given, gpu="small:12:300")
    offered = plan.cached
    assert not plan.as_it_is.fits and offered is not None and offered.fits
    own = plan_of("m3i_vit_b16_yfcc15m", *given, "train.contrast=cached", gpu="small:12:300")
    assert own.cached is None and own.as_it_is.fits
    assert (own.as_it_is.chunk, own.as_it_is.memory) == (offered.chunk, offered.memory)
    assert offered.chunk is not None and own.as_it_is.micro_batch % offered.chunk == 0
    assert own.as_it_is.hardware == pytest.approx(own.flops.hardware) and own.mfu < plan.mfu
    lines = "\n".join(verdict(plan))
    assert f"in chunks of {offered.chunk} rows takes {offered.memory.total / GIB:.1f} GiB" in lines
    calls = [sum(row.calls for row in p.traffic if row.what == "gradients") for p in (plan, own)]
    assert calls[1] == calls[0] * own.as_it_is.micro_batch // offered.chunk


def test_zero_1_is_refused_where_training_refuses_it() -> None:
    zero = Zero(stage=1)
    with pytest.raises(UserError, match="ZeRO-1 would add up"):
        plan_of("m3i", "train.contrast=cached", zero=zero)
    with pytest.raises(UserError, match="ZeRO-1 would add up"):
        plan_of("m3i", "train.contrast_batch=2048", zero=zero)
    assert {option.accumulation for option in plan_of("m3i", zero=zero).options} == {1}


def test_nvme_comes_with_its_disk_and_block_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = zero_of_file(ROOT / "ds_configs/zero3_nvme.json")
    plan = plan_of("m3i", gpus=2, zero=zero)
    trained, averaged = (sum(n[i] for n in plan.parts.values()) for i in (0, 1))
    assert plan.as_it_is.memory.disk == pytest.approx((12 * trained + 4 * averaged) / 2, rel=1e-3)
    assert plan.block_size is not None and plan.block_size % 2**20 == 0
    status, out, _ = m3i(monkeypatch, capsys, "m3i", "--gpus", "2", "--ds", "ds_configs/zero3_nvme.json")
    head = out.splitlines()[0]
    assert status == 0 and f"aio.block_size {plan.block_size >> 20} MiB" in head and "GiB of disk a rank" in head
    with pytest.raises(UserError, match="sub_group_size: got 1000; needed: at least"):
        plan_of("m3i", zero=replace(zero, sub_group=1000))


def test_nothing_fits_on_a_device_without_memory() -> None:
    plan = plan_of("m3i", gpu="tiny:2:1")
    assert plan.best is None and plan.largest_micro_batch == {True: 0, False: 0} and plan.enough_gpus is None
    assert plan.cached is not None and not plan.cached.fits
    first, _, last = verdict(plan)
    assert first.startswith("DOES NOT FIT") and last.startswith("train.contrast=cached does not fit either")


def test_more_sharding_and_offload_take_less() -> None:
    stages = plan_of("m3i", zero=zero_of_file(ROOT / "ds_configs/zero3.json")).stages
    assert stages["stage 1"]["gpu"] > stages["stage 2"]["gpu"]
    states = {name: row["gpu"] - row["gathered and buckets"] for name, row in stages.items()}
    order = [*(f"stage {s}" for s in (1, 2, 3)), "stage 3, optimizer on cpu", "stage 3, all on cpu"]
    assert [states[name] for name in order] == sorted((states[name] for name in order), reverse=True)
    assert states["stage 3, all on cpu"] == 0 < states["stage 3, optimizer on cpu"]
    assert stages["stage 3, optimizer on nvme"]["disk"] > 0
    assert stages["stage 3, optimizer on cpu"]["host"] > 0 == stages["stage 3, optimizer on cpu"]["disk"]


def test_steps_are_the_sampler_s() -> None:
    recipe = load_recipe("m3i_vit_b16_yfcc15m")
    plan = make_plan(recipe, gpus=8, gpu=find_gpu("h100"), zero=Zero())
    mixture = plan_mixture(recipe, [(n.samples, n.mean_bytes) for n in nominal_sizes(recipe)])
    assert plan.steps == mixture.steps_for_epochs(recipe.train.epochs or 0)
    assert plan.mean_bytes == nominal_sizes(recipe)[0].mean_bytes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["m3i", "--gpu", "h1000"], "--gpu: got 'h1000'; needed: one of h100,"),
        (["m3i", "--gpu", "mine:80:-1"], "--gpu: got 'mine:80:-1'; needed:"),
        (["m3i", "--gpus", "7"], "--gpus: got 7; needed: one of 1, 2, 4, 8,"),
        (["m3i", "--gpus", "7", "--dry-run"], "--gpus: got 7; needed: one of 1, 2, 4, 8,"),
        (["m3i", "--mfu", "1.5"], "--mfu: got 1.5; needed: more than 0, at most 1"),
        (["m3i", "--ds", "no.json"], "--ds: got no.json, which does not exist; needed: a DeepSpeed JSON file"),
        (["nobody"], "recipe: got 'nobody'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = m3i(monkeypatch, capsys, *arguments)
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith(f"error: {line}"), err


@pytest.mark.parametrize(
    ("zero", "line"),
    [
        (None, "sets zero_optimization.stage to None; needed: 1, 2 or 3"),
        ({"stage": 4}, "sets zero_optimization.stage to 4; needed: 1, 2 or 3"),
        ({"stage": True}, "sets zero_optimization.stage to True; needed: 1, 2 or 3"),
        ({"stage": 3, "reduce_bucket_size": "big"}, "sets reduce_bucket_size to 'big'; needed: a number of elements"),
        ({"stage": 3, "offload_optimizer": {"device": "tape"}}, "sets offload_optimizer.device to 'tape'"),
    ],
)
def test_mistakes_in_the_ds_file(zero: dict | None, line: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({} if zero is None else {"zero_optimization": zero}))
    with pytest.raises(UserError) as error:
        zero_of_file(path)
    assert line in str(error.value) and len(str(error.value).splitlines()) == 1


def test_ds_file_is_read_with_deepspeeds_defaults(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    path = tmp_path / "ds.json"
    for stage in (1, 2, 3):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        theirs, ours = DeepSpeedZeroConfig(stage=stage), zero_of_file(path)
        assert ours == Zero(
            stage=stage,
            reduce_bucket=theirs.reduce_bucket_size,
            allgather_bucket=theirs.allgather_bucket_size,
            prefetch_bucket=theirs.prefetch_bucket_size,
            persistence=theirs.param_persistence_threshold,
            max_live=theirs.max_live_parameters,
            max_reuse=theirs.max_reuse_distance,
            sub_group=theirs.sub_group_size,
            hpz=theirs.zero_hpz_partition_size,
            overlap=bool(theirs.overlap_comm),
        )
    values = {"stage": 3, "sub_group_size": 1e8, "reduce_bucket_size": 5e7, "zero_hpz_partition_size": 8}
    values["offload_optimizer"] = {"device": "nvme", "nvme_path": "/x", "buffer_count": 5}
    path.write_text(json.dumps({"zero_optimization": values | {"offload_param": {"device": "cpu"}}}))
    sizes = {"sub_group": 10**8, "reduce_bucket": 5 * 10**7, "buffer_count": 5, "hpz": 8}
    wanted = replace(Zero(), optimizer="nvme", weights="cpu", **sizes)
    assert zero_of_file(path) == wanted


def test_known_and_described_gpus() -> None:
    assert {"h100", "h200", "a100-80", "a100-40"} <= set(known_gpus())
    assert find_gpu("H100").peak == 989.5e12
    assert find_gpu("mine:80:500") == Gpu("mine", 80 * GIB, 500e12)
