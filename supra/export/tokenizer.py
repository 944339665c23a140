"""The tokenizer of an exported model, which must read texts as before under another model_type."""

import json
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from supra.checkpoint.opening import Checkpoint
from supra.checkpoint.untrusted import LICENSE_FILES, copy_data, drop_code
from supra.errors import UserError

CONFIG = "tokenizer_config.json"
GENERIC = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, in every version


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer with its chat templates, and copy generation config and licence.

    transformers chooses a tokenizer's class by the model's type as well. The generic class reads
    the file as it is, whatever the type.
    """
    for line in copy_data(checkpoint.folder, folder, ("generation_config.json", *LICENSE_FILES)):
        tqdm.write(line)
    if not any(checkpoint.folder.glob("tokenizer*")):
        tqdm.write(f"{checkpoint.name} has no tokenizer: the exported model has none either")
        return
    tokenizer = checkpoint.tokenizer()
    tokenizer.save_pretrained(folder)
    drop_code(folder)
    if tokenizer.is_fast:
        file = folder / CONFIG
        fields = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": GENERIC}
        file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(checkpoint: Checkpoint, folder: Path, tokens: Tensor) -> None:
    """Raise UserError unless the written tokenizer gives a text the same tokens."""
    if not (folder / CONFIG).exists():
        return
    tokenizer = checkpoint.tokenizer()
    again = Checkpoint(checkpoint.name, folder).tokenizer()
    text = tokenizer.decode(tokens[0])
    same = tokenizer(text)["input_ids"] == again(text)["input_ids"]
    if not same or tokenizer.chat_template != again.chat_template:
        raise UserError(
            f"the tokenizer of {checkpoint.name!r} reads a text otherwise under the new "
            "architecture: give it a tokenizer.json, as save_pretrained writes it"
        )
