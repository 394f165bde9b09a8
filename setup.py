"""Builds fastbn's compiled module against the torch of this environment.

Environment variables:

* ``FASTBN_CUDA``: ``auto`` (default: CUDA kernels if torch has CUDA and a toolkit for it is found),
  ``0`` or ``1`` (fail where they cannot be built). ``FORCE_CUDA=1`` means the same as ``1``.
* ``CUDA_HOME``: the toolkit's folder; by default it is asked of the nvcc on the path.
* ``TORCH_CUDA_ARCH_LIST``: GPU architectures to compile for, such as ``8.0;9.0+PTX``; by
  default those of the GPUs at hand or, without any, all that are supported.
* ``MAX_JOBS``: compilers to run side by side; the default depends on cores and free memory.
* ``FASTBN_TORCH_PIN=1``: the wheel requires the minor version of torch it was built with.
* ``FASTBN_LOCAL_VERSION``: suffix of the version, such as ``cu130torch2.13``.
"""

from __future__ import annotations

import os
import pprint
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which build front ends leave out
import setup_cuda

VERSION = "0.1.0"
ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"
GIBIBYTES_PER_JOB = 3


def version() -> str:
    local = os.environ.get("FASTBN_LOCAL_VERSION")
    return f"{VERSION}+{local}" if local else VERSION


def requirements() -> list[str]:
    if os.environ.get("FASTBN_TORCH_PIN") == "1":
        import torch

        major, minor = torch.__version__.split(".")[:2]
        return [f"torch=={major}.{minor}.*", "numpy"]
    return ["torch>=2.11", "numpy"]


def sources(*patterns: str) -> list[str]:
    """Paths below csrc, relative to this file, as setuptools wants them."""
    found = sorted(path for pattern in patterns for path in SOURCES.glob(pattern))
    return [str(path.relative_to(ROOT)) for path in found]


def cuda_toolkit() -> setup_cuda.Toolkit | None:
    """What to compile the CUDA kernels with; None to build without them."""
    import torch

    wish = os.environ.get("FASTBN_CUDA", "1" if os.environ.get("FORCE_CUDA") == "1" else "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FASTBN_CUDA is {wish!r}; it may be auto, 0 or 1.")
    if wish == "0":
        return None
    try:
        return setup_cuda.find(torch.__version__, torch.version.cuda)
    except setup_cuda.NoToolkitError as reason:
        if wish == "1":
            sys.exit(f"FASTBN_CUDA=1, but {reason}, or set FASTBN_CUDA=0.")
        if torch.version.cuda:
            print(f"fastbn is built without CUDA kernels, as {reason}.", file=sys.stderr)
        return None


def architectures(toolkit: setup_cuda.Toolkit) -> str:
    """Of the GPUs at hand, or else those that a wheel should have."""
    import torch

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    capabilities = sorted({torch.cuda.get_device_capability(device) for device in devices})
    if capabilities:
        return ";".join(f"{major}.{minor}" for major, minor in capabilities)
    return setup_cuda.architectures(toolkit.version)


def free_gibibytes() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return float(GIBIBYTES_PER_JOB)


def commit() -> str:
    given = os.environ.get("FASTBN_COMMIT")  # for sources that travel without their repository
    if given:
        return given
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0]


def extension_arguments() -> dict[str, Any]:
    """What needs torch: absent for commands that only pack or describe the sources."""
    try:
        import torch
    except ImportError:
        if {"sdist", "egg_info", "dist_info"} & set(sys.argv):
            return {}
        sys.exit(
            "fastbn is compiled against the torch it will run with, and this environment has none: "
            "install torch first, then run pip install --no-build-isolation ."
        )

    cuda = cuda_toolkit()
    if cuda:
        os.environ["CUDA_HOME"] = str(cuda.home)  # torch guesses it once, on import
    from torch.utils import cpp_extension

    # The planner is in every build: it answers for GPUs that are not there.
    cpp_sources = sources("ops/*.cpp", "cpu/**/*.cpp", "cuda/planner/*.cpp")
    cuda_sources = sources("cuda/*.cu", "cuda/*.cpp")
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(cuda))
        cpp_sources.remove("csrc/ops/no_cuda.cpp")
    jobs = max(1, min(os.cpu_count() or 1, int(free_gibibytes() // GIBIBYTES_PER_JOB)))
    os.environ.setdefault("MAX_JOBS", str(jobs))

    # at::parallel_for starts threads only in code compiled for OpenMP. The runtime itself is the
    # one that torch has loaded: linking another would give fastbn threads of its own. Clang's code
    # would need that other one, and goes without threads.
    compiler = first_line([cpp_extension.get_cxx_compiler(), "--version"])
    threads = ["-fopenmp"] if sys.platform == "linux" and "clang" not in compiler else []
    cxx_flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-ffp-contract=fast", *threads]
    flags = {"cxx": cxx_flags}
    if cuda:
        flags["nvcc"] = ["-O3", "-lineinfo"]
    build: Any = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    all_sources = cpp_sources + (cuda_sources if cuda else [])

    class BuildExtension(cpp_extension.BuildExtension):
        """Also writes the build record next to the compiled module."""

        def run(self) -> None:
            if cuda and cuda.library:
                link = Path(self.build_temp).resolve() / "cuda" / "libcudart.so"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(cuda.library)
                for extension in self.extensions:
                    extension.library_dirs.append(str(link.parent))
            print(
                f"fastbn {version()}: building {len(all_sources)} files against torch "
                f"{torch.__version__} ({f'CUDA {torch.version.cuda}' if cuda else 'CPU only'}), "
                "about a minute",
                flush=True,
            )
            super().run()
            record = {
                "fastbn": version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda if cuda else None,
                "architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else None,
                "compiler": compiler,
                "commit": commit(),
            }
            target = Path(self.get_ext_fullpath("fastbn._C")).parent / "_build_info.py"
            target.write_text(
                '"""Written by setup.py; fastbn._backend compares it with the running torch."""\n\n'
                f"RECORD: dict[str, str | None] = {pprint.pformat(record, sort_dicts=False)}\n"
            )

    include_dirs = [str(folder) for folder in cuda.include_dirs] if cuda else []
    extension = build("fastbn._C", all_sources, extra_compile_args=flags, include_dirs=include_dirs)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(version=version(), install_requires=requirements(), **extension_arguments())
