"""Samples of what the model writes, because losses hide repetition and nonsense."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.data.packing import start_tokens
from supra.evaluate.ablate.lookback import cut_rows
from supra.model.offload import device_of

PROMPTS = 3
PROMPT_TOKENS = 32
NEW_TOKENS = 40


@dataclass(frozen=True)
class Sample:
    prompt: str
    continuation: str


@dataclass(frozen=True)
class Samples:
    samples: list[Sample]

    def lines(self) -> list[str]:
        lines = ["samples: greedy continuations"]
        for sample in self.samples:
            lines += [f"  {' '.join(sample.prompt.split())}", f"    -> {sample.continuation!r}"]
        return lines


@torch.no_grad()
def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[list[int]]
) -> Samples:
    """Greedy continuations of pieces of the text. `documents` are lists of tokens."""
    start = start_tokens(tokenizer)
    pieces = cut_rows(documents, PROMPT_TOKENS, rows=PROMPTS)
    prompts = torch.tensor([start + piece for piece in pieces], device=device_of(model))
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = output[:, prompts.shape[1] :]
    return Samples(
        [
            Sample(tokenizer.decode(piece), tokenizer.decode(more, skip_special_tokens=True))
            for piece, more in zip(pieces, new, strict=True)
        ]
    )
