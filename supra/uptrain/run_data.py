"""What a run reads: its tokenizer, training text and held-out text."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from supra.checkpoint.opening import find_checkpoint
from supra.data.packing import Block, check_tokenizer, collate
from supra.data.text import hub_name
from supra.uptrain.config import UptrainConfig
from supra.uptrain.data import BlockStream, held_out_blocks, training_documents
from supra.uptrain.lanes import Lanes, Stream
from supra.uptrain.mixture import Mixture
from supra.uptrain.passkey_rows import PasskeyRows


class RunData:
    """Opened once per process. Raises UserError for text or a tokenizer that cannot be used.

    `held_out` has the held-out blocks, and `documents` those of each training text that is read;
    `hub_texts` are the hub names of those texts, [] if one of them has none. `lanes`, `reader` and
    `readers` are as in `Lanes`.
    """

    def __init__(
        self, config: UptrainConfig, reader: int = 0, readers: int = 1, lanes: int | None = None
    ):
        self.settings = config.data
        workers = config.data.workers
        self.executor = ThreadPoolExecutor(workers) if workers else None
        self.share = {"lanes": lanes or readers, "reader": reader, "readers": readers}
        self.tokenizer = find_checkpoint(config.student).tokenizer()
        check_tokenizer(self.tokenizer)
        self.held_out = held_out_blocks(config, self.tokenizer)
        self.documents = training_documents(config)
        names = [hub_name(text.path) for text in config.data.read]
        self.hub_texts = list(dict.fromkeys(names)) if all(names) else []

    def rows(self, sequence_length: int, segments: int | None, setting: str) -> Lanes:
        """The run's rows, from the start of the text; see `BlockStream.cut`."""
        row = {"sequence_length": sequence_length, "segments": segments, "setting": setting}
        return Lanes(partial(self._stream, world=self.share["lanes"], **row), **self.share)

    def calibration_batch(self, tokens: int) -> Block:
        """About `tokens` tokens from the start of the text, the same in every process."""
        length = self.settings.sequence_length
        count = max(1, tokens // length)
        return collate(islice(self._stream(0, 1, sequence_length=length), count))

    def source_tokens(
        self, lanes: Lanes, accelerator: Accelerator, processes_of_a_row: int
    ) -> dict[str, int]:
        """The tokens that all processes have read of each source so far."""
        labels = [x.label for x in self.settings.sources]
        read = [lane.tokens for lane in lanes.own.values()] or [[0] * len(labels)]
        own = torch.tensor(read, device=accelerator.device).sum(0)
        counts = accelerator.reduce(own, reduction="sum") // processes_of_a_row
        return dict(zip(labels, counts.tolist(), strict=True))

    def close(self) -> None:
        """End the work on documents that are not needed any more."""
        if self.executor:
            self.executor.shutdown(wait=False, cancel_futures=True)

    def _stream(self, rank: int, world: int, **row: Any) -> Stream:
        settings, documents = self.settings, iter(self.documents)
        streams = []
        for text in settings.texts:
            name = f"the source {text.label}" if settings.sources else "the data"
            row |= {"rank": rank, "world": world, "name": name}
            if text.passkeys:
                drawn = {"keys": text.passkeys, "seed": settings.shuffle_seed or 0}
                streams.append(PasskeyRows(self.tokenizer, **drawn, **row))
            else:
                read = {"executor": self.executor}
                read["min_document_tokens"] = settings.min_document_tokens
                streams.append(BlockStream(next(documents), self.tokenizer, **read, **row))
        if not settings.sources:
            return streams[0]
        return Mixture(streams, settings.shares, seed=settings.shuffle_seed, rank=rank)
