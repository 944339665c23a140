"""Rows on two and four ranks against one: losses, gradients, and states to continue from."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from supra.checkpoint.weights import ModuleReader
from supra.conversion.plan import plan_conversion
from supra.conversion.tensors import load_converted
from supra.data.packing import IGNORE
from supra.errors import UserError
from supra.mixers import MIXERS, resolve_mixer
from supra.mixers.state_policy import StatePolicy
from supra.model.attention import attention_modules
from supra.model.sequence_parallel import part_of_rows, sequence_parallel
from supra.testing import tiny_config, untrained_model
from tests.ranks import on_ranks

TOKENS = 21
# Norms and the loss are float32 in a float64 model. More ranks round it in more places.
LARGEST_ERROR = {2: 1e-6, 4: 1e-5}
SHARED = [name for name in MIXERS if name not in ("softmax", "nonlinear_gated")]
HYBRID = ("gated_deltanet", "softmax", "window")


def model_of(*mixers):
    """A random model in float64, one layer per mixer, with the numbers of some training."""
    config = tiny_config(num_hidden_layers=len(mixers))
    resolved = dict(resolve_mixer(name, {"size": 6} if name == "window" else {}) for name in mixers)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    plan = plan_conversion(ModuleReader(base), config, list(mixers), resolved, None)
    model = load_converted(plan, 0, progress=False).double()
    for attention in attention_modules(model):
        for parameter in attention.mixer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def batch(**columns):
    ids = torch.randint(300, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids} | columns


def padded():
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :13] = mask[1, 5:8] = 0  # the first part of the first row is padding alone
    rows = batch(attention_mask=mask)
    known = mask * mask.roll(1, 1) == 1  # outputs at padding mean nothing
    return rows | {"labels": rows["labels"].where(known, IGNORE)}


def packed():
    rows = [(4, 9, 8), (11, 10)]
    return batch(position_ids=torch.stack([torch.cat([*map(torch.arange, x)]) for x in rows]))


def check(actual, expected, what):
    error = (actual - expected).abs().max() / max(1e-3, expected.abs().max())
    assert error < LARGEST_ERROR[dist.get_world_size()], (what, error)


def check_training(model, rows, what):
    expected = model(**rows).loss
    expected.backward()
    gradients = [x.grad for x in model.parameters()]
    model.zero_grad()
    part = part_of_rows(rows, dist.get_rank(), dist.get_world_size())
    with sequence_parallel(model) as shared:
        loss = model(**part).loss
        loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    check(loss, expected.detach(), (what, "loss"))
    for (name, x), gradient in zip(model.named_parameters(), gradients, strict=True):
        dist.all_reduce(x.grad)
        check(x.grad, gradient, (what, name))
    assert shared.ranks.bytes > 0
    model.zero_grad()


@torch.no_grad()
def check_decoding(model, rows, what):
    """The last rank continues alone, from the state that it got."""
    ids = {"input_ids": rows["input_ids"]}
    cache = model(**ids, use_cache=True).past_key_values
    with sequence_parallel(model):
        part = part_of_rows(ids, dist.get_rank(), dist.get_world_size())
        ours = model(**part, use_cache=True).past_key_values
    if dist.get_rank() == dist.get_world_size() - 1:
        assert ours.get_seq_length() == TOKENS
        more = ids["input_ids"][:, :3]
        expected = model(more, past_key_values=cache).logits
        check(model(more, past_key_values=ours).logits, expected, what)


def check_all(models):
    for what, model in models.items():
        for kind, rows in {"padded": padded(), "packed": packed()}.items():
            check_training(model, rows, (what, kind))
        check_decoding(model.eval(), batch(), what)
    model.train().gradient_checkpointing_enable()
    check_training(model, batch(), "with checkpointing")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_are_one(tmp_path, ranks):
    models = {name: model_of(name, name) for name in SHARED}
    on_ranks(check_all, ranks, tmp_path, models | {"hybrid": model_of(*HYBRID)})


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("nonlinear_gated", {}, r"layer 0 \(nonlinear_gated\): its state passes through a tanh"),
        ("window", {"dropout": 0.1}, r"layer 0 \(window\): dropout \(=0.1\) .* set it to 0"),
    ],
)
def test_a_mixer_that_needs_whole_rows_is_refused_by_name(mixer, options, message):
    model = untrained_model(tiny_config(), mixer, options)
    with pytest.raises(UserError, match=message), sequence_parallel(model):
        pass


def test_a_state_policy_that_needs_whole_rows_is_refused():
    config = tiny_config()
    model = untrained_model(config, "supra")
    for number, attention in enumerate(attention_modules(model)):
        attention.mixer.set_policy(StatePolicy(window=8), number)
    with pytest.raises(UserError, match=r"state_policy .* leave it off"), sequence_parallel(model):
        pass


def test_a_model_that_is_not_converted_is_refused():
    with (
        pytest.raises(UserError, match="must be a converted"),
        sequence_parallel(torch.nn.Linear(1, 1)),
    ):
        pass


def test_one_process_without_a_group_is_refused():
    model = untrained_model(tiny_config(), "supra")
    with pytest.raises(UserError, match="start them with torchrun"), sequence_parallel(model):
        pass


def test_rows_shorter_than_the_ranks_are_refused():
    with pytest.raises(UserError, match=r"ranks \(=22\) must be at most the 21 tokens"):
        part_of_rows(batch(), 0, 22)
