"""From uint8 images to what a backbone was trained on.

Legend: B images, H W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtracts the mean and divides by the standard deviation of each channel.

    Args:
        mean, std: of the pixels (0 to 1, RGB).
    """

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent: constants of the weights, which a checkpoint's recipe and weights file hold already.
        self.register_buffer("mean_311", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std_311", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, image_BCHW: Tensor, size_B2: Tensor | None = None) -> Tensor:
        """image_BCHW uint8 -> float32; zeros, which is the mean colour, beyond each image's (height, width)."""
        image_BCHW = (image_BCHW.float() - self.mean_311) / self.std_311
        if size_B2 is None:
            return image_BCHW
        out_BCHW = torch.zeros_like(image_BCHW)
        for image_CHW, out_CHW, (height, width) in zip(image_BCHW, out_BCHW, size_B2.tolist(), strict=True):
            out_CHW[:, :height, :width] = image_CHW[:, :height, :width]
        return out_BCHW
