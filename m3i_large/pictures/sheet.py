"""A sheet of pictures with words: what training writes, the report shows, and TensorBoard and wandb are given."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np

GAP = 2  # pixels between the cells of an image
QUALITY = 90
MARKS = {True: (46, 160, 67), False: (208, 85, 0)}  # RGB of the frame of what is right and of what is wrong


@dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        pixels_HWC: uint8 RGB.
        note: what it shows.
        right: whether it is what was asked for; None where nothing was.
    """

    pixels_HWC: np.ndarray
    note: str
    right: bool | None = None


@dataclass(frozen=True)
class Strip:
    """Cells that belong together, and what they have in common."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sheet:
    """Strips below each other.

    Attributes:
        name: of files and of tags, as `retrieval`.
        title: for people.
        about: what is to be seen, in a sentence or two.
    """

    name: str
    title: str
    about: str
    strips: tuple[Strip, ...]

    @property
    def caption(self) -> str:
        """Everything that the image itself does not say, as text."""
        lines = [f"{strip.label}: {' | '.join(cell.note for cell in strip.cells)}" for strip in self.strips]
        return "\n".join([self.about, *lines])

    def image(self) -> np.ndarray:
        """All cells as one picture, a strip a row; what is right has a green frame, what is wrong an orange one."""
        columns = max(len(strip.cells) for strip in self.strips)
        side = max(max(cell.pixels_HWC.shape[:2]) for strip in self.strips for cell in strip.cells)
        step = side + 2 * GAP
        picture = np.full((step * len(self.strips), step * columns, 3), 255, np.uint8)
        for (top, left), cell in self._places(step):
            if cell.right is not None:
                picture[top : top + step, left : left + step] = MARKS[cell.right]
            height, width = cell.pixels_HWC.shape[:2]
            picture[top + GAP : top + GAP + height, left + GAP : left + GAP + width] = cell.pixels_HWC
        return picture

    def _places(self, step: int) -> Iterator[tuple[tuple[int, int], Cell]]:
        for row, strip in zip(count(0, step), self.strips):
            for column, cell in zip(count(0, step), strip.cells):
                yield (row, column), cell

    def save(self, directory: Path) -> None:
        """Writes `<name>.webp` and `<name>.json`; OSError where the disk does not take them."""
        picture = self.image()
        side = picture.shape[0] // len(self.strips)
        sizes = [[list(cell.pixels_HWC.shape[:2]) for cell in strip.cells] for strip in self.strips]
        words: dict[str, Any] = {"title": self.title, "about": self.about, "cell": side, "strips": []}
        for strip, shapes in zip(self.strips, sizes, strict=True):
            cells = [
                {"note": cell.note, "right": cell.right, "size": shape}
                for cell, shape in zip(strip.cells, shapes, strict=True)
            ]
            words["strips"].append({"label": strip.label, "cells": cells})
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.name}.webp").write_bytes(webp(picture))
        (directory / f"{self.name}.json").write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, name: str) -> "Sheet | None":
        """Reads what `save` wrote; None where it is not there, or cut by a crash."""
        try:
            words = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
            picture, step = read_picture(directory / f"{name}.webp"), words["cell"]
        except (OSError, ValueError):
            return None
        strips = []
        for row, strip in enumerate(words["strips"]):
            cells = []
            for column, cell in enumerate(strip["cells"]):
                (height, width), top, left = cell["size"], row * step + GAP, column * step + GAP
                cells.append(Cell(picture[top : top + height, left : left + width], cell["note"], cell["right"]))
            strips.append(Strip(strip["label"], tuple(cells)))
        return cls(name, words["title"], words["about"], tuple(strips))


def webp(pixels_HWC: np.ndarray, *, quality: int = QUALITY) -> bytes:
    """RGB pixels as a WebP file."""
    return cv2.imencode(".webp", pixels_HWC[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()


def read_picture(path: Path) -> np.ndarray:
    """A picture's RGB pixels; ValueError where it is none."""
    return decoded(path.read_bytes())


def decoded(data: bytes) -> np.ndarray:
    """RGB pixels of an encoded picture; ValueError where it is none."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise ValueError("got bytes that are no picture")
    return np.ascontiguousarray(image[..., ::-1])
