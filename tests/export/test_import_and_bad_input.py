"""Published files as a starting point, and what export refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
import written
from safetensors.torch import load_file
from torchvision.models import VisionTransformer as TorchvisionViT
from typer.testing import CliRunner

from m3i_large.checkpoint import Checkpoint, find_checkpoint
from m3i_large.cli import app
from m3i_large.errors import UserError
from m3i_large.evaluate.load import load_untrained
from m3i_large.export import export, import_weights, read_weights
from m3i_large.models import create_model

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def moved(model: torch.nn.Module) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model.eval()


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_timm_file_with_its_head_and_a_layer_scale(scale: float | None, tmp_path: Path) -> None:
    model = moved(timm.create_model("vit_base_patch16_224", num_classes=5, init_values=scale, **TIMM))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "file.pth")
    read, card = import_weights(tmp_path / "file.pth", out=tmp_path / "own.safetensors")
    assert (read.name, read.arch["width"], read.arch["heads"], read.arch["image_size"]) == ("vit", 64, 1, 32)
    own: Any = read_weights(tmp_path / "own.safetensors").build().eval()
    with torch.no_grad():
        torch.testing.assert_close(own.tokens(image()), model.forward_features(image())[:, 1:], rtol=1e-4, atol=1e-4)
    assert card["imported_from"] == "file.pth" and card["read_as"] == "vit"


def test_a_mae_pretraining_file_gives_its_encoder(tmp_path: Path) -> None:
    model = moved(timm.create_model("vit_base_patch16_224", num_classes=0, **TIMM))
    state = model.state_dict() | {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 64)}
    state |= {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pos_embed": torch.ones(1, 17, 8)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "mae.pth")
    own: Any = read_weights(tmp_path / "mae.pth").build().eval()
    with torch.no_grad():
        torch.testing.assert_close(own.tokens(image()), model.forward_features(image())[:, 1:])


def test_torchvision_and_transformers_files(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    model = moved(TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=1, hidden_dim=64, mlp_dim=128))
    torch.save(model.state_dict(), tmp_path / "tv.pth")
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    hub = moved(ViTModel(config))
    hub.save_pretrained(tmp_path / "hub")
    with torch.no_grad():
        model(image())
        wanted = {"tv.pth": seen[0][:, 1:], "hub": hub(pixel_values=image()).last_hidden_state[:, 1:]}
        for name, tokens in wanted.items():
            read = read_weights(tmp_path / name)
            assert read.arch["mlp_ratio"] == 2
            own: Any = read.build().eval()
            torch.testing.assert_close(own.tokens(image()), tokens, rtol=1e-4, atol=1e-4)


def test_a_published_internimage_is_recognised_by_its_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {k: x.shape for k, x in create_model("internimage_t", num_classes=10).state_dict().items()}
    state = {k: torch.zeros(shape) for k, shape in shapes.items()}
    torch.save({"model": state, "epoch": 300}, tmp_path / "t.pth")
    read = read_weights(tmp_path / "t.pth")
    assert (read.name, read.layout) == ("internimage_t", "official")
    del state["levels.2.blocks.17.mlp.fc2.bias"]
    torch.save({"model": state}, tmp_path / "t.pth")
    with pytest.raises(UserError, match="none of the published sizes"):
        read_weights(tmp_path / "t.pth")
    with pytest.raises(UserError, match=r"1 missing, first levels\.2\.blocks\.17\.mlp\.fc2\.bias"):
        read_weights(tmp_path / "t.pth", name="internimage_t")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    written.write(root / "run", written.VIT)
    export(root / "run", to="safetensors", out=root / "start.safetensors")
    return root


def test_a_pretraining_starts_from_a_file(started: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    values = tiny.recipe(data, steps=1, checkpoint_every=1, picture_every=0)
    values["backbone"] = dict(written.VIT["backbone"]) | {"weights": str(started / "start.safetensors")}
    values["optim"]["lr"] = {"peak": 1e-7, "warmup": 0.0}
    file = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    done = tiny.pretrain("--recipe", file, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    saved, start = Checkpoint(find_checkpoint(tmp_path / "run")), load_file(started / "start.safetensors")
    for key, x in start.items():
        for prefix in ("master/student.", "ema/target."):
            torch.testing.assert_close(saved.read_full(prefix + key), x, rtol=0, atol=2e-6, msg=prefix + key)
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    card = json.loads((started / "start.safetensors.json").read_text())
    assert env["backbone_weights"]["sha256"] == card["sha256"]


def test_what_is_not_in_the_file_is_drawn_as_ever(started: Path) -> None:
    plain = written.recipe_of(written.VIT)
    filled = written.recipe_of(
        written.VIT | {"backbone": written.VIT["backbone"] | {"weights": str(started / "start.safetensors")}}
    )
    a, b, start = load_untrained(plain), load_untrained(filled), load_file(started / "start.safetensors")
    for key, x in b.state_dict().items():
        tower, _, name = key.partition(".")
        wanted = start[name] if tower in ("student", "target") else a.state_dict()[key]
        assert torch.equal(x, wanted), key


@pytest.mark.parametrize(
    ("change", "line"),
    [({"width": 64}, "with width 32; needed: the recipe's 64"), ({"heads": 4}, "with heads 2; needed: the recipe's 4")],
)
def test_another_backbone_is_no_start(started: Path, change: dict[str, int], line: str) -> None:
    backbone = {"name": "vit", "arch": written.VIT["backbone"]["arch"] | change}
    backbone["weights"] = str(started / "start.safetensors")
    with pytest.raises(UserError, match=line):
        load_untrained(written.recipe_of(written.VIT | {"backbone": backbone}))


def test_a_start_at_another_image_size_gets_a_resized_table(started: Path) -> None:
    arch = written.VIT["backbone"]["arch"] | {"image_size": 64}
    backbone = {"name": "vit", "arch": arch, "weights": str(started / "start.safetensors")}
    student: Any = load_untrained(
        written.recipe_of(written.VIT | {"backbone": backbone, "data_image_size": 64})
    ).student
    read = read_weights(started / "start.safetensors").build(image_size=64).state_dict()
    assert torch.equal(student.state_dict()["pos_embed"], read["pos_embed"]) and student.grid == 8


@pytest.fixture()
def run(started: Path, tmp_path: Path) -> Path:
    shutil.copytree(started / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(line: str, path: Path, **more: Any) -> None:
    out = path.parent / "file"
    with pytest.raises(UserError, match=line) as told:
        export(path, **({"to": "safetensors", "out": out} | more))
    assert "\n" not in str(told.value)
    assert [p for p in path.parent.glob("*file*") if p.name != "file.pth"] == [], "nothing is left behind"


def test_a_damaged_or_interrupted_checkpoint_is_refused(run: Path) -> None:
    directory = find_checkpoint(run)
    shard = sorted(directory.glob("rank_*"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    refused("differs from its checksum", run)
    shard.unlink()
    refused(f"{shard.name} is missing", run)
    (directory / "manifest.json").unlink()
    refused("needed: a run directory with a checkpoint", run)
    refused("needed: a run directory with a checkpoint", run.parent / "nothing")


def test_a_checkpoint_that_is_not_of_its_recipe_is_refused(run: Path) -> None:
    manifest = find_checkpoint(run) / "manifest.json"
    values = json.loads(manifest.read_text())
    values["recipe"]["backbone"]["arch"]["depth"] = 3
    manifest.write_text(json.dumps(values))
    refused(r"12 missing, first blocks\.2\.", run)


def test_options_that_make_no_sense_are_refused(run: Path) -> None:
    refused("layout: got 'tim'.*did you mean timm", run, to="tim")
    refused("mmdet has no place for vit", run, to="mmdet")
    refused("--dtype: got 'fp16'", run, dtype="fp16")
    refused("--branch: got 'teacher'", run, branch="teacher")
    refused("--with-head: the layout timm has none", run, to="timm", with_head=True)
    refused("no directory", run, out=run / "a" / "b.safetensors")
    refused("patch_size", run, image_size=33)


def test_an_existing_file_is_kept_unless_forced(run: Path) -> None:
    out = run.parent / "file.pth"
    out.write_text("mine")
    refused("exists; needed: another name, or --force", run, to="mae", out=out)
    assert out.read_text() == "mine"
    export(run, to="mae", out=out, force=True)
    assert read_weights(out).name == "vit"


def test_heads_of_other_shapes_than_the_official_one_are_refused(tmp_path: Path) -> None:
    written.write(tmp_path / "run", written.LARGE)
    refused(
        "got pool.width 32 and pool.heads 2; needed: 768 and 16", tmp_path / "run", to="internimage", with_head=True
    )
    refused("the layout m3i holds both branches", tmp_path / "run", to="m3i", branch="target")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"conv1.weight": torch.ones(4, 3, 7, 7)}, "no backbone that is known here.*conv1.weight"),
        ({}, "no tensor"),
        ({"model": {"levels.0.x": torch.ones(2)}}, "none of the published sizes"),
    ],
)
def test_files_that_are_no_backbone_are_refused(content: dict[str, Any], line: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=line):
        read_weights(tmp_path / "file.pth")
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "other.pth")


def test_the_commands_print_what_to_do_next(started: Path, tmp_path: Path) -> None:
    command, out = CliRunner(), str(tmp_path / "file.pth")
    told = command.invoke(app, ["export", str(started / "run"), "--to", "mae", "--out", out]).output
    assert "peak" in told and "--finetune" in told and out in told
    assert "right for mae" in command.invoke(app, ["verify", out, "--for", "mae"]).output
    told = command.invoke(app, ["import", out, "--out", str(tmp_path / "own.safetensors"), "--json"]).output
    assert json.loads(told)["card"]["layout"] == "safetensors"
    told = command.invoke(app, ["export", str(started / "run"), "--to", "timm", "--json", "--out", out + "x"]).output
    assert json.loads(told)["card"]["step"] == 10 and json.loads(told)["peak_gib"] > 0
