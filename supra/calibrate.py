"""Starting values from the teacher's own attention, before any training step.

A freshly converted model holds the teacher's weights, so it is the teacher as soon as softmax
attention stands in for its mixers. One pass over some text in that state shows every mixer its
inputs and what the teacher's attention made of them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.attention import attention_modules
from supra.errors import UserError
from supra.mixers import Mixer, MixerInputs, build_mixer


class _Witness(nn.Module):
    """Computes softmax attention, and shows inputs and output to the mixer that it stands for."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer
        self.softmax = build_mixer("softmax", mixer.shape, {})

    def forward(self, inputs: MixerInputs, *args: Any) -> tuple[Tensor, None]:
        output, _ = self.softmax(inputs)
        self.mixer.calibrate(inputs, output)
        return output, None


@torch.no_grad()
def calibrate(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> None:
    """Calibrate every mixer of a freshly converted model on tokens [B, T], in place.

    Some thousand tokens suffice: a scale is one number estimated from all of them.
    """
    attentions = [x for x in attention_modules(model) if hasattr(x, "mixer")]
    if not attentions:
        raise UserError("calibrate.tokens needs a converted student: run `supra convert` first")
    was_training = model.training
    model.eval()
    for attention in attentions:
        attention.mixer = _Witness(attention.mixer)
    try:
        model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    finally:
        for attention in attentions:
            attention.mixer = attention.mixer.mixer
        model.train(was_training)
