"""`supra eval passkey`: recall of a number in a long text, by text length and depth.

The grid of lengths and depths is that of Stuffed Mamba (Chen et al. 2024, arXiv 2410.07145).
Prompts are read in pieces, so that a recurrent model needs no more memory for a longer prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from supra.checkpoint.opening import Checkpoint
from supra.data.passkey import DIGITS, Passkey, passkey
from supra.errors import UserError
from supra.evaluate.tasks.heat_map import check_heat_map, draw_heat_map
from supra.evaluate.tasks.prompts import ANSWER_TOKENS
from supra.model.cache import cache_in
from supra.model.loading import load_model
from supra.model.native.adapter import accelerate, adopt
from supra.model.offload import device_of
from supra.model.positions import check_positions

TASK = "passkey"
LENGTHS = (512, 1024, 2048)
DEPTHS = 10
SAMPLES = 2  # per length and depth; 20 in the publication
PIECE = 2048  # tokens of each prompt per forward pass
BATCH_TOKENS = 8192  # total length of the prompts in a batch


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt, with as many tokens as the key has."""

    length: int  # tokens of the prompt
    depth: float
    key: str
    said: str

    @property
    def hit(self) -> bool:
        """Whether the answer begins with the key; white space before it is ignored."""
        return self.said.lstrip().startswith(self.key)


@dataclass(frozen=True)
class PasskeyResult:
    model: str
    lengths: list[int]
    depths: int  # rows of the grid
    samples: int  # prompts per length and row
    keys: int  # passkeys in each prompt
    seed: int
    answers: list[Answer]  # by length, then by depth

    @property
    def accuracy(self) -> float:
        return _share(self.answers)

    def row(self, length: int) -> list[float]:
        """Accuracy at each depth."""
        found = [x for x in self.answers if x.length == length]
        starts = range(0, len(found), self.samples)
        return [_share(found[start : start + self.samples]) for start in starts]

    def as_dict(self) -> dict[str, Any]:
        by_length = {
            length: {"accuracy": sum(row) / len(row), "by_depth": row}
            for length in self.lengths
            for row in [self.row(length)]
        }
        return {
            "task": TASK,
            **asdict(self),
            "accuracy": self.accuracy,
            "guess": 10.0**-DIGITS,
            "any_key": 1 / self.keys,
            "by_length": by_length,
            "answers": [asdict(x) | {"hit": x.hit} for x in self.answers],
        }

    def lines(self) -> list[str]:
        any_key = f", by saying any of the {self.keys} keys {1 / self.keys:.3f}"
        lines = [
            f"{self.model} on {TASK}: accuracy {self.accuracy:.3f} over {len(self.answers)} "
            f"prompts, {self.samples} of each length and depth",
            f"  accuracy by guessing {10.0**-DIGITS:.5f}{any_key if self.keys > 1 else ''}",
            f"  {'tokens':>9}{'all':>8}  by depth, 0 is the start",
            f"  {'':17}" + "".join(f"{_middle(at, self.depths):8.2f}" for at in range(self.depths)),
        ]
        for length in self.lengths:
            row = self.row(length)
            cells = "".join(f"{share:8.2f}" for share in (sum(row) / len(row), *row))
            lines.append(f"  {length:9,d}{cells}")
        return lines

    def draw(self, file: Path) -> None:
        """Write the heat map to a file."""
        name = "/".join(Path(self.model).parts[-2:])  # every run leaves its model in "final"
        draw_heat_map(
            file,
            [self.row(length) for length in self.lengths],
            columns=[f"{length:,}" for length in self.lengths],
            rows=[f"{_middle(at, self.depths):.2f}" for at in range(self.depths)],
            labels=("tokens of the prompt", "depth of the passkey"),
            title=f"{name}\n{self.accuracy:.1%} of {len(self.answers)} passkeys",
        )


