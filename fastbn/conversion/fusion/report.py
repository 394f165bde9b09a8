"""What fusing did, or would do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fusion:
    """A batch norm and what it is fused with.

    Attributes:
        activation: name of the activation function.
        residual: whether something is added before.
    """

    activation: str
    residual: bool

    def __str__(self) -> str:
        return f"addition and {self.activation}" if self.residual else self.activation


@dataclass
class FusionReport:
    """What :func:`fastbn.fuse` did, or with ``dry_run`` would do.

    Attributes:
        fused: names of batch norms, each with what it is fused with.
        left: names of batch norms that an activation follows, or may follow, each with the reason
            it stays alone.
    """

    fused: dict[str, Fusion] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for the count, then one for each batch norm."""
        lines = [f"{len(self.fused)} fused, {len(self.left)} left"]
        lines += [f"  fused {name or '(model)'}: {fusion}" for name, fusion in self.fused.items()]
        lines += [f"  left {name or '(model)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)
