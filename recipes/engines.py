"""Converted models in other engines: how far their logits are from ours.

    python recipes/engines.py            (after make test-engines, which installs the engines)

A tiny random teacher of each form is converted, its mixers are moved away from their start, and it
is exported in float32. The table in docs/engines.md has the largest difference of logits, relative
to the largest logit: 160 tokens at once, and 8 more one by one. An engine that is not installed is
left out.
"""

import importlib.util
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from supra.checkpoint.files import replace_between
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.errors import command
from supra.export import llama_cpp
from supra.export.comparison import PROMPT, Difference, difference, sample
from supra.export.export import export
from supra.export.gguf.export import export_gguf
from supra.export.llama_cpp import LlamaCpp
from supra.testing import tiny_checkpoint

PAGE = Path("docs/engines.md")
LAYERS = 4
GREEDY = 64  # tokens of text that are compared


class Form(NamedTuple):
    """A form of recurrent layers, in a teacher that keeps these attention layers."""

    target: str | None  # of folders; None has no class in transformers
    family: str
    mixer: str
    options: dict[str, str]
    keep: tuple[int, ...] = ()


FORMS = (
    Form("qwen3_5", "llama", "gated_deltanet", {}),
    Form("qwen3_5", "qwen3", "gated_deltanet", {}, (1, 3)),
    Form("granite", "llama", "mamba2", {"form": "granite"}),
    Form("granite", "llama", "mamba2", {"form": "granite"}, (1, 3)),
    Form(None, "llama", "rwkv", {"form": "qrwkv"}),
    Form(None, "qwen2", "rwkv", {"form": "qrwkv"}),
)
COLUMNS = ("layers", "teacher", "attention kept", "transformers", "llama.cpp", "greedy text", "MLX")


@command
def main() -> None:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            cells = row(form, Path(folder))
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    versions = [f"transformers {version('transformers')}", f"torch {torch.__version__}"]
    versions += [llama_cpp.version()] if llama_cpp.is_installed() else []
    versions += [f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"] if has_mlx() else []
    replace_between(PAGE, "engines", "\n".join([*lines, "", f"{'; '.join(versions)}; on a CPU."]))


def row(form: Form, folder: Path) -> list[str]:
    """The cells of one form."""
    torch.manual_seed(0)
    tiny_checkpoint(folder / "base", form.family, num_hidden_layers=LAYERS)
    chosen = {"mixer": form.mixer, "options": form.options, "keep_attention": form.keep}
    convert(folder / "base", folder / "start", export_ready=form.target or "gguf", **chosen)
    move(folder)
    idle = form.target is not None and not form.keep
    cells = [f"`{form.mixer}`", form.family, f"{len(form.keep)} of {LAYERS}", "no class of it"]
    if form.target is not None:
        served = export(folder / "rnn", folder / "served", to=form.target, idle_attention=idle)
        cells[3] = differences(served.difference)
    if llama_cpp.is_installed():
        file = folder / "rnn.gguf"
        made = export_gguf(folder / "rnn", file, type="f32", idle_attention=idle)
        cells += [differences(made.difference), greedy(folder, file)]
    else:
        cells += ["not run", "not run"]
    runs = form.target == "qwen3_5" and has_mlx()
    return [*cells, differences(in_mlx(folder)) if runs else "does not fit"]


def move(folder: Path) -> None:
    """Write the converted model with other parameters of the mixers."""
    checkpoint = find_checkpoint(str(folder / "start"))
    model = checkpoint.model()
    for name, weight in model.named_parameters():
        if ".mixer." in name:
            weight.data += 0.2 * torch.randn_like(weight) * (weight.abs().mean() + 0.3)
    model.save_pretrained(folder / "rnn")
    checkpoint.tokenizer().save_pretrained(folder / "rnn")


def differences(found: Difference) -> str:
    return f"{found.prompt:.1e}, {found.steps:.1e}"


def greedy(folder: Path, file: Path) -> str:
    """How many of the tokens that both write after the same text are the same."""
    tokens = sample(find_checkpoint(str(folder / "rnn")), None, "text")
    model = find_checkpoint(str(folder / "rnn")).model(torch.float32).eval()
    chosen = {"max_new_tokens": GREEDY, "do_sample": False, "eos_token_id": None}
    ours = model.generate(tokens, **chosen)[0, tokens.shape[1] :].tolist()
    with LlamaCpp(file, context=tokens.shape[1] + GREEDY) as engine:
        theirs = engine.generate(tokens[0].tolist(), GREEDY)
    return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {GREEDY} tokens"


def has_mlx() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


@torch.no_grad()
def in_mlx(folder: Path) -> Difference:
    """The difference in MLX, from the exported folder."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    checkpoint = find_checkpoint(str(folder / "rnn"))
    tokens = sample(checkpoint, None, "text")
    expected = checkpoint.model(torch.float32).eval()(tokens).logits[0]
    engine, _ = load_model(folder / "served", model_config={"model_type": "qwen3_5"})
    cache, found = make_prompt_cache(engine), []
    for part in (tokens[0, :PROMPT], *tokens[0, PROMPT:].split(1)):
        found.append(torch.tensor(engine(mx.array([part.tolist()]), cache=cache)[0].tolist()))
    return difference(expected, torch.cat(found))


if __name__ == "__main__":
    main()
