"""The dense decoder: predicts target features at positions given relative to the input view (METHOD 3 and 4).

Legend: B rows, K context tokens, L query positions, D decoder width, 4 = (row, col, 10 ln dh, 10 ln dw).
"""

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m3i_large.models.config import DecoderConfig, check_divides
from m3i_large.models.init import init_linears_xavier


class PositionEmbedding(nn.Module):
    """sin and cos of the four numbers of a position, then a trained Linear(2D, D) (METHOD 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        check_divides("decoder.width", width, by=4, field="position frequencies")
        self.num_frequencies = width // 4
        self.linear = nn.Linear(2 * width, width)

    def forward(self, position_BL4: Tensor, *, dtype: torch.dtype) -> Tensor:
        """position_BL4 (row and col in patches, as float32) -> (B, L, D) of `dtype`, the module's own.

        Feature order: [row, col, dh, dw] x [sin, cos] x [frequency 10000^(-k / (D/4)), k < D/4], computed in float32
        whatever `dtype` is: bfloat16 rounds a position of 10.3 patches to 10.3125, one of 100.3 to 100.5.
        """
        # Made here: a frequency buffer would follow the model into bfloat16.
        k = torch.arange(self.num_frequencies, device=position_BL4.device, dtype=torch.float32)
        angle_BL4k = position_BL4.float()[..., None] * 10000 ** (-k / self.num_frequencies)
        feature = torch.stack([angle_BL4k.sin(), angle_BL4k.cos()], dim=-2).flatten(-3)
        return self.linear(feature.to(dtype))


class DenseDecoder(nn.Module):
    """Context tokens and mask tokens, each with its position, through pre-norm Transformer blocks.

    One decoder serves the intra- and the inter-view term. `blocks` are what activation checkpointing wraps.
    """

    def __init__(self, backbone_width: int, config: DecoderConfig, *, out: int | None = None) -> None:
        super().__init__()
        width = config.width or backbone_width
        check_divides("decoder.width", width, by=config.heads, field="decoder.heads")
        self.width = width
        self.project_in = nn.Linear(backbone_width, width) if width != backbone_width else nn.Identity()
        self.position = PositionEmbedding(width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, config.heads, qkv_bias=True) for _ in range(config.layers))
        self.norm = LayerNorm(width)
        self.project_out = nn.Linear(width, out or backbone_width)
        init_linears_xavier(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, context_BKD: Tensor, context_position_BK4: Tensor, query_position_BL4: Tensor) -> Tensor:
        """context_BKD (the backbone's width) at its positions, and the positions to predict -> (B, L, `out`, by
        default the backbone's width).

        The order of the context does not matter. ValueError if tokens and positions do not match.
        """
        if context_position_BK4.shape != (*context_BKD.shape[:2], 4):
            raise ValueError(
                f"context_position_BK4: got shape {tuple(context_position_BK4.shape)}, "
                f"needed {(*context_BKD.shape[:2], 4)} for context {tuple(context_BKD.shape)}"
            )
        num_rows, num_queries, _ = query_position_BL4.shape
        context = self.project_in(context_BKD)
        position_BS4 = torch.cat([context_position_BK4, query_position_BL4], dim=1)
        x = torch.cat([context, self.mask_token.expand(num_rows, num_queries, -1)], dim=1)
        x = x + self.position(position_BS4, dtype=x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.project_out(self.norm(x[:, -num_queries:]))


class LinearDecoder(nn.Module):
    """One linear map from every token to the target at its own place: no mask tokens, no positions."""

    def __init__(self, backbone_width: int, *, out: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.linear = nn.Linear(backbone_width, out or backbone_width)
        init_linears_xavier(self)

    def forward(self, context_BKD: Tensor, context_position_BK4: Tensor, query_position_BL4: Tensor) -> Tensor:
        """context_BKD (B, L, backbone width), row-major -> (B, L, out). ValueError if some tokens are missing."""
        if context_BKD.shape[1] != query_position_BL4.shape[1]:
            raise ValueError(
                f"context_BKD: got {context_BKD.shape[1]} tokens, needed all {query_position_BL4.shape[1]} of the image"
            )
        return self.linear(context_BKD)
