"""One M3I step written out from the equations, sample by sample, sharing no code with the objective.

Then the same step on two and four ranks, one of them without a single text.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from m3i_large.data.batch import Batch
from m3i_large.objective import Objective, ObjectiveConfig
from m3i_large.objective.collectives import SingleProcess
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank

N, SIZE, PATCH, GRID, WIDTH, CLASSES, T = 8, 16, 4, 4, 6, 5, 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TERMS = ("intra", "inter", "category", "text")
WEIGHTS = dict(zip(TERMS, (1.0, 2.0, 0.5, 0.7), strict=True))


class Encoder(nn.Module):
    """Each token sees its patch and, a little, the whole picture."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.grid, self.image_size, self.token_stride = WIDTH, GRID, SIZE, PATCH
        self.inner = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def tokens(self, image_BCHW: Tensor) -> Tensor:
        x = self.inner(image_BCHW).flatten(2).transpose(1, 2)
        return torch.tanh(x + 0.3 * x.mean(1, keepdim=True))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH + 4, WIDTH), nn.Linear(4 + WIDTH, WIDTH)

    def forward(self, context: Tensor, context_position: Tensor, query: Tensor) -> Tensor:
        seen = torch.tanh(self.a(torch.cat([context, context_position / 10], -1))).mean(1, keepdim=True)
        return self.b(torch.cat([query / 10, seen.expand(-1, query.shape[1], -1)], -1)).sin()


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.inner(tokens)).mean(1)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(30, 9)

    def forward(self, text: Tensor) -> Tensor:
        return self.inner(text).sum(1).sin()


class TextHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(7, 5), nn.Linear(9, 5)
        self.log_scale = nn.Parameter(torch.tensor([1.3]))

    def forward(self, pooled: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(pooled), self.text(text), self.log_scale.exp()


def build(
    collectives: object = None, *, ratio: float = 0.5, patch: int = PATCH, weights: dict[str, float] = WEIGHTS
) -> Objective:
    torch.manual_seed(1)
    student = Encoder()
    target = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        target.inner.weight.mul_(0.7)
    config = ObjectiveConfig(
        input={"patch": patch, "ratio": ratio},
        terms=[{"name": name, "weight": weight} for name, weight in weights.items()],
    )
    towers = {
        "text": Text(),
        "decoder": Decoder(),
        "pool": Pool(),
        "category_head": nn.Linear(7, CLASSES),
        "text_head": TextHead(),
    }
    return Objective(
        config,
        student=student,
        target=target,
        **towers,
        collectives=collectives or SingleProcess(),
        mean=MEAN,
        std=STD,
        num_sources=3,
    ).double()


def make_batch(*, ratio: float = 0.5, cells: int = GRID, partner: list[int] | None = None) -> Batch:
    g = torch.Generator().manual_seed(5)
    own = round(ratio * cells * cells)
    mask = torch.stack([torch.randperm(cells * cells, generator=g) < own for _ in range(N)]).reshape(N, cells, cells)
    text = torch.randint(1, 30, (N, T), generator=g)
    text[3] = text[1]  # two pictures with the same caption
    valid = torch.tensor([True, True, False, True, False, False, False, True])
    category = torch.where(valid, torch.tensor(-1), torch.tensor([0, 1, 2, 3, 4, -1, 1, 0]))
    box = torch.stack([torch.randint(0, 20, (N, 2), generator=g), torch.randint(0, 20, (N, 2), generator=g)], 1)
    extent = torch.randint(8, 20, (N, 2, 2), generator=g)
    colour = torch.eye(3, 4).expand(N, 2, 3, 4) + 0.1 * torch.randn(N, 2, 3, 4, generator=g)
    return Batch(
        target_NHWC=torch.randint(0, 256, (N, SIZE, SIZE, 3), generator=g).to(torch.uint8),
        other_NHWC=torch.randint(0, 256, (N, SIZE, SIZE, 3), generator=g).to(torch.uint8),
        box_NV4=torch.cat([box, extent], -1).int(),
        size_N2=torch.tensor([[44, 48]]).expand(N, 2).int(),
        flip_NV=torch.rand(N, 2, generator=g) < 0.5,
        colour_NV34=colour.contiguous(),
        solarize_NV=torch.where(torch.rand(N, 2, generator=g) < 0.5, 0.5, 2.0),
        partner_N=torch.tensor(partner or [2, 0, 1, 4, 3, 7, 5, 6]),
        mask_NPP=mask,
        category_N=category,
        text_NT=text,
        text_valid_N=valid,
        source_N=torch.tensor([0, 1, 2, 0, 2, 2, 2, 1]),
        epoch_N=torch.zeros(N, dtype=torch.int64),
        id_N=torch.arange(N),
        substitute_N=torch.zeros(N, dtype=torch.int64),
        step=0,
        micro_step=0,
        text_rows=6,
        category_rows=6,
    )


def view(pixels: Tensor, colour: Tensor, solarize: float, flip: bool) -> Tensor:
    """One view as (3, H, W), written per channel."""
    rgb = [pixels[:, :, c].float() / 255 for c in range(3)]
    out = []
    for c in range(3):
        v = sum(colour[c, k] * rgb[k] for k in range(3)) + colour[c, 3]
        v = v.clamp(0, 1)
        v = torch.where(v >= solarize, 1 - v, v)
        v = (v - MEAN[c]) / STD[c]
        out.append(v.flip(1) if flip else v)
    return torch.stack(out).float().double()


def position(box_in: list[float], box_out: list[float], width: float, flip_in: bool, flip_out: bool) -> Tensor:
    """Each target patch centre carried to image pixels, then to the input view's patch coordinates."""
    rows = []
    (ti, li, hi, wi), (to, lo, ho, wo) = box_in, box_out
    for r in range(GRID):
        for c in range(GRID):
            y = to + (r + 0.5) / GRID * ho
            x = lo + ((GRID - c - 0.5) if flip_out else (c + 0.5)) / GRID * wo
            across = (x - li) / wi * GRID
            rows.append(
                [
                    (y - ti) / hi * GRID - 0.5,
                    (GRID - across if flip_in else across) - 0.5,
                    10 * math.log(ho / hi),
                    10 * math.log(wo / wi),
                ]
            )
    return torch.tensor(rows).float().double()


def longhand(o: Objective, b: Batch) -> dict[str, Tensor]:
    """-log P of the four terms, one sample after the other; the paper's Eq. 3-5 and METHOD section 3."""
    y = [
        view(b.target_NHWC[n], b.colour_NV34[n, 0], float(b.solarize_NV[n, 0]), bool(b.flip_NV[n, 0])) for n in range(N)
    ]
    x = [
        view(b.other_NHWC[n], b.colour_NV34[n, 1], float(b.solarize_NV[n, 1]), bool(b.flip_NV[n, 1])) for n in range(N)
    ]
    sigma = b.partner_N.tolist()
    cell = SIZE // b.mask_NPP.shape[-1]
    plain = torch.tensor([[float(r), float(c), 0.0, 0.0] for r in range(GRID) for c in range(GRID)]).double()
    features = []
    with torch.no_grad():
        for n in range(N):
            t = o.target.tokens(y[n][None])[0]
            t = (t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, unbiased=False, keepdim=True) + 1e-5)
            features.append(t.float().double())
    c_matrix = sum(torch.outer(row, row) for t in features for row in t) / (N * GRID * GRID)

    def dense(p: Tensor, t: Tensor) -> Tensor:
        fit = sum(((p[k] - t[k]) ** 2).sum() for k in range(GRID * GRID)) / GRID**2
        spread = sum(p[k] @ c_matrix @ p[k] for k in range(GRID * GRID)) / GRID**2
        return (fit + 15.36 / WIDTH * spread) / WIDTH

    intra, inter, pooled_i, pooled_j = [], [], [None] * N, [None] * N
    for n in range(N):
        j = sigma[n]
        m = b.mask_NPP[n].double().repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        tokens = o.student.tokens((m * y[n] + (1 - m) * x[j])[None])[0]
        mine = [k for k in range(GRID * GRID) if m[(k // GRID) * PATCH, (k % GRID) * PATCH] == 1]
        theirs = [k for k in range(GRID * GRID) if k not in mine]
        intra.append(dense(o.decoder(tokens[None, mine], plain[None, mine], plain[None])[0], features[n]))
        boxes = b.box_NV4[j].double().tolist()
        query = position(boxes[1], boxes[0], float(b.size_N2[j, 1]), bool(b.flip_NV[j, 1]), bool(b.flip_NV[j, 0]))
        inter.append(dense(o.decoder(tokens[None, theirs], plain[None, theirs], query[None])[0], features[j]))
        pooled_i[n], pooled_j[j] = o.pool(tokens[None, mine])[0], o.pool(tokens[None, theirs])[0]

    labelled = [n for n in range(N) if b.category_N[n] >= 0]
    category = 0.0
    for pooled in (pooled_i, pooled_j):
        for n in labelled:
            logits = o.category_head(pooled[n])
            category = category - (logits[b.category_N[n]] - logits.exp().sum().log()) / len(labelled)

    texts = [n for n in range(N) if b.text_valid_N[n]]
    scale = o.text_head.log_scale.exp()
    words = {n: o.text_head.text(o.text(b.text_NT[n][None]))[0] for n in texts}
    words = {n: w / w.norm() for n, w in words.items()}
    same = lambda n, k: bool((b.text_NT[n] == b.text_NT[k]).all())  # noqa: E731
    text = 0.0
    for pooled in (pooled_i, pooled_j):
        images = {n: o.text_head.image(pooled[n]) for n in texts}
        images = {n: v / v.norm() for n, v in images.items()}
        for n in texts:
            others = [k for k in texts if k == n or not same(n, k)]
            right = scale * images[n] @ words[n]
            over_text = sum((scale * images[n] @ words[k]).exp() for k in others).log()
            over_image = sum((scale * images[k] @ words[n]).exp() for k in others).log()
            text = text - ((right - over_text) + (right - over_image)) / 2 / len(texts)
    losses = {"intra": sum(intra) / N, "inter": sum(inter) / N, "category": category, "text": text.squeeze()}
    return losses | {"total": losses["intra"] + 2.0 * losses["inter"] + 0.5 * losses["category"] + 0.7 * losses["text"]}


class DoubleImages(Objective):
    """The objective with double precision behind the float32 pictures, so that gradients compare to many digits."""

    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        mixed, own = super()._images(batch)
        return mixed.double(), own.double()


def in_double(o: Objective) -> Objective:
    o.__class__ = DoubleImages
    return o


def gradients(o: Objective) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in o.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("ratio", "patch"), [(0.5, PATCH), (0.25, PATCH), (0.5, 2 * PATCH)])
def test_losses_and_gradients_equal_the_equations(ratio: float, patch: int) -> None:
    batch, o = make_batch(ratio=ratio, cells=SIZE // patch), in_double(build(ratio=ratio, patch=patch))
    expected = longhand(o, batch)
    expected["total"].backward()
    wanted = gradients(o)
    o.zero_grad()
    out = o(batch, signals=True)
    out["loss"].backward()
    for name in TERMS:
        assert out[f"loss/{name}"].item() == pytest.approx(expected[name].item(), rel=2e-5), name
    assert out["loss"].item() == pytest.approx(expected["total"].item(), rel=2e-5)
    for name, grad in gradients(o).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert out["optim/temperature"].item() == pytest.approx(math.exp(-1.3), rel=1e-5)
    assert all(p.grad is None for p in o.target.parameters())


@pytest.mark.parametrize("alone", TERMS)
def test_the_norm_of_each_terms_gradient_by_each_parameter_equals_the_equations(alone: str) -> None:
    batch, o = make_batch(), build()
    longhand(in_double(o), batch)[alone].backward()
    wanted = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in o.named_parameters()}
    only = build(weights=dict.fromkeys(TERMS, 0.0) | {alone: 1.0})
    in_double(only)(batch)["loss"].backward()
    norms = {name: grad.norm().item() for name, grad in gradients(only).items()}
    assert norms == pytest.approx({name: wanted[name] for name in norms}, rel=1e-3, abs=1e-6)
    head = {"intra": "decoder", "inter": "decoder", "category": "category_head", "text": "text_head"}[alone]
    towers = {name.split(".")[0] for name, norm in norms.items() if norm > 1e-6}
    pool = {"pool"} if alone in ("category", "text") else set()
    assert towers == {"student", head} | pool | ({"text"} if alone == "text" else set())


def test_per_source_sums_add_up_to_the_losses() -> None:
    batch, o = make_batch(), build()
    out = in_double(o)(batch)
    for name in TERMS:
        total, count = out[f"source/{name}"].sum(0).tolist()
        assert total / count == pytest.approx(out[f"loss/{name}"].item(), rel=1e-4)
    assert out["source/text"][2].tolist() == [0.0, 0.0] and out["source/text"][0, 1] == 2


@pytest.mark.parametrize("change", ["partner", "geometry", "mask"])
def test_mixing_and_geometry_matter(change: str) -> None:
    """Were the mix or the geometry left out of the code, these would not change the loss of the terms they feed."""
    batch, o = make_batch(), in_double(build())
    before = o(batch)
    changed = {
        "partner": replace(batch, partner_N=batch.partner_N.argsort()),
        "geometry": replace(
            batch, box_NV4=batch.box_NV4 + torch.tensor([[0, 0, 0, 0], [3, 2, 1, 4]], dtype=torch.int32)
        ),
        "mask": replace(batch, mask_NPP=~batch.mask_NPP),
    }[change]
    after = o(changed)
    touched = {"partner": TERMS, "mask": TERMS, "geometry": ("inter",)}[change]
    for name in TERMS:
        differs = abs(before[f"loss/{name}"].item() - after[f"loss/{name}"].item()) > 1e-6
        assert differs == (name in touched), name


def test_without_a_text_or_a_label_the_terms_are_zero_and_still_attached() -> None:
    batch = make_batch()
    batch = replace(batch, text_valid_N=torch.zeros(N, dtype=torch.bool), category_N=torch.full((N,), -1))
    o = in_double(build())
    out = o(batch)
    assert out["loss/text"].item() == 0 and out["loss/category"].item() == 0
    out["loss"].backward()
    grads = gradients(o)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert grads["text_head.log_scale"].abs().sum() == 0 and grads["category_head.weight"].abs().sum() == 0


def shared_step(rank: Rank, order: list[int], partner: list[int]) -> dict:
    """One rank's share of the batch; gradients averaged over ranks as ZeRO does."""
    import torch.distributed as dist

    batch = split(make_batch(partner=partner), order, rank.world)[rank.rank]
    o = in_double(build(ProcessGroupCollectives(rank)))
    out = o(batch, signals=True)
    out["loss"].backward()
    grads = gradients(o)
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= rank.world
    scalars = {k: v for k, v in out.items() if not k.startswith("source/")}
    for key, value in scalars.items():
        if key.startswith("rows/"):
            continue
        mean = value.detach().double().clone()
        dist.all_reduce(mean)
        scalars[key] = mean / rank.world
    return {"grads": grads, "out": scalars, "texts": int(batch.text_valid_N.sum())}


ROWS = [
    "target_NHWC",
    "other_NHWC",
    "box_NV4",
    "size_N2",
    "flip_NV",
    "colour_NV34",
    "solarize_NV",
    "mask_NPP",
    "category_N",
    "text_NT",
    "text_valid_N",
    "source_N",
    "epoch_N",
    "id_N",
    "substitute_N",
]


def split(batch: Batch, order: list[int], world: int) -> list[Batch]:
    """The rows in another order, cut into ranks; partners must stay within a rank."""
    place = {n: i for i, n in enumerate(order)}
    per_rank = N // world
    parts = []
    for r in range(world):
        mine = order[r * per_rank : (r + 1) * per_rank]
        partner = torch.tensor([place[int(batch.partner_N[n])] - r * per_rank for n in mine])
        assert ((partner >= 0) & (partner < per_rank)).all()
        rows = {name: getattr(batch, name)[mine] for name in ROWS}
        parts.append(
            replace(batch, **rows, partner_N=partner, text_rows=min(6, per_rank), category_rows=min(6, per_rank))
        )
    return parts


@pytest.mark.slow
@pytest.mark.parametrize(("world", "pairs"), [(2, [[0, 1, 2, 7], [3, 4, 5, 6]]), (4, [[0, 1], [3, 7], [2, 4], [5, 6]])])
def test_gradients_on_several_ranks_equal_one_process(world: int, pairs: list[list[int]]) -> None:
    order = [n for pair in pairs for n in pair]
    partner = [0] * N
    for pair in pairs:
        for a, b in zip(pair, [*pair[1:], pair[0]], strict=True):
            partner[a] = b
    one = in_double(build())
    out = one(make_batch(partner=partner), signals=True)
    out["loss"].backward()
    results = run_ranks(world, shared_step, order, partner)
    assert world == 2 or min(r["texts"] for r in results) == 0, "one rank must have no text at all"
    for name, grad in gradients(one).items():
        torch.testing.assert_close(
            results[0]["grads"][name], grad, rtol=1e-4, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )
    for key, value in results[0]["out"].items():
        if key.startswith("rows/"):
            rows = torch.cat([result["out"][key] for result in results])
            torch.testing.assert_close(rows, out[key][order], rtol=1e-4, atol=1e-6, equal_nan=True)
            continue
        assert value.item() == pytest.approx(out[key].item(), rel=1e-4), key
