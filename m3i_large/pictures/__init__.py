"""The pictures of a run: what the student sees, what it makes of an album, what it finds hardest."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.data.sources import Source, open_sources
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.errors import UserError
from m3i_large.parallel.comm import Rank, from_first
from m3i_large.pictures.album import Album
from m3i_large.pictures.inputs import input_sheet
from m3i_large.pictures.looks import Look, aligned, look
from m3i_large.pictures.sheet import Sheet
from m3i_large.pictures.sheets import album_sheets, chosen, look_steps, looks_of, step_directory
from m3i_large.pictures.worst import Worst
from m3i_large.recipe import Recipe

__all__ = ["Album", "Pictures", "Sheet", "album_sheets", "chosen", "look_steps", "looks_of", "step_directory"]


class Pictures:
    """Writes the pictures of a run directory, every train.picture_every steps.

    A disk that takes none of them costs the pictures, never the run.

    Args:
        run: run directory.
        sources: of the recipe, opened.

    Raises:
        UserError: on every rank, where data.heldout is not there, or is trained on.
    """

    def __init__(self, recipe: Recipe, run: Path, sources: list[Source], rank: Rank) -> None:
        self._recipe, self._directory, self._rank = recipe, run / "pictures", rank
        self._tokenizer = Tokenizer(context_length=recipe.text.context_length)
        self._worst = Worst(sources, self._tokenizer, rank)
        self._sheets: list[Sheet] = []
        self._album: Album | None = None
        if not recipe.train.picture_every:
            return
        album, mistake = None, ""
        if rank.is_first:
            try:
                album = _album(recipe, self._directory, sources)
            except UserError as error:
                mistake = str(error).replace("data.sources.", "data.heldout.")
        self._album, mistake = from_first((album, mistake), rank)
        if mistake:
            raise UserError(mistake)

    def due(self, step: int) -> bool:
        """Whether pictures of the state after `step` updates, and of the batch that follows, are wanted."""
        every = self._recipe.train.picture_every
        return bool(every) and step % every == 0

    def inputs(self, batch: Batch, step: int) -> None:
        """Takes the first micro-batch of a step that is due; the first rank's."""
        if self._rank.is_first:
            self._save(input_sheet(batch, self._recipe, self._tokenizer), step)

    def losses(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        """Takes a micro-batch and what the objective returned of it."""
        if self._recipe.train.picture_every:
            self._worst.add(batch, losses)

    def look(self, engine: Callable[..., Any], step: int) -> None:
        """Shows the album to the student after `step` updates; every rank calls it."""
        if (worst := self._worst.sheet()) is not None:
            self._save(worst, step)
        if self._album is None:
            return
        seen = look(engine, self._album, self._tokenizer, device=self._rank.device)
        if self._rank.is_first:
            self._keep(self._album, seen, step)

    def take(self) -> list[Sheet]:
        """The sheets made since the last call, for TensorBoard and wandb."""
        taken, self._sheets = self._sheets, []
        return taken

    def _keep(self, album: Album, seen: Look, step: int) -> None:
        earlier = [s for s in look_steps(self._directory) if s < step]
        looks = looks_of(self._directory, {*chosen([*earlier, step]), *earlier[-1:]} - {step})
        before = looks[max(looks)].pca_KGG3 if looks else None
        seen = seen.replaced(pca_KGG3=aligned(seen.pca_KGG3, before))
        with suppress(OSError):
            album.save(self._directory)
            seen.save(step_directory(self._directory, step))
        self._sheets += album_sheets(album, looks | {step: seen})

    def _save(self, sheet: Sheet, step: int) -> None:
        with suppress(OSError):
            sheet.save(step_directory(self._directory, step))
        self._sheets.append(sheet)


def _album(recipe: Recipe, directory: Path, sources: list[Source]) -> Album | None:
    """The run's album; chosen at its first start, and kept in its directory."""
    if (album := Album.load(directory)) is not None:
        return album
    data, shown = recipe.data, sources
    if data.heldout:
        shown = open_sources(data.heldout, data.root, index=data.index, retry_s=data.retry_s)
        trained = {row.checksum: source for source in sources for row in source.shards}
        for source in shown:
            for row in source.shards:
                if row.checksum in trained:
                    where, other = f"data.heldout.{source.name}.shards", trained[row.checksum].name
                    raise UserError(f"{where}: {row.name} is also a shard of {other}; needed: shards not trained on")
    licences = Path(data.root) / "LICENSES.md"
    credits = licences.read_text(encoding="utf-8") if licences.is_file() else ""
    return Album.read(shown, image_size=data.image_size, held_out=bool(data.heldout), credits=credits)
