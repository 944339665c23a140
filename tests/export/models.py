"""Tiny converted models whose mixers are away from their start, as after training."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from supra.conversion.convert import convert
from supra.testing import tiny_checkpoint

ODD = {
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-3,
}


def converted(
    folder: Path, family: str, target: str, keep=(), dtype=None, positions="rope", **sizes
) -> Path:
    """A converted model, ready for `target`, in a folder of its own in `folder`."""
    sizes = {"num_hidden_layers": 3} | sizes
    tiny_checkpoint(folder / "base", family, **sizes)
    convert(
        folder / "base",
        folder / "rnn",
        export_ready=target,
        keep_attention=keep,
        attention_positions=positions,
        dtype=dtype,
    )
    shake(folder / "rnn")
    return folder / "rnn"


def shake(folder: Path) -> None:
    """Move every parameter of the mixers."""
    generator = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".mixer." in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = tensor + 0.2 * noise * (tensor.abs().mean() + 0.3)
        save_file(tensors, file, metadata={"format": "pt"})


def set_fields(folder: Path, **fields) -> None:
    """Write fields into a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
