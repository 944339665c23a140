"""Are the kernels right on this chip? Results and all gradients against float64."""

from typing import Any

import torch
from torch import Tensor

from supra.bench.rivals import OPERATIONS, Setting

# largest relative errors (root mean square), as in the tests of the kernels
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
SUMMED = 3  # times as much for the gradient of a weight: it is a sum over all tokens, which cancel
LOOP_NUMBERS = 10**5  # of a check against the loop over tokens on the CPU; larger ones take chunks
STEPS = 3


def settings(device: str, odd: tuple[int, ...], large: tuple[int, ...]) -> dict[str, Setting]:
    """odd, large: batch, tokens, heads and head size."""
    return {
        "odd, float32": Setting(*odd, torch.float32, device),
        "odd, bfloat16": Setting(*odd, torch.bfloat16, device),
        "large, bfloat16": Setting(*large, torch.bfloat16, device),
    }


def rival_setting(device: str) -> Setting:
    return Setting(2, 512, 4, 64, torch.bfloat16, device)


def compare(operation: str, setting: Setting) -> dict[str, Any]:
    """The forward and the backward pass against float64: the recurrence on the CPU for small
    shapes, and the torch backend on the same device for large ones."""
    entry, small = OPERATIONS[operation], _numbers(setting) <= LOOP_NUMBERS
    torch.manual_seed(0)
    inputs = entry.inputs(setting._replace(device="cpu"))
    ours = _with_gradients(entry.ours("triton"), _moved(inputs, setting.device))
    backend, device = ("reference", "cpu") if small else ("torch", setting.device)
    exact = {name: x.double() for name, x in inputs.items()}
    found = _with_gradients(entry.ours(backend), _moved(exact, device))
    errors = {name: relative_error(ours[name], x) for name, x in found.items()}
    for name, x in inputs.items():
        if x.shape[:2] != (setting.batch, setting.length) and f"gradient of {name}" in errors:
            errors[f"gradient of {name}"] /= SUMMED
    return _judged(errors, ALLOWED[setting.dtype], f"{backend} in float64")


def compare_steps(operation: str, setting: Setting) -> dict[str, Any]:
    """A few steps of decoding against the torch backend on the same device."""
    outputs = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        step = OPERATIONS[operation].ours(backend).step(setting)
        outputs.append([step()[0].clone() for _ in range(STEPS)])
    errors = {
        f"output of step {number}": relative_error(*pair)
        for number, pair in enumerate(zip(*outputs, strict=True), start=1)
    }
    return _judged(errors, ALLOWED[setting.dtype], "torch")


def compare_rival(operation: str, rival: str, setting: Setting) -> dict[str, Any]:
    """Whether a rival computes the same function. Both have rounded to bfloat16."""
    contender = OPERATIONS[operation].rivals[rival]
    if missing := contender.hindrance(setting.device):
        return {"missing": missing}
    torch.manual_seed(0)
    inputs = OPERATIONS[operation].inputs(setting)
    ours = OPERATIONS[operation].ours("triton").whole(**inputs)
    errors = {"output": relative_error(contender.whole(**inputs), ours)}
    return _judged(errors, 2 * ALLOWED[setting.dtype], "supra")


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact| over all elements, in float64; nan if one is not finite."""
    x, exact = x.detach().cpu().double(), exact.detach().cpu().double()
    return ((x - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def _with_gradients(contender: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of every input that the output depends on."""
    for x in inputs.values():
        x.requires_grad_()
    output = contender.whole(**inputs)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator).to(output)
    gradients = torch.autograd.grad(output, list(inputs.values()), cotangent, allow_unused=True)
    named = zip(inputs, gradients, strict=True)
    found = {f"gradient of {name}": x for name, x in named if x is not None}
    return {"output": output} | found


def _judged(errors: dict[str, float], allowed: float, against: str) -> dict[str, Any]:
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    error = errors[worst]
    return {
        "error": error if error == error else "not finite",
        "worst": worst,
        "allowed": allowed,
        "against": against,
        "right": error <= allowed,
    }


def _moved(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: x.detach().to(device) for name, x in inputs.items()}


def _numbers(setting: Setting) -> int:
    return setting.batch * setting.length * setting.heads * setting.head_size
