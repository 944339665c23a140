"""Linear recurrences over time as associative scans: x_t = A_t x_{t−1} + b_t.

Time is the second dimension. A_t is diagonal, has a 2×2 block per channel, or is dense, as given by
`Structure`. Affine maps compose as (A₂, b₂) ∘ (A₁, b₁) = (A₂A₁, A₂b₁ + b₂).
"""

import math
from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor


class Structure(Enum):
    """The form of A_t for a state [B, T, …]. Elements that it does not store are zero."""

    DIAGONAL = "diagonal"  # A has the shape of the state
    BLOCK = "block"  # a state [B, T, …, 2] has A [B, T, …, 2, 2]
    DENSE = "dense"  # a state [B, T, D] has A [B, T, D, D]

    def apply(self, matrix: Tensor, x: Tensor) -> Tensor:
        """A x."""
        if self is Structure.DIAGONAL:
            return matrix * x
        if self is Structure.BLOCK:  # written out, because products of such small matrices are slow
            x0, x1 = x.unbind(-1)
            m = matrix
            return torch.stack(
                [m[..., 0, 0] * x0 + m[..., 0, 1] * x1, m[..., 1, 0] * x0 + m[..., 1, 1] * x1], -1
            )
        return (matrix @ x[..., None])[..., 0]

    def compose(self, second: Tensor, first: Tensor) -> Tensor:
        """A₂ A₁."""
        if self is Structure.DIAGONAL:
            return second * first
        if self is Structure.BLOCK:
            return torch.stack([self.apply(second, x) for x in first.unbind(-1)], dim=-1)
        return second @ first

    def transpose(self, matrix: Tensor) -> Tensor:
        return matrix if self is Structure.DIAGONAL else matrix.mT

    def diagonal(self, matrix: Tensor) -> Tensor:
        """The diagonal of A, in the shape of the state."""
        if self is Structure.DIAGONAL:
            return matrix
        return matrix.diagonal(dim1=-2, dim2=-1)

    def largest(self, x: Tensor) -> Tensor:
        """The largest |x| among the elements of a token that A mixes, broadcastable to x."""
        if self is Structure.DIAGONAL:
            return x.abs()
        return x.abs().amax(-1, keepdim=True)

    def constant(self, value: float, like: Tensor) -> Tensor:
        """`value` times the identity, for a state shaped like `like`."""
        if self is Structure.DIAGONAL:
            return torch.full_like(like, value)
        size = like.shape[-1]
        identity = torch.eye(size, dtype=like.dtype, device=like.device)
        return (value * identity).expand(*like.shape, size)


def affine_scan(
    structure: Structure,
    matrix: Tensor,
    bias: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """x_t = A_t x_{t−1} + b_t for all t, [B, T, …] as `bias`; x_0 = initial [B, …], or zeros.

    reverse: from the last token to the first, x_t = A_t x_{t+1} + b_t.

    The sequence is cut into about √T pieces of √T tokens. All pieces run in parallel from zero;
    then the state at the start of each piece is found, and its effect on the piece is added. The
    log₂ T steps of Hillis and Steele do more work, and on a CPU the work decides.
    """
    if reverse:
        matrix, bias = matrix.flip(1), bias.flip(1)
    tokens = bias.shape[1]
    size = math.isqrt(max(tokens - 1, 0)) + 1
    pieces = -(-tokens // size)
    matrix, bias = (_in_pieces(x, pieces, size) for x in (matrix, bias))  # [B, pieces, size, …]
    x, through = bias[:, :, 0], matrix[:, :, 0]
    states, products = [x], [through]
    for t in range(1, size):
        x = structure.apply(matrix[:, :, t], x) + bias[:, :, t]
        through = structure.compose(matrix[:, :, t], through)
        states.append(x)
        products.append(through)
    states, products = torch.stack(states, 2), torch.stack(products, 2)
    begin = torch.zeros_like(x[:, 0]) if initial is None else initial.to(x.dtype)
    begins = []
    for piece in range(pieces):
        begins.append(begin)
        begin = structure.apply(through[:, piece], begin) + x[:, piece]
    begins = torch.stack(begins, dim=1)[:, :, None].expand_as(states)
    states = states + structure.apply(products, begins)
    states = states.flatten(1, 2)[:, :tokens]
    return states.flip(1) if reverse else states


def _in_pieces(x: Tensor, pieces: int, size: int) -> Tensor:
    """[B, T, …] as [B, pieces, size, …], padded with zeros at the end."""
    missing = pieces * size - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (pieces, size))


Elements = tuple[Tensor, ...]


def associative_scan(combine: Callable[[Elements, Elements], Elements], elements: Elements):
    """All prefixes e_1 ∘ … ∘ e_t of elements with tensors [B, T, …]; combine(earlier, later).

    It takes O(T) work in log₂ T levels (Blelloch 1990): neighbours are combined, the remaining half
    is scanned, and the positions between are filled in.
    """
    tokens = elements[0].shape[1]
    if tokens < 2:
        return elements
    even = tuple(x[:, 0 : tokens - 1 : 2] for x in elements)
    odd = tuple(x[:, 1::2] for x in elements)
    odd = associative_scan(combine, combine(even, odd))
    later = tuple(x[:, 2::2] for x in elements)
    count = later[0].shape[1]
    filled = combine(tuple(x[:, :count] for x in odd), later)
    return tuple(
        _interleave(torch.cat([x[:, :1], y], dim=1), z)
        for x, y, z in zip(elements, filled, odd, strict=True)
    )


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """Join two tensors: `even` has tokens 0, 2, … and `odd` has tokens 1, 3, …. `odd` may have one
    token less."""
    joined = even.new_empty(even.shape[0], even.shape[1] + odd.shape[1], *even.shape[2:])
    joined[:, 0::2], joined[:, 1::2] = even, odd
    return joined
