"""Cached contrast: losses, signals and every parameter's gradient of a micro-batch, chunk by chunk, are the direct
step's; for every shipped recipe and for forms that none has, on one and two ranks."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_m3i_longhand import ROWS as ROW_FIELDS
from test_m3i_longhand import build as build_longhand
from test_m3i_longhand import in_double, longhand
from test_m3i_longhand import make_batch as longhand_batch
from torch import Tensor

from m3i_large.bench import random_batch
from m3i_large.build import build_objective, transformer_blocks
from m3i_large.data.batch import Batch
from m3i_large.errors import UserError
from m3i_large.micro_step import Cached, Direct
from m3i_large.objective import Objective
from m3i_large.objective.cached import chunks, couple, survey
from m3i_large.objective.totals import ROWS
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank
from m3i_large.parallel.engine import Engine, partition
from m3i_large.parallel.remat import rematerialize
from m3i_large.recipe import Recipe, load_recipe, recipe_names, validate
from m3i_large.stream import chunk_rows

N, BLOCK = 16, 4
VIT = {"name": "vit", "arch": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}}
CHANNELS = {"image_size": 32, "channels": 8, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8], "bridge_width": 32}
NORMS = {"res_post_norm": True, "level2_post_norm": [1], "center_feature_scale": True, "dw_kernel_size": 5}
INTERNIMAGE = {"name": "internimage", "arch": CHANNELS | NORMS}
GLOBAL = {"name": "whole", "target": "global", "view": "other"}
# Objectives that no recipe has.
FORMS: dict[str, dict[str, Any]] = {
    "everything": {
        "input": {"mask": "mix", "patch": 8},
        "terms": [{"name": "intra"}, {"name": "inter"}, GLOBAL, {"name": "category"}, {"name": "text", "weight": 0.5}],
    },
    "uneven_mix": {"input": {"mask": "mix", "patch": 8, "ratio": 0.25}},
    "negatives_of_the_rank": {
        "input": {"mask": "none", "view": "other"},
        "terms": [
            GLOBAL | {"posterior": {"kind": "boltzmann", "negatives": "local"}},
            {"name": "text", "posterior": {"kind": "boltzmann", "negatives": "local"}},
        ],
    },
    "shared_regression": {
        "input": {"mask": "random", "view": "other", "patch": 8, "fill": "token"},
        "terms": [
            GLOBAL | {"posterior": "gaussian", "encoder": "shared"},
            {"name": "inter", "encoder": "shared", "collapse": "stop_gradient"},
        ],
    },
}
CASES = [*((name, VIT, False) for name in [*recipe_names(), *FORMS])]
CASES += [("m3i", VIT, True), ("demo_internimage", INTERNIMAGE, True), ("everything", INTERNIMAGE, False)]


class Plain:
    """The engine's part in a micro-step without DeepSpeed: gradients add up in the parameters."""

    def __init__(self, module: Objective, *, accumulation: int = 1) -> None:
        self.module, self.accumulation, self.graphs = module, accumulation, 0

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        return self.module(*inputs, **settings)

    def backward(self, loss: Tensor, *, more: bool = False) -> None:
        before = {n: None if p.grad is None else p.grad.clone() for n, p in trained(self.module)}
        for _, p in trained(self.module):
            p.grad = None
        (loss / self.accumulation).backward()
        for name, p in trained(self.module):
            assert p.grad is not None, f"{name}: ZeRO-3 needs every parameter in every backward pass"
            p.grad = p.grad if before[name] is None else p.grad + before[name]
        self.graphs += 1


def trained(module: Objective) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]


def small(name: str, backbone: dict) -> Recipe:
    """A recipe's objective, or one of FORMS, on the smallest towers."""
    values = load_recipe("demo").to_dict()
    objective = FORMS[name] if name in FORMS else load_recipe(name, ["scale=demo"]).objective.model_dump()
    objective = copy.deepcopy(objective)
    objective["input"] |= {"patch": 16 if backbone is INTERNIMAGE else 8}
    values |= {"name": "small", "backbone": backbone, "objective": objective}
    values["text"] |= {"width": 32, "layers": 1, "heads": 2, "context_length": 16, "embed": 16}
    values["decoder"], values["pool"] = {"layers": 1, "heads": 2}, {"width": 32, "heads": 2}
    values["data"] |= {"image_size": 32}
    return validate(values)


