"""Runs a model from its files with the weights of one block in memory at a time.

A block is a layer, or a module with weights outside of the layers. Its weights are read when it is
called and dropped after it, unless the whole model is small. accelerate's offload would first write
the model to the disk again, in float32.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from supra.checkpoint.config_rules import meta_model
from supra.checkpoint.weights import tied_names

HELD_BYTES = 2e9  # float32 weights up to this size stay in memory between calls

Load = Callable[[str], Tensor]


@torch.no_grad()
def logits_of(config: PreTrainedConfig, load: Load, tokens: Tensor, steps: int) -> Tensor:
    """The float32 logits [T, V] of tokens [1, T], the last `steps` of them read one by one.

    load: reads a tensor by its name in the model.
    """
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    model = meta_model(config).eval()
    _lend_weights(model, load)
    output = model(tokens[:, :-steps], use_cache=True)
    logits = [output.logits[0]]
    for token in tokens[:, -steps:].unbind(1):
        output = model(token[:, None], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return torch.cat(logits).float()


def _lend_weights(model: PreTrainedModel, load: Load) -> None:
    """Let every block of a model on the meta device read its weights when it is called."""
    hold = 4 * sum(x.numel() for x in model.state_dict().values()) <= HELD_BYTES
    tied = tied_names(model)
    base = model.base_model
    if base.rotary_emb is not None:  # it has buffers that no file has
        base.rotary_emb = type(base.rotary_emb)(config=model.config)
    for path, block in _blocks(model):
        names = {name: f"{path}.{name}" for name in block.state_dict()}
        names = {name: tied.get(full, full) for name, full in names.items()}
        block.register_forward_pre_hook(partial(_fill, names, load))
        if not hold:
            block.register_forward_hook(_drop)


def _blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The layers, and the modules around them that have weights."""
    prefix = model.base_model_prefix
    for name, module in model.base_model.named_children():
        if isinstance(module, nn.ModuleList):
            yield from ((f"{prefix}.{name}.{place}", layer) for place, layer in enumerate(module))
        elif module.state_dict():
            yield f"{prefix}.{name}", module
    yield "lm_head", model.get_output_embeddings()


def _fill(names: dict[str, str], load: Load, block: nn.Module, args: tuple) -> None:
    if any(x.is_meta for x in block.parameters()):
        weights = {name: _wide(load(full)) for name, full in names.items()}
        block.load_state_dict(weights, assign=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _drop(block: nn.Module, args: tuple, output: object) -> None:
    block.to("meta")
