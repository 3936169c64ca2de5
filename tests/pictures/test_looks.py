"""What is kept of a look at the album, against the evaluation's own encoding and against numpy."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import recipe as tiny_recipe
from tiny import write_data

from m3i_large.build import build_objective
from m3i_large.data.sources import open_sources
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.evaluate.features import Pictures, encode
from m3i_large.evaluate.load import Encoder
from m3i_large.pictures import looks as look_module
from m3i_large.pictures.album import Album
from m3i_large.pictures.looks import Look, aligned, look, principal_components
from m3i_large.pictures.sheets import across_styles, album_sheets, attention, by_picture, by_text, chosen, features
from m3i_large.recipe import Recipe, validate

CPU = torch.device("cpu")


def run_by(objective: Any, *inputs: Any, run: Any) -> Any:
    return objective(*inputs, run=run)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Any, Album]:
    data = write_data(tmp_path_factory.mktemp("look") / "data", samples=40)
    recipe = validate(tiny_recipe(data))
    sources = open_sources(recipe.data.sources, recipe.data.root)
    album = Album.read(sources, image_size=32, held_out=False, size=60)
    assert album is not None
    return recipe, data, build_objective(recipe).eval(), album


def test_an_album_is_spread_over_its_sources(shown: tuple, tmp_path: Path) -> None:
    _, _, _, album = shown
    assert len(album) == 60 and album.pixels_NHWC.shape == (60, 32, 32, 3)
    assert [item.source for item in album.items] == ["first"] * 20 + ["second"] * 20 + ["labelled"] * 20
    keys = [item.key for item in album.items[:20]]
    assert keys[0] == "first00000" and keys[-1] == "first00039" and len(set(keys)) == 20
    assert album.items[0].text.startswith("a red disc") and album.items[-1].category is not None
    album.save(tmp_path)
    again = Album.load(tmp_path)
    assert again is not None and again.items == album.items and not again.held_out
    assert np.abs(again.pixels_NHWC.astype(int) - album.pixels_NHWC).mean() < 3, "twice through a lossy format"
    assert Album.load(tmp_path / "none") is None


def test_vectors_are_those_of_the_evaluation(shown: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data, objective, album = shown
    monkeypatch.setattr(look_module, "CHUNK", 7)  # the last chunk is short
    tokenizer = Tokenizer(context_length=recipe.text.context_length)
    seen = look(partial(run_by, objective), album, tokenizer, device=CPU)
    encoder = Encoder(
        backbone=objective.student, image_size=32, mean=recipe.data.mean, std=recipe.data.std, device=CPU,
        objective=objective, recipe=recipe,
    )  # fmt: skip
    pictures = Pictures(data, "image_text", image_size=32)
    samples, (found,) = encode([encoder], pictures)  # type: ignore[misc]
    place = {caption: i for i, caption in enumerate(samples.captions)}
    texts = [i for i, item in enumerate(album.items) if item.source == "first"]
    wanted = [place[album.items[i].text] for i in texts]
    assert found.image_NF is not None and found.text_NF is not None and seen.text_NF is not None
    cosine = (seen.text_NF[texts].astype(np.float32) * found.text_NF[wanted].numpy()).sum(1)
    np.testing.assert_allclose(cosine, 1, atol=2e-3)
    # Pixels went through a lossy format, so pictures are nearly those of the evaluation, and nearest to their own.
    assert seen.image_NF is not None
    near = seen.image_NF[texts].astype(np.float32) @ found.image_NF[wanted].numpy().T
    assert (np.diag(near) > 0.98).all()


def test_attention_and_components_are_those_of_the_tokens(shown: tuple) -> None:
    recipe, _, objective, album = shown
    seen = look(partial(run_by, objective), album, Tokenizer(context_length=16), device=CPU)
    assert seen.places.tolist() == [0, 8, 17, 25, 34, 42, 51, 59] and seen.pca_KGG3.shape == (8, 4, 4, 3)
    assert seen.attention_KGG is not None
    np.testing.assert_allclose(seen.attention_KGG.sum((1, 2)), 1, atol=1e-3)
    pixels = torch.from_numpy(album.pixels_NHWC[seen.places]).float() / 255
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    with torch.no_grad():
        token_KLD = objective.student.tokens(((pixels - mean) / std).permute(0, 3, 1, 2))
    flat = token_KLD.flatten(0, 1).double().numpy()
    flat = flat - flat.mean(0)
    values, basis = np.linalg.eigh(flat.T @ flat)
    for number in range(3):
        mine = seen.pca_KGG3[..., number].reshape(-1).astype(np.float64)
        theirs = flat @ basis[:, np.argsort(values)[::-1][number]]
        inside = (mine > 0.01) & (mine < 0.99)  # what was not cut at the darkest and brightest
        assert abs(np.corrcoef(mine[inside], theirs[inside])[0, 1]) > 0.999


def test_components_of_what_does_not_vary_are_finite() -> None:
    assert np.isfinite(principal_components(torch.ones(2, 9, 5))).all()
    assert principal_components(torch.rand(2, 9, 2)).shape == (2, 9, 3)


def test_colours_keep_their_meaning() -> None:
    before = np.random.default_rng(0).random((3, 4, 4, 3)).astype(np.float16)
    turned = np.stack([1 - before[..., 2], before[..., 0], 1 - before[..., 1]], -1)
    np.testing.assert_allclose(aligned(turned, before), before, atol=2e-3)
    assert aligned(turned, None) is turned and aligned(turned, before[:2]) is turned


def test_looks_survive_the_disk_and_a_cut_one_is_none(shown: tuple, tmp_path: Path) -> None:
    _, _, objective, album = shown
    seen = look(partial(run_by, objective), album, Tokenizer(context_length=16), device=CPU)
    seen.save(tmp_path)
    again = Look.load(tmp_path)
    assert again is not None
    for mine, theirs in zip(vars(again).values(), vars(seen).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    data = (tmp_path / "look.npz").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "look.npz").write_bytes(data[:size])
        assert Look.load(tmp_path) is None, size


def made_up(album: Album) -> Look:
    """Every picture's vector is one of its own, nearly; texts lie where the next picture is."""
    eye = np.eye(len(album), dtype=np.float16)
    near = eye + 0.5 * np.roll(eye, 1, 1)
    maps = np.full((2, 4, 4), 1 / 16, np.float16)
    return Look(np.array([0, 5]), np.zeros((2, 4, 4, 3), np.float16), maps, near, eye, np.roll(eye, 1, 1))


