"""Other heads than the language model's: classifiers of texts and tokens, reward models, question
answering."""

import subprocess
import sys

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto

from supra.conversion.convert import convert
from supra.errors import UserError
from supra.mixers import MIXERS, PRESETS, resolve_mixer
from supra.model.auto import converted_config
from supra.model.families import FAMILIES
from supra.testing import tiny_checkpoint, tiny_config

HEADS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
NAMES = (
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
)
TOKENS, PADDED, PAD = 21, 7, 0


def outputs(model, *tokens, **inputs):
    """The head's outputs for each row, or for each token: [B, …]."""
    with torch.no_grad():
        found = model(*tokens, **inputs)
    if "logits" in found:
        return found.logits
    return torch.stack([found.start_logits, found.end_logits], dim=-1)


def rows(side):
    """Two rows, the first of them with padding on this side, and their mask."""
    tokens = torch.randint(1, 300, (2, TOKENS))
    mask = torch.ones_like(tokens)
    places = slice(PADDED) if side == "left" else slice(-PADDED, None)
    tokens[0, places], mask[0, places] = PAD, 0
    return tokens, mask


def check_padding(model, side):
    """Check that a padded row gives what it gives alone. Returns the inputs and the outputs."""
    tokens, mask = rows(side)
    found = outputs(model, tokens, attention_mask=mask)
    assert found.std() > 0.05, "the outputs are too small to tell a wrong model from a right"
    kept = mask[0].bool()
    alone = outputs(model, tokens[:1, kept])[0]
    padded = found[0] if alone.dim() == 1 else found[0, kept]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)
    return tokens, mask, found


def with_head(auto, config, mixer, **labels):
    """The family's own random model with this head, and ours with the same weights."""
    for name, value in labels.items():
        setattr(config, name, value)
    own = auto.from_config(config).eval()
    for parameter in own.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    name, options = resolve_mixer(mixer, {})
    ours = auto.from_config(converted_config(config, [name] * 2, {name: options})).eval()
    body = dict(own.base_model.named_parameters())
    for name, parameter in ours.base_model.named_parameters():
        if name in body:
            parameter.data.copy_(body[name])
    for name, parameter in own.named_parameters():
        if not name.startswith(f"{own.base_model_prefix}."):
            ours.get_parameter(name).data.copy_(parameter)
    return own, ours


@pytest.mark.parametrize("family", [x for x in FAMILIES if any(x in names for names in NAMES)])
def test_heads_of_every_family(family):
    """With the softmax mixer, each gives the family's own outputs, wherever the padding is."""
    for auto, names in zip(HEADS, NAMES, strict=True):
        if family not in names:
            continue
        config = tiny_config(family, pad_token_id=PAD)
        own, ours = with_head(auto, config, "softmax", num_labels=3)
        for side in ("left", "right"):
            tokens, mask, found = check_padding(ours, side)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            expected = outputs(own, tokens, attention_mask=mask, position_ids=positions)
            kept = slice(None) if found.dim() == 2 else mask.bool()
            torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mixer", [*MIXERS, *PRESETS])
def test_a_padded_text_is_that_text_alone(mixer):
    config = tiny_config(pad_token_id=PAD)
    _, model = with_head(AutoModelForSequenceClassification, config, mixer, num_labels=2)
    for side in ("left", "right"):
        check_padding(model, side)


