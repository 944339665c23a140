"""Continue a prompt on the terminal, token by token."""

import math

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer, set_seed

from supra.checkpoint.opening import Checkpoint
from supra.data.packing import start_tokens, text_tokens
from supra.errors import UserError, foreign_errors
from supra.model.compiled_decoding import check_compilable, compiled_decoding
from supra.model.loading import load_model
from supra.model.offload import device_of


def stream_text(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    compile: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Print the continuation as it comes; with beams, when it is done."""
    _check(max_new_tokens, temperature, top_p, beams, seed)
    if compile and beams > 1:
        raise UserError(
            f"--compile with --beams (={beams}): transformers compiles no search with beams: leave "
            "one of the two out"
        )
    _check_prompt(prompt)
    tokenizer = checkpoint.tokenizer()
    encoded = _encode(tokenizer, checkpoint.name, prompt, chat)
    model = load_model(checkpoint, dtype).eval()
    if compile:
        check_compilable(model, "--compile")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **encoded.to(device_of(model)),
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        streamer=streamer if beams == 1 else None,
        **(sampling if temperature > 0 else {"do_sample": False}),
        **(compiled_decoding() if compile else {}),
    )
    if beams > 1:
        new = output[0, encoded["input_ids"].shape[1] :]
        print(tokenizer.decode(new, skip_special_tokens=True))


def _check(max_new_tokens: int, temperature: float, top_p: float, beams: int, seed: int) -> None:
    for name, value, holds, rule in (
        ("max-new-tokens", max_new_tokens, max_new_tokens >= 1, ">= 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "finite and >= 0"),
        ("top-p", top_p, 0 < top_p <= 1, "> 0 and <= 1"),
        ("beams", beams, beams >= 1, ">= 1"),
        ("seed", seed, 0 <= seed < 2**32, f">= 0 and < {2**32}"),
    ):
        if not holds:
            raise UserError(f"--{name} (={value}) must be {rule}")
    if top_p < 1 and temperature == 0:
        raise UserError(
            f"--top-p (={top_p}) changes nothing at --temperature 0, which takes the likeliest "
            "token: set a temperature > 0, or leave it out"
        )


def _check_prompt(prompt: str) -> None:
    """Invalid UTF-8 on a command line arrives as surrogates, which do not encode."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt is not UTF-8 after {error.start} characters: give it in that encoding"
        ) from None


def _encode(
    tokenizer: PreTrainedTokenizerBase, name: str, prompt: str, chat: bool
) -> BatchEncoding:
    """The prompt's tokens after the tokenizer's start tokens, without its end tokens; or those of a
    chat with the prompt as the user's message, as its template writes it."""
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"--chat: the tokenizer of {name} has no chat template")
        messages = [{"role": "user", "content": prompt}]
        with foreign_errors(f"--chat: the chat template of {name} does not work"):
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        if encoded["input_ids"].shape[1] == 0:
            raise UserError(f"--chat: the chat template of {name} leaves nothing of the prompt")
    else:
        ids = torch.tensor([[*start_tokens(tokenizer), *text_tokens(tokenizer, prompt)]])
        encoded = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if encoded["input_ids"].shape[1] == 0:
        raise UserError("--prompt is empty: give at least one token")
    return encoded
