"""Compiles the CUDA kernels without a GPU, and reads what the assembler reports of each."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import cuda_toolkit

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
SOURCES = ("forward.cu", "backward.cu", "forward_act.cu", "backward_act.cu")
# Compiled objects, by a hash of everything they depend on.
OBJECTS = ROOT / "build" / "nvcc"

# From Turing to Blackwell, each with one of the standards that a supported torch compiles with:
# C++17 up to torch 2.11, C++20 later.
ARCHITECTURES = {
    "sm_75": "c++17",
    "sm_80": "c++20",
    "sm_86": "c++17",
    "sm_89": "c++20",
    "sm_90": "c++17",
    "sm_100": "c++20",
    "sm_120": "c++17",
}
DISASSEMBLED = "sm_90"

VECTOR_BYTES = 16
SIZES = {"double": 8, "float": 4, "fastbn::BFloat16": 2, "fastbn::Float16": 2}


@dataclass(frozen=True)
class Name:
    """A kernel by what it is compiled for: ``two_pass_forward_reduce<MatrixColumns<float, 4>>``.

    One with an epilogue has that in its name: ``eval_forward, residual``.
    """

    kernel: str
    mapping: str
    dtype: str
    width: int

    @property
    def vectorized(self) -> bool:
        return SIZES[self.dtype] * self.width == VECTOR_BYTES

    def __str__(self) -> str:
        dtype = self.dtype.removeprefix("fastbn::")
        return f"{self.kernel}<{self.mapping}<{dtype}, {self.width}>>"


@dataclass(frozen=True)
class Usage:
    """What a thread (registers, bytes of stack and of spills) and a block (shared bytes) take."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def local(self) -> int:
        """Bytes that leave the registers for memory."""
        return self.stack + self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class Compiled:
    cubin: Path
    report: str


def flags(architecture: str) -> list[str]:
    """Those of setup.py, and what makes nvcc talk."""
    standard = f"-std={ARCHITECTURES[architecture]}"
    loud = ["-Xptxas", "-v", "-Werror", "all-warnings"]
    return ["-O3", "-lineinfo", standard, f"-arch={architecture}", "-cubin", *loud]


@cache
def fingerprint() -> str:
    """Of the compiler and of all that kernels include."""
    home = cuda_toolkit.find()
    version = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, check=True)
    digest = hashlib.sha256(version.stdout)
    folders = (KERNELS, KERNELS.parent / "core")
    files = [path for folder in folders for path in folder.rglob("*")]
    for path in sorted(path for path in files if path.suffix in {".h", ".cu", ".cuh"}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def compile_file(source: str, architecture: str) -> Compiled:
    """Compiles one file for one architecture, unless that was done before.

    Raises:
        AssertionError: it does not compile; the message is the compiler's.
    """
    options = flags(architecture)
    key = hashlib.sha256(f"{fingerprint()} {source} {options}".encode()).hexdigest()[:16]
    stem = f"{Path(source).stem}-{architecture}"
    cubin = OBJECTS / f"{stem}-{key}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        OBJECTS.mkdir(parents=True, exist_ok=True)
        for path in OBJECTS.glob(f"{stem}-*"):
            path.unlink()
        nvcc = f"{cuda_toolkit.find()}/bin/nvcc"
        command: list[str | Path] = [nvcc, *options, "-o", cubin, KERNELS / source]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{source} for {architecture}:\n{done.stderr}{done.stdout}"
        # Complete at once: the report is the sign that the object is there.
        partial = report.with_suffix(f".{os.getpid()}")
        partial.write_text(done.stderr + done.stdout)
        partial.rename(report)
    return Compiled(cubin, report.read_text())


@cache
def compile_all(architecture: str) -> list[Compiled]:
    """Every file for one architecture, two at a time where there are cores for it."""
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(max(1, min(2, jobs))) as pool:
        return list(pool.map(compile_file, SOURCES, [architecture] * len(SOURCES)))


def demangle(names: list[str]) -> list[str]:
    """As C++ writes them."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


# By the values of EpilogueKind, of which a kernel may have no argument.
EPILOGUES = {None: "", "0": "", "1": ", activation", "2": ", residual", "3": ", mask"}


def parse_name(demangled: str) -> Name:
    """A kernel's name from its template arguments, the mapping and the epilogue."""
    found = re.search(
        r"fastbn::cuda::(\w+)<fastbn::cuda::(\w+)<([\w:]+)(?:, (\d+))?>"
        r"(?:, \(fastbn::cuda::EpilogueKind\)(\d))?",
        demangled,
    )
    assert found, f"not the name of a kernel over a mapping: {demangled}"
    kernel = found[1] + EPILOGUES[found[5]]
    return Name(kernel, found[2], found[3], int(found[4] or 1))


def parse_report(report: str) -> dict[str, Usage]:
    """From the assembler's report to what each function takes, by mangled name.

    A function that is called takes registers of its caller and has none of its own; it is compiled
    once for each, and this is the one that leaves most for memory.
    """
    usages: dict[str, Usage] = {}
    parts = re.split(r"Function properties for (\S+)\n", report)
    for name, facts in zip(parts[1::2], parts[2::2], strict=True):
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", facts
        )
        assert memory, facts
        registers = re.search(r"Used (\d+) registers", facts)
        shared = re.search(r"(\d+) bytes smem", facts)
        stack, stores, loads = map(int, memory.groups())
        usage = Usage(
            int(registers[1]) if registers else 0,
            stack,
            stores,
            loads,
            int(shared[1]) if shared else 0,
        )
        usages[name] = max(usages.get(name, usage), usage, key=lambda usage: usage.local)
    return usages


@cache
def _all_usages(architecture: str) -> dict[str, Usage]:
    """Of kernels and of what they call, by name as C++ writes it."""
    found: dict[str, Usage] = {}
    for compiled in compile_all(architecture):
        for name, usage in parse_report(compiled.report).items():
            found[name] = max(found.get(name, usage), usage, key=lambda usage: usage.local)
    return dict(zip(demangle(list(found)), found.values(), strict=True))


def usages(architecture: str) -> dict[Name, Usage]:
    """What each kernel takes on one architecture."""
    found = _all_usages(architecture)
    return {parse_name(name): usage for name, usage in found.items() if usage.registers > 0}


def usages_of_called(architecture: str) -> dict[str, Usage]:
    """What the functions take that kernels call."""
    found = _all_usages(architecture)
    return {name: usage for name, usage in found.items() if usage.registers == 0}
