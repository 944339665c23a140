"""Triton's interpreter, without the two habits that take more than half of its time."""

import dataclasses

import pytest
import triton.language as tl
from triton.runtime import interpreter


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


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter():
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _PatchOnce(interpreter._patch_lang))
        # every integer sum is checked for overflow, which sizes as small as ours cannot have
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", options)
        yield
