"""Compiles the simulator with the project's kernels, planner, launch code and checks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# A compromise of building and running.
_FLAGS = ["-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-DFASTBN_SIMULATOR"]


def sources(root: Path) -> list[Path]:
    """What the simulator is made of, in a tree with `csrc` and `tests/cudasim`."""
    csrc, cudasim = root / "csrc", root / "tests" / "cudasim"
    return [
        cudasim / "backend.cpp",
        cudasim / "kernels.cpp",
        cudasim / "kernels_act.cpp",
        *sorted((cudasim / "cudasim").glob("*.cpp")),
        csrc / "ops" / "ops.cpp",
        csrc / "ops" / "checks.cpp",
        *sorted((csrc / "cuda" / "planner").glob("*.cpp")),
    ]


def _folder(root: Path, sanitize: bool) -> Path:
    version = torch.__version__.partition("+")[0]
    return root / "build" / f"cudasim{'-sanitized' if sanitize else ''}-torch{version}"


def load() -> None:
    """Compiles what has changed since the last time and registers ``torch.ops.fastbn_cudasim``.

    With FASTBN_CUDASIM_SANITIZE=1 by the address and undefined-behavior sanitizers, whose runtime
    the process must have been started with.
    """
    sanitize = os.environ.get("FASTBN_CUDASIM_SANITIZE") == "1"
    sanitizers = SANITIZERS if sanitize else []
    folder = _folder(ROOT, sanitize)
    folder.mkdir(parents=True, exist_ok=True)
    cpp_extension.load(
        "cudasim",
        [str(path) for path in sources(ROOT)],
        extra_cflags=[*_FLAGS, *sanitizers, f"-I{ROOT / 'tests' / 'cudasim'}"],
        extra_ldflags=sanitizers,
        build_directory=str(folder),
        is_python_module=False,
    )


def plant(file: str, right: str, wrong: str, folder: Path, source: str = "forward.cu") -> Path:
    """A simulator library whose kernels have a fault.

    Args:
        file: below ``csrc/cuda``.
        right: what the file says, once.
        wrong: what the faulty copy says instead.
        folder: for the copy and the library; empty.
        source: the file whose kernels have it; compiling the others would take as long again.

    Returns:
        The library; all else is taken from the build of the right kernels.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    faulty = folder / "csrc" / "cuda" / file
    text = faulty.read_text()
    if text.count(right) != 1:
        raise ValueError(f"{file} does not say {right!r} once")
    faulty.write_text(text.replace(right, wrong))
    # By name: the folder also has objects of sources that were there once.
    objects = [str(_folder(ROOT, sanitize=False) / f"{path.stem}.o") for path in sources(ROOT)]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    library = folder / "faulty.so"
    subprocess.run(
        [
            *("g++", "-std=c++17", "-shared", "-fPIC", "-O0", "-g0", *_FLAGS[2:]),
            f"-I{ROOT / 'tests' / 'cudasim'}",
            # The first definition of a kernel counts, and those of the faulty file come first.
            "-Wl,--allow-multiple-definition",
            *("-x", "c++", str(folder / "csrc" / "cuda" / source), "-x", "none", *objects),
            *(*libraries, "-lc10", "-ltorch_cpu", "-ltorch", "-o", str(library)),
        ],
        check=True,
    )
    return library
