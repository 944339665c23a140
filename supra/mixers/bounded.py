"""Recurrences over the documents of a call, with the state bounded by a policy: window or norm.

The output does not depend on how tokens are divided into calls.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from supra.kernels.checks import LOWEST_LOG_DECAY
from supra.mixers.inputs import MixerInputs
from supra.mixers.padding import pick, tokens_first
from supra.mixers.state_policy import LayerPolicy, Past, PolicyRun, clamp_factors

# [B, T, …], the first not None. A tensor [H] holds for all tokens.
Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Row:
    """The arguments of a recurrence besides its tensors."""

    state: Any = None
    return_state: bool = False
    padding_mask: Tensor | None = None  # bool [B, T]
    cu_seqlens: Tensor | None = None  # int [N + 1], bounds of documents packed in one row


Recurrence = Callable[[Tensors, Row], tuple[Tensor, Any]]


def run_documents(
    recurrence: Recurrence,
    windowed: Callable[[PolicyRun, Tensors, Row], tuple[Tensor, Any]],
    inputs: MixerInputs,
    tensors: Tensors,
    state: Any,
    return_state: bool,
) -> tuple[Tensor, Any]:
    """Run a recurrence over every document of a call, within the bounds of the call's policy.

    `windowed` is the recurrence over a window of tokens. Packed documents come out in one row,
    [1, B·T, …].
    """
    cu_seqlens = inputs.cu_seqlens if tensors[0].shape[1] > 1 else None
    if cu_seqlens is not None:
        tensors = [x if x is None or x.dim() == 1 else x.flatten(0, 1)[None] for x in tensors]
    row = Row(state, return_state, inputs.padding_mask, cu_seqlens)
    run = inputs.policy_run
    if run is None or not run.policy.keeps_past:
        return recurrence(tensors, row)
    if run.policy.window is None:
        bound = functools.partial(clamped, recurrence, run)
    else:
        bound = functools.partial(windowed, run)
    return padding_last(bound, tensors, row)


def padding_last(recurrence: Recurrence, tensors: Tensors, row: Row) -> tuple[Tensor, Any]:
    """Run the recurrence with the padding of every row moved to its end."""
    if row.padding_mask is None:
        return recurrence(tensors, row)
    order = tokens_first(row.padding_mask)
    tensors = [x if x is None or x.dim() == 1 else pick(x, order) for x in tensors]
    output, end = recurrence(tensors, replace(row, padding_mask=pick(row.padding_mask, order)))
    return pick(output, order.argsort(dim=1)), end


def windowed(
    recurrence: Recurrence, run: PolicyRun, tensors: Tensors, row: Row
) -> tuple[Tensor, Any]:
    """Run a recurrence over query, key, value and log_decay on the last r tokens only.

    Before each token i, one more token subtracts what token i − r wrote: it does not decay, and its
    key is the old key times −γ_{i−r+1} ⋯ γᵢ₋₁.
    """
    query, key, value, log_decay = tensors
    # in 16 bits, what is subtracted would differ from what was written
    wide = torch.promote_types(value.dtype, torch.float32)
    query, key, value = (x.to(wide) for x in (query, key, value))
    if log_decay is not None:  # keys and values per head of the state, as decays are
        log_decay = log_decay.clamp(min=LOWEST_LOG_DECAY)  # a difference of -inf is no number
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(*query.shape[:2], -1)
        key, value = (
            x.repeat_interleave(log_decay.shape[2] // x.shape[2], dim=2) for x in (key, value)
        )
    old = run.delay({"key": key, "value": value}, row.padding_mask, row.cu_seqlens)
    removed = -old["key"]
    if log_decay is not None:
        left = run.window_log_decay(log_decay, row.padding_mask, row.cu_seqlens) - log_decay
        removed = removed * _beside_keys(left.exp()).to(wide)
    if row.padding_mask is not None:  # padding writes nothing, so it subtracts nothing
        removed = removed * row.padding_mask[..., None, None]
    tensors = (
        _interleave(torch.zeros_like(query), query),
        _interleave(removed, key),
        _interleave(old["value"], value),
        None if log_decay is None else _interleave(torch.zeros_like(log_decay), log_decay),
    )
    bounds = None if row.cu_seqlens is None else 2 * row.cu_seqlens
    output, end = recurrence(tensors, replace(row, padding_mask=None, cu_seqlens=bounds))
    return output[:, 1::2], end


def _beside_keys(x: Tensor) -> Tensor:
    """[B, T, H] as [B, T, H, 1], and [B, T, H, K] as it is."""
    return x if x.dim() == 4 else x[..., None]


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Tokens of two tensors [B, T, …], alternating: [B, 2T, …]."""
    return torch.stack([first, second], dim=2).flatten(1, 2)


