"""`window`: exact attention to the last and the first tokens, linear attention to the others.

    v'ᵢ = ( Σ_{j exact} e^{sᵢⱼ} vⱼ + e^{aᵢ} φ(qᵢ)·Σ_{j left} φ(kⱼ) vⱼ ) / ( the same with vⱼ = 1 )

One softmax covers both parts. sᵢⱼ is the teacher's own score. aᵢ, from the hidden states, is the
weight of the tokens that have left the window. After LoLCATs (Zhang et al. 2024, section 3.3) and
Lizard (2025). The first tokens, on which softmax attention puts much weight, stay exact as in
StreamingLLM (Xiao et al. 2023).
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from supra.kernels.linear_attention import LinearAttentionState
from supra.mixers.band import band_distance, band_scores, band_sums
from supra.mixers.base import Mixer
from supra.mixers.feature_maps import (
    MAX_EXPANSION,
    build_feature_map,
    check_expansion,
    map_features,
)
from supra.mixers.gates import DecayGate, HeadLogits
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.padding import pick, tokens_first
from supra.mixers.read_out import OutputGate
from supra.mixers.recurrence import LINEAR_ATTENTION, scan
from supra.settings.model import STRICT

MAX_TOKENS = 2**15  # in the window or the sinks; every token computes so many scores per head
MIN_MASS = 1e-30  # sum of weights beyond the window, while it is empty
WEIGHTS = tuple(range(-4, 15, 2))  # aᵢ, in nats; candidates in calibration
HALF_LIVES = tuple(4.0**n for n in range(2, 7))  # tokens; candidates in calibration


@dataclass(frozen=True, config=STRICT)
class WindowOptions:
    """size: tokens of the window, the current one included.
    sinks: number of first tokens of a document that stay exact.
    feature_map: of the linear part, "hedgehog" or "relu" (supra/mixers/feature_maps.py).
    expansion: how many times as wide its features and its state are.
    decay: of the linear part: "none", or "gated" by the hidden states.
    output_gate: whether the output is multiplied by 2σ(Wx + b) of the hidden states.
    dropout: share of the calls in training in which the window is the current token alone, so that
        the linear part learns to work without it.
    rotary: whether queries and keys of the linear part are rotated to their positions. Those of the
        window and the sinks always are, as in the teacher.
    """

    size: int = Field(64, ge=1, le=MAX_TOKENS)
    sinks: int = Field(4, ge=0, le=MAX_TOKENS)
    feature_map: Literal["hedgehog", "relu"] = "hedgehog"
    expansion: int = Field(1, ge=1, le=MAX_EXPANSION)
    decay: Literal["gated", "none"] = "gated"
    output_gate: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    rotary: bool = True

    def __post_init__(self):
        check_expansion(self.expansion, self.feature_map)


class WindowState(NamedTuple):
    """W window tokens and S sinks: the same size for every context. If the linear part is not
    rotated, keys are followed by themselves without rotation: 2K in the place of K."""

    memory: Tensor  # [B, Hq, features, V + 1], float32; the last column sums the weights
    window_key: Tensor  # [B, W, Hkv, K], rotated, the newest last
    window_value: Tensor  # [B, W, Hkv, V]
    sink_key: Tensor  # [B, S, Hkv, K], rotated
    sink_value: Tensor  # [B, S, Hkv, V]
    length: Tensor  # int [B], tokens read so far


class Window(Mixer):
    """Exact in a window and for the first tokens of a document, linear for the others."""

    name = "window"
    Options = WindowOptions
    State = WindowState
    branches = ("linear", "window")
    averages = True

    def __init__(self, shape: AttentionShape, options: WindowOptions):
        gate = OutputGate(shape) if options.output_gate else None
        super().__init__(shape, options, output_gate=gate, rotary=options.rotary)
        self.feature_map = build_feature_map(options.feature_map, shape, options.expansion)
        self.linear_weight = HeadLogits(shape)
        if options.decay == "gated":
            self.decay_gate = DecayGate(shape)

    @property
    def needs_whole_rows(self) -> str | None:
        """Ranks that drop their windows in different calls would disagree on what has left them."""
        share = self.options.dropout
        return f"dropout (={share}) drops the window of whole rows; set it to 0" if share else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.options.decay == "gated":  # the linear part is for distant tokens
            self.decay_gate.set_half_life(torch.full((self.shape.query_heads,), HALF_LIVES[-1]))

    def placed(self, inputs: MixerInputs) -> MixerInputs:
        """The inputs as they are, since the window is rotated whatever the options say."""
        return inputs

    def mix(
        self, inputs: MixerInputs, state: WindowState | None = None, return_state: bool = False
    ) -> tuple[Tensor, WindowState | None]:
        query, key = inputs.rotated(inputs.query, inputs.key)
        if not self.options.rotary:  # the window reads the first half, the linear part the second
            query = torch.cat([query, inputs.query], dim=-1)
            key = torch.cat([key, inputs.key], dim=-1)
        inputs = replace(inputs, query=query, key=key, rotary=None)
        if inputs.part is not None:
            state = self._state_before(inputs)
        if inputs.padding_mask is None:
            return self._mix(inputs, state, return_state)
        order = tokens_first(inputs.padding_mask)
        names = ("hidden_states", "query", "key", "value", "padding_mask")
        inputs = replace(inputs, **{name: pick(getattr(inputs, name), order) for name in names})
        output, state = self._mix(inputs, state, return_state)
        return pick(output, order.argsort(dim=1)), state

    def _mix(
        self, inputs: MixerInputs, state: WindowState | None, return_state: bool
    ) -> tuple[Tensor, WindowState | None]:
        size = self._size_now(inputs.key.shape[1] if state is None else None)
        state = state or self._empty_state(inputs)
        rank, sinks = self._places(inputs, state)
        key = torch.cat([state.window_key, inputs.key], dim=1)
        value = torch.cat([state.window_value, inputs.value], dim=1)
        first = self.options.size - size
        near = key[:, first:], value[:, first:]
        linear, memory = self._linear(inputs, near, rank, size, state.memory, return_state)
        output = self._join(inputs, near, rank, sinks, linear, size)
        if not return_state:
            return output, None
        count = torch.full_like(state.length, inputs.key.shape[1])
        if inputs.padding_mask is not None:
            count = inputs.padding_mask.sum(1)
        last = count[:, None] + torch.arange(self.options.size, device=count.device)
        window = pick(key, last), pick(value, last)
        return output, WindowState(memory, *window, *sinks, state.length + count)

    def _size_now(self, tokens: int | None) -> int:
        """tokens: of rows that begin here. A window that is wider would only cost more."""
        dropped = self.training and torch.rand(()).item() < self.options.dropout
        if dropped or self.only == "linear":
            return 1
        if tokens is None or torch.compiler.is_compiling():  # a graph serves other lengths, too
            return self.options.size
        return min(self.options.size, tokens)

    def _empty_state(self, inputs: MixerInputs) -> WindowState:
        key, value, options = inputs.key, inputs.value, self.options
        return WindowState(
            memory=None,
            window_key=torch.zeros_like(key[:, :1]).expand(-1, options.size, -1, -1),
            window_value=torch.zeros_like(value[:, :1]).expand(-1, options.size, -1, -1),
            sink_key=torch.zeros_like(key[:, :1]).expand(-1, options.sinks, -1, -1),
            sink_value=torch.zeros_like(value[:, :1]).expand(-1, options.sinks, -1, -1),
            length=torch.zeros(key.shape[0], dtype=torch.int64, device=key.device),
        )

    def _state_before(self, inputs: MixerInputs) -> WindowState:
        """The state before a part of the rows, without its memory, which `scan` finds."""
        part, sizes = inputs.part, [inputs.key.shape[-1], inputs.value.shape[-1]]
        both = torch.cat([inputs.key, inputs.value], dim=-1)  # one exchange for both
        window = part.last_tokens(both, self.options.size).split(sizes, dim=-1)
        sinks = part.first_tokens(both, self.options.sinks).split(sizes, dim=-1)
        return WindowState(None, *window, *sinks, part.length)

    def _places(
        self, inputs: MixerInputs, state: WindowState
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Each token's position in its document, int [B, T], and the key and value of the
        document's first tokens: [B, S, Hkv, D], or [B, T, S, Hkv, D] for packed documents."""
        batch, tokens = inputs.key.shape[:2]
        sinks = torch.arange(self.options.sinks, device=inputs.key.device)
        if inputs.cu_seqlens is not None:
            bounds = inputs.cu_seqlens.to(sinks.device)
            at = torch.arange(batch * tokens, device=sinks.device)
            number = torch.bucketize(at, bounds, right=True) - 1
            before = self._tokens_before(inputs, number, state)
            start = bounds[number] - before
            first = (start[:, None] + sinks).clamp(0, batch * tokens - 1).view(batch, tokens, -1)
            key, value = (x.flatten(0, 1)[first] for x in (inputs.key, inputs.value))
            if inputs.part is not None:
                new = (sinks >= before[:, None]).view(batch, tokens, -1, 1, 1)
                key = torch.where(new, key, state.sink_key[:, None])
                value = torch.where(new, value, state.sink_value[:, None])
            return (at - start).view(batch, tokens), (key, value)
        rank = state.length[:, None] + torch.arange(tokens, device=sinks.device)
        at = sinks - state.length[:, None]
        new = ((at >= 0) & (at < tokens))[..., None, None]
        at = at.clamp(0, tokens - 1)
        return rank, (
            torch.where(new, pick(inputs.key, at), state.sink_key),
            torch.where(new, pick(inputs.value, at), state.sink_value),
        )

    @staticmethod
    def _tokens_before(inputs: MixerInputs, number: Tensor, state: WindowState) -> Tensor:
        """How many tokens of its document were read before the call, for each token of packed rows:
        int [B · T]. number: of the document. Only the first one of a row can have some."""
        if inputs.part is None:
            return torch.zeros_like(number)
        first = inputs.part.first_sequences(inputs.cu_seqlens)[:, None]
        goes_on = number.view(len(first), -1) == first
        return (goes_on * state.length[:, None]).flatten()

    def _linear(
        self,
        inputs: MixerInputs,
        near: tuple[Tensor, Tensor],
        rank: Tensor,
        size: int,
        memory: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums [B, T, Hq, V + 1] over tokens that have left the window; the last one sums the
        weights."""
        key, value = (
            x[:, : inputs.key.shape[1]] for x in near
        )  # what leaves the window at each token
        left = (rank >= self.options.sinks + size)[..., None, None]
        query, key = (x[..., -self.shape.head_size :] for x in (inputs.query, key))
        query, key = map_features(self.feature_map, inputs, query, key)
        wide = torch.promote_types(value.dtype, torch.float32)
        value = torch.nn.functional.pad(value.to(wide), (0, 1), value=1.0)
        gated = self.options.decay == "gated"
        sums, end = scan(
            LINEAR_ATTENTION, inputs, query, key * left, value * left,
            log_decay=self.decay_gate(inputs.hidden_states) if gated else None,
            state=None if memory is None else LinearAttentionState(memory, None),
            return_state=return_state,
        )  # fmt: skip
        return sums, None if end is None else end.memory

    def _join(
        self,
        inputs: MixerInputs,
        near: tuple[Tensor, Tensor],
        rank: Tensor,
        sinks: tuple[Tensor, Tensor],
        linear: Tensor,
        size: int,
    ) -> Tensor:
        """One softmax over the window, the sinks and the linear part: [B, T, Hq, V]."""
        wide = linear.dtype
        query, key, value = (x.to(wide) for x in (inputs.query, *near))
        sink_key, sink_value = (x.to(wide) for x in sinks)
        query, key, sink_key = (x[..., : self.shape.head_size] for x in (query, key, sink_key))
        distance = band_distance(query.shape[1], size, query.device)
        outside = (distance < 0) | (distance >= size)
        outside = outside | (distance > rank[..., None] - self.options.sinks)
        window = self._scores(inputs, band_scores(query, key, size), outside)
        later = torch.arange(self.options.sinks, device=rank.device) > rank[..., None]
        first = self._scores(inputs, sink_scores(query, sink_key), later)
        mass = linear[..., -1:].clamp(min=MIN_MASS)
        far = self.linear_weight(inputs.hidden_states)[..., None].to(wide) + mass.log()
        if self.only == "window":
            far = torch.full_like(far, -torch.inf)
        parts = [window, first, far]
        if inputs.sinks is not None:
            parts.append(inputs.sinks.to(wide).view(-1, 1).expand_as(far))
        shares = torch.cat(parts, dim=-1).softmax(-1)
        window, first, far = shares.split([x.shape[-1] for x in parts], dim=-1)[:3]
        output = band_sums(window, value, size)
        if self.options.sinks:  # ONNX has no sums over nothing
            output = output + sink_sums(first, sink_value)
        return output + far * linear[..., :-1] / mass

    @staticmethod
    def _scores(inputs: MixerInputs, products: Tensor, hidden: Tensor) -> Tensor:
        """The teacher's scores from products q·k [B, T, Hq, J], −inf where `hidden` [B, T, J]."""
        scores = products * inputs.scaling
        if inputs.softcap is not None:
            scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
        return scores.masked_fill(hidden[:, :, None], -torch.inf)

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose per head: the weight of the linear part, and its decay."""
        self.choose(inputs, target, WEIGHTS, self.linear_weight.set)
        if self.options.decay == "gated":
            self.choose(inputs, target, HALF_LIVES, self.decay_gate.set_half_life)
            self.choose(inputs, target, WEIGHTS, self.linear_weight.set)


def sink_scores(query: Tensor, key: Tensor) -> Tensor:
    """q·k with the first tokens of the row, or of each token's own document: [B, T, Hq, S]."""
    if key.shape[-3] == 0:
        return query.new_zeros(*query.shape[:3], 0)
    query = query.unflatten(2, (key.shape[-2], -1))
    places = "bshk" if key.dim() == 4 else "btshk"
    return torch.einsum(f"bthgk,{places}->bthgs", query, key).flatten(2, 3)


def sink_sums(shares: Tensor, value: Tensor) -> Tensor:
    """Σ share·v over the first tokens: [B, T, Hq, S] to [B, T, Hq, V]."""
    shares = shares.unflatten(2, (value.shape[-2], -1))
    places = "bshv" if value.dim() == 4 else "btshv"
    return torch.einsum(f"bthgs,{places}->bthgv", shares, value).flatten(2, 3)
