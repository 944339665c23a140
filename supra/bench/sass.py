"""Reads the machine code of a kernel from the output of CUDA's tools."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
# //## File "/path/tiles.py", line 47
LINE = re.compile(r'^\s*//## File "(.+)", line (\d+)')
# /*0b20*/  @!P0 LDGSTS.E.BYPASS.128 [R27], desc[UR34][R20.64], !P1 ;
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
GLOBAL = {"LDG", "STG", "LDGSTS"}  # LDGSTS copies to shared memory without registers (cp.async)
WIDE = 128  # bits per thread and access

Place = tuple[str, int]  # file and line


class Instruction(NamedTuple):
    """One instruction. place: its line of the source, also inside inlined functions."""

    opcode: str
    place: Place

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bits(self) -> int:
        """Width of one thread's memory access; 32 if the opcode does not say."""
        widths = (part.lstrip("US") for part in self.opcode.split(".")[1:])
        return next((int(x) for x in widths if x in ("8", "16", "64", "128", "256")), 32)


def parse_usage(text: str) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack) from `cuobjdump -res-usage`."""
    registers, stack = USAGE.search(text).groups()
    return int(registers), int(stack)


def parse_instructions(text: str) -> Iterator[Instruction]:
    """The instructions that `nvdisasm -g -c` prints."""
    place = ("", 0)
    for line in text.splitlines():
        if found := LINE.match(line):
            place = (found[1], int(found[2]))
        elif found := INSTRUCTION.match(line):
            yield Instruction(found[1], place)


def tensor_core_instructions(instructions: list[Instruction]) -> Counter[str]:
    """Tensor core instructions by kind, such as HMMA (one warp), HGMMA (four warps) and UTCHMMA
    (in tensor memory)."""
    return Counter(x.name for x in instructions if x.name.endswith("MMA"))


def narrow_accesses(instructions: list[Instruction]) -> int:
    """The number of accesses to global memory of fewer than 128 bits per thread."""
    return sum(x.name in GLOBAL and x.bits < WIDE for x in instructions)


def wide_shares(instructions: list[Instruction]) -> dict[Place, float]:
    """For every line that accesses global memory: the share of bytes in accesses of 128 bits."""
    bits: dict[Place, list[int]] = defaultdict(list)
    for x in instructions:
        if x.name in GLOBAL:
            bits[x.place].append(x.bits)
    return {place: sum(x for x in all_ if x >= WIDE) / sum(all_) for place, all_ in bits.items()}
