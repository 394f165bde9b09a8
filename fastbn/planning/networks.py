"""The batch norms of networks, and the plans for all of them: ``python -m fastbn plan``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .plan import Plan, dtype_name, plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from .plan import Algorithm, Layout, Op


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


# The 53 batch norms of ResNet-50 on images of 224 x 224: He et al., "Deep residual learning for
# image recognition" (2016), with the stride in the 3 x 3 convolutions, as torchvision has it.
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
MODELS = {"resnet50": RESNET50}


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, and the plan for one batch norm of it."""

    layer: Layer
    plan: Plan

    def record(self) -> dict[str, Any]:
        """The attributes of both and what follows from them, for JSON."""
        return {
            **asdict(self.layer),
            **asdict(self.plan),
            "dtype": dtype_name(self.plan.dtype),
            "bytes_moved": self.plan.bytes_moved,
            "bytes_per_element": self.plan.bytes_per_element,
            "share": self.plan.share,
        }


@dataclass(frozen=True)
class Totals:
    """Sums over operations on the batch norms of a network: each layer as often as it has that.

    Attributes:
        launches: kernels launched.
        bytes_moved: of activations.
        floor_bytes: if each input were read once and each output written once.
        share: ``floor_bytes / bytes_moved``.
        microseconds: predicted.
    """

    launches: int
    bytes_moved: int
    floor_bytes: int
    share: float
    microseconds: float

    @staticmethod
    def of(planned: Iterable[PlannedLayer]) -> Totals:
        """Adds up plans."""
        launches = moved = floor = 0
        microseconds = 0.0
        for row in planned:
            launches += row.layer.count * row.plan.launches
            moved += row.layer.count * row.plan.bytes_moved
            floor += row.layer.count * row.plan.floor_bytes
            microseconds += row.layer.count * row.plan.microseconds
        return Totals(launches, moved, floor, floor / moved, round(microseconds, 3))


@dataclass(frozen=True)
class NetworkPlan:
    """Plans for operations on every layer of a network; see :func:`plan_network`."""

    layers: tuple[Layer, ...]
    by_op: dict[Op, list[PlannedLayer]]

    @property
    def device(self) -> str:
        """Name of the GPU."""
        return next(self._all()).plan.device

    @property
    def count(self) -> int:
        """How many batch norms the network has."""
        return sum(layer.count for layer in self.layers)

    def _all(self) -> Iterator[PlannedLayer]:
        return (row for planned in self.by_op.values() for row in planned)

    def record(self) -> dict[str, Any]:
        """``layers``, a row for each operation and layer, and ``totals``, for JSON."""
        return {
            "layers": [row.record() for row in self._all()],
            "totals": {
                "count": self.count,
                **asdict(Totals.of(self._all())),
                "by_op": {op: asdict(Totals.of(planned)) for op, planned in self.by_op.items()},
            },
        }

    def table(self) -> str:
        """A row for each layer, one for the totals of each operation, the last for those of all."""
        rows = []
        for op, planned in self.by_op.items():
            rows += [_layer_cells(row) for row in planned]
            if len(self.by_op) > 1:
                rows.append(_total_cells(op, self.count, Totals.of(planned)))
        rows.append(_total_cells("total", self.count, Totals.of(self._all())))
        return _aligned(rows)


def plan_network(
    layers: tuple[Layer, ...],
    batch: int,
    ops: Sequence[Op],
    *,
    dtype: torch.dtype | str,
    layout: Layout,
    device: str | int | torch.device | None = None,
    algorithm: Algorithm | None = None,
) -> NetworkPlan:
    """Plans operations on every layer of a network.

    Args:
        layers: of the network, such as ``RESNET50``.
        batch: N, positive.
        ops: one or more.
        dtype: as :func:`fastbn.plan` takes it; so are the arguments that follow.
        layout: see there.
        device: see there.
        algorithm: see there.

    Raises:
        ValueError: as :func:`fastbn.plan` does.
    """
    by_op: dict[Op, list[PlannedLayer]] = {}
    for op in ops:
        by_op[op] = [
            PlannedLayer(
                layer,
                plan(
                    (batch, layer.channels, layer.height, layer.width),
                    dtype=dtype,
                    layout=layout,
                    op=op,
                    device=device,
                    algorithm=algorithm,
                ),
            )
            for layer in layers
        ]
    return NetworkPlan(layers, by_op)


def _layer_cells(row: PlannedLayer) -> dict[str, str]:
    layer, planned = row.layer, row.plan
    return {
        "op": planned.op,
        "layer": str(layer),
        "algorithm": planned.algorithm,
        "count": str(layer.count),
        "launches": str(planned.launches),
        "blocks": str(planned.grid),
        "cluster": str(planned.cluster),
        "threads": str(planned.block),
        "vector": f"{planned.vector_bytes} B",
        "B/element": f"{planned.bytes_per_element:.4g}",
        "floor": f"{planned.floor_per_element:g}",
        "share": f"{planned.share:.0%}",
        "GB": f"{layer.count * planned.bytes_moved / 1e9:.3f}",
        "floor GB": f"{layer.count * planned.floor_bytes / 1e9:.3f}",
        "us": f"{layer.count * planned.microseconds:.0f}",
    }


def _total_cells(op: str, count: int, totals: Totals) -> dict[str, str]:
    return {
        "op": op,
        "layer": "all",
        "count": str(count),
        "launches": str(totals.launches),
        "share": f"{totals.share:.0%}",
        "GB": f"{totals.bytes_moved / 1e9:.3f}",
        "floor GB": f"{totals.floor_bytes / 1e9:.3f}",
        "us": f"{totals.microseconds:.0f}",
    }


def _aligned(rows: list[dict[str, str]]) -> str:
    """Rows under the names of their columns: words to the left, numbers to the right."""
    lines = [""] * (1 + len(rows))
    for name in rows[0]:
        cells = [name, *(row.get(name, "") for row in rows)]
        width = max(map(len, cells))
        words = name in ("op", "layer", "algorithm")
        for i, cell in enumerate(cells):
            lines[i] += (cell.ljust(width) if words else cell.rjust(width)) + "  "
    return "\n".join(line.rstrip() for line in lines)
