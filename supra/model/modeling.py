"""Converted models: the base family's own classes, with a mixer in every attention module."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

import supra.model.adapters  # noqa: F401 (tells peft of converted models)
from supra.checkpoint.card import carry_card
from supra.checkpoint.config_rules import making_model
from supra.checkpoint.files import follow_umask
from supra.checkpoint.weights import KINDS, check_complete
from supra.errors import UserError
from supra.mixers import Mixer, float32_at_least
from supra.model.attention import attention_modules, insert_mixer
from supra.model.cache import adopt_cache, belong_to, check_rows, new_cache
from supra.model.configuration import config_class
from supra.model.families import FAMILIES
from supra.model.generation import Generation
from supra.model.offload import device_of
from supra.model.remote_code import write_shim
from supra.model.rows import (
    document_boundaries,
    given_boundaries,
    padding_mask,
    refuse_context_parallel,
)


class _SupraPreTrained:
    """What the headless model and the models with a head share."""

    _supports_context_parallel = False
    # any other attention implementation would replace the mixers
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False
    _supports_attention_backend = False
    _is_stateful = False  # the cache can roll back, see supra/model/cache.py

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        with making_model(config):
            super().__init__(config, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where inputs go; `generate` reads it. transformers takes the device of the first weight,
        but an offloaded weight is on none."""
        return device_of(self)

    def _check_and_adjust_attn_implementation(self, *args, **kwargs) -> str:
        return "supra"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # in custom code, transformers counts a module without tensors of its own as initialised
        super()._initialize_weights(module, is_custom_code and not isinstance(module, Mixer))

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Mixer):
            super()._init_weights(module)
            return
        tensors = (*module.parameters(), *module.buffers())
        # a tensor offloaded to disk was loaded from there, and has no memory to write to
        if not all(x.is_meta or getattr(x, "_is_hf_initialized", False) for x in tensors):
            with float32_at_least():
                module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a missing, unexpected or misshaped tensor is an error."""
        kwargs["ignore_mismatched_sizes"] = True  # the loading info then lists them by name
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_complete(info, f"{cls.base_model_prefix}.", cls._below_prefix(model.config))
        return (model, info) if output_loading_info else model

    @classmethod
    def _below_prefix(cls, config: PreTrainedConfig) -> tuple[str, ...]:
        """The kinds of mistakes that `check_complete` reports only for the headless model."""
        return ()

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs):
        """As in transformers; also writes the module that `auto_map` names, and the model card."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in Path(save_directory).glob("*.safetensors"):
            follow_umask(file)
        write_shim(Path(save_directory))
        carry_card(self.name_or_path, save_directory)

    def _upload_modified_files(self, working_dir: str | Path, *args, **kwargs):
        """Called by `push_to_hub` and `save_pretrained(push_to_hub=True)` before the upload, after
        transformers has replaced the model card by a placeholder."""
        write_shim(Path(working_dir))
        carry_card(self.name_or_path, working_dir, local_files_only=False)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise UserError(
            "continuous batching pages a key-value cache, which a recurrent model does not have: "
            "use generate() with a padded batch"
        )


