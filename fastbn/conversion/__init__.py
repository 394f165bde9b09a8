"""Changes the batch norms of a model: others' to fastbn's, and back."""

from .adapters import Adapter, register
from .convert import convert, revert
from .freeze import freeze, unfreeze
from .report import SwapReport

__all__ = ["Adapter", "SwapReport", "convert", "freeze", "register", "revert", "unfreeze"]
