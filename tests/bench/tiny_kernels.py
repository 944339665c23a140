"""Compile a few small kernels, and print what `compiled.examine` finds in each as JSON.

Run as a program: the tests' own process interprets Triton, and cannot compile.
"""

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from supra.bench.compiled import Job, compile_launch
from supra.kernels import tiles
from supra.kernels.launch import Launch, Tiling


@triton.jit
def product(a, b, c, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tiles.load(a, SIZE, i, SIZE, i, SIZE)
    y = tiles.load(b, SIZE, i, SIZE, i, SIZE)
    tiles.store(c, SIZE, i, SIZE, i, SIZE, tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def scale_rows(x, factors, rows, SIZE: tl.constexpr):
    """One vector of 64 against two matrices of 64 x 64, four times."""
    i = tl.arange(0, SIZE)
    for row in range(0, rows, SIZE):
        factor = tl.load(factors + row + i, mask=row + i < rows, other=0.0)
        tile = tiles.load(x + row * SIZE, SIZE, i, rows - row, i, SIZE)
        tiles.store(x + row * SIZE, SIZE, i, rows - row, i, SIZE, tile * factor[:, None])


@triton.jit
def copy_columns(x, y, stride, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i * stride))


def launches():
    matrices = {name: torch.empty(64, 64, device="meta") for name in "abc"}
    narrow = {name: x.bfloat16() for name, x in matrices.items()}
    x = matrices["a"]
    tiling = Tiling(64, 64)
    yield "bf16", Launch(product, (1,), narrow, {"SIZE": 64, "PRECISION": "tf32"}, tiling)
    yield "ieee", Launch(product, (1,), matrices, {"SIZE": 16, "PRECISION": "ieee"}, tiling)
    constants = {"SIZE": 128, "PRECISION": "tf32"}  # 256 sums a thread, which has 255 registers
    yield "spilling", Launch(product, (1,), narrow, constants, Tiling(128, 128, 2))
    arguments = {"x": narrow["a"], "factors": x[0], "rows": 1000}
    yield "vectors", Launch(scale_rows, (1,), arguments, {"SIZE": 64}, tiling)
    yield "columns", Launch(copy_columns, (1,), {"x": x, "y": x, "stride": 5}, {"SIZE": 64}, tiling)
    yield "broken", Launch(copy_columns, (1,), {"x": x, "y": 3, "stride": 5}, {"SIZE": 64}, tiling)


if __name__ == "__main__":
    rows = {}
    for target in sys.argv[1:]:
        for name, launched in launches():
            if name in ("bf16", "vectors") or target == "sm_80":
                job = Job("tiny", name, 64, target)
                rows[f"{name} {target}"] = asdict(compile_launch(job, "forward", launched))
    print(json.dumps(rows))