def make_objective(recipe: Recipe, *, remat: bool = False, collectives: Any = None) -> Objective:
    objective = build_objective(recipe, collectives=collectives)
    with torch.no_grad():  # a target that differs from the student, as after some steps
        for tower in (objective.target, objective.target_pool):
            for p in tower.parameters() if tower is not None else ():
                p.mul_(0.9)
    if remat:
        rematerialize(transformer_blocks(objective, frozen=False))
    return objective


def make_batch(recipe: Recipe) -> Batch:
    """Mixed in blocks of 4; two equal captions; a row with neither text nor category; padded texts and categories."""
    batch = random_batch(recipe, N, seed=4)
    rows = torch.arange(N)
    mixed = recipe.objective.input.mask == "mix"
    partner = rows // BLOCK * BLOCK + (rows + 1) % BLOCK if mixed else rows
    valid = batch.text_valid_N.clone()
    valid[5] = False
    text = batch.text_NT.clone()
    text[9] = text[2]
    more = {"text_rows": 13, "category_rows": 6, "source_N": rows % len(recipe.data.sources)}
    return replace(batch, partner_N=partner, text_NT=text, text_valid_N=valid, **more)


def one_step(step: Any, batch: Batch, *, signals: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module = step.engine.module
    module.zero_grad()
    losses = step(batch, signals=signals)
    return {k: v.detach() for k, v in losses.items()}, {n: p.grad.clone() for n, p in trained(module)}


def assert_same(got: tuple[dict, dict], wanted: tuple[dict, dict], where: str) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.keys() == theirs.keys(), where
    largest = max(grad.abs().max().item() for grad in wanted[1].values())
    for name, grad in wanted[1].items():
        # Sums in another order: what cancels to nothing is nothing beside the largest gradient.
        atol = 1e-6 * largest
        torch.testing.assert_close(
            got[1][name], grad, rtol=2e-5, atol=atol, msg=lambda m, name=name: f"{where}, {name}: {m}"
        )
    for key, value in wanted[0].items():
        # An effective rank is the exponential of a sum over eigenvalues, most of which are rounding here.
        rtol = 1e-3 if key.endswith("rank") else 1e-4
        torch.testing.assert_close(
            got[0][key], value, rtol=rtol, atol=1e-6, equal_nan=True, msg=lambda m, key=key: f"{where}, {key}: {m}"
        )


@pytest.mark.parametrize(("name", "backbone", "remat"), CASES)
def test_a_micro_batch_in_chunks_has_the_direct_steps_losses_and_gradients(
    name: str, backbone: dict, remat: bool
) -> None:
    recipe = small(name, backbone)
    batch, objective = make_batch(recipe), make_objective(recipe, remat=remat)
    for signals in (False, True):
        wanted = one_step(Direct(Plain(objective, accumulation=3), accumulation=3), batch, signals=signals)
        for rows in (BLOCK, 2 * BLOCK, N):
            engine = Plain(objective, accumulation=3)
            got = one_step(Cached(engine, accumulation=3, rows=rows), batch, signals=signals)
            assert engine.graphs == N // rows
            assert_same(got, wanted, f"{name}, {rows} rows, signals {signals}")


def test_chunks_of_m3i_equal_the_equations() -> None:
    """Sample by sample in double precision, by the longhand test's code."""
    batch, o = longhand_batch(partner=[1, 2, 3, 0, 5, 6, 7, 4]), in_double(build_longhand())
    expected = longhand(o, batch)
    expected["total"].backward()
    wanted = {n: p.grad.clone() for n, p in trained(o)}
    losses, grads = one_step(Cached(Plain(o), accumulation=1, rows=4), batch, signals=True)
    for name in ("intra", "inter", "category", "text"):
        assert losses[f"loss/{name}"].item() == pytest.approx(expected[name].item(), rel=2e-5), name
    assert losses["loss"].item() == pytest.approx(expected["total"].item(), rel=2e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backbone", [VIT, INTERNIMAGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_passes_see_the_same_vectors_to_the_bit(backbone: dict, dtype: torch.dtype) -> None:
    recipe = small("everything", backbone)
    objective = build_objective(recipe, dtype=dtype)
    rematerialize(transformer_blocks(objective, frozen=False))
    batch = make_batch(recipe)
    parts, texts = chunks(objective, batch, rows=BLOCK)
    assert texts is not None and len(texts.index_n) == 16 and int(texts.real_n.sum()) == 11
    seen = [survey(objective, part) for part in parts]
    given = couple(objective, batch, texts, seen, signals=False)
    for part, first, needs in zip(parts, seen, given, strict=True):
        _, again = objective.rows(part, *objective._images(part.batch), needs.targets, needs.shared)
        assert first.vectors is not None and again is not None
        for mine, theirs in zip(vars(first.vectors).values(), vars(again).values(), strict=True):
            assert not mine.requires_grad and theirs.requires_grad and torch.equal(mine, theirs)


class Held:
    """Bytes that graphs keep for their backward passes, parameters apart; the most at any one time."""

    def __init__(self, module: Objective) -> None:
        self.apart = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.now: dict[int, int] = {}
        self.most = 0

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.apart:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.most = max(self.most, sum(self.now.values()))
        return x

    def during(self, step: Any, batch: Batch) -> int:
        backward = step.engine.backward

        def watched(loss: Tensor, *, more: bool = False) -> None:
            backward(loss, more=more)
            self.now.clear()

        step.engine.backward = watched
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
            step(batch, signals=False)
        return self.most


@pytest.mark.parametrize("remat", [False, True])
def test_what_is_kept_for_the_backward_pass_is_that_of_one_chunk(remat: bool) -> None:
    recipe = small("m3i", VIT)
    batch, objective = make_batch(recipe), make_objective(recipe, remat=remat)
    direct = Held(objective).during(Direct(Plain(objective), accumulation=1), batch)
    for rows in (4, 8):
        cached = Held(objective).during(Cached(Plain(objective), accumulation=1, rows=rows), batch)
        assert cached / direct == pytest.approx(rows / N, rel=0.1)


def step_of_both(rank: Rank, names: list[str]) -> dict[str, Any]:
    """Every form's step on this rank's half of the batch; gradients averaged over ranks as ZeRO does."""
    import torch.distributed as dist

    found = {}
    for name in names:
        recipe = small(name, VIT)
        objective = make_objective(recipe, collectives=ProcessGroupCollectives(rank))
        whole, half = make_batch(recipe), N // 2
        mine = slice(rank.rank * half, (rank.rank + 1) * half)
        rows = {field: getattr(whole, field)[mine] for field in ROW_FIELDS}
        partner = whole.partner_N[mine] - rank.rank * half
        # One rank is given fewer texts than the other, so one of them is padded.
        batch = replace(whole, **rows, partner_N=partner, text_rows=7, category_rows=3)
        losses, grads = one_step(Cached(Plain(objective), accumulation=1, rows=BLOCK), batch, signals=True)
        shared = {name: value for name, value in losses.items() if not name.startswith(ROWS)}
        own = sorted(losses.keys() - shared)  # the ranks' sets are not in one order
        losses |= {name: ProcessGroupCollectives(rank).all_gather(losses[name]) for name in own}
        for value in (*shared.values(), *grads.values()):
            dist.all_reduce(value)
            value /= rank.world
        found[name] = ({k: v for k, v in losses.items() if not k.startswith("source/")}, grads)
    return found


@pytest.mark.slow
def test_chunks_on_two_ranks_equal_one_process_at_once() -> None:
    names = [*recipe_names(), *(name for name in FORMS if name != "negatives_of_the_rank")]
    results = run_ranks(2, step_of_both, names)
    for name in names:
        recipe = small(name, VIT)
        step = Direct(Plain(make_objective(recipe)), accumulation=1)
        losses, grads = one_step(step, make_batch(recipe), signals=True)
        wanted = ({k: v for k, v in losses.items() if not k.startswith("source/")}, grads)
        for result in results:
            assert_same(result[name], wanted, name)


def train_both_ways(rank: Rank, stages: list[int]) -> dict[int, dict[str, Any]]:
    """Two optimizer steps of two micro-steps by DeepSpeed itself, at once and in chunks, under each ZeRO stage."""
    return {stage: {way: train_under(rank, stage, way) for way in ("direct", "cached")} for stage in stages}


def train_under(rank: Rank, stage: int, way: str) -> tuple[list[bool], list[float], dict[str, Tensor]]:
    recipe = small("m3i", VIT)
    objective = make_objective(recipe, collectives=ProcessGroupCollectives(rank))
    config = {"train_batch_size": 2 * N, "gradient_accumulation_steps": 2, "zero_allow_untested_optimizer": True}
    config |= {"gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    if stage == 3:
        partition(objective, config)
    optimizer = torch.optim.SGD([p for _, p in trained(objective)], lr=0.5)
    engine = Engine(objective, optimizer=optimizer, ds_config=config, rank=rank)
    step = Direct(engine, accumulation=2) if way == "direct" else Cached(engine, accumulation=2, rows=BLOCK)
    applied, norms = [], []
    for number in range(4):
        whole = make_batch(recipe)
        whole = replace(whole, target_NHWC=whole.target_NHWC.roll(number, 0))
        mine = slice(rank.rank * N // 2, (rank.rank + 1) * N // 2)
        rows = {field: getattr(whole, field)[mine] for field in ROW_FIELDS}
        partner = whole.partner_N[mine] - mine.start
        step(replace(whole, **rows, partner_N=partner, text_rows=7, category_rows=3), signals=False)
        applied.append(engine.step())
        norms.append(engine.grad_norm)
    return applied, norms[1::2], {n: whole_value(p) for n, p in trained(objective)}


def whole_value(parameter: torch.nn.Parameter) -> Tensor:
    if hasattr(parameter, "all_gather"):
        parameter.all_gather()
    return parameter.detach().clone()


@pytest.mark.slow
def test_under_every_zero_stage_chunks_accumulate_into_one_step() -> None:
    for stage, ways in run_ranks(2, train_both_ways, [1, 2, 3])[0].items():
        (applied, norms, weights), (_, wanted_norms, wanted) = ways["cached"], ways["direct"]
        assert applied == [False, True, False, True], stage
        assert norms == pytest.approx(wanted_norms, rel=1e-5), stage
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def sized(contrast: str = "cached", mask: str = "mix", **train: Any) -> Recipe:
    values = load_recipe("demo").to_dict()
    values["objective"] = {"input": {"mask": mask, "patch": 8}, "terms": [{"name": "category"}]}
    values["train"] |= {"global_batch": 384, "contrast_batch": 192, "contrast": contrast, **train}
    return validate(values)


@pytest.mark.parametrize(
    ("recipe", "slots", "world", "rows"),
    [
        (sized("direct"), 16, 2, None),
        (sized(), 16, 2, 48),  # divides 96 and holds whole lanes: 16, 32, 48 or 96
        (sized(mask="none"), 16, 2, 48),
        (sized(mask="none"), 16, 1, 64),
        (sized(chunk=32), 16, 2, 32),
        (sized(), 96, 2, 96),  # a lane alone is more than 64
        (sized(mask="none", chunk=1), 16, 2, 1),
    ],
)
def test_the_size_of_a_chunk(recipe: Recipe, slots: int, world: int, rows: int | None) -> None:
    assert chunk_rows(recipe, slots=slots, world=world) == rows


def test_blocks_of_partners_stay_whole() -> None:
    recipe = sized(chunk=24)
    recipe.objective.mix.block = 8
    assert chunk_rows(recipe, slots=16, world=2) == 24
    message = r"train.chunk: got 24; needed: one of 16, 32, 48, 96 \(it divides a rank's 96 rows .*blocks of 16\)"
    with pytest.raises(UserError, match=message):
        chunk_rows(sized(chunk=24), slots=16, world=2)
    with pytest.raises(UserError, match=r"train: chunk: got 8 with contrast direct; needed: contrast cached"):
        sized("direct", chunk=8)
    with pytest.raises(UserError, match=r"train.contrast: .*'direct' or 'cached'.*gradcache"):
        sized("gradcache")


def test_a_chunks_rows_are_the_batchs_and_keep_their_partners() -> None:
    recipe = small("m3i", VIT)
    batch = make_batch(recipe)
    part = batch.rows(4, 8)
    assert len(part) == 4 and (part.text_rows, part.category_rows) == (4, 4) and part.partner_N.tolist() == [1, 2, 3, 0]
    assert torch.equal(part.target_NHWC, batch.target_NHWC[4:8]) and torch.equal(part.id_N, batch.id_N[4:8])
    assert (part.step, part.micro_step) == (batch.step, batch.micro_step)
