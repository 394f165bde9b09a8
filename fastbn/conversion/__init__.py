"""Changes the batch norms of a model: stock's to fastbn's, and back."""

from .convert import convert, revert
from .report import SwapReport

__all__ = ["SwapReport", "convert", "revert"]
