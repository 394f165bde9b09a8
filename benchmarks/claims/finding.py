"""What came of a claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Finding:
    """A claim that was put to the test.

    Attributes:
        number: the claim's, from 1.
        claim: what the article says.
        held: whether it did here.
        figures: what was measured, by name.
        sentence: the verdict in words, with the figures that it rests on.
        draw: draws them into two axes side by side.
    """

    number: int
    claim: str
    held: bool
    figures: dict[str, float]
    sentence: str
    draw: Callable[[Axes, Axes], None]

    @property
    def verdict(self) -> str:
        """``held`` or ``did not hold``."""
        return "held" if self.held else "did not hold"
