"""The short causal convolution of mixers: within each document, without padding, with a state."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from supra.kernels.causal_conv import causal_conv, causal_conv_step
from supra.mixers.inputs import MixerInputs
from supra.mixers.one_token import Convolution, convolution
from supra.mixers.padding import pick, tokens_first


class ShortConv(nn.Module):
    """Depthwise. It starts as the identity: 1 at the last tap, 0 elsewhere.

    gain: whether the outputs are multiplied by a fixed factor per channel, 1 at the start. Then
        trained taps and biases are in units of the inputs, which suits rates of training, even
        where an activation is to read much smaller or larger numbers.
    """

    def __init__(self, channels: int, size: int, bias: bool = True, gain: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.register_buffer("gain", torch.empty(channels) if gain else None)

    def reset_parameters(self) -> None:
        self.weight.data.zero_()[:, -1] = 1
        if self.bias is not None:
            self.bias.data.zero_()
        if self.gain is not None:
            self.gain.fill_(1)

    def reset_as_published(self) -> None:
        """Random taps and biases, as those of `nn.Conv1d`: uniform within 1/√W."""
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                bound = self.weight.shape[1] ** -0.5
                tensor.data.uniform_(-bound, bound)

    def taps(self) -> tuple[Tensor, Tensor | None]:
        """The weight [C, W] and the bias [C] with the gain in them."""
        if self.gain is None:
            return self.weight, self.bias
        bias = None if self.bias is None else self.bias * self.gain
        return self.weight * self.gain[:, None], bias

    def prepared(self, silu: bool = False) -> Convolution:
        """The same in a step, with SiLU after it or without."""
        return convolution(*self.taps(), silu)

    def forward(
        self, inputs: MixerInputs, names: Sequence[str], **settings
    ) -> tuple[MixerInputs, Tensor | None]:
        """`convolve` with this module's weight. An offloaded weight exists only in `forward`."""
        return convolve(inputs, names, *self.taps(), **settings)


def convolve(
    inputs: MixerInputs,
    names: Sequence[str],
    weight: Tensor,
    bias: Tensor | None = None,
    **settings,
) -> tuple[MixerInputs, Tensor | None]:
    """Convolve the inputs `names` together, in the order of the weight's channels.

    Returns the inputs with these replaced, and the state. `settings` are those of `short_conv`.
    """
    given = [getattr(inputs, name) for name in names]
    joined = torch.cat([x.flatten(2) for x in given], dim=-1)
    output, state = short_conv(inputs, joined, weight, bias, **settings)
    parts = output.split([x[0, 0].numel() for x in given], dim=-1)
    mixed = {n: y.view(x.shape) for n, x, y in zip(names, given, parts, strict=True)}
    return replace(inputs, **mixed), state


def convolved_identity(inputs: MixerInputs, weight: Tensor) -> Tensor:
    """The value [B, T, Hkv, T] from which a mixing matrix is computed: the identity over tokens,
    convolved with the mean taps of each head of weight [Hkv · V, W]."""
    batch, tokens, heads, _ = inputs.value.shape
    value = torch.eye(tokens, dtype=inputs.value.dtype, device=inputs.value.device)
    taps = weight.unflatten(0, (heads, -1)).mean(1).repeat_interleave(tokens, dim=0)
    output, _ = short_conv(inputs, value.repeat(batch, 1, heads).view(batch, tokens, -1), taps)
    return output.unflatten(-1, (heads, tokens))


def short_conv(
    inputs: MixerInputs,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolve x [B, T, C] with weight [C, W] as `causal_conv` does.

    Returns the output, which is meaningless at padding, and the last W − 1 tokens that are not
    padding, [B, W − 1, C], or None.
    """
    part = inputs.part
    if part is not None:
        state = part.of_sequences(part.last_tokens(x, weight.shape[1] - 1), inputs.cu_seqlens)
    settings = {"activation": activation, "initial_state": state, "return_state": return_state}
    if inputs.cu_seqlens is not None:
        settings |= {"cu_seqlens": inputs.cu_seqlens, "return_state": False}
        output, _ = causal_conv(x.flatten(0, 1)[None], weight, bias, **settings)
        return output.view(x.shape), None
    if inputs.padding_mask is None:
        traced = torch.is_grad_enabled() or torch.compiler.is_exporting()
        if x.shape[1] > 1 or state is None or traced:
            return causal_conv(x, weight, bias, **settings)
        # on a copy, since a cache may go back to the old state; a quarter of causal_conv's time
        state = state.to(x.dtype, copy=True, memory_format=torch.contiguous_format)
        settings = {"activation": activation, "state": state, "in_place": True}
        return causal_conv_step(x, weight, bias, **settings)
    order = tokens_first(inputs.padding_mask)
    x = pick(x, order)
    output, _ = causal_conv(x, weight, bias, **settings)
    output = pick(output, order.argsort(dim=1))
    if not return_state:
        return output, None
    past = weight.shape[1] - 1
    if state is None:
        state = torch.zeros_like(x[:, :1]).expand(-1, past, -1)
    last = inputs.padding_mask.sum(1)[:, None] + torch.arange(past, device=x.device)
    return output, pick(torch.cat([state, x], dim=1), last)
