"""Options of mixers as a user writes them."""

import pytest

from supra.errors import UserError
from supra.mixers import MIXERS, resolve_mixer
from supra.settings.yaml_text import parse_yaml


@pytest.mark.parametrize(
    ("mixer", "name", "text", "value"),
    [
        ("window", "dropout", "1e-1", 0.1),
        ("window", "size", "1.28e2", 128),
        ("rwkv", "rank", "64.0", 64),
        ("nonlinear_gated", "largest", "2.4e0", 2.4),
        ("supra", "decay", "none", "none"),
        ("h3", "gates", "false", False),
    ],
)
def test_values_are_read_as_numbers_however_they_are_written(mixer, name, text, value):
    _, options = resolve_mixer(mixer, {name: parse_yaml(text, "text")})
    assert (options[name], type(options[name])) == (value, type(value))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_option_has_a_type(mixer):
    for name, default in resolve_mixer(mixer)[1].items():
        other = -1.5 if default is None or isinstance(default, bool | int) else True
        for value in ({}, [default], other, *[None] * (default is not None)):
            with pytest.raises(UserError, match=rf"{name} .*(must be|known: )"):
                resolve_mixer(mixer, {name: value})
