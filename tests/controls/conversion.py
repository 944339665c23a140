"""Bugs in conversion, in calibration and in the files of a checkpoint."""

from tests.controls.bug import Bug

TENSORS = "supra/conversion/tensors.py"
CONVERT, CALIBRATE = "tests/conversion/test_convert.py", "tests/conversion/test_calibrate.py"
UNTRAINED = "tests/conversion/test_untrained.py"
LAYERS = "tests/conversion/test_layer_choice.py"
LOADED = "plan.reader.load(fate.name)"

BUGS = [
    Bug(
        "untrained_mixers_start_near_a_teacher",
        "an untrained model gets the options of a converted one",
        "supra/conversion/untrained.py",
        "{**MIXERS[name].from_scratch, **(options or {})}",
        "dict(options or {})",
        (f"{UNTRAINED}::test_options_are_the_users_then_the_published_ones",),
    ),
    Bug(
        "untrained_weights_from_the_clock",
        "the seed does not decide the weights of an untrained model",
        "supra/conversion/untrained.py",
        "torch.manual_seed(seed)",
        "torch.seed()",
        (f"{UNTRAINED}::test_seeds_and_dtypes",),
    ),
    Bug(
        "square_tensors_transposed",
        "inherited square matrices are transposed",
        TENSORS,
        LOADED,
        "(lambda x: x.mT if x.ndim == 2 and x.shape[0] == x.shape[1] else x)"
        "(plan.reader.load(fate.name))",
        (f"{CONVERT}::test_every_tensor_is_accounted_for[llama]",),
    ),
    Bug(
        "keys_and_values_swapped",
        "the projection of the keys gets the weights of the values",
        TENSORS,
        LOADED,
        'plan.reader.load(fate.name.replace("k_proj", "v_proj")).clone()',
        (f"{CONVERT}::test_every_tensor_is_accounted_for[llama]",),
    ),
    Bug(
        "biases_dropped",
        "inherited biases become zero",
        TENSORS,
        LOADED,
        f'{LOADED} * (not fate.name.endswith(".bias"))',
        (f"{CONVERT}::test_every_tensor_is_accounted_for[qwen2]",),
    ),
    Bug(
        "weights_rounded_to_16_bits",
        "inherited tensors pass through bfloat16",
        TENSORS,
        "cast = tensor.to(",
        "cast = tensor.bfloat16().to(",
        (f"{CONVERT}::test_every_tensor_is_accounted_for[llama]",),
    ),
    Bug(
        "cheapest_layers_keep_attention",
        "auto keeps attention in the layers whose conversion costs least",
        "supra/conversion/layer_choice.py",
        "key=costs.__getitem__, reverse=True",
        "key=costs.__getitem__, reverse=False",
        (f"{LAYERS}::test_the_costliest_in_order",),
    ),
    Bug(
        "costs_measured_on_calibration_text",
        "the cost of a layer is measured on the text that calibrated it",
        "supra/conversion/layer_choice.py",
        "divergences(model, blocks[half:]",
        "divergences(model, blocks[:half]",
        (f"{LAYERS}::test_the_first_half_calibrates_and_the_second_measures",),
    ),
    Bug(
        "scale_of_another_regression",
        "the scale of a head is that of a regression of outputs on targets",
        "supra/mixers/channel_scales.py",
        "[(x * y).sum(0) for y in parts]",
        "[(target * target).sum(0) for y in parts]",
        (f"{CALIBRATE}::test_scale_is_the_least_squares_solution",),
    ),
    Bug(
        "decays_chosen_without_scales",
        "the candidates of a calibration are judged without their scales",
        "supra/mixers/base.py",
        "(target - (scale * blocks).sum(2))",
        "(target - blocks.sum(2))",
        (
            "tests/mixers/test_gated_delta.py::test_calibration_finds_the_sharpness_that_made_the_target",
        ),
    ),
    Bug(
        "projections_fitted_transposed",
        "the change of an output projection is added transposed",
        "supra/conversion/calibrate.py",
        "change.mT, error",
        "change, error",
        (f"{CALIBRATE}::test_projections_come_closer_still[gated]",),
    ),
    Bug(
        "kept_attention_without_positions_is_taken_for_the_teacher",
        "layers learn from a teacher whose kept layers have lost their positions",
        "supra/model/original.py",
        'mixer.name == "softmax" and mixer.rotates',
        'mixer.name == "softmax"',
        (
            "tests/conversion/test_convert.py::"
            "test_the_teacher_inside_has_positions_where_kept_attention_has_none",
        ),
    ),
    Bug(
        "granite_gate_after_the_norm",
        "mamba2 normalises before the gate, as other layers do",
        "supra/mixers/mamba2.py",
        "gate_first = True",
        "gate_first = False",
        ("tests/mixers/test_granite.py::test_is_transformers_granite_layer[odd-False]",),
    ),
    Bug(
        "window_rotates_its_linear_part",
        "rotary=false of window leaves the linear part rotated",
        "supra/mixers/window.py",
        "x[..., -self.shape.head_size :]",
        "x[..., : self.shape.head_size]",
        (
            "tests/mixers/test_window.py::"
            "test_without_rotary_the_window_is_rotated_and_the_linear_part_is_not",
        ),
    ),
    Bug(
        "ridge_without_a_scale",
        "the ridge penalty does not grow with the inputs",
        "supra/mixers/ridge.py",
        "ridge * square.diagonal().mean().clamp(min=1e-30)",
        "ridge",
        ("tests/mixers/test_ridge.py::test_ridge_regression_solves_its_equation",),
    ),
    Bug(
        "checksums_not_compared",
        "supra inspect --verify looks at the names of tensors alone",
        "supra/checkpoint/checksums.py",
        "found.get(name) != expected[name]",
        "name not in found",
        ("tests/checkpoint/test_checksums.py::test_a_flipped_bit_is_found",),
    ),
    Bug(
        "index_lists_the_last_shard",
        "the index of the shards names the tensors of the last one alone",
        "supra/checkpoint/shard_writer.py",
        "(file, _) in self._places.items()}",
        "(file, _) in self._places.items() if file == max(files)}",
        (f"{CONVERT}::test_shards_and_index",),
    ),
    Bug(
        "damaged_checkpoints_go_on",
        "a run goes on from a checkpoint whose files have other checksums",
        "supra/uptrain/manifest.py",
        "_crc32(folder / name) != crc32",
        "_crc32(folder / name) != crc32 and False",
        (
            "tests/uptrain/test_resume.py::test_a_damaged_file_of_a_checkpoint[model.safetensors-flipped]",
        ),
    ),
]
