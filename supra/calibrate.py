"""Starting values from the teacher's own attention, before any training step.

One pass over some text shows every mixer its teacher's inputs, and what softmax attention made of
them; see `supra.original`.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from supra.original import original


@torch.no_grad()
def calibrate(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> None:
    """Calibrate every mixer of a freshly converted model on tokens [B, T], in place.

    Some thousand tokens suffice: a scale is one number estimated from all of them.
    """
    teacher, pairs = original(model)
    for attention, teachers in pairs:
        teachers.mixer.register_forward_hook(
            lambda _, inputs, output, mixer=attention.mixer: mixer.calibrate(*inputs, output[0])
        )
    teacher(input_ids=input_ids, position_ids=position_ids, use_cache=False)
