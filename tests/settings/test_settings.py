"""Typed settings by a small class of its own: values, and what is said of wrong ones."""

from typing import Literal

import pytest
from pydantic import Field

from supra.errors import UserError
from supra.settings.model import Names, Settings
from supra.settings.outline import COLUMN, WIDTH, outline
from supra.settings.reading import read
from supra.settings.yaml_text import parse_yaml, to_yaml

LAYERS = "Layers, with cream between them, or a_long_word_that_only_the_next_line_has_space_for."


class Oven(Settings):
    """Heat."""

    degrees: float = Field(180.0, gt=0, le=300, description="Temperature in Celsius.")
    fan: bool = Field(False, description="Whether the fan turns.")
    minutes: int | None = Field(None, ge=1, description="Time; null: until it smells good.")
    mode: Literal["top", "bottom"] = Field("top", description="Where the heat comes from.")


class Cake(Settings):
    """A recipe."""

    name: str = Field(description="What it is called.")
    layers: int = Field(2, ge=1, le=9, description=LAYERS)
    spices: Names = Field((), description="Names of spices.")
    sizes: tuple[float, float] = Field((20.0, 30.0), description="Width and length.")
    oven: Oven = Field(default_factory=Oven, description="First time.")
    again: Oven | None = Field(None, description="Second time.")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-4", 1e-4),
        ("-1E3", -1000.0),
        ("5e6", 5e6),
        ("1.5e3", 1500.0),
        (".5e+2", 50.0),
        ("2.e2", 200.0),
        ("1_000e-3", 1.0),
        ("1.0e-4", 1e-4),
        ("0x1e4", 0x1E4),
    ],
)
def test_numbers_in_scientific_notation(text, number):
    assert parse_yaml(text, "text") == number


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "'1e5'", "1e-", "1e5.5", "_1e5", "1-e5"])
def test_what_is_no_number_stays_text(text):
    assert parse_yaml(text, "text") == text.strip("'")


@pytest.mark.parametrize("value", ["1e5", "1e-4", 1e-4, 1e5, 5, "5", "true", True, None, "null"])
def test_what_is_written_is_read_again(value):
    again = parse_yaml(to_yaml({"out": value}), "text")["out"]
    assert again == value and type(again) is type(value)


def test_values_as_yaml_has_them():
    cake = read(Cake, {"name": "c", "layers": 3.0, "oven": None, "spices": "salt", "sizes": [1, 2]})
    assert cake == Cake(name="c", layers=3, spices=("salt",), sizes=(1.0, 2.0))
    assert isinstance(cake.layers, int) and isinstance(cake.sizes[0], float)
    assert read(Cake, cake.model_dump(mode="json")) == cake


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name is missing: set it in the config file or name=..."),
        (
            {"name": 7.0},
            "name (=7) must be a string; in quotes, if it looks like a number or a date",
        ),
        ({"layers": "3"}, "layers (='3') must be a whole number from 1 to 9"),
        ({"layers": True}, "layers (=True) must be a whole number from 1 to 9"),
        ({"layers": 1e30}, "layers (=1e+30) must be a whole number from 1 to 9"),
        ({"spices": {"a": 1}}, "spices (={'a': 1}) must be a string or a list of strings"),
        ({"spices": ["a", 1]}, "spices[1] (=1) must be a string"),
        ({"sizes": [1]}, "sizes (=[1]) must be a list of 2 numbers"),
        ({"sizes": [1, 2, 3]}, "sizes (=[1, 2, 3]) must be a list of 2 numbers"),
        ({"sizes": [1, "2"]}, "sizes[1] (='2') must be a finite number"),
        ({"oven": 7}, "oven (=7) must be a mapping of settings"),
        ({"again": 7}, "again (=7) must be a mapping of settings, or null"),
        ({"oven": {"degrees": 0}}, "oven.degrees (=0) must be a finite number > 0 and <= 300"),
        ({"oven": {"fan": 1}}, "oven.fan (=1) must be true or false"),
        ({"again": {"minutes": 0.5}}, "again.minutes (=0.5) must be a whole number >= 1, or null"),
        (
            {"again": {"mode": "tob"}},
            "unknown again.mode 'tob': did you mean 'top'? (known: bottom, top)",
        ),
        (
            {"again": {"degres": 1}, "layers": 0},
            "unknown key again.degres: did you mean again.degrees? "
            "(known here: degrees, fan, minutes, mode)",
        ),
        ({7: 1}, "unknown key 7 (known here: name, layers, spices, sizes, oven, again)"),
    ],
)
def test_a_mistake_is_one_line(values, message):
    with pytest.raises(UserError) as error:
        read(Cake, ({"name": "c"} if values else {}) | values)
    assert str(error.value) == message or str(error.value).startswith(message)


def test_outline():
    assert outline(Cake).splitlines() == [
        "  name = (required)               What it is called.",
        "  layers = 2                      Layers, with cream between them, or",
        "                                  a_long_word_that_only_the_next_line_has_space_for.",
        "  spices = []                     Names of spices.",
        "  sizes = [20.0, 30.0]            Width and length.",
        "  oven:                           First time.",
        "    degrees = 180.0               Temperature in Celsius.",
        "    fan = false                   Whether the fan turns.",
        "    minutes = null                Time; null: until it smells good.",
        '    mode = "top"                  Where the heat comes from. One of top, bottom.',
        "  again:                          Second time. Off by default. Takes what oven takes.",
    ]
    assert all(len(line) <= WIDTH for line in outline(Cake).splitlines()) and COLUMN == 34
