"""Train on rows that are longer than one GPU's memory: each rank has a part of every row.

    part = part_of_rows(batch, rank, ranks)
    with sequence_parallel(model):
        model(**part).loss.backward()
    # then add up the gradients of all ranks

States are handed on between the ranks (supra/mixers/row_parts.py). The result is that of whole rows
on one rank, up to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from supra.data.packing import IGNORE, shifted_labels
from supra.errors import UserError
from supra.mixers.ranks import Ranks
from supra.mixers.row_parts import RowPart
from supra.model.attention import attention_modules
from supra.model.modeling import SupraForSequences, SupraModel


class RowRanks:
    """The ranks that have the parts of a model's rows, and the part of the current call."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.ranks = Ranks(group)
        self.part: RowPart | None = None
        self.packed = False  # whether rows of the current call have several documents

    def begin(
        self, tokens: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Find out what the part of this rank follows. Returns the positions of its tokens, [B, T].

        tokens: input_ids [B, T] or inputs_embeds [B, T, D].

        Raises UserError on all ranks if the inputs of the ranks do not fit together.
        """
        padded = attention_mask is not None
        shape, device = tokens.shape[:2], tokens.device
        lengths = self._lengths(shape, padded, device)
        start = sum(lengths[: self.ranks.rank])
        if position_ids is None:
            position_ids = torch.arange(start, start + shape[1], device=device)[None]
        position_ids = position_ids.expand(shape)
        mask = attention_mask if padded else torch.ones_like(position_ids)
        positions, valid = self._whole(torch.stack([position_ids, mask.to(position_ids)]), lengths)
        documents = torch.zeros_like(positions)
        if not padded:
            documents[:, 1:] = (positions.diff(dim=-1) != 1).cumsum(-1)
        self.packed = bool(documents.any())
        self.part = RowPart(self.ranks, lengths, valid.bool(), documents)
        return position_ids

    def _lengths(self, shape: torch.Size, padded: bool, device: torch.device) -> tuple[int, ...]:
        """How many tokens of each row the ranks have."""
        own = torch.tensor([shape[0], padded, shape[1]], device=device)
        rows, masks, lengths = self.ranks.gather(own).T.tolist()
        if len({*rows}) > 1 or len({*masks}) > 1:
            raise UserError(
                f"the ranks of a row have {rows} rows and {masks} masks: give each rank a part of "
                "the same rows, with an attention_mask on all ranks or on none"
            )
        if min(lengths) < 1:
            raise UserError(
                f"the ranks of a row have {lengths} tokens, and every rank needs one or more: give "
                "longer rows or fewer ranks"
            )
        return tuple(lengths)

    def _whole(self, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """x [2, B, T] of all ranks, one after the other: [2, B, L]."""
        x = torch.nn.functional.pad(x, (0, max(lengths) - x.shape[-1]))
        parts = zip(self.ranks.gather(x), lengths, strict=True)
        return torch.cat([part[..., :length] for part, length in parts], dim=-1)


@contextmanager
def sequence_parallel(
    model: nn.Module, group: dist.ProcessGroup | None = None
) -> Iterator[RowRanks]:
    """Inside, each rank of a group reads its own part of every row of a converted model.

    All ranks must call the model at the same time, each with its own part of the same rows, in the
    order of the ranks. Parts may have different lengths, and every rank has a token of each row or
    more. Padding and packed documents may lie on several ranks. Call backward inside, too: it
    exchanges gradients. With activation checkpointing, call it before the next forward pass.

    Each rank gets the gradient of its own loss, in which its tokens' effect on other ranks is
    included if those call backward as well. The sum over ranks is the gradient of the sum of their
    losses. With `use_cache=True`, the last rank returns the state after the rows, with which it can
    continue alone; other ranks return those after their parts.

    Args:
        model: a converted model, headless or a language model, or a module that contains one.
        group: the ranks; None for all.

    Yields an object with `ranks.bytes`, what this rank has received from the others since the
    context began, and `ranks.seconds`, how long it has waited for them. A context for each step
    keeps these small.

    Raises:
        UserError: a mixer that needs whole rows, such as one with a nonlinear recurrence, a state
            policy that does, a model that is not converted, or no process group.
    """
    base = next((module for module in model.modules() if isinstance(module, SupraModel)), None)
    if base is None:
        raise UserError(f"model (={type(model).__name__}) must be a converted model")
    check_parts(model)
    if not dist.is_initialized():
        raise UserError(
            "sequence_parallel needs the processes of torch.distributed: start them with torchrun, "
            "and call torch.distributed.init_process_group() in each"
        )
    rows = RowRanks(group)
    sharing = [base, *attention_modules(base)]
    for module in sharing:
        module.row_ranks = rows
    try:
        yield rows
    finally:
        for module in sharing:
            module.row_ranks = None


def check_parts(model: nn.Module) -> None:
    """Raise UserError for a converted model whose rows cannot lie on several ranks."""
    if any(isinstance(module, SupraForSequences) for module in model.modules()):
        raise UserError(
            "a sequence classifier reads the last token of each row, which only one rank has: "
            "give each rank whole rows"
        )
    for attention in attention_modules(model):
        mixer, reason = attention.mixer, attention.mixer.needs_whole_rows
        if mixer.policy is not None and mixer.policy.keeps_past:
            reason = "its state_policy bounds the state by norm or window; leave it off"
        if reason is not None:
            raise UserError(
                f"rows cannot lie on several ranks in layer {attention.layer_idx} ({mixer.name}): "
                f"{reason}"
            )


def part_of_rows(batch: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Any]:
    """The part of a batch that one rank has, for use inside `sequence_parallel`.

    batch: tensors [B, L] such as input_ids, position_ids, attention_mask and labels; L >= ranks.
    The lengths of parts differ by one token at most.

    With labels, the part also has `shift_labels`, since the label of its last token is on the next
    rank, and `num_items_in_batch`, the number of labels in whole rows. transformers' models divide
    by that, so that the losses of all ranks add up to the mean over whole rows.
    """
    length = batch["input_ids"].shape[1]
    if length < ranks:
        raise UserError(
            f"ranks (={ranks}) must be at most the {length} tokens of a row: give longer rows or "
            "fewer ranks"
        )
    batch, counts = dict(batch), {}
    if "labels" in batch:
        batch["shift_labels"] = shifted_labels(batch["labels"])
        counts["num_items_in_batch"] = (batch["shift_labels"] != IGNORE).sum()
    parts = {name: x.tensor_split(ranks, 1)[rank].contiguous() for name, x in batch.items()}
    return parts | counts
