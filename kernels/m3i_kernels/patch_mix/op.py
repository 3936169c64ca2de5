"""`patch_mix` as users call it: checks, then a torch custom operator that dispatches.

Legend: N rows, H W pixels, C = 3 channels, V = 2 views (0 target, 1 other), P = mask cells a side.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3i_kernels.dispatch import implementation

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def patch_mix(
    target_NHWC: Tensor,
    other_NHWC: Tensor,
    *,
    colour_NV34: Tensor,
    solarize_NV: Tensor,
    flip_NV: Tensor,
    partner_N: Tensor,
    mask_NPP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Colours, normalises and flips two views and mixes each row's target view with its partner's other view.

    Per pixel, in fp32: rgb / 255, then A[:, :3] @ rgb + A[:, 3], clamped to [0, 1]; values at or above the solarize
    threshold become 1 - value; (value - mean) / std; horizontal flip. Then (M3I section 3.4, the mixed input)
    mixed[n] = mask[n] * target[n] + (1 - mask[n]) * other[partner[n]], where the mask, enlarged to H x W, lies in the
    flipped frame and the partner's view has the partner's own colour and flip. Not differentiable.

    Args:
        target_NHWC, other_NHWC: uint8 RGB, one shape, the views before colour and flip.
        colour_NV34: float32, affine on RGB in [0, 1].
        solarize_NV: float32, threshold in [0, 1]; above 1 means off.
        flip_NV: bool.
        partner_N: int64, row of the other view, in [0, N); checked on the CPU only, elsewhere it would cost a wait.
        mask_NPP: bool, True = own; P divides H and W.
        mean, std: three floats each, in units of [0, 1]; std positive.
        dtype: of the results, bf16, fp16 or fp32.

    Returns:
        (mixed_NCHW, target_NCHW), contiguous, in `dtype`.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    random = {  # in the operator's order
        "colour_NV34": colour_NV34,
        "solarize_NV": solarize_NV,
        "flip_NV": flip_NV,
        "partner_N": partner_N,
        "mask_NPP": mask_NPP,
    }
    _check(target_NHWC, other_NHWC, **random)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} must have 3 values, got {len(values)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be positive, got {tuple(std)}")
    if dtype not in OUT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, OUT_DTYPES))}, got {dtype}")
    mean, std = ([float(value) for value in values] for values in (mean, std))
    return _patch_mix(target_NHWC, other_NHWC, *random.values(), mean, std, dtype)


def _check(target_NHWC: Tensor, other_NHWC: Tensor, **random: Tensor) -> None:
    if target_NHWC.dim() != 4 or target_NHWC.shape[-1] != 3:
        raise ValueError(f"target_NHWC must have shape (N, H, W, 3), got {tuple(target_NHWC.shape)}")
    N, H, W, _ = target_NHWC.shape
    P = random["mask_NPP"].shape[-1] if random["mask_NPP"].dim() == 3 else 0
    needed = {
        "target_NHWC": ((N, H, W, 3), torch.uint8),
        "other_NHWC": ((N, H, W, 3), torch.uint8),
        "colour_NV34": ((N, 2, 3, 4), torch.float32),
        "solarize_NV": ((N, 2), torch.float32),
        "flip_NV": ((N, 2), torch.bool),
        "partner_N": ((N,), torch.int64),
        "mask_NPP": ((N, P, P), torch.bool),
    }
    for name, x in {"target_NHWC": target_NHWC, "other_NHWC": other_NHWC, **random}.items():
        shape, kind = needed[name]
        if tuple(x.shape) != shape or x.dtype != kind:
            raise ValueError(f"{name} must be {kind} of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}")
        if x.device != target_NHWC.device:
            raise ValueError(f"{name} must be on {target_NHWC.device} as target_NHWC is, got {x.device}")
    if P < 1 or H % P or W % P:
        raise ValueError(f"mask_NPP's P must divide H = {H} and W = {W}, got {P}")


@torch.library.custom_op("m3i::patch_mix", mutates_args=())
def _patch_mix(
    target_NHWC: Tensor,
    other_NHWC: Tensor,
    colour_NV34: Tensor,
    solarize_NV: Tensor,
    flip_NV: Tensor,
    partner_N: Tensor,
    mask_NPP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    N = len(partner_N)
    if partner_N.device.type == "cpu" and not bool(((partner_N >= 0) & (partner_N < N)).all()):
        raise ValueError(f"partner_N must be in [0, {N}), got {partner_N.tolist()}")
    return implementation("patch_mix", target_NHWC.device)(
        target_NHWC,
        other_NHWC,
        colour_NV34=colour_NV34,
        solarize_NV=solarize_NV,
        flip_NV=flip_NV,
        partner_N=partner_N,
        mask_NPP=mask_NPP,
        mean=mean,
        std=std,
        dtype=dtype,
    )


@_patch_mix.register_fake
def _(target_NHWC: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    N, H, W, C = target_NHWC.shape
    image_NCHW = target_NHWC.new_empty((N, C, H, W), dtype=arguments[-1])
    return image_NCHW, torch.empty_like(image_NCHW)
