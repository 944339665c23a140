"""What a run reads: its tokenizer, training text and held-out text."""

from itertools import islice

from supra.checkpoint.opening import find_checkpoint
from supra.data.packing import Block, check_tokenizer, collate
from supra.data.text import hub_name
from supra.uptrain.config import UptrainConfig
from supra.uptrain.data import BlockStream, held_out_blocks, training_documents


class RunData:
    """Opened once per process. Raises UserError for text or a tokenizer that cannot be used.

    `held_out` has the held-out blocks; `hub_text` is the hub name of the training text, or None.
    """

    def __init__(self, config: UptrainConfig, rank: int, world: int):
        self.settings, self.rank, self.world = config.data, rank, world
        self.tokenizer = find_checkpoint(config.student).tokenizer()
        check_tokenizer(self.tokenizer)
        self.held_out = held_out_blocks(config, self.tokenizer)
        self.documents = training_documents(config)
        self.hub_text = hub_name(config.data.path)

    def blocks(self, segments: int | None) -> BlockStream:
        """This process's blocks, from the start of its documents."""
        return self._stream(rank=self.rank, world=self.world, segments=segments)

    def calibration_batch(self, tokens: int) -> Block:
        """About `tokens` tokens from the start of the text, the same in every process."""
        count = max(1, tokens // self.settings.sequence_length)
        return collate(islice(self._stream(), count))

    def _stream(self, **part: int | None) -> BlockStream:
        settings = self.settings
        return BlockStream(
            self.documents,
            self.tokenizer,
            settings.sequence_length,
            min_document_tokens=settings.min_document_tokens,
            **part,
        )
