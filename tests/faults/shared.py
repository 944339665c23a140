"""What the cases share: tiny models, texts and a run that was interrupted."""

import gzip
import json
import os
import signal
from pathlib import Path

TEXT = "the river runs to the sea and the bridge stands. "
RUN = """\
student: {folder}/rnn
teacher: {folder}/base
out: {folder}/run
data: {{path: {folder}/text.jsonl, sequence_length: 16}}
budget: {{tokens: 128}}
distill: {{optimizer: {{lr: 1.0e-3}}, schedule: {{warmup: 0}}, top_k: 4}}
batch: {{size: 2}}
precision: fp32
checkpoint: {{every: 1, keep: 2}}
"""
NAMES = ("base", "rnn", "hybrid", "gpt2", "gemma3", "qwen3_moe", "sharded", "ready", "stopped")


def build(folder: Path) -> None:
    """Everything, in `folder`."""
    from supra.conversion.convert import convert
    from supra.testing import tiny_checkpoint

    tiny_checkpoint(folder / "base")
    tiny_checkpoint(folder / "gpt2", "gpt2")
    tiny_checkpoint(folder / "gemma3", "gemma3_text")
    tiny_checkpoint(folder / "qwen3_moe", "qwen3_moe")
    convert(folder / "base", folder / "rnn", mixer="supra")
    convert(folder / "base", folder / "hybrid", mixer="supra", keep_attention=[1])
    convert(folder / "base", folder / "sharded", mixer="supra", shard_bytes=1e5)
    convert(folder / "base", folder / "ready", export_ready="qwen3_5")
    _write_texts(folder)
    _write_gguf(folder / "model.gguf")
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    _interrupted_run(folder)


def places(common: Path, here: Path) -> dict[str, Path]:
    """What stands in a command's {places}."""
    own = {name: here / name for name in ("model", "file", "out", "run")}
    texts = {"text": "text.txt", "jsonl": "text.jsonl", "yaml": "run.yaml", "gguf": "model.gguf"}
    shared = {name: common / file for name, file in texts.items()}
    root = Path(__file__).parents[2]
    return {"here": here, "root": root, **own, **shared, **{x: common / x for x in NAMES}}


def _write_texts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": TEXT * (3 + number % 4)} for number in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "text.txt").write_text(TEXT * 100)
    (folder / "text.jsonl").write_text(lines)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "text.parquet")


def _interrupted_run(folder: Path) -> None:
    """{stopped}: a run with a checkpoint of its second step of four, and its cache."""
    from supra.uptrain import load_config
    from supra.uptrain.loop import Run, train

    step = Run.train_step

    def stopped(run: Run) -> None:
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(run)

    Run.train_step = stopped
    out = folder / "stopped"
    overrides = [f"out={out}", f"distill.cache={folder / 'stopped' / 'cache'}"]
    train(load_config(folder / "run.yaml", overrides))


def _write_gguf(path: Path) -> None:
    """A Llama of two layers, as llama.cpp names its tensors, with a vocabulary of bytes."""
    import gguf
    import numpy as np

    hidden, heads, inner, words = 64, 4, 96, 260
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(words)
    _add_vocabulary(writer, words)
    random = np.random.default_rng(0)
    sizes = {
        "token_embd": (words, hidden), "output_norm": (hidden,), "output": (words, hidden),
    }  # fmt: skip
    for layer in range(2):
        block = {
            "attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden),
            "attn_output": (hidden, hidden), "attn_norm": (hidden,), "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
        }  # fmt: skip
        sizes |= {f"blk.{layer}.{name}": size for name, size in block.items()}
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(size).astype("float32") / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer, words: int) -> None:
    from gguf import TokenType

    special = ["<unk>", "<s>", "</s>", "▁"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(words - len(special))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    kinds += [TokenType.BYTE] * (words - len(special))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * words)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
