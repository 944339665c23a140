"""Statistics of a head's state, its decay, and how far back a model's memory reaches."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.long_context.stream import Reader
from supra.losses.chunked import logits_of
from supra.mixers import Mixer
from supra.model.families import no_mixer
from supra.model.recurrent import mixers_of

TOP = 0.05  # the share of elements, or of rows, that counts as outliers


class StateStatistics(NamedTuple):
    """Statistics of the elements of each head's state; [H] float64 each."""

    norm: Tensor  # Frobenius
    rms: Tensor
    mean: Tensor
    variance: Tensor
    kurtosis: Tensor  # 3 for a Gaussian; 0 where all elements are equal
    top_elements: Tensor  # share of the sum of squares in the largest 5 % of the elements
    top_channels: Tensor  # the same for the largest 5 % of the rows, which are key channels


def state_statistics(memory: Tensor) -> StateStatistics:
    """Statistics of a state [H, K, V]. 5 % is rounded up to whole elements and rows."""
    memory = memory.double()
    squares = memory.square()
    total = squares.sum((1, 2))
    mean = memory.mean((1, 2))
    centred = memory - mean[:, None, None]
    variance = centred.square().mean((1, 2))
    fourth = centred.square().square().mean((1, 2))
    count = memory[0].numel()
    return StateStatistics(
        norm=total.sqrt(),
        rms=(total / count).sqrt(),
        mean=mean,
        variance=variance,
        kurtosis=torch.where(variance > 0, fourth / variance.square(), 0.0),
        top_elements=_top_share(squares.flatten(1), total),
        top_channels=_top_share(squares.sum(2), total),
    )


def _top_share(parts: Tensor, total: Tensor) -> Tensor:
    """The largest parts' share [H] of the total. parts: [H, N], squares. total: [H], their sums."""
    largest = parts.topk(math.ceil(TOP * parts.shape[1]), dim=1).values.sum(1)
    return torch.where(total > 0, largest / total, 0.0)


@dataclass(frozen=True)
class RecurrentLayers:
    """The recurrent mixers of a model by layer, and the layers with attention alone.

    Raises UserError when no layer is recurrent.
    """

    mixers: dict[int, Mixer]
    kept: list[int]  # layers

    @classmethod
    def of(cls, model: nn.Module) -> "RecurrentLayers":
        found = mixers_of(model)
        mixers = {i: mixer for i, mixer in found.items() if mixer is not None and mixer.recurrent}
        if not mixers:
            raise UserError(no_mixer(model.config.model_type))
        return cls(mixers, sorted(found.keys() - mixers.keys()))

    def states(self, reader: Reader) -> dict[int, Tensor]:
        """Each layer's state as [attention heads, K, V].

        A mixer such as h3 divides a head into several. Their states, and the real and imaginary
        parts of their modes, become rows of the one head.
        """
        return {
            layer: by_head(reader.cache.layers[layer].state.memory, mixer.shape.query_heads)
            for layer, mixer in self.mixers.items()
        }


def by_head(memory: Tensor, heads: int) -> Tensor:
    """The state [1, H, …, V] of one row as [heads, K, V]."""
    return memory[0].reshape(min(heads, memory.shape[1]), -1, memory.shape[-1])


class DecaySums:
    """The sum of log decays over the watched tokens, per layer: [heads, channels] float64.

    There is one channel if all channels of a head share a decay. A mixer without decay has zeros.
    """

    def __init__(self, layers: RecurrentLayers):
        self.layers, self.sums = layers, {}

    @contextmanager
    def watching(self, tokens: int) -> Iterator[None]:
        """Inside, the model reads `tokens` tokens of one row, and their decays are added."""
        for layer, mixer in self.layers.mixers.items():
            mixer.watch = partial(self._add, layer, mixer.shape.query_heads, tokens)
        try:
            yield
        finally:
            for mixer in self.layers.mixers.values():
                mixer.watch = None

    def _add(self, layer: int, heads: int, tokens: int, log_decay: Tensor | None) -> None:
        if log_decay is None:
            found = torch.zeros(heads, 1, dtype=torch.float64)
        elif log_decay.dim() >= 3:  # [1, T, H] or [1, T, H, K]
            found = log_decay[0].detach().double().sum(0)
        else:  # a decay per head, the same for every token
            found = log_decay.detach().double() * tokens
        found = found.reshape(heads, -1).cpu()
        self.sums[layer] = self.sums.get(layer, 0) + found


def half_life(log_decay: float, tokens: int) -> float:
    """The number of tokens after which half remains, when `tokens` tokens decay by `log_decay`."""
    return math.inf if log_decay == 0 else -math.log(2) * tokens / log_decay


@torch.no_grad()
def effective_remembrance(
    model: PreTrainedModel,
    tokens: Tensor,
    starts: Sequence[int],
    *,
    ends: int,
    chunk: int,
    advance: Callable[[int], object] = lambda _: None,
    start_tokens: Sequence[int] = (),
) -> list[float]:
    """How much predictions depend on the tokens before each start (Buitrago & Gu 2025, arXiv
    2507.02782):

        EffRem_T(t) = ½ Σ |q(· | x_{0:T}) − q(· | x_{t:T})|

    This is the total variation between predictions from all tokens [T] and predictions from the
    tokens from t on. The result is its mean over the last `ends` tokens instead of the T-th alone.
    `advance` is called with the numbers of tokens read. `start_tokens` replace the first tokens of
    each reading.
    """
    begin = tokens.new_tensor(start_tokens)

    def predictions(start: int) -> Tensor:
        reader = Reader(model)
        rest = torch.cat([begin, tokens[start + len(begin) : len(tokens) - ends]])
        for piece in rest.split(chunk):
            reader.advance(piece)
        hidden = reader.advance(tokens[len(tokens) - ends :])
        advance(len(tokens) - start)
        return logits_of(model, hidden).float().softmax(-1)

    whole = predictions(0)
    return [(predictions(start) - whole).abs().sum(-1).mean().item() / 2 for start in starts]
