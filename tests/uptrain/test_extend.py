"""The gradient of the stage extend: segments, states passed between them, and initial states."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from supra import testing
from supra.conversion.convert import convert
from supra.data.packing import IGNORE, block, collate
from supra.losses.chunked import ScoredModel
from supra.mixers import MIXERS
from supra.model.cache import MixerLayer, new_cache
from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.initial_state import NOISY, InitialState
from supra.uptrain.stage_settings import ExtendConfig, OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


SEGMENTS, LENGTH = 3, 12  # of a row, and tokens of a segment
OPTIONS = {"rwkv": {"token_shift": True}, "window": {"size": 5}}
RECURRENT = [name for name, mixer in MIXERS.items() if mixer.recurrent]
STUDENTS = {
    **{name: (name, OPTIONS.get(name, {})) for name in RECURRENT},
    "hedgehog": ("hedgehog", {}),  # with a normalizer in its state
    "hybrid": ("supra", {}),
}
NOISE = [name for name in RECURRENT if {*MIXERS[name].State._fields} <= {*NOISY, "normalizer"}]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    testing.tiny_checkpoint(folder)
    return folder


def student(name, teacher, dtype=torch.float64):
    """A converted model with random weights everywhere, in training mode."""
    if name != "hybrid":
        mixer, options = STUDENTS[name]
        model = testing.untrained_model(testing.tiny_config(), mixer, options)
    else:
        folder = teacher / "hybrid"
        if not folder.exists():
            convert(str(teacher), folder, mixer="supra", keep_attention=[0])
        model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).train()


def rows(count=2, segments=SEGMENTS, seed=0):
    """A batch whose rows hold one document each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(testing.VOCABULARY, (count, segments * LENGTH), generator=generator)
    return collate(block([row]) for row in tokens.tolist())