class SupraModel(_SupraPreTrained):
    """Mixed into the family's headless model."""

    row_ranks: Any = None  # a RowRanks (supra/model/sequence_parallel.py), if ranks share the rows

    @classmethod
    def _below_prefix(cls, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("unexpected_keys",)  # a headless model ignores the head's tensors

    def post_init(self) -> None:
        """Put the mixers of the config's plan into the attention modules."""
        plan = self.config.supra
        if len(plan["layers"]) != self.config.num_hidden_layers:
            raise UserError(
                f"config.json plans {len(plan['layers'])} layers and has num_hidden_layers "
                f"{self.config.num_hidden_layers}: convert the model again"
            )
        for attention in attention_modules(self):
            name = plan["layers"][attention.layer_idx]
            insert_mixer(attention, self.config, name, plan["options"].get(name))
        super().post_init()

    def init_parallel_plans(self) -> None:
        """As in the base family, but attention modules and their mixers are whole on every rank."""
        super().init_parallel_plans()
        mixing = set(attention_modules(self))
        names = (name for name, module in self.named_modules() if module in mixing)
        whole = tuple({re.sub(r"\.\d+\.", ".*.", f"{name}.") for name in names})
        for plan in (self._tp_plan, self._ep_plan):
            for name in [name for name in plan if f"{name}.".startswith(whole)]:
                del plan[name]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ):
        """As in the base family. A row is packed if its `position_ids` start anew within it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("a model reads input_ids or inputs_embeds: pass one of them")
        refuse_context_parallel()
        tokens_in = input_ids if inputs_embeds is None else inputs_embeds
        batch, tokens = tokens_in.shape[:2]
        if self.row_ranks is not None:
            check_with_parts(past_key_values, kwargs)
            position_ids = self.row_ranks.begin(tokens_in, position_ids, attention_mask)
        boundaries = None
        if attention_mask is None:
            given, cached = kwargs.get("cu_seq_lens_q"), past_key_values is not None
            boundaries = packed_boundaries(given, position_ids, batch, tokens, cached)
        packed = boundaries is not None or (self.row_ranks is not None and self.row_ranks.packed)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if (use_cache or past_key_values is not None) and packed:
            raise UserError(
                "use_cache (=True) or past_key_values with packed position_ids: a packed row has "
                "no single final state; pass use_cache=False and no cache, or one document per row"
            )
        if past_key_values is None and use_cache:
            past_key_values = new_cache(self.config.num_hidden_layers)
        elif past_key_values is not None:
            adopt_cache(past_key_values, self.config.num_hidden_layers)
            check_rows(past_key_values, batch)
        if past_key_values is not None:
            belong_to(past_key_values, self)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        padding = padding_mask(attention_mask, batch, tokens, past)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=padding if boundaries is None else boundaries,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if self.row_ranks is not None and past_key_values is not None:
            for layer in past_key_values.layers:  # they have counted the tokens of this rank
                layer.length += self.row_ranks.part.start
        return output


def check_with_parts(past_key_values: Cache | None, kwargs: dict[str, Any]) -> None:
    """Raise UserError for arguments of `forward` that rows on several ranks do not allow."""
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise UserError(
            f"past_key_values (with {past_key_values.get_seq_length()} tokens) must be empty "
            "inside sequence_parallel, where rows begin on the first rank: leave them out"
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise UserError(
            "cu_seq_lens_q inside sequence_parallel would count the tokens of this rank only: pass "
            "position_ids, which begin anew with each document"
        )


def packed_boundaries(
    given: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int, cached: bool
) -> Tensor | None:
    """Bounds of the documents in packed rows, int [1, 1, 1, N + 1]; None if rows are not packed.

    A packing collator may have `given` them, which saves a wait for the device and a graph break.
    """
    if given is not None:
        return given_boundaries(given, batch, tokens)
    # with a cache, packed positions are a mistake: finding it is not worth a graph break
    look = not cached or not torch.compiler.is_compiling()
    look = look and not torch.compiler.is_exporting()  # exports have one document per row
    if position_ids is not None and tokens > 1 and look:
        return document_boundaries(position_ids, batch)
    return None


class _SupraHead(_SupraPreTrained):
    """Mixed into the family's models with a head."""

    def post_init(self) -> None:
        base = getattr(self, self.base_model_prefix)
        if not isinstance(base, SupraModel):
            family = model_class(type(base), self.config.base_model_type, SupraModel)
            setattr(self, self.base_model_prefix, family(self.config))
            if base.is_activation_checkpointing:  # the config set it on the first one
                self.activation_checkpointing_enable()
        super().post_init()


class SupraForCausalLM(Generation, _SupraHead):
    """Mixed into the family's language model."""


class SupraForRows(_SupraHead):
    """Mixed into the family's other heads, which read whole rows.

    Positions count from a row's first token. Otherwise left padding would change the features of
    rotated queries and keys, such as those of Hedgehog.
    """

    @classmethod
    def _below_prefix(cls, config: PreTrainedConfig) -> tuple[str, ...]:
        """A checkpoint of another class lacks this head, and transformers warns about that. In one
        of this class, the head may have another size if the caller allows it."""
        own = cls.__name__ in (config.architectures or ())
        return ("mismatched_keys",) if own else KINDS

    def prepare_rows(self, inputs: dict[str, Any]) -> None:
        """Complete the arguments of `forward`, in place."""
        mask, given = inputs.get("attention_mask"), ("position_ids", "past_key_values")
        if mask is not None and all(inputs.get(name) is None for name in given):
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)


