"""A tokenizer of transformers as the fields of a GGUF file.

llama.cpp has two kinds of tokenizers that merge pairs: `gpt2` works on bytes, after a regular
expression has split the text into words, and `llama` on characters, as SentencePiece does. It knows
the regular expressions by name, so a tokenizer with another one cannot be written.
"""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from supra.errors import UserError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's kinds of tokens

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
# The regular expressions of llama.cpp that families of transformers use, by llama.cpp's names.
REGEXES = {
    _CONTRACTIONS + _WORDS % r"\p{N}" + _SPACES: "qwen2",
    _CONTRACTIONS + _WORDS % r"\p{N}{1,3}" + _SPACES: "llama-bpe",
    _CONTRACTIONS
    + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + _SPACES: "qwen35",
    _CASED % ("", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES: "tekken",
    _CASED % (("(?i:'s|'t|'re|'ve|'m|'ll|'d)?",) * 2)
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _SPACES: "gpt-4o",
}
# llama.cpp's name for the same regular expression, for a word that is one token whatever its merges
# say ("ignore_merges"), and for one that is not
_IGNORES_MERGES = {"llama-bpe": True, "tekken": True}
_WITHOUT = {"llama-bpe": "smaug-bpe"}


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """The fields `tokenizer.*` of a GGUF file, for a model with `size` embeddings.

    Raises UserError for a tokenizer that llama.cpp does not know.
    """
    if not tokenizer.is_fast:
        raise UserError("only tokenizers with a tokenizer.json are written to GGUF")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if (kind := parts["model"]["type"]) != "BPE":
        raise UserError(f"tokenizers of type {kind} are not written to GGUF: only BPE is")
    characters = _works_on_characters(parts)
    fields = _characters(parts) if characters else {"ggml.model": "gpt2", "ggml.pre": _pre(parts)}
    words, kinds = _words(tokenizer, parts, size, characters)
    fields |= {"ggml.tokens": words, "ggml.token_type": kinds}
    merges = [x if isinstance(x, str) else " ".join(x) for x in parts["model"]["merges"]]
    if characters:
        fields["ggml.scores"] = _scores(words, merges)
    else:
        fields["ggml.merges"] = merges
    fields |= _special(tokenizer)
    if isinstance(tokenizer.chat_template, str):
        fields["chat_template"] = tokenizer.chat_template
    return {f"tokenizer.{name}": value for name, value in fields.items()}


def _steps(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer; `inside` is the key of a sequence's steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for x in part[inside] for step in _steps(x, inside)]


def _works_on_characters(parts: dict[str, Any]) -> bool:
    """Whether it is a tokenizer after SentencePiece, which keeps characters and bytes apart."""
    return parts["model"].get("byte_fallback", False)


def _characters(parts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a tokenizer after SentencePiece. Raises UserError for one that changes more
    than spaces."""
    steps = _steps(parts["normalizer"], "normalizers")
    steps += _steps(parts["pre_tokenizer"], "pretokenizers")
    known = ("Prepend", "Replace", "Metaspace", "Split")
    if other := [step["type"] for step in steps if step["type"] not in known]:
        raise UserError(f"a tokenizer with the step {other[0]} is not written to GGUF")
    spaced = any(
        step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never"
        for step in steps
    )
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.add_space_prefix": spaced}


def _pre(parts: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer on bytes splits a text into words."""
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        raise UserError(f"a tokenizer whose words are split by {kinds} is not written to GGUF")
    name = None
    if last["use_regex"]:
        if kinds == ["ByteLevel"]:
            name = "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            name = "smollm"
    elif kinds == ["Split", "ByteLevel"]:
        name = REGEXES.get(steps[0]["pattern"].get("Regex"))
    ignores = parts["model"].get("ignore_merges", False)
    if name is not None and ignores != _IGNORES_MERGES.get(name, False):
        name = _WITHOUT.get(name)
    if name is None:
        raise UserError(
            f"llama.cpp has no name for how this tokenizer splits words: {shown(steps)}"
        )
    return name


def _words(
    tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any], size: int, characters: bool
) -> tuple[list[str], list[int]]:
    """The text and the kind of every token. Numbers without a word get a name of their own."""
    added = {token["id"]: token for token in parts["added_tokens"]}
    by_number = {number: word for word, number in tokenizer.get_vocab().items()}
    words, kinds = [], []
    for number in range(size):
        word = by_number.get(number)
        if word is None:
            word, kind = f"[PAD{number}]", UNUSED
        elif word == tokenizer.unk_token and characters:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
            word = word.replace("▁", " ") if characters and kind == USER_DEFINED else word
        elif characters and re.fullmatch("<0x[0-9A-F]{2}>", word):
            kind = BYTE
        else:
            kind = NORMAL
        words.append(word)
        kinds.append(kind)
    return words, kinds


def _scores(words: list[str], merges: list[str]) -> list[float]:
    """llama.cpp merges the pair whose result has the highest score. So the result of an earlier
    merge gets a higher one."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(word, len(merges))) for word in words]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The numbers of special tokens, and which of them stand around a text."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    fields: dict[str, Any] = {
        f"ggml.{name}_token_id": number
        for short, name in names.items()
        if (number := getattr(tokenizer, f"{short}_token_id")) is not None
    }
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begin = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:begin], whole[begin + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise UserError(
            f"a tokenizer that puts {before} before and {after} behind a text is not written to "
            "GGUF: only the start and the end token are"
        )
    return fields | {"ggml.add_bos_token": bool(before), "ggml.add_eos_token": bool(after)}
