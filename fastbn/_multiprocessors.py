"""How many multiprocessors of a GPU persistent grids leave to kernels of other streams.

All blocks of a grid must run at once. Beside the kernel of a collective, which waits for other
processes and keeps its multiprocessors for that long, a grid over the whole GPU would have to wait
for it or hold it up. This is the one place that decides; the planner is told.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import TYPE_CHECKING

import torch.distributed

from ._backend import _C

if TYPE_CHECKING:
    from collections.abc import Callable

VARIABLE = "FASTBN_CUDA_FREE_SMS"

# With torch.distributed. NCCL launches a block for each of its channels, of which a communicator
# on one node has 32 at most; usual ones have 8 to 24.
BESIDE_COLLECTIVES = 32

# Torch may be built without torch.distributed.
_is_initialized: Callable[[], bool] = getattr(torch.distributed, "is_initialized", lambda: False)

# What the backend was told last; it starts with none.
_told = 0


@cache
def _from_environment() -> int | None:
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", given):
        raise ValueError(
            f"{VARIABLE} is {given!r}, but it takes the number of multiprocessors that persistent "
            "grids leave free, such as 0 or 32; correct or unset it"
        )
    return int(given)


def free_multiprocessors() -> int:
    """What the environment says; else some if torch.distributed is initialized, else none."""
    given = _from_environment()
    if given is not None:
        return given
    return BESIDE_COLLECTIVES if _is_initialized() else 0


def leave_multiprocessors_free() -> None:
    """Tells the CUDA backend of a change.

    Called before every eager operation, and when one is traced: a graph that was compiled before
    torch.distributed was initialized, or an operator called by its own name, does not ask again.
    """
    global _told
    free = free_multiprocessors()
    if free != _told:
        _C.leave_free(free)
        _told = free
