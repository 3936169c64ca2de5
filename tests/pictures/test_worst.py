"""The rows with the highest losses, against a sort of all of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ranks import run_ranks
from tiny import recipe as tiny_recipe
from tiny import write_data

from m3i_large.data.batch import Batch
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.parallel.comm import Rank
from m3i_large.pictures.sheet import decoded, webp
from m3i_large.pictures.worst import KEPT, Worst
from m3i_large.recipe import validate
from m3i_large.run import Run
from m3i_large.stream import make_loader, plan_mixture, prepare_sources

ALONE = Rank(0, 1, torch.device("cpu"))


def batches(root: Path, steps: int) -> tuple[list, list[Batch]]:
    recipe = validate(tiny_recipe(root / "data" if (root / "data").exists() else write_data(root / "data")))
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"threads": 0})})
    rank = ALONE
    sources = prepare_sources(recipe, rank)
    mixture = plan_mixture(recipe, [(s.num_samples, s.mean_bytes) for s in sources])
    with make_loader(recipe, mixture, sources, rank, Run(root, recipe, 0, None)) as stream:
        return sources, [next(stream) for _ in range(steps)]


def test_the_worst_are_those_furthest_above_their_own_batch(tmp_path: Path) -> None:
    sources, shown = batches(tmp_path, 6)
    draw, worst, rows = torch.Generator().manual_seed(0), Worst(sources, Tokenizer(context_length=16), ALONE), []
    for step, batch in enumerate(shown):
        loss_N = torch.rand(len(batch), generator=draw) + 100.0 / (step + 1)  # falls with time: that is not what counts
        loss_N[3] = torch.nan
        broken = torch.full_like(loss_N, torch.nan)
        worst.add(batch, {"loss": torch.tensor(1.0), "rows/text": loss_N, "rows/none": broken})
        valid = loss_N[~loss_N.isnan()].numpy()
        for row, loss in enumerate(loss_N.tolist()):
            if np.isfinite(loss):
                rows.append(((loss - valid.mean()) / valid.std(), step, row, loss))
    sheet = worst.sheet()
    assert sheet is not None and [strip.label for strip in sheet.strips] == ["text"] and "since step 0" in sheet.about
    cells = sheet.strips[0].cells
    assert len(cells) == KEPT
    for cell, (excess, step, row, loss) in zip(cells, sorted(rows, reverse=True)[:KEPT], strict=True):
        batch = shown[step]
        source = sources[int(batch.source_N[row])]
        sample = source.read(int(batch.id_N[row]))
        assert cell.note.startswith(f"loss {loss:.3g}, +{excess:.1f} sd; ") and f"step {step}" in cell.note
        assert f"{sample.key} in {sample.shard}" in cell.note
        what = f"“{sample.text}”" if sample.text else f"class {sample.category}"
        assert what.replace(" ", "") in cell.note.replace(" ", ""), "tokens are separated as the vocabulary has them"
        assert (cell.pixels_HWC == decoded(webp(batch.target_NHWC[row].numpy()))).all()
    assert worst.sheet() is None, "a sheet is of what came since the last one"


def test_a_substitute_is_called_one_and_pixels_are_a_copy(tmp_path: Path) -> None:
    sources, (batch, *_) = batches(tmp_path, 1)
    batch = replace(batch, substitute_N=torch.full_like(batch.substitute_N, 2))
    worst = Worst(sources, Tokenizer(context_length=16), ALONE)
    worst.add(batch, {"rows/intra": torch.arange(len(batch)).float()})
    before = batch.target_NHWC[-1].clone()
    batch.target_NHWC.zero_()  # the loader's memory is filled again
    sheet = worst.sheet()
    assert sheet is not None and "its substitute 2" in sheet.strips[0].cells[0].note
    assert (sheet.strips[0].cells[0].pixels_HWC == decoded(webp(before.numpy()))).all()


def test_too_few_rows_and_equal_ones_tell_nothing(tmp_path: Path) -> None:
    sources, (batch, *_) = batches(tmp_path, 1)
    worst = Worst(sources, Tokenizer(context_length=16), ALONE)
    few = torch.full((len(batch),), torch.nan)
    few[:5] = torch.arange(5.0)
    worst.add(batch, {"rows/a": few, "rows/b": torch.ones(len(batch)), "loss": torch.tensor(3.0)})
    worst.add(batch, {"loss": torch.tensor(3.0)})
    assert worst.sheet() is None


def rows_of(rank: Rank, root: Path) -> tuple[list[tuple], list[str]]:
    """Every row of this rank, (excess, loss, step), and what the sheet says of the rows it shows."""
    sources, shown = batches(root, 4)
    worst, rows = Worst(sources, Tokenizer(context_length=16), rank), []
    for step, batch in enumerate(shown):
        terms = {"rows/a": torch.rand(len(batch), generator=torch.Generator().manual_seed(10 * step + rank.rank))}
        if rank.rank == 1:  # a term of which the others had no row
            terms["rows/b"] = torch.arange(len(batch)).float()
        worst.add(batch, terms)
        loss_N = terms["rows/a"].numpy()
        rows += [((loss - loss_N.mean()) / loss_N.std(), loss, step) for loss in loss_N]
    sheet = worst.sheet()
    assert (sheet is None) == (rank.rank > 0) and worst.sheet() is None
    notes = {strip.label: [cell.note for cell in strip.cells] for strip in sheet.strips} if sheet else {}
    assert not sheet or (len(notes["b"]) == KEPT and "loss 15, +1.6 sd" in notes["b"][0])
    return rows, notes.get("a", [])


def test_the_worst_are_those_of_all_ranks(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    (ours, notes), (theirs, _), (others, _) = run_ranks(3, rows_of, tmp_path)
    wanted = sorted([*ours, *theirs, *others], reverse=True)[:KEPT]
    assert not set(wanted) <= set(ours) and len({excess for excess, *_ in wanted}) == KEPT
    for note, (excess, loss, step) in zip(notes, wanted, strict=True):
        assert note.startswith(f"loss {loss:.3g}, +{excess:.1f} sd; ") and note.endswith(f"; step {step}")
