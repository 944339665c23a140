"""What `generate` of transformers asks of a language model, for converted models."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import CompileConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache

from supra.errors import UserError
from supra.model.attention import attention_modules
from supra.model.cache import adopt_cache


class Generation:
    """Mixed into the family's language model."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if isinstance(cache := model_kwargs.get("past_key_values"), Cache):
            adopt_cache(cache, self.config.num_hidden_layers)
            refuse_covered_prompt(cache, generation_config, model_kwargs)
            if generation_config.is_assistant:  # the replaced layers had it activated
                cache.activate_past_recording()

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """The padding of this call's tokens, [B, T], in the place of the mask [B, 1, T, S] that
        `generate` makes for a static cache. Tokens that it has written are no padding."""
        tokens = inputs_embeds.shape[1]
        if attention_mask is None or (tokens == 1 and not is_first_iteration):
            return None
        return attention_mask[:, -tokens:]

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """As in transformers, but only calls of one token are compiled, also where `generate` reads
        the prompt in chunks. Raises UserError for a state_policy that cannot be compiled."""
        policies = [attention.mixer.policy for attention in attention_modules(self)]
        if any(policy is not None and policy.keeps_past for policy in policies):
            raise UserError(
                "state_policy with window or norm cannot be compiled, since it depends on what the "
                "tokens before were: pass disable_compile=True to generate(), or leave "
                "cache_implementation and --compile out"
            )
        compiled = super().get_compiled_call(compile_config)

        def call(**given: Any) -> Any:
            tokens = given.get("input_ids")
            tokens = given["inputs_embeds"] if tokens is None else tokens
            return (compiled if tokens.shape[1] == 1 else self)(**given)

        return call

    @functools.wraps(GenerationMixin._assisted_decoding)  # generate() looks at its signature
    def _assisted_decoding(self, *args, **kwargs):
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:  # transformers activates recording and does not end it
            for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
                layer.end_recording()


def refuse_covered_prompt(
    cache: Cache, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Raise UserError if the cache already covers the prompt of generate(), which would otherwise
    read the prompt or part of it a second time."""
    embeddings, mask = (model_kwargs.get(name) for name in ("inputs_embeds", "attention_mask"))
    if embeddings is not None:
        prompt = embeddings.shape[1]
    elif mask is not None:  # covers the whole conversation; input_ids may hold only new tokens
        prompt = mask.shape[1]
    else:  # generate() drops a mask of ones and keeps its length here
        prompt = generation_config._mask_length
    if 0 < prompt <= (held := cache.get_seq_length()):
        raise UserError(
            f"past_key_values hold {held} tokens and the prompt has {prompt}: pass the whole "
            "conversation, at least one token more than the cache holds"
        )
