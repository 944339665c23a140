"""Loads a model and checks that its weights, and later its outputs, are finite."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from supra.checkpoint.opening import Checkpoint
from supra.errors import UserError
from supra.model.native.adapter import adopt
from supra.model.offload import first_not_finite


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None, may_overflow: bool = False
) -> PreTrainedModel:
    """Load a model to where the checkpoint's placement says. Without a placement, it goes onto the
    GPU if there is one.

    A `state_policy` in the config acts, also on a model that is recurrent in transformers itself.

    Raises UserError for weights that are not finite. Unless `may_overflow` is true, any later call
    of the model raises it for logits that are not finite.
    """
    model = checkpoint.model(dtype)
    if getattr(model.config, "state_policy", None) is not None:
        with checkpoint.named():
            adopt(model)
    if name := first_not_finite(model):
        raise UserError(
            f"model {checkpoint.name!r} cannot be evaluated: its tensor {name} holds NaN or "
            "infinity; download it again, or use an earlier checkpoint"
        )
    if not may_overflow:
        model.get_output_embeddings().register_forward_hook(partial(_check_logits, model))
    if checkpoint.placement is None and torch.cuda.is_available():
        model.to("cuda")
    return model


def _check_logits(model: PreTrainedModel, module: nn.Module, args: tuple, logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise overflow(model)


def overflow(model: PreTrainedModel) -> UserError:
    """The error for a model whose weights are finite but whose outputs are not."""
    dtype = str(model.dtype).removeprefix("torch.")
    return UserError(
        f"model {model.name_or_path!r} cannot be evaluated: its outputs overflow in {dtype}, "
        "though its weights are finite; give --dtype float32, or use an earlier checkpoint"
    )
