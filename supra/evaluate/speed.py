"""Decoding speed as a user sees it: one token after another, greedy."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from supra.model.cache import cache_in


@torch.no_grad()
def decode_speed(model: PreTrainedModel, prompt: Tensor, tokens: int) -> float:
    """Tokens per second and sequence after the prompt [B, T]; reading the prompt is not timed.

    Decoding is greedy and does not use generate(), whose own cost would blur the comparison of
    models.
    """
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    token.sum().item()  # waits for a GPU, here and at the end
    start = time.perf_counter()
    for _ in range(tokens):
        output = model(token, use_cache=True, **cache_in(output))
        token = output.logits[:, -1:].argmax(-1)
    token.sum().item()
    return tokens / (time.perf_counter() - start)
