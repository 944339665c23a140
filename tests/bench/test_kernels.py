"""`supra bench kernels` from end to end on tiny sizes, without claims about times."""

import json
from itertools import product

import pytest
import torch

from supra.bench import kernels, timing
from supra.bench.rivals import OPERATIONS, Setting
from supra.cli import main

TINY = ["--heads", "2", "--head-size", "8", "--repeats", "2"]


@pytest.fixture
def in_this_process(monkeypatch):
    """Run jobs in this process, because every fresh process would import torch."""
    monkeypatch.setattr(kernels, "run_parallel", lambda function, items, *_: map(function, items))


def run(capsys, *arguments):
    main(["bench", "kernels", *TINY, *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operation_meets_its_rivals(capsys, dtype):
    printed = run(capsys, "--lengths", "9", "--json", "--dtype", dtype)
    rows = json.loads(printed)["rows"]
    for operation, direction in product(OPERATIONS, kernels.DIRECTIONS):
        found = [x for x in rows if (x["operation"], x["direction"]) == (operation, direction)]
        assert found, (operation, direction)
        for row in found:
            assert row["shape"] == [1, 9, 2, 8] and row["dtype"] == dtype
            assert row["milliseconds"] > 0
            assert row["rival"] is None or row["best_ratio"] > 0
    rivals = {row["rival"] for row in rows}
    assert {"torch softmax attention", "torch conv1d", "transformers"} <= rivals


def test_the_table_names_the_machine_and_each_row(capsys):
    lines = run(capsys, "--lengths", "9", "--ops", "causal_conv").splitlines()
    names = [line.split(":")[0] for line in lines[:5]]
    assert names == ["machine", *kernels.PACKAGES]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[6:]]
    assert rows[0] == list(kernels.RACE_HEADER)
    assert [(x[0], x[1], x[6]) for x in rows[2:]] == [
        ("causal_conv", "forward", "torch conv1d"),
        ("causal_conv", "forward+backward", "torch conv1d"),
        ("causal_conv", "decode step", "transformers"),
    ]


def test_several_lengths_show_growth(capsys, in_this_process):
    lines = run(capsys, "--lengths", "9,20", "--ops", "linear_attention").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[6:]]
    assert rows[0] == list(kernels.GROWTH_HEADER)
    ours = product(kernels.DIRECTIONS, ["torch"], ["9", "20"])
    rival = product([kernels.DECODING], ["torch softmax attention"], ["9", "20"])
    assert [tuple(x[1:4]) for x in rows[2:]] == [*ours, *rival]


def test_memory_is_that_of_a_process_of_its_own():
    setting = Setting(1, 30_000, 4, 16, torch.float32, "cpu")
    job = kernels.Job("causal_conv", kernels.FORWARD, "torch", None, setting)
    megabytes = 30_000 * 4 * 16 * 4 / 2**20  # of the input, and as much of the output
    assert 1.5 * megabytes < kernels.grow(job, 1).peak_mib < 20 * megabytes


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rivals_compute_the_same(operation):
    """All rivals except softmax attention, which the operations replace."""
    setting, entry = Setting(2, 20, 2, 8, torch.float32, "cpu"), OPERATIONS[operation]
    torch.manual_seed(0)
    inputs = entry.inputs(setting)
    expected = entry.ours("torch").whole(**inputs)
    for name, rival in entry.rivals.items():
        if name != "torch softmax attention" and rival.whole and rival.runs("cpu"):
            torch.testing.assert_close(rival.whole(**inputs), expected, rtol=1e-4, atol=1e-5)


def test_functions_take_turns():
    calls = []
    functions = [lambda name=name: calls.append(name) for name in "ab"]
    times = timing.interleaved(functions, 3, "cpu")
    assert [len(x) for x in times] == [3, 3]
    measured = "".join(calls).split("b" * (timing.WARM_UPS + 1), 1)[1]
    turns = [name for name, before in zip(measured, " " + measured, strict=False) if name != before]
    assert turns == ["b", "a", "b", "a", "b", "a", "b"][-len(turns) :]


def test_ratios_are_of_pairs():
    ratio = timing.Ratio.of([1.0, 2.0, 4.0], [3.0, 2.0, 8.0])
    assert ratio == (2.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "causal_con"], "unknown operation 'causal_con': did you mean 'causal_conv'?"),
        (["--lengths", "9,0"], "--lengths (=0) must be at least 1"),
        (["--lengths", "many"], "--lengths 'many' must be integers"),
        (["--lengths", ""], "--lengths must name at least one length"),
        (["--heads", "0"], "--heads (=0) must be at least 1"),
        (["--repeats", "-1"], "--repeats (=-1) must be at least 1"),
        (["--dtype", "float31"], "unknown --dtype 'float31': did you mean 'float32'?"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "kernels", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
