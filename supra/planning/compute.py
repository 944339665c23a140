"""Tokens, FLOPs, hours and money of a stage.

A product with a matrix takes 2 FLOPs per number of it and token. A backward pass takes 2 more for
the gradient of the inputs and 2 for that of the matrix: 6 in all (Kaplan et al. 2020, arXiv
2001.08361, section 2.1). What gradient checkpointing computes again counts as well, because it
takes as long.
"""

from dataclasses import dataclass

PRODUCT = 2  # FLOPs per number of a matrix and token
STATE = 4  # FLOPs per number of a state and token: decay and write, multiply and add to read


@dataclass(frozen=True)
class Work:
    """What a token goes through, in numbers of matrices and of states.

    products: of the student, with the head. blocks: of its blocks. trained: those with a gradient.
    state: of all recurrent layers. softmax: query and value channels of all heads, over the
    student's layers that keep attention. teacher, teacher_softmax: the same of a teacher.
    attention: inherited and new, of the attention modules; they alone are trained by orient and
    align. matrices: query channels of all heads, over the layers whose attention matrices orient
    compares.
    """

    products: int
    blocks: int
    trained: int
    state: int
    softmax: int = 0
    teacher: int = 0
    teacher_softmax: int = 0
    attention: int = 0
    matrices: int = 0


def end_to_end(work: Work, length: int, checkpointing: bool) -> int:
    """FLOPs per token of distill, tune and extend."""
    mixing = STATE * work.state + scores(work.softmax, length)
    student = 3 * mixing + PRODUCT * (2 * work.products + work.trained)
    again = mixing + PRODUCT * work.blocks if checkpointing else 0
    return student + again + forward(work.teacher, work.teacher_softmax, length)


def layer_by_layer(work: Work, length: int) -> int:
    """FLOPs per token of orient and align: a pass of the blocks with the teacher's attention, and
    the student's attention modules forward and backward. In orient both make their attention
    matrix: the student mixes the T columns of a unit matrix, the teacher multiplies queries by
    keys."""
    student = 3 * STATE * work.state + PRODUCT * (2 * work.attention + work.trained)
    columns = (3 * STATE + PRODUCT) * work.matrices * length
    return student + columns + forward(work.teacher, work.teacher_softmax, length)


def forward(products: int, softmax: int, length: int) -> int:
    """FLOPs per token of a transformer's forward pass."""
    return PRODUCT * products + scores(softmax, length)


def scores(channels: int, length: int) -> int:
    """Softmax attention: a token meets half of the row on average, with 2 FLOPs per channel of
    keys and of values."""
    return PRODUCT * channels * length // 2


def hours(flops: float, gpus: int, tflops: float, mfu: float) -> float:
    """FLOPs over those that the GPUs do in an hour; `mfu` is the share of their peak."""
    return flops / (gpus * tflops * 1e12 * mfu) / 3600
