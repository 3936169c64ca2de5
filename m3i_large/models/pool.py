"""Attention pooling of a token map into one vector, under InternImage-H's official names (METHOD 3).

Legend: B images, L tokens, D width of the tokens, E width of the pooled vector, M heads.
"""

import torch
from torch import Tensor, nn

from m3i_large.models.config import PoolConfig, check_divides
from m3i_large.models.init import init_linears

EPS = 1e-6


class AttentionPool(nn.Module):
    """The mean of the tokens attends over all of them; then projection and LayerNorm. No residual, no MLP."""

    def __init__(self, width: int, config: PoolConfig) -> None:
        super().__init__()
        check_divides("the backbone's width", width, by=config.heads, field="pool.heads")
        self.width = config.width
        self.clip_projector = MeanQueryAttention(width, config)
        self.fc_norm = indexed_norm(config.width)
        init_linears(self)

    def forward(self, token_BLD: Tensor, *, seen: list[Tensor] | None = None) -> Tensor:
        """token_BLD -> (B, E). A list is given how much each head looks at each token: (B, M, L), sums to one over L.

        The list is filled on the way, as a sharded layer's weights are there in its own forward pass only.
        """
        return self.fc_norm(self.clip_projector(token_BLD, seen=seen))


class MeanQueryAttention(nn.Module):
    """The mean token as query, with a LayerNorm each for query, key and value: (B, L, D) -> (B, E).

    `linear` is the class of its layers: with torch's own, who builds it draws the weights.
    """

    def __init__(self, width: int, config: PoolConfig, *, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.norm1_q = indexed_norm(width)
        self.norm1_k = indexed_norm(width)
        self.norm1_v = indexed_norm(width)
        self.cross_dcn = _CrossAttention(width, config, linear)

    def forward(self, token_BLD: Tensor, *, seen: list[Tensor] | None = None) -> Tensor:
        query_B1D = token_BLD.mean(dim=1, keepdim=True)
        given = self.norm1_q(query_B1D), self.norm1_k(token_BLD), self.norm1_v(token_BLD)
        return self.cross_dcn(*given, seen=seen).squeeze(1)


class _CrossAttention(nn.Module):
    """Multi-head attention whose q, k and v biases are parameters of its own, as the official checkpoints name them."""

    def __init__(self, width: int, config: PoolConfig, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = linear(width, width, bias=False)
        self.k = linear(width, width, bias=False)
        self.v = linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = linear(width, config.width)

    def forward(
        self, query_B1D: Tensor, key_BLD: Tensor, value_BLD: Tensor, *, seen: list[Tensor] | None = None
    ) -> Tensor:
        query, key, value = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.q(query_B1D) + self.q_bias, self.k(key_BLD) + self.k_bias, self.v(value_BLD) + self.v_bias)
        )
        if seen is not None:
            logit_BM1L = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
            seen.append(logit_BM1L.softmax(-1).squeeze(2))
        pooled_BM1d = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(pooled_BM1d.transpose(1, 2).flatten(2))


def indexed_norm(width: int) -> nn.Sequential:
    """A LayerNorm in a Sequential of one: the official names carry its index (norm1_q.0.weight)."""
    return nn.Sequential(nn.LayerNorm(width, eps=EPS))
