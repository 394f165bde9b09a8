"""What a conversion or a folding did, or would do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SwapReport:
    """What a swap did, or with ``dry_run`` would do.

    Attributes:
        swapped: names of the modules whose class changes ('' is the model itself).
        left: names of other normalization modules, each with the reason it stays as it is.
        advice: names of swapped modules that could do better, each with how.
    """

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    advice: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for the count, then one for each module left or with advice."""
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        lines += [f"  left {name or '(model)'}: {reason}" for name, reason in self.left.items()]
        lines += [f"  {name or '(model)'}: {advice}" for name, advice in self.advice.items()]
        return "\n".join(lines)


@dataclass
class FoldReport:
    """What :func:`fastbn.fold` did, or with ``dry_run`` would do.

    Attributes:
        folded: names of batch norms, each with that of the layer that computes it now.
        left: names of other batch norms, each with the reason it stays as it is.
    """

    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for the count, then one for each batch norm left."""
        lines = [f"{len(self.folded)} folded, {len(self.left)} left"]
        lines += [f"  left {name or '(model)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)
