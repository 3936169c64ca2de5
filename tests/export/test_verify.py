"""What must not pass: every way in which an exported file can be wrong, for every layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import written
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3i_large.build import build_objective
from m3i_large.errors import UserError
from m3i_large.export import LAYOUTS, export, verify
from m3i_large.export.files import card_path, tensor_file

KINDS = {"vit": written.VIT, "internimage": written.HUGE}
PAIRS = [(layout.name, kind) for layout in LAYOUTS.values() for kind in layout.names]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("exports")
    for kind, parts in KINDS.items():
        written.write(root / kind, parts)
    return {
        (layout, kind): export(root / kind, to=layout, out=root / f"{kind}_{layout}{LAYOUTS[layout].suffix}")[0]
        for layout, kind in PAIRS
    }


def rewritten(source: Path, layout: str, change: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> Path:
    """A copy with other tensors and a card that agrees with it: only the content is wrong."""
    from m3i_large.checkpoint.reader import sha256

    copy = tmp_path / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
    file, wrapper = tensor_file(copy), LAYOUTS[layout].wrapper
    content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    tensors = dict(content[wrapper] if wrapper else content)
    change(tensors)
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save({wrapper: tensors} if wrapper else tensors, file)
    card = json.loads(card_path(source).read_text()) | {"sha256": sha256(file)}
    card_path(copy).write_text(json.dumps(card))
    return copy


def a_matrix(tensors: dict[str, Tensor]) -> str:
    """Some weight of the student's backbone that is a matrix."""
    return next(
        k for k, x in tensors.items() if x.dim() == 2 and "mm_" not in k and "head" not in k and "clip" not in k
    )


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[a_matrix(tensors)]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["optimizer.state"] = torch.ones(2)


def reshape(tensors: dict[str, Tensor]) -> None:
    name = a_matrix(tensors)
    tensors[name] = tensors[name][1:].clone()


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors[a_matrix(tensors)][0, 0] = float("nan")


def overflow(tensors: dict[str, Tensor]) -> None:
    tensors[a_matrix(tensors)][0, 0] = float("inf")


WRONG = {drop: "missing, first", add: "unexpected, first", reshape: "another shape", spoil: "NaN", overflow: "infinity"}


@pytest.mark.parametrize(("layout", "kind"), PAIRS)
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_wrong_tensor_is_named(
    exported: dict[tuple[str, str], Path], layout: str, kind: str, change: Callable[..., None], tmp_path: Path
) -> None:
    verify(exported[layout, kind], layout=layout)
    wrong = rewritten(exported[layout, kind], layout, change, tmp_path)
    with pytest.raises(UserError, match=WRONG[change]) as told:
        verify(wrong, layout=layout)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["random", "constant"])
def test_a_tensor_that_was_never_trained_is_named(
    exported: dict[tuple[str, str], Path], kind: str, which: str, tmp_path: Path
) -> None:
    recipe = written.recipe_of(KINDS[kind])
    begun: Any = build_objective(recipe).student.state_dict()
    name = {
        ("vit", "random"): "blocks.1.attn.qkv.weight",
        ("vit", "constant"): "norm.weight",
        ("internimage", "random"): "levels.2.blocks.1.mlp.fc1.weight",
        ("internimage", "constant"): "levels.2.post_norms.0.0.weight",
    }[kind, which]

    def back(tensors: dict[str, Tensor]) -> None:
        tensors[name] = begun[name].clone()

    wrong = rewritten(exported["safetensors", kind], "safetensors", back, tmp_path)
    with pytest.raises(UserError, match=f"{name} is as it was initialised"):
        verify(wrong, layout="safetensors")


def test_a_run_in_bf16_begins_at_rounded_weights(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    begun: Any = build_objective(written.recipe_of(written.VIT)).student.state_dict()

    def back(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.mlp.fc1.weight"] = begun["blocks.0.mlp.fc1.weight"].bfloat16().float()

    wrong = rewritten(exported["timm", "vit"], "timm", back, tmp_path)
    with pytest.raises(UserError, match="as it was initialised"):
        verify(wrong, layout="timm")


def test_the_average_in_m3is_layout_is_checked_too(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        del tensors["mm_dcnv3.levels.0.norm.0.weight"]

    with pytest.raises(UserError, match="mm_dcnv3: 1 missing"):
        verify(rewritten(exported["m3i", "internimage"], "m3i", cut, tmp_path), layout="m3i")

    def later(tensors: dict[str, Tensor]) -> None:
        tensors["mask_token"] = tensors.pop("mask_token")

    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="needed: mask_token"):
        verify(rewritten(exported["m3i", "internimage"], "m3i", later, tmp_path / "x"), layout="m3i")


def test_a_wrapper_that_nobody_opens_is_refused(exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """The field's silent failure: the right tensors under a key that the reader does not look at."""
    state = torch.load(exported["internimage", "internimage"], weights_only=True)["model"]
    torch.save({"module": state}, tmp_path / "file.pth")
    arch = dict(written.HUGE["backbone"]["arch"])
    with pytest.raises(UserError, match="needed: the tensors under 'model'"):
        verify(tmp_path / "file.pth", layout="internimage", name="internimage", arch=arch)
    torch.save({"model": state}, tmp_path / "right.pth")
    assert verify(tmp_path / "right.pth", layout="internimage", name="internimage", arch=arch).tensors == len(state)


def test_another_layout_a_changed_file_and_a_strange_card_are_refused(
    exported: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is of layout mae"):
        verify(exported["mae", "vit"], layout="detectron2")
    copy = tmp_path / "copy.pth"
    shutil.copy(exported["mae", "vit"], copy)
    shutil.copy(card_path(exported["mae", "vit"]), card_path(copy))
    bytes_of = bytearray(copy.read_bytes())
    bytes_of[len(bytes_of) // 2] ^= 1
    copy.write_bytes(bytes_of)
    with pytest.raises(UserError, match="its model card says"):
        verify(copy, layout="mae")
    card_path(copy).write_text("{}")
    with pytest.raises(UserError, match="none of ours"):
        verify(copy, layout="mae")


def test_a_foreign_object_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": {"cls_token": torch.ones(1, 1, 4), "trap": Trap()}}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="needed: tensors and plain values only"):
        verify(tmp_path / "file.pth", layout="mae")
    assert not (tmp_path / "sprung").exists()
