"""Convert a pretrained transformer into a recurrent network: plan, stream, write, account.

    supra convert --model <hub id, folder or GGUF file> --out ./rnn

Tensors pass one at a time from the old checkpoint to the new; the folder appears when it is whole.
"""

import copy
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from supra.checkpoint.card import write_card
from supra.checkpoint.checksums import checksum
from supra.checkpoint.config_rules import check_generation_config, meta_model
from supra.checkpoint.conversion_report import ConversionReport, TensorFate
from supra.checkpoint.files import check_space, check_vacant, staged_folder
from supra.checkpoint.opening import Checkpoint, find_checkpoint
from supra.checkpoint.untrusted import LICENSE_FILES, TOKENIZER_FILES, copy_data, drop_code
from supra.checkpoint.weights import (
    FolderReader,
    ModuleReader,
    ShardWriter,
    TensorSpec,
    check_fits,
    model_names,
    tied_names,
)
from supra.conversion.layer_choice import (
    dearest,
    evenly_spaced,
    layer_costs,
    read_blocks,
    read_share,
)
from supra.errors import UserError
from supra.mixers import NEW_PARAMETERS, MixerInputs, float32_at_least, resolve_mixer
from supra.model.attention import attention_modules
from supra.model.auto import converted_config
from supra.model.families import FAMILIES, refusal
from supra.model.remote_code import write_shim