def test_searches_show_the_nearest_first_and_say_what_is_right(shown: tuple) -> None:
    _, _, _, album = shown
    seen = made_up(album)
    text = by_text(album, seen, 3)
    assert text is not None and len(text.strips) == 8
    for strip in text.strips:
        place = next(i for i, item in enumerate(album.items) if f"“{item.text}”" == strip.label)
        following = (place + 1) % len(album)
        assert strip.cells[0].note == f"{album.items[following].label} 1.00"
        assert (strip.cells[0].pixels_HWC == album.pixels_NHWC[following]).all()
        assert strip.cells[0].right == (album.items[following].text == album.items[place].text)
    for strip in by_picture(album, seen, 3).strips:
        assert strip.cells[0].note == "asked for" and strip.cells[1].note.endswith("0.50")
    styles = across_styles(album, seen, 3)
    assert styles is not None and {s.label.split(", in ")[1] for s in styles.strips} == {"labelled", "second"}
    for strip in styles.strips:
        asked, other = (
            next(i for i in album.items if strip.label.startswith(f"{i.label}, in ")),
            strip.label.split(", in ")[1],
        )
        assert strip.cells[0].note == "asked for, first" and len(strip.cells) == 6
        for cell in strip.cells[1:]:
            shown_items = [i for i in album.items if i.style == other and cell.note.startswith(f"{i.label} ")]
            assert shown_items and cell.right in {i.concept == asked.concept for i in shown_items}


def test_an_album_of_one_style_and_a_network_without_texts_have_fewer_sheets(shown: tuple) -> None:
    _, _, _, album = shown
    bare = replace(made_up(album), attention_KGG=None, image_NF=None, text_NF=None)
    plain = replace(album, items=tuple(replace(item, style="") for item in album.items))
    assert [sheet.name for sheet in album_sheets(plain, {4: bare})] == ["features", "neighbours"]
    assert attention(album, bare, 1) is None and by_text(album, bare, 1) is None and album_sheets(album, {}) == []


def test_of_many_looks_the_first_and_last_and_early_ones_are_shown(shown: tuple) -> None:
    _, _, _, album = shown
    assert chosen([0, 5]) == [0, 5] and chosen(list(range(0, 1001, 10))) == [0, 40, 160, 360, 640, 1000]
    sheet = features(album, {step: made_up(album) for step in range(0, 100, 5)})
    notes = [cell.note for cell in sheet.strips[0].cells]
    assert notes[:2] == ["picture", "step 0"] and notes[-1] == "step 95" and len(notes) == 7
