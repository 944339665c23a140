"""What `supra bench kernels` compares: our operations, and what one would call in their place.

An operation is one entry of OPERATIONS: its inputs, how ours computes it, and its rivals.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels.causal_conv import causal_conv, causal_conv_step
from supra.kernels.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from supra.kernels.gated_linear_attention import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)
from supra.kernels.linear_attention import (
    LinearAttentionState,
    chunk_linear_attention,
    recurrent_linear_attention,
)
from supra.kernels.long_conv import chunk_ssm_conv, recurrent_ssm_conv, ssm_kernel

TAPS = 4
MODES = 32  # of a channel of H3
MAMBA2_CHUNK = 256  # the default of its config

Inputs = dict[str, Tensor]


class Setting(NamedTuple):
    """A shape, and where: B, T, H, size of a head."""

    batch: int
    length: int
    heads: int
    head_size: int
    dtype: torch.dtype
    device: str

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def tokens(self) -> Tensor:
        """[B, T, H, head_size]"""
        return self.normal(self.batch, self.length, self.heads, self.head_size)

    def factors(self) -> Tensor:
        """[B, T, H] float32 in [0, 1), as models keep decays and step sizes."""
        return torch.rand(self.batch, self.length, self.heads, device=self.device)

    def state(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, H, head_size, head_size]"""
        shape = (self.batch, self.heads, self.head_size, self.head_size)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def token(self) -> "Setting":
        """One token of the same batch."""
        return self._replace(length=1)


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    whole(**inputs): the output for whole sequences.
    step(setting): a function that decodes one token after setting.length others.
    """

    whole: Callable[..., Tensor] | None
    step: Callable[[Setting], Callable[[], Any]] | None = None
    package: str = "torch"
    gpu_only: bool = False

    def runs(self, device: str) -> bool:
        return find_spec(self.package) is not None and (device == "cuda" or not self.gpu_only)


@dataclass(frozen=True)
class Operation:
    """inputs(setting); ours(backend); and the rivals by name."""

    inputs: Callable[[Setting], Inputs]
    ours: Callable[[str], Contender]
    rivals: dict[str, Contender] = field(default_factory=dict)


# softmax attention, which every one of the recurrences stands in for


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def softmax_attention_step(setting: Setting) -> Callable[[], Any]:
    """One query against a cache of all keys and values, which it does not have to extend."""
    query = setting.token().tokens().transpose(1, 2)
    shape = (setting.batch, setting.heads, setting.length, setting.head_size)
    key, value = setting.normal(*shape), setting.normal(*shape)
    return lambda: F.scaled_dot_product_attention(query, key, value)


SOFTMAX = Contender(softmax_attention, softmax_attention_step)


# linear attention with a normalizer


def linear_attention_inputs(setting: Setting) -> Inputs:
    query, key, value = (setting.tokens() for _ in range(3))
    return {"query": query.abs_(), "key": key.abs_(), "value": value}


def linear_attention(backend: str) -> Contender:
    def whole(**inputs):
        return chunk_linear_attention(**inputs, normalize="sum", backend=backend)[0]

    def step(setting):
        inputs = linear_attention_inputs(setting.token())
        memory = setting.state()
        state = LinearAttentionState(memory, memory[..., 0].contiguous())
        return lambda: recurrent_linear_attention(
            **inputs, normalize="sum", initial_state=state, return_state=True, in_place=True,
            backend=backend,
        )  # fmt: skip

    return Contender(whole, step)


def fla_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(query, key, value, normalize=True)[0]


# the scan of Mamba-2: linear attention with a decay per token and head


def mamba2_inputs(setting: Setting) -> Inputs:
    """Named as in transformers; a group per head, so that the work is that of linear attention."""
    return {
        "hidden_states": setting.tokens(),
        "dt": setting.factors(),
        "A": -torch.rand(setting.heads, device=setting.device),
        "B": setting.tokens(),
        "C": setting.tokens(),
    }


def mamba2(backend: str) -> Contender:
    def arguments(hidden_states, dt, A, B, C):
        value = hidden_states * dt[..., None].to(hidden_states.dtype)
        return {"query": C, "key": B, "value": value, "log_decay": dt * A, "backend": backend}

    def whole(**inputs):
        return chunk_linear_attention(**arguments(**inputs))[0]

    def step(setting):
        inputs = mamba2_inputs(setting.token())
        state = LinearAttentionState(setting.state(), None)
        return lambda: recurrent_linear_attention(
            **arguments(**inputs), initial_state=state, return_state=True, in_place=True
        )

    return Contender(whole, step)


def transformers_mamba2(**inputs: Tensor) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(**inputs, chunk_size=MAMBA2_CHUNK)


def transformers_mamba2_step(setting: Setting) -> Callable[[], Any]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    x, dt, A, B, C = (
        x[:, 0] if x.dim() > 1 else x for x in mamba2_inputs(setting.token()).values()
    )
    state, size = setting.state(), setting.head_size
    dt, A = dt[..., None].expand(-1, -1, size), A[:, None, None].expand(-1, size, size)
    return lambda: mamba2_selective_state_update(state, x, dt, A, B, C, None)


def fla_mamba2(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    value = hidden_states * dt[..., None].to(hidden_states.dtype)
    return chunk_simple_gla(C, B, value, g=dt * A, scale=1.0)[0]


# linear attention with a decay per key channel


def gated_linear_attention_inputs(setting: Setting) -> Inputs:
    query, key, value, gate = (setting.tokens() for _ in range(4))
    return {"query": query, "key": key, "value": value, "log_decay": F.logsigmoid(gate) / 16}


def gated_linear_attention(backend: str) -> Contender:
    def whole(**inputs):
        return chunk_gated_linear_attention(**inputs, backend=backend)[0]

    def step(setting):
        inputs = gated_linear_attention_inputs(setting.token())
        state = setting.state()
        return lambda: recurrent_gated_linear_attention(
            **inputs, initial_state=state, return_state=True, in_place=True, backend=backend
        )

    return Contender(whole, step)


def fla_gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor
) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(query, key, value, log_decay, scale=1.0)[0]


# the gated delta rule


def gated_delta_rule_inputs(setting: Setting) -> Inputs:
    query, key, value = (setting.tokens() for _ in range(3))
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    beta, log_decay = setting.factors(), -0.1 * setting.factors()
    return {"query": query, "key": key, "value": value, "beta": beta, "log_decay": log_decay}


def gated_delta_rule(backend: str) -> Contender:
    def whole(**inputs):
        scale = inputs["query"].shape[-1] ** -0.5
        return chunk_gated_delta_rule(**inputs, scale=scale, backend=backend)[0]

    def step(setting):
        inputs, scale = gated_delta_rule_inputs(setting.token()), setting.head_size**-0.5
        state = setting.state()
        return lambda: recurrent_gated_delta_rule(
            **inputs, scale=scale, initial_state=state, return_state=True, in_place=True,
            backend=backend,
        )  # fmt: skip

    return Contender(whole, step)


def transformers_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(query, key, value, log_decay, beta)[0]


def transformers_gated_delta_rule_step(setting: Setting) -> Callable[[], Any]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    query, key, value, beta, log_decay = gated_delta_rule_inputs(setting.token()).values()
    state = setting.state()
    return lambda: torch_recurrent_gated_delta_rule(
        query, key, value, log_decay, beta, initial_state=state, output_final_state=True
    )


def fla_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs

    return theirs(query, key, value, g=log_decay, beta=beta)[0]


# the short convolution, of all heads' channels, with silu


def causal_conv_inputs(setting: Setting) -> Inputs:
    width = setting.heads * setting.head_size
    return {
        "input": setting.tokens().flatten(2),
        "weight": setting.normal(width, TAPS),
        "bias": setting.normal(width),
    }


def convolution(backend: str) -> Contender:
    def whole(**inputs):
        return causal_conv(**inputs, activation="silu", backend=backend)[0]

    def step(setting):
        inputs = causal_conv_inputs(setting.token())
        state = _convolution_state(setting)
        return lambda: causal_conv_step(
            **inputs, state=state, activation="silu", in_place=True, backend=backend
        )

    return Contender(whole, step)


def conv1d(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As models call it: channels to the front and back again."""
    width, taps = weight.shape
    output = F.conv1d(input.mT, weight[:, None], bias, padding=taps - 1, groups=width)
    return F.silu(output[..., : input.shape[1]]).mT


