"""The rows of a call: which tokens are padding, and where documents begin."""

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.errors import UserError


def refuse_context_parallel() -> None:
    """Raise UserError inside torch's `context_parallel`. It cuts rows along T, and every piece of a
    row would start from an empty state. The only sign of it is that it swaps torch's attention."""
    swapped = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    if not torch.compiler.is_compiling() and "context_parallel" in swapped:
        raise UserError(
            "torch's context parallelism cuts a row into pieces, between which a recurrent model's "
            "state would be lost: use supra.model.sequence_parallel, or cp_size of supra uptrain"
        )


def padding_mask(
    attention_mask: Tensor | None, batch: int, tokens: int, past: int | Tensor
) -> Tensor | None:
    """Bool [B, 1, 1, T] from a mask [B, T] or [B, past + T]; None if nothing is padded. In a
    compiled graph, the past of a static cache is a tensor, and the mask's width is not checked."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise UserError(
            "attention_mask must be [batch, tokens], 0 where padded: a recurrent model is causal "
            "and takes no other mask"
        )
    rows, width = attention_mask.shape
    known = isinstance(past, int)
    if rows != batch or (known and width not in (tokens, past + tokens)):
        raise UserError(
            f"attention_mask (={rows} x {width}) must be {batch} x {past + tokens}, for the {past} "
            f"tokens in past_key_values and the {tokens} of this call: pass the tokenizer's mask"
        )
    mask = attention_mask[:, -tokens:].bool()
    if not torch.compiler.is_compiling() and mask.all():
        return None
    return mask[:, None, None]


def given_boundaries(cu_seq_lens: Tensor, batch: int, tokens: int) -> Tensor:
    """Int [1, 1, 1, N + 1] from a collator's bounds [N + 1] of N documents in one row."""
    if batch != 1:
        raise UserError(
            f"cu_seq_lens_q describes one row, and there are {batch}: flatten the batch into a "
            "single row, or pass only position_ids"
        )
    if cu_seq_lens.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = cu_seq_lens[0].item(), cu_seq_lens[-1].item()
        if (first, last) != (0, tokens):
            raise UserError(
                f"cu_seq_lens_q (={first} ... {last}) must go from 0 to the row's {tokens} tokens: "
                "pass the bounds of all its documents"
            )
    return cu_seq_lens[None, None, None]


def document_boundaries(position_ids: Tensor, batch: int) -> Tensor | None:
    """Int [1, 1, 1, N + 1]: bounds of documents, which begin where positions [B or 1, T] do not
    increase by one. None if every row is one document."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    if not starts[:, 1:].any():
        return None
    starts = starts.expand(batch, -1).flatten()
    ends = torch.tensor([starts.numel()], device=starts.device)
    return torch.cat([starts.nonzero().flatten(), ends]).to(torch.int32)[None, None, None]
