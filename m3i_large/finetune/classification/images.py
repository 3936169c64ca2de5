"""Labelled images: folders of classes, or shards."""

from collections.abc import Sequence
from pathlib import Path

from m3i_large.data.manifest import IndexDirectory
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import Source
from m3i_large.data.storage import Storage
from m3i_large.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Folders:
    """<directory>/<class>/<image>; classes are numbered in the order of their names, as torchvision does.

    Attributes:
        classes: names.

    Raises:
        UserError: no such directory, no class, or a class without an image.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"--data: got {directory}, which is no directory; needed: one with a directory a class")
        self.classes = sorted(path.name for path in directory.iterdir() if path.is_dir())
        if not self.classes:
            raise UserError(f"--data: got {directory}, which has no directories; needed: one for each class")
        self._found: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            own = sorted(p for p in (directory / name).rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not own:
                raise UserError(f"--data: {directory / name} has no image; needed: one of {', '.join(EXTENSIONS)}")
            self._found += [(path, label) for path in own]

    def __len__(self) -> int:
        return len(self._found)

    def label(self, index: int) -> int:
        """Class of an image."""
        return self._found[index][1]

    def name(self, index: int) -> str:
        """What an image is called in results."""
        path = self._found[index][0]
        return f"{path.parent.name}/{path.name}"

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its class. ValueError where the file cannot be read."""
        path, label = self._found[index]
        try:
            return path.read_bytes(), label
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None


class Shards:
    """Samples of .tar shards with a `.cls`.

    Attributes:
        classes: their numbers, as names.

    Raises:
        UserError: no shard fits the pattern, no sample has a class, or `num_classes` is not set.
    """

    def __init__(self, root: Path, pattern: str, *, name: str, num_classes: int | None) -> None:
        if num_classes is None:
            raise UserError("task.data.num_classes: not set; needed: the number of classes of the shards")
        config = SourceConfig(name=name, kind="image_category", shards=[pattern])
        self._source = Source.open(config, Storage(root), IndexDirectory(root))
        self.classes = [str(number) for number in range(num_classes)]

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """What an image is called in results."""
        return str(index)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its class. ValueError where the sample is broken or its class out of range."""
        sample = self._source.read(index)
        assert sample.category is not None, "of an image_category source"
        if not 0 <= sample.category < len(self.classes):
            raise ValueError(
                f"sample {sample.key} of {sample.shard} has class {sample.category}; needed: below {len(self.classes)}"
            )
        return sample.image, sample.category


def open_images(data: Path, where: str, *, name: str, num_classes: int | None) -> Folders | Shards:
    """The images of a split, see ClassificationDataConfig; `name` is that of the shards' index."""
    if where.endswith(".tar"):
        return Shards(data, where, name=name, num_classes=num_classes)
    return Folders(data / where)


def same_classes(train: Sequence[str], evaluated: Sequence[str]) -> None:
    """UserError where the splits have other classes."""
    if odd := sorted(set(train) ^ set(evaluated)):
        raise UserError(f"--data: the splits differ in class {odd[0]}; needed: the same classes in both")
