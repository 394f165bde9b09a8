"""What the CUDA kernels do with memory, and what their machine code shows of it.

``python -m tests.support.kernel_code`` prints the registers of each and what its loops consist of.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from tabulate import tabulate

from . import cuda_toolkit, nvcc, sass

if TYPE_CHECKING:
    from pathlib import Path

    from .nvcc import Name


@dataclass(frozen=True)
class Streams:
    """What a kernel does with whole activations."""

    loops: int  # that read them, one after another
    tensors: int  # that each reads
    writing: int = 0  # loops that also write one
    persistent: bool = False  # keeps them in shared memory, as far as there is room
    epilogue: bool = False  # for which a thread has fewer vectors in flight
    masked: bool = False  # the epilogue's derivatives are read and not computed


def with_epilogue(kernel: str, plain: Streams) -> dict[str, Streams]:
    """A kernel with an activation, which is computed from what it reads, and with a residual.

    And in backward with a mask.
    """
    found = {
        f"{kernel}, activation": replace(plain, epilogue=True),
        f"{kernel}, residual": replace(plain, tensors=plain.tensors + 1, epilogue=True),
    }
    if "backward" in kernel:
        found[f"{kernel}, mask"] = replace(plain, epilogue=True, masked=True)
    return found


PLAIN = {
    "two_pass_forward_reduce": Streams(loops=1, tensors=1),
    "two_pass_forward_apply": Streams(loops=1, tensors=1, writing=1),
    "combine_forward_apply": Streams(loops=1, tensors=1, writing=1),
    "eval_forward": Streams(loops=1, tensors=1, writing=1),
    "one_block_forward": Streams(loops=2, tensors=1, writing=1),
    "two_pass_backward_reduce": Streams(loops=1, tensors=2, writing=1),
    "two_pass_backward_apply": Streams(loops=1, tensors=2, writing=1),
    "combine_backward_apply": Streams(loops=1, tensors=2, writing=1),
    "eval_backward": Streams(loops=1, tensors=1, writing=1),
    "one_block_backward": Streams(loops=2, tensors=2, writing=2),
    "persistent_forward": Streams(loops=2, tensors=1, writing=1, persistent=True),
    "persistent_backward": Streams(loops=2, tensors=2, writing=1, persistent=True),
}
KERNELS = PLAIN | {
    name: streams
    for kernel in (
        "two_pass_forward_apply",
        "eval_forward",
        "two_pass_backward_reduce",
        "two_pass_backward_apply",
        "persistent_forward",
        "persistent_backward",
    )
    for name, streams in with_epilogue(kernel, PLAIN[kernel]).items()
}
MAPPINGS = {
    (mapping, dtype, width)
    for dtype, size in nvcc.SIZES.items()
    for mapping, width in {
        ("MatrixColumns", nvcc.VECTOR_BYTES // size),
        ("MatrixColumns", 1),
        ("Contiguous", nvcc.VECTOR_BYTES // size),
        ("Generic", 1),
    }
}


def mappings(kernel: str) -> set[tuple[str, str, int]]:
    """What a kernel is compiled for; whole vectors only where it is persistent or has a mask."""
    if not (KERNELS[kernel].persistent or KERNELS[kernel].masked):
        return MAPPINGS
    return {
        (mapping, dtype, width)
        for mapping, dtype, width in MAPPINGS
        if width * nvcc.SIZES[dtype] == nvcc.VECTOR_BYTES
    }


@cache
def disassembled(nvdisasm: Path) -> dict[Name, list[sass.Block]]:
    functions = {}
    for compiled in nvcc.compile_all(nvcc.DISASSEMBLED):
        functions.update(sass.functions(sass.disassemble(nvdisasm, compiled.cubin)))
    names = map(nvcc.parse_name, nvcc.demangle(list(functions)))
    return dict(zip(names, functions.values(), strict=True))


@dataclass(frozen=True)
class Occupancy:
    """Full blocks of a multiprocessor, and vectors that a thread has in flight."""

    blocks: int
    loads: int


@cache
def promised() -> dict[str, Occupancy]:
    """By mapping, as csrc/cuda/geometry.h has them."""
    text = (nvcc.KERNELS / "geometry.h").read_text()
    found = re.findall(r"Occupancy k(\w+)Occupancy\{(\d+), (\d+)\}", text)
    return {mapping: Occupancy(int(blocks), int(loads)) for mapping, blocks, loads in found}


def vectors_of_each(name: Name) -> int:
    """Vectors of each activation that a thread has in flight, as csrc/cuda shares them out."""
    streams, loads = KERNELS[name.kernel], promised()[name.mapping].loads
    if streams.epilogue and streams.persistent:
        loads //= 2
    return max(1, loads // (streams.tensors + (streams.epilogue and not streams.masked)))


def streaming(blocks: list[sass.Block], loads: int) -> list[sass.Block]:
    """Pieces of loops with so many vectors in flight."""
    vector = 8 * nvcc.VECTOR_BYTES
    return [block for block in blocks if block.in_loop and block.loads_in_flight(vector) >= loads]


def storing(blocks: list[sass.Block], stores: int) -> list[sass.Block]:
    """Pieces of loops with so many stores of vectors."""
    vector = 8 * nvcc.VECTOR_BYTES
    return [block for block in blocks if block.in_loop and block.count("STG", vector) >= stores]


def smem_vectors() -> int:
    """Vectors that a thread takes from shared memory at once, as csrc/cuda/geometry.h has them."""
    found = re.search(r"kSmemVectors = (\d+);", (nvcc.KERNELS / "geometry.h").read_text())
    assert found is not None
    return int(found[1])


@dataclass(frozen=True)
class HotLoop:
    """A loop over whole vectors."""

    source: str  # where it reads them: "memory" or "shared memory"
    writes: bool  # vectors to memory
    instructions: float  # of a warp, for a vector of each activation that is read


def hot_loops(name: Name, blocks: list[sass.Block]) -> list[HotLoop]:
    """The loops that most instructions of a kernel are spent in."""
    vector = 8 * nvcc.VECTOR_BYTES
    tensors = KERNELS[name.kernel].tensors
    found = []
    for index, block in enumerate(blocks):
        if not block.in_loop:
            continue
        for source, load, loads in (
            ("memory", "LDG", tensors * vectors_of_each(name)),
            ("shared memory", "LDS", max(smem_vectors(), tensors)),
        ):
            # What merges partial results reads vectors, too, but has less arithmetic.
            arithmetic = sum(i.name in {"FFMA", "DFMA"} for i in block.instructions)
            if block.count(load, vector) == loads and arithmetic >= loads // tensors * name.width:
                instructions = sass.way_round(blocks, index) / (loads // tensors)
                found.append(HotLoop(source, block.count("STG", vector) > 0, instructions))
    return found


PERSISTENT = [kernel for kernel, streams in KERNELS.items() if streams.persistent]


def count(blocks: list[sass.Block], name: str, suffix: str = "") -> int:
    """Instructions of a name."""
    found = (i for i in sass.instructions(blocks) if i.name == name)
    return sum(i.opcode.endswith(suffix) for i in found)


def registers_table() -> str:
    """The most that any instance of a kernel takes, per architecture."""
    by_architecture = {name: nvcc.usages(name) for name in nvcc.ARCHITECTURES}
    rows = []
    for kernel in KERNELS:
        for mapping in ("MatrixColumns", "Contiguous", "Generic"):
            if mapping not in {name for name, _, _ in mappings(kernel)}:
                continue
            row = [kernel, mapping]
            for usages in by_architecture.values():
                taken = [
                    usage
                    for name, usage in usages.items()
                    if (name.kernel, name.mapping) == (kernel, mapping)
                ]
                facts = ("registers", "stack", "spill_stores", "spill_loads", "shared")
                row.append("/".join(str(max(getattr(u, fact) for u in taken)) for fact in facts))
            rows.append(row)
    title = "registers of a thread / bytes of stack / of spill stores / of spill loads / of static "
    title += "shared memory; the most over dtypes and widths"
    return f"{title}\n\n{tabulate(rows, ['kernel', 'mapping', *by_architecture])}"


def streaming_table(code: dict[Name, list[sass.Block]]) -> str:
    """What the streaming loops of vectors consist of."""
    vector = 8 * nvcc.VECTOR_BYTES
    rows = []
    for name, blocks in sorted(code.items(), key=lambda item: str(item[0])):
        if not name.vectorized:
            continue
        loops = streaming(blocks, KERNELS[name.kernel].tensors * vectors_of_each(name))
        hot = hot_loops(name, blocks)
        rows.append(
            [
                name,
                "+".join(str(block.loads_in_flight(vector)) for block in loops),
                "+".join(str(block.count("STG", vector)) for block in loops),
                " ".join(f"{loop.instructions:.1f}" for loop in hot if loop.source == "memory"),
                " ".join(f"{loop.instructions:.1f}" for loop in hot if loop.source != "memory"),
                count(blocks, "UBLKCP"),
                count(blocks, "UTMALDG"),
                count(blocks, "UTMASTG"),
                count(blocks, "LDGSTS"),
                sum(block.count("LDS", vector) for block in blocks if block.in_loop),
                sum(len(block.instructions) for block in blocks),
            ]
        )
    title = f"loops over vectors in the machine code of {nvcc.DISASSEMBLED}; instructions are those"
    title += " of a warp for a vector of each activation"
    columns = ["128-bit loads in flight", "stores", "instructions", "instructions in shared memory"]
    columns += [
        "bulk copies",
        "box copies",
        "box stores",
        "vector copies",
        "128-bit loads of shared memory",
        "in the kernel",
    ]
    return f"{title}\n\n{tabulate(rows, ['kernel', *columns], disable_numparse=True)}"


def main() -> int:
    """Prints both tables; fails without a compiler or a disassembler."""
    nvdisasm = cuda_toolkit.program("nvdisasm")
    if cuda_toolkit.find() is None or nvdisasm is None:
        print("no CUDA toolkit, or no nvdisasm; python -m tests.support.cuda_toolkit fetches one")
        return 1
    print(f"{registers_table()}\n\n{streaming_table(disassembled(nvdisasm))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
