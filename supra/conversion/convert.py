"""Convert a pretrained transformer into a recurrent network.

    supra convert --model <hub id, folder or GGUF file> --out ./rnn

Tensors are copied one at a time, so the model need not fit into memory. The new folder appears
only when it is complete.
"""

import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from supra.checkpoint.card import write_card
from supra.checkpoint.checksums import checksum
from supra.checkpoint.config_rules import check_generation_config
from supra.checkpoint.conversion_report import ConversionReport
from supra.checkpoint.files import check_space, check_vacant, staged_folder
from supra.checkpoint.opening import Checkpoint, find_checkpoint
from supra.checkpoint.shard_writer import ShardWriter
from supra.checkpoint.untrusted import LICENSE_FILES, TOKENIZER_FILES, copy_data, drop_code
from supra.conversion.export_ready import check_ready, ready_mixer
from supra.conversion.layer_choice import choose_layers, evenly_spaced, read_blocks, read_share
from supra.conversion.plan import (
    Plan,
    check_family,
    check_positions,
    plan_conversion,
    plan_layers,
    short_name,
)
from supra.conversion.tensors import converted_tensors, load_converted
from supra.errors import UserError
from supra.mixers import DEFAULT_MIXER, MixerInputs, resolve_mixer
from supra.model.attention import attention_modules
from supra.model.remote_code import write_shim

SHARD_BYTES = 4e9


