"""Evaluations: a perfect model gets everything, the figures of a real run are complete, wrong input is one line."""

from pathlib import Path

import pytest
import torch
from tiny import SHAPES, picture, recipe, write_data

from m3i_large.build import build_objective
from m3i_large.errors import UserError
from m3i_large.evaluate import KINDS, evaluate
from m3i_large.evaluate.features import Features, Pictures, Samples, encode
from m3i_large.evaluate.load import Encoder, load_trained
from m3i_large.recipe import validate


def samples(captions: list[str], styles: list[str], labels: list[int]) -> Samples:
    meta = [{"style": s, "concept": c} for s, c in zip(styles, captions, strict=True)]
    return Samples(captions, torch.tensor(labels), meta)


def one_hot(keys: list) -> torch.Tensor:
    names = sorted(set(keys))
    return torch.eye(len(names))[[names.index(k) for k in keys]]


NAMES = ["cat", "dog", "sun", "cat"] * 2
STYLES = ["a"] * 4 + ["b"] * 4
LABELS = [0, 0, 1, 0, 2, 2, 0, 0]


def test_a_perfect_model_gets_everything() -> None:
    s = samples(NAMES, STYLES, LABELS)
    f = Features(one_hot(NAMES), one_hot(NAMES), one_hot(NAMES), one_hot(NAMES), torch.eye(3)[LABELS])
    for kind, evaluation in KINDS.items():
        values, chance = evaluation.values(s, f), evaluation.chance(s)
        assert values.keys() == chance.keys() and set(values.values()) == {1.0}, kind
        assert all(0 < c <= 1 for c in chance.values())
    assert KINDS["categories"].chance(s)["top1"] == 5 / 8 and KINDS["zeroshot"].chance(s)["top1"] == pytest.approx(
        1 / 3
    )
    assert KINDS["retrieval"].chance(s)["text_to_image/R@1"] == pytest.approx((0.5 + 0.25 + 0.25 + 0.5) / 4)


def test_a_model_that_confuses_two_names_loses_exactly_those() -> None:
    s = samples(["cat", "dog", "sun"] * 2, ["a"] * 3 + ["b"] * 3, [0, 1, 1, 0, 1, 1])
    text, image = torch.eye(3).repeat(2, 1), torch.eye(3)[[1, 0, 2]].repeat(2, 1)
    f = Features(image, image, image, text, torch.eye(2)[[0, 0, 1, 0, 0, 1]])
    assert KINDS["retrieval"].values(s, f)["text_to_image/R@1"] == pytest.approx(1 / 3)
    assert KINDS["zeroshot"].values(s, f)["top1"] == pytest.approx(1 / 3)
    assert KINDS["styles"].values(s, f)["style_to_style/R@1"] == 1.0
    found = KINDS["categories"].values(s, f)
    assert found["top1"] == pytest.approx(4 / 6) and found["mean_per_class"] == pytest.approx((1 + 0.5) / 2)


def test_missing_heads_and_styles_are_said() -> None:
    s = samples(["cat", "dog"], ["a", "a"], [0, 1])
    with pytest.raises(UserError, match="no text term"):
        KINDS["retrieval"].values(s, Features(torch.eye(2), torch.eye(2)))
    with pytest.raises(UserError, match="no category term"):
        KINDS["categories"].values(s, Features(torch.eye(2), torch.eye(2)))
    with pytest.raises(UserError, match="two styles"):
        KINDS["styles"].values(s, Features(torch.eye(2), torch.eye(2)))


def test_pictures_are_read_whole_and_encoded_as_the_student_does(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", samples=12)
    resolved = validate(recipe(data))
    objective = build_objective(resolved).eval()
    pixels = {"mean": resolved.data.mean, "std": resolved.data.std, "device": torch.device("cpu"), "image_size": 32}
    encoder = Encoder(backbone=objective.student, objective=objective, recipe=resolved, **pixels)
    labelled, _ = encode([encoder], Pictures(data, "image_category", image_size=32))
    assert len(labelled) == 12 and labelled.labels_N.tolist() == [i % 12 % 3 for i in range(12)]
    assert not labelled.captions
    pictures = Pictures(data, "image_text", image_size=32)
    named, (features,) = encode([encoder], pictures)
    assert len(named) == 24 and named.captions[0] == "a red disc number 0"
    mean, std = torch.tensor(resolved.data.mean), torch.tensor(resolved.data.std)
    ((_, pixels_NHWC, raws), *_) = pictures.chunks(4)
    assert [raw.text for raw in raws] == named.captions[:4]
    image = ((pixels_NHWC[3:4] / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = objective.pool(objective.student.tokens(image))
    torch.testing.assert_close(features.pooled_NE[3:4], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.text_NF.norm(dim=-1), torch.ones(24))
    assert features.logit_NC.shape == (24, 3)
    assert picture("red", SHAPES[0], 0).shape == (40, 48, 3)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="kind 'retreival'; needed: one of retrieval"):
        evaluate(["retreival"], tmp_path, data=tmp_path)
    with pytest.raises(UserError, match="a run directory with a checkpoint"):
        evaluate(["styles"], tmp_path, data=tmp_path)
    with pytest.raises(UserError, match=r"no \.tar shard with \.txt"):
        Pictures(tmp_path / "empty", "image_text", image_size=32)
    with pytest.raises(UserError, match="is no directory"):
        Pictures(tmp_path / "none", "image_text", image_size=32)
    with pytest.raises(UserError, match="branch: got 'teacher'"):
        load_trained(tmp_path, branch="teacher")