def clamped(
    recurrence: Recurrence, run: PolicyRun, tensors: Tensors, row: Row
) -> tuple[Tensor, Any]:
    """Run a recurrence and bound the norm of a row's state after every norm_every of its tokens."""
    if row.cu_seqlens is not None:
        parts = [
            _in_pieces(recurrence, run.policy, _cut(tensors, slice(*document)), None, 0)[0]
            for document in pairwise(row.cu_seqlens.tolist())
            if document[0] < document[1]
        ]
        return torch.cat(parts, dim=1), None
    batch, tokens = tensors[0].shape[:2]
    count = run.past.past_count
    if count is None:
        count = torch.zeros(batch, dtype=torch.int64, device=tensors[0].device)
    new = torch.full_like(count, tokens) if row.padding_mask is None else row.padding_mask.sum(1)
    run.past = Past(past_count=count + new)
    # on the meta device only the sizes of states matter
    counts, news = ([0], [tokens]) if count.is_meta else (count.tolist(), new.tolist())
    if len({*counts}) == 1 and {*news} == {tokens}:
        return _in_pieces(recurrence, run.policy, tensors, row.state, counts[0])
    rows = []
    for b, (seen, some) in enumerate(zip(counts, news, strict=True)):
        one = [x if x is None or x.dim() == 1 else x[b : b + 1] for x in tensors]
        state = map_state(lambda x, b=b: x[b : b + 1], row.state)
        output, end = _in_pieces(
            recurrence, run.policy, _cut(one, slice(max(1, some))), state, seen
        )
        if some == 0:  # padding alone
            end = map_state(torch.zeros_like, end) if state is None else state
        missing = tokens - output.shape[1]
        rows.append((torch.nn.functional.pad(output, (0, 0, 0, 0, 0, missing)), end))
    outputs, ends = zip(*rows, strict=True)
    return torch.cat(outputs), map_state(lambda *x: torch.cat(x), *ends)


def _in_pieces(
    recurrence: Recurrence, policy: LayerPolicy, tensors: Tensors, state: Any, count: int
) -> tuple[Tensor, Any]:
    """Run rows without padding that have all read `count` tokens before."""
    tokens, outputs, begin = tensors[0].shape[1], [], 0
    while begin < tokens:
        end = min(tokens, begin + policy.norm_every - (count + begin) % policy.norm_every)
        output, state = recurrence(_cut(tensors, slice(begin, end)), Row(state, return_state=True))
        if (count + end) % policy.norm_every == 0:
            memory = state if isinstance(state, Tensor) else state.memory
            factors = clamp_factors(policy, memory)
            state = map_state(
                lambda x, f=factors: x * f.view(*f.shape, *[1] * (x.dim() - 2)), state
            )
        outputs.append(output)
        begin = end
    return torch.cat(outputs, dim=1), state


def _cut(tensors: Tensors, tokens: slice) -> list[Tensor | None]:
    return [x if x is None or x.dim() == 1 else x[:, tokens] for x in tensors]


def map_state(function: Callable[..., Tensor], *states: Any) -> Any:
    """Apply a function to each tensor of one state or of several alike. A state is one tensor or a
    NamedTuple of tensors."""
    if states[0] is None or isinstance(states[0], Tensor):
        return None if states[0] is None else function(*states)
    parts = zip(*states, strict=True)
    return type(states[0])(*(None if x[0] is None else function(*x) for x in parts))
