"""Bugs in what is measured, and in how prompts are read."""

from tests.controls.bug import Bug

PASSKEY, TASKS = "tests/evaluate/test_passkey.py", "tests/evaluate/test_ablation_tasks.py"
SCORING = "supra/evaluate/tasks/scoring.py"
PERPLEXITY = "supra/evaluate/perplexity.py"
SCORES = f"{TASKS}::test_scores_are_those_of_whole_rows[supra]"

BUGS = [
    Bug(
        "perplexity_of_the_token_itself",
        "perplexity scores every prediction on the token that was just read",
        PERPLEXITY,
        'shifted_labels(batch["labels"])',
        'batch["labels"]',
        ("tests/evaluate/test_perplexity.py::test_equals_the_mean_over_documents_alone",),
    ),
    Bug(
        "perplexity_with_dropout",
        "perplexity is measured in training mode",
        PERPLEXITY,
        "model.eval()",
        "model.train()",
        ("tests/evaluate/test_perplexity.py::test_dropout_is_off",),
    ),
    Bug(
        "first_token_scored_alone",
        "an answer is scored by its first token",
        SCORING,
        "nats.sum(1) +",
        "nats[:, 0] +",
        (SCORES,),
    ),
    Bug(
        "answers_see_no_padding",
        "an answer of several tokens reads the padding of its prompt",
        SCORING,
        "torch.cat([mask, torch.ones_like(given)], dim=1)",
        "torch.ones(len(mask), mask.shape[1] + given.shape[1], dtype=mask.dtype)",
        (f"{TASKS}::test_scores_are_those_of_whole_rows[None]",),
    ),
    Bug(
        "texts_share_a_cache",
        "what is read behind one text stays in the cache of the next",
        SCORING,
        "copy.deepcopy(cache)",
        "cache",
        ("tests/evaluate/test_scoring.py::test_a_fork_leaves_the_cache_as_it_was[supra]",),
    ),
    Bug(
        "shared_tokens_score_nothing",
        "scored tokens that all texts of a group share are left out",
        SCORING,
        "nats.sum(1) + (shared.nats[groups] * counts).sum(1)",
        "nats.sum(1)",
        ("tests/evaluate/test_scoring.py::test_shared_beginnings_change_no_score[None-4]",),
    ),
    Bug(
        "guesses_are_kept",
        "what a student keeps of an accuracy counts from 0, not from chance",
        "supra/evaluate/suite/measure.py",
        "return (measure.value - chance) / (self.teacher.value - chance)",
        "return measure.value / self.teacher.value",
        ("tests/evaluate/test_measure.py::test_what_is_kept_counts_from_chance",),
    ),
    Bug(
        "answers_need_no_end",
        "an in-context answer is right although more words follow it",
        "supra/evaluate/suite/in_context.py",
        "said)) + 1",
        "said))",
        ("tests/evaluate/test_suite.py::test_a_prompt_shows_its_shots_and_asks",),
    ),
    Bug(
        "a_limit_takes_the_first",
        "a quick look sees the beginning of a file alone",
        "supra/evaluate/suite/data.py",
        "at * count // kept",
        "at",
        ("tests/evaluate/test_suite.py::test_items_of_a_limit_are_spread",),
    ),
    Bug(
        "passkey_at_the_other_end",
        "the depth of a passkey is counted from the end",
        "supra/data/passkey.py",
        "int(depth * (count - 1))",
        "int((1 - depth) * (count - 1))",
        (f"{PASSKEY}::test_the_key_is_at_its_depth",),
    ),
    Bug(
        "passkeys_lose_their_zeros",
        "a passkey that begins with zeros has fewer digits",
        "supra/data/passkey.py",
        'f"{key:0{DIGITS}d}"',
        'f"{key}"',
        (f"{PASSKEY}::test_keys_keep_their_zeros",),
    ),
    Bug(
        "recall_of_the_question",
        "the answer that is expected is the key that was asked for",
        "supra/evaluate/tasks/recall.py",
        "ids.gather(1, at + 1)",
        "ids.gather(1, at)",
        (f"{TASKS}::test_a_model_that_copies_recalls_all",),
    ),
    Bug(
        "silenced_mixers_speak",
        "the floor without mixing leaves the mixers on",
        "supra/evaluate/ablate/floors.py",
        "output[0].new_zeros(output[0].shape)",
        "output[0]",
        ("tests/evaluate/test_ablation.py::test_no_mixing_is_a_model_without_output_projections",),
    ),
    Bug(
        "prompts_without_their_start",
        "supra generate leaves out the tokenizer's start tokens",
        "supra/serving/generation.py",
        "[*start_tokens(tokenizer), *text_tokens(tokenizer, prompt)]",
        "[*text_tokens(tokenizer, prompt)]",
        (
            "tests/data/test_start_tokens.py::test_every_reading_begins_with_the_start[generate-start]",
        ),
    ),
    Bug(
        "stream_begins_anew",
        "a long text is read from an empty state in every chunk",
        "supra/long_context/stream.py",
        "inputs[cache_name(base)] = self.cache",
        "inputs[cache_name(base)] = empty_cache(self.model)",
        ("tests/long_context/test_diagnosis.py::test_streaming_loss_is_that_of_one_pass[supra]",),
    ),
]
