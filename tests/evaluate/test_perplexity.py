"""Perplexity weights all tokens equally, does not depend on the batch size, and agrees with the
loss of transformers."""

import math
from itertools import pairwise

import pytest
import torch

from supra import testing
from supra.errors import UserError
from supra.evaluate import blocks_from_text, perplexity

DOCUMENTS = ["The river rises. " * n for n in (1, 7, 2, 9, 4)] + ["", "In 1843 the bridge. " * 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return testing.tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_equals_the_mean_over_documents_alone(model, tokenizer):
    blocks = blocks_from_text(tokenizer, DOCUMENTS, 40)
    nats, tokens = 0.0, 0
    for block in blocks:
        starts = [*(block["position_ids"] == 0).nonzero().flatten().tolist(), 40]
        for start, end in pairwise(starts):
            ids = block["input_ids"][start:end].unsqueeze(0)
            if ids.shape[1] > 1:
                nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                tokens += ids.shape[1] - 1
    result = perplexity(model, blocks)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == math.exp(result.loss)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batch_size_does_not_matter(model, tokenizer, batch_size):
    blocks = blocks_from_text(tokenizer, DOCUMENTS, 24)
    expected = perplexity(model, blocks, by_position=(0, 8, 24))
    found = perplexity(model, blocks, by_position=(0, 8, 24), batch_size=batch_size)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.tokens == expected.tokens
    for a, b in zip(found.by_position, expected.by_position, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_positions_partition_the_tokens(model, tokenizer):
    blocks = blocks_from_text(tokenizer, DOCUMENTS, 24)
    whole = perplexity(model, blocks, by_position=(0, 24, 48))
    assert whole.by_position == [(0, 24, pytest.approx(whole.perplexity))]
    single = perplexity(model, blocks, by_position=range(25))
    assert [start for start, _, _ in single.by_position] == list(range(1, 24))


def test_no_more_text_is_read_than_wanted(tokenizer):
    documents = iter(DOCUMENTS * 10)
    blocks = blocks_from_text(tokenizer, documents, 24, tokens=50)
    assert len(blocks) == 2 and len(list(documents)) > 60
    for block, same in zip(blocks, blocks_from_text(tokenizer, DOCUMENTS, 24), strict=False):
        assert torch.equal(block["input_ids"], same["input_ids"])
    assert len(blocks_from_text(tokenizer, DOCUMENTS, 24, tokens=1)) == 1


def test_dropout_is_off(tokenizer, tmp_path):
    model = testing.tiny_checkpoint(tmp_path, attention_dropout=0.5)
    blocks = blocks_from_text(tokenizer, DOCUMENTS, 24)
    expected = perplexity(model.eval(), blocks)
    assert perplexity(model.train(), blocks) == expected


def test_training_mode_comes_back(model, tokenizer):
    blocks = blocks_from_text(tokenizer, DOCUMENTS, 24)
    model.train()
    perplexity(model, blocks)
    assert model.training
    model.eval()


def test_too_little_text(model, tokenizer):
    with pytest.raises(
        UserError, match=r"sequence_length \(=4096\) is longer than the evaluation text \(\d+"
    ):
        blocks_from_text(tokenizer, DOCUMENTS, 4096)
    with pytest.raises(UserError, match="at least one block"):
        perplexity(model, [])


def test_a_loss_without_an_exponential(model, tokenizer):
    blocks = blocks_from_text(tokenizer, DOCUMENTS, 24)
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight.mul_(1e4)
        result = perplexity(model, blocks)
        model.lm_head.weight.copy_(saved)
    assert math.isfinite(result.loss) and result.perplexity == math.inf