class SupraForSequences(SupraForRows):
    """Mixed into the family's sequence classifier and reward model, which read the last token of
    each row that is not config.pad_token_id."""

    def prepare_rows(self, inputs: dict[str, Any]) -> None:
        """As in SupraForRows. Raises UserError if the last token of rows cannot be found."""
        super().prepare_rows(inputs)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        given = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
        batch = next((x.shape[0] for x in given if x is not None), 1)  # with none, the model raises
        if batch > 1 and self.config.get_text_config().pad_token_id is None:
            raise UserError(
                f"pad_token_id (=None) in the config must be set for {batch} rows, whose ends "
                "it marks: model.config.pad_token_id = tokenizer.pad_token_id"
            )
        packed = inputs.get("cu_seq_lens_q") is not None
        look = mask is None and positions is not None and not torch.compiler.is_exporting()
        if look and not packed:
            packed = document_boundaries(positions, batch) is not None
        if packed:
            raise UserError(
                "position_ids (or cu_seq_lens_q) pack several texts into a row, but a sequence "
                "classifier reads only the last token: pass one text per row, padded"
            )


def _over_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` of a head over rows. The signature stays, since Trainer inspects it."""
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def over_rows(self, *args, **kwargs):
        kwargs |= zip(names, args, strict=False)
        self.prepare_rows(kwargs)
        return forward(self, **kwargs)

    return over_rows


@functools.cache
def model_class(
    base: type[PreTrainedModel], model_type: str, mixin: type[_SupraPreTrained]
) -> type[PreTrainedModel]:
    """The converted class of a family's headless model or of one with a head."""
    headless = getattr(transformers, MODEL_MAPPING_NAMES[model_type])
    fields = {
        "config_class": config_class(model_type),
        # some question-answering heads have another prefix than checkpoints of the language model
        "base_model_prefix": headless.base_model_prefix,
        "_keep_in_fp32_modules_strict": {"mixer", *(base._keep_in_fp32_modules_strict or ())},
        # quantisation skips these modules, and matches patterns from the start of their names
        "_keep_in_fp32_modules": {r".*\.mixer", *(base._keep_in_fp32_modules or ())},
        # transformers looks for the answer in the module of the class, and ours does not have it
        "_can_set_experts_implementation": base._can_set_experts_implementation,
        "__module__": "supra.modeling",
        "__doc__": f"{base.__name__} with a mixer in place of softmax attention in every layer.",
    }
    if issubclass(mixin, SupraForRows):
        fields["forward"] = _over_rows(base.forward)
    return type(_class_name(base, model_type), (mixin, base), fields)


def _class_name(base: type[PreTrainedModel], model_type: str) -> str:
    """`SupraLlamaForCausalLM`; families that borrow Llama's classes have a config of their own."""
    family = CONFIG_MAPPING[model_type].__name__.removesuffix("Config")
    if base.config_class is CONFIG_MAPPING[model_type]:
        return f"Supra{base.__name__}"
    return f"Supra{family}" + re.search(r"(For[A-Z]\w*|Model)$", base.__name__)[0]


# For every auto class: the names of the families' classes, and the mixin that converts them
_KINDS = {
    AutoModel: (MODEL_MAPPING_NAMES, SupraModel),
    AutoModelForCausalLM: (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, SupraForCausalLM),
    AutoModelForSequenceClassification: (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        SupraForSequences,
    ),
    AutoModelForTokenClassification: (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, SupraForRows),
    AutoModelForQuestionAnswering: (MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, SupraForRows),
}


def family_classes(model_type: str) -> dict[type, type[PreTrainedModel]]:
    """The converted classes that one family has, by auto class."""
    return {
        auto: model_class(getattr(transformers, names[model_type]), model_type, mixin)
        for auto, (names, mixin) in _KINDS.items()
        if model_type in names
    }


def register_family(config: type[PreTrainedConfig]) -> None:
    """Register the converted classes of one family with the auto classes."""
    for auto, model in family_classes(config.base_model_type).items():
        auto.register(config, model, exist_ok=True)


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Classes such as `supra.modeling.SupraLlamaForCausalLM`, for pickles and imports by name."""
    if name.startswith("Supra"):
        for model_type in FAMILIES:
            for found in family_classes(model_type).values():
                if found.__name__ == name:
                    return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
