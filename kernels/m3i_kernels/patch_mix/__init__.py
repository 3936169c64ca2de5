"""Two uint8 views to the mixed and the target image: colour, normalise, flip, mix."""

from m3i_kernels.patch_mix.op import patch_mix

__all__ = ["patch_mix"]
