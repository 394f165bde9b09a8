"""The shapes to measure, all of them and nowhere else."""

from __future__ import annotations

from fastbn.networks import RESNET50, Layer

__all__ = ["RESNET50", "RESNET50_STAGES", "Layer"]

# The widest shape at each resolution.
RESNET50_STAGES = tuple(RESNET50[i] for i in (0, 2, 5, 8, 11))
