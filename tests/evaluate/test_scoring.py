"""Scores of texts that share their beginning are those of each text read alone."""

import io
from random import Random

import pytest
import torch
from tqdm import tqdm

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.evaluate.tasks.scoring import Row, fork_cache, group_rows, score_groups


def alone(model, row):
    """Log-likelihood and greedy of one row, by reading it whole."""
    ids = torch.tensor([row.tokens])
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)[-row.scored :]
    labels = ids[0, -row.scored :]
    return log_p.gather(1, labels[:, None]).sum().item(), bool((log_p.argmax(-1) == labels).all())


def random_groups(generator):
    """Groups of one to five rows. What is shared ends before, at and after the scored part."""
    for rows in (1, 2, 5, 1, 3):
        shared = generator.choices(range(1, 300), k=generator.randint(1, 30))
        group = []
        for _ in range(rows):
            tokens = shared + generator.choices(range(1, 300), k=generator.randint(1, 7))
            group.append(Row(tokens, generator.randint(1, len(tokens) - 1)))
        yield group


@pytest.fixture(scope="module", params=[None, "supra", "window", "gated_delta"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    teacher = testing.tiny_checkpoint(folder / "teacher")
    if request.param is None:
        return teacher.eval()
    convert(str(folder / "teacher"), folder / "rnn", mixer=request.param)
    return find_checkpoint(str(folder / "rnn")).model().eval()


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_shared_beginnings_change_no_score(model, batch):
    groups = list(random_groups(Random(batch)))
    bar = tqdm(file=io.StringIO())
    found = score_groups(model, groups, batch, bar)
    assert bar.n == bar.total == sum(map(len, groups))
    for group, scores in zip(groups, found, strict=True):
        for row, score in zip(group, scores, strict=True):
            likelihood, greedy = alone(model, row)
            assert score.log_likelihood == pytest.approx(likelihood, abs=2e-4)
            assert score.greedy == greedy


def test_greedy_counts_every_scored_token(model):
    """Also those that all rows share."""
    ids = torch.arange(20, 40)[None]
    said = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    wrong = [*said[:22], (said[22] + 1) % 300, *said[23:]]
    cut = [*said[:25], (said[25] + 1) % 300]
    [[whole, ends]] = score_groups(model, [[Row(said, 6), Row(cut, 6)]], 8)
    [[early, late]] = score_groups(model, [[Row(wrong, 6), Row([*wrong[:-1], 7], 3)]], 8)
    assert whole.greedy and not ends.greedy and not early.greedy
    assert late.greedy == alone(model, Row([*wrong[:-1], 7], 3))[1]


def test_every_shared_token_is_read_once(model, monkeypatch):
    read = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **x: (read.append(x["input_ids"].numel()), forward(**x))[1]
    )
    shared = list(range(1, 51))
    rows = [Row([*shared, 60 + n, 70, 80], 2) for n in range(6)]
    score_groups(model, [rows], 100)
    assert read == [50, 6 * 2], "the last token of a row is not read"


def test_a_fork_leaves_the_cache_as_it_was(model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        more, rows = torch.tensor([[3], [4], [5]]), torch.tensor([1, 0, 1])
        first = model(more, past_key_values=fork_cache(cache, rows), use_cache=True).logits
        second = model(more, past_key_values=fork_cache(cache, rows), use_cache=True).logits
    assert torch.equal(first, second) and cache.get_seq_length() == 4
    whole = model(torch.cat([ids[rows], more], dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(first, whole, atol=1e-4, rtol=1e-4)


def test_neighbours_that_begin_alike_are_a_group():
    question, other = list(range(10)), list(range(50, 60))
    rows = [Row([*question, 1], 1), Row([*question, 2, 3], 2), Row([*other, 1], 1)]
    rows += [Row([*other, 2], 1), Row(other[:3] + [7] * 9, 1), Row([*question, 1], 1)]
    assert [len(group) for group in group_rows(rows)] == [2, 2, 1, 1]
    assert [row for group in group_rows(rows) for row in group] == rows
    assert group_rows([]) == []
