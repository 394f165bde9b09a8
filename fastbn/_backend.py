"""Loads the compiled module, after making sure that it fits the running torch.

The one place that can say "rebuild me": a module built for another torch fails to load with a
mangled symbol for a message, or worse, loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation fastbn"


def _minor(version: str) -> str:
    """``2.13`` of ``2.13.0+cpu``: what torch's binary interface may change with."""
    return ".".join(version.split("+")[0].split(".")[:2])


def mismatch(record: dict[str, str | None], version: str, cuda: str | None) -> str | None:
    """Says in one sentence why a build does not fit a torch; None if it does.

    Args:
        record: the build record.
        version: ``torch.__version__`` of the running torch.
        cuda: ``torch.version.cuda`` of the running torch.
    """
    built, built_cuda = str(record["torch"]), record["cuda"]
    same_cuda = built_cuda is None or (
        cuda is not None and built_cuda.split(".")[0] == cuda.split(".")[0]
    )
    if _minor(built) == _minor(version) and same_cuda:
        return None
    built_for = f"torch {built}" + (f" with CUDA {built_cuda}" if built_cuda else "")
    running = f"torch {version}" + (f" with CUDA {cuda}" if built_cuda and cuda else "")
    return (
        f"fastbn {record['fastbn']} was built for {built_for}, but this is {running}; "
        f"rebuild it with: {REBUILD}"
    )


def load() -> tuple[ModuleType, dict[str, str | None]]:
    """Returns the compiled module and its build record.

    Raises:
        ImportError: fastbn is not compiled here, or for another torch.
    """
    try:
        from . import _build_info
    except ImportError as error:
        raise ImportError(
            f"fastbn is not compiled in {Path(__file__).parent}; if that is its source tree, run "
            "pip install --no-build-isolation -e . there, or run Python from another folder to "
            "import the fastbn that is installed"
        ) from error
    record = _build_info.RECORD
    problem = mismatch(record, torch.__version__, torch.version.cuda)
    if problem:
        raise ImportError(problem)
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"fastbn {record['fastbn']}, built for torch {record['torch']}, does not load here "
            f"({error}); rebuild it with: {REBUILD}"
        ) from error
    return _C, record


_C, _record = load()

# Texts of errors, by name, which the compiled checks use, too; each {} stands for an argument.
messages: dict[str, str] = _C.messages

# Names of the compiled activation functions.
activation_functions: tuple[str, ...] = _C.activation_functions

# Those whose derivative forward keeps as a mask; the bytes of x that a byte of it is for, and how
# many it has at most. See csrc/core/mask.h.
functions_with_two_slopes: tuple[str, ...] = _C.functions_with_two_slopes
masked_bytes: int = _C.masked_bytes
max_mask_bytes: int = _C.max_mask_bytes


def cpu_capability() -> str:
    """Instruction set of the CPU loops: ``scalar``, ``default``, ``avx2`` or ``avx512``."""
    capability: str = _C.cpu_capability()
    return capability


def build_info() -> dict[str, str | None]:
    """What this fastbn was built from and for.

    Returns:
        ``fastbn``, ``torch`` (versions), ``cuda`` (version, or None for a CPU build),
        ``architectures`` (of the GPU kernels, or None), ``compiler`` and ``commit``.
    """
    return dict(_record)
