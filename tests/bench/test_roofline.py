"""`supra bench compile --roofline`: times from bytes and products."""

import json
import re

import pytest

from supra.bench import roofline
from supra.bench.traffic import Traffic
from supra.cli import main

NUMBERS = roofline.TOKENS * roofline.HEADS
MEMORY = Traffic(
    "kda", "plain", 64, "forward", 3350.0, torch=350.0, distinct=6350.0, products=9890.0
)
PRODUCTS = Traffic("kda", "plain", 64, "backward", 1.0, distinct=2.0, products=98900.0)


def test_the_longer_time_counts():
    times = roofline.microseconds(MEMORY)
    assert times["minimum"] == pytest.approx(NUMBERS / 1e3)
    assert times["moved"] == pytest.approx(2 * NUMBERS / 1e3)
    assert times["products"] == pytest.approx(NUMBERS / 1e5)
    assert roofline.cells(MEMORY)[-3:] == ["1", "1,049", "memory"]
    assert roofline.cells(PRODUCTS)[-2:] == ["52", "products"]


def test_the_command(monkeypatch, capsys):
    step = Traffic("kda", "plain", 64, "recurrent", 1.0)
    monkeypatch.setattr(roofline, "measure_all", lambda jobs, _: [MEMORY, PRODUCTS, step])
    main(["bench", "compile", "--roofline", "--ops", "kda"])
    lines = [re.sub(" +", " ", x) for x in capsys.readouterr().out.splitlines()]
    assert lines[2].startswith("Made by `supra bench compile --roofline --ops kda`")
    assert "| kda | forward | plain | 64 | 524 | 1,049 | 5 | 1 | 1,049 | memory |" in lines
    assert not any("recurrent" in x for x in lines)
    main(["bench", "compile", "--roofline", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["microseconds"]["minimum"] > 500
