"""The Vision Transformer student, made of timm's blocks under timm's flat state-dict keys.

Legend: B images, C channels, H W pixels, G tokens a side, L = G * G tokens, K kept tokens, D width.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m3i_large.models.config import ViTConfig, check_divides
from m3i_large.models.init import init_linears

NUM_GLOBAL = 4  # blocks in which all tokens of a large image attend to each other, evenly spaced (ViTDet)


class ViT(nn.Module):
    """Pre-norm ViT with a class token and learned positions; no dropout.

    Its keys are those of timm's `vit_base_patch16_224`, which MAE, ViTDet and ViT-Adapter read too. The class token is
    there for them: dense terms and pool read the patch tokens only (METHOD 3).

    `width` D; `image_size` and `token_stride` in pixels; `grid` G; `blocks` are what activation checkpointing wraps.
    """

    def __init__(self, config: ViTConfig, *, num_classes: int = 0) -> None:
        super().__init__()
        check_divides(
            "backbone.arch.image_size", config.image_size, by=config.patch_size, field="backbone.arch.patch_size"
        )
        check_divides("backbone.arch.width", config.width, by=config.heads, field="backbone.arch.heads")
        self.width = config.width
        self.image_size = config.image_size
        self.token_stride = config.patch_size
        self.grid = config.image_size // config.patch_size

        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, config.width))
        # Sizes are checked in `forward`; `as_map` takes others.
        self.patch_embed = PatchEmbed(
            config.image_size, config.patch_size, embed_dim=config.width, strict_img_size=False
        )
        self.window_size = config.window_size
        self.global_blocks = {config.depth * (k + 1) // NUM_GLOBAL - 1 for k in range(NUM_GLOBAL)}
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, mlp_ratio=config.mlp_ratio, qkv_bias=True, drop_path=rate)
            for rate in torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        )
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, num_classes) if num_classes else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.mask_token else None

        # timm's own initialisation; the patch convolution keeps torch's default there too.
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linears(self)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        image_BCHW: Tensor,
        *,
        keep_BK: Tensor | None = None,
        hide_BL: Tensor | None = None,
        as_tokens: bool = False,
        as_logits: bool = False,
        as_map: bool = False,
    ) -> list[Tensor] | Tensor:
        """image_BCHW (B, 3, image_size, image_size) -> [feature map (B, D, G, G)], after the final norm.

        With `as_map` images of any height and width, in multiples of the patch size, give [(B, D, H / p, W / p)],
        without the class token and with attention as `window_size` says. With `as_tokens` what `tokens` returns, with
        `as_logits` what `logits` returns: all are calls of the module, because sharded parameters are present only
        inside one.
        """
        if as_map:
            return [self._map(image_BCHW)]
        expected = (3, self.image_size, self.image_size)
        if image_BCHW.shape[1:] != expected:
            raise ValueError(
                f"image_BCHW: got shape {tuple(image_BCHW.shape)}, needed (B, {', '.join(map(str, expected))})"
            )
        if keep_BK is not None and not as_tokens:
            raise ValueError("keep_BK: dropped tokens leave no map and no whole image, needed as_tokens=True")
        patch_BLD = self.patch_embed(image_BCHW)
        if hide_BL is not None:
            if self.mask_token is None:
                raise ValueError("hide_BL: the model has no mask token, needed backbone.arch.mask_token true")
            patch_BLD = torch.where(hide_BL[..., None], self.mask_token.to(patch_BLD.dtype), patch_BLD)
        patch_BLD = patch_BLD + self.pos_embed[:, 1:]
        if keep_BK is not None:
            patch_BLD = patch_BLD.take_along_dim(keep_BK[..., None], dim=1)
        class_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(image_BCHW), -1, -1)
        x = torch.cat([class_B1D, patch_BLD], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if as_logits:
            if self.head is None:
                raise ValueError("logits: the model was built with num_classes 0, needed 1 or more")
            return self.head(x[:, 0])
        token_BLD = x[:, 1:]
        if as_tokens:
            return token_BLD
        return [token_BLD.transpose(1, 2).unflatten(2, (self.grid, self.grid))]

    def _map(self, image_BCHW: Tensor) -> Tensor:
        """As ViTDet reads a plain ViT (arXiv 2203.16527, section 3): positions interpolated, attention in windows."""
        height, width = image_BCHW.shape[2:]
        if height % self.token_stride or width % self.token_stride or image_BCHW.shape[1] != 3:
            raise ValueError(
                f"image_BCHW: got shape {tuple(image_BCHW.shape)}, needed (B, 3, H, W) with H and W in multiples of "
                f"{self.token_stride}"
            )
        grid = [height // self.token_stride, width // self.token_stride]
        table_1LD = resample_abs_pos_embed(self.pos_embed, grid, old_size=[self.grid, self.grid], num_prefix_tokens=1)[
            :, 1:
        ]
        x_BLD = self.patch_embed(image_BCHW) + table_1LD
        for index, block in enumerate(self.blocks):
            if self.window_size is None or index in self.global_blocks:
                x_BLD = block(x_BLD)
            else:
                x_BHWD = x_BLD.unflatten(1, (grid[0], grid[1]))
                x_BLD = in_windows(block, x_BHWD, self.window_size).flatten(1, 2)
        return self.norm(x_BLD).transpose(1, 2).unflatten(2, (grid[0], grid[1]))

    def tokens(self, image_BCHW: Tensor, keep_BK: Tensor | None = None, hide_BL: Tensor | None = None) -> Tensor:
        """Patch tokens after the final norm, row-major, without the class token -> (B, L, D).

        keep_BK (int64, indices into the L patches): only these enter the blocks; the result is (B, K, D) in its order.
        hide_BL (bool): these patches enter as the mask token, which the model must have (`mask_token`).
        """
        return self(image_BCHW, keep_BK=keep_BK, hide_BL=hide_BL, as_tokens=True)

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """The classifier on the class token, as timm's -> (B, num_classes). ValueError without a classifier."""
        return self(image_BCHW, as_logits=True)


def in_windows(block: nn.Module, x_BHWD: Tensor, size: int) -> Tensor:
    """A Transformer block whose attention stays inside windows of size x size tokens -> the shape of x_BHWD.

    A map that the windows do not divide is padded with zeros at the bottom and on the right, which attend too, as in
    ViTDet. Drop path leaves out windows, not images.
    """
    num, height, width, _ = x_BHWD.shape
    down, across = -height % size, -width % size
    padded_BHWD = F.pad(x_BHWD, (0, 0, 0, across, 0, down))
    rows, columns = (height + down) // size, (width + across) // size
    cut = padded_BHWD.unflatten(2, (columns, size)).unflatten(1, (rows, size))  # B, rows, size, columns, size, D
    window_VLD = block(cut.transpose(2, 3).flatten(0, 2).flatten(1, 2))
    back = window_VLD.unflatten(1, (size, size)).unflatten(0, (num, rows, columns)).transpose(2, 3)
    return back.flatten(3, 4).flatten(1, 2)[:, :height, :width]
