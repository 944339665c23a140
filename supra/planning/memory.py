"""The memory of one process, in bytes, from counts of parameters and tokens.

Weights, gradients and AdamW's moments are float32 whatever `precision` is: supra/uptrain/models.py
says why. The dtype of `precision` is that of products, of the teacher, and of copies of weights.
"""

import math
from dataclasses import dataclass

from supra.losses import chunked, token_losses
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
    makes logits. teacher, teacher_blocks: of the model that distill learns from and of its blocks;
    0 where its predictions are cached. copied: of the attention modules that orient and align copy,
    so that they stay the teacher's. vocabulary: tokens. heads: of a block's queries.
    softmax_layers: those that keep softmax attention. key_values: channels of their keys and
    values. kept: bytes that a row keeps.
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
    softmax_layers: int = 0
    key_values: int = 0
    teacher: int = 0
    teacher_blocks: int = 0
    copied: int = 0


@dataclass(frozen=True)
class Pass:
    """A forward pass of one process: `length` tokens of each of `rows`, with numbers of `width`
    bytes. A whole row has `row` tokens: more than `length`, if several processes share it.

    accumulates: whether a step has several passes, so that gradients are there in the next one.
    learns_from: "text", "teacher", "top_k", "outputs" or "matrices". device: "cuda" or "cpu", which
    have other chunks of logits.
    """

    rows: int
    length: int
    width: int
    hardware: Hardware
    accumulates: bool
    checkpointing: bool
    learns_from: str
    row: int | None = None
    device: str = "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes by part, and at the peak. The parts add up to more where some never meet."""

    parts: dict[str, int]
    peak: int


def end_to_end(x: Sizes, run: Pass) -> Memory:
    """Of a stage that trains the whole model. Its peak is at one of three moments: while the losses
    are computed, in the backward pass of a block, or at its end, when all gradients are there."""
    shards, split = run.hardware.shards, run.hardware.launch in SHARDED
    standing = {
        "weights": weights(x.all, shards),
        "optimizer": optimizer(x.stepped, shards),
        "teacher": run.width * teacher(x, shards),
        "buckets of DDP": FLOAT32 * x.bucketed if run.hardware.launch == "ddp" else 0,
    }
    gradients = weights(x.trained, shards)
    kept = {
        "copies of weights": weight_copies(x, run),
        "activations": activations(x.kept, run.rows, run.checkpointing) + of_other_parts(x, run),
    }
    # gradients of what a part has kept; what the parts behind it have kept is gone by then
    block = run.rows * x.kept.largest_part
    moments = {
        "gathered by FSDP": gathered(x, run) if split else 0,
        "gradients": gradients,
        "backward of a block": block,
        "logits": logits(run, x.vocabulary),
        "gradients of the head": head_gradients(x.trained_head, run.width),
    }
    outside, theirs = outside_of_blocks(x) if split else (0, 0)
    again = run.rows * x.kept.largest_layer if run.checkpointing else 0  # not there yet
    losses = sum(kept.values()) - again + outside + scoring(x, run)
    new = FLOAT32 * x.trained_head if split or not run.accumulates else 0
    backward = sum(kept.values()) + moments["gathered by FSDP"] + new + block
    end = gradients * (not run.accumulates) + (outside + 2 * theirs if split else block)
    peak = gradients * run.accumulates + max(losses, backward, end)
    return Memory(standing | moments | kept, sum(standing.values()) + peak)


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
    """Parameters in one process. FSDP splits the blocks, and when the student runs none of them is
    whole any more."""
    return x.teacher - x.teacher_blocks + math.ceil(x.teacher_blocks / shards)


def gathered(x: Sizes, run: Pass) -> int:
    """What FSDP makes whole in the backward pass of a block: the parameters outside the blocks, the
    block and the next one, which is fetched ahead; and the block's gradients. With checkpointing
    the peak is in every block, also while gradients of the block before are still scattered."""
    outside, _ = outside_of_blocks(x)
    return outside + FLOAT32 * (2 * x.block + (1 + run.checkpointing) * x.trained_block)


def outside_of_blocks(x: Sizes) -> tuple[int, int]:
    """Bytes of the embeddings, the last norm and the head, and of their gradients. FSDP leaves them
    whole until the backward pass ends."""
    outside = x.all - x.blocks
    return FLOAT32 * outside, FLOAT32 * min(outside, x.trained)


def gathered_for_layer(x: Sizes) -> int:
    """What FSDP makes whole of the teacher: the parameters outside the blocks, the block that runs,
    and the buffer in which its parts arrive. Of the student one attention module, with its
    gradients."""
    return FLOAT32 * (x.all - x.blocks + 2 * (x.block + x.trained_block))


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


def of_other_parts(x: Sizes, run: Pass) -> int:
    """What a softmax layer keeps of a row that several processes share, in the last of them: the
    keys and values of the tokens before, and a mask of a byte for each query and key. Recurrent
    layers keep nothing of the other parts that grows with them."""
    if run.row is None or run.row == run.length:
        return 0
    keys_and_values = run.width * x.key_values * (run.row - run.length)
    return run.rows * (keys_and_values + x.softmax_layers * run.length * run.row)


def scoring(x: Sizes, run: Pass) -> int:
    """The most of one chunk of tokens: while it is scored, or when the gradient of the head is made
    of the gradient of its logits. The head's gradient of the chunks before it is there, too."""
    chunk = chunk_of(run, x.vocabulary)
    before = FLOAT32 * x.trained_head * (chunk < run.rows * run.length * x.vocabulary)
    narrow = 2 + (run.learns_from == "teacher")
    after = chunk * narrow * run.width + head_gradients(x.trained_head, run.width)
    return max(logits(run, x.vocabulary) + before, after)


def logits(run: Pass, vocabulary: int) -> int:
    """Of one chunk of tokens (supra/losses/chunked.py): in the dtype of the computation the logits
    and their gradient, and the teacher's logits; in float32 four tensors (logits, log
    probabilities, gradient, masked gradient), and two more for the teacher's."""
    chunk = chunk_of(run, vocabulary)
    narrow = 2 + (run.learns_from == "teacher")
    wide = 6 if run.learns_from in ("teacher", "top_k") else 4
    at_once = min(chunk, token_losses.CHUNK_ELEMENTS[run.device])
    return chunk * narrow * run.width + at_once * wide * FLOAT32


def chunk_of(run: Pass, vocabulary: int) -> int:
    """The logits of a chunk."""
    most = chunked.CHUNK_ELEMENTS[run.device]
    return min(run.rows * run.length, max(1, most // vocabulary)) * vocabulary


def head_gradients(trained_head: int, width: int) -> int:
    """The head's gradient so far, a chunk's, and that of the copy it comes from."""
    return trained_head * (2 * FLOAT32 + width * (width < FLOAT32))


def matrices(heads: int, run: Pass) -> int:
    """The teacher's matrices, and the student's less the teacher's, [B, Hq, T, T] in float32."""
    return 2 * FLOAT32 * run.rows * heads * run.length**2
