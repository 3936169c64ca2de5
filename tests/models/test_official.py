"""Official InternImage files: every way in which they are wrapped, and everything that must not load in silence."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from m3i_large.errors import UserError
from m3i_large.models import create_model
from m3i_large.models.official import load_official

NANO: dict[str, Any] = {"channels": 8, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "layer_scale": 0.1}


def nano(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = create_model("internimage", **(NANO | {"post_norm": True} | more))
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape))
    return model


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: x for key, x in state.items()}


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "model." + key.replace("gamma1", "layer_scale1").replace("gamma2", "layer_scale2"): x
        for key, x in state.items()
    }


OTHER = {"neck.convs.0.weight": torch.ones(1), "bbox_head.fc.bias": torch.ones(2)}
WRAPPED = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3, "optimizer": {"lr": 0.1}},
    "state_dict with backbone.": lambda s: {"meta": {"epoch": 1}, "state_dict": prefixed(s, "backbone.")},
    "module": lambda s: {"module": s, "global_steps": 9},
    "module. and backbone.": lambda s: prefixed(s, "module.backbone."),
    "a detector": lambda s: {"state_dict": prefixed(s, "backbone.") | OTHER},
    "Hugging Face": hugging_face,
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", None], ids=str)
def test_every_wrapping_loads_every_tensor(wrapping: str, suffix: str | None, tmp_path: Path) -> None:
    wanted = nano(1).state_dict()
    content, model, source = WRAPPED[wrapping](wanted), nano(2), tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        flat = next(
            (v for v in content.values() if isinstance(v, dict) and "optimizer" not in v and len(v) > 5), content
        )
        save_file({k: v.clone() for k, v in flat.items()}, source)
    elif suffix:
        torch.save(content, source)
    extra = load_official(model, str(source) if suffix else content)
    assert extra == (["bbox_head.fc.bias", "neck.convs.0.weight"] if wrapping == "a detector" else [])
    for key, x in model.state_dict().items():
        assert torch.equal(x, wanted[key]), key


def test_a_backbone_takes_a_classifiers_file_and_says_what_it_left() -> None:
    classifier = nano(1, num_classes=5).eval()
    backbone = nano(2).eval()
    extra = load_official(backbone, {"model": classifier.state_dict()})
    assert {key.split(".")[0] for key in extra} == {"conv_head", "head"}
    image = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), classifier(image), strict=True))


def test_nine_points_become_eight_for_a_model_without_the_middle_one() -> None:
    nine, eight = nano(1), nano(2, remove_center=True)
    load_official(eight, nine.state_dict())
    old, new = (m.levels[1].blocks[0].dcn for m in (nine, eight))
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(new.mask.weight.view(2, 8, -1), old.mask.weight.view(2, 9, -1)[:, kept])
    assert torch.equal(new.mask.bias.view(2, 8), old.mask.bias.view(2, 9)[:, kept])
    assert torch.equal(new.offset.weight.view(2, 8, 2, -1), old.offset.weight.view(2, 9, 2, -1)[:, kept])
    assert torch.equal(new.offset.bias.view(2, 8, 2), old.offset.bias.view(2, 9, 2)[:, kept])
    with pytest.raises(UserError, match=r"levels.0.blocks.0.dcn.offset.weight has shape \(16, 8\); needed: \(18, 8\)"):
        load_official(nano(), eight.state_dict())


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "levels.0.blocks.0.gamma1"),
            "1 missing, first levels.0.blocks.0.gamma1; needed: the mod",
        ),
        (lambda s: s | {"levels.0.surprise": torch.ones(1)}, "1 unexpected, first levels.0.surprise"),
        (
            lambda s: prefixed(s, "encoder."),
            "missing, first patch_embed.conv1.weight and .* unexpected, first encoder.l",
        ),
        (lambda s: s | {"patch_embed.conv1.bias": torch.ones(3)}, r"conv1.bias has shape \(3,\); needed: \(4,\)"),
        (lambda s: {"epoch": 3}, "missing, first patch_embed.conv1.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change: Any, message: str) -> None:
    model = nano(2)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_official(model, change(nano(1).state_dict()))
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


class Foreign:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_files_that_cannot_be_trusted_or_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    foreign, list_file, torn, text = (tmp_path / n for n in ("f.pth", "l.pth", "t.pth", "x.safetensors"))
    torch.save({"model": nano().state_dict(), "config": Foreign()}, foreign)
    torch.save([1, 2], list_file)
    torn.write_bytes(foreign.read_bytes()[:5000])
    text.write_text("no tensors here")
    for path, message in (
        (foreign, r"f.pth holds ([a-z_]+.)?print; needed: tensors and plain values only"),
        (list_file, "holds a list; needed: a mapping"),
        (torn, "t.pth cannot be read|t.pth is not a torch checkpoint"),
        (text, "is not a safetensors file"),
        (tmp_path / "none.pth", "does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_official(nano(), path)
        assert "\n" not in str(caught.value)
    assert "must not run" not in capsys.readouterr().out


def test_ordered_dicts_and_half_precision_files_load() -> None:
    model, half = nano(2), collections.OrderedDict((k, x.half()) for k, x in nano(1).state_dict().items())
    load_official(model, half)
    assert torch.equal(model.patch_embed.conv1.weight, half["patch_embed.conv1.weight"].float())
