"""Every layout, read as its consumer reads it: the real package where it installs, else its documented loading rule.
The features are those of the checkpoint's own tower."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import written
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from m3i_large.export import LAYOUTS, export, import_weights, read_weights, verify
from m3i_large.models import create_model
from m3i_large.objective import Objective

PARTS = {"vit": written.VIT, "huge": written.HUGE, "large": written.LARGE}


class Runs:
    """One run of each kind, written once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made = {name: written.write(root / name, parts) for name, parts in PARTS.items()}

    def path(self, kind: str) -> Path:
        return self.root / kind

    def tower(self, kind: str, branch: str = "student") -> Any:
        return getattr(self.made[kind][0], branch)

    def objective(self, kind: str) -> Objective:
        return self.made[kind][0]

    def arch(self, kind: str) -> dict[str, Any]:
        return self.made[kind][1].backbone.arch

    def export(self, kind: str, to: str, out: Path, **more: Any) -> Path:
        return export(self.path(kind), to=to, out=out / f"file{LAYOUTS[to].suffix}", **more)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def close(a: list[Tensor] | Tensor, b: list[Tensor] | Tensor) -> None:
    for x, y in zip([a] if isinstance(a, Tensor) else a, [b] if isinstance(b, Tensor) else b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def official_init_weights(path: Path, model: nn.Module) -> tuple[list[str], list[str]]:
    """What the official detection and segmentation backbones do with init_cfg's checkpoint: not strict."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content.get("model", content))
    state = OrderedDict((k[9:] if k.startswith("backbone.") else k, v) for k, v in state.items())
    if next(iter(state)).startswith("module."):
        state = OrderedDict((k[7:], v) for k, v in state.items())
    found = model.load_state_dict(state, strict=False)
    return found.missing_keys, found.unexpected_keys


@pytest.mark.parametrize("kind", ["huge", "large"])
@pytest.mark.parametrize("layout", ["internimage", "mmdet"])
@pytest.mark.parametrize("branch", ["student", "target"])
def test_official_detection_code_reads_it_whole(
    runs: Runs, kind: str, layout: str, branch: str, tmp_path: Path
) -> None:
    file = runs.export(kind, layout, tmp_path, branch=branch)
    model = create_model("internimage", **runs.arch(kind)).eval()
    assert official_init_weights(file, model) == ([], [])
    with torch.no_grad():
        close(model(image(64)), runs.tower(kind, branch)(image(64)))
    assert verify(file, layout=layout).untrained == "the run's own initial weights"


def test_mmengine_reads_the_mmdet_layout_by_its_prefix(runs: Runs, tmp_path: Path) -> None:
    """`Pretrained` with prefix='backbone.': keys that begin with it, without it; the wrapper must be state_dict."""
    content = torch.load(runs.export("huge", "mmdet", tmp_path), weights_only=True)
    state = {k[len("backbone.") :]: v for k, v in content["state_dict"].items() if k.startswith("backbone.")}
    create_model("internimage", **runs.arch("huge")).load_state_dict(state, strict=True)


def test_the_official_classifier_is_the_trainings_own(runs: Runs, tmp_path: Path) -> None:
    file = runs.export("huge", "internimage", tmp_path, with_head=True)
    model = create_model("internimage", num_classes=3, **runs.arch("huge")).eval()
    assert official_init_weights(file, model) == ([], [])
    objective = runs.objective("huge")
    with torch.no_grad():
        pooled = objective.pool(objective.student.tokens(image(64)))
        close(model.logits(image(64)), objective.category_head(pooled))
    verify(file, layout="internimage")


def test_the_hub_layout_of_internimage(runs: Runs, tmp_path: Path) -> None:
    """Official remote code: `model.` before every name, gamma1 and gamma2 as layer_scale1 and layer_scale2."""
    folder = runs.export("large", "hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    assert all(key.startswith("model.") and "gamma" not in key for key in state)
    restored = {k[6:].replace("layer_scale1", "gamma1").replace("layer_scale2", "gamma2"): v for k, v in state.items()}
    model = create_model("internimage", **runs.arch("large")).eval()
    model.load_state_dict(restored, strict=True)
    with torch.no_grad():
        close(model(image(64)), runs.tower("large")(image(64)))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "internimage" and config["channels"] == 16 and config["offset_scale"] == 2.0
    assert config["layer_scale"] == 0.1 and config["post_norm"] is True and config["level2_post_norm"] is False
    verify(folder, layout="hf")


def test_transformers_itself_reads_the_hub_layout_of_a_vit(runs: Runs, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = runs.export("vit", "hf", tmp_path)
    model, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    assert all("pooler" in key for key in told["missing_keys"]), told["missing_keys"]
    with torch.no_grad():
        close(model.eval()(pixel_values=image(32)).last_hidden_state[:, 1:], runs.tower("vit").tokens(image(32)))
    assert AutoImageProcessor.from_pretrained(folder).size["shortest_edge"] == 32
    verify(folder, layout="hf")


TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("branch", ["student", "target"])
def test_timm_itself_reads_its_layout(runs: Runs, branch: str, tmp_path: Path) -> None:
    file = runs.export("vit", "timm", tmp_path, branch=branch)
    model = timm.create_model("vit_base_patch16_224", num_classes=0, checkpoint_path=str(file), **TIMM).eval()
    with torch.no_grad():
        close(model.forward_features(image(32))[:, 1:], runs.tower("vit", branch).tokens(image(32)))
    verify(file, layout="timm")


def test_maes_fine_tuning_reads_its_layout(runs: Runs, tmp_path: Path) -> None:
    """main_finetune.py: checkpoint['model'], not strict, then it asserts which names are missing."""
    file = runs.export("vit", "mae", tmp_path)
    state = torch.load(file, weights_only=True)["model"]
    model = timm.create_model("vit_base_patch16_224", num_classes=7, **TIMM).eval()
    assert state["pos_embed"].shape == model.pos_embed.shape
    found = model.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == {"head.weight", "head.bias"} and not found.unexpected_keys
    with torch.no_grad():
        close(model.forward_features(image(32))[:, 1:], runs.tower("vit").tokens(image(32)))
    verify(file, layout="mae")


def test_torchvision_itself_reads_its_layout(runs: Runs, tmp_path: Path) -> None:
    file = runs.export("vit", "torchvision", tmp_path)
    model = TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128).eval()
    model.heads = nn.Identity()
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    seen: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(image(32))
        close(seen[0][:, 1:], runs.tower("vit").tokens(image(32)))
    verify(file, layout="torchvision")


def detectron2_matches(model: dict[str, tuple[int, ...]], state: dict[str, Tensor]) -> dict[str, str]:
    """detectron2's heuristic: a file's name fits a model's name that ends with it after a dot, the longest one wins."""
    matched = {}
    for name in model:
        fitting = [key for key in state if name == key or name.endswith(f".{key}")]
        if fitting and tuple(state[best := max(fitting, key=len)].shape) == model[name]:
            matched[name] = best
    return matched


def test_detectron2_matches_every_encoder_tensor_and_no_other(runs: Runs, tmp_path: Path) -> None:
    file = runs.export("vit", "detectron2", tmp_path)
    state = torch.load(file, weights_only=True)["model"]
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0, **TIMM).state_dict()
    wanted = {f"backbone.net.{k}": tuple(v.shape) for k, v in encoder.items() if not k.startswith("norm.")}
    # Norms of the pyramid and of heads, among them some that are as wide as the encoder's last norm.
    others = {
        f"backbone.simfp_{i}.{j}.norm.{w}": (32,) for i in (2, 3, 4, 5) for j in (0, 1) for w in ("weight", "bias")
    }
    others |= {f"roi_heads.box_head.conv{i}.norm.{w}": (32,) for i in (1, 2) for w in ("weight", "bias")}
    others |= {"roi_heads.mask_head.predictor.weight": (80, 32, 1, 1), "backbone.net.blocks.0.attn.rel_pos_h": (7, 16)}
    matched = detectron2_matches(wanted | others, state)
    assert matched == {f"backbone.net.{key}": key for key in state}
    assert set(matched) == set(wanted)
    verify(file, layout="detectron2")
    # What the layout leaves out is why: with it, heads would start from the encoder's last norm.
    with_norm = state | {"norm.weight": torch.ones(32)}
    assert set(detectron2_matches(wanted | others, with_norm)) - set(wanted)


