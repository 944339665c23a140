"""Bugs in converted models: attention, padding, documents, states and the cache."""

from tests.controls.bug import Bug

CACHE, MODELING = "supra/model/cache.py", "supra/model/modeling.py"
RECURRENCE, SOFTMAX = "supra/mixers/recurrence.py", "supra/mixers/softmax.py"
MODEL, STATES = "tests/model/test_modeling.py", "tests/model/test_states.py"
ORIGINAL = "tests/model/test_families.py::test_softmax_is_the_original"
PADDING = "tests/mixers/test_contract.py::test_padding_reaches_neither_outputs_nor_state"

BUGS = [
    Bug(
        "t2r_keys_without_their_bias",
        "T2R's map of the keys leaves out the bias that the queries have",
        "supra/mixers/feature_maps.py",
        "_dense(key, self.weight, self.bias).relu()",
        "_dense(key, self.weight, 0 * self.bias).relu()",
        ("tests/mixers/test_supra.py::test_t2r_is_the_papers_equation[5-5]",),
    ),
    Bug(
        "qk_norm_by_head",
        "SUPRA's QK-norm normalises each head alone instead of all together",
        "supra/mixers/feature_maps.py",
        "layer_norm(x.to(gain.dtype), gain.shape, gain, eps=NORM_EPS)",
        "layer_norm(x.to(gain.dtype), gain.shape[-1:], eps=NORM_EPS) * gain",
        ("tests/mixers/test_supra.py::test_qk_norm_is_that_of_the_published_code",),
    ),
    Bug(
        "queries_and_keys_swapped",
        "a mixer gets the keys as queries and the queries as keys",
        "supra/model/attention.py",
        "query, key, value = (_tokens_first(x) for x in (query, key, value))",
        "query, key, value = (_tokens_first(x) for x in (query, key, value))\n"
        "    if query.shape == key.shape:\n"
        "        query, key = key, query",
        (f"{ORIGINAL}[gpt2]",),
    ),
    Bug(
        "heads_grouped_in_turn",
        "query head h reads key head h mod n, not h div the size of a group",
        SOFTMAX,
        "key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)",
        "key = key.repeat(1, query.shape[1] // key.shape[1], 1, 1)",
        (f"{ORIGINAL}[gemma2]",),
    ),
    Bug(
        "rotated_twice",
        "queries and keys are rotated by twice their angle",
        "supra/mixers/inputs.py",
        "        size = self.size\n        rotated = self.rotate(\n"
        "            query[..., :size], key[..., :size],",
        "        size = self.size\n        rotated = self.rotate(\n            *self.rotate("
        "query[..., :size], key[..., :size], self.cos, self.sin, unsqueeze_dim=2),",
        (f"{ORIGINAL}[llama]",),
    ),
    Bug(
        "window_of_one_token_more",
        "a sliding window holds one token too many",
        SOFTMAX,
        "place[:, -tokens:] - window + 1",
        "place[:, -tokens:] - window",
        ("tests/mixers/test_softmax.py::test_is_the_formula[4]",),
    ),
    Bug(
        "padding_mask_dropped",
        "padding is read as text",
        MODELING,
        "padding = padding_mask(attention_mask, batch, tokens, past)",
        "padding = None",
        (
            f"{MODEL}::test_a_left_padded_batch_is_its_rows_alone[pure-llama]",
            f"{MODEL}::test_padded_generation_is_generation_alone[pure-llama]",
        ),
    ),
    Bug(
        "padding_decays_the_state",
        "padded tokens write nothing, but the state decays there",
        RECURRENCE,
        "torch.where(_beside(inputs.padding_mask, log_decay), log_decay, 0.0)",
        "log_decay + torch.where(_beside(inputs.padding_mask, log_decay), 0.0, 0.0)",
        (f"{PADDING}[gated-grouped-inside-None]",),
    ),
    Bug(
        "padding_leaks_into_convolutions",
        "the short convolution mixes padding into the tokens beside it",
        "supra/mixers/short_conv.py",
        "    x = pick(x, order)\n",
        "    order = order.sort(dim=1).values\n",
        (
            f"{PADDING}[mamba2-grouped-inside-None]",
            "tests/mixers/test_mamba2.py::test_is_transformers_mamba2[1]",
        ),
    ),
    Bug(
        "documents_run_together",
        "packed documents read each other",
        MODELING,
        "return document_boundaries(position_ids, batch)",
        "return None",
        (f"{MODEL}::test_packed_rows_are_separate_documents[pure-llama]",),
    ),
    Bug(
        "documents_leak_in_kept_attention",
        "attention that a hybrid keeps looks beyond its document",
        SOFTMAX,
        "document[:, None, -tokens:, None] == document[:, None, None, :]",
        "document[:, None, -tokens:, None] >= 0",
        (f"{MODEL}::test_packed_rows_are_separate_documents[hybrid-llama]",),
    ),
    Bug(
        "past_forgotten_at_decode",
        "a decoding step begins with an empty state",
        CACHE,
        "output, self.state = mixer(inputs, self.state, return_state=True)",
        "before = None if inputs.query.shape[1] == 1 else self.state\n"
        "        output, self.state = mixer(inputs, before, return_state=True)",
        (f"{MODEL}::test_decoding_is_prefill[pure-llama]",),
    ),
    Bug(
        "state_in_half_precision",
        "the state is rounded to bfloat16 after every call",
        CACHE,
        "self.state, return_state=True)\n        self.is_initialized = True\n",
        "self.state, return_state=True)\n"
        "        self.map_state(lambda x: x.bfloat16().to(x.dtype))\n",
        (f"{MODEL}::test_decoding_is_prefill[pure-llama]",),
    ),
    Bug(
        "beams_not_reordered",
        "beam search goes on with the states of other beams",
        CACHE,
        "x.index_select(0, beam_idx.to(x.device))",
        "x",
        (f"{MODEL}::test_cached_generation_is_uncached[pure-llama-options1]",),
    ),
    Bug(
        "roll_back_does_nothing",
        "a cache that goes back keeps its state",
        CACHE,
        "while surplus > 0:",
        "while False:",
        (
            f"{STATES}::test_crop_forgets_the_last_tokens[pure-4]",
            f"{STATES}::test_assisted_decoding_is_greedy_decoding[pure-teacher]",
        ),
    ),
    Bug(
        "roll_back_one_token_short",
        "a cache that goes back keeps one token too many",
        CACHE,
        "call.inputs.first(call.tokens - surplus)",
        "call.inputs.first(call.tokens - surplus + 1)",
        (f"{STATES}::test_crop_forgets_the_last_tokens[pure-3]",),
    ),
    Bug(
        "states_repeated_in_turn",
        "a state that is copied for several answers is not beside its copies",
        CACHE,
        "x.repeat_interleave(repeats, dim=0)",
        "x.repeat(repeats, *[1] * (x.dim() - 1))",
        ("tests/model/test_states.py::test_copies_of_a_state_stand_beside_it",),
    ),
    Bug(
        "saved_state_rounded",
        "the file of a state holds bfloat16 numbers",
        "supra/model/states.py",
        "x.detach().contiguous()",
        "x.detach().bfloat16().to(x.dtype).contiguous()",
        ("tests/model/test_state_files.py::test_every_mixers_state_is_whole[supra]",),
    ),
    Bug(
        "policy_does_not_decay",
        "decay_scale of a state policy is ignored",
        RECURRENCE,
        "policy.scaled_log_decay(log_decay)",
        "log_decay",
        ("tests/mixers/test_policy.py::test_decay_scale_multiplies_every_decay",),
    ),
    Bug(
        "policy_removes_the_wrong_amount",
        "what leaves the window of a policy is taken out undecayed",
        "supra/mixers/bounded.py",
        "removed = removed * _beside_keys(left.exp()).to(wide)",
        "removed = removed * 1",
        ("tests/mixers/test_policy.py::test_a_window_is_the_last_tokens[supra-13]",),
    ),
]
