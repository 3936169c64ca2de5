"""What turns a pooled image vector into category logits and into the space shared with text (METHOD 2 and 3).

Legend: B images, N texts, E pooled width, W text width, F shared width.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from m3i_large.models.init import init_linears

LOG_SCALE_BOUNDS: Final = (0.0, math.log(100.0))
"""What `TextHead.log_scale` is clamped to after each update (METHOD 3)."""


class CategoryHead(nn.Module):
    """A projection and a linear classifier, whose rows are the category embeddings: no normalisation, with bias."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)
        init_linears(self)

    def forward(self, pooled_BE: Tensor) -> Tensor:
        """pooled_BE -> logits (B, num_classes)."""
        return self.head(self.projection(pooled_BE))


class TextHead(nn.Module):
    """CLIP's two projections and its learned temperature.

    `log_scale` has shape (1,), so that weight decay leaves it out like every 1-D parameter; the training step clamps
    it to `LOG_SCALE_BOUNDS` after each update.
    """

    def __init__(self, image_width: int, text_width: int, embed: int) -> None:
        super().__init__()
        self.image_projection = nn.Linear(image_width, embed, bias=False)
        self.text_projection = nn.Linear(text_width, embed, bias=False)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def forward(self, pooled_BE: Tensor, text_NW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns image_BF and text_NF, neither normalised, and the scale 1 / tau, shape (1,), float32."""
        return self.image_projection(pooled_BE), self.text_projection(text_NW), self.log_scale.float().exp()


class GlobalHead(nn.Module):
    """From the student's pooled vector to a guess of the target's: a two-layer perceptron (the decoder of rows c, f,
    i and l of METHOD section 5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.out = nn.Linear(2 * width, width)
        init_linears(self)

    def forward(self, pooled_BE: Tensor) -> Tensor:
        """pooled_BE -> (B, E)."""
        return self.out(nn.functional.gelu(self.norm(self.hidden(pooled_BE))))
