"""The model card of a converted checkpoint: README.md, as the hub reads it."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from tqdm import tqdm
from transformers.utils import cached_file

from supra.checkpoint.conversion_report import ConversionReport, describe_layers
from supra.checkpoint.untrusted import belongs
from supra.errors import UserError

CARD = "README.md"
CARD_BYTES = 2**20  # three times the size of the largest cards on the hub
TAGS = ["supra", "recurrent", "linear-attention"]
TEXTS = ("license", "license_name", "license_link", "library_name", "pipeline_tag")
LISTS = ("language", "tags", "datasets", "base_model", "metrics")  # lists of strings, or a string
# a pattern in the first lines of a licence -> the hub's name of the licence
LICENSES = {
    r"apache license\s+version 2\.0": "apache-2.0",
    r"mit license": "mit",
    r"gnu general public license\s+version 3": "gpl-3.0",
    r"bsd 3-clause": "bsd-3-clause",
}

LOADING = """\
```python
import supra  # pip install supra-rnn; registers the classes with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

here = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)
prompt = tokenizer("The state is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

Tools that cannot import supra pass `trust_remote_code=True`: `modeling_supra.py` then imports the
installed package.
"""
UPTRAINING, MEASURED = "\n## Uptraining\n", "\n## Beside its teacher\n"


def write_card(
    folder: Path,
    report: ConversionReport,
    *,
    teacher_folder: Path,
    hub_id: str | None,
    state: tuple[int, int],
) -> None:
    """Write the card of a fresh conversion.

    Args:
        folder: the converted checkpoint.
        report: the report of its conversion.
        teacher_folder: the folder with the teacher's own card and licence.
        hub_id: the teacher's hub id, which the card links to; None if it has none.
        state: bytes of one sequence's state: a constant part, and the growth per token.
    """
    name = Path(report.teacher).name  # the card is published, so it must not show the user's paths
    teacher = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{name}`"
    data = ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *report.options],
        **teacher_metadata(teacher_folder),
    )
    text = f"""
# {name} as a recurrent network

{teacher} (`{report.family}`) with other mixers in place of softmax(QKᵀ)V, converted with supra
([Linearizing Large Language Models](https://arxiv.org/abs/2405.06640)): \
{describe_layers(report.layers)}.

{_options(report.options)}Parameters: {report.values("copied", "transformed"):,} inherited, \
{report.values("new"):,} new. `conversion.json` lists what became of every tensor.

{_state(*state)}

{_use(report)}"""
    _card(data, text).save(folder / CARD)


def write_untrained_card(folder: Path, report: ConversionReport, state: tuple[int, int]) -> None:
    """Write the card of a model that starts from random weights; `state` as in `write_card`."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *report.options],
    )
    text = f"""
# A `{report.family}` from scratch

A language model of the family `{report.family}`, made with supra: {describe_layers(report.layers)}.
It starts from random weights and has no teacher.

{_options(report.options)}Parameters: {report.values("new"):,}.

{_state(*state)}

