"""A converted model as it was before: softmax attention in the place of its mixers.

Conversion leaves the teacher's weights as they are, so a model that was not trained yet still is
its teacher in that state. Every layer can then be shown what the teacher's layer reads, without a
second model in memory.
"""

import copy

from torch import nn
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.mixers import build_mixer
from supra.model.attention import attention_modules
from supra.model.families import no_mixer


def original(
    model: PreTrainedModel, *, own_attention: bool = False
) -> tuple[PreTrainedModel, list[tuple[nn.Module, nn.Module]]]:
    """The headless teacher, in evaluation mode, of a converted model that was not trained yet.

    It shares the weights of `model`; with `own_attention`, those of the attention modules that have
    a mixer are copies, which stay the teacher's while the model's own are trained.

    Also returns these attention modules, each with its teacher's. Layers that keep softmax
    attention are not among them. Raises UserError when there are none.
    """
    base = model.base_model
    attentions = attention_modules(base)
    mixing = [x for x in attentions if hasattr(x, "mixer") and x.mixer.name != "softmax"]
    if not mixing:
        raise UserError(no_mixer(model.config.model_type))
    copied = {id(x) for module in mixing for x in module.parameters()} if own_attention else set()
    tensors = (*base.parameters(), *base.buffers())
    memo = {id(x): x for x in tensors if id(x) not in copied}
    memo |= {id(x.mixer): build_mixer("softmax", x.mixer.shape, {}) for x in mixing}
    teacher = copy.deepcopy(base, memo).eval()
    pairs = zip(attentions, attention_modules(teacher), strict=True)
    return teacher, [(own, other) for own, other in pairs if own in mixing]
