"""Reads products and memory accesses of tiles from Triton's intermediate code."""

import math
import re
from typing import NamedTuple

from supra.bench.sass import Place

DOT = re.compile(r"\btt\.dot\b.*-> tensor<[^,>]*(?:, (#\w+))?>")
SCALAR_LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<", re.MULTILINE)
# %k = tt.load %p, %mask, %zero : tensor<64x64x!tt.ptr<bf16>> loc(#loc7)
ACCESS = re.compile(
    r"\btt\.(?:load|store)\b.* : (?:tensor<([\dx]+)x)?!tt\.ptr<[a-z]+(\d+)>.*(#loc\d*)"
)
LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
FILE = re.compile(r'"(.+)":(\d+):\d+')
LOOP = re.compile(r"\bscf\.(?:for|while)\b")
# The assumed number of iterations of a loop, which the code does not say: the tiles of a chunk.
LOOP_RUNS = 4


class Access(NamedTuple):
    """A load or store of one tile, vector or number."""

    place: Place
    shape: tuple[int, ...]
    moved: int  # bytes in total, if every loop around it runs LOOP_RUNS times


def count_dots(ttir: str) -> int:
    """The number of products of tiles, before the compiler unrolls or splits them."""
    return len(DOT.findall(ttir))


def count_scalar_dots(ttgir: str) -> int:
    """The number of products by fused multiply-adds: their results have a layout for threads, not
    for tensor cores."""
    scalar = set(SCALAR_LAYOUT.findall(ttgir))
    return sum(layout in scalar for layout in DOT.findall(ttgir))


def accesses(ttir: str) -> list[Access]:
    """All loads and stores of the kernel, including masked ones."""
    places = _places(ttir)
    regions: list[bool] = []  # whether each open region is a loop
    found = []
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}"):
            regions.pop()
        if line.endswith("{"):
            regions.append(LOOP.search(line) is not None)
        elif access := ACCESS.search(line):
            shape = tuple(int(size) for size in (access[1] or "").split("x") if size)
            moved = math.prod(shape) * int(access[2]) // 8 * LOOP_RUNS ** sum(regions)
            found.append(Access(places[access[3]], shape, moved))
    return found


def wide_share(accesses: list[Access], shares: dict[Place, float]) -> float:
    """The share of the bytes of `accesses` that move 128 bits at a time.

    `shares` gives this share for each line of the machine code. A line that is missing there was
    merged into another, and is left out.
    """
    kept = [x for x in accesses if x.place in shares]
    total = sum(x.moved for x in kept)
    return sum(x.moved * shares[x.place] for x in kept) / total if total else 1.0


def _places(ttir: str) -> dict[str, Place]:
    """The line of each named location, in the function that it was inlined from."""
    texts = dict(LOCATION.findall(ttir))
    places = {}
    for name, text in texts.items():
        # in "name"(#loc1) and callsite(#loc2 at #loc3), the first location is in the source
        while not (found := FILE.search(text)) and (inner := re.search(r"#loc\d*", text)):
            text = texts[inner[0]]
        places[name] = (found[1], int(found[2])) if found else ("", 0)
    return places
