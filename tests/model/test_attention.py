"""What an attention module tells its mixer about the model around it."""

import pytest

from supra.errors import UserError
from supra.model.attention import attention_modules
from supra.testing import tiny_config, untrained_model


@pytest.mark.parametrize(
    ("family", "overrides", "eps"),
    [("llama", {"rms_norm_eps": 3e-4}, 3e-4), ("gpt_neox", {"layer_norm_eps": 3e-4}, 1e-5)],
)
def test_a_mixer_knows_the_eps_of_the_models_rms_norms(family, overrides, eps):
    """Models without RMSNorm have none to tell."""
    model = untrained_model(tiny_config(family, **overrides), "retention", {})
    assert [x.mixer.shape.norm_eps for x in attention_modules(model)] == [eps, eps]


def test_a_rotation_that_the_family_applies_itself_cannot_be_left_out():
    with pytest.raises(UserError, match=r"rotary \(=False\) of supra .* 'deepseek_v3' rotates"):
        untrained_model(tiny_config("deepseek_v3"), "supra", {"rotary": False})
