"""Every form of the formula: exact mixing, targets, posteriors, encoder calls, the same on several ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_m3i_longhand import (
    CLASSES,
    GRID,
    MEAN,
    PATCH,
    STD,
    WIDTH,
    Decoder,
    Encoder,
    N,
    Pool,
    Text,
    TextHead,
    position,
    view,
)
from test_m3i_longhand import make_batch as m3i_batch
from torch import Tensor, nn

from m3i_large.data.batch import Batch
from m3i_large.objective import Objective, ObjectiveConfig
from m3i_large.objective.collectives import SingleProcess
from m3i_large.objective.posterior import gaussian
from m3i_large.objective.signals import collapsed
from m3i_large.objective.terms import pixel_targets
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank

PIXELS = 3 * PATCH * PATCH


class Counted(Encoder):
    """The longhand test's encoder, which also drops and hides tokens, and counts images."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0
        self.mask_token = nn.Parameter(torch.full((WIDTH,), 0.1))

    def tokens(self, image_BCHW: Tensor, keep_BK: Tensor | None = None, hide_BL: Tensor | None = None) -> Tensor:
        self.images += len(image_BCHW)
        x = self.inner(image_BCHW).flatten(2).transpose(1, 2)
        if hide_BL is not None:
            x = torch.where(hide_BL[..., None], self.mask_token.to(x.dtype), x)
        if keep_BK is not None:
            x = x.take_along_dim(keep_BK[..., None], 1)
        return torch.tanh(x + 0.3 * x.mean(1, keepdim=True))


class Counter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(*arguments)


