"""A model that writes records to train on: texts, or chats.

A text begins at the start token or continues the beginning of a given text. A chat is asked for as
in Magpie (arXiv 2406.08464): a chat model that reads its template up to the user's words writes a
question, and then answers it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from supra.data.chat import render
from supra.data.packing import plain_tokens, start_tokens, text_tokens
from supra.data.text import open_documents
from supra.errors import UserError
from supra.model.offload import device_of
from supra.serving.draft import Counted

MARK = "supra-marks-this-place"  # stands for a message in a template


@dataclass(frozen=True)
class Sampling:
    """What is written, and how.

    tokens: of all records together, as the model read or wrote them; the last record is whole.
    batch: records that are written at once.
    length: tokens of a record at most. A text ends there; a chat that has not ended is left out.
    temperature, top_p: of the distribution that tokens are drawn from.
    chat: write a question and its answer instead of a text.
    prefixes, prefix_tokens: where to find texts, and how many of the first tokens of each to
        continue from; shorter texts are left out. Without prefixes, a text begins at the start
        token.
    """

    tokens: int
    batch: int = 32
    length: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    prefixes: str | None = None
    prefix_tokens: int = 32
    text_field: str = "text"


class Written(NamedTuple):
    """What the model wrote behind a prompt, without the token that ends it."""

    tokens: list[int]
    ended: bool


class Writer(ABC):
    """Writes batches of records; a subclass says what a record is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Sampling):
        self.tokenizer, self.settings = tokenizer, settings
        self.ends = {tokenizer.eos_token_id}

    def use(self, model: PreTrainedModel) -> None:
        """Take this model. Its tokens of the end count, and nothing else that its own settings say
        of sampling."""
        ends = model.generation_config.eos_token_id
        self.ends |= {ends} if isinstance(ends, int) else set(ends or ())
        model.generation_config = GenerationConfig()
        self.model = model

    @abstractmethod
    def prompts(self, skip: int) -> Iterator[list[int]]:
        """The tokens that each record begins with, without the first `skip` records."""

    @abstractmethod
    def write(self, prompts: Sequence[list[int]], bar: tqdm) -> list[Counted]:
        """A record behind each prompt. Those that came to nothing are left out."""

    def _go_on(self, prompts: Sequence[list[int]], bar: tqdm) -> list[Written]:
        """What the model writes behind each prompt, up to settings.length tokens in all."""
        longest, settings = max(map(len, prompts)), self.settings
        gaps = [longest - len(prompt) for prompt in prompts]
        rows = [[*[0] * gap, *prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
        mask = [[*[0] * gap, *[1] * (longest - gap)] for gap in gaps]
        ends, device = sorted(self.ends), device_of(self.model)
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=settings.length - longest,
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            eos_token_id=ends,
            pad_token_id=ends[0],
            stopping_criteria=[_Progress(bar, torch.tensor(ends, device=device))],
        )
        return [self._until_end(row) for row in output[:, longest:].tolist()]

    def _until_end(self, tokens: list[int]) -> Written:
        end = next((n for n, token in enumerate(tokens) if token in self.ends), None)
        return Written(tokens[:end], ended=end is not None)


class TextWriter(Writer):
    """Texts, which may end at settings.length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Sampling):
        super().__init__(tokenizer, settings)
        self.start = start_tokens(tokenizer)
        if settings.prefixes is None and not self.start:
            bos = tokenizer.bos_token_id
            self.start = [tokenizer.eos_token_id if bos is None else bos]

    def prompts(self, skip: int) -> Iterator[list[int]]:
        if self.settings.prefixes is None:
            return repeat(self.start)
        return islice(self._prefixes(), skip, None)

    def _prefixes(self) -> Iterator[list[int]]:
        """The beginnings of the texts, over and over."""
        path, size = self.settings.prefixes, self.settings.prefix_tokens
        documents = open_documents(path, self.settings.text_field)
        found = True
        while found:
            found = False
            for text in documents.epoch(0):
                tokens = text_tokens(self.tokenizer, text)[:size]
                if len(tokens) == size:
                    found = True
                    yield [*self.start, *tokens]
        raise UserError(
            f"--prefix-tokens (={size}): no text of {path} has as many tokens: lower it, or give "
            "longer texts"
        )

    def write(self, prompts: Sequence[list[int]], bar: tqdm) -> list[Counted]:
        found = []
        for prompt, written in zip(prompts, self._go_on(prompts, bar), strict=True):
            tokens = [*prompt[len(self.start) :], *written.tokens]
            # a text that is cut may end within a character
            text = self.tokenizer.decode(tokens).rstrip("\ufffd")
            if text.strip():
                found.append(({"text": text}, len(tokens) + written.ended))
        return found


class ChatWriter(Writer):
    """Chats of one question and one answer, both the model's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Sampling):
        super().__init__(tokenizer, settings)
        self.opening = self._before({"role": "user", "content": MARK})
        self._before({"role": "user", "content": "?"}, {"role": "assistant", "content": MARK})

    def _before(self, *messages: dict[str, str]) -> list[int]:
        """The tokens before the last message, which is MARK. The special token behind it ends what
        the model writes there."""
        whose = f"the {messages[-1]['role']}'s words"
        before, mark, after = render(self.tokenizer, messages).rpartition(MARK)
        if not mark:
            raise UserError(f"--chat: the chat template leaves out {whose}")
        behind = set(plain_tokens(self.tokenizer, after.lstrip())[:1])
        if not behind <= set(self.tokenizer.added_tokens_decoder):
            raise UserError(
                f"--chat: no special token ends {whose} in the chat template (it goes on with "
                f"{after[:20]!r}), so the model would write on: give another model"
            )
        self.ends |= behind
        return plain_tokens(self.tokenizer, before.rstrip(" "))

    def prompts(self, skip: int) -> Iterator[list[int]]:
        if len(self.opening) >= self.settings.length:
            raise UserError(
                f"--length (={self.settings.length}) has no room for the {len(self.opening)} "
                "tokens before the user's words in the chat template: raise it"
            )
        return repeat(self.opening)

    def write(self, prompts: Sequence[list[int]], bar: tqdm) -> list[Counted]:
        chats = [
            [{"role": "user", "content": words}]
            for written in self._go_on(prompts, bar)
            if (words := self._words(written))
        ]
        asked = [
            (chat, tokens)
            for chat in chats
            if len(tokens := self._asked(chat)) < self.settings.length
        ]
        if not asked:
            return []
        answers = self._go_on([tokens for _, tokens in asked], bar)
        return [
            ({"messages": [*chat, {"role": "assistant", "content": words}]},
             len(tokens) + len(written.tokens) + 1)
            for (chat, tokens), written in zip(asked, answers, strict=True)
            if (words := self._words(written))
        ]  # fmt: skip

    def _asked(self, chat: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of a question up to where its answer begins."""
        return plain_tokens(self.tokenizer, render(self.tokenizer, chat, prompt=True))

    def _words(self, written: Written) -> str:
        """What a message says; "" for one that has not ended."""
        words = self.tokenizer.decode(written.tokens, skip_special_tokens=True).strip()
        return words if written.ended else ""


class _Progress(StoppingCriteria):
    """Counts the tokens that are written, and stops nothing."""

    def __init__(self, bar: tqdm, ends: Tensor):
        self.bar, self.ends = bar, ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        writing = ~torch.isin(input_ids[:, -1], self.ends)
        self.bar.update(int(writing.sum()))
        return torch.zeros_like(writing)
