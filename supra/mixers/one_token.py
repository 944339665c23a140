"""One token without gradients, in few operators: what the steps of mixers share.

`Mixer.mix` serves many tokens, gradients, padding and packed rows. A decoding step does so little
work that starting operators costs more than what they compute: with `mix`, a layer of mamba2 takes
380 operators, and a whole layer of the teacher 190. So a mixer may also prepare a step: a function
of one token that holds the parameters, cast, transposed and joined once. Tensors here have no axis
for tokens. Apart from projections of hidden states, all is computed in float32 or wider.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supra.mixers.inputs import MixerInputs, Rotary

# Takes the inputs of one token and the state before it; returns the output [B, 1, Hq, V] in the
# value's dtype, and the state after it.
Step = Callable[[MixerInputs, Any], tuple[Tensor, Any]]
Projection = Callable[[Tensor], Tensor]  # of x [B, D]
Convolution = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see `convolution`


def is_one_token(inputs: MixerInputs) -> bool:
    """Whether a call has one token in every row, needs no gradient and asks for nothing else.

    Compiled and exported graphs keep the form for many tokens: a graph would hold the parameters as
    they were, and a compiler joins small operators itself.
    """
    if inputs.query.shape[1] != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    others = inputs.padding_mask, inputs.cu_seqlens, inputs.part, inputs.watch, inputs.policy_run
    device = inputs.query.device.type
    return all(x is None for x in others) and not torch.is_autocast_enabled(device)


def may_prepare(mixer: nn.Module) -> bool:
    """Whether a step may read the parameters of a mixer instead of calling its modules.

    It may not if parameters are elsewhere until their module is called, as offloaded ones are, if
    they are too narrow to compute with, or if somebody has changed what a module does: by hooks,
    adapters or a parametrization.
    """
    for module in mixer.modules():
        hooked = module is not mixer and (module._forward_hooks or module._forward_pre_hooks)
        if hooked or "forward" in vars(module):
            return False
        if not type(module).__module__.startswith("supra.mixers."):
            return False
    tensors = *mixer.parameters(), *mixer.buffers()
    return not any(x.is_meta or x.dtype in (torch.float16, torch.bfloat16) for x in tensors)


class Prepared(NamedTuple):
    """A step (None if the mixer has none), the dtype it is for, and the tensors it holds."""

    dtype: torch.dtype  # of the activations
    step: Step | None
    sources: list[tuple[dict[str, Tensor | None], str, Tensor, int | None]]  # see `sources_of`

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether it is for this dtype, and no parameter or buffer was replaced or changed since.
        Changes through `x.data` leave no trace."""
        if self.dtype != dtype:
            return False
        for owner, name, x, version in self.sources:  # `all` takes twice the time
            if owner.get(name) is not x or (version is not None and x._version != version):
                return False
        return True


def sources_of(mixer: nn.Module) -> list[tuple[dict[str, Tensor | None], str, Tensor, int | None]]:
    """The parameters and buffers of a mixer: where each is held, its name, itself, and how often it
    was changed in place. Tensors of inference mode do not count that."""
    return [
        (owner, name, x, None if x.is_inference() else x._version)
        for module in mixer.modules()
        for owner in (module._parameters, module._buffers)
        for name, x in owner.items()
        if x is not None
    ]


def projection(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Projection:
    """x [B, D] to xWᵀ + b, all of this dtype; from W [C, D] and b [C]."""
    weight = weight.to(dtype)
    columns = weight.t()
    row = None if bias is None else bias.to(dtype)[None]
    # On a CPU (Xeon with AMX), mm takes 107 µs for a row of 576 bfloat16 and a square weight, mv 75
    # µs; in float32 they are alike.
    vectors = dtype == torch.bfloat16 and weight.device.type == "cpu"

    def project(x: Tensor) -> Tensor:
        if vectors and len(x) == 1:
            output = torch.mv(weight, x.view(-1)).view(1, -1)
            return output if row is None else output.add_(row)
        return torch.mm(x, columns) if row is None else torch.addmm(row, x, columns)

    return project


def convolution(taps: Tensor, bias: Tensor | None, silu: bool) -> Convolution:
    """The step of a short convolution with taps [C, W] and a bias [C].

    It takes a token [B, 1, C] and the W − 1 before it, [B, W − 1, C]; it returns the output [B, C]
    and the W − 1 tokens before the next.
    """
    columns = taps.t().contiguous()

    def convolve(token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([state, token], 1)
        output = (window * columns).sum(1)
        output = output if bias is None else output.add_(bias)
        return F.silu(output, inplace=True) if silu else output, window[:, 1:]

    return convolve


def as_dtype(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of `like`; no operator if it has it."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def flat(x: Tensor) -> Tensor:
    """One token [B, 1, …] as [B, C]."""
    return shaped(x, x.shape[0], -1)


def shaped(x: Tensor, *shape: int) -> Tensor:
    """x.reshape(shape), with one operator less where a view does."""
    return x.view(shape) if x.is_contiguous() else x.reshape(shape)


def joined(inputs: MixerInputs, names: Sequence[str]) -> Tensor:
    """The inputs of these names side by side, [B, 1, C]."""
    parts = [getattr(inputs, name) for name in names]
    if len({x.shape[3] for x in parts}) == 1:  # three views less
        return torch.cat(parts, 2).view(parts[0].shape[0], 1, -1)
    return torch.cat([x.flatten(2) for x in parts], 2)


def rotated(features: Tensor, rotary: Rotary | None) -> Tensor:
    """Features [B, H, K] at their position."""
    if rotary is None:
        return features
    batch, _, size = features.shape
    return torch.bmm(features, _matrices(rotary, size, batch, features.dtype))


@functools.lru_cache(maxsize=4)
def _matrices(rotary: Rotary, size: int, batch: int, dtype: torch.dtype) -> Tensor:
    """The rotation as matrices [B, K, K], for one product in the place of 34 operators.

    The layers of a call share their cosines, and so the matrices: tensors are equal here only if
    they are the same tensor. The last four stay in memory.
    """
    cos, sin = rotary.cos.to(dtype), rotary.sin.to(dtype)
    identity = _identity(size, dtype, cos.device)
    turned, _ = replace(rotary, cos=cos, sin=sin)(identity, identity[:, :, :0])
    return turned.view(-1, size, size).expand(batch, -1, -1)


@functools.lru_cache(maxsize=4)
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, K, K]."""
    return torch.eye(size, dtype=dtype, device=device)[None, None]


def over_length(x: Tensor, eps: Tensor, share: float = 1.0) -> Tensor:
    """x · (share · Σx² + eps)^-½ over the last axis; eps is a tensor of one number. On a CPU
    F.rms_norm takes 23 operators."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, length, length, value=share).rsqrt_()
