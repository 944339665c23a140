"""Record a launch with an autotuner and one without, and print the best of what was compiled.

Run as a program, like tiny_kernels.py.
"""

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from tiny_kernels import product

from supra.bench.compiled import Job
from supra.bench.fla_kernels import best, recording, seen_as

CONFIGURATIONS = [triton.Config({"SIZE": size}, num_warps=2) for size in (128, 16, 32, 64)]


@triton.autotune(CONFIGURATIONS, key=["rows"])
@triton.jit
def tuned(a, b, c, rows, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    places = i[:, None] * SIZE + i[None, :]
    x, y = tl.load(a + places), tl.load(b + places)
    tl.store(c + places, tl.dot(x, y), mask=i[:, None] < rows)


if __name__ == "__main__":
    a, b, c = (torch.empty(64, 64, device="meta", dtype=torch.bfloat16) for _ in range(3))
    job = Job("tiny", "fla", 64, "sm_80")
    with seen_as("sm_80"), recording(2) as (launches, compile):
        assert torch.cuda.get_device_capability() == (8, 0)
        tuned[(3,)](a, b, c, 50)
        product[(1,)](a, b, c, SIZE=16, PRECISION="tf32")
        found = [best(job, "forward", group, compile) for group in launches]
    print(json.dumps([asdict(x) for x in found]))
