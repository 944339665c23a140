"""Generated prompts, and how a model's answers to them are scored."""

from random import Random

import pytest
import torch

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.evaluate.ablate.labels import LETTERS, Question, build_questions, measure_labels
from supra.evaluate.tasks import scoring
from supra.evaluate.tasks.prompts import (
    continuation_tokens,
    needle,
    plain_tokens,
    single_token_words,
    start_tokens,
)
from supra.evaluate.tasks.recall import measure_recall
from supra.evaluate.tasks.scoring import score_continuations
from tests.evaluate.fake_model import Fake, copied

TEXT = "The river rises in the hills and runs south through the valley to the sea. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [101, 150])
def test_a_needle_is_where_it_says(tokenizer, depth, length):
    filler = plain_tokens(tokenizer, TEXT)
    found = needle(tokenizer, filler, length, depth, Random(3))
    assert found == needle(tokenizer, filler, length, depth, Random(3))
    assert found != needle(tokenizer, filler, length, depth, Random(4))
    assert len(found.prompt) == length and len(found.candidates) == 8
    text = tokenizer.decode(found.prompt[found.at :])
    number = tokenizer.decode(found.candidates[found.answer])
    statement, _, rest = text.partition(".\n")
    assert statement.startswith("\nThe secret number of the ") and statement.endswith(number)
    assert number[0] == " " and number[1:].isdigit() and len(number) == 6
    assert text.endswith(statement.removesuffix(number)), "the same words ask for it"
    room = (
        length
        - len(plain_tokens(tokenizer, statement + ".\n" + statement))
        + len(found.candidates[found.answer])
    )
    assert found.at == round(depth * room)
    assert (rest == statement.removesuffix(number)) == (depth == 1.0)
    others = [tokenizer.decode(x) for n, x in enumerate(found.candidates) if n != found.answer]
    assert not any(other in text for other in others)


def test_no_room_for_a_needle(tokenizer):
    with pytest.raises(UserError, match=r"recall length \(=20\) must be at least (\d+)") as error:
        needle(tokenizer, [1, 2], 20, 0.5, Random(0))
    minimum = int(str(error.value).split("at least ")[1].split(":")[0])
    assert len(needle(tokenizer, [1, 2], minimum, 0.5, Random(0)).prompt) == minimum


def test_words_are_single_tokens(tokenizer):
    class Words:
        tokens = ("<s>", "ĠThe", "Ġthe", "Ġriver", "river", "▁hill", "Ġ1843", "Ġpläne", "▁", None)
        all_special_ids = (0,)

        def __len__(self):
            return len(self.tokens)

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[id] for id in ids]

    assert single_token_words(Words(), 2) == [3, 5]
    assert single_token_words(Words(), 3) == [1, 2, 3, 4, 5, 6, 7, 8]
    every = single_token_words(tokenizer, 128)
    assert len(every) > 200 and not set(every) & set(tokenizer.all_special_ids)


def test_tokens_at_the_start(tokenizer):
    assert start_tokens(tokenizer) == []
    assert continuation_tokens(tokenizer, "the", " river") == plain_tokens(tokenizer, " river")


def test_a_model_that_copies_recalls_all(tokenizer):
    filler = plain_tokens(tokenizer, TEXT)
    found = measure_recall(Fake(copied), tokenizer, filler, lengths=(101, 128), pairs=(2, 8))
    assert [(x.length, x.depth) for x in found.needles[:3]] == [(101, 0.1), (101, 0.5), (101, 0.9)]
    assert all((x.chosen, x.exact) == (1, 1) for x in found.needles)
    assert [(x.pairs, x.among_values, x.exact) for x in found.pairs] == [(2, 1, 1), (8, 1, 1)]
    assert "1.00 1.00" in "\n".join(found.lines())


def test_a_model_that_says_one_thing_recalls_nothing(tokenizer):
    filler = plain_tokens(tokenizer, TEXT)
    found = measure_recall(Fake(lambda read: 0), tokenizer, filler, lengths=(101,), pairs=(8,))
    assert all(x.exact == 0 for x in found.needles)
    assert found.pairs[0].exact == 0 and found.pairs[0].among_values < 0.3


