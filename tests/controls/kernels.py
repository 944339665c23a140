"""Bugs in every operation of supra.kernels: forward, backward, initial state, documents.

They alternate between torch's path and Triton's.
"""

from tests.controls.bug import Bug

TESTS = "tests/kernels/test_{}.py::test_{}"

LINEAR_ATTENTION = [
    Bug(
        "linear_attention_state_undecayed",
        "Triton: a chunk reads the state before it without the decay up to its tokens",
        "kernels/linear_attention/triton_forward.py",
        "acc *= entering[:, None]",
        "acc *= 1.0",
        (TESTS.format("linear_attention_triton", "decays[None--0.1]"),),
    ),
    Bug(
        "linear_attention_keys_undecayed",
        "Triton: the gradient of a key leaves out the decay to the end of its chunk",
        "kernels/linear_attention/triton_backward.py",
        "acc *= leaving_decay(own, last_pair(sums_s, left, CHUNK))[:, None]",
        "acc *= 1.0",
        (TESTS.format("linear_attention_triton", "decays[None--0.1]"),),
    ),
    Bug(
        "linear_attention_starts_empty",
        "Triton: the state that is given is ignored",
        "kernels/linear_attention/triton_forward.py",
        "acc = tiles.load_state(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)",
        "acc *= 0.0",
        (TESTS.format("linear_attention_triton", "forms[None-sum-dtype0]"),),
    ),
    Bug(
        "linear_attention_reads_another_document",
        "Triton: a document reads the states of the document before it",
        "kernels/linear_attention/triton_forward.py",
        "locate.slot_offset(chunk + n, state_head",
        "locate.slot_offset(chunk, state_head",
        (TESTS.format("linear_attention_triton", "packed_rows[None-None]"),),
    ),
    Bug(
        "linear_attention_decay_gradient_shifted",
        "torch: the gradient of a decay leaves out what the chunk hands on",
        "kernels/linear_attention/torch.py",
        "d_sums[:, -1] += last",
        "d_sums[:, -1] += 0 * last",
        (TESTS.format("linear_attention", "gradients_agree_with_the_reference"),),
    ),
]
GATED_LINEAR_ATTENTION = [
    Bug(
        "gated_linear_attention_half_undecayed",
        "torch: the later half of a block of tokens is not decayed to its boundary",
        "kernels/channel_tiles.py",
        "_decay(level.later, level.row_decay)",
        "pass",
        (TESTS.format("gated_linear_attention", "all_forms_agree_with_the_reference"),),
    ),
    Bug(
        "gated_linear_attention_own_key",
        "torch: the gradient of a key leaves out what its own token reads",
        "kernels/channel_tiles.py",
        "d_key += (d_own * self.query).sum(2)",
        "d_key += 0 * (d_own * self.query).sum(2)",
        (TESTS.format("gated_linear_attention", "gradients_agree_with_the_reference"),),
    ),
    Bug(
        "gated_linear_attention_starts_empty",
        "torch: the state that is given is ignored",
        "kernels/gated_linear_attention/torch.py",
        "self._scan(torch.bmm(self.leaving.mT, self.value), state)",
        "self._scan(torch.bmm(self.leaving.mT, self.value), torch.zeros_like(state))",
        (TESTS.format("gated_linear_attention", "two_segments_with_carried_state_are_one_run"),),
    ),
    Bug(
        "gated_linear_attention_decay_gradient",
        "Triton: the gradient of a decay leaves out what a chunk hands on",
        "kernels/channel_gradients.py",
        "tl.float32) + carried[None, :]",
        "tl.float32) + 0 * carried[None, :]",
        (
            TESTS.format(
                "gated_linear_attention_triton",
                "chunks_agree_with_the_reference[gla-dtype0-shape0]",
            ),
        ),
    ),
    Bug(
        "gated_linear_attention_reads_another_document",
        "Triton: the gradient of a query is that of another document's state",
        "kernels/channel_gradients.py",
        "locate.slot_offset(chunk + n, kv_head",
        "locate.slot_offset(chunk, kv_head",
        (
            TESTS.format(
                "gated_linear_attention_triton", "packed_sequences_resets_and_strong_decay[gla]"
            ),
        ),
    ),
]
GATED_DELTA_RULE = [
    Bug(
        "gated_delta_rule_adds",
        "torch: a chunk does not take out what the state holds under its keys",
        "kernels/delta.py",
        "error.baddbmm_(read, now, alpha=-1)",
        "error.baddbmm_(read, now, alpha=0)",
        (TESTS.format("gated_delta_rule", "all_forms_agree_with_the_reference"),),
    ),
    Bug(
        "gated_delta_rule_beta_gradient",
        "torch: the gradient of beta leaves out the tokens that follow in the chunk",
        "kernels/gated_delta_rule/torch.py",
        "d_beta += d_left - (products * self.overlap).sum(-2)",
        "d_beta += d_left",
        (TESTS.format("gated_delta_rule", "gradients_agree_with_the_reference"),),
    ),
    Bug(
        "gated_delta_rule_states_in_another_order",
        "torch: documents begin with each other's states",
        "kernels/chunks.py",
        "states[self.order].flatten(0, 1)",
        "states[self.order].flip(0).flatten(0, 1)",
        (TESTS.format("gated_delta_rule", "packed_sequences_are_the_same_as_separate_ones"),),
    ),
    Bug(
        "gated_delta_rule_starts_empty",
        "Triton: the state that is given is ignored",
        "kernels/delta_forward.py",
        "s = delta_state.load(base, columns_k, columns_v, KEY_WIDTH, VALUE_WIDTH)",
        "s = delta_state.zeros(BLOCK_K, BLOCK_V)",
        (TESTS.format("gated_delta_rule_triton", "forms[None-dtype0]"),),
    ),
    Bug(
        "gated_delta_rule_wrong_inverse",
        "Triton: the inverse of a chunk has the corners of one size with the wrong sign",
        "kernels/delta_forward.py",
        "tiles.dot(-found, product, found, SOLVE)",
        "tiles.dot(found, product, found, SOLVE)",
        (TESTS.format("gated_delta_rule_triton", "lengths[64-2]"),),
    ),
]
KDA = [
    Bug(
        "kda_reads_its_own_token",
        "torch: the gradient of a key has a part for what its own token writes",
        "kernels/kda/torch.py",
        "self.own(d_scores)[..., -1] = 0",
        "self.own(d_scores)",
        (TESTS.format("kda", "gradients_agree_with_the_reference"),),
    ),
    Bug(
        "kda_decays_after_writing",
        "torch: a step reads the state before it decays",
        "kernels/delta.py",
        "error = torch.baddbmm(value, key, memory, alpha=-1)",
        "error = torch.baddbmm(value, key, memory / decay, alpha=-1)",
        (TESTS.format("kda", "two_tokens_by_hand"),),
    ),
    Bug(
        "kda_state_undecayed",
        "Triton: a state goes through a chunk without its decay",
        "kernels/delta_forward.py",
        "s = delta_state.scale_channels(s, whole_at, columns_k, KEY_WIDTH)",
        "s = delta_state.scale(s, 1.0, columns_k, KEY_WIDTH)",
        (TESTS.format("kda_triton", "lengths[130-1]"),),
    ),
    Bug(
        "kda_keys_read_without_gradient",
        "Triton: a key gets no gradient for what it reads of the keys before it",
        "kernels/channel_gradients.py",
        "acc += tiles.load(d_reading + place",
        "acc += 0 * tiles.load(d_reading + place",
        (TESTS.format("kda_triton", "forms[dtype0]"),),
    ),
    Bug(
        "kda_reads_another_document",
        "Triton: a chunk takes the gradient of its decay from the state of another document",
        "kernels/kda/triton_kernels.py",
        "locate.slot_offset(chunk + n, head",
        "locate.slot_offset(chunk, head",
        (TESTS.format("kda_triton", "packed_sequences_resets_and_strong_decay"),),
    ),
]
NONLINEAR_GATED = [
    Bug(
        "nonlinear_gated_gate_swapped",
        "torch: the gate keeps what it should write",
        "kernels/nonlinear_gated/torch.py",
        "torch.lerp(state, new, write, out=after)",
        "torch.lerp(new, state.clone(), write, out=after)",
        (TESTS.format("nonlinear_gated", "all_forms_agree_with_the_reference"),),
    ),
    Bug(
        "nonlinear_gated_weight_gradient",
        "torch: the gradient of the weight is made of the states after the tokens",
        "kernels/nonlinear_gated/torch.py",
        "total.addcmul_(bent, before)",
        "total.addcmul_(bent, after)",
        (TESTS.format("nonlinear_gated", "gradients_agree_with_the_reference"),),
    ),
    Bug(
        "nonlinear_gated_starts_empty",
        "torch: the state that is given is ignored",
        "kernels/nonlinear_gated/torch.py",
        "memory, slots = checks.given_or_zeros(x.state, x)",
        "memory, slots = checks.given_or_zeros(None, x)",
        (TESTS.format("nonlinear_gated", "two_segments_with_carried_state_are_one_run"),),
    ),
    Bug(
        "nonlinear_gated_slope_of_a_line",
        "Triton: the backward scan leaves out the slope of the tanh",
        "kernels/nonlinear_gated/triton_backward.py",
        "slope = keep + bent * weight",
        "slope = keep + 0 * bent * weight",
        (
            TESTS.format(
                "nonlinear_gated_triton",
                "chunks_agree_with_the_reference[0.9-dtype0-shape0-None-sm_90]",
            ),
        ),
    ),
    Bug(
        "nonlinear_gated_carries_between_documents",
        "Triton: every document is read with the chunks of the first one",
        "kernels/nonlinear_gated/triton_forward.py",
        "states += locate.slot_offset(chunk, head",
        "states += locate.slot_offset(chunk * 0, head",
        (TESTS.format("nonlinear_gated_triton", "packed_sequences_resets_and_slow_gates"),),
    ),
]
CAUSAL_CONV = [
    Bug(
        "causal_conv_last_tap_missing",
        "Triton: a convolution sums over one tap too few",
        "kernels/causal_conv/triton_kernels.py",
        "    for j in range(1, TAPS):\n        x = load_window(input",
        "    for j in range(1, TAPS - 1):\n        x = load_window(input",
        (
            TESTS.format(
                "causal_conv_triton",
                "results_and_gradients_agree_with_the_reference[silu-torch.float32]",
            ),
        ),
    ),
    Bug(
        "causal_conv_silu_gradient",
        "Triton: the gradient of silu is its gate alone",
        "kernels/causal_conv/triton_kernels.py",
        "d *= gate * (1 + total * (1 - gate))",
        "d *= gate",
        (
            TESTS.format(
                "causal_conv_triton",
                "results_and_gradients_agree_with_the_reference[silu-torch.float32]",
            ),
        ),
    ),
    Bug(
        "causal_conv_starts_empty",
        "Triton: the state that is given is ignored",
        "kernels/causal_conv/triton_kernels.py",
        "x = tl.where((rows < TAPS - 1)[:, None], before, x)",
        "x += 0 * before",
        (
            TESTS.format(
                "causal_conv_triton",
                "results_and_gradients_agree_with_the_reference[silu-torch.float32]",
            ),
        ),
    ),
    Bug(
        "causal_conv_leaks_between_documents",
        "torch: the first tokens of a document see the end of the one before",
        "kernels/causal_conv/torch.py",
        "end[group.states] = window[:, stop - begin :]",
        "end[:] = window[:, stop - begin :]",
        (TESTS.format("causal_conv", "packed_sequences_are_the_same_as_separate_ones"),),
    ),
    Bug(
        "causal_conv_end_without_gradient",
        "torch: the gradient of the final state does not reach the tokens",
        "kernels/causal_conv/torch.py",
        "d_past = d_state[group.states]",
        "d_past = 0 * d_state[group.states]",
        (TESTS.format("causal_conv", "results_and_gradients_agree_with_the_reference"),),
    ),
]
LONG_CONV = [
    Bug(
        "long_conv_chunks_apart",
        "torch: a chunk does not read the state before it",
        "kernels/long_conv/torch_blocks.py",
        "found.baddbmm_(self._real(states), self.filter.read)",
        "found",
        (TESTS.format("long_conv", "all_forms_agree_with_the_reference[widths0-130]"),),
    ),
    Bug(
        "long_conv_gradient_turns_forward",
        "torch: gradients go back through the modes and not through their conjugates",
        "kernels/long_conv/torch_blocks.py",
        "filter.whole.conj_physical()",
        "filter.whole",
        (TESTS.format("long_conv", "gradients_agree_with_the_reference"),),
    ),
    Bug(
        "long_conv_starts_empty",
        "Triton: the state that is given does not reach the second chunk",
        "kernels/long_conv/triton_forward.py",
        "step = multiply_add(power, z, step)",
        "step = multiply_add((0 * power[0], 0 * power[1]), z, step)",
        (TESTS.format("long_conv_triton", "chunks_agree_with_the_reference[dtype0-shape0]"),),
    ),
    Bug(
        "long_conv_reads_another_document",
        "Triton: every document begins with the state of the first one",
        "kernels/long_conv/triton_forward.py",
        "states + (chunks + n) * MODES",
        "states + chunks * MODES",
        (TESTS.format("long_conv_triton", "packed_sequences[widths0]"),),
    ),
]

BUGS = [
    *LINEAR_ATTENTION, *GATED_LINEAR_ATTENTION, *GATED_DELTA_RULE, *KDA,
    *NONLINEAR_GATED, *CAUSAL_CONV, *LONG_CONV,
]  # fmt: skip
