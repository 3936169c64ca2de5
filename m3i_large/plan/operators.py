"""FLOPs and scratch memory of operators: torch's own formulas, and those that it lacks or has wrong.

A FLOP is a multiplication or an addition of a matrix product, a convolution or a deformable convolution; pointwise
operators and norms count nothing, as in every published figure.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

# A sample of a deformable convolution: four corners, and its share of the sum. Multiplications and additions.
DCN_SAMPLE = 2 * (4 + 1)


def operator_flops(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one call of an operator (torch.ops...)."""
    name = func._schema.name
    if name in _OURS:
        return _OURS[name](args, out)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def workspace_bytes(func: Any, args: tuple) -> int:
    """Memory that our kernels take on a GPU while they run, beyond what they return."""
    if func._schema.name == "m3i::dcnv3_backward":
        return 4 * args[1].numel()  # the value's gradient is added up in fp32
    return 0


def _convolution(weight: Tensor, out: Tensor) -> int:
    """Every output element is a sum over a kernel's taps of its group's input channels."""
    return 2 * out.numel() * prod(weight.shape[1:])


def _convolution_backward(args: tuple, out: Any) -> int:
    """Gradients by input and by weight, each as many as forward. (torch's formula ignores groups.)"""
    grad, _, weight = args[:3]
    return _convolution(weight, grad) * sum(x is not None for x in out[:2])


def _dcnv3(args: tuple, out: Tensor) -> int:
    """DCN_SAMPLE for every output element and point; points = offsets / (2 groups)."""
    return DCN_SAMPLE * out.numel() * (args[1].shape[-1] // (2 * args[4]))


def _dcnv3_backward(args: tuple, out: Any) -> int:
    """Twice the forward pass: by the samples, and by what they are made of."""
    grad, _, offset = args[:3]
    return 2 * DCN_SAMPLE * grad.numel() * (offset.shape[-1] // (2 * args[5]))


def _attention(args: tuple, out: Any) -> int:
    """Two matrix products: scores, and values by scores."""
    query, key, value = args[:3]
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(args: tuple, out: Any) -> int:
    """Four matrix products; the scores that the kernel computes again are left out, as usual."""
    return 2 * _attention(args[1:], out)


_OURS: dict[str, Callable[[tuple, Any], int]] = {
    "aten::convolution": lambda args, out: _convolution(args[1], out),
    "aten::convolution_backward": _convolution_backward,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "m3i::dcnv3": _dcnv3,
    "m3i::dcnv3_backward": _dcnv3_backward,
}


class SavingAttention(TorchFunctionMode):
    """Attention as on a GPU, where the scores are never kept; on meta tensors torch would choose matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, mask = _arguments(*args, **kwargs)
        bias = None
        if mask is not None:
            shape = (*query.shape[:-1], key.shape[-2])
            bias = mask.to(query.dtype).expand(shape)
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, bias, True)[0]


def _arguments(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> tuple:
    return query, key, value, attn_mask
