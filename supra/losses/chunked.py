"""Losses from the last hidden states, without holding all logits of a batch.

With a vocabulary of 49152, the bfloat16 logits of 8192 tokens take 0.8 GB, their gradient takes as
much again, and so do the teacher's logits. Here logits exist for one chunk of tokens at a time:
they are computed from hidden states, scored, and turned into gradients of the hidden states and of
the head.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

from supra.losses.token_losses import Losses, multiply_, refuse_second_derivatives
from supra.model.cache import cache_name

# Logits per chunk: 1360 tokens with a vocabulary of 49152. Each chunk adds to the gradient of the
# head, which is as large as the head. With small chunks, this would move more bytes than the logits
# do.
CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**26}

ChunkLoss = Callable[[Tensor, slice], Losses]
"""(logits [n, V], the rows of the flattened batch that they belong to) -> their losses."""


class ScoredModel(nn.Module):
    """A language model that returns its losses; without `loss`, it returns its own output.

    Wrappers (DDP, FSDP) act on calls of a module, so the loss must be computed inside a module.
    FSDP makes a unit of each of the model's blocks, and of each module of the classes named in
    `units`.
    """

    def __init__(self, model: nn.Module, units: Iterable[str] = ()):
        super().__init__()
        self.model = model
        self._no_split_modules = [*model._no_split_modules, *units]

    def forward(self, loss: ChunkLoss | None = None, **inputs):
        if loss is None:
            return self.model(**inputs)
        language = language_model(self.model)
        return chunked_losses(language, hidden_states(language, **inputs), loss)


def language_model(model: nn.Module) -> PreTrainedModel:
    """The model without peft's wrapper; its layers then hold the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(
    model: PreTrainedModel, past_key_values: Cache | None = None, **inputs: Tensor
) -> Tensor:
    """The hidden states [B·T, D] that the language model computes logits from.

    past_key_values: a cache with the states before these tokens; it is updated in place.
    """
    base = getattr(model, model.base_model_prefix)
    if past_key_values is not None:
        inputs[cache_name(base)] = past_key_values
    output = base(**inputs, use_cache=past_key_values is not None)
    return output.last_hidden_state.flatten(0, 1)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The language model's logits [N, V] for hidden states [N, D].

    The model's own code computes them, with its headless model replaced, because some families
    scale or cap their logits.
    """
    head = copy.copy(model)
    vars(head).pop("forward", None)  # Accelerate's, with a device map: it would run `model` itself
    given = _Given(hidden.unsqueeze(0), getattr(model, model.base_model_prefix))
    object.__setattr__(head, "_modules", {**model._modules, model.base_model_prefix: given})
    return head(use_cache=False).logits.squeeze(0)


class _Given(nn.Module):
    """Replaces the headless model `base` and returns given hidden states."""

    def __init__(self, hidden: Tensor, base: nn.Module):
        super().__init__()
        self.hidden = hidden
        object.__setattr__(self, "base", base)  # not as a module: it is not to run

    def __getattr__(self, name: str) -> Any:
        """What the language model reads of it, such as Falcon-H1 its factor on logits."""
        return getattr(self.__dict__["base"], name)

    def forward(self, *args, **kwargs) -> "_Output":
        return _Output(last_hidden_state=self.hidden)


class _Output(MoeModelOutputWithPast):
    """All fields of a headless model's output that a language model may read."""

    cross_attentions = None
    cache_params = None


def chunked_losses(model: PreTrainedModel, hidden: Tensor, loss: ChunkLoss) -> Losses:
    """The sum of `loss` over chunks of the hidden states [N, D]; only `total` has a gradient."""
    children = model.named_children()
    outside = [child for name, child in children if name != model.base_model_prefix]
    parameters = {p for child in outside for p in child.parameters() if p.requires_grad}

    def chunk(x: Tensor, rows: slice) -> Losses:
        return loss(logits_of(model, x), rows)

    return Losses(*_Chunked.apply(hidden, chunk, chunks(model, hidden), *parameters))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, chunk, chunks, *parameters):
        sums, of_hidden, of_parameters = 0, torch.empty_like(hidden), ()
        for rows in chunks:
            with torch.enable_grad():
                x = hidden[rows].detach().requires_grad_()
                losses = chunk(x, rows)
            of_hidden[rows], *more = torch.autograd.grad(losses.total, (x, *parameters))
            for gradient, addend in zip(of_parameters, more, strict=False):
                gradient += addend
            of_parameters = of_parameters or more
            sums = sums + torch.stack([x.detach() for x in losses])
        ctx.save_for_backward(of_hidden, *of_parameters)
        total, next_token, kl = (x.clone() for x in sums)
        ctx.mark_non_differentiable(next_token, kl)
        return total, next_token, kl

    @staticmethod
    def backward(ctx, total_gradient, *_):
        refuse_second_derivatives()
        hidden, *parameters = (multiply_(x, total_gradient) for x in ctx.saved_tensors)
        return hidden, None, None, *parameters


def chunks(model: PreTrainedModel, hidden: Tensor) -> list[slice]:
    """The rows of the hidden states [N, D] in chunks whose logits are in memory together."""
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    size = max(1, elements // model.config.get_text_config().vocab_size)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
