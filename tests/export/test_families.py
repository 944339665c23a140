"""Every family that exports does so exactly, with the attention of a kept layer."""

import pytest

from supra.errors import UserError
from supra.export.converted import FAMILIES
from supra.export.export import export
from tests.export.models import converted

ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
SIZES = {
    "cwm": {**FULL, "rope_parameters": ROPE},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 2.0},
    "llama": {"rope_parameters": ROPE},
    "ministral": FULL,
    "seed_oss": {"attention_bias": False},
    "smollm3": {"no_rope_layers": [0, 0]},
}
# qwen2 always has biases
EXPORTED = [family for family in FAMILIES if family != "qwen2"]


@pytest.mark.parametrize("family", EXPORTED)
def test_families_export_exactly(tmp_path, family):
    sizes, target = SIZES.get(family, {}), "qwen3_5" if family == "qwen3" else "granite"
    source = converted(tmp_path, family, target, [1], num_hidden_layers=2, **sizes)
    assert export(source, tmp_path / "out", to=target).difference.largest < 1e-5


def test_kept_layers_without_positions(tmp_path):
    """Granite's attention can do without, Qwen3.5's cannot."""
    sizes = {"positions": "none", "num_hidden_layers": 2}
    source = converted(tmp_path / "one", "llama", "granite", [1], **sizes)
    assert export(source, tmp_path / "out", to="granite").difference.largest < 1e-5
    with pytest.raises(UserError, match="layer 1 keeps attention without rotary positions"):
        converted(tmp_path / "other", "qwen3", "qwen3_5", [1], **sizes)
