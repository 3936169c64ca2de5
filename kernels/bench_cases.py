"""What kernels/bench.py times: shapes, bytes that must move, our implementations and other ways to the same result."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from m3i_kernels.dcnv3 import dcnv3
from m3i_kernels.dispatch import resolve, use_backend
from m3i_kernels.ema_update import ema_update
from m3i_kernels.patch_mix import patch_mix
from m3i_kernels.patch_mix.reference import patch_mix as patch_mix_reference
from torch import Tensor

Shape = tuple[int, ...]
Call = Callable[[], object]
EMA_TENSORS = 64


class Case(NamedTuple):
    """One call to time, and the bytes that no implementation can avoid: inputs read once, outputs written once."""

    provider: str
    pass_: str
    call: Call
    num_bytes: int


def backends(op: str, device: torch.device) -> Iterator[tuple[str, Callable[[Call], Call]]]:
    """(provider, what makes a call run by it) of the reference and of the fused kernel, where it runs on `device`.

    The whole timed call: a backward pass asks for its implementation when it runs.
    """

    def by(name: str, call: Call) -> Call:
        def within() -> object:
            with use_backend(name):
                return call()

        return within

    for provider in ("reference", "triton"):
        with use_backend(provider):
            try:
                resolve(op, device)
            except ValueError:  # no Triton, or not for this device
                continue
        yield provider, functools.partial(by, provider)


def compiled(call: Callable[..., Any], device: torch.device) -> Iterator[tuple[str, Callable[..., Any]]]:
    """torch.compile's own kernel; on GPUs only, where a compiler is certain."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        # The backward pass of a graph that is kept is timed many times: its buffers must not be given away.
        torch._functorch.config.donated_buffer = False
        yield "torch.compile", torch.compile(call)


