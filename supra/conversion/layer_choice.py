"""Which layers of a hybrid keep softmax attention.

An evenly spaced share of the layers; or "auto", those whose conversion costs most on a text, each
alone; or "greedy", those that are left when the cheapest layer is converted, again and again.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm, trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.conversion.calibrate import calibrate
from supra.data.blocks import blocks_from_text
from supra.data.packing import IGNORE, Block, collate, shifted_labels
from supra.errors import UserError, not_finite
from supra.losses.token_losses import token_losses
from supra.mixers import build_mixer
from supra.model.attention import attention_modules

RULES = "auto", "greedy"
SEQUENCE_LENGTH = 512
TOKENS = 8192  # for calibration, and as many again for measuring costs


def read_share(
    keep_attention: Iterable[int] | float | str, text: str | None
) -> tuple[float | None, str | None]:
    """The share of the layers that keeps attention, and the rule by which `text` chooses them.

    The share is None when `keep_attention` gives the indices of the layers.
    """
    share, rule = keep_attention, None
    if isinstance(keep_attention, str):
        rule, _, number = keep_attention.partition(":")
        if rule not in RULES or not number:
            raise UserError(
                f"keep_attention (={keep_attention!r}) must be layer indices, a share of the "
                "layers, or auto or greedy with a share, such as auto:0.25"
            )
        share = parse_share(number)
        if text is None:
            raise UserError(
                f"keep_attention (={keep_attention!r}) needs a text to measure costs on: give text"
            )
    elif text is not None:
        raise UserError(
            f"text (={text!r}) is only used when keep_attention is auto or greedy, such as "
            "auto:0.25: leave it out"
        )
    if not isinstance(share, float):
        return None, None
    if not 0 < share < 1:
        raise UserError(
            f"keep_attention (={keep_attention}) is a share of the layers: it must be between 0 "
            "and 1"
        )
    return share, rule


def parse_share(text: str) -> float:
    """0.25 for `"0.25"` or `"25%"`."""
    number = text.removesuffix("%")
    try:
        return float(number) / (100 if number != text else 1)
    except ValueError:
        raise UserError(
            f"keep_attention (={text!r}) must be a share of the layers, such as 0.25 or 25%"
        ) from None


def kept_count(layers: int, share: float) -> int:
    """The number of layers that `share` amounts to: rounded, at least one."""
    return max(1, round(share * layers))


def evenly_spaced(layers: int, share: float) -> list[int]:
    """The indices of that share of the layers, evenly spaced.

    The layers are divided into equal stretches, and the middle of each stretch is taken.
    """
    count = kept_count(layers, share)
    return [(2 * number + 1) * layers // (2 * count) for number in range(count)]


def costliest(costs: Sequence[float], share: float) -> list[int]:
    """The layers with the highest costs, in ascending order. A tie goes to the lower layer."""
    ranking = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    return sorted(ranking[: kept_count(len(costs), share)])


def choose_layers(
    rule: str,
    model: PreTrainedModel,
    blocks: Sequence[Block],
    share: float,
    progress: bool = False,
) -> tuple[list[int], list[float]]:
    """The layers that keep attention by this rule, and what converting each layer alone costs. For
    model and blocks see `layer_costs`."""
    costs = layer_costs(model, blocks, progress)
    if rule == "auto":
        return costliest(costs, share), costs
    return left_by_greed(model, blocks[len(blocks) // 2 :], costs, share, progress), costs


def left_by_greed(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    costs: Sequence[float],
    share: float,
    progress: bool = False,
) -> list[int]:
    """The layers that are left when the layer that costs least is converted, until only `share` is.

    Every choice is measured on `blocks`, with the layers converted that were chosen before. The
    first one goes by `costs`. Of two layers that cost the same, the higher one is converted.
    """
    left, count = list(range(len(costs))), kept_count(len(costs), share)
    for _ in trange(len(costs) - count, desc="choose", unit="layer", disable=not progress):
        if len(left) < len(costs):
            costs = divergences(model, blocks, converted=set(range(len(costs))) - set(left))
        left.remove(min(reversed(left), key=costs.__getitem__))
    return left


def read_blocks(tokenizer: PreTrainedTokenizerBase, text: str, text_field: str) -> list[Block]:
    """Packed rows of text, half for calibration and half for measuring; fewer from a short text."""
    from supra.data.text import open_documents  # loads datasets, which takes a second

    documents = open_documents(text, text_field).epoch(0)
    blocks = blocks_from_text(tokenizer, documents, SEQUENCE_LENGTH, 2 * TOKENS)
    if len(blocks) < 2:
        raise UserError(
            f"text (={text!r}) must have at least {2 * SEQUENCE_LENGTH} tokens, half for "
            "calibration and half for measuring: give a longer text"
        )
    return blocks


def layer_costs(
    model: PreTrainedModel, blocks: Sequence[Block], progress: bool = False
) -> list[float]:
    """What it costs to convert each layer alone, in nats per token, after calibration.

    Args:
        model: a freshly converted model with a mixer in every layer. Its mixers are calibrated in
            place.
        blocks: from `read_blocks`; the first half is for calibration, the second for measuring.
    """
    if torch.cuda.is_available():
        model.to("cuda")
    half = len(blocks) // 2
    batch = collate(blocks[:half])
    calibrate(model, *(batch[name].to(model.device) for name in ("input_ids", "position_ids")))
    costs = divergences(model, blocks[half:], progress)
    if not all(map(math.isfinite, costs)):
        raise not_finite("the cost of a layer", model.dtype)
    return costs


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    progress: bool = False,
    converted: Collection[int] = (),
) -> list[float]:
    """For each layer, KL(teacher || teacher with this layer converted, besides those in
    `converted`): the mean over predictions; 0 for those in `converted`.

    The teacher is `model` with softmax attention in place of every mixer. Layers below the
    converted one repeat the outputs that they gave without it, which halves the work.
    """
    attentions = sorted(attention_modules(model), key=lambda attention: attention.layer_idx)
    layers = [decoder_layer(model, attention) for attention in attentions]
    mixers = [attention.mixer for attention in attentions]
    softmax = [build_mixer("softmax", mixer.shape, {}) for mixer in mixers]

    def convert(some: Collection[int]) -> None:
        for index, attention in enumerate(attentions):
            attention.mixer = (mixers if index in some else softmax)[index]

    nats, tokens = [0.0] * len(layers), 0
    bar = tqdm(total=len(blocks) * len(layers), desc="measure", unit="layer", disable=not progress)
    for block in blocks:
        batch = {name: x.to(model.device) for name, x in collate([block]).items()}
        labels = shifted_labels(batch.pop("labels")).flatten()
        tokens += (labels != IGNORE).sum().item()
        convert(())
        with _recorded(layers) as outputs:
            teacher_logits = model(**batch, use_cache=False).logits[0]
        if converted:
            convert(converted)
            with _recorded(layers) as outputs:
                model(**batch, use_cache=False)
        for index in (index for index in range(len(layers)) if index not in converted):
            convert({*converted, index})
            with _replayed(layers[:index], outputs):
                logits = model(**batch, use_cache=False).logits[0]
            losses = token_losses(
                logits, labels, teacher_logits, next_token_weight=0.0, kl_weight=1.0
            )
            nats[index] += losses.kl.item()
            bar.update()
    bar.close()
    convert(range(len(layers)))
    return [total / tokens for total in nats]


def decoder_layer(model: nn.Module, attention: nn.Module) -> nn.Module:
    """The decoder layer that contains an attention module: `model.layers.3` for
    `model.layers.3.self_attn`."""
    path = next(name for name, module in model.named_modules() if module is attention)
    return model.get_submodule(re.match(r".*?\.\d+(?=\.)", path)[0])


@contextmanager
def _recorded(layers: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Inside, collect the outputs of these layers."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(layers: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Inside, these layers return the recorded outputs and compute nothing."""
    for layer, output in zip(layers, outputs, strict=False):
        layer.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