def objective(model, initial_state="zero", segments=SEGMENTS):
    stage = ExtendConfig(state_passing=segments, optimizer=OptimizerConfig(clip=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.param_groups[0]["base_lr"] = 1.0
    initial = InitialState(initial_state, model, seed=0, passes=range(2))
    accelerator, scored = Accelerator(cpu=True), ScoredModel(model)
    return EndToEnd(accelerator, scored, optimizer, stage, None, nullcontext, initial)


def nats(model, batch):
    """The losses [B, T − 1] of rows read in one pass."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")


def truncated(model, batch):
    """The mean loss of rows read in segments, with its gradient in the parameters: by hand."""
    tokens, total = batch["input_ids"], 0.0
    cache, count = new_cache(2), tokens[:, 1:].numel()
    for start in range(0, tokens.shape[1], LENGTH):
        piece = tokens[:, start : start + LENGTH]
        positions = torch.arange(start, start + piece.shape[1])[None].expand(len(tokens), -1)
        logits = model(
            input_ids=piece, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        targets = tokens[:, start + 1 : start + LENGTH + 1]
        logits = logits[:, : targets.shape[1]]
        loss = F.cross_entropy(logits.mT, targets, reduction="sum") / count
        loss.backward()
        total += loss.item()
        for layer in cache.layers:
            layer.state = type(layer.state)(*(None if x is None else x.data for x in layer.state))
    return total


def gradients(model):
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def distance(found, expected):
    """The norm of the difference of gradients, relative to the norm of the expected ones."""
    assert found.keys() == expected.keys()
    errors = [found[name] - x for name, x in expected.items()]
    return (
        torch.nn.utils.get_total_norm(errors) / torch.nn.utils.get_total_norm([*expected.values()])
    ).item()


@pytest.mark.parametrize("name", STUDENTS)
def test_segments_are_one_long_pass(teacher, name):
    """The loss is the same. The gradient is that of a truncated loop, and therefore differs."""
    model, batch = student(name, teacher), rows()
    expected = nats(model, batch).mean()
    expected.backward()
    whole = gradients(model)
    model.zero_grad()
    assert truncated(model, batch) == pytest.approx(expected.item(), rel=1e-12)
    cut = gradients(model)
    model.zero_grad()
    values = objective(model).add_gradients([batch])
    assert values["loss"] == pytest.approx(expected.item(), abs=1e-6), "summed in float32"
    assert distance(gradients(model), cut) < 1e-12
    assert distance(whole, cut) > 0.01
    norm = torch.nn.utils.get_total_norm([*cut.values()])
    assert values["grad_norm"] == pytest.approx(norm.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["supra", "mamba2", "h3", "window", "hybrid"])
def test_segments_are_one_long_pass_in_float32(teacher, name):
    model, batch = student(name, teacher, torch.float32), rows()
    found = objective(model).add_gradients([batch])["loss"]
    assert found == pytest.approx(nats(model, batch).mean().item(), abs=2e-6), "at a loss of 6"


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet", "hybrid"])
def test_a_segment_without_labels_is_only_read(teacher, monkeypatch, name):
    """The gradient is that of passes which all have one; a step's last pass always does."""
    model, batch = student(name, teacher), rows()
    batch["labels"][:, : LENGTH + 1] = IGNORE  # the first segment; labels are shifted by one
    batch["labels"][:, 2 * LENGTH + 1 :] = IGNORE  # the last
    seen = []
    handle = model.model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    found = objective(model).add_gradients([batch])
    handle.remove()
    assert seen == [False, True, True]
    read = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(EndToEnd, "_is_only_read", lambda *_: False)
    assert objective(model).add_gradients([batch]) == pytest.approx(found, rel=1e-12)
    assert distance(read, gradients(model)) < 1e-12


def test_accumulation_is_correct_by_tokens(teacher):
    model, batches = student("supra", teacher), [rows(seed=0), rows(seed=1)]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    expected = objective(model).add_gradients([joined])
    together = gradients(model)
    model.zero_grad()
    found = objective(model).add_gradients(batches)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert distance(gradients(model), together) < 1e-7


@pytest.mark.parametrize("name", ["mamba2", "hybrid"])
def test_no_gradient_crosses_a_segment(teacher, monkeypatch, name):
    model = student(name, teacher)
    embedded, seen = [], []

    def keep(module, args, output):
        output.retain_grad()
        embedded.append(output)

    def look(losses):
        seen.append([x.grad is not None for x in embedded])
        first = embedded[0].grad.clone()
        weights = {key: x.clone() for key, x in gradients(model).items()}
        return first, weights

    model.get_input_embeddings().register_forward_hook(keep)
    trained, states = objective(model), []
    for part, cache in trained._parts([rows()]):
        losses = trained._losses(part, 1, cache)
        losses.total.backward()
        states.append(look(losses))
    assert seen == [[True], [True] * 2, [True] * 3]
    assert all(torch.equal(first, states[0][0]) for first, _ in states)
    for earlier, later in pairwise(states):
        assert all(not torch.equal(earlier[1][key], later[1][key]) for key in earlier[1])

    monkeypatch.setattr(MixerLayer, "detach", lambda layer: None)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        objective(model).add_gradients([rows()])


def test_carried_rows_go_on(teacher):
    """Two steps are one pass over two documents, separately for each row."""
    model = student("mamba2", teacher)
    first, second = rows(seed=0), rows(seed=1)
    both = torch.cat([first["input_ids"], second["input_ids"]], dim=1).tolist()
    long = nats(model, collate(block([row]) for row in both))
    size = SEGMENTS * LENGTH
    trained = objective(model, "carried")
    for batch, part in ((first, long[:, : size - 1]), (second, long[:, size:])):
        loss = trained.add_gradients([batch])["loss"]
        assert loss == pytest.approx(part.mean().item(), abs=2e-6)
    assert [cache.get_seq_length() for cache in trained.initial_state.kept] == [2 * size]


def test_carried_states_by_micro_batch(teacher):
    """Each micro-batch has its own states. Kept attention always starts empty; all layers do where
    positions end."""
    model, batches = student("hybrid", teacher), [rows(2), rows(1, seed=1)]
    trained = objective(model, "carried")
    trained.add_gradients(batches)
    kept = trained.initial_state.kept
    assert [cache.layers[1].state.memory.shape[0] for cache in kept] == [2, 1]
    assert [cache.layers[0].state for cache in kept] == [None, None]
    tokens = SEGMENTS * LENGTH
    trained.initial_state.positions = 2 * tokens
    assert trained.initial_state.begin(0, 2, tokens) is kept[0]
    assert trained.initial_state.begin(0, 2, tokens + 1).get_seq_length() == 0
    trained.add_gradients(batches)
    trained.add_gradients(batches)
    assert [cache.get_seq_length() for cache in trained.initial_state.kept] == [tokens] * 2


@pytest.mark.parametrize("name", [*NOISE, "hybrid"])
def test_noise_is_as_large_as_the_states(teacher, name):
    model = student(name, teacher, torch.float32)
    trained, batch = objective(model, "noise"), rows(4)
    trained.fit_noise(batch)
    assert not gradients(model) and model.training
    cache = new_cache(2)
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True)
    noise = trained.initial_state.begin(0, 64, 1)
    other = trained.initial_state.begin(0, 64, 1)
    assert noise.get_seq_length() == 0
    for number, (layer, drawn) in enumerate(zip(cache.layers, noise.layers, strict=True)):
        if name == "hybrid" and number == 0:
            assert drawn.state is None, "kept attention"
            continue
        for field, x in layer.state._asdict().items():
            if x is None:
                continue
            others = [n for n in range(x.dim()) if n != NOISY[field]]
            found = getattr(drawn.state, field)
            assert found.shape[1:] == x.shape[1:] and found.dtype == x.dtype
            assert not torch.equal(found, getattr(other.layers[number].state, field))
            expected = x.square().mean(others).sqrt()
            least = 64 * x.shape[1] if field == "conv_state" else 64 * x[0, 0].numel()
            error = 5 / least**0.5
            torch.testing.assert_close(
                found.square().mean(others).sqrt(), expected, rtol=error, atol=1e-6
            )
            assert (found.mean(others) / expected.clamp(min=1e-6)).abs().max() < 2 * error


def test_what_is_kept_is_saved(teacher):
    for kind in ("noise", "carried"):
        model = student("hybrid", teacher, torch.float32)
        trained = objective(model, kind)
        trained.fit_noise(rows()) if kind == "noise" else trained.add_gradients([rows(), rows(1)])
        trained.initial_state.begin(0, 2, 1)
        other = InitialState(kind, model, seed=9, passes=range(2))
        other.load_state_dicts(trained.initial_state.state_dicts())
        for index in range(1 if kind == "noise" else 2):
            left, right = (x.begin(index, 2, 1) for x in (trained.initial_state, other))
            assert left is not right and left.get_seq_length() == right.get_seq_length()
            for a, b in zip(left.layers, right.layers, strict=True):
                assert (a.state is None) == (b.state is None)
                assert a.state is None or torch.equal(a.state.memory, b.state.memory)


@pytest.mark.parametrize("kind", ["noise", "carried"])
def test_micro_batches_keep_their_states_on_other_processes(teacher, kind):
    """One process with two micro-batches goes on as two with one each, and the other way round."""
    model = student("hybrid", teacher, torch.float32)
    trained = objective(model, kind)
    trained.fit_noise(rows()) if kind == "noise" else trained.add_gradients([rows(), rows(seed=1)])
    both, kept = InitialState(kind, model, seed=0, passes=range(2)), {}
    alone = [InitialState(kind, model, seed=0, passes=[number]) for number in range(2)]
    for one in alone:
        one.load_state_dicts(trained.initial_state.state_dicts())
        kept |= one.state_dicts()
    both.load_state_dicts(kept)
    for number, one in enumerate(alone):
        caches = one.begin(0, 2, 1), both.begin(number, 2, 1)
        memories = [cache.layers[1].state.memory for cache in caches]
        assert torch.equal(*memories) and memories[0].any()
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_states_of_a_skipped_step_are_not_carried(teacher):
    trained = objective(student("hybrid", teacher, torch.float32), "carried")
    trained.add_gradients([rows(), rows(1)])
    trained.initial_state.drop_carried()
    for index in (0, 1):
        cache = trained.initial_state.begin(index, 2, 1)
        assert cache.get_seq_length() == 0 and all(x.state is None for x in cache.layers)


@pytest.mark.parametrize("family", testing.MAIN_FAMILIES)
def test_families(family):
    model = testing.untrained_model(testing.tiny_config(family), "supra").train()
    batch = rows()
    loss = objective(model).add_gradients([batch])["loss"]
    assert loss == pytest.approx(nats(model, batch).mean().item(), abs=2e-6)
