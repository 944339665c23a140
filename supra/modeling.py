"""The converted model: the base family's own classes, with a mixer inside every attention module.

The attention module runs its own projections, norms and output projection. It calls the attention
function that its config names, which is ours; a wrapper around the module gives it the identity as
rotation and hands the true one to the mixer. `attention_mask` is the argument that every family
passes down untouched, so it carries what the mixers need:

    None                        no padding, one document a row
    bool [B, 1, 1, T]           False where padded
    int  [1, 1, 1, N + 1]       packed: boundaries of N documents in the row B·T, flattened
"""

import functools
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from supra.cache import MixerLayer, adopt_cache, new_cache
from supra.configuration import config_class
from supra.errors import UserError
from supra.mixers import AttentionShape, Mixer, MixerInputs, Rotary, build_mixer
from supra.remote_code import write_shim
from supra.weights import check_complete


@dataclass(frozen=True)
class _Call:
    """What the wrapper around an attention module tells our attention function."""

    hidden_states: Tensor
    rotary: Rotary | None
    mask: Tensor | None
    layer: MixerLayer | None


def supra_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: _Call, **kwargs
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, Hq, T, K] in, output [B, T, Hq, V] out."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(f"attention with {name} is not supported: no mixer computes it")
    call = attention_mask
    packed = call.mask is not None and call.mask.dtype != torch.bool
    inputs = MixerInputs(
        hidden_states=call.hidden_states,
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        rotary=call.rotary,
        scaling=kwargs["scaling"],
        sliding_window=kwargs.get("sliding_window"),
        padding_mask=None if packed or call.mask is None else call.mask[:, 0, 0],
        cu_seqlens=call.mask[0, 0, 0] if packed else None,
    )
    if call.layer is not None:
        return call.layer.mix(module.mixer, inputs), None
    return module.mixer(inputs)[0], None


AttentionInterface.register("supra", supra_attention)


class SupraAttention:
    """Mixed into the family's attention class; `mixer` is a submodule of the attention module."""

    def forward(self, *args, **kwargs):
        kwargs |= zip(self.forward_names, args, strict=False)
        cache = next((x for x in kwargs.values() if isinstance(x, Cache)), None)
        rotary = None
        if kwargs.get("position_embeddings") is not None:
            cos, sin = kwargs["position_embeddings"]
            rotary = Rotary(cos, sin, self.rotate)
            kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        kwargs["attention_mask"] = _Call(
            hidden_states=kwargs["hidden_states"],
            rotary=rotary,
            mask=kwargs.get("attention_mask"),
            layer=None if cache is None else cache.layers[self.layer_idx],
        )
        return super().forward(**kwargs)

    def __reduce__(self):  # the class is made at run time, so a pickle names its base
        return _bare_attention, (type(self).__mro__[2],), self.__dict__


def _bare_attention(base: type[nn.Module]) -> nn.Module:
    attention = attention_class(base)
    return attention.__new__(attention)


@functools.cache
def attention_class(base: type[nn.Module]) -> type[nn.Module]:
    """The family's attention class with the wrapper in front."""
    fields = {
        "forward_names": tuple(inspect.signature(base.forward).parameters)[1:],
        # families differ in what they rotate: halves, or interleaved pairs
        "rotate": staticmethod(getattr(sys.modules[base.__module__], "apply_rotary_pos_emb", None)),
        "__module__": __name__,
    }
    return type(f"Supra{base.__name__}", (SupraAttention, base), fields)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The causal self-attention modules, converted or not.

    Those that do not go through transformers' attention interface are left out: nothing could be
    put in their middle.
    """
    return [
        module
        for module in model.modules()
        if _calls_attention_interface(type(module))
        and getattr(module, "is_causal", False)
        and getattr(module, "layer_idx", None) is not None
    ]


@functools.cache
def _calls_attention_interface(module: type[nn.Module]) -> bool:
    forwards = (vars(base).get("forward") for base in module.__mro__)
    codes = (inspect.unwrap(f).__code__ for f in forwards if inspect.isfunction(f))
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def attention_shape(config: PreTrainedConfig) -> AttentionShape:
    """The sizes of the family's attention modules."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionShape(
        query_heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=size,
        value_size=size,
        hidden_size=config.hidden_size,
    )