@pytest.mark.parametrize("mixer", [None, "window", "supra", "gated_delta"])
def test_scores_are_those_of_whole_rows(tmp_path, monkeypatch, mixer):
    """Scores do not depend on the batch, nor on the lengths of other prompts and continuations."""
    model = testing.tiny_checkpoint(tmp_path / "teacher")
    if mixer is not None:
        convert(str(tmp_path / "teacher"), tmp_path / "rnn", mixer=mixer)
        model = find_checkpoint(str(tmp_path / "rnn")).model().eval()
    prompts = [[5, 6, 7], [8], list(range(20, 90))]
    rest = [[[1, 2], [3]], [[4, 5, 6], [7, 8]], [[9], [10, 11]]]
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 2 * 70)
    scores = score_continuations(model, prompts, rest)
    for n, (prompt, some) in enumerate(zip(prompts, rest, strict=True)):
        for c, continuation in enumerate(some):
            ids = torch.tensor([prompt + continuation])
            with torch.no_grad():
                log_p = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_p.gather(1, ids[0, len(prompt) :, None]).sum().item()
            assert scores.log_likelihood[n, c].item() == pytest.approx(expected, abs=1e-4)
            said = log_p.argmax(-1).tolist() == continuation
            assert scores.greedy[n, c].item() == said


def test_greedy_is_what_generate_says(tmp_path):
    model = testing.tiny_checkpoint(tmp_path)
    ids = torch.arange(20, 40)[None]
    said = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[
        0, 20:
    ].tolist()
    other = [*said[:3], (said[3] + 1) % 300]
    scores = score_continuations(model, [ids[0].tolist()], [[said, other, said[:2]]])
    assert scores.greedy.tolist() == [[True, False, True]]


SENTENCES = [
    f"In the {year} year of the great flood the old people went to the {word}."
    for year, word in zip(
        ("first", "second", "third", "fourth", "fifth", "sixth"),
        ("river", "valley", "bridge", "garden", "castle", "harbor"),
        strict=True,
    )
]


def test_questions_are_sentences_of_the_text():
    text = ["Too short a one.", "\n".join(SENTENCES), "No. " + SENTENCES[0]]
    questions = build_questions(text, seed=1)
    assert questions == build_questions(text, seed=1) != build_questions(text, seed=2)
    assert len(questions) == 6 and len(build_questions(text, count=4)) == 4
    for question in questions:
        assert f"{question.sentence} {question.choices[0]}." in SENTENCES
        assert len(set(question.choices)) == 4
        for shift in range(4):
            shown = question.prompt(shift).splitlines()
            letter = LETTERS[-shift % 4]
            assert f"{letter}. {question.choices[0]}" in shown
    with pytest.raises(
        UserError, match="4 sentences with different last words, but the text has 3"
    ):
        build_questions(SENTENCES[:3])


def labels(tokenizer, answer):
    questions = build_questions(SENTENCES)
    return measure_labels(Fake(answer), tokenizer, questions)


def test_a_model_that_always_says_a(tokenizer):
    (a,) = {x[-1] for x in [continuation_tokens(tokenizer, "Answer:", " A")]}
    space = continuation_tokens(tokenizer, "Answer:", " A")[0]
    found = labels(tokenizer, lambda read: a if read[-1] == space else space)
    assert found.letters == {"A": 1, "B": 0, "C": 0, "D": 0}
    assert (found.accuracy, found.consistency) == (0.25, 0)


def test_a_model_that_reads_the_choices(tokenizer):
    """It knows the right answer, and chooses its letter in any order."""
    right = {question.sentence: question.choices[0] for question in build_questions(SENTENCES)}

    def answer(read):
        text = tokenizer.decode(read)
        sentence = next((x for x in right if x in text), None)
        if "Answer:" in text:
            letter = next(
                line[0] for line in text.splitlines() if line[1:] == f". {right[sentence]}"
            )
            text, wanted = text.split("Answer:")[1], f" {letter}"
        else:
            text, wanted = text.split(sentence)[1], f" {right[sentence]}"
        full = plain_tokens(tokenizer, wanted)
        said = len(plain_tokens(tokenizer, text))
        return full[said] if said < len(full) else 0

    found = labels(tokenizer, answer)
    assert found.accuracy == found.consistency == found.cloze_accuracy == 1
    assert found.letters == dict.fromkeys(LETTERS, 0.25)


def test_a_question_as_the_model_sees_it():
    prompt = Question("They went to the", ("sea", "hill", "town", "mill")).prompt(1)
    assert prompt.splitlines() == [
        "Which word completes the sentence?", "", "They went to the ____",
        "A. hill", "B. town", "C. mill", "D. sea", "Answer:",
    ]  # fmt: skip
