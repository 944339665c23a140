"""The settings of a run's texts: what it trains on, and what it holds out."""

from pydantic import Field

from supra.settings.model import Settings
from supra.uptrain.limits import BEAMS, PASS, PASSKEYS, SEED, TEXT


class SourceConfig(Settings):
    """One of the texts of a mixture."""

    path: str | None = Field(
        None,
        description="The text; takes what data.path takes. Either path or passkeys must be set.",
    )
    passkeys: int | None = Field(
        None,
        ge=1,
        le=PASSKEYS,
        description="Make the rows, in place of path: each hides this many numbers in a text as "
        "long as the row and asks for one of them at its end. Only the answers are learned.",
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=TEXT,
        description="Share of the run's tokens, relative to the other weights.",
    )
    name: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set to train on.")
    text_field: str | None = Field(
        None, description="Field of a record that holds the text; null: data.text_field."
    )
    recall: bool = Field(
        False,
        description="Rewrite the text so that passages and lists of keys and values return, as "
        "practice in recall.",
    )

    @property
    def label(self) -> str:
        """What the text is called in the log and in messages."""
        if self.passkeys:
            return f"passkeys ({self.passkeys})"
        split = None if self.split == "train" else self.split
        recall = "(recall)" if self.recall else None
        return " ".join(filter(None, [self.path, self.name, split, recall]))


class DataConfig(Settings):
    """Training text, and the held-out text, which is of at most one kind.

    The training text is either `path` or a mixture of `sources`. A row has tokens of one source
    alone, and over the run each source gets its share of the tokens, in epochs of its own.
    """

    path: str | None = Field(
        None,
        description="Training text: a hub data set, or a file, folder or glob pattern of .jsonl, "
        ".jsonl.gz, .txt or .parquet files. Either path or sources must be set.",
    )
    sources: tuple[SourceConfig, ...] | None = Field(
        None, description="Training texts with their weights, in place of path."
    )
    name: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set to train on.")
    text_field: str = Field(
        "text",
        description="Field of a record that holds the text, or a chat as a list of messages. Data "
        "without this field is read from the field messages.",
    )
    streaming: bool = Field(
        False, description="Read a hub data set while training instead of downloading it first."
    )
    sequence_length: int = Field(2048, ge=2, le=PASS, description="Tokens of a row.")
    shuffle_seed: int | None = Field(
        0, ge=0, le=SEED, description="Seed of the documents' order; null keeps the files' order."
    )
    workers: int = Field(
        0,
        ge=0,
        le=BEAMS,
        description="Threads of each process that tokenize the next documents while a step runs.",
    )
    shuffle_buffer: int = Field(
        10_000, ge=1, le=TEXT, description="Documents that are shuffled at a time when streaming."
    )
    min_document_tokens: int = Field(
        0, ge=0, le=TEXT, description="Shorter documents are not trained on."
    )
    eval_path: str | None = Field(
        None, description="Held-out text in another place; takes what data.path takes."
    )
    eval_split: str | None = Field(None, description="Split of the hub data set to hold out.")
    eval_documents: int = Field(
        0,
        ge=0,
        le=TEXT,
        description="Hold out the first documents of the training text, of every source.",
    )

    @property
    def texts(self) -> tuple[SourceConfig, ...]:
        """The training texts: the sources, or path as the only one."""
        if self.sources:
            return self.sources
        return (SourceConfig(path=self.path, name=self.name, split=self.split),)

    @property
    def read(self) -> tuple[SourceConfig, ...]:
        """The training texts that are read and not made."""
        return tuple(text for text in self.texts if not text.passkeys)

    @property
    def shares(self) -> list[float]:
        """The share of the tokens that each text gets; they add up to 1."""
        total = sum(text.weight for text in self.texts)
        return [text.weight / total for text in self.texts]
