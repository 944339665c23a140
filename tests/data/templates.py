"""Chat templates in the styles that models have, and chats for them."""

import random

from tokenizers.processors import TemplateProcessing

from supra.testing import tiny_tokenizer

SPECIAL = "<bos> <|im_start|> <|im_end|> $A"  # a tokenizer that adds them all; see `chat_tokenizer`
HEAD = "'<|im_start|>' + message['role'] + '\\n'"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
LOOP = "{% for message in messages %}"
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou know rivers.<|im_end|>\\n' }}{% endif %}"
)
CHATML = LOOP + "{{ " + HEAD + " + message['content'] + '<|im_end|>\\n' }}{% endfor %}" + PROMPT
MARKED = (
    LOOP + "{{ " + HEAD + " }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + PROMPT
)
TEMPLATES = {
    "chatml": CHATML,
    "a default system prompt": SYSTEM + CHATML,
    "markers": MARKED,
    "bos, trimmed": (
        "{{ bos_token }}" + LOOP + "{{ '<|im_start|>' + message['role'] + '\\n\\n' + "
        "message['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
    ),
    "no special tokens": (
        LOOP + "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
    "no generation prompt": (
        "{{ bos_token }}" + LOOP + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}
# thoughts stay in the last answer alone
FORGETFUL = (
    LOOP + "{{ " + HEAD + " }}{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '(thinking)\\n' }}{% endif %}{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    + PROMPT
)
WORDS = ["the river", "rises", " and", "\nfalls", "42", "🌊", "in 1843", " ", "state."]


def chat_tokenizer(folder, template, start=""):
    """A tokenizer with the special tokens of the templates, which adds `start` to a text."""
    tokenizer = tiny_tokenizer(folder, SPECIAL)
    added = f"{start} $A".strip()
    names = [(x, tokenizer.convert_tokens_to_ids(x)) for x in start.split()]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(added, special_tokens=names)
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def chats(count, turns=3, seed=0):
    """Chats of up to this many questions and answers, of words that try templates."""
    draw = random.Random(seed)
    for _ in range(count):
        said = ["".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(2 * turns)]
        roles = ["user", "assistant"] * draw.randint(1, turns)
        yield [{"role": x, "content": y} for x, y in zip(roles, said, strict=False)]