class PixelDecoder(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(4 + WIDTH, PIXELS)


def build(config: dict, collectives: Any = None) -> Objective:
    torch.manual_seed(3)
    settings = ObjectiveConfig.model_validate(config)
    student, pool = Counted(), Pool()
    target, target_pool = copy.deepcopy(student).requires_grad_(False), copy.deepcopy(pool).requires_grad_(False)
    with torch.no_grad():
        target.inner.weight.mul_(0.7)
        target_pool.inner.weight.mul_(1.3)
    objective = Objective(
        settings,
        student=student,
        target=target,
        decoder=Counter(PixelDecoder() if settings.has("pixels") else Decoder()),
        pool=Counter(pool),
        target_pool=target_pool,
        global_head=nn.Linear(7, 7),
        text=Text(),
        category_head=nn.Linear(7, CLASSES),
        text_head=TextHead(),
        collectives=collectives or SingleProcess(),
        mean=MEAN,
        std=STD,
        num_sources=3,
        compute_dtype=torch.float32,
    )
    return objective


def images(batch: Batch, v: int) -> Tensor:
    """View v of every sample, per channel (3, H, W)."""
    pixels = (batch.target_NHWC, batch.other_NHWC)[v]
    return torch.stack(
        [
            view(pixels[n], batch.colour_NV34[n, v], float(batch.solarize_NV[n, v]), bool(batch.flip_NV[n, v]))
            for n in range(N)
        ]
    ).float()


def term(target: str, view: str | None = "same", **more: Any) -> dict:
    return {"name": "t", "target": target, **({"view": view} if view else {}), **more}


def test_one_step_of_m3i_encodes_every_image_once_and_decodes_in_one_call() -> None:
    objective = build({"input": {"patch": PATCH}})
    objective(m3i_batch())["loss"].backward()
    assert (objective.student.images, objective.target.images) == (N, N)
    assert (objective.decoder.calls, objective.pool.calls) == (1, 1)
    without = build({"input": {"patch": PATCH, "mask": "none"}, "terms": [{"name": "category"}]})
    without(m3i_batch())["loss"].backward()
    assert (without.student.images, without.target.images, without.decoder.calls) == (N, 0, 0)


def test_every_patch_of_a_mix_shows_the_right_image_and_view() -> None:
    """Cells are painted with the number of their image, view and place; the mixed input must show exactly those."""
    objective, batch = build({"input": {"patch": PATCH}}), m3i_batch()
    mixed, own = objective._images(batch)
    y, x = images(batch, 0), images(batch, 1)
    assert torch.allclose(own, y, atol=1e-5)
    for n in range(N):
        for r in range(GRID):
            for c in range(GRID):
                cell = (slice(None), slice(r * PATCH, (r + 1) * PATCH), slice(c * PATCH, (c + 1) * PATCH))
                shown = y[n] if batch.mask_NPP[n, r, c] else x[batch.partner_N[n]]
                assert torch.allclose(mixed[n][cell], shown[cell], atol=1e-5), (n, r, c)
    readings = objective._encode(batch, mixed)
    for reading, mine in zip(readings, (True, False), strict=True):
        assert (batch.mask_NPP.flatten(1).gather(1, reading.cell_NK) == mine).all()
    numbers = torch.arange(N)
    assert (readings[1].by_image(batch.partner_N) == numbers).all(), "row n of by_image is about image n"
    assert (readings[1].of_image(numbers) == batch.partner_N).all()


@pytest.mark.parametrize("shown", ["target", "other"])
@pytest.mark.parametrize("hide", [{"mask": "none"}, {"mask": "random"}, {"mask": "block", "fill": "token"}])
def test_dense_features_of_either_view(shown: str, hide: dict) -> None:
    """Against the equation, one image after the other."""
    batch = m3i_batch()
    view_name = "same" if shown == "target" else "other"
    more = {"collapse": "stop_gradient"}
    o = build({"input": {"patch": PATCH, "view": shown, **hide}, "terms": [term("dense", view_name, **more)]})
    out = o(batch)
    total = torch.zeros(())
    y = images(batch, 0)
    plain = torch.tensor([[float(k // GRID), float(k % GRID), 0.0, 0.0] for k in range(GRID**2)])
    for n in range(N):
        image = images(batch, 0 if shown == "target" else 1)[n][None]
        visible = [k for k in range(GRID**2) if batch.mask_NPP[n].flatten()[k]]
        if hide["mask"] == "none":
            tokens, places = o.student.tokens(image)[0], list(range(GRID**2))
        elif hide.get("fill") == "token":
            tokens, places = (
                o.student.tokens(image, hide_BL=~batch.mask_NPP[n].flatten()[None])[0],
                list(range(GRID**2)),
            )
        else:
            tokens, places = o.student.tokens(image, keep_BK=torch.tensor([visible]))[0], visible
        query = plain
        if shown == "other":
            boxes = batch.box_NV4[n].double().tolist()
            flips = batch.flip_NV[n].tolist()
            query = position(boxes[1], boxes[0], float(batch.size_N2[n, 1]), flips[1], flips[0]).float()
        predicted = o.decoder(tokens[None], plain[places][None], query[None])[0]
        target = F.layer_norm(o.target.tokens(y[n][None])[0], (WIDTH,))
        total += ((predicted - target) ** 2).sum(-1).mean() / WIDTH / N
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-4)


@pytest.mark.parametrize("normalized", [False, True])
def test_pixels(normalized: bool) -> None:
    batch = m3i_batch()
    o = build({"input": {"patch": PATCH, "mask": "none"}, "terms": [term("pixels", normalize_pixels=normalized)]})
    y = images(batch, 0)
    cells = pixel_targets(y, patch=PATCH)
    assert torch.equal(
        cells[2, GRID + 3].reshape(PATCH, PATCH, 3), y[2, :, PATCH : 2 * PATCH, 3 * PATCH :].permute(1, 2, 0)
    )
    if normalized:
        cells = (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    tokens = o.student.tokens(y)
    plain = torch.tensor([[float(k // GRID), float(k % GRID), 0.0, 0.0] for k in range(GRID**2)]).expand(N, -1, -1)
    expected = ((o.decoder(tokens, plain, plain) - cells) ** 2).mean()
    assert o(batch)["loss/t"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("posterior", ["gaussian", "boltzmann"])
@pytest.mark.parametrize("encoder", ["ema", "shared"])
def test_a_global_feature(posterior: str, encoder: str) -> None:
    batch = m3i_batch()
    given = {"patch": PATCH, "mask": "none", "view": "other"}
    o = build({"input": given, "terms": [term("global", "other", posterior=posterior, encoder=encoder)]})
    y, x = images(batch, 0), images(batch, 1)
    predicted = o.global_head(o.pool(o.student.tokens(x)))
    tower, pool = (o.target, o.target_pool) if encoder == "ema" else (o.student, o.pool)
    target = pool(tower.tokens(y)).detach()
    if posterior == "gaussian":
        expected = ((predicted - F.layer_norm(target, target.shape[-1:])) ** 2).mean()
    else:
        cosine = F.normalize(predicted, dim=-1) @ F.normalize(target, dim=-1).T / 0.2
        expected = -(cosine.diagonal() - cosine.exp().sum(1).log()).mean()
    out = o(batch, signals=True)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    out["loss"].backward()
    wanted = torch.autograd.grad(expected, o.student.inner.weight)[0]
    torch.testing.assert_close(o.student.inner.weight.grad, wanted, rtol=1e-3, atol=1e-6)
    assert {"collapse/t/std", "collapse/t/prediction_rank"} <= out.keys()
    assert o.gradient_signals(micro_steps=1)["gradient/t"] > 0


def test_decorrelation_equals_its_naive_definition() -> None:
    """lambda / D * mean over all pairs of tokens of (p . t)^2, as an (n L) x (n L) matrix."""
    torch.manual_seed(0)
    p, t = torch.randn(3, 5, 8).double(), torch.randn(3, 5, 8).double()
    moment = torch.einsum("nld,nle->de", t, t) / 15
    rows = gaussian(p, t, moment_DD=moment.float(), strength=15.36)
    pairs = (p.flatten(0, 1) @ t.flatten(0, 1).T) ** 2
    naive = (((p - t) ** 2).sum(-1).mean() + 15.36 / 8 * pairs.mean()) / 8
    assert rows.mean().item() == pytest.approx(naive.item(), rel=1e-5)
    assert gaussian(p, t, moment_DD=None, strength=0.0, sigma=2.0).mean().item() == pytest.approx(
        (((p - t) ** 2).sum(-1).mean() / 8).item(), rel=1e-5
    )


def watched(objective: Objective) -> tuple[Objective, list[Tensor]]:
    """Keeps every token map that the student makes."""
    kept: list[Tensor] = []
    inner = objective.student.tokens

    def tokens(*arguments: Tensor, **more: Tensor) -> Tensor:
        kept.append(inner(*arguments, **more))
        return kept[-1]

    objective.student.tokens = tokens
    return objective, kept


def test_gradient_signals_are_the_terms_gradients_by_the_tokens() -> None:
    weights = {"intra": 1.0, "inter": 3.0, "category": 0.5, "text": 1.0}
    o, batch = (
        build({"input": {"patch": PATCH}, "terms": [{"name": n, "weight": w} for n, w in weights.items()]}),
        m3i_batch(),
    )
    out = o(batch, signals=True)
    found = {}
    for name, weight in weights.items():
        config = {"input": {"patch": PATCH}, "terms": [{"name": name, "weight": weight}]}
        alone, kept = watched(build(config))
        (grad,) = torch.autograd.grad(alone(batch)["loss"], kept[0])
        found[name] = grad.norm().item()
    (out["loss"] / 4).backward()
    norms = o.gradient_signals(micro_steps=4)
    assert {f"gradient/{name}": value for name, value in found.items()} == pytest.approx(
        {key: value.item() for key, value in norms.items()}, rel=1e-4
    )
    assert o(batch).keys().isdisjoint(norms) and o.gradient_signals(micro_steps=1) == {}
    assert -1 <= out["cosine/text/positive"] <= 1 and out["cosine/text/negative"].isfinite()


def global_step(rank: Rank) -> dict:
    """One rank's half of a batch under Boltzmann with negatives from all ranks."""
    from dataclasses import replace

    import torch.distributed as dist
    from test_m3i_longhand import ROWS

    given = {"patch": PATCH, "mask": "none", "view": "other"}
    o = build({"input": given, "terms": [term("global", "other")]}, ProcessGroupCollectives(rank))
    whole = m3i_batch()
    mine = slice(rank.rank * N // 2, (rank.rank + 1) * N // 2)
    batch = replace(whole, **{name: getattr(whole, name)[mine] for name in ROWS}, partner_N=torch.arange(N // 2))
    out = o(batch, signals=True)
    out["loss"].backward()
    out |= o.gradient_signals(micro_steps=1)
    grad = o.student.inner.weight.grad
    dist.all_reduce(grad)
    return {
        "grad": grad / 2,
        "signals": {k: v for k, v in out.items() if k.split("/")[0] in ("collapse", "cosine", "gradient")},
    }


@pytest.mark.slow
def test_negatives_of_all_ranks_are_those_of_one_process() -> None:
    given = {"patch": PATCH, "mask": "none", "view": "other"}
    one = build({"input": given, "terms": [term("global", "other")]})
    out = one(m3i_batch(), signals=True)
    out["loss"].backward()
    out |= one.gradient_signals(micro_steps=1)
    for result in run_ranks(2, global_step):
        torch.testing.assert_close(result["grad"], one.student.inner.weight.grad, rtol=1e-3, atol=1e-6)
        for key, value in result["signals"].items():
            assert value.item() == pytest.approx(out[key].item(), rel=1e-3), key


def test_a_collapsed_target_is_named_and_a_healthy_one_is_not() -> None:
    o, batch = build({"input": {"patch": PATCH}}), m3i_batch()
    healthy = {k: float(v) for k, v in o(batch, signals=True).items() if k.startswith("collapse/")}
    assert collapsed(healthy, o.config) == []
    with torch.no_grad():
        o.target.inner.weight.zero_()  # every token is the same
    ill = {k: float(v) for k, v in o(batch, signals=True).items() if k.startswith("collapse/")}
    assert collapsed(ill, o.config) == ["intra", "inter"]
    assert collapsed({"loss": 1.0}, o.config) == [], "a step without signals says nothing"
    pixels = ObjectiveConfig.model_validate({"input": {"mask": "none"}, "terms": [term("pixels")]})
    assert collapsed({"collapse/t/std": 0.0, "collapse/t/rank": 1.0}, pixels) == [], "pixels cannot collapse"
