"""The shapes to measure, all of them and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from fastbn.planning.networks import RESNET50, Layer

__all__ = ["RESNET50", "RESNET50_STAGES", "Layer", "Shape", "ShapeSet", "shape_sets"]

# The widest layer at each resolution.
RESNET50_STAGES = tuple(RESNET50[i] for i in (0, 2, 5, 8, 11))


@dataclass(frozen=True)
class Shape:
    """Sizes of an input (N, C, ...), and how often its network has a batch norm of that shape."""

    sizes: tuple[int, ...]
    count: int = 1

    @staticmethod
    def of(layer: Layer, batch: int) -> Shape:
        """A layer of a network with a batch of so many images."""
        return Shape((batch, layer.channels, layer.height, layer.width), layer.count)

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes))


@dataclass(frozen=True)
class ShapeSet:
    """Shapes of one use.

    Attributes:
        about: the use, in words.
        shapes: all of them.
        quick: those that stand for the others where time is short.
        needs_gpu: whether they take longer on a CPU than anyone would wait.
    """

    about: str
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    needs_gpu: bool = False


def _set(about: str, *sizes: tuple[int, ...], quick: int, needs_gpu: bool = False) -> ShapeSet:
    """A set of which one shape, by its index, stands for the others."""
    shapes = tuple(map(Shape, sizes))
    return ShapeSet(about, shapes, (shapes[quick],), needs_gpu)


def shape_sets(batch: int) -> dict[str, ShapeSet]:
    """All sets by name.

    Args:
        batch: images in one of ResNet-50; the others have theirs.
    """
    return {
        "resnet50": ShapeSet(
            f"the batch norms of ResNet-50, batches of {batch} images of 224 x 224",
            tuple(Shape.of(layer, batch) for layer in RESNET50),
            tuple(Shape.of(layer, batch) for layer in RESNET50_STAGES),
        ),
        "detection": _set(
            "a detector's backbone, 2 images of 800 x 1344",
            (2, 64, 400, 672),
            (2, 256, 200, 336),
            (2, 512, 100, 168),
            (2, 1024, 50, 84),
            (2, 2048, 25, 42),
            quick=2,
        ),
        "segmentation3d": _set(
            "a 3-D U-Net, 2 patches of 96 x 96 x 96 voxels",
            (2, 32, 96, 96, 96),
            (2, 64, 48, 48, 48),
            (2, 128, 24, 24, 24),
            (2, 256, 12, 12, 12),
            (2, 320, 6, 6, 6),
            quick=2,
        ),
        "tall": _set(
            "BatchNorm1d on tall matrices",
            (1048576, 32),
            (131072, 128),
            (16384, 1024),
            (4096, 4096),
            quick=2,
        ),
        "tiny": _set(
            "so small that the call is what it costs",
            (2, 8, 2, 2),
            (32, 64),
            (8, 64, 7, 7),
            (1, 16, 32, 32),
            quick=2,
        ),
        "published": _set(
            "a size that others have published times of",
            (4, 128, 1024, 1024),
            quick=0,
            needs_gpu=True,
        ),
    }
