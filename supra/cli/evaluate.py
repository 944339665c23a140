"""`supra eval text | ablate | task | passkey | suite`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from supra.cli.help import MEASURE, Command, Group
from supra.cli.options import (
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Model,
    OffloadFolder,
    Seed,
    Text,
    TextField,
    choice,
    file,
    flag,
    folder,
    integers,
    names,
    string,
    whole,
)
from supra.cli.output import print_result
from supra.uptrain import limits

TASKS = ("associative-recall", "induction", "mqar", "recent-recall")

SequenceLength = Annotated[
    int, whole("--sequence-length", "Tokens of a row.", limits.PASS, minimum=2, metavar="TOKENS")
]
Batch = Annotated[int, whole("--batch", "Rows of a forward pass.", limits.COUNT)]

app = typer.Typer(
    name="eval", cls=Group, rich_help_panel=MEASURE, help="Measure how good a model is."
)


@app.command(cls=Command, epilog="supra eval text --model ./rnn --text corpus.jsonl")
def text(
    model: Model,
    text: Text,
    text_field: TextField = "text",
    sequence_length: SequenceLength = 2048,
    tokens: Annotated[
        int | None,
        whole("--tokens", "Tokens to read. Default: the whole text.", limits.TEXT),
    ] = None,
    batch: Batch = 4,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
) -> None:
    """Perplexity of a model on a text, as a whole and by position in the document."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.evaluate.text_perplexity import evaluate_text

    where = placement(device_map, max_memory, offload_folder)
    result = evaluate_text(
        find_checkpoint(model, placement=where),
        text,
        text_field=text_field,
        sequence_length=sequence_length,
        tokens=tokens,
        batch=batch,
        dtype=parse_dtype(dtype),
    )
    print_result(result, json)


@app.command(
    cls=Command,
    epilog="supra eval ablate --model ./rnn --text corpus.jsonl \\\n"
    "    --parts floors,layers --teacher HuggingFaceTB/SmolLM2-135M",
)
def ablate(
    model: Model,
    text: Text,
    text_field: TextField = "text",
    parts: Annotated[
        Sequence[str],
        names(
            "--parts",
            "What to measure: floors, layers, lookback, recall, labels, samples. Default: all that "
            "apply to the model.",
        ),
    ] = (),
    teacher: Annotated[
        str | None,
        string(
            "--teacher", "Model that was converted; floors, layers and lookback use it.", "MODEL"
        ),
    ] = None,
    recall_lengths: Annotated[
        Sequence[int] | None,
        integers("--recall-lengths", "Tokens of the prompts of recall.", limits.PASS),
    ] = None,
    sequence_length: SequenceLength = 2048,
    tokens: Annotated[int, whole("--tokens", "Tokens of the text to read.", limits.TEXT)] = 8192,
    batch: Batch = 4,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
) -> None:
    """Find what each part of a converted model costs or contributes."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.evaluate.ablate.ablation import diagnose

    where = placement(device_map, max_memory, offload_folder)
    result = diagnose(
        find_checkpoint(model, placement=where),
        text,
        parts=parts,
        teacher=None if teacher is None else find_checkpoint(teacher, placement=where),
        text_field=text_field,
        sequence_length=sequence_length,
        tokens=tokens,
        batch=batch,
        seed=seed,
        dtype=parse_dtype(dtype),
        progress=True,
        **({} if recall_lengths is None else {"recall_lengths": recall_lengths}),
    )
    print_result(result, json)


@app.command(
    cls=Command, epilog="supra eval task --model ./rnn --task mqar --lengths 64,128 --pairs 4"
)
def task(
    model: Model,
    task: Annotated[str, choice("--task", f"The language: {', '.join(TASKS)}.", TASKS, "TASK")],
    lengths: Annotated[
        Sequence[int],
        integers("--lengths", "Words of a row. Default: those of the paper.", limits.PASS),
    ] = (),
    pairs: Annotated[
        Sequence[int],
        integers("--pairs", "Keys that a row of mqar asks for. Default: 4,16.", limits.WIDTH),
    ] = (),
    vocabulary: Annotated[
        int | None,
        whole(
            "--vocabulary",
            "Words of the language. Default: depends on the task.",
            limits.VOCABULARY,
            minimum=None,
        ),
    ] = None,
    samples: Annotated[int, whole("--samples", "Rows of each length.", limits.COUNT)] = 256,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
) -> None:
    """Accuracy of a model in rows of a synthetic language. It reads no text."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.evaluate.tasks.task import evaluate_task

    where = placement(device_map, max_memory, offload_folder)
    result = evaluate_task(
        find_checkpoint(model, placement=where),
        task,
        lengths=lengths,
        pairs=pairs,
        vocabulary=vocabulary,
        samples=samples,
        seed=seed,
        dtype=parse_dtype(dtype),
        progress=True,
    )
    print_result(result, json)


