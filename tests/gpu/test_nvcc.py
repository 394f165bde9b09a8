"""The CUDA kernels compile for every architecture, keep to their registers and use wide accesses.

No GPU is needed: the assembler's report and the machine code are read. What they say is printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import pytest
from tabulate import tabulate

import fastbn
from fastbn.planning import DEVICES
from fastbn.planning.networks import RESNET50
from tests.support import cuda_toolkit, nvcc, sass

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.nvcc import Name

pytestmark = pytest.mark.skipif(
    not nvcc.KERNELS.exists(), reason="the sources of the kernels are not there"
)


@dataclass(frozen=True)
class Streams:
    """What a kernel does with whole activations."""

    loops: int  # that read them, one after another
    tensors: int  # that each reads
    writing: int = 0  # loops that also write one
    persistent: bool = False  # keeps them in shared memory, as far as there is room


KERNELS = {
    "two_pass_forward_reduce": Streams(loops=1, tensors=1),
    "two_pass_forward_apply": Streams(loops=1, tensors=1, writing=1),
    "eval_forward": Streams(loops=1, tensors=1, writing=1),
    "one_block_forward": Streams(loops=2, tensors=1, writing=1),
    "two_pass_backward_reduce": Streams(loops=1, tensors=2, writing=1),
    "two_pass_backward_apply": Streams(loops=1, tensors=2, writing=1),
    "eval_backward": Streams(loops=1, tensors=1, writing=1),
    "one_block_backward": Streams(loops=2, tensors=2, writing=2),
    "persistent_forward": Streams(loops=2, tensors=1, writing=1, persistent=True),
    "persistent_backward": Streams(loops=2, tensors=2, writing=1, persistent=True),
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
    """What a kernel is compiled for; whole vectors only where these stay on chip."""
    if not KERNELS[kernel].persistent:
        return MAPPINGS
    return {
        (mapping, dtype, width)
        for mapping, dtype, width in MAPPINGS
        if width * nvcc.SIZES[dtype] == nvcc.VECTOR_BYTES
    }


# By the names that kernels have for them.
DTYPES = {
    "float64": "double",
    "float32": "float",
    "bfloat16": "fastbn::BFloat16",
    "float16": "fastbn::Float16",
}


@pytest.fixture
def toolkit() -> Path:
    home = cuda_toolkit.find()
    if home is None:
        cuda_toolkit.missing(
            f"no nvcc of CUDA {cuda_toolkit.MAJOR}; python -m tests.support.cuda_toolkit fetches one"
        )
    return home


@pytest.fixture
def code(toolkit: Path) -> dict[Name, list[sass.Block]]:
    """The machine code of every kernel."""
    nvdisasm = cuda_toolkit.program("nvdisasm")
    if nvdisasm is None:
        cuda_toolkit.missing("no nvdisasm; pip install nvidia-cuda-nvdisasm")
    return disassembled(nvdisasm)


@cache
def disassembled(nvdisasm: Path) -> dict[Name, list[sass.Block]]:
    functions = {}
    for compiled in nvcc.compile_all(nvcc.DISASSEMBLED):
        functions.update(sass.functions(sass.disassemble(nvdisasm, compiled.cubin)))
    names = map(nvcc.parse_name, nvcc.demangle(list(functions)))
    return dict(zip(names, functions.values(), strict=True))


@cache
def promised_loads() -> dict[str, int]:
    """Vectors that a thread has in flight, by mapping, as csrc/cuda/geometry.h has them."""
    text = (nvcc.KERNELS / "geometry.h").read_text()
    found = re.findall(r"Occupancy k(\w+)Occupancy\{\d+, (\d+)\}", text)
    return {mapping: int(loads) for mapping, loads in found}


def streaming(blocks: list[sass.Block], loads: int) -> list[sass.Block]:
    """Pieces of loops with so many vectors in flight."""
    vector = 8 * nvcc.VECTOR_BYTES
    return [block for block in blocks if block.in_loop and block.loads_in_flight(vector) >= loads]


def storing(blocks: list[sass.Block], stores: int) -> list[sass.Block]:
    """Pieces of loops with so many stores of vectors."""
    vector = 8 * nvcc.VECTOR_BYTES
    return [block for block in blocks if block.in_loop and block.count("STG", vector) >= stores]


@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_kernels_stay_in_registers(architecture: str, toolkit: Path) -> None:
    """Everything compiles without a warning; nothing is spilt and nothing lies in local memory."""
    usages = nvcc.usages(architecture)
    assert {name.kernel for name in usages} == set(KERNELS)
    for kernel in KERNELS:
        found = {(name.mapping, name.dtype, name.width) for name in usages if name.kernel == kernel}
        assert found == mappings(kernel), kernel
    assert all(usage.registers > 0 for usage in usages.values())
    spilt = [f"{name}: {usage}" for name, usage in usages.items() if usage.local]
    assert not spilt, "\n".join(spilt)


def test_streaming_loops_use_wide_accesses(code: dict[Name, list[sass.Block]]) -> None:
    """Loops over vectors load and store 16 bytes at once, as many in flight as was promised."""
    problems = []
    for name, blocks in code.items():
        if not name.vectorized:
            continue
        streams, loads = KERNELS[name.kernel], promised_loads()[name.mapping]
        reading = len(streaming(blocks, loads))
        writing = len(storing(blocks, loads // streams.tensors))
        if reading < streams.loops or writing < streams.writing:
            problems.append(
                f"{name}: {reading} of {streams.loops} loops with {loads} loads of 128 bits in "
                f"flight, {writing} of {streams.writing} with {loads // streams.tensors} stores"
            )
    assert sum(name.vectorized for name in code) == len(KERNELS) * 2 * len(nvcc.SIZES)
    assert not problems, "\n".join(problems)


def test_wide_accesses_are_not_mixed_with_narrow_ones(code: dict[Name, list[sass.Block]]) -> None:
    for name, blocks in code.items():
        if not name.vectorized:
            continue
        for block in streaming(blocks, promised_loads()[name.mapping]):
            accesses = [i for i in block.instructions if i.name in {"LDG", "STG"}]
            assert all(".128" in access.opcode for access in accesses), name


def test_machine_code_has_no_local_memory(code: dict[Name, list[sass.Block]]) -> None:
    for name, blocks in code.items():
        used = {instruction.name for instruction in sass.instructions(blocks)}
        assert not used & {"LDL", "STL"}, name


PERSISTENT = [kernel for kernel, streams in KERNELS.items() if streams.persistent]


def count(blocks: list[sass.Block], name: str, suffix: str = "") -> int:
    """Instructions of a name."""
    found = (i for i in sass.instructions(blocks) if i.name == name)
    return sum(i.opcode.endswith(suffix) for i in found)


def test_on_chip_kernels_use_what_hopper_has(code: dict[Name, list[sass.Block]]) -> None:
    """Copies in bulk and by vectors, barriers that wait for them and those of clusters."""
    kernels = {name: blocks for name, blocks in code.items() if name.kernel in PERSISTENT}
    assert len(kernels) == 2 * 2 * len(nvcc.SIZES)
    for name, blocks in kernels.items():
        tensors = KERNELS[name.kernel].tensors
        assert count(blocks, "UBLKCP") >= tensors, name
        assert count(blocks, "LDGSTS", ".128") >= tensors, name
        assert count(blocks, "SYNCS", ".TRYWAIT") >= 1, name
        assert count(blocks, "UCGABAR_WAIT") >= 1, name
        # What resides is read in vectors, in loops that gather and apply.
        held = [b for b in blocks if b.in_loop and b.count("LDS", 128) >= tensors]
        assert len(held) >= 2, name
        assert any(block.count("STG", 128) for block in held), name


# By what they are compiled for; each can also do what an older one can.
GPUS = {
    "sm_75": "t4",
    "sm_80": "a100",
    "sm_89": "rtx4090",
    "sm_90": "h200",
    "sm_100": "b200",
    "sm_120": "rtx5090",
}
REGISTERS = 65536  # of a multiprocessor


def registers_of_block(registers: int, threads: int) -> int:
    """Allocated in pieces of 256 to each warp."""
    return threads // 32 * (-(-registers * 32 // 256) * 256)


@pytest.mark.parametrize("architecture", GPUS)
def test_blocks_fit_a_multiprocessor_as_planned(architecture: str, toolkit: Path) -> None:
    """The registers that the compiler took, and shared memory, for all blocks that share one."""
    usages = nvcc.usages(architecture)
    device = DEVICES[GPUS[architecture]]
    together = set()
    for layer, layout, dtype, op in product(
        RESNET50, ("contiguous", "channels_last"), DTYPES, ("forward", "backward")
    ):
        shape = (64, layer.channels, layer.height, layer.width)
        question = {"dtype": dtype, "layout": layout, "op": op, "device": device.name}
        for algorithm, _ in fastbn.plan(shape, **question).considered:
            plan = fastbn.plan(shape, algorithm=algorithm, **question)
            if not plan.blocks_per_multiprocessor:
                continue
            (usage,) = (
                usage
                for name, usage in usages.items()
                if name.kernel == f"persistent_{op}"
                and name.mapping.lower() == plan.mapping
                and DTYPES[dtype] == name.dtype
            )
            blocks = plan.blocks_per_multiprocessor
            assert blocks * registers_of_block(usage.registers, plan.block) <= REGISTERS, plan
            shared = plan.shared_bytes + usage.shared + 1024
            assert blocks * shared <= device.shared_per_multiprocessor, plan
            together.add(blocks)
    assert together <= {1, 2}
    # Where there are clusters, both are taken.
    assert len(together) == 2 or device.major < 9


def test_report_of_registers(toolkit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what each kernel takes."""
    with capsys.disabled():
        print(f"\n\n{registers_table()}\n")


