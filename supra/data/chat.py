"""Chats as the tokenizer's chat template writes them, with the assistant's tokens marked.

What the assistant says is what the template writes for an assistant's message behind the generation
prompt: the answer and what ends it. A template with `{% generation %}` markers says so itself. For
any other template, the chat is also rendered up to each answer, without and with it:

    the messages before the answer, with the generation prompt
    the messages up to the answer
    the whole chat

Each rendering must be the beginning of the next one. Then the answer is what the second one has
beyond the first. Some templates write an answer differently when more messages follow (Qwen3 leaves
out its thoughts). They are refused, because nothing says which tokens are the answer's.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from supra.data.packing import IGNORE, NOTHING, Document, start_tokens, text_document
from supra.errors import UserError, foreign_errors, shown

Messages = Sequence[dict[str, Any]]
"""Messages with the keys role and content, and others that the template knows."""

Content = str | Messages
"""What a record of a data set holds: a text or a chat."""

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHOWN = 40  # characters of a rendering in a message


def read_document(tokenizer: PreTrainedTokenizerBase, content: Content) -> Document:
    """The tokens and labels of a text or a chat."""
    read = text_document if isinstance(content, str) else chat_document
    return read(tokenizer, content)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and all(
        isinstance(x, dict) and isinstance(x.get("role"), str) for x in value
    )


def chat_document(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Document:
    """The tokens of `apply_chat_template`, with labels for the assistant's tokens alone.

    Start tokens that the template spells out are taken off, to stand before every piece. A chat
    without an answer gives no tokens. A first message by the assistant does not count as an answer.
    Raises UserError when there is no template, when it fails, or when it does not show which tokens
    are the assistant's.
    """
    if tokenizer.chat_template and MARKERS.search(tokenizer.get_chat_template()):
        found = _apply(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
        tokens, said = found["input_ids"], found["assistant_masks"]
    else:
        tokens, said = _compared(tokenizer, messages)
    if not any(said):
        return NOTHING
    labels = [token if yes else IGNORE for token, yes in zip(tokens, said, strict=True)]
    start = start_tokens(tokenizer)
    if tokens[: len(start)] != start:
        start = []
    return Document(tokens[len(start) :], labels[len(start) :], start)


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool = False) -> str:
    """A chat in the words of the template; with `prompt`, up to where the next answer begins.

    Raises UserError when there is no template, or when it fails.
    """
    return _apply(tokenizer, messages, tokenize=False, add_generation_prompt=prompt)


def _compared(
    tokenizer: PreTrainedTokenizerBase, messages: Messages
) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and whether each is the assistant's, by comparing renderings.

    A token that is partly the template's, such as two line breaks in one, is the template's.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "chats need a tokenizer that says where its tokens are in the text: give the student a "
            "tokenizer.json, or put {% generation %} markers around the answer in the template"
        )
    text = render(tokenizer, messages)
    answers = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
    spans = [_span(tokenizer, messages, index, text) for index in answers]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    said = [
        any(begin <= first and last <= end for begin, end in spans)
        for first, last in found["offset_mapping"]
    ]
    return found["input_ids"], said


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, index: int, text: str
) -> tuple[int, int]:
    """Where the answer messages[index] begins and ends in the rendered chat, in characters."""
    before = render(tokenizer, messages[:index], prompt=True)
    until = render(tokenizer, messages[: index + 1])
    for part, what in (
        (before, "looks different before the answer is there"),
        (until, "looks different when more messages follow"),
    ):
        if not text.startswith(part):
            pairs = zip(part, text, strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(text))
            theirs, ours = (shown(x[same : same + SHOWN]) for x in (part, text))
            raise UserError(
                "the chat template does not show which tokens are the assistant's: a chat of "
                f"{len(messages)} messages {what}, up to message {index + 1} ({theirs} instead of "
                f"{ours}): put {{% generation %}} markers around the answer in the template"
            )
    if len(until) < len(before):
        raise UserError(
            f"the chat template leaves out answers: message {index + 1} of {len(messages)} is "
            "shorter than the prompt for it; give chats that fit the template"
        )
    return len(before), len(until)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: bool) -> Any:
    if not tokenizer.chat_template:
        raise UserError(
            "the text has chats (lists of messages), and the tokenizer has no chat template: give "
            "text, or set chat_template in tokenizer_config.json"
        )
    with foreign_errors("the chat template does not work on a chat of the text"):
        return tokenizer.apply_chat_template(list(messages), **options)
