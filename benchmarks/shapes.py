"""The shapes to measure, all of them and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A batch norm of a network, without the batch.

    Attributes:
        channels: C.
        height: H of its input, in pixels.
        width: W of its input, in pixels.
        count: how many batch norms of this shape the network has.
    """

    channels: int
    height: int
    width: int
    count: int

    def __str__(self) -> str:
        """Shape of one sample, CxHxW."""
        return f"{self.channels}x{self.height}x{self.width}"


# The 53 batch norms of ResNet-50 (He et al., 2016) on images of 224 x 224.
RESNET50 = (
    Layer(64, 112, 112, 1),
    Layer(64, 56, 56, 6),
    Layer(256, 56, 56, 4),
    Layer(128, 56, 56, 1),
    Layer(128, 28, 28, 7),
    Layer(512, 28, 28, 5),
    Layer(256, 28, 28, 1),
    Layer(256, 14, 14, 11),
    Layer(1024, 14, 14, 7),
    Layer(512, 14, 14, 1),
    Layer(512, 7, 7, 5),
    Layer(2048, 7, 7, 4),
)

# The widest shape at each resolution.
RESNET50_STAGES = tuple(RESNET50[i] for i in (0, 2, 5, 8, 11))
