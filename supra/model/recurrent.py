"""The mixers in a model's layers: those of conversion, or of a model that is recurrent itself."""

from torch import nn

from supra.errors import UserError
from supra.mixers import Mixer
from supra.model.attention import attention_modules
from supra.model.families import no_states
from supra.model.native.adapter import adopt


def mixers_of(model: nn.Module) -> dict[int, Mixer | None]:
    """The mixer of each layer, in order; None where a native model has attention alone.

    Raises UserError for a model without mixers.
    """
    found = {x.layer_idx: getattr(x, "mixer", None) for x in attention_modules(model)}
    found |= {index: layer.recurrence for index, layer in adopt(model).items()}
    if all(mixer is None for mixer in found.values()):
        raise UserError(no_states(model.config.model_type))
    return dict(sorted(found.items()))
