"""Random models of the size of SmolLM2-135M, and random text: speed does not depend on weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from supra.bench.train.text import write_text
from supra.checkpoint.files import staged_folder
from supra.conversion.convert import convert
from supra.testing import tiny_tokenizer

TEACHER = "teacher"
STUDENTS = ("mamba2", "gated_deltanet")


@dataclass(frozen=True)
class Sizes:
    """Of the models, and of training: rows and tokens of a step, steps that count, and steps before
    them. decoded: tokens that are decoded to take the median of their times."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    rows: int
    length: int
    steps: int
    warm_up: int
    decoded: int

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2**17,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


WHOLE = Sizes(576, 1536, 30, 9, 3, 49152, 16, 1024, 10, 3, 32)
SMALL = Sizes(32, 48, 1, 2, 1, 320, 2, 32, 1, 1, 2)


def model(folder: Path, name: str, sizes: Sizes) -> Path:
    """The folder of the teacher, or of a student with that mixer; made if it is missing."""
    found = folder / name
    if found.exists():
        return found
    if name != TEACHER:
        convert(model(folder, TEACHER, sizes), found, mixer=name)
        return found
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(sizes.config).to(torch.bfloat16)
    with staged_folder(found) as staging:
        teacher.save_pretrained(staging)
        tiny_tokenizer(staging)
    return found


def text(folder: Path, sizes: Sizes) -> Path:
    """A file of random documents with enough tokens for one training."""
    tokens = sizes.rows * sizes.length * (sizes.steps + sizes.warm_up + 2)
    return write_text(folder / "text.jsonl", tokens)
