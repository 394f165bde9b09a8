"""The CPU loops by themselves, compiled by every compiler and for every processor at hand.

Only C++: neither torch nor an installed fastbn is needed, and a processor can be emulated.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.pairs import EXHAUSTIVE

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
SIMD = HERE.parents[1] / "csrc" / "cpu" / "simd"
LOOPS = [SIMD / "dispatch.cpp", *sorted((SIMD / "targets").glob("*.cpp"))]
CHECKS = sorted(HERE.glob("*.cpp"))

FUNCTIONS = [
    "moments",
    "column_moments",
    "grad_sums",
    "column_grad_sums",
    "normalize",
    "normalize_columns",
    "grad_input",
    "grad_input_columns",
    "activate",
    "activate_columns",
    "activated_grad_sums",
    "activated_column_grad_sums",
    "masks",
    "masks_of_columns",
    "activation_grad_columns",
    "relu_grad_input",
    "relu_grad_input_columns",
    "in_place",
    "in_place_columns",
    "pack",
    "unpack",
    "disjoint",
]
CAPABILITIES = ["scalar", "default"]  # of every processor, the lesser first
X86_CAPABILITIES = [*CAPABILITIES, "avx2", "avx512"]

# As setup.py compiles them.
OPTIMIZED = ["-O3", "-ffp-contract=fast"]
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@dataclass(frozen=True)
class Build:
    """How to compile the loops and to run them; of several programs the first that is there."""

    compilers: list[str]
    flags: list[str]
    emulators: list[str] | None = None

    def compile(self, folder: Path) -> list[str]:
        """Returns the command of the test."""
        compiler = [_first(self.compilers), "-std=c++17", "-w"]
        emulator = [_first(self.emulators)] if self.emulators else []
        objects = [folder / f"{source.stem}.o" for source in CHECKS]
        for source, compiled in zip(CHECKS, objects, strict=True):
            _succeed([*compiler, "-O1", "-c", source, "-o", compiled])
        program = folder / "cpuloops"
        _succeed([*compiler, *self.flags, *objects, *LOOPS, "-o", program])
        return [*emulator, str(program)]


NATIVE = ["g++", "c++"]
BUILDS = {
    "gcc": Build(NATIVE, OPTIMIZED),
    "gcc-sanitized": Build(NATIVE, SANITIZED),
    "clang": Build(["clang++"], OPTIMIZED),
    # Static: the emulator needs no libraries of that processor.
    "aarch64": Build(
        ["aarch64-linux-gnu-g++"],
        [*OPTIMIZED, "-static"],
        emulators=["qemu-aarch64", "qemu-aarch64-static"],
    ),
}
NATIVE_CAPABILITIES = X86_CAPABILITIES if platform.machine() == "x86_64" else CAPABILITIES


def _first(names: list[str]) -> str:
    """Where the first of these programs is."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    missing = f"needs {' or '.join(names)}; on Debian: apt-get install "
    missing += "g++ clang g++-aarch64-linux-gnu qemu-user"
    if os.environ.get("CI"):
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)


def _succeed(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def build_command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Compiles one of BUILDS the first time it is asked for, and returns its command."""

    @functools.cache
    def build(name: str) -> list[str]:
        return BUILDS[name].compile(tmp_path_factory.mktemp(name))

    return build


@pytest.mark.parametrize(
    ("build", "capability"),
    [
        (build, capability)
        if build == "gcc" or (build, capability) == ("aarch64", "default")
        # Each takes half a minute to compile, or to be emulated.
        else pytest.param(build, capability, marks=EXHAUSTIVE)
        for build in BUILDS
        for capability in (CAPABILITIES if build == "aarch64" else NATIVE_CAPABILITIES)
    ],
)
def test_every_function(
    build: str, capability: str, build_command: Callable[[str], list[str]]
) -> None:
    done = subprocess.run(
        build_command(build),
        env={**os.environ, "FASTBN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=600,
    )
    used, *lines = done.stdout.splitlines()
    if used != capability and capability not in CAPABILITIES:
        pytest.skip(f"this processor has no more than {used}")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert used == capability
    assert [line.split()[0] for line in lines] == FUNCTIONS