def test_report_of_streaming_loops(
    code: dict[Name, list[sass.Block]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints what the loops consist of."""
    with capsys.disabled():
        print(f"\n\n{streaming_table(code)}\n")


SPILLING_REPORT = """\
ptxas info    : Compiling entry function 'f' for 'sm_90'
ptxas info    : Function properties for f
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size, 48 bytes smem
ptxas info    : Compile time = 1.0 ms
ptxas info    : Function properties for called
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_spills_would_be_noticed() -> None:
    usages = nvcc.parse_report(SPILLING_REPORT)
    assert usages == {"f": nvcc.Usage(64, 24, 16, 20, 48), "called": nvcc.Usage(0, 0, 0, 0, 0)}
    assert usages["f"].local > 0


# Three loads in flight before the loop; in it two, of which the first is waited for before a third.
LISTING = """\
//--------------------- .text.f --------------------------
f:
.text.f:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   LDG.E.128 R12, desc[UR4][R2.64+0x20] ;
        /*0030*/                   BSSY B0, `(.L_x_2) ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0050*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] ;
        /*0070*/                   FADD R16, R6, R17 ;
        /*0080*/                   LDG.E.64 R12, desc[UR4][R2.64+0x20] ;
        /*0090*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00b0*/                   BSYNC B0 ;
.L_x_2:
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3) ;
"""


def test_loops_are_found_in_machine_code() -> None:
    (blocks,) = sass.functions(LISTING).values()
    before, loop, meeting, after, trap = (block for block in blocks if block.instructions)
    assert [block.in_loop for block in (before, loop, meeting, after, trap)] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert [before.loads_in_flight(128), loop.loads_in_flight(128)] == [3, 2]
    assert [loop.count("LDG", 128), loop.count("LDG", 64), loop.count("STG", 128)] == [2, 1, 1]
    assert streaming(blocks, 2) == [loop]
    assert streaming(blocks, 3) == []


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
        loads = promised_loads()[name.mapping]
        loops = streaming(blocks, loads)
        elements = loads // KERNELS[name.kernel].tensors * name.width
        rows.append(
            [
                name,
                "+".join(str(block.loads_in_flight(vector)) for block in loops),
                "+".join(str(block.count("STG", vector)) for block in loops),
                "+".join(f"{len(block.instructions) / elements:.1f}" for block in loops),
                count(blocks, "UBLKCP"),
                count(blocks, "LDGSTS"),
                sum(block.count("LDS", vector) for block in blocks if block.in_loop),
                sum(len(block.instructions) for block in blocks),
            ]
        )
    title = f"streaming loops in the machine code of {nvcc.DISASSEMBLED}"
    columns = ["128-bit loads in flight", "stores", "instructions per element"]
    columns += ["bulk copies", "vector copies", "128-bit loads of shared memory", "in the kernel"]
    return f"{title}\n\n{tabulate(rows, ['kernel', *columns], disable_numparse=True)}"
