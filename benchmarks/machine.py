"""The machine and the versions that figures were measured with; nothing identifies anyone."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fastbn
from fastbn._backend import cpu_capability

if TYPE_CHECKING:
    from collections.abc import Mapping


def best_device() -> str:
    """``cuda`` where there is a GPU and this fastbn has kernels for it, else ``cpu``."""
    on_gpu = fastbn.build_info()["cuda"] is not None and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def _gpu(device: str) -> dict[str, str | int]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "kernels for": str(fastbn.build_info()["architectures"]),
        "algorithm": os.environ.get("FASTBN_CUDA_ALGORITHM", "auto"),
    }


def environment(device: str = "cpu") -> dict[str, str | int | float]:
    """Processor, threads, GPU if that is the device, versions and date, as they stand now.

    The environment variable FASTBN_COMMIT names the commit where sources came without history.
    """
    build = fastbn.build_info()
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        **(_gpu(device) if device != "cpu" else {}),
        "fastbn": str(build["fastbn"]),
        "fastbn commit": os.environ.get("FASTBN_COMMIT") or str(build["commit"]),
        "fastbn loops": cpu_capability(),
        "torch": torch.__version__,
        "torch loops": torch.backends.cpu.get_cpu_capability().lower(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def name_of(environment: Mapping[str, str | int | float]) -> str:
    """What was measured on, in a few words."""
    if "gpu" in environment:
        return str(environment["gpu"])
    return (
        f"{environment['cpu']} with {environment['fastbn loops']}, {environment['threads']} threads"
    )