def device_copy(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A large copy: the bandwidth that the others are measured against, bytes read plus bytes written."""
    source = torch.randn(shape, device=device).to(dtype)
    target = torch.empty_like(source)
    yield Case("torch", "forward", lambda: target.copy_(source), 2 * source.nbytes)


def patch_mix_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """`shape` is (N, H, W, P)."""
    N, H, W, P = shape
    target, other = (torch.randint(0, 256, (N, H, W, 3), dtype=torch.uint8, device=device) for _ in range(2))
    given = {
        "colour_NV34": torch.eye(3, 4, device=device).expand(N, 2, 3, 4).contiguous(),
        "solarize_NV": torch.rand(N, 2, device=device) * 2,
        "flip_NV": torch.rand(N, 2, device=device) < 0.5,
        "partner_N": torch.arange(N, device=device).roll(1),
        "mask_NPP": torch.rand(N, P, P, device=device) < 0.5,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "dtype": dtype,
    }
    # Of the other view only what shows is needed: half of it here.
    num_bytes = N * H * W * (3 + 3 / 2 + 6 * dtype.itemsize)
    for provider, by in backends("patch_mix", device):
        yield Case(provider, "forward", by(functools.partial(patch_mix, target, other, **given)), int(num_bytes))
    for provider, call in compiled(patch_mix_reference, device):
        yield Case(provider, "forward", functools.partial(call, target, other, **given), int(num_bytes))


def ema_update_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """`shape` is (number of parameters,), in 64 tensors."""
    ema, source = ([x.clone() for x in torch.randn(shape, device=device).chunk(EMA_TENSORS)] for _ in range(2))
    out = [torch.empty_like(x, dtype=dtype) for x in ema]
    num_bytes = sum(x.numel() for x in ema) * (12 + dtype.itemsize)
    for provider, by in backends("ema_update", device):
        yield Case(provider, "forward", by(lambda: ema_update(ema, source, momentum=0.999, out=out)), num_bytes)

    def foreach() -> None:
        torch._foreach_lerp_(ema, source, 0.001)
        torch._foreach_copy_(out, ema)

    yield Case("torch foreach", "forward", foreach, num_bytes)


def dcnv3_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """`shape` is (B, H, W, G, D): 3 x 3, stride 1, with the centre blend, as in InternImage-H."""
    B, H, W, G, D = shape
    sizes = {"value": G * D, "offset": 18 * G, "logit": 9 * G, "center": G}
    given = {k: torch.randn(B, H, W, n, device=device).to(dtype).requires_grad_() for k, n in sizes.items()}
    grad = torch.randn(B, H, W, G * D, device=device).to(dtype)
    inputs = sum(x.nbytes for x in given.values())
    num_bytes = {"forward": inputs + grad.nbytes, "backward": 2 * inputs + grad.nbytes}
    num_bytes["both"] = num_bytes["forward"] + num_bytes["backward"]
    operator = functools.partial(dcnv3, *given.values(), groups=G)
    for provider, by in backends("dcnv3", device):
        for name, call in _passes(operator, list(given.values()), grad).items():
            yield Case(provider, name, by(call), num_bytes[name])
    unfused = functools.partial(_grid_sample, **given, groups=G)
    for provider, peer in [("grid_sample", unfused), *compiled(unfused, device)]:
        for name, call in _passes(peer, list(given.values()), grad).items():
            yield Case(provider, name, call, num_bytes[name])


def _passes(call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> dict[str, Call]:
    """Forward alone, backward of a graph that is kept, and both."""

    @torch.no_grad()
    def forward() -> object:
        return call()

    graph: list[Tensor] = []  # made when the backward pass is first timed

    def backward() -> object:
        if not graph:
            graph.append(call())
        return torch.autograd.grad(graph[0], inputs, grad, retain_graph=True)

    return {"forward": forward, "backward": backward, "both": lambda: torch.autograd.grad(call(), inputs, grad)}


def _grid_sample(value: Tensor, offset: Tensor, logit: Tensor, center: Tensor, *, groups: int) -> Tensor:
    """The same numbers by torch's own sampler, as the PyTorch fallback that ships with InternImage does it; in fp32,
    because on a CPU grid_sample is wrong in bf16."""
    B, H, W, C = value.shape
    dtype, value = value.dtype, value.float()
    steps = torch.arange(-1.0, 2.0, device=value.device)
    point_92 = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(9, 2)
    ys, xs = (torch.arange(n, device=value.device, dtype=torch.float32) for n in (H, W))
    base_HW2 = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), -1).flip(-1)
    place = base_HW2.view(1, H * W, 1, 1, 2) + point_92 + offset.float().view(B, H * W, groups, 9, 2)
    place = (2 * place + 1) / place.new_tensor([W, H]) - 1
    grid = place.permute(0, 2, 1, 3, 4).reshape(B * groups, H * W, 9, 2)
    image = value.view(B, H, W, groups, -1).permute(0, 3, 4, 1, 2).reshape(B * groups, -1, H, W)
    weight = logit.float().view(B, H * W, groups, 9).softmax(-1).permute(0, 2, 1, 3).reshape(B * groups, 1, H * W, 9)
    out = (F.grid_sample(image, grid, align_corners=False) * weight).sum(-1)
    out = out.view(B, groups, -1, H, W).permute(0, 3, 4, 1, 2)
    gate = center.float().sigmoid()[..., None]
    return torch.lerp(out, value.view(B, H, W, groups, -1), gate).reshape(B, H, W, C).to(dtype)


# op -> (cases of a shape, shapes from small to large; the first is for --quick and for CPUs)
OPS: dict[str, tuple[Callable[[Shape, torch.dtype, torch.device], Iterator[Case]], list[Shape]]] = {
    "device_copy": (device_copy, [(2**24,), (2**29,)]),
    "patch_mix": (patch_mix_cases, [(96, 64, 64, 8), (64, 224, 224, 14), (256, 224, 224, 14)]),
    "ema_update": (ema_update_cases, [(2**20,), (2**24 + 1,), (2**28,)]),
    "dcnv3": (
        dcnv3_cases,
        [(96, 16, 16, 1, 32)]  # the first level of the demo's InternImage
        + [(64, 56 // s, 56 // s, 10 * s, 32) for s in (1, 2, 4, 8)]  # InternImage-H at 224 pixels
        + [(16, 96 // s, 96 // s, 10 * s, 32) for s in (1, 2, 4, 8)]  # and at 384
        + [(64, 56 // s, 56 // s, 4 * s, 16) for s in (1, 2, 4, 8)]  # InternImage-T at 224
        + [(1, 250, 375, 10, 32), (1, 125, 188, 20, 32), (1, 63, 94, 40, 32), (1, 32, 47, 80, 32)],  # detection
    ),
}
