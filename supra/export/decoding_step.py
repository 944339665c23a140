"""Decoding for other runtimes: states are passed as tensors, and only torch's own operators run.

    step = DecodingStep(model)
    program = torch.export.export(step, (tokens, positions, *step.start(batch)))
    logits, *states = program.module()(tokens, positions, *states)

`torch.onnx.export(step, ..., dynamo=True)` takes the same arguments. To read whole texts without
states, export the model itself with use_cache=False.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.model.attention import attention_modules
from supra.model.cache import new_cache


class DecodingStep(nn.Module):
    """A converted language model as a function of tokens and states, without a cache object.

    A call reads any number of tokens, so it also reads prompts. In layers that keep softmax
    attention, the second dimension of the states grows; make it dynamic in an export.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model.eval()
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            layers = model(token, use_cache=True).past_key_values.layers
        self._layers = [layer.state for layer in layers]  # for their fields, sizes and dtypes

    @property
    def state_names(self) -> list[str]:
        """The names of the states, such as "0.memory", in the order of `forward`."""
        return [f"{layer}.{name}" for layer, name, _ in self._states()]

    def start(self, batch: int) -> tuple[Tensor, ...]:
        """The states before the first token: zeros, or empty tensors where states grow."""
        kept = [not attention.mixer.recurrent for attention in attention_modules(self.model)]
        return tuple(
            x.new_zeros(batch, 0 if kept[layer] else x.shape[1], *x.shape[2:])
            if x.dim() > 1
            else x.new_zeros(batch)
            for layer, _, x in self._states()
        )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits [B, T, V] of tokens [B, T], int64, and the states after them.

        position_ids: int64 [B, T], the number of tokens of the same text before each token.
        states: the states that the previous call returned, or those of `start`.
        """
        given = iter(states)
        cache = new_cache(len(self._layers))
        for layer, state in zip(cache.layers, self._layers, strict=True):
            layer.state = state._make(x if x is None else next(given) for x in state)
            layer.is_initialized = True
        output = self.model(input_ids, position_ids=position_ids, past_key_values=cache)
        after = (x for layer in output.past_key_values.layers for x in layer.state)
        return output.logits, *(x for x in after if x is not None)

    def _states(self) -> Iterator[tuple[int, str, Tensor]]:
        for layer, state in enumerate(self._layers):
            yield from ((layer, name, x) for name, x in state._asdict().items() if x is not None)
