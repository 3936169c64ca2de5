"""InternImage's deformable convolution, version 3: softmax, sampling and centre blend in one operator."""

from m3i_kernels.dcnv3.op import dcnv3

__all__ = ["dcnv3"]