def conv1d_step(setting: Setting) -> Callable[[], Any]:
    from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_update

    inputs = causal_conv_inputs(setting.token())
    state = _convolution_state(setting).mT.contiguous()
    token, weight, bias = inputs["input"].mT, inputs["weight"], inputs["bias"]
    return lambda: causal_conv1d_update(token, state, weight, bias, activation="silu")


def fla_convolution(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from fla.modules.convolution import causal_conv1d

    return causal_conv1d(input, weight, bias, activation="silu")[0]


def _convolution_state(setting: Setting) -> Tensor:
    shape = (setting.batch, TAPS - 1, setting.heads * setting.head_size)
    return torch.zeros(shape, dtype=setting.dtype, device=setting.device)


# the gated convolution of H3, of all heads' channels, with the kernels of state-space models


def long_conv_inputs(setting: Setting) -> Inputs:
    """The model starts as S4D's; `kernel`, its taps, is ready for whom it helps."""
    channels = setting.heads * setting.head_size
    query, key, value = (setting.tokens().flatten(2)[..., None] for _ in range(3))
    step = 0.001 * 100 ** torch.rand(channels, 1, device=setting.device)
    model = {
        "log_decay": (-step / 2).expand(-1, MODES).contiguous(),
        "frequency": torch.pi * step * torch.arange(MODES, device=setting.device),
        "weight": torch.randn(channels, MODES, 2, device=setting.device) * step[..., None],
        "skip": torch.randn(channels, device=setting.device),
    }
    kernel = ssm_kernel(**model, length=setting.length)
    return {"query": query, "key": key, "value": value, **model, "kernel": kernel}


def long_conv(backend: str) -> Contender:
    def whole(kernel, **inputs):
        return chunk_ssm_conv(**inputs, backend=backend)[0]

    def step(setting):
        inputs = long_conv_inputs(setting.token())
        del inputs["kernel"]
        channels = setting.heads * setting.head_size
        state = torch.zeros(setting.batch, channels, MODES, 2, 1, 1, device=setting.device)
        return lambda: recurrent_ssm_conv(
            **inputs, initial_state=state, return_state=True, in_place=True, backend=backend
        )

    return Contender(whole, step)


def torch_fft(query: Tensor, key: Tensor, value: Tensor, kernel: Tensor, **_: Tensor) -> Tensor:
    """As H3 does it: channels to the front and back again, transforms of 2 T for no wrap-around."""
    length = value.shape[1]
    columns = (key * value)[..., 0].mT.float()
    spectrum = torch.fft.rfft(columns, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    found = torch.fft.irfft(spectrum, 2 * length)[..., :length]
    return query * found.mT[..., None].to(query.dtype)


def _fla(whole: Callable[..., Tensor]) -> Contender:
    return Contender(whole, package="fla", gpu_only=True)


OPERATIONS = {
    "linear_attention": Operation(
        linear_attention_inputs,
        linear_attention,
        {"torch softmax attention": SOFTMAX, "fla": _fla(fla_linear_attention)},
    ),
    "mamba2": Operation(
        mamba2_inputs,
        mamba2,
        {
            "transformers": Contender(
                transformers_mamba2, transformers_mamba2_step, "transformers"
            ),
            "fla": _fla(fla_mamba2),
        },
    ),
    "gated_linear_attention": Operation(
        gated_linear_attention_inputs,
        gated_linear_attention,
        {"torch softmax attention": SOFTMAX, "fla": _fla(fla_gated_linear_attention)},
    ),
    "gated_delta_rule": Operation(
        gated_delta_rule_inputs,
        gated_delta_rule,
        {
            "torch softmax attention": SOFTMAX,
            "transformers": Contender(
                transformers_gated_delta_rule, transformers_gated_delta_rule_step, "transformers"
            ),
            "fla": _fla(fla_gated_delta_rule),
        },
    ),
    "causal_conv": Operation(
        causal_conv_inputs,
        convolution,
        {
            "torch conv1d": Contender(conv1d),
            "transformers": Contender(None, conv1d_step, "transformers"),
            "fla": _fla(fla_convolution),
        },
    ),
    "long_conv": Operation(
        long_conv_inputs, long_conv, {"torch FFT of a ready kernel": Contender(torch_fft)}
    ),
}
