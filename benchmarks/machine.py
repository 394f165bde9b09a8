"""Where and with what the figures were measured; nothing that identifies anyone."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path

import torch

import fastbn
from fastbn._backend import cpu_capability


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, str | int]:
    """Processor, threads, versions and date, as they stand now."""
    build = fastbn.build_info()
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "fastbn": str(build["fastbn"]),
        "fastbn commit": str(build["commit"]),
        "fastbn loops": cpu_capability(),
        "torch": torch.__version__,
        "torch loops": torch.backends.cpu.get_cpu_capability().lower(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
