"""Where Triton kernels run: in the interpreter, or on a GPU with TRITON_INTERPRET=0.

On a GPU the tests are the same and their tensors stay on the CPU: a launch copies what it is given
to the GPU and copies all of it back, so that what a kernel writes where it should not is seen too.
"""

import dataclasses

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from supra.kernels import backends, launch


class _PatchOnce:
    """Patches triton.language at a launch, and not again at each call of a device function."""

    def __init__(self, patch):
        self.patch, self.scopes = patch, []

    def __call__(self, function):
        if not self.scopes:  # our functions see triton.language, its own see triton.language.core
            self.scopes = [self.patch(function), self.patch(tl.zeros.fn)]
        return self

    def restore(self):
        while self.scopes:
            self.scopes.pop().restore()


def _scan(self, input):
    """ScanOps.generic_scan by slices along the axis; its own goes number by number."""
    tiles, before = [np.moveaxis(x.handle.data, self.axis, 0) for x in input], None
    found = [np.empty_like(x) for x in tiles]
    for i, slices in enumerate(zip(*tiles, strict=True)):
        now = tuple(self.to_tensor(x, y.dtype) for x, y in zip(slices, input, strict=True))
        before = now if before is None else self.combine_fn.fn(*before, *now)
        for x, part in zip(found, before, strict=True):
            x[i] = part.handle.data
    found = (np.moveaxis(x, 0, self.axis) for x in found)
    return [self.to_tensor(x, y.dtype) for x, y in zip(found, input, strict=True)]


def _fast_interpreter(patch):
    """Without the habits that take most of its time."""
    builder = interpreter.interpreter_builder
    patch.setattr(interpreter, "_patch_lang", _PatchOnce(interpreter._patch_lang))
    # every integer sum is checked for overflow, which sizes as small as ours cannot have
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch.setattr(builder, "options", options)
    patch.setattr(interpreter.ScanOps, "generic_scan", _scan)


def _on_gpu(patch):
    run, target_of, gpu = launch._run, launch._target_of, torch.device("cuda")

    def run_on_copies(kernel, grid, given, tiling):
        storages = {}

        def copied(x):
            storage = x.untyped_storage()
            _, copy = storages.setdefault(storage.data_ptr(), (storage, storage.cuda()))
            empty = torch.empty(0, dtype=x.dtype, device=gpu)
            return empty.set_(copy, x.storage_offset(), x.shape, x.stride())

        given = {n: copied(x) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        run(kernel, grid, given, tiling)
        for storage, copy in storages.values():
            storage.copy_(copy)

    patch.setattr(launch, "_run", run_on_copies)
    patch.setattr(launch, "_target_of", lambda device: target_of(gpu))
    patch.setattr(backends, "_hindrance", lambda tensors: None)


@pytest.fixture(scope="session", autouse=True)
def _where_kernels_run():
    with pytest.MonkeyPatch.context() as patch:
        (_fast_interpreter if backends.interpreting() else _on_gpu)(patch)
        yield