def evaluate_passkey(
    checkpoint: Checkpoint,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: int = DEPTHS,
    samples: int = SAMPLES,
    keys: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    picture: Path | None = None,
    progress: bool = False,
) -> PasskeyResult:
    """Accuracy of any causal language model in recalling a passkey, by length and depth.

    There are n = depths · samples prompts of each length; the i-th has its key at depth
    (i + 0.5) / n. `picture` is a file for the heat map. Raises UserError when a prompt is too short
    for the keys, or when matplotlib is missing.
    """
    _check_numbers(depths, samples, keys)
    lengths = sorted(set(lengths or LENGTHS))
    if picture is not None:
        check_heat_map(picture)
    tokenizer, count = checkpoint.tokenizer(), depths * samples
    passkey(tokenizer, lengths[0], 0.0, Random(0), keys)  # raises before the model is loaded
    model = load_model(checkpoint, dtype).eval()
    if adopt(model):
        accelerate(model)
    check_positions(model, "--lengths", max(lengths), answer=ANSWER_TOKENS)
    answers = []
    with tqdm(
        total=count * sum(lengths), unit="token", unit_scale=True, disable=not progress
    ) as bar:
        for length in lengths:
            prompts = (
                passkey(tokenizer, length, _middle(i, count), Random(f"{seed} {length} {i}"), keys)
                for i in range(count)
            )
            for some in _groups(prompts, max(1, BATCH_TOKENS // length)):
                said = tokenizer.batch_decode(greedy_answers(model, some, bar))
                answers += [
                    Answer(length, x.depth, x.key, text) for x, text in zip(some, said, strict=True)
                ]
    sizes = lengths, depths, samples, keys, seed
    result = PasskeyResult(checkpoint.name, *sizes, answers)
    if picture is not None:
        result.draw(picture)
    return result


def _check_numbers(depths: int, samples: int, keys: int) -> None:
    for name, value in (("depths", depths), ("samples", samples), ("keys", keys)):
        if value < 1:
            raise UserError(f"--{name} (={value}) must be at least 1")
    if keys > 10**DIGITS:
        raise UserError(f"--keys (={keys}) must be at most {10**DIGITS}: all keys are different")


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, prompts: Sequence[Passkey], bar: tqdm | None = None
) -> list[list[int]]:
    """Greedy answers to prompts of equal length; each has as many tokens as its key."""
    ids = torch.tensor([x.prompt for x in prompts], device=device_of(model))
    logits, cache = read_in_pieces(model, ids, PIECE, bar=bar)
    said = [logits.argmax(-1)]
    for at in range(1, max(len(x.answer) for x in prompts)):
        read = ids.shape[1] + at - 1
        logits, cache = read_in_pieces(model, said[-1][:, None], PIECE, cache, read)
        said.append(logits.argmax(-1))
    rows = torch.stack(said, dim=1).tolist()
    return [row[: len(x.answer)] for row, x in zip(rows, prompts, strict=True)]


@torch.no_grad()
def read_in_pieces(
    model: PreTrainedModel,
    ids: Tensor,
    piece: int,
    cache: dict[str, Cache] | None = None,
    before: int = 0,
    bar: tqdm | None = None,
) -> tuple[Tensor, dict[str, Cache]]:
    """Logits [B, V] after the tokens [B, T], and the cache by its name.

    A pass reads `piece` tokens per row. `cache` holds the `before` tokens that were read before.
    Positions are given, because Bamba would begin each pass at 0.
    """
    cache = cache or {}
    for some in ids.split(piece, dim=1):
        end = before + some.shape[1]
        positions = torch.arange(before, end, device=ids.device).expand(len(ids), -1)
        output = model(
            input_ids=some, position_ids=positions, use_cache=True, logits_to_keep=1, **cache
        )
        cache, before = cache_in(output), end
        if bar is not None:
            bar.update(some.numel())
    return output.logits[:, -1], cache


def _middle(index: int, count: int) -> float:
    return (index + 0.5) / count


def _share(answers: Sequence[Answer]) -> float:
    return sum(x.hit for x in answers) / len(answers)


def _groups(prompts: Iterator[Passkey], size: int) -> Iterator[list[Passkey]]:
    while group := list(islice(prompts, size)):
        yield group