def test_a_family_without_a_head_says_so():
    config = converted_config(tiny_config("olmoe"), ["softmax"] * 2, {"softmax": {}})
    for auto in HEADS:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            auto.from_config(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hedgehog, whose features of rotated queries and keys depend on positions."""
    where = tmp_path_factory.mktemp("heads")
    tiny_checkpoint(where / "base", pad_token_id=PAD)
    convert(where / "base", where / "rnn", mixer="hedgehog")
    return where / "rnn"


@pytest.mark.parametrize("auto", HEADS)
def test_a_head_is_new_on_a_language_model_and_then_saved(auto, folder, tmp_path):
    model, info = auto.from_pretrained(folder, num_labels=2, output_loading_info=True)
    new = {name for name, _ in model.named_parameters() if not name.startswith("model.")}
    assert info["missing_keys"] == new and new
    assert {*info["unexpected_keys"]} == {"lm_head.weight"}
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    headless = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, model.model.state_dict()[name]) for name, x in headless.items())
    with pytest.raises(UserError, match=r"missing keys .* first lm_head.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_a_head_is_strict_about_the_rest(folder, tmp_path):
    auto, saved = AutoModelForSequenceClassification, tmp_path / "model.safetensors"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    language = load_file(saved)
    mixer = next(name for name in language if ".mixer." in name)
    save_file({name: x for name, x in language.items() if name != mixer}, saved)
    with pytest.raises(UserError, match=r"1 missing keys .* first model.*mixer"):
        auto.from_pretrained(tmp_path)
    save_file(language | {"model.stray": torch.zeros(1)}, saved)
    with pytest.raises(UserError, match=r"1 unexpected keys .* first model.stray"):
        auto.from_pretrained(tmp_path)

    auto.from_pretrained(folder, num_labels=2).save_pretrained(tmp_path)
    more = auto.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert more.score.weight.shape[0] == 3
    classifier = load_file(saved)
    save_file({name: x for name, x in classifier.items() if name != "score.weight"}, saved)
    with pytest.raises(UserError, match=r"1 missing keys .* first score.weight"):
        auto.from_pretrained(tmp_path)


OLD_SHIM = """
from supra.configuration import SupraConfig
from supra.modeling import SupraForCausalLM, SupraModel
"""


def test_remote_code_of_any_age_finds_the_head(folder, tmp_path):
    """A folder's module and `auto_map` need not name the heads: they import supra, which does."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_supra.py").write_text(OLD_SHIM)
    tokens, mask = rows("left")
    torch.save((tokens, mask), tmp_path / "rows.pt")
    code = f"""
import torch
from transformers import AutoModelForSequenceClassification
tokens, mask = torch.load({str(tmp_path / "rows.pt")!r})
auto = AutoModelForSequenceClassification
model = auto.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
torch.save(model(tokens, attention_mask=mask).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    expected = outputs(model.eval(), tokens, attention_mask=mask)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.fixture
def reward_model(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


def test_rows_that_a_classifier_cannot_read(reward_model):
    tokens, positions = torch.randint(1, 300, (1, 9)), torch.arange(9)[None] % 5
    bounds = torch.tensor([0, 5, 9])
    for packed in ({"position_ids": positions}, {"cu_seq_lens_q": bounds}):
        with pytest.raises(UserError, match="reads only the last token: pass one text per row"):
            reward_model(tokens, **packed)
    reward_model(tokens, position_ids=torch.arange(9)[None])
    with pytest.raises(UserError, match="input_ids or inputs_embeds: pass one"):
        reward_model()
    reward_model.config.pad_token_id = None
    reward_model(tokens)
    with pytest.raises(UserError, match=r"pad_token_id \(=None\) in the config must be set for 2"):
        reward_model(tokens.expand(2, -1))


def test_token_heads_read_packed_rows(folder):
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokens = torch.randint(1, 300, (1, 9))
    packed = outputs(model, tokens, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))
    torch.testing.assert_close(packed[:, 5:], outputs(model, tokens[:, 5:]))


def test_positions_may_come_in_order(reward_model):
    """Positional arguments work, in the order of the family's own forward."""
    tokens, mask = rows("left")
    named = outputs(reward_model.eval(), tokens, attention_mask=mask)
    assert torch.equal(reward_model(tokens, mask).logits, named)


def texts(count):
    """Texts of two classes with different tokens, and of random lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 15, (count,), generator=generator).tolist()
    return [
        torch.randint(1 + 150 * (n % 2), 150 + 150 * (n % 2), (length,), generator=generator)
        for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_trainer_trains_a_classifier(folder, tmp_path, adapter):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4))
    data = [{"input_ids": x.tolist(), "label": n % 2} for n, x in enumerate(texts(32))]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=8, learning_rate=1e-2,
            per_device_train_batch_size=16, logging_steps=1, report_to=[], save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(data),
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model()
    tokens, mask = rows("right")
    if adapter:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        again = peft.PeftModel.from_pretrained(base, tmp_path)
        assert {*load_file(tmp_path / "adapter_model.safetensors")} >= {
            "base_model.model.score.weight"
        }
    else:
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected = outputs(model.eval(), input_ids=tokens, attention_mask=mask)
    assert torch.equal(outputs(again.eval(), input_ids=tokens, attention_mask=mask), expected)


def test_a_reward_model_learns_which_answer_is_better(reward_model):
    """As TRL's RewardTrainer calls it: chosen and rejected answers in one padded batch."""
    chosen, rejected = texts(16)[::2], texts(16)[1::2]
    batches = {
        side: nn.utils.rnn.pad_sequence([*chosen, *rejected], True, PAD, side)
        for side in ("right", "left")
    }
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        tokens = batches["right"]
        inputs = {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}
        rewards = reward_model(**inputs, return_dict=True)["logits"].squeeze(-1)
        better, worse = rewards.chunk(2)
        losses.append(-nn.functional.logsigmoid(better - worse).mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    right, left = (
        outputs(reward_model.eval(), x, attention_mask=(x != PAD).long()) for x in batches.values()
    )
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
