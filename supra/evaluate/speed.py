"""Decoding speed, measured the way a user feels it: one token after another, greedy."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def decode_speed(model: PreTrainedModel, prompt: Tensor, tokens: int) -> float:
    """Tokens per second per sequence after the prompt [B, T], which is not timed.

    Greedy and without generate()'s bookkeeping, so that models are compared and not the loop.
    """
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    token.sum().item()  # waits for a GPU, here and at the end
    start = time.perf_counter()
    for _ in range(tokens):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    token.sum().item()
    return tokens / (time.perf_counter() - start)
