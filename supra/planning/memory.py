"""The memory of one process, in bytes, from counts of parameters and tokens.

Weights, gradients and AdamW's moments are float32 whatever `precision` is: supra/uptrain/models.py
says why. The dtype of `precision` is that of products, of the teacher, and of copies of weights.
"""

import math
from dataclasses import dataclass

from supra.losses.chunked import CHUNK_ELEMENTS
from supra.planning.activations import Kept
from supra.planning.hardware import SHARDED, Hardware

FLOAT32 = 4  # bytes of a number
MOMENTS = 2  # AdamW keeps the averages of a gradient and of its square
LIMIT = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL, and holes between tensors


@dataclass(frozen=True)
class Sizes:
    """What memory depends on in the models, as counts of parameters, unless it says otherwise.

    all, blocks, block: of the student, of its blocks, and of the largest one. stepped: those that
    the stage changes. trained: those with a gradient; in several processes also what other stages
    change. frozen_products: of the blocks' matrices without a gradient. bucketed: those with a
    gradient in a stage that runs through the wrapper of several processes. head: of the matrix that
    makes logits. teacher, teacher_blocks, teacher_block: of the model that distill learns from, of
    its blocks, and of the largest one. copied: of the attention modules that orient and align copy,
    so that they stay the teacher's. vocabulary: tokens. heads: of a block's queries. kept: bytes
    that a row keeps.
    """

    all: int
    blocks: int
    block: int
    stepped: int
    trained: int
    trained_block: int
    trained_head: int
    frozen_products: int
    bucketed: int
    head: int
    vocabulary: int
    heads: int
    kept: Kept
    teacher: int = 0
    teacher_blocks: int = 0
    teacher_block: int = 0
    copied: int = 0


@dataclass(frozen=True)
class Pass:
    """A forward pass of one process: `rows` of `length` tokens, with numbers of `width` bytes.

    accumulates: whether a step has several passes, so that gradients are there in the next one.
    learns_from: "text", "teacher", "outputs" or "matrices".
    """

    rows: int
    length: int
    width: int
    hardware: Hardware
    accumulates: bool
    checkpointing: bool
    learns_from: str


@dataclass(frozen=True)
class Memory:
    """Bytes by part, and at the peak. The parts add up to more where some never meet."""

    parts: dict[str, int]
    peak: int


def end_to_end(x: Sizes, run: Pass) -> Memory:
    """Of a stage that trains the whole model."""
    shards, launch = run.hardware.shards, run.hardware.launch
    standing = {
        "weights": weights(x.all, shards),
        "optimizer": optimizer(x.stepped, shards),
        "teacher": run.width * teacher(x, shards),
        "buckets of DDP": FLOAT32 * x.bucketed if launch == "ddp" else 0,
        "gathered by FSDP": gathered(x) if launch in SHARDED else 0,
    }
    gradients = weights(x.trained, shards)
    busy = {
        "copies of weights": weight_copies(x, run),
        "activations": activations(x.kept, run.rows, run.checkpointing),
        "backward of a block": run.rows * x.kept.largest_layer,
        "logits": logits(run.rows * run.length, x.vocabulary, run.width, run.learns_from),
        "gradients of the head": head_gradients(x.trained_head, run.width),
    }
    # without accumulation, gradients come as activations go: the peak is at either end
    last = gradients + busy["backward of a block"]
    moving = max(sum(busy.values()) + gradients * run.accumulates, last)
    return Memory(standing | {"gradients": gradients} | busy, sum(standing.values()) + moving)


def layer_by_layer(x: Sizes, run: Pass) -> Memory:
    """Of orient and align: activations are those of one attention module."""
    shards, launch = run.hardware.shards, run.hardware.launch
    parts = {
        "weights": weights(x.all, shards),
        "optimizer": optimizer(x.stepped, shards),
        "teacher's attention": weights(x.copied, shards),
        "buckets of DDP": FLOAT32 * x.bucketed if launch == "ddp" else 0,
        "gathered by FSDP": gathered_for_layer(x) if launch in SHARDED else 0,
        "gradients": weights(x.trained, shards),
        "copies of weights": layer_copies(x, run),
        "activations": run.rows * x.kept.largest_layer,
        "backward of a block": run.rows * x.kept.largest_layer,
        "attention matrices": matrices(x.heads, run) if run.learns_from == "matrices" else 0,
    }
    return Memory(parts, sum(parts.values()))


