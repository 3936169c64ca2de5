"""Sheets: what is written is what is read, and a damaged one is none."""

from pathlib import Path

import numpy as np

from m3i_large.pictures.sheet import GAP, MARKS, Cell, Sheet, Strip


def noise(seed: int, height: int = 24, width: int = 24) -> np.ndarray:
    """Smooth enough for a lossy format."""
    corners = np.random.default_rng(seed).integers(0, 255, (2, 2, 3)).astype(float)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    top, bottom = corners[0, 0] * (1 - x) + corners[0, 1] * x, corners[1, 0] * (1 - x) + corners[1, 1] * x
    return (top * (1 - y) + bottom * y).round().astype(np.uint8)


def sheet() -> Sheet:
    one = Strip(
        "first, “quoted”", (Cell(noise(0), "a"), Cell(noise(1), "b", right=True), Cell(noise(2), "c", right=False))
    )
    return Sheet("x", "Title", "About it.", (one, Strip("second", (Cell(noise(3, 12, 20), "d"),))))


def test_a_sheet_is_read_as_it_was_written(tmp_path: Path) -> None:
    sheet().save(tmp_path / "step_1")
    read = Sheet.load(tmp_path / "step_1", "x")
    assert read is not None and (read.title, read.about) == ("Title", "About it.")
    for mine, theirs in zip(read.strips, sheet().strips, strict=True):
        assert mine.label == theirs.label
        for a, b in zip(mine.cells, theirs.cells, strict=True):
            assert (a.note, a.right, a.pixels_HWC.shape) == (b.note, b.right, b.pixels_HWC.shape)
            assert np.abs(a.pixels_HWC.astype(int) - b.pixels_HWC).mean() < 8


def test_one_image_has_every_cell_in_its_place_and_frames_around_what_is_marked() -> None:
    image = sheet().image()
    step = 24 + 2 * GAP
    assert image.shape == (2 * step, 3 * step, 3)
    assert (image[step + GAP : step + GAP + 12, GAP : GAP + 20] == noise(3, 12, 20)).all()
    assert (image[0, step] == MARKS[True]).all() and (image[0, 2 * step] == MARKS[False]).all()
    assert (image[0, 0] == 255).all() and (image[step + GAP + 12 :, :step] == 255).all()


def test_words_go_along_where_there_is_no_page() -> None:
    assert sheet().caption == "About it.\nfirst, “quoted”: a | b | c\nsecond: d"


def test_what_a_crash_left_is_no_sheet(tmp_path: Path) -> None:
    assert Sheet.load(tmp_path, "x") is None
    sheet().save(tmp_path)
    whole = (tmp_path / "x.webp").read_bytes()
    (tmp_path / "x.webp").write_bytes(b"")
    assert Sheet.load(tmp_path, "x") is None
    (tmp_path / "x.webp").write_bytes(whole)
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text()[:-20])
    assert Sheet.load(tmp_path, "x") is None
