"""Where tests compute: on the CPU, and on a GPU where there is one, or where one is required."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import torch
from torch._C._autograd import DeviceType

import fastbn

if TYPE_CHECKING:
    from collections.abc import Callable

GPU = "cuda"


def _why_no_gpu() -> str | None:
    if fastbn.build_info()["cuda"] is None:
        return "this fastbn was built without CUDA kernels"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


# Why nothing can be computed on a GPU; None if it can.
MISSING = _why_no_gpu()
# Turns what would be left out into a failure.
REQUIRED = os.environ.get("FASTBN_REQUIRE_CUDA") == "1"
DEVICES = ["cpu", GPU] if REQUIRED or MISSING is None else ["cpu"]


def short_name(kernel: str) -> str:
    """Of fastbn's kernels ``fastbn::`` and their name; others in full."""
    return re.sub(r"^.*?fastbn::cuda::(\w+)<.*$", r"fastbn::\1", kernel)


def only_fastbn(kernels: list[str]) -> list[str]:
    """Without those of torch, which fills new memory where algorithms must be deterministic."""
    return [kernel for kernel in kernels if kernel.startswith("fastbn::")]


def kernels(call: Callable[[], object]) -> list[str]:
    """What a call puts on the GPU, in order, by short names."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    call()  # what is done only once is not of interest
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    done = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    done.sort(key=lambda event: event.time_range.start)
    return [short_name(event.name) for event in done]
