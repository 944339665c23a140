"""A mixer for torch.export and ONNX: one step, and an operator that repeats it for every token.

Other runtimes do not know the kernels, which are custom operators and cut a known length into
chunks. A step consists of torch's own operators, and the number of steps may be dynamic.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from supra.errors import UserError
from supra.mixers.inputs import MixerInputs

PER_TOKEN = ("hidden_states", "query", "key", "value", "padding_mask")


def takes_steps(inputs: MixerInputs) -> bool:
    """Whether a call is being exported and has several tokens or padding, so that one step is not
    enough."""
    if not torch.compiler.is_exporting():
        return False
    return inputs.padding_mask is not None or inputs.query.shape[1] != 1


def step_by_step(mixer: nn.Module, inputs: MixerInputs, state: Any) -> tuple[Tensor, Any]:
    """Run `mixer` with one step per token: the output [B, T, Hq, V] and the state after it.

    A padded token leaves the state unchanged. Raises UserError for packed rows and for the policy
    `norm`.
    """
    _check(mixer, inputs)
    tokens = _tokens(inputs)
    if state is None:  # a state after the first token shows the tensors and their sizes
        _, first = mixer(_one(inputs, {name: x[0] for name, x in tokens.items()}), None, True)
        state = first._make(x if x is None else x.new_zeros(x.shape) for x in first)
    fields = [name for name, x in state._asdict().items() if x is not None]
    # the operator sees nothing but its arguments: parameters and buffers are passed by name
    constants = dict(mixer.named_parameters()) | dict(mixer.named_buffers())
    if inputs.sinks is not None:
        constants["sinks"] = inputs.sinks

    def step(*flat: Tensor) -> list[Tensor]:
        parts = iter(flat)
        before, token, known = (
            {name: next(parts) for name in names} for names in (fields, tokens, constants)
        )
        one = replace(_one(inputs, token), sinks=known.pop("sinks", None))
        given = one, state._replace(**before), True
        output, after = torch.func.functional_call(mixer, known, given)
        kept = [getattr(after, name) for name in fields]
        if "padding_mask" in token:
            is_token = token["padding_mask"]
            kept = [
                torch.where(is_token.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(kept, before.values(), strict=True)
            ]
        return [*(x.contiguous() for x in kept), output[:, 0]]

    begin = [getattr(state, name).contiguous() for name in fields]
    *end, output = _scan(step, begin, [*tokens.values()], [*constants.values()])
    return output.transpose(0, 1), state._replace(**dict(zip(fields, end, strict=True)))


def _check(mixer: nn.Module, inputs: MixerInputs) -> None:
    if inputs.cu_seqlens is not None:
        raise UserError("packed rows cannot be exported: give one document per row, padded")
    if mixer.policy is not None and mixer.policy.norm is not None:
        raise UserError(
            f"norm (={mixer.policy.norm}) of the state_policy cannot be exported: it depends on "
            "how many tokens each row has read; take decay_scale or window"
        )


def _tokens(inputs: MixerInputs) -> dict[str, Tensor]:
    """The per-token inputs of the steps, tokens first: [T, B, …]."""
    found = {name: getattr(inputs, name) for name in PER_TOKEN}
    if inputs.rotary is not None:
        rows = inputs.query.shape[0]
        angles = {"cos": inputs.rotary.cos, "sin": inputs.rotary.sin}
        found |= {name: x.expand(rows, -1, -1) for name, x in angles.items()}
    return {name: x.transpose(0, 1) for name, x in found.items() if x is not None}


def _one(inputs: MixerInputs, token: dict[str, Tensor]) -> MixerInputs:
    """The inputs of one step, from the tensors of its token [B, …]."""
    names = [name for name in PER_TOKEN if name in token and name != "padding_mask"]
    fields = {name: token[name][:, None] for name in names}
    if inputs.rotary is not None:
        cos, sin = (token[name][:, None] for name in ("cos", "sin"))
        fields["rotary"] = replace(inputs.rotary, cos=cos, sin=sin)
    return replace(inputs, **fields, padding_mask=None)


def _scan(step: Any, begin: list[Tensor], tokens: list[Tensor], constants: list[Tensor]) -> Any:
    """torch's own scan as an operator. The public function `scan` goes through dynamo, which takes
    seconds and fixes the number of rows."""
    from torch._higher_order_ops.scan import scan_op

    return scan_op(step, begin, tokens, tuple(constants))
