"""A file of records that a model writes itself, to train on.

Batch n is written with a seed of its own, so an interrupted run continues with the next batch, and
its file is the same as without the interruption.
"""

import math
import random
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from supra.checkpoint.files import fingerprint
from supra.checkpoint.opening import Checkpoint
from supra.data.packing import check_tokenizer
from supra.data.text import local_files
from supra.errors import UserError
from supra.model.loading import load_model
from supra.model.positions import check_positions
from supra.serving.draft import Draft, opened
from supra.serving.writers import ChatWriter, Sampling, TextWriter, Writer

IDLE = 10  # batches without a record, after which a run gives up
SHORTEST = 8  # tokens that a record leaves the model to write, at least


def sample(
    checkpoint: Checkpoint, out: Path, settings: Sampling, dtype: torch.dtype | None = None
) -> None:
    """Write JSON lines, each with a text or with messages, to the new file `out`.

    The same call continues what an earlier one began. Raises UserError for settings that do not fit
    the model, and when the model writes nothing.
    """
    _check(settings)
    if out.suffix != ".jsonl":
        raise UserError(f"--out (={out}) is a file of JSON lines: its name must end in .jsonl")
    tokenizer = checkpoint.tokenizer()
    check_tokenizer(tokenizer)
    writer = (ChatWriter if settings.chat else TextWriter)(tokenizer, settings)
    with opened(out, _origin(checkpoint, settings, dtype)) as draft:
        if draft.tokens < settings.tokens:
            model = load_model(checkpoint, dtype).eval()
            check_positions(model, "--length", settings.length)
            writer.use(model)
            _write(writer, draft, settings)
        draft.finish(settings.tokens)


def _write(writer: Writer, draft: Draft, settings: Sampling) -> None:
    """Write batches until there are enough tokens."""
    prompts = writer.prompts(skip=draft.batches * settings.batch)
    with tqdm(
        total=settings.tokens,
        initial=draft.tokens,
        unit="tok",
        unit_scale=True,
        mininterval=1 if sys.stderr.isatty() else 30,  # a log file needs no more
    ) as bar:
        while draft.tokens < settings.tokens:
            if draft.idle == IDLE:
                raise UserError(
                    f"the model ended none of the last {IDLE * settings.batch} records within "
                    f"--length (={settings.length}) tokens: raise it, or give another model"
                )
            torch.manual_seed(_seed(settings.seed, draft.batches))
            draft.add(writer.write(list(islice(prompts, settings.batch)), bar))
            bar.n = min(draft.tokens, settings.tokens)  # without what is left out
            bar.refresh()


def _seed(seed: int, batch: int) -> int:
    """The seed of a batch, of 32 bits: torch's generator of the CPU takes no more."""
    return random.Random(f"{seed} {batch}").getrandbits(32)


def _origin(
    checkpoint: Checkpoint, settings: Sampling, dtype: torch.dtype | None
) -> dict[str, Any]:
    """All that the records depend on; the number of tokens only says where they end."""
    found = {name: value for name, value in asdict(settings).items() if name != "tokens"}
    if settings.prefixes is not None and (files := local_files(settings.prefixes)):
        found["prefixes"] = fingerprint(files)
    model = f"{checkpoint.fingerprint()} {checkpoint.tokenizer_fingerprint()}"
    return {"model": model, "dtype": str(dtype), **found}


def _check(settings: Sampling) -> None:
    temperature, top_p = settings.temperature, settings.top_p
    if not 0 < temperature < math.inf:
        raise UserError(f"--temperature (={temperature}) must be finite and > 0")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p (={top_p}) must be > 0 and <= 1")
    if settings.chat and settings.prefixes is not None:
        raise UserError(
            f"--prefixes (={settings.prefixes}) is for texts: leave it out, or leave out --chat"
        )
    least = SHORTEST + (0 if settings.prefixes is None else settings.prefix_tokens)
    if settings.length < least:
        more = "" if settings.prefixes is None else " more than --prefix-tokens"
        raise UserError(
            f"--length (={settings.length}) must be at least {SHORTEST} tokens{more}, so >= {least}"
        )
