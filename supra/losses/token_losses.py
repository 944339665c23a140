"""Next-token cross entropy and KL(teacher || student) without a float32 copy of the logits.

With a vocabulary of 49152, a float32 tensor of 2048 tokens takes 403 MB, and the plain formula
keeps half a dozen of them. Here the logits keep the model's dtype, float32 exists for one chunk of
tokens at a time, and the same pass writes the gradient, in the dtype of the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from supra.data.packing import IGNORE
from supra.kernels.backends import without_autocast

# float32 values per chunk. On 2 cores 2048 x 49152 logits take 0.45 s with 2**20 (4 MB, which fits
# the cache) and 1.5 s with 2**24.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}


class Losses(NamedTuple):
    """Sums over the valid tokens. Only `total` carries a gradient."""

    total: torch.Tensor  # next_token_weight * next_token + kl_weight * kl
    next_token: torch.Tensor  # nats
    kl: torch.Tensor  # nats, times temperature squared


@dataclass(frozen=True)
class TopK:
    """A teacher's k most likely tokens. The KL term treats all other tokens as one, which has the
    remaining probability."""

    tokens: torch.Tensor  # [N, k] int64
    log_probabilities: torch.Tensor  # [N, k] float16, at the temperature of the KL term

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float) -> "TopK":
        """From logits [N, V]."""
        log_p = torch.log_softmax(logits.to(_wide(logits)) / temperature, -1)
        values, tokens = log_p.topk(min(k, logits.shape[-1]), -1)
        return cls(tokens, values.half())

    def rows(self, rows: slice | torch.Tensor) -> "TopK":
        return TopK(self.tokens[rows], self.log_probabilities[rows])


def token_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | TopK | None = None,
    *,
    next_token_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> Losses:
    """The sum of the losses of all tokens whose label is not -100.

    Args:
        logits: [N, V], any floating dtype.
        labels: [N] int64, already shifted: row n is scored on labels[n].
        teacher: the teacher's logits [N, V], or its most likely tokens; required when
            kl_weight > 0. It gets no gradient.
        temperature: T divides both sets of logits in the KL term, which is multiplied by T^2 so
            that its gradient keeps its size (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    if kl_weight == 0:
        teacher = None
    weights = (next_token_weight, kl_weight, temperature)
    # autocast would round the terms of the KL to bfloat16, and take twice the time
    with without_autocast(logits.device):
        return Losses(*_TokenLosses.apply(logits, labels, teacher, *weights))


@torch.no_grad()
def next_token_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p(label) per token, 0 where the label is -100: [N, V], [N] -> [N] float32."""
    return torch.cat(
        [
            F.cross_entropy(logits[rows].float(), labels[rows], reduction="none")
            for rows in _chunks(logits)
        ]
    )


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, teacher, next_token_weight, kl_weight, temperature):
        next_token, kl = logits.new_zeros(2, dtype=_wide(logits)).unbind()
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in _chunks(logits):
            x, valid = logits[rows].to(_wide(logits)), labels[rows] != IGNORE
            targets = labels[rows].clamp(min=0).unsqueeze(-1)
            log_q = torch.log_softmax(x, -1)
            next_token -= log_q.gather(-1, targets).squeeze(-1).where(valid, 0).sum()
            if gradient is not None:
                dx = log_q.exp().mul_(next_token_weight + kl_weight * (temperature == 1))
                dx.scatter_add_(-1, targets, dx.new_full(targets.shape, -next_token_weight))
            if teacher is not None:
                if temperature != 1:
                    log_q = torch.log_softmax(x / temperature, -1)
                    if gradient is not None:
                        dx.add_(log_q.exp(), alpha=kl_weight * temperature)
                log_p = _log_probabilities(teacher, rows, log_q, temperature)
                p = log_p.exp()
                divergences = torch.bmm(log_p.sub_(log_q)[:, None], p[:, :, None])
                kl += divergences.flatten().where(valid, 0).sum() * temperature**2
                if gradient is not None:
                    dx.sub_(p, alpha=kl_weight * temperature)
            if gradient is not None:
                gradient[rows] = _masked(dx, valid)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(next_token, kl)
        return next_token_weight * next_token + kl_weight * kl, next_token, kl

    @staticmethod
    def backward(ctx, total_gradient, *_):
        refuse_second_derivatives()
        (gradient,) = ctx.saved_tensors
        return multiply_(gradient, total_gradient), None, None, None, None, None


def multiply_(buffer: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """For use in a backward pass: the buffer times the gradient of the total, in place, because
    nothing else uses it, and autograd refuses a second backward pass. The gradient nearly always is
    1, and on a CPU, where asking costs no wait for a device, that saves a pass over the buffer."""
    if _can_be_asked(gradient) and gradient == 1:
        return buffer
    return buffer.mul_(gradient.to(buffer.dtype))


def refuse_second_derivatives() -> None:
    """For use in a backward pass: raise RuntimeError when second derivatives are asked for.

    torch's once_differentiable would return wrong second derivatives of a linear sum.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss has no second derivatives: call backward() without create_graph, or use "
            "torch.nn.functional.cross_entropy on the logits"
        )


def _log_probabilities(
    teacher: torch.Tensor | TopK, rows: slice, log_q: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The teacher's log-probabilities [n, V], in the dtype of the student's log_q.

    The probability outside the top-k tokens is spread over the other tokens in the student's
    proportions. This gives the KL over k + 1 tokens, in value and in gradient: p·(log p - log q),
    summed over the other tokens, equals that term for all of them as one token.
    """
    if not isinstance(teacher, TopK):
        logits = teacher[rows].to(log_q.dtype)
        return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    teacher = teacher.rows(rows)
    tokens, log_p = teacher.tokens, teacher.log_probabilities.to(log_q.dtype)
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=1e-7).log()  # rounding may make it negative
    rest_q = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return (log_q + (rest_p - rest_q).unsqueeze(-1)).scatter_(-1, tokens, log_p)


def _masked(dx: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """dx [n, V], with 0 in the rows that are not valid. On a CPU, where asking costs no wait for a
    device, chunks in which all rows are valid save the pass."""
    if _can_be_asked(valid) and valid.all():
        return dx
    return dx.where(valid.unsqueeze(-1), 0)


def _can_be_asked(x: torch.Tensor) -> bool:
    """Whether its numbers are there without a wait for a device. Simulated tensors have none."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    elements = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cuda"])
    size = max(1, elements // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))