def convert(
    model: str | Path,
    out: str | Path,
    *,
    mixer: str | None = None,
    options: dict[str, Any] | None = None,
    export_ready: str | None = None,
    keep_attention: Iterable[int] | float | str = (),
    attention_positions: str = "rope",
    text: str | None = None,
    text_field: str = "text",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: float = SHARD_BYTES,
    revision: str | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Write the converted checkpoint of `model` into the folder `out`.

    Args:
        model: a causal language model: a hub id, a folder with safetensors, or a GGUF file.
        out: the new folder; it must be missing or empty.
        mixer: a name in MIXERS or PRESETS, for all layers except those in `keep_attention`. None is
            DEFAULT_MIXER, or with `export_ready` the mixer that it takes.
        options: options of that mixer; the others keep their defaults.
        export_ready: a target of `supra export`. The model is then converted so that it can be
            exported there; one that cannot is refused at once.
        keep_attention: indices of the layers that keep softmax attention; −1 is the last layer. A
            float is a share of the layers, evenly spaced. "auto:0.25" keeps attention in the
            quarter of the layers whose conversion costs most on `text`; "greedy:0.25" converts the
            layer that costs least and measures again, until a quarter is left. The whole model is
            then loaded into memory.
        attention_positions: "rope", or "none" to leave the rotation out of the layers that keep
            softmax attention. The recurrent layers then carry the positions, and the kept layers
            have no distances that they were not trained on (HALO, arXiv 2601.22156).
        text: the text to measure those costs on: a file, a folder, a glob or a hub data set.
        text_field: the field of a record that holds its text.
        dtype: dtype of the inherited tensors; None keeps each tensor's own. New parameters are
            float32.
        seed: seed of the random starting values.
        shard_bytes: maximum size of one safetensors file.
        revision: revision of the hub id.
        progress: show a progress bar.

    Raises UserError for a user's mistake, and then leaves no folder behind.
    """
    out = Path(out).expanduser()
    if export_ready is None:
        mixer, options = resolve_mixer(DEFAULT_MIXER if mixer is None else mixer, options)
    check_vacant(out)
    if not shard_bytes > 0:
        raise UserError(f"shard_bytes (={shard_bytes}) must be positive")
    check_seed(seed)
    share, rule = read_share(keep_attention, text)
    checkpoint = find_checkpoint(str(model), revision)
    base = _base_config(checkpoint)
    count = base.num_hidden_layers
    keep_attention = list(keep_attention) if share is None else evenly_spaced(count, share)
    keeps, kept = bool(keep_attention) or mixer == "softmax", {}
    if check_positions(attention_positions, base, keeps) == "none":
        kept = {"softmax": {"rotary": False}}
    if export_ready is not None:
        mixer, options = ready_mixer(base, export_ready, mixer, options, keep_attention, kept)
    layers = plan_layers(count, mixer, () if rule else keep_attention)
    chosen = {mixer: options} | kept
    if rule or checkpoint.gguf_file is not None:
        # reading the weights frees a parsed GGUF file, so its tokenizer is read first
        tokenizer = checkpoint.tokenizer()
    blocks = read_blocks(tokenizer, text, text_field) if rule else []
    reader = checkpoint.tensors(base)
    plan = plan_conversion(reader, base, layers, chosen, dtype)
    check_space(out, sum(fate.nbytes for fate in plan.fates))
    costs = []
    if rule:
        loaded = load_converted(plan, seed, progress)
        keep_attention, costs = choose_layers(rule, loaded, blocks, share, progress)
        del loaded
        layers = plan_layers(count, mixer, keep_attention)
        plan = plan_conversion(reader, base, layers, chosen, dtype)
        if export_ready is not None:
            check_ready(plan.config, export_ready)
    report = ConversionReport(
        teacher=checkpoint.public_name,
        family=base.model_type,
        layers=layers,
        options={name: chosen[name] for name in dict.fromkeys(layers) if name in chosen},
        command=command_line(checkpoint, out, layers, mixer, chosen, dtype, seed),
        layer_costs=costs,
        tensors=plan.fates,
    )
    with staged_folder(out) as staging:
        # the tokenizer first, so that a broken one is found at once
        copied = (*TOKENIZER_FILES, "generation_config.json", *LICENSE_FILES)
        copy_tokenizer(checkpoint, base, staging, copied)
        write_tensors(staging, plan, report, seed, "convert" if progress else None, shard_bytes)
        write_small_files(staging, checkpoint, plan, report)
    return report


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that torch does not take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed (={seed}) must be from 0 to 2**63 - 1")


def _base_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The original model's config. Raises UserError when the model cannot be converted."""
    base = checkpoint.config()
    with checkpoint.named():
        check_generation_config(checkpoint.folder)
    check_family(base)
    return base


def command_line(
    checkpoint: Checkpoint,
    out: Path,
    layers: list[str],
    mixer: str,
    options: dict[str, dict[str, Any]],
    dtype: torch.dtype | None,
    seed: int,
) -> str:
    """The command that repeats the conversion. It names every option, but only the last part of
    each path."""
    words = ["supra", "convert", "--model", checkpoint.public_name]
    if checkpoint.revision is not None:
        words += ["--revision", checkpoint.revision]
    kept = [layer for layer, name in enumerate(layers) if name != mixer]
    words += ["--out", f"./{out.name}", *mixer_words(mixer, options[mixer], kept)]
    if kept and "softmax" in options:
        words += ["--attention-positions", "none"]
    if dtype is not None:
        words += ["--dtype", short_name(dtype)]
    return shlex.join([*words, "--seed", str(seed)])


def mixer_words(mixer: str, options: dict[str, Any], kept: list[int]) -> list[str]:
    """The part of a command line that names the mixer, its options, and the layers that keep
    attention."""
    words = ["--mixer", mixer]
    for name, value in options.items():
        words += ["--mixer-option", f"{name}={str(value).lower()}"]
    return [*words, "--keep-attention", ",".join(map(str, kept))] if kept else words


def write_tensors(
    folder: Path,
    plan: Plan,
    report: ConversionReport,
    seed: int,
    bar: str | None,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Write the tensors of the plan, and their checksums into the report.

    bar: the label of the progress bar; None shows no bar.
    """
    writer = ShardWriter(folder, plan.written, shard_bytes)
    with ThreadPoolExecutor(1) as beside:  # a checksum takes as long as the system takes to write
        for name, tensor in converted_tensors(plan, seed, bar):
            found = beside.submit(checksum, tensor)
            writer.add(name, tensor)
            report.checksums[name] = found.result()
    writer.finish()


def carried_bytes(student: PreTrainedModel, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one sequence's state with weights of `dtype`: a constant part, and the growth per
    token.

    Only the mixers run, on the meta device: once on one token and once on two.
    """
    sizes = [0, 0]
    for attention in attention_modules(student):
        mixer, shape = attention.mixer, attention.mixer.shape
        for index in (0, 1):
            heads = {
                "query": (shape.query_heads, shape.head_size),
                "key": (shape.key_heads, shape.head_size),
                "value": (shape.key_heads, shape.value_size),
                "hidden_states": (shape.hidden_size,),
            }
            tensors = {
                name: torch.empty(1, index + 1, *size, dtype=dtype, device="meta")
                for name, size in heads.items()
            }
            others = ("sliding_window", "softcap", "sinks", "padding_mask", "cu_seqlens", "rotary")
            inputs = MixerInputs(**tensors, **dict.fromkeys(others), scaling=1.0)
            _, state = mixer(inputs, return_state=True)
            sizes[index] += sum(x.nbytes for x in state if x is not None)
    one, two = sizes
    return 2 * one - two, two - one


def write_small_files(
    folder: Path, checkpoint: Checkpoint, plan: Plan, report: ConversionReport
) -> None:
    """Write the report, the model card, the loading code and the config."""
    write_shim(folder)
    report.write(folder)
    write_card(
        folder,
        report,
        teacher_folder=checkpoint.folder,
        hub_id=checkpoint.hub_id,
        state=carried_bytes(plan.student, plan.config.dtype),
    )
    plan.config.save_pretrained(folder)  # last, because a folder without it does not load


def copy_tokenizer(
    checkpoint: Checkpoint, base: PreTrainedConfig, folder: Path, files: Iterable[str]
) -> None:
    """Copy the tokenizer and the files of these patterns, but no code. A GGUF file has a tokenizer
    only. `base` is the config of the model that it is for."""
    if checkpoint.gguf_file is not None:
        checkpoint.tokenizer().save_pretrained(folder)
        drop_code(folder)
        return
    for line in copy_data(checkpoint.folder, folder, files):
        tqdm.write(line)
    if any(folder.glob("tokenizer*")):
        Checkpoint(checkpoint.name, folder).tokenizer(config=base)  # raises if it does not load
    else:
        tqdm.write(f"{checkpoint.name} has no tokenizer: the new model has none either")
