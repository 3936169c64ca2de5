"""From a recipe to this rank's stream of batches: sources, the mixture's order (new or frozen), the loader."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from m3i_large import checkpoint
from m3i_large.data.config import DataConfig
from m3i_large.data.demo import build_demo_data
from m3i_large.data.loader import Loader
from m3i_large.data.mixture import Mixture
from m3i_large.data.producer import BadSample, LoaderJob
from m3i_large.data.source_config import Nominal
from m3i_large.data.sources import Source, manifest_hash, open_sources
from m3i_large.data.views import MaskSpec
from m3i_large.errors import UserError
from m3i_large.metrics import append_row
from m3i_large.parallel.comm import Rank, gather_objects
from m3i_large.recipe import Recipe
from m3i_large.run import Run

# A chunk of this many images keeps a GPU busy with a ViT-B/16 at 224 pixels; the derived size stays below it.
CHUNK = 64


def prepare_sources(recipe: Recipe, rank: Rank) -> list[Source]:
    """Opens the recipe's sources; the first rank builds the embedded data set and what indexes are missing before."""
    data, sources, mistake = recipe.data, [], ""
    if rank.is_first:
        try:
            if data.embedded:
                build_demo_data(Path(data.root))
            sources = _open(data)
        except UserError as error:
            mistake = str(error)
    # Every rank ends with the first one's message, rather than with the loss of it.
    if mistake := gather_objects(mistake, rank)[0]:
        raise UserError(mistake)
    return sources if rank.is_first else _open(data)


def _open(data: DataConfig) -> list[Source]:
    return open_sources(data.sources, data.root, index=data.index, retry_s=data.retry_s)


def plan_mixture(recipe: Recipe, sizes: Sequence[tuple[int, float]]) -> Mixture:
    """The sample order of a new run, from the recipe and the data alone (never from the number of ranks).

    Args:
        sizes: samples, and mean bytes of a sample, of each source.
    """
    return Mixture.plan(
        recipe.train.seed,
        sources=[
            (c.name, samples, c.exact_repeats, mean_bytes, c.quota)
            for c, (samples, mean_bytes) in zip(recipe.data.sources, sizes, strict=True)
        ],
        global_batch=recipe.train.global_batch,
        lanes=recipe.data.lanes,
        accumulation=recipe.train.accumulation,
    )


def nominal_sizes(recipe: Recipe) -> list[Nominal]:
    """Sizes of the recipe's sources as published; UserError where one has none."""
    sizes = []
    for source in recipe.data.sources:
        if source.nominal is None:
            raise UserError(
                f"data.sources.{source.name}.nominal: is missing; needed: the source's size, "
                "{samples: ..., shards: ..., mean_bytes: ...}"
            )
        sizes.append(source.nominal)
    return sizes


def restore_mixture(saved: checkpoint.Checkpoint, sources: list[Source], recipe: Recipe) -> Mixture:
    """The frozen sample order of a checkpoint; refuses other data.

    A run of its own that starts from it may have another batch, other lanes or shares: then every source goes on where
    it is, in those.
    """
    sampler = saved.manifest["sampler"]
    if sampler["data"] != manifest_hash(sources):
        raise UserError(f"data: the shards differ from those {saved.directory} was trained on; needed: the same data")
    frozen = Mixture.from_state(sampler["layout"])
    if _batches(saved.manifest["recipe"]) == _batches(recipe.to_dict()):
        return frozen
    return frozen.continued(saved.step, plan_mixture(recipe, [(s.num_samples, s.mean_bytes) for s in sources]))


def _batches(recipe: dict[str, Any]) -> list[Any]:
    """What of a recipe decides how sources are dealt into batches."""
    train, data = recipe["train"], recipe["data"]
    shares = [(source["name"], str(source["repeats"]), source["quota"]) for source in data["sources"]]
    return [train["global_batch"], train["contrast_batch"], data["lanes"], shares]


def check_world(mixture: Mixture, world: int) -> None:
    """Refuses a number of ranks that would change a micro-step's contents."""
    if world not in (valid := mixture.valid_world_sizes()):
        raise UserError(
            f"ranks: got {world}; needed: one of {', '.join(map(str, valid))} "
            f"(ranks x accumulation must divide {mixture.lanes} lanes)"
        )


def chunk_rows(recipe: Recipe, *, slots: int, world: int) -> int | None:
    """Rows of a chunk on each of `world` ranks; None where the contrast is direct.

    As `train.chunk` says, else the largest possible size up to 64, else the smallest. Possible is what divides a rank's
    rows and, in a mix, holds whole blocks of mixing partners (`objective.mix.block`, else a lane's `slots`).

    Raises:
        UserError: train.chunk is not possible.
    """
    train, given = recipe.train, recipe.objective
    if train.contrast == "direct":
        return None
    num_rows = train.micro_batch_at(world)
    block = (given.mix.block or slots) if given.input.mask == "mix" else 1
    possible = [rows for rows in range(block, num_rows + 1, block) if num_rows % rows == 0]
    if train.chunk is None:
        return max((rows for rows in possible if rows <= CHUNK), default=possible[0])
    if train.chunk not in possible:
        raise UserError(
            f"train.chunk: got {train.chunk}; needed: one of {', '.join(map(str, possible))} (it divides a rank's "
            f"{num_rows} rows and holds whole mix blocks of {block}), or none, to have it derived"
        )
    return train.chunk


def make_loader(
    recipe: Recipe, mixture: Mixture, sources: list[Source], rank: Rank, run: Run, *, start_step: int = 0
) -> Loader:
    """The stream of this rank's batches from `start_step` on; unreadable samples go into the run's quarantine.jsonl."""
    shown = recipe.objective.input
    job = LoaderJob(
        config=recipe.data,
        mixture=mixture,
        sources=sources,
        context_length=recipe.text.context_length,
        seed=recipe.train.seed,
        mask=MaskSpec(
            cells=recipe.data.image_size // shown.patch,
            ratio=shown.ratio,
            blockwise=shown.mask == "block",
            mix=shown.mask == "mix",
            mix_block=recipe.objective.mix.block,
        ),
        rank=rank.rank,
        world=rank.world,
        accumulation=recipe.train.accumulation,
    )
    pinned = rank.device.type == "cuda"
    return Loader(job, start_step=start_step, on_bad=partial(_quarantine, run), pinned=pinned)


def _quarantine(run: Run, bad: BadSample) -> None:
    """Notes a sample that could not be used and was replaced; any rank."""
    append_row(run.directory / "quarantine.jsonl", {**asdict(bad), "attempt": run.attempt})