@app.command(
    cls=Command,
    epilog="supra eval passkey --model ./rnn --lengths 1024,4096 --picture passkey.png",
)
def passkey(
    model: Model,
    lengths: Annotated[
        Sequence[int], integers("--lengths", "Tokens of the prompts.", limits.PASS)
    ] = (
        512,
        1024,
        2048,
    ),
    depths: Annotated[
        int, whole("--depths", "Depths at which the number is hidden.", limits.WIDTH)
    ] = 10,
    keys: Annotated[int, whole("--keys", "Numbers in each prompt.", limits.COUNT)] = 1,
    samples: Annotated[
        int, whole("--samples", "Prompts of each length and depth.", limits.COUNT)
    ] = 2,
    picture: Annotated[
        Path | None, file("--picture", "Draw the accuracies as a heat map into this file.", "PNG")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
) -> None:
    """Find a number that is hidden in a long text. The text is made up."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.evaluate.tasks.passkey import evaluate_passkey

    where = placement(device_map, max_memory, offload_folder)
    result = evaluate_passkey(
        find_checkpoint(model, placement=where),
        lengths=lengths,
        depths=depths,
        keys=keys,
        samples=samples,
        picture=picture,
        seed=seed,
        dtype=parse_dtype(dtype),
        progress=True,
    )
    print_result(result, json)


@app.command(
    cls=Command,
    epilog="supra eval suite --model ./rnn --teacher HuggingFaceTB/SmolLM2-135M --data eval",
)
def suite(
    model: Model,
    data: Annotated[
        Path,
        folder("--data", "Folder with the evaluation sets, such as lambada.jsonl and icl.jsonl."),
    ],
    teacher: Annotated[
        str | None, string("--teacher", "Model to compare with, such as the original.", "MODEL")
    ] = None,
    tasks: Annotated[
        Sequence[str],
        names(
            "--tasks",
            "What to measure: lambada, piqa, blimp, wikitext, in_context, and tasks of "
            "lm-evaluation-harness. Default: these five.",
        ),
    ] = (),
    shots: Annotated[
        Sequence[int],
        integers("--shots", "Examples in the prompts of in_context.", limits.COUNT, minimum=0),
    ] = (0, 4, 16, 48),
    limit: Annotated[
        int | None,
        whole("--limit", "Items of each part, for a quick look. Default: all.", limits.COUNT),
    ] = None,
    sequence_length: Annotated[
        int,
        whole(
            "--sequence-length",
            "Tokens of a row of wikitext.",
            limits.PASS,
            minimum=2,
            metavar="TOKENS",
        ),
    ] = 1024,
    batch: Batch = 8,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        folder("--out", "Folder for finished parts, which are not measured again."),
    ] = None,
    picture: Annotated[
        Path | None, file("--picture", "Draw the results into this file.", "PNG")
    ] = None,
    card: Annotated[bool, flag("--card", "Write the table into the model card.")] = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
) -> None:
    """What a model keeps of its teacher's ability: tasks, text, in-context learning."""
    from supra.checkpoint.opening import find_checkpoint, parse_dtype
    from supra.checkpoint.placement import placement
    from supra.evaluate.suite.parts import Settings
    from supra.evaluate.suite.suite import evaluate_suite

    where = placement(device_map, max_memory, offload_folder)
    result = evaluate_suite(
        find_checkpoint(model, placement=where),
        data,
        teacher=None if teacher is None else find_checkpoint(teacher, placement=where),
        tasks=tasks,
        settings=Settings(limit, tuple(shots), sequence_length, seed),
        batch=batch,
        dtype=parse_dtype(dtype),
        out=out,
        picture=picture,
        card=card,
        progress=True,
    )
    print_result(result, json)
