"""Reads the machine code of kernels: basic blocks, loops, and what is in flight in them."""

from __future__ import annotations

import heapq
import re
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?\s*([A-Z0-9_.]+)\s*(.*?)\s*;")
LABEL = re.compile(r"^([.$\w]+):$")
# Code after these is reached by other ways only, unless they have a condition.
LEAVING = {"BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL"}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its suffixes: LDG.E.EF.128
    operands: str
    conditional: bool

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that it names."""
        found = re.search(r"`\(([.$\w]+)\)", self.operands)
        return found[1] if found else None

    @property
    def registers(self) -> set[int]:
        """Those that it names, the first of each group."""
        return {int(number) for number in re.findall(r"\bR(\d+)", self.operands)}

    def moves(self, name: str, bits: int) -> bool:
        """Whether it is the load or store of that name and width."""
        return self.name == name and f".{bits}" in self.opcode


@dataclass
class Block:
    """Instructions that are executed one after another, from first to last."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    in_loop: bool = False

    def count(self, name: str, bits: int) -> int:
        return sum(instruction.moves(name, bits) for instruction in self.instructions)

    def loads_in_flight(self, bits: int) -> int:
        """The most global loads of a width that are issued before one of them is waited for."""
        most = 0
        pending: list[set[int]] = []
        for instruction in self.instructions:
            if instruction.registers & set().union(*pending):
                pending = []
            if instruction.moves("LDG", bits):
                first = int(re.findall(r"\bR(\d+)", instruction.operands)[0])
                pending.append(set(range(first, first + bits // 32)))
                most = max(most, len(pending))
        return most


def disassemble(nvdisasm: Path, cubin: Path) -> str:
    """The listing of an object's code."""
    done = subprocess.run(
        [nvdisasm, "--print-code", cubin], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def functions(listing: str) -> dict[str, list[Block]]:
    """The basic blocks of each function in a listing, by mangled name."""
    found = {}
    for section in re.split(r"^//-+ \.text\.", listing, flags=re.MULTILINE)[1:]:
        name = section.split(" ", 1)[0]
        found[name] = blocks_of(section)
    return found


def blocks_of(section: str) -> list[Block]:
    """Cuts a function where it branches and where it is branched to."""
    blocks = [Block()]
    labels = {}
    for line in section.splitlines():
        label, instruction = LABEL.match(line), INSTRUCTION.match(line)
        if label:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif instruction:
            condition, opcode, operands = instruction.groups()
            blocks[-1].instructions.append(Instruction(opcode, operands, bool(condition)))
            if blocks[-1].instructions[-1].name in LEAVING | {"BSYNC"}:
                blocks.append(Block())
    connect(blocks, labels)
    mark_loops(blocks)
    return blocks


def connect(blocks: list[Block], labels: dict[str, int]) -> None:
    """Finds out where each block leads.

    Threads that part meet again at BSYNC, and go on where the BSSY of the same barrier said. A
    call comes back, and is followed by what follows it.
    """
    meeting_points: dict[str, str] = {}
    for index, block in enumerate(blocks):
        for instruction in block.instructions:
            if instruction.name == "BSSY" and instruction.target:
                meeting_points[instruction.operands.split(",")[0]] = instruction.target
        if not block.instructions:
            continue
        last = block.instructions[-1]
        target = meeting_points[last.operands] if last.name == "BSYNC" else last.target
        if last.name in {"BRA", "JMP", "BSYNC"} and target in labels:
            block.successors.append(labels[target])
        falls_through = last.conditional or last.name not in LEAVING | {"BSYNC"}
        if falls_through and index + 1 < len(blocks):
            block.successors.append(index + 1)


def mark_loops(blocks: list[Block]) -> None:
    """A block from which a way leads back to it is in a loop."""
    for index, block in enumerate(blocks):
        block.in_loop = index in reachable(blocks, index)


def reachable(blocks: list[Block], start: int, around: frozenset[int] = frozenset()) -> set[int]:
    """Blocks that come after this one, itself only if it comes again.

    Args:
        blocks: of a function.
        start: the index of one.
        around: blocks that the ways lead around.
    """
    seen: set[int] = set()
    todo = list(blocks[start].successors)
    while todo:
        index = todo.pop()
        if index not in seen and index not in around:
            seen.add(index)
            todo += blocks[index].successors
    return seen


def way_round(blocks: list[Block], start: int) -> int:
    """Instructions of the shortest way from a block in a loop back to it, its own included."""
    lengths: dict[int, int] = {}
    todo = [(len(blocks[start].instructions), start)]
    while todo:
        length, index = heapq.heappop(todo)
        for successor in blocks[index].successors:
            if successor == start:
                return length
            longer = length + len(blocks[successor].instructions)
            if longer < lengths.get(successor, longer + 1):
                lengths[successor] = longer
                heapq.heappush(todo, (longer, successor))
    raise ValueError(f"block {start} is in no loop")


def instructions(blocks: list[Block]) -> Iterator[Instruction]:
    for block in blocks:
        yield from block.instructions
