"""Where a deformable convolution samples, before its offsets (InternImage's DCNv3)."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """The numbers of the operator; sizes in pixels, all positive, padding 0 or more."""

    groups: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    offset_scale: float = 1.0
    remove_center: bool = False

    @property
    def num_points(self) -> int:
        return self.kernel_size**2 - self.remove_center

    @property
    def half(self) -> int:
        """From the first point of the grid to its middle, before offset_scale."""
        return self.dilation * (self.kernel_size - 1) // 2

    @property
    def first_center(self) -> int:
        """Coordinate (row or column of the value) of the middle of the grid at output pixel 0."""
        return self.half - self.padding

    def points(self) -> list[tuple[int, int]]:
        """(x, y) of each point relative to the middle, before offset_scale: column by column, top to bottom."""
        steps = [self.dilation * i - self.half for i in range(self.kernel_size)]
        points = [(x, y) for x in steps for y in steps]
        if self.remove_center:
            del points[self.kernel_size**2 // 2]
        return points

    def output_size(self, size: int) -> int:
        """Rows or columns of the output for that many of the value; 0 or less where the kernel does not fit."""
        return (size + 2 * self.padding - self.dilation * (self.kernel_size - 1) - 1) // self.stride + 1