def official_load_pretrained(path: Path) -> dict[str, Tensor]:
    """classification/utils.py: a checkpoint that begins with mask_token is converted from the pre-training's names."""
    state = torch.load(path, weights_only=True)["model"]
    assert "mask_token" in next(iter(state))
    new = {}
    for key, x in state.items():
        if "mm_dcnv3" in key:
            continue
        if "dcnv3" in key or "clip_projector" in key:
            new[key.replace("dcnv3.", "")] = x
    new["fc_norm.0.weight"] = state["clip.classifier_ln.weight"]
    new["fc_norm.0.bias"] = state["clip.classifier_ln.bias"]
    new["head.weight"], new["head.bias"] = state["clip.classifier.weight"], state["clip.classifier.bias"]
    return new


def test_the_official_converter_takes_m3is_own_layout_apart(runs: Runs, tmp_path: Path) -> None:
    file = runs.export("huge", "m3i", tmp_path)
    model = create_model("internimage", num_classes=3, **runs.arch("huge")).eval()
    model.load_state_dict(official_load_pretrained(file), strict=True)
    objective = runs.objective("huge")
    with torch.no_grad():
        close(model(image(64)), objective.student(image(64)))
        close(model.logits(image(64)), objective.category_head(objective.pool(objective.student.tokens(image(64)))))
    state = torch.load(file, weights_only=True)["model"]
    for key, x in objective.target.state_dict().items():
        if not key.startswith("dcnv3_head"):
            assert torch.equal(state[f"mm_dcnv3.{key}"], x), key
    verify(file, layout="m3i")