def convert(
    model: str | Path,
    out: str | Path,
    *,
    mixer: str = "supra",
    options: dict[str, Any] | None = None,
    keep_attention: Iterable[int] | float | str = (),
    text: str | None = None,
    text_field: str = "text",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: float = 4e9,
    revision: str | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Write the converted checkpoint of `model` into the folder `out`.

    Args:
        model: hub id, folder with safetensors, or GGUF file of a causal language model.
        mixer: a name of MIXERS or PRESETS, for all layers but those in `keep_attention`.
        options: options of that mixer; what is left out takes its default.
        keep_attention: numbers of the layers that keep softmax attention; −1 is the last. A float
            is a share of the layers, evenly spaced. "auto:0.25" is the share whose conversion
            costs most on `text`; then the model is loaded whole.
        text: file, folder, glob or name on the hub of the text that costs are measured on.
        text_field: of a record of that text.
        dtype: of the inherited tensors; None keeps theirs. New parameters are float32.
        seed: of random starting values.
        shard_bytes: size of one safetensors file at the most.
        revision: of a hub id.
        progress: show a bar.

    Raises UserError, and leaves no folder, for anything that a user can get wrong.
    """
    out = Path(out).expanduser()
    mixer, options = resolve_mixer(mixer, options)
    check_vacant(out)
    if not shard_bytes > 0:
        raise UserError(f"shard_bytes (={shard_bytes}) must be positive")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed (={seed}) must be from 0 to 2**63 - 1")
    share, ranked = read_share(keep_attention, text)
    checkpoint = find_checkpoint(str(model), revision)
    base = checkpoint.config()
    with checkpoint.named():
        check_generation_config(checkpoint.folder)
    check_family(base)
    count = base.num_hidden_layers
    if share is not None:
        keep_attention = () if ranked else evenly_spaced(count, share)
    layers = plan_layers(count, mixer, keep_attention)
    if ranked or checkpoint.gguf_file is not None:
        # a GGUF file's tokenizer is read before the weights, which free the parsed file
        tokenizer = checkpoint.tokenizer()
    blocks = read_blocks(tokenizer, text, text_field) if ranked else []
    reader = open_weights(checkpoint, base)
    plan = plan_conversion(reader, base, layers, {mixer: options}, dtype)
    check_space(out, sum(fate.nbytes for fate in plan.fates))
    costs = []
    if ranked:
        costs = layer_costs(load_converted(plan, seed, progress), blocks, progress)
        layers = plan_layers(count, mixer, dearest(costs, share))
        plan = plan_conversion(reader, base, layers, {mixer: options}, dtype)
    report = ConversionReport(
        teacher=public_name(checkpoint),
        family=base.model_type,
        layers=layers,
        options={name: options for name in dict.fromkeys(layers) if name == mixer},
        command=command_line(checkpoint, out, layers, mixer, options, dtype, seed),
        layer_costs=costs,
        tensors=plan.fates,
    )
    with staged_folder(out) as staging:
        copy_tokenizer(checkpoint, base, staging)  # first, so that a broken one is found at once
        writer = ShardWriter(staging, shard_bytes)
        for name, tensor in converted_tensors(plan, seed, "convert" if progress else None):
            report.checksums[name] = checksum(tensor)
            writer.add(name, tensor)
        writer.finish()
        write_small_files(staging, checkpoint, plan, report)
    return report


class Plan(NamedTuple):
    """A conversion before any tensor is read."""

    reader: FolderReader | ModuleReader
    config: PreTrainedConfig
    student: PreTrainedModel  # without memory
    fates: list[TensorFate]


def plan_conversion(
    reader: FolderReader | ModuleReader,
    base: PreTrainedConfig,
    layers: list[str],
    options: dict[str, dict[str, Any]],
    dtype: torch.dtype | None,
) -> Plan:
    """The plan for these mixers, one a layer. Raises UserError as `plan_tensors` does."""
    config = converted_config(base, layers, options)
    student = meta_model(config)
    fates = plan_tensors(reader, student, dtype)
    config.dtype = dtype or main_dtype(reader.specs)
    return Plan(reader, config, student, fates)


def check_family(config: PreTrainedConfig) -> None:
    """Raise UserError unless the config is of a family that converts."""
    if config.model_type == "supra":
        raise UserError("the model is a converted one already: convert its teacher instead")
    if config.model_type not in FAMILIES:
        raise UserError(refusal(config.model_type))
    if getattr(config, "quantization_config", None) is not None and not is_gguf(config):
        raise UserError("quantised checkpoints do not convert: take the original weights")


def is_gguf(config: PreTrainedConfig) -> bool:
    """Whether the config came with a GGUF file, whose blocks are unpacked on the way."""
    method = getattr(config.quantization_config, "quant_method", None)
    return "gguf" in str(method).lower()


def plan_layers(count: int, mixer: str, keep_attention: Iterable[int]) -> list[str]:
    """The mixer of each of `count` layers."""
    layers = [mixer] * count
    for layer in keep_attention:
        if not -count <= layer < count:
            raise UserError(
                f"keep_attention names layer {layer}: the model has layers 0 to {count - 1}"
            )
        layers[layer] = "softmax"
    return layers


def public_name(checkpoint: Checkpoint) -> str:
    """The hub id, or of a path the last part alone, since what names it may be published."""
    return checkpoint.hub_id or Path(os.path.abspath(checkpoint.name)).name


def command_line(
    checkpoint: Checkpoint,
    out: Path,
    layers: list[str],
    mixer: str,
    options: dict[str, Any],
    dtype: torch.dtype | None,
    seed: int,
) -> str:
    """The command of a conversion, every option spelt out; of paths the last part alone."""
    words = ["supra", "convert", "--model", public_name(checkpoint)]
    if checkpoint.revision is not None:
        words += ["--revision", checkpoint.revision]
    words += ["--out", f"./{out.name}", "--mixer", mixer]
    for name, value in options.items():
        words += ["--mixer-option", f"{name}={str(value).lower()}"]
    if kept := [str(n) for n, name in enumerate(layers) if name != mixer]:
        words += ["--keep-attention", ",".join(kept)]
    if dtype is not None:
        words += ["--dtype", _short(dtype)]
    return shlex.join([*words, "--seed", str(seed)])


def open_weights(checkpoint: Checkpoint, config: PreTrainedConfig) -> FolderReader | ModuleReader:
    """A reader whose names are the model's. Files may carry older names, as GPT-NeoX's head does,
    or parts that transformers fuses; then the model is loaded whole."""
    if checkpoint.gguf_file is not None:
        return ModuleReader(checkpoint.model())
    checkpoint.fetch_weights()
    reader = FolderReader(checkpoint.folder)
    names, fused = model_names(meta_model(config), reader.specs)
    if fused:
        return ModuleReader(checkpoint.model())
    reader.rename(names)
    return reader


def main_dtype(specs: dict[str, TensorSpec]) -> torch.dtype:
    """The dtype of most of the values."""
    sizes: dict[torch.dtype, int] = {}
    for spec in specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=sizes.__getitem__)


def plan_tensors(
    reader: FolderReader | ModuleReader, student: PreTrainedModel, dtype: torch.dtype | None
) -> list[TensorFate]:
    """What becomes of every tensor: the old checkpoint's and the new ones.

    Raises UserError when one is missing or has another shape than its config says.
    """
    wanted = student.state_dict()
    tied = tied_names(student)
    float32 = student._keep_in_fp32_modules_strict  # parts of names, such as a router's bias
    fates = {}
    for name, spec in reader.specs.items():
        fate, note, kept = "copied", "", spec.dtype
        if name in wanted and name not in tied:
            check_fits(name, spec, wanted[name])
        if name not in wanted:
            fate, note = "dropped", "no parameter of the model"
        elif name in tied:
            if not torch.equal(reader.load(name), reader.load(tied[name])):
                raise UserError(
                    f"{name} differs from {tied[name]}, to which the config ties it: "
                    "set tie_word_embeddings to false in its config.json"
                )
            fate, note = "dropped", f"tied to {tied[name]}"
        elif (
            dtype not in (None, spec.dtype)
            and spec.dtype.is_floating_point
            and not any(part in name for part in float32)
        ):
            fate, note, kept = "transformed", f"cast from {_short(spec.dtype)}", dtype
        elif name != reader.sources[name]:
            fate, note = "transformed", f"renamed from {reader.sources[name]}"
        fates[name] = TensorFate(name, fate, spec.shape, _short(kept), note)
    known = {*fates, *tied}
    missing = [name for name in wanted if name not in known and NEW_PARAMETERS not in name]
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing from the checkpoint, first {missing[0]}: the "
            "download is incomplete, or weights and config do not belong together"
        )
    for name, tensor in wanted.items():
        if NEW_PARAMETERS in name:
            fates[name] = TensorFate(name, "new", tuple(tensor.shape), "float32")
    return list(fates.values())


def converted_tensors(plan: Plan, seed: int, bar: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the converted model, one at a time; `bar` is the progress bar's name."""
    inherited = [x for x in plan.fates if x.fate in ("copied", "transformed")]
    for fate in tqdm(inherited, desc=bar, unit="tensor", disable=bar is None):
        yield fate.name, _finite(fate, plan.reader.load(fate.name))
    yield from new_tensors(plan.student, seed)


def _finite(fate: TensorFate, tensor: Tensor) -> Tensor:
    """The tensor in its new dtype. Raises UserError if it holds NaN or infinity."""
    cast = tensor.to(getattr(torch, fate.dtype))
    if not cast.isfinite().all():
        if tensor.isfinite().all():
            raise UserError(
                f"tensor {fate.name} overflows in dtype {fate.dtype}: take bfloat16 or float32"
            )
        raise UserError(
            f"tensor {fate.name} holds NaN or infinity, so the model cannot predict anything: take "
            "another copy of its weights"
        )
    return cast


def load_converted(plan: Plan, seed: int, progress: bool) -> PreTrainedModel:
    """The converted model in memory, as it would be loaded from the folder."""
    return type(plan.student).from_pretrained(
        None,
        config=plan.config,
        dtype=plan.config.dtype,
        state_dict=dict(converted_tensors(plan, seed, "load" if progress else None)),
    )


def new_tensors(student: PreTrainedModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The starting values of every mixer, under their names in the checkpoint."""
    names = {module: name for name, module in student.named_modules()}
    for attention in attention_modules(student):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + attention.layer_idx)
            mixer = copy.deepcopy(attention.mixer).float().to_empty(device="cpu")
            with float32_at_least():
                mixer.reset_parameters()
        path = f"{names[attention]}.mixer"
        yield from ((f"{path}.{name}", x) for name, x in mixer.state_dict().items())


def carried_bytes(student: PreTrainedModel, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one sequence's state under weights of `dtype`: for good, and for every token more.

    The mixers alone run, without memory, on one token and on two.
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
    """All but the tensors and the tokenizer."""
    write_shim(folder)
    report.write(folder)
    write_card(
        folder,
        report,
        teacher_folder=checkpoint.folder,
        hub_id=checkpoint.hub_id,
        state=carried_bytes(plan.student, plan.config.dtype),
    )
    plan.config.save_pretrained(folder)  # last: a folder without it does not load


def copy_tokenizer(checkpoint: Checkpoint, base: PreTrainedConfig, folder: Path) -> None:
    """The tokenizer, chat templates, generation config and licence, without code."""
    if checkpoint.gguf_file is not None:
        checkpoint.tokenizer().save_pretrained(folder)
        drop_code(folder)
        return
    copied = (*TOKENIZER_FILES, "generation_config.json", *LICENSE_FILES)
    for line in copy_data(checkpoint.folder, folder, copied):
        tqdm.write(line)
    if any(folder.glob("tokenizer*")):
        Checkpoint(checkpoint.name, folder).tokenizer(config=base)  # raises if it does not load
    else:
        tqdm.write(f"{checkpoint.name} has no tokenizer: the converted model has none either")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
