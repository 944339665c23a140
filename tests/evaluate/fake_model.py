"""A model whose answers are a function of what it has read."""

from types import SimpleNamespace

import torch

from supra import testing


class Fake:
    """A model that sees its whole context; `answer` gives the next token after a list of tokens."""

    def parameters(self):
        return iter(())

    def named_modules(self):
        return ()

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        past = past_key_values.rows if past_key_values else [[]] * len(input_ids)
        new = [row.tolist() for row in input_ids]
        if attention_mask is not None and past_key_values is None:
            new = [row[len(row) - n :] for row, n in zip(new, attention_mask.sum(1), strict=True)]
        logits = torch.zeros(*input_ids.shape, testing.VOCABULARY)
        last = kwargs.get("logits_to_keep", input_ids.shape[1])
        for index, (before, row) in enumerate(zip(past, new, strict=True)):
            for back in range(1, min(last, len(row)) + 1):
                read = before + row[: len(row) - back + 1]
                logits[index, -back, self.answer(read)] = 9.0
        rows = [before + row for before, row in zip(past, new, strict=True)]
        return SimpleNamespace(logits=logits[:, -last:], past_key_values=FakeCache(rows))


class FakeCache:
    def __init__(self, rows):
        self.rows = rows

    def reorder_cache(self, rows):
        self.rows = [self.rows[row] for row in rows.tolist()]


def copied(read):
    """The token that followed the previous occurrence of the longest repeated suffix."""
    best, answer = 0, 0
    for at in range(1, len(read)):
        if read[at - 1] != read[-1]:
            continue
        length = next((n for n in range(at) if read[at - 1 - n] != read[-1 - n]), at)
        if length > best:
            best, answer = length, read[at]
    return answer
