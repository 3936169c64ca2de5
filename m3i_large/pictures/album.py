"""The pictures by which a run is watched: the same ones from its first step to its last."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from m3i_large.data.decode import decode_rgb, whole_square
from m3i_large.data.sources import Source
from m3i_large.errors import OutageError
from m3i_large.metrics import write_json
from m3i_large.pictures.sheet import decoded, webp

SIZE = 192  # pictures; enough for a gallery, little beside a step
FILE = "album.json"


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is known of a picture.

    Attributes:
        source, shard, key: where it comes from.
        text, category: as in RawSample.
        style, concept: of its `.json`, "" where it has none.
    """

    source: str
    shard: str
    key: str
    text: str
    category: int | None
    style: str
    concept: str

    @property
    def label(self) -> str:
        """What a person calls it."""
        if self.text:
            return self.text
        return f"class {self.category}" if self.category is not None else self.key


@dataclass(frozen=True)
class Album:
    """Pictures (N, H, W, 3), uint8, whole and square, and what is known of them.

    Attributes:
        held_out: whether they are never trained on.
        credits: who made them, as the data says.
    """

    pixels_NHWC: np.ndarray
    items: tuple[Item, ...]
    held_out: bool
    credits: str = ""

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def read(
        cls, sources: Sequence[Source], *, image_size: int, held_out: bool, credits: str = "", size: int = SIZE
    ) -> "Album | None":
        """As many of each source, evenly spread over it; None where none can be read.

        Pictures that cannot be decoded are passed over, and an outage of the storage ends the reading: a run does not
        depend on its album.
        """
        pixels: list[np.ndarray] = []
        items: list[Item] = []
        share = max(1, size // len(sources))
        for source in sources:
            try:
                for number in np.linspace(0, len(source) - 1, min(share, len(source))).round().astype(int):
                    _add(source, int(number), image_size, pixels, items)
            except OutageError:
                continue
        return cls(np.stack(pixels), tuple(items), held_out, credits) if pixels else None

    def save(self, directory: Path) -> None:
        """Writes album.json, once; OSError where the disk does not take it."""
        if (directory / FILE).is_file():
            return
        directory.mkdir(parents=True, exist_ok=True)
        encoded = [base64.b64encode(webp(pixels)).decode() for pixels in self.pixels_NHWC]
        rows = [{**asdict(item), "webp": data} for item, data in zip(self.items, encoded, strict=True)]
        write_json(directory / FILE, {"held_out": self.held_out, "credits": self.credits, "pictures": rows})

    @classmethod
    def load(cls, directory: Path) -> "Album | None":
        """Reads what `save` wrote; None where there is none."""
        path = directory / FILE
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        pixels = np.stack([decoded(base64.b64decode(row.pop("webp"))) for row in values["pictures"]])
        items = tuple(Item(**row) for row in values["pictures"])
        return cls(pixels, items, values["held_out"], values["credits"])


def _add(source: Source, number: int, image_size: int, pixels: list[np.ndarray], items: list[Item]) -> None:
    try:
        raw = source.read(number, meta=True)
        square = whole_square(decode_rgb(raw.image), image_size)
    except ValueError:
        return
    pixels.append(decoded(webp(square)))  # as it is stored, so that a continued run sees the same
    meta = {name: str(raw.meta.get(name) or "") for name in ("style", "concept")}
    place = {"source": source.name, "shard": raw.shard, "key": raw.key}
    items.append(Item(text=raw.text or "", category=raw.category, **place, **meta))
