"""A vocabulary that is learnt from texts."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def learn_tokenizer(
    texts: Iterable[str], size: int, template: str = "$A", special: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` words, for any text.

    "<|endoftext|>" is its bos, eos and pad token.

    Args:
        texts: what the words are learnt from.
        size: at least 257 words: the bytes, and "<|endoftext|>".
        template: the special tokens around a text, such as "<bos> $A".
        special: further special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if template != "$A":
        names = [(x, tokenizer.token_to_id(x)) for x in template.split() if x != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=names)
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    named["additional_special_tokens"] = [*special]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