def weights(parameters: int, shards: int) -> int:
    """Bytes of one process: float32 weights or gradients, split evenly over the shards."""
    return FLOAT32 * math.ceil(parameters / shards)


def optimizer(trained: int, shards: int) -> int:
    """AdamW's two moments, in the dtype of the weights."""
    return MOMENTS * weights(trained, shards)


def teacher(x: Sizes, shards: int) -> int:
    """Parameters in one process: FSDP splits the blocks, and makes the one that runs whole."""
    if shards == 1:
        return x.teacher
    return x.teacher - x.teacher_blocks + math.ceil(x.teacher_blocks / shards) + x.teacher_block


def gathered(x: Sizes) -> int:
    """What FSDP makes whole: the parameters outside the blocks, the block that runs and the next
    one, which is fetched ahead; and as many gradients before they are scattered."""
    outside = x.all - x.blocks
    return FLOAT32 * (outside + 2 * x.block + min(outside, x.trained) + 2 * x.trained_block)


def gathered_for_layer(x: Sizes) -> int:
    """What FSDP makes whole of the teacher, as in `gathered`; and of the student one attention
    module with its gradients. The block that it is in counts in its place."""
    return FLOAT32 * (x.all - x.blocks + 3 * x.block + x.trained_block)


def weight_copies(x: Sizes, run: Pass) -> int:
    """Weights that autocast casts to bf16. Autograd needs the copies for the backward pass, with
    checkpointing those of one block. Except under FSDP, autocast itself keeps the copies of trained
    weights until the forward pass ends."""
    width = run.width
    head = width * x.head if width < FLOAT32 else 0
    if not run.checkpointing or width == FLOAT32:
        return x.kept.fixed + head
    if run.hardware.launch in SHARDED:
        return width * x.block + head
    return x.kept.fixed - width * (x.frozen_products - min(x.frozen_products, x.block)) + head


def layer_copies(x: Sizes, run: Pass) -> int:
    """Autocast keeps casts of the teacher's attention, and of the student's where that is trained,
    until the teacher's pass ends; under FSDP none, and there are those of a block that runs."""
    if run.width == FLOAT32:
        return 0
    if run.hardware.launch in SHARDED:
        return run.width * x.block
    return run.width * (x.copied + min(x.copied, x.trained))


def activations(kept: Kept, rows: int, checkpointing: bool) -> int:
    """What autograd keeps of all blocks, or with checkpointing their inputs and one block."""
    if checkpointing:
        return rows * (len(kept.layers) * kept.layer_input + kept.outside + kept.largest_layer)
    return rows * (kept.all_layers + kept.outside)


def logits(tokens: int, vocabulary: int, width: int, learns_from: str) -> int:
    """Of one chunk of tokens (supra/losses/chunked.py): in the dtype of the computation the logits
    and their gradient, and the teacher's logits; in float32 four tensors (logits, log
    probabilities, gradient, masked gradient), and two more for the teacher's."""
    chunk = min(tokens, max(1, CHUNK_ELEMENTS["cuda"] // vocabulary)) * vocabulary
    teacher = learns_from == "teacher"
    return chunk * ((2 + teacher) * width + (4 + 2 * teacher) * FLOAT32)


def head_gradients(trained_head: int, width: int) -> int:
    """The head's gradient so far, a chunk's, and that of the copy it comes from."""
    return trained_head * (2 * FLOAT32 + width * (width < FLOAT32))


def matrices(heads: int, run: Pass) -> int:
    """The teacher's matrices, and the student's less the teacher's, [B, Hq, T, T] in float32."""
    return 2 * FLOAT32 * run.rows * heads * run.length**2
