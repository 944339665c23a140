"""`softmax`: the original attention. Hybrids use it in the layers that keep attention."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from supra.mixers.base import Mixer
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.padding import pick
from supra.mixers.state_policy import Past
from supra.mixers.static_softmax import StaticSoftmaxState, fixed, growing, write
from supra.settings.model import STRICT


@dataclass(frozen=True, config=STRICT)
class SoftmaxOptions:
    """rotary: whether queries and keys are rotated to their positions, as in the teacher."""

    # Without it, a hybrid's recurrent layers tell where tokens are (HALO, arXiv 2601.22156, rotates
    # in recurrent layers alone).
    rotary: bool = True


class SoftmaxState(NamedTuple):
    """The key-value cache of S tokens, padding first. A window of W tokens keeps S <= W - 1."""

    key: Tensor  # [B, S, Hkv, K], rotated
    value: Tensor  # [B, S, Hkv, V]
    valid: Tensor  # bool [B, S], False where padded


class Softmax(Mixer):
    """softmax(RoPE(Q)·RoPE(K)ᵀ · scaling) V, causal, within the teacher's sliding window."""

    name = "softmax"
    Options = SoftmaxOptions
    State = SoftmaxState
    recurrent = False
    averages = True

    def __init__(self, shape: AttentionShape, options: SoftmaxOptions):
        super().__init__(shape, options, rotary=options.rotary)

    def mix(
        self, inputs: MixerInputs, state: SoftmaxState | None = None, return_state: bool = False
    ) -> tuple[Tensor, SoftmaxState | None]:
        query, key = inputs.rotated(inputs.query, inputs.key)
        value = inputs.value
        if isinstance(state, StaticSoftmaxState):
            visible = write(state, key, value, inputs)[:, None, None]
            return attend(query, state.key, state.value, visible, inputs), state
        tokens, valid = query.shape[1], inputs.padding_mask
        if inputs.part is not None:
            state = state_before(inputs, key)
        if valid is None and (return_state or state is not None):
            valid = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        if state is not None:
            key = torch.cat([state.key, key], dim=1)
            value = torch.cat([state.value, value], dim=1)
            valid = torch.cat([state.valid, valid], dim=1)
        mask = attention_mask(inputs, tokens, key.shape[1], valid, fresh=state is None)
        output = attend(query, key, value, mask, inputs)
        if not return_state:
            return output, None
        end = SoftmaxState(key, value, valid)
        return output, end if inputs.sliding_window is None else last_tokens(end, inputs)

    def static_state(self, state: SoftmaxState, inputs: MixerInputs, tokens: int) -> Any:
        return fixed(*state, tokens, inputs.sliding_window)

    def growing_state(self, state: Any) -> Any:
        return SoftmaxState(*growing(state)) if isinstance(state, StaticSoftmaxState) else state

    def _split(self, state: Any) -> tuple[Any, Past | None]:
        return (state, None) if isinstance(state, StaticSoftmaxState) else super()._split(state)

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """The attention weights. Mixing an identity of width T would cost T / V times as much."""
        query, key = inputs.rotated(inputs.query, inputs.key)
        tokens = query.shape[1]
        mask = attention_mask(inputs, tokens, tokens, inputs.padding_mask, fresh=True)
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = (x.transpose(1, 2).to(wide) for x in (query, key))
        with torch.autocast(query.device.type, enabled=False):
            return attention_weights(query, key, mask, inputs)


def state_before(inputs: MixerInputs, key: Tensor) -> SoftmaxState:
    """The rotated keys, and the values, of all tokens before a part of the rows."""
    part, sizes = inputs.part, [key.shape[-1], inputs.value.shape[-1]]
    both = part.all_tokens(torch.cat([key, inputs.value], dim=-1))  # one exchange for both
    return SoftmaxState(*both.split(sizes, dim=-1), part.valid[:, : part.start])


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, inputs: MixerInputs
) -> Tensor:
    """The attention of query [B, T, Hq, K] over S keys and values, [B, T, Hq, V]. mask: bool
    [B or 1, 1, T, S], True where a query may look; None if a causal mask is enough."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if inputs.softcap is not None or inputs.sinks is not None:
        return capped_attention(query, key, value, mask, inputs).transpose(1, 2)
    output = F.scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask,
        is_causal=mask is None and bool(query.shape[2] > 1),
        scale=inputs.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, inputs: MixerInputs
) -> Tensor:
    """Attention with capped scores or a sink, which torch's function lacks; tensors [B, H, T, D].

    All T×S scores are in memory, as in these families' own attention.
    """
    weights = attention_weights(query, key, mask, inputs).to(value.dtype)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, inputs: MixerInputs
) -> Tensor:
    """Softmax over the scores of query and key [B, H, T, D]: [B, Hq, T, S], float32 or wider.

    A sink (gpt-oss) is one more score in a head's softmax; its weight is dropped.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * inputs.scaling
    if inputs.softcap is not None:
        scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(scores.dtype).view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide)[..., : key.shape[2]]


def last_tokens(state: SoftmaxState, inputs: MixerInputs) -> SoftmaxState:
    """The part of the cache that the next token's window may need: the last W − 1 tokens of each
    row, not counting padding between them."""
    first = max(0, state.key.shape[1] - (inputs.sliding_window - 1))
    if inputs.padding_mask is None:  # padding then precedes all tokens of a row already
        return SoftmaxState(*(x[:, first:] for x in state))
    padding_first = state.valid.long().argsort(dim=1, stable=True)
    return SoftmaxState(*(pick(x, padding_first[:, first:]) for x in state))


def attention_mask(
    inputs: MixerInputs, tokens: int, length: int, valid: Tensor | None, fresh: bool
) -> Tensor | None:
    """Bool [B or 1, 1, T, S], True where a query may look; None if a causal mask is enough.

    A window counts tokens, not padding. A padded query looks at itself: a softmax over no scores
    would be NaN.
    """
    window = inputs.sliding_window
    windowed = window is not None and length >= window
    plain = fresh and inputs.padding_mask is None and inputs.cu_seqlens is None
    plain = plain and inputs.softcap is None and inputs.sinks is None
    if plain and not windowed:
        return None
    query_at = torch.arange(length - tokens, length, device=inputs.query.device)[:, None]
    key_at = torch.arange(length, device=inputs.query.device)[None, :]
    mask = (key_at <= query_at)[None, None]
    if windowed:
        place = (
            key_at if valid is None else valid.long().cumsum(1)
        )  # position among the tokens of its row
        first = place[:, -tokens:] - window + 1
        mask = mask & (place[:, None, None, :] >= first[:, None, :, None])
    if valid is not None:
        mask = mask & valid[:, None, None, :]
    document = document_numbers(inputs, tokens, length)
    if document is not None:
        mask = mask & (document[:, None, -tokens:, None] == document[:, None, None, :])
    return mask | (key_at == query_at)


def document_numbers(inputs: MixerInputs, tokens: int, length: int) -> Tensor | None:
    """The number of each key's document, int [B, S]; None if rows are not packed."""
    if inputs.part is not None:
        return inputs.part.documents[:, :length]
    if inputs.cu_seqlens is None:
        return None
    at = torch.arange(inputs.query.shape[0] * tokens, device=inputs.query.device)
    return torch.bucketize(at, inputs.cu_seqlens, right=True).view(-1, tokens)
