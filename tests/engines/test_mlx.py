"""Converted models as folders of Qwen3.5's text model, in MLX."""

import pytest
import torch

from supra.checkpoint.opening import find_checkpoint
from supra.export.export import export
from tests.export.models import converted

mx = pytest.importorskip("mlx.core", reason="the package mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm.utils", reason="the package mlx-lm is not installed")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

FORMS = {"pure": ("llama", []), "hybrid": ("qwen3", [1, 3])}
PROMPT, STEPS, NEW = 80, 9, 64
EXACT = 1e-4  # of the largest logit; 3e-6 was measured


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """A converted model, and MLX's model of its export."""
    family, keep = FORMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    # MLX wants attention at a fixed interval
    rnn = converted(folder, family, "qwen3_5", keep, num_hidden_layers=4 if keep else 2)
    export(rnn, folder / "out", to="qwen3_5", idle_attention=not keep)
    names = {"model_type": "qwen3_5"}
    model, _ = mlx_lm.load_model(folder / "out", model_config=names)
    return find_checkpoint(str(rnn)).model(torch.float32).eval(), model


def logits(model, tokens, cache):
    return torch.tensor(model(mx.array([tokens]), cache=cache)[0].tolist())


@torch.no_grad()
def test_logits_are_those_of_the_converted_model(pair):
    model, engine = pair
    tokens = torch.randint(1, 300, (PROMPT + STEPS,)).tolist()
    expected = model(torch.tensor([tokens])).logits[0]
    cache = make_prompt_cache(engine)
    found = [logits(engine, tokens[:PROMPT], cache)]
    found += [logits(engine, [token], cache) for token in tokens[PROMPT:]]
    assert (torch.cat(found) - expected).abs().max() < EXACT * expected.abs().max()


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_converted_model(pair):
    model, engine = pair
    tokens = torch.randint(1, 300, (PROMPT,))
    given = tokens[None]
    expected = model.generate(given, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    cache = make_prompt_cache(engine)
    following = [int(logits(engine, tokens.tolist(), cache)[-1].argmax())]
    while len(following) < NEW:
        following.append(int(logits(engine, following[-1:], cache)[-1].argmax()))
    assert following == expected[0, PROMPT:].tolist()
