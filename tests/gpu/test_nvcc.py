"""The CUDA kernels compile for every architecture, keep to their registers and use wide accesses.

No GPU is needed: the assembler's report and the machine code are read. ``python -m
tests.support.kernel_code`` prints what they say.
"""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fastbn
from fastbn.planning import DEVICES
from fastbn.planning.networks import RESNET50
from tests.support import cuda_toolkit, nvcc, sass
from tests.support.kernel_code import (
    KERNELS,
    PERSISTENT,
    count,
    disassembled,
    hot_loops,
    mappings,
    promised,
    storing,
    streaming,
    vectors_of_each,
)
from tests.support.pairs import EXHAUSTIVE

if TYPE_CHECKING:
    from tests.support.nvcc import Name

pytestmark = pytest.mark.skipif(
    not nvcc.KERNELS.exists(), reason="the sources of the kernels are not there"
)


# By the names that kernels have for them.
DTYPES = {
    "float64": "double",
    "float32": "float",
    "bfloat16": "fastbn::BFloat16",
    "float16": "fastbn::Float16",
}


# By what they are compiled for; each can also do what an older one can.
GPUS = {
    "sm_75": "t4",
    "sm_80": "a100",
    "sm_89": "rtx4090",
    "sm_90": "h200",
    "sm_100": "b200",
    "sm_120": "rtx5090",
}
# The one whose machine code is read is compiled always; the others, half a minute each, with --all.
each_architecture = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(architecture, marks=[EXHAUSTIVE] * (architecture != nvcc.DISASSEMBLED))
        for architecture in nvcc.ARCHITECTURES
    ],
)
REGISTERS = 65536  # of a multiprocessor


def blocks_of(name: Name) -> int:
    """That a kernel is compiled for."""
    kernel, *epilogue = name.kernel.split(", ")
    if epilogue and (name.dtype == "double" or kernel == "two_pass_backward_reduce"):
        return 1
    return promised()[name.mapping].blocks


def registers_of_block(registers: int, threads: int) -> int:
    """Allocated in pieces of 256 to each warp."""
    return threads // 32 * (-(-registers * 32 // 256) * 256)


@pytest.fixture
def toolkit() -> Path:
    home = cuda_toolkit.find()
    if home is None:
        cuda_toolkit.missing(
            f"no nvcc of CUDA {cuda_toolkit.MAJOR}; tests.support.cuda_toolkit fetches one"
        )
    return home


@pytest.fixture
def code(toolkit: Path) -> dict[Name, list[sass.Block]]:
    """The machine code of every kernel."""
    nvdisasm = cuda_toolkit.program("nvdisasm")
    if nvdisasm is None:
        cuda_toolkit.missing("no nvdisasm; pip install nvidia-cuda-nvdisasm")
    return disassembled(nvdisasm)


