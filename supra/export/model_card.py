"""The model card of an exported model."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from supra.checkpoint.card import CARD, TAGS, read_card

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

here = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)
prompt = tokenizer("The state is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```
"""


def write_card(folder: Path, source: Path, name: str, lines: list[str], command: str) -> None:
    """Write the card of an export into `folder`, with the metadata of the card in `source`.

    name: of the exported model. lines: what the export did. command: repeats it.
    """
    card = read_card(source / CARD)
    data = card.data if card else ModelCardData(tags=TAGS, library_name="transformers")
    text = f"""
# {name}

A recurrent network that was made from a transformer with supra, rewritten as an architecture that
transformers and other engines know. It needs no code of supra.

{"".join(f"- {line}{chr(10)}" for line in lines)}
## Use

{USE}
## How it was made

```
{command}
```
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / CARD)
