"""Native layers that run through a mixer: the layer of a family, with another `forward`.

Each class says how its families project the hidden states and how they read out the sums of the
recurrence. Names and shapes of weights stay those of transformers.
"""

import functools

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from supra.mixers import Mixer
from supra.mixers.inputs import AttentionShape
from supra.model.cache import MixerLayer
from supra.model.native.cache import state_layer
from supra.model.native.mixers import NativeGatedDelta, NativeInputs, NativeMamba2, wide


class NativeLayer:
    """Mixed into the family's layer class, in front of it.

    Without acceleration and without a policy, the family's own `forward` runs.
    """

    recurrence: Mixer
    parts: tuple[type, type]  # of its class: one of those below, and the family's
    accelerated = False
    bounds: Tensor | None = None  # int [N + 1], of documents in the packed row B·T

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """hidden_states: [B, T, D]. attention_mask: [B, T], 0 where padded, or None."""
        held = cache_params is not None and len(cache_params.layers) > self.layer_idx
        held = held and isinstance(cache_params.layers[self.layer_idx], MixerLayer)
        packed = self.bounds is not None
        if not (self.accelerated or self.recurrence.policy or held or packed):
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        padding = None if attention_mask is None else attention_mask.bool()
        inputs, gate = self.mixer_inputs(hidden_states, padding)
        layer = state_layer(cache_params, self.layer_idx)
        if layer is None:
            output, _ = self.recurrence(inputs)
        else:
            output = layer.mix(self.recurrence, inputs)
        return self.out_proj(self.read_out(output, gate).to(hidden_states.dtype))

    @classmethod
    def make_recurrence(cls, layer: nn.Module) -> Mixer:
        """The mixer that fits a layer of the family."""
        raise NotImplementedError

    def mixer_inputs(
        self, hidden_states: Tensor, padding_mask: Tensor | None
    ) -> tuple[NativeInputs, Tensor]:
        """The inputs of the recurrence, and the gate of its output."""
        raise NotImplementedError

    def read_out(self, output: Tensor, gate: Tensor) -> Tensor:
        """The sums [B, T, H, V] after gate and norm, [B, T, H · V]."""
        raise NotImplementedError

    def __reduce__(self):  # the class is made at run time, so pickles name its parts
        return _bare_layer, self.parts, self.__dict__


class Mamba2Layer(NativeLayer):
    """Mamba-2, as in mamba2, bamba and granitemoehybrid.

    Steps Δ are clamped to time_step_limit also in decoding, where transformers does not.
    """

    @classmethod
    def make_recurrence(cls, layer: nn.Module) -> Mixer:
        sizes = layer.num_heads, layer.n_groups, layer.ssm_state_size, layer.head_dim
        return NativeMamba2(AttentionShape(*sizes, layer.hidden_size))

    def projected(self, hidden_states: Tensor) -> Tensor:
        """z, x, B, C and Δ side by side, [B, T, …]."""
        return self.in_proj(hidden_states)

    def mixer_inputs(
        self, hidden_states: Tensor, padding_mask: Tensor | None
    ) -> tuple[NativeInputs, Tensor]:
        features = self.n_groups * self.ssm_state_size
        sizes = self.intermediate_size, self.intermediate_size, features, features, self.num_heads
        gate, value, key, query, step = self.projected(hidden_states).split(sizes, dim=-1)
        step = F.softplus(wide(step) + wide(self.dt_bias)).clamp(*self.time_step_limit)
        inputs = _inputs(
            self, hidden_states, padding_mask,
            query=query.unflatten(-1, (self.n_groups, -1)),
            key=key.unflatten(-1, (self.n_groups, -1)),
            value=value.unflatten(-1, (self.num_heads, -1)),
            strength=step,
            log_decay=-wide(self.A_log).exp() * step,
        )  # fmt: skip
        return inputs, gate

    def read_out(self, output: Tensor, gate: Tensor) -> Tensor:
        return self.norm(output.flatten(2), gate)


class FalconH1Layer(Mamba2Layer):
    """Mamba-2 with factors on its projections, and where the config says so without a norm."""

    def projected(self, hidden_states: Tensor) -> Tensor:
        return self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector

    def read_out(self, output: Tensor, gate: Tensor) -> Tensor:
        if self.mamba_rms_norm:
            return super().read_out(output, gate)
        return output.flatten(2) * F.silu(gate)


class GatedDeltaLayer(NativeLayer):
    """Gated DeltaNet, as in qwen3_5."""

    @classmethod
    def make_recurrence(cls, layer: nn.Module) -> Mixer:
        sizes = layer.num_v_heads, layer.num_k_heads, layer.head_k_dim, layer.head_v_dim
        return NativeGatedDelta(AttentionShape(*sizes, layer.hidden_size))

    def projected(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Query, key, value and z, [B, T, heads, size] each; logits of β, and a: [B, T, H]."""
        sizes = self.key_dim, self.key_dim, self.value_dim
        query, key, value = self.in_proj_qkv(hidden_states).split(sizes, dim=-1)
        keys, values = (-1, self.head_k_dim), (-1, self.head_v_dim)
        return (
            query.unflatten(-1, keys),
            key.unflatten(-1, keys),
            value.unflatten(-1, values),
            self.in_proj_z(hidden_states).unflatten(-1, values),
            self.in_proj_b(hidden_states),
            self.in_proj_a(hidden_states),
        )

    def mixer_inputs(
        self, hidden_states: Tensor, padding_mask: Tensor | None
    ) -> tuple[NativeInputs, Tensor]:
        query, key, value, gate, strength, step = self.projected(hidden_states)
        step = F.softplus(wide(step) + wide(self.dt_bias))
        inputs = _inputs(
            self, hidden_states, padding_mask,
            query=query, key=key, value=value,
            strength=wide(strength).sigmoid(),
            log_decay=-wide(self.A_log).exp() * step,
        )  # fmt: skip
        return inputs, gate

    def read_out(self, output: Tensor, gate: Tensor) -> Tensor:
        rows = (x.reshape(-1, self.head_v_dim) for x in (output, gate))
        return self.norm(*rows).view_as(output).flatten(2)


class Qwen3NextLayer(GatedDeltaLayer):
    """Gated DeltaNet with joined projections."""

    def projected(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        joined = self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        return self.fix_query_key_value_ordering(*joined)


def _inputs(
    layer: nn.Module, hidden_states: Tensor, padding_mask: Tensor | None, **tensors: Tensor
) -> NativeInputs:
    return NativeInputs(
        hidden_states=hidden_states,
        rotary=None,
        scaling=1.0,
        sliding_window=None,
        softcap=None,
        sinks=None,
        padding_mask=padding_mask,
        cu_seqlens=layer.bounds,
        layer=layer,
        **tensors,
    )


@functools.cache
def layer_class(own: type[NativeLayer], base: type[nn.Module]) -> type[nn.Module]:
    """The family's layer class with one of the classes above in front."""
    fields = {"parts": (own, base), "__module__": __name__}
    return type(f"Supra{base.__name__}", (own, base), fields)


def _bare_layer(own: type[NativeLayer], base: type[nn.Module]) -> nn.Module:
    layer = layer_class(own, base)
    return layer.__new__(layer)


def insert_recurrence(layer: nn.Module, own: type[NativeLayer]) -> None:
    """Turn a family's layer into one that can run through a mixer, in place."""
    recurrence = own.make_recurrence(layer)
    layer.__class__ = layer_class(own, type(layer))
    if hasattr(layer, "_old_forward"):  # what Accelerate's hook calls, if weights are offloaded
        layer._old_forward = type(layer).forward.__get__(layer)
    layer.recurrence = recurrence
