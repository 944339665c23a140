"""The teacher inside a converted model: softmax attention in the place of its mixers.

Conversion does not change the teacher's weights. So a model that is not trained yet contains its
teacher, and each layer can read the inputs of the teacher's layer without a second model in memory.
"""

import copy

from torch import nn
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.mixers import Mixer, build_mixer
from supra.model.attention import attention_modules
from supra.model.families import no_mixer
from supra.model.qk_norm import restore_division


def original(
    model: PreTrainedModel, *, own_attention: bool = False
) -> tuple[PreTrainedModel, list[tuple[nn.Module, nn.Module]]]:
    """The headless teacher, in evaluation mode, of a converted model that is not trained yet.

    It shares the weights of `model`. own_attention: copy the weights of attention modules that have
    a mixer, so that they stay the teacher's while the model's own are trained.

    Also returns a pair for each such attention module: the model's and the teacher's. Layers that
    keep the teacher's attention are left out; those that keep it without rotary positions are not.
    Raises UserError if no layer has a mixer.
    """
    base = model.base_model
    attentions = attention_modules(base)
    mixing = [x for x in attentions if hasattr(x, "mixer") and not _is_original(x.mixer)]
    if not mixing:
        raise UserError(no_mixer(model.config.model_type))
    copied = {id(x) for module in mixing for x in module.parameters()} if own_attention else set()
    tensors = (*base.parameters(), *base.buffers())
    memo = {id(x): x for x in tensors if id(x) not in copied}
    memo |= {id(x.mixer): build_mixer("softmax", x.mixer.shape, {}) for x in mixing}
    teacher = copy.deepcopy(base, memo).eval()
    for attention in attention_modules(teacher):
        restore_division(attention)
    pairs = zip(attentions, attention_modules(teacher), strict=True)
    return teacher, [(own, other) for own, other in pairs if own in mixing]


def _is_original(mixer: Mixer) -> bool:
    """Whether a mixer computes what the teacher's attention does."""
    return mixer.name == "softmax" and mixer.rotates
