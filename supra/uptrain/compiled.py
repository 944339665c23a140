"""`compile: true`: torch.compile for the modules that a stage runs many times.

In `distill` and `tune`, each block of student and teacher is compiled. Blocks are alike, so one
graph serves all of them, and compiling takes as long for 30 as for two. In `align`, hooks read what
the parts of a block compute. So there the student's mixers are compiled, and the teacher's norms
and feed-forward networks.

The rows of a step have the same shape in every step. Only the number of documents in them varies,
and the graph for packed rows leaves that size open. Nothing is compiled again after the first step
with packed rows and the first step without.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.mixers import Mixer, MixerInputs
from supra.model.attention import attention_modules, blocks_of
from supra.model.native.adapter import adopt

BACKEND = "inductor"
NOT_COMPILED = {"window"}  # mixers that have no graph without a break
COMPILERS = ("g++", "clang++", "c++", "cl")
Layers = tuple[PreTrainedModel, Sequence[tuple[nn.Module, nn.Module]]]
# Graphs of the same code at most: hybrids have several, with and without documents. torch's default
# is 8.
GRAPHS = 64


class Compiled:
    """The compiled modules of the current stage; none if `asked` is false."""

    def __init__(self, student: PreTrainedModel, asked: bool):
        """Raises UserError for a student, or on a machine, for which nothing can be compiled."""
        if asked:
            check_compiler()
            check_student(student)
        self.blocks = blocks_of(student) if asked else []
        self.modules: list[nn.Module] = []

    def begin(self, layers: Layers | None) -> None:
        """Begin a stage. layers: the teacher, and the pairs of the student's and the teacher's
        attention modules, in a stage that trains layers."""
        for module in self.modules:
            del module.forward
        self.modules = self.blocks
        if self.blocks and layers is not None:
            teacher, pairs = layers
            self.modules = [*around_attention(teacher), *(student.mixer for student, _ in pairs)]
        compile_all(self.modules)


def compile_all(modules: Iterable[nn.Module]) -> None:
    """Compile the `forward` of each module when it first runs. Hooks stay outside of the graphs."""
    torch._dynamo.config.recompile_limit = GRAPHS
    for module in modules:
        module.forward = _compiled(module.forward)


def around_attention(model: PreTrainedModel) -> list[nn.Module]:
    """The parts of a model's blocks without attention in them: norms and feed-forward networks."""
    attention = {id(x) for x in attention_modules(model)}
    return [
        part
        for block in blocks_of(model)
        for part in block.children()
        if not any(id(x) in attention for x in part.modules())
    ]


def eagerly() -> AbstractContextManager[Any]:
    """Inside, compiled modules run as if they were not. For evaluations, whose rows have other
    shapes and need no gradient: each would be compiled for."""
    return torch.compiler.set_stance("force_eager")


def check_student(student: PreTrainedModel) -> None:
    """Raise UserError for a model that is recurrent itself, or has a mixer without a graph."""
    if adopt(student):
        raise UserError(
            f"compile (=True) does not go with model_type {student.config.model_type!r}: its own "
            "recurrent layers were never tested with it; set compile=false"
        )
    if any(isinstance(x, Mixer) and x.name in NOT_COMPILED for x in student.modules()):
        raise UserError(
            "compile (=True) does not go with the mixer window (or lolcats, which is one): it "
            "draws a number in each call and decides by it; set compile=false"
        )


def check_compiler() -> None:
    """Raise UserError if torch.compile has no C++ compiler to call."""
    names = (os.environ.get("CXX"), *COMPILERS)
    if BACKEND == "inductor" and not any(name and shutil.which(name) for name in names):
        raise UserError(
            f"compile (=True) needs a C++ compiler, and none of {', '.join(COMPILERS)} was found: "
            "install one or name it in the variable CXX, or set compile=false"
        )


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    run = torch.compile(forward, fullgraph=True, backend=BACKEND)

    def call(*args, **kwargs):
        for bounds in _bounds((*args, *kwargs.values())):
            torch._dynamo.maybe_mark_dynamic(bounds, bounds.dim() - 1)
        return run(*args, **kwargs)

    return call


def _bounds(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """The bounds of documents among the arguments of a block, or of a mixer."""
    for x in arguments:
        bounds = x.cu_seqlens if isinstance(x, MixerInputs) else x
        if isinstance(bounds, Tensor) and bounds.dtype == torch.int32:
            yield bounds