PAIRS = [
    (name, kind)
    for name, layout in LAYOUTS.items()
    for kind in PARTS
    if PARTS[kind]["backbone"]["name"] in layout.names
]


@pytest.mark.parametrize(("layout", "kind"), PAIRS)
def test_there_and_back_is_bit_exact(runs: Runs, layout: str, kind: str, tmp_path: Path) -> None:
    file = runs.export(kind, layout, tmp_path)
    if layout == "detectron2":  # it lacks the last norm, so it is no backbone here
        return
    read, _ = import_weights(file, out=tmp_path / "back.safetensors")
    own = {k: x for k, x in runs.tower(kind).state_dict().items() if not k.startswith("dcnv3_head")}
    back = load_file(tmp_path / "back.safetensors")
    assert read.layout == layout and back.keys() == own.keys()
    for key, x in own.items():
        assert torch.equal(back[key], x), key
    model = read_weights(tmp_path / "back.safetensors").build().eval()
    size = runs.arch(kind)["image_size"]
    with torch.no_grad():
        close(model(image(size)), runs.tower(kind)(image(size)))


def test_bf16_is_the_rounded_fp32(runs: Runs, tmp_path: Path) -> None:
    file = runs.export("vit", "safetensors", tmp_path, dtype="bf16")
    for key, x in load_file(file).items():
        assert x.dtype == torch.bfloat16 and torch.equal(x, runs.tower("vit").state_dict()[key].bfloat16()), key
    verify(file, layout="safetensors")


def test_another_image_size_resizes_the_position_table_as_timm_does(runs: Runs, tmp_path: Path) -> None:
    file = runs.export("vit", "timm", tmp_path, image_size=48)
    got = load_file(file)["pos_embed"]
    table = runs.tower("vit").state_dict()["pos_embed"]
    grid = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True, align_corners=False)
    assert got.shape == (1, 37, 32)
    close(got, torch.cat([table[:, :1], wanted.permute(0, 2, 3, 1).reshape(1, 36, 32)], 1))
    timm.create_model("vit_base_patch16_224", num_classes=0, checkpoint_path=str(file), **(TIMM | {"img_size": 48}))
    assert verify(file, layout="timm").tensors == len(load_file(file))


def test_the_card_says_where_the_weights_come_from(runs: Runs, tmp_path: Path) -> None:
    import hashlib

    file = runs.export("huge", "internimage", tmp_path, branch="target")
    card = json.loads(file.with_name(file.name + ".json").read_text())
    assert card["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (card["branch"], card["step"], card["layout"], card["dtype"]) == ("target", 10, "internimage", "float32")
    assert card["backbone"]["arch"]["channels"] == 16 and card["recipe"]["name"] == "tiny"
    assert card["data"] == "0" * 64 and set(card["licence"]) == {"first", "second", "labelled"}
    state = torch.load(file, weights_only=True)["model"]
    assert card["tensors"] == len(state) and card["parameters"] == sum(x.numel() for x in state.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.pth", "file.pth.json"]


def test_a_checkpoint_of_any_number_of_ranks_gives_the_same_file(runs: Runs, tmp_path: Path) -> None:
    written.write(tmp_path / "alone", written.VIT, world=1)
    one, _ = export(tmp_path / "alone", to="safetensors", out=tmp_path / "one.safetensors")
    two = runs.export("vit", "safetensors", tmp_path)
    assert one.read_bytes() == two.read_bytes()