{_use(report)}"""
    _card(data, text).save(folder / CARD)


def update_card(
    folder: str | Path,
    *,
    tokens: int,
    results: Mapping[str, Mapping[str, float]],
    datasets: Sequence[str] = (),
) -> None:
    """Replace the section on uptraining in the card of `folder`.

    What was measured before the training is left out. A folder without a card stays as it is,
    because a student need not come from `supra convert`.

    Args:
        tokens: the number of tokens that the model was trained on.
        results: a table, by row (a model, such as "teacher") and column (a measure).
        datasets: the hub names of the training texts; () for text that is not on the hub.
    """
    path = Path(folder) / CARD
    card = read_card(path)
    if card is None:
        return
    if datasets:
        card.data.datasets = list(datasets)
    text = _without(card.text.split(UPTRAINING)[0], MEASURED).rstrip("\n") + f"\n{UPTRAINING}\n"
    of = f" of {' and '.join(datasets)}" if datasets else ""
    text += f"Trained on {tokens:,} tokens{of}.\n"
    if results:
        measures = list(dict.fromkeys(name for row in results.values() for name in row))
        rows = [
            [model, *(f"{row[name]:,.2f}" if name in row else "" for name in measures)]
            for model, row in results.items()
        ]
        text += "\n" + _table(["", *measures], rows) + "\n"
    card.text = text
    card.save(path)


def check_card(folder: Path) -> None:
    """Raise UserError unless the folder has a card that can be written to."""
    if read_card(folder / CARD) is None:
        raise UserError(f"{folder} has no {CARD} that can be read: add one, or leave out --card")


def write_measured(folder: Path, text: str) -> None:
    """Replace the section of the card that compares the model with its teacher."""
    check_card(folder)
    card = read_card(folder / CARD)
    card.text = _without(card.text, MEASURED).rstrip("\n") + f"\n{MEASURED}\n{text}\n"
    card.save(folder / CARD)


def carry_card(source: str, folder: str | Path, *, local_files_only: bool = True) -> None:
    """Copy the card of the checkpoint `source`, a folder or a hub id, into `folder`.

    It replaces the placeholder that transformers writes for an upload, but keeps the placeholder's
    tags. A card that supra wrote stays, because the user may have edited it.
    """
    target = Path(folder) / CARD
    placeholder = read_card(target)
    tags = (placeholder.data.tags or []) if placeholder else []
    if "supra" in tags:
        return
    found = None
    with suppress(OSError):  # `source` may be neither a folder nor a hub id
        found = source and cached_file(
            source,
            CARD,
            local_files_only=local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    card = read_card(Path(found)) if found else None
    if card is not None:
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(target)


def read_card(path: Path) -> ModelCard | None:
    """The card in a file; None if it is missing or cannot be read.

    A bad card must not stop a conversion: fields that the hub would refuse are left out, with a
    message.
    """
    if not path.exists():
        return None
    try:
        text = _card_text(path)
    except (OSError, ValueError) as error:  # invalid UTF-8 is a ValueError
        tqdm.write(f"{path.name} is left out: {_one_line(error)}")
        return None
    match = REGEX_YAML_BLOCK.search(text)
    body = text[match.end() :] if match else text
    try:
        fields = (yaml.safe_load(match[2]) if match else None) or {}
        kept = {name: x for name, x in fields.items() if _fits(name, x)}
        if lost := [str(name) for name in fields if name not in kept]:
            tqdm.write(f"{path.name} is used without its {', '.join(lost)}: not valid on the hub")
            text = f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n{body}"
        card = ModelCard(text, ignore_metadata_errors=True)
        card.data.to_yaml()  # raises here for fields that could not be written later
        return card
    except Exception as error:  # PyYAML and the hub's library raise a dozen kinds
        tqdm.write(f"{path.name} is used without its front matter: {_one_line(error)}")
        return _card(ModelCardData(), body)


def teacher_metadata(folder: Path) -> dict[str, str | list[str]]:
    """Licence and languages for the front matter, from the card or from the licence file."""
    found = {}
    if card := read_card(folder / CARD):
        names = ("license", "license_name", "license_link", "language")
        found = {name: card.data.get(name) for name in names if card.data.get(name)}
    files = [file for file in sorted(folder.glob("LICENSE*")) if file.is_file()]
    if "license" in found or not files or not belongs(files[0], folder):
        return found
    try:
        with files[0].open("rb") as file:
            head = file.read(500).decode(errors="replace").strip()
    except PermissionError:  # copying reports it
        return found
    for pattern, name in LICENSES.items():
        if re.search(pattern, head, re.IGNORECASE):
            return found | {"license": name}
    name = re.sub(r"[^a-z0-9.]+", "-", head.split("\n")[0].lower()).strip("-")
    return found | {"license": "other", "license_name": name, "license_link": files[0].name}


def _card_text(path: Path) -> str:
    if not belongs(path, path.parent):
        raise ValueError("it is a link that leads out of the folder")
    if not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        data = file.read(CARD_BYTES + 1)
    if len(data) > CARD_BYTES:
        raise ValueError(f"it has more than {CARD_BYTES:,} bytes")
    return data.decode("utf-8")


def _fits(name: object, value: object) -> bool:
    """Whether a field of the front matter has the type that the hub expects."""
    if name in LISTS and isinstance(value, list):
        return all(isinstance(x, str) for x in value)
    if name in (*TEXTS, *LISTS):
        return value is None or isinstance(value, str)
    return isinstance(name, str)


def _without(text: str, heading: str) -> str:
    """The text without the section of that heading."""
    before, found, section = text.partition(heading)
    _, following, after = section.partition("\n## ")
    return before + following + after if found else text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _card(data: ModelCardData, text: str) -> ModelCard:
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _use(report: ConversionReport) -> str:
    """How to load the model, and the command that made it."""
    return f"""## Use

{LOADING}
## How it was made

```
{report.command}
```
"""


def _options(options: Mapping[str, Mapping]) -> str:
    lines = [
        f"`{name}`: " + ", ".join(f"{key} {value}" for key, value in chosen.items()) + ".\n\n"
        for name, chosen in options.items()
        if chosen
    ]
    return "".join(lines)


def _state(constant: int, growth: int) -> str:
    if not growth:
        return f"The state of a sequence has {constant:,} bytes, however long the sequence is."
    return (
        f"The state of a sequence has {constant:,} bytes, and {growth:,} more for every token: the "
        "layers with softmax attention keep all tokens, or those within their window."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