@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_every_architecture_has_the_machine(
    architecture: str, toolkit: Path, tmp_path: Path
) -> None:
    """What kernels wait and copy by compiles without a warning, and needs no local memory."""
    source = Path(__file__).parent / "machine.cu"
    cubin = tmp_path / "machine.cubin"
    nvcc_path = toolkit / "bin" / "nvcc"
    command: list[str | Path] = [nvcc_path, *nvcc.flags(architecture), "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    stacks = re.findall(r"(\d+) bytes stack frame", done.stderr + done.stdout)
    assert stacks
    assert set(stacks) == {"0"}


@each_architecture
def test_kernels_stay_in_registers(architecture: str, toolkit: Path) -> None:
    """Everything compiles without a warning; nothing is spilt and nothing lies in local memory."""
    usages = nvcc.usages(architecture)
    assert {name.kernel for name in usages} == set(KERNELS)
    for kernel in KERNELS:
        found = {(name.mapping, name.dtype, name.width) for name in usages if name.kernel == kernel}
        assert found == mappings(kernel), kernel
    assert all(usage.registers > 0 for usage in usages.values())
    spilt = [f"{name}: {usage}" for name, usage in usages.items() if usage.local]
    called = nvcc.usages_of_called(architecture)
    spilt += [f"{name}: {usage}" for name, usage in called.items() if usage.local]
    assert not spilt, "\n".join(spilt)
    # As many full blocks share a multiprocessor as geometry.h promises, or a single one where
    # functions take registers.
    crowded = [
        f"{name}: {usage.registers} registers"
        for name, usage in usages.items()
        if name.kernel not in PERSISTENT
        and blocks_of(name) * registers_of_block(usage.registers, 512) > REGISTERS
    ]
    assert not crowded, "\n".join(crowded)


def test_streaming_loops_use_wide_accesses(code: dict[Name, list[sass.Block]]) -> None:
    """Loops over vectors load and store 16 bytes at once, as many in flight as was promised."""
    problems = []
    for name, blocks in code.items():
        if not name.vectorized:
            continue
        streams, vectors = KERNELS[name.kernel], vectors_of_each(name)
        loads = vectors * streams.tensors
        reading = len(streaming(blocks, loads))
        writing = len(storing(blocks, vectors))
        if reading < streams.loops or writing < streams.writing:
            problems.append(
                f"{name}: {reading} of {streams.loops} loops with {loads} loads of 128 bits in "
                f"flight, {writing} of {streams.writing} with {vectors} stores"
            )
    assert sum(name.vectorized for name in code) == len(KERNELS) * 2 * len(nvcc.SIZES)
    assert not problems, "\n".join(problems)


def test_wide_accesses_are_not_mixed_with_narrow_ones(code: dict[Name, list[sass.Block]]) -> None:
    for name, blocks in code.items():
        if not name.vectorized:
            continue
        loads = vectors_of_each(name) * KERNELS[name.kernel].tensors
        # One alone may be a partial result.
        for block in streaming(blocks, max(loads, 2)):
            accesses = [i for i in block.instructions if i.name in {"LDG", "STG"}]
            narrow = [access.opcode for access in accesses if ".128" not in access.opcode]
            if name.kernel.endswith((", residual", ", mask")):  # a byte of a mask for each vector
                narrow = [opcode for opcode in narrow if ".U8" not in opcode]
            assert not narrow, name


# Instructions of a warp for a 16-byte vector of bfloat16 of each activation that is read, at most.
# An H200 has time for about 37 per vector and SM while its memory moves one: what takes more is
# bound by instructions where two tensors stream. By kernel, where vectors are read and whether any
# are written; in columns and contiguous.
MOST_INSTRUCTIONS = {
    ("two_pass_forward_reduce", "memory", False): (38, 48),
    ("two_pass_forward_apply", "memory", True): (34, 45),
    ("persistent_forward", "shared memory", False): (45, 45),
    ("persistent_forward", "shared memory", True): (42, 42),
    ("persistent_backward", "shared memory", False): (62, 62),
}


def test_hot_loops_are_short(code: dict[Name, list[sass.Block]]) -> None:
    measured = {}
    for name, blocks in code.items():
        if (name.dtype, name.width) != ("fastbn::BFloat16", 8):
            continue
        for loop in hot_loops(name, blocks):
            measured[name.kernel, loop.source, loop.writes, name.mapping] = loop.instructions
    for (kernel, source, writes), most in MOST_INSTRUCTIONS.items():
        for mapping, bound in zip(("MatrixColumns", "Contiguous"), most, strict=True):
            assert measured[kernel, source, writes, mapping] <= bound, (kernel, source, mapping)


def test_machine_code_has_no_local_memory(code: dict[Name, list[sass.Block]]) -> None:
    for name, blocks in code.items():
        used = {instruction.name for instruction in sass.instructions(blocks)}
        assert not used & {"LDL", "STL"}, name


def test_persistent_kernels_use_what_hopper_has(code: dict[Name, list[sass.Block]]) -> None:
    """Copies in bulk, of boxes and by vectors, barriers that wait for them and of clusters."""
    kernels = {name: blocks for name, blocks in code.items() if name.kernel in PERSISTENT}
    assert len(kernels) == len(PERSISTENT) * 2 * len(nvcc.SIZES)
    for name, blocks in kernels.items():
        tensors = KERNELS[name.kernel].tensors
        assert count(blocks, "UBLKCP") >= tensors, name
        # Boxes are of a matrix. One instruction may be all of a loop over the tensors.
        boxes = (count(blocks, "UTMALDG", ".2D"), count(blocks, "UTMASTG", ".2D"))
        assert all(boxes) == any(boxes) == (name.mapping == "MatrixColumns"), name
        assert count(blocks, "LDGSTS", ".128") >= tensors, name
        assert count(blocks, "SYNCS", ".TRYWAIT") >= 1, name
        assert count(blocks, "UCGABAR_WAIT") >= 1, name
        # What is in shared memory is read in vectors, in loops that reduce and apply. Of backward
        # the latter reads two, with a residual and without.
        in_smem = [b for b in blocks if b.in_loop and b.count("LDS", 128) >= min(tensors, 2)]
        assert len(in_smem) >= 2, name
        # In forward a mask may be stored in between.
        storing = blocks if name.kernel == "persistent_forward, residual" else in_smem
        assert any(block.in_loop and block.count("STG", 128) for block in storing), name


def test_waiting_blocks_leave_the_cache_alone(code: dict[Name, list[sass.Block]]) -> None:
    """Who looks again and again whether others have come empties no cache by it."""
    for name, blocks in code.items():
        if name.kernel not in PERSISTENT:
            continue
        polls = [
            {instruction.name for instruction in block.instructions}
            for index, block in enumerate(blocks)
            if index in block.successors and count([block], "LDG", ".STRONG.GPU")
        ]
        assert len(polls) == 1, name
        assert "CCTL" not in polls[0], name
        assert count(blocks, "CCTL") >= 1, name


def test_threads_without_a_channel_need_no_float64(code: dict[Name, list[sass.Block]]) -> None:
    """A way leads around all of it, from the start to the loop that applies."""
    kernels = [
        blocks
        for name, blocks in code.items()
        if name.kernel == "persistent_forward" and name.dtype != "double"
    ]
    assert len(kernels) == 2 * 3
    for blocks in kernels:
        in_float64 = frozenset(
            index
            for index, block in enumerate(blocks)
            for instruction in block.instructions
            if instruction.name in {"DADD", "DMUL", "DFMA"} and not instruction.conditional
        )
        assert in_float64
        applying = {
            index
            for index, block in enumerate(blocks)
            if block.in_loop and block.count("LDS", 128) and block.count("STG", 128)
        }
        assert applying
        assert applying <= sass.reachable(blocks, 0, around=in_float64)


@each_architecture
def test_blocks_fit_a_multiprocessor_as_planned(architecture: str, toolkit: Path) -> None:
    """The registers that the compiler took, and shared memory, for all blocks that share one."""
    usages = nvcc.usages(architecture)
    if architecture not in GPUS:
        pytest.skip(f"no known GPU is of {architecture}")
    device = DEVICES[GPUS[architecture]]
    together = set()
    for layer, layout, dtype, op in product(
        RESNET50, ("contiguous", "channels_last"), DTYPES, ("forward", "backward")
    ):
        shape = (64, layer.channels, layer.height, layer.width)
        question: dict[str, Any] = {
            "dtype": dtype,
            "layout": layout,
            "op": op,
            "device": device.name,
        }
        for algorithm, _ in fastbn.plan(shape, **question).considered:
            plan = fastbn.plan(shape, **{**question, "algorithm": algorithm})
            if not plan.blocks_per_multiprocessor:
                continue
            (usage,) = (
                usage
                for name, usage in usages.items()
                if name.kernel == f"persistent_{op}"
                and name.mapping.lower() == plan.mapping.replace("_", "")
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
    assert sass.way_round(blocks, blocks.index(loop)) == 6
    assert streaming(blocks, 2) == [loop]
    assert streaming(blocks, 3) == []
