"""The gated convolution of H3 over the channels of all heads, with state-space kernels."""

import torch
from torch import Tensor

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting
from supra.kernels.long_conv import chunk_ssm_conv, recurrent_ssm_conv

MODES = 32  # per channel in H3


def long_conv_inputs(setting: Setting) -> Inputs:
    """S4D's starting values. `kernel` holds the taps, for rivals that take a ready kernel."""
    channels = setting.heads * setting.head_size
    query, key, value = (setting.tokens().flatten(2)[..., None] for _ in range(3))
    step = 0.001 * 100 ** torch.rand(channels, 1, device=setting.device)
    model = {
        "log_decay": (-step / 2).expand(-1, MODES).contiguous(),
        "frequency": torch.pi * step * torch.arange(MODES, device=setting.device),
        "weight": torch.randn(channels, MODES, 2, device=setting.device) * step[..., None],
        "skip": torch.randn(channels, device=setting.device),
    }
    impulse = torch.zeros(1, setting.length, channels, 1, device=setting.device)
    impulse[:, 0] = 1
    kernel, _ = chunk_ssm_conv(None, None, impulse, **model, backend="torch")
    kernel = kernel[0, ..., 0].mT.contiguous()
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
    """As H3 computes it: channels are moved to the front and back, and transforms have length 2 T
    so that nothing wraps around."""
    length = value.shape[1]
    columns = (key * value)[..., 0].mT.float()
    spectrum = torch.fft.rfft(columns, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    found = torch.fft.irfft(spectrum, 2 * length)[..., :length]
    return query * found.mT[..., None].to(query.dtype)


LONG_CONV = Operation(
    long_conv_inputs, long_conv, {"torch FFT of a ready kernel": Contender(torch_fft)}
)