class _SupraPreTrained:
    """What the headless model and the language model share."""

    _keep_in_fp32_modules_strict = {"mixer"}  # noqa: RUF012 (transformers reads a class attribute)
    _supports_context_parallel = False
    _is_stateful = True

    def _check_and_adjust_attn_implementation(self, *args, **kwargs) -> str:
        return "supra"

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Mixer):
            super()._init_weights(module)
            return
        tensors = (*module.parameters(), *module.buffers())
        if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As transformers', but a missing, unexpected or mis-shaped tensor is an error."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_complete(info, f"{cls.base_model_prefix}." if issubclass(cls, SupraModel) else "")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs):
        """As transformers', which would leave out the module that `auto_map` names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(Path(save_directory))

    def init_continuous_batching(self, *args, **kwargs):
        raise UserError(
            "continuous batching pages a key-value cache, which a recurrent model does not have: "
            "use generate() with a padded batch"
        )


class SupraModel(_SupraPreTrained):
    """Mixed into the family's headless model."""

    def post_init(self) -> None:
        plan = self.config.supra
        if len(plan["layers"]) != self.config.num_hidden_layers:
            raise UserError(
                f"config.json plans {len(plan['layers'])} layers and has num_hidden_layers "
                f"{self.config.num_hidden_layers}: convert the model again"
            )
        shape = attention_shape(self.config)
        for attention in attention_modules(self):
            name = plan["layers"][attention.layer_idx]
            attention.__class__ = attention_class(type(attention))
            attention.mixer = build_mixer(name, shape, plan["options"].get(name))
        super().post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ):
        """As the base family's. Packed rows are those whose `position_ids` start anew in a row."""
        tokens = (input_ids if input_ids is not None else kwargs["inputs_embeds"]).shape[1]
        boundaries = None
        if attention_mask is None and past_key_values is None and position_ids is not None:
            boundaries = document_boundaries(position_ids, input_ids, kwargs.get("inputs_embeds"))
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and boundaries is None
        if use_cache and boundaries is not None:
            raise UserError(
                "use_cache (=True) with packed position_ids: a packed row ends in no single state; "
                "pass use_cache=False, or one document a row"
            )
        if past_key_values is None and use_cache:
            past_key_values = new_cache(self.config.num_hidden_layers)
        elif past_key_values is not None:
            adopt_cache(past_key_values, self.config.num_hidden_layers)
        mask = boundaries if boundaries is not None else padding_mask(attention_mask, tokens)
        return super().forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class SupraForCausalLM(_SupraPreTrained):
    """Mixed into the family's language model."""

    def post_init(self) -> None:
        base = getattr(self, self.base_model_prefix)
        if not isinstance(base, SupraModel):
            setattr(self, self.base_model_prefix, model_class(type(base))(self.config))
        super().post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if isinstance(cache := model_kwargs.get("past_key_values"), Cache):
            adopt_cache(cache, self.config.num_hidden_layers)


def padding_mask(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Bool [B, 1, 1, T] from the [B, past + T] mask of the tokenizer; None when all are kept."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise UserError(
            "attention_mask must be [batch, tokens], 0 where padded: a recurrent model is causal "
            "and takes no other mask"
        )
    mask = attention_mask[:, -tokens:].bool()
    if not torch.compiler.is_compiling() and mask.all():
        return None
    return mask[:, None, None]


def document_boundaries(
    position_ids: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor | None:
    """Int [1, 1, 1, N + 1] where positions [B, T] do not go up by one; None: one document a row."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    if not starts[:, 1:].any():
        return None
    batch = (input_ids if input_ids is not None else inputs_embeds).shape[0]
    starts = starts.expand(batch, -1).flatten()
    ends = torch.tensor([starts.numel()], device=starts.device)
    return torch.cat([starts.nonzero().flatten(), ends]).to(torch.int32)[None, None, None]


@functools.cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The converted class of a family's headless model or language model."""
    mixin = SupraForCausalLM if base.__name__.endswith("ForCausalLM") else SupraModel
    fields = {
        "config_class": config_class(base.config_class.model_type),
        "__module__": __name__,
        "__doc__": f"{base.__name__} with a mixer in place of softmax attention in every layer.",
    }
    return type(f"Supra{base.__name__}", (mixin, base), fields)


def register_family(config: type[PreTrainedConfig]) -> None:
    """Make AutoModel and AutoModelForCausalLM know the converted classes of one family."""
    for auto, names in (
        (AutoModel, MODEL_MAPPING_NAMES),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        base = _transformers_class(names[config.base_model_type])
        auto.register(config, model_class(base), exist_ok=True)


def _transformers_class(name: str) -> type[PreTrainedModel]:
    import transformers

    return getattr(transformers, name)


def __getattr__(name: str) -> type[PreTrainedModel]:
    """`supra.modeling.SupraLlamaForCausalLM` and its like, for pickle and for imports by name."""
    known = {*MODEL_MAPPING_NAMES.values(), *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    if name.startswith("Supra") and name[5:] in known:
        return model_class(_transformers_class(name[5:]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
