"""The tools that people train with: peft, Trainer, TRL's SFTTrainer, torch.compile."""

import itertools
import json
import subprocess
import sys

import peft
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from supra import testing
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.mixers import resolve_mixer
from supra.model.attention import attention_modules
from supra.model.auto import converted_config
from supra.model.families import FAMILIES
from supra.uptrain import loop, tree

# one way of naming projections each; gpt2's are transposed, and one attention layer is kept
KEPT = {"llama": [], "gpt2": [1], "gpt_neox": []}


@pytest.fixture(scope="module", params=KEPT)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    testing.tiny_checkpoint(where / "base", request.param)
    convert(str(where / "base"), where / "rnn", mixer="supra", keep_attention=KEPT[request.param])
    return where / "rnn"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    where = tmp_path_factory.mktemp("llama")
    testing.tiny_checkpoint(where / "base")
    convert(str(where / "base"), where / "rnn", mixer="supra", keep_attention=[1])
    return where / "rnn"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(tokens).logits


def random_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 300, (n,), generator=generator) for n in lengths]


@pytest.fixture
def tokens():
    return torch.stack(random_rows([33, 33]))


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options)


def trained(model, tokens):
    """`model` after two steps on `tokens`."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def close(actual, expected, tolerance=1e-5):
    assert expected.abs().max() > 1, "the logits are too small to tell a wrong model from a right"
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_lora_finds_the_projections_of_every_family():
    wrong = {}
    for family in FAMILIES:
        config = testing.tiny_config(family)
        name, options = resolve_mixer("supra")
        layers = [name] * config.num_hidden_layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                converted_config(config, layers, {name: options})
            )
            projections = [
                module
                for attention in attention_modules(model)
                for name, module in attention.named_modules()
                if isinstance(module, nn.Linear | Conv1D) and not name.startswith("mixer.")
            ]
            names = {module: name for name, module in model.named_modules()}
            fan_in_fan_out = isinstance(projections[0], Conv1D)
            adapted = peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=fan_in_fan_out))
        difference = set(adapted.targeted_module_names) ^ {names[x] for x in projections}
        if difference:
            wrong[family] = difference
    assert not wrong


def test_without_modules_to_save_the_mixers_stay(folder, tokens):
    before = load(folder).state_dict()
    model = trained(peft.get_peft_model(load(folder), lora()), tokens).unload()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(params=[None, ["mixer"]], ids=["lora", "lora_and_mixers"])
def adapted(request, folder, tokens, tmp_path):
    """A trained adapter in a folder of its own, and the model that it was saved from."""
    model = peft.get_peft_model(load(folder), lora(modules_to_save=request.param))
    before = logits(model, tokens)
    trained(model, tokens)
    assert (logits(model, tokens) - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_an_adapter_alone_goes_on_top_of_the_base(adapted, folder, tokens, tmp_path):
    expected = logits(adapted, tokens)
    where = tmp_path / "adapter"
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(load(folder), where), tokens), expected
    )
    model = load(folder)
    model.load_adapter(str(where))
    assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(where), tokens), expected)


def test_a_merged_adapter_changes_no_logits(adapted, folder, tokens, tmp_path):
    expected = logits(adapted, tokens)
    merged = adapted.merge_and_unload()
    assert merged.state_dict().keys() == load(folder).state_dict().keys()
    close(logits(merged, tokens), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), tokens), logits(merged, tokens))


def test_an_adapted_model_generates_as_its_merged_one(adapted, tokens):
    arguments = {"input_ids": tokens, "max_new_tokens": 8, "do_sample": False}
    text = adapted.generate(**arguments)
    assert torch.equal(adapted.merge_and_unload().generate(**arguments), text)


def test_a_lora_uptrained_student_loads_merged_and_as_an_adapter(llama, tokens, tmp_path):
    lines = [json.dumps({"text": "the river rises in the hills and runs south"})] * 20
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    values = {
        "student": str(llama),
        "out": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "text.jsonl"), "sequence_length": 32},
        "budget": {"tokens": 3 * 64},
        "tune": {"optimizer": {"lr": 1e-2}},
        "batch": {"size": 2},
        "precision": "fp32",
        "lora": {"rank": 4},
    }
    loop.train(tree.build(values))
    final = tmp_path / "run" / "final"
    merged, student = load(final), load(llama)
    expected = logits(merged, tokens)
    assert (logits(student, tokens) - expected).abs().max() > 0.1
    close(logits(peft.PeftModel.from_pretrained(student, final / "adapter"), tokens), expected)
    close(logits(AutoModelForCausalLM.from_pretrained(final / "adapter"), tokens), expected)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("config", [peft.PrefixTuningConfig, peft.CartridgeConfig])
def test_a_prefix_of_keys_and_values_is_refused(llama, tokens, config, call):
    options = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(load(llama), options)
    with pytest.raises(UserError, match=r"prefix of trained keys and values .* prompt tuning"):
        getattr(model, call)(input_ids=tokens)


def test_context_parallelism_is_refused(llama, tokens, tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    model = AutoModelForCausalLM.from_pretrained(llama)
    store = f"file://{tmp_path / 'store'}"
    init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        row = tokens.clone()
        with (
            context_parallel(mesh, buffers=[row], buffer_seq_dims=[1]),
            pytest.raises(UserError, match="context parallelism"),
        ):
            model(row)
    finally:
        destroy_process_group()
    model(tokens)


@torch.no_grad()
def test_prompt_tuning_is_the_prompts_embeddings_in_front(folder, tokens):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(load(folder), config).eval()
    base = load(folder)
    text = tokens
    for _ in range(6):
        embedded = torch.cat([model.get_prompt(2), base.get_input_embeddings()(text)], dim=1)
        expected = base(inputs_embeds=embedded, use_cache=False).logits
        close(model(text).logits, expected)
        text = torch.cat([text, expected[:, -1:].argmax(-1)], dim=1)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for use_cache in (True, False):
        generated = model.generate(input_ids=tokens, use_cache=use_cache, **arguments)
        assert torch.equal(generated, text)


def trainer(folder, out, model=None, rows=None, collator=None, **options):
    """A Trainer on the CPU over rows of tokens; the defaults are those of a short run."""
    rows = random_rows([24] * 16) if rows is None else rows
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return Trainer(
        model=load(folder) if model is None else model,
        args=TrainingArguments(output_dir=str(out), **(defaults | options)),
        train_dataset=[{"input_ids": x, "labels": x} for x in rows],
        data_collator=collator,
    )


def losses(of):
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_trainer_lowers_the_loss(folder, tmp_path, activation_checkpointing):
    rows = random_rows([24]) * 16
    run = trainer(folder, tmp_path, rows=rows, activation_checkpointing=activation_checkpointing)
    run.train()
    assert run.model.is_activation_checkpointing == activation_checkpointing
    first, second, third = losses(run)
    assert first > second > third > 0


def test_trainer_resumes_to_the_same_bits(llama, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(llama, tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(llama, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    saved = load(tmp_path / "whole" / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())


def test_trainer_trains_an_adapter_and_saves_it_alone(llama, tokens, tmp_path):
    model = peft.get_peft_model(load(llama), lora(modules_to_save=["mixer"]))
    run = trainer(llama, tmp_path, model=model, activation_checkpointing=True)
    run.train()
    run.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(load(llama), tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("flash_attention_arguments", [False, True])
def test_a_flattened_batch_is_its_rows(llama, tmp_path, flash_attention_arguments):
    """One step of SGD on four rows in one, and on the mean over all of their tokens."""
    rows = random_rows([9, 1, 17, 30])
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_attention_arguments)
    packed = trainer(llama, tmp_path, rows=rows, collator=collator, **options)
    packed.train()

    model = load(llama)
    predicted = sum(len(row) - 1 for row in rows)
    for row in rows:
        output = model(row[None]).logits[0, :-1]
        (nn.functional.cross_entropy(output, row[1:], reduction="sum") / predicted).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    start, expected = load(llama).state_dict(), model.state_dict()
    for name, tensor in packed.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in expected)


@pytest.mark.parametrize("packing", ["bfd", "wrapped", None])
def test_sft_trainer(llama, tmp_path, packing):
    trl = pytest.importorskip("trl", reason="trl is no dependency of supra: pip install trl")
    text = "The river rises in the hills and runs south through the valley to the sea."
    rows = [{"text": text[: 10 + 6 * (n % 10)]} for n in range(64)]
    options = {"packing": True, "packing_strategy": packing} if packing else {}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_length=64,
        max_steps=3,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    run = trl.SFTTrainer(
        model=load(llama),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(llama),
        peft_config=lora(modules_to_save=["mixer"]),
    )
    run.train()
    first, *_, last = losses(run)
    assert last < first

    batch = next(iter(run.get_train_dataloader()))
    assert ("position_ids" in batch) == (packing == "bfd")
    if packing == "bfd":  # documents in one row
        position_ids, model = batch["position_ids"], load(llama)
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        assert len(starts) > 4
        with torch.no_grad():
            together = model(batch["input_ids"], position_ids=position_ids, use_cache=False).logits
        for start, end in itertools.pairwise([*starts, position_ids.shape[1]]):
            alone = logits(model, batch["input_ids"][:, start:end])
            close(together[:, start:end], alone, tolerance=1e-4)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_training_compiles_to_one_graph(llama, activation_checkpointing, packed):
    """Packed rows too, where the collator passes the bounds of the documents."""
    model = load(llama).train()
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    features = [{"input_ids": row.tolist()} for row in random_rows([33, 20])]
    if packed:
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    else:
        tokenizer = AutoTokenizer.from_pretrained(llama)
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(features)
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    results = []
    for forward in (model, torch.compile(model, backend=backend, fullgraph=True)):
        loss = forward(**batch, use_cache=False).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    (eager, gradients), (compiled, compiled_gradients) = results
    assert backend.frame_count == 1
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=0)
    for name, expected in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], expected, atol=1e-6, rtol=1e-4)


def output_of(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_peft_knows_of_a_model_that_is_loaded(llama):
    """In a process of its own: here, imports of other tests may have told peft."""
    code = f"""
import supra
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(llama)!r})
import peft
print(len(peft.get_peft_model(model, peft.LoraConfig()).targeted_module_names))
"""
    assert output_of(code) == "8"


def test_a_model_loads_without_peft(llama):
    code = f"""
import sys
sys.modules["peft"] = None  # as if it were not installed
import supra
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(llama)!r})).__name__)
"""
    assert output_of(code) == "SupraLlamaForCausalLM"
