"""The YAML tree: every mistake is one line that names the key and the way out."""

from pathlib import Path

import pytest
import yaml

from supra.errors import UserError
from supra.uptrain import tree
from supra.uptrain.config import UptrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
MINIMAL = {"student": "s", "out": "o", "data": {"path": "p"}, "budget": {"tokens": 1000}}


def load(tmp_path, *overrides, values=MINIMAL):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return tree.load(UptrainConfig, file, overrides)


def test_values_reach_their_place(tmp_path):
    config = load(
        tmp_path,
        "optimizer.lr=1e-4",  # a string to YAML 1.1
        "optimizer.betas=[0.9, 0.98]",
        "budget.tokens=5e6",
        "lora.rank=4",
        "trackers=tensorboard",
        "data.shuffle_seed=null",
    )
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.9, 0.98)
    assert config.budget.total == 5_000_000 and isinstance(config.budget.tokens, int)
    assert config.lora.rank == 4 and config.lora.alpha == 32.0
    assert config.trackers == ("tensorboard",)
    assert config.data.shuffle_seed is None
    assert config.batch.size == 8, "untouched defaults stay"


def test_resolved_config_reads_back(tmp_path):
    config = load(tmp_path, "lora.rank=4", "schedule.kind=wsd")
    text = yaml.safe_dump(tree.to_dict(config))
    assert tree.build(UptrainConfig, yaml.safe_load(text)) == config


def test_share_of_the_teachers_tokens():
    budget = {"share": 0.05, "teacher_tokens": 2_000_000}
    assert tree.build(UptrainConfig, MINIMAL | {"budget": budget}).budget.total == 100_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr: did you mean optimizer.lr?"),
        ("optimiser.lr=1", "unknown key optimiser: did you mean optimizer"),
        ("seqence_length=8", "did you mean data.sequence_length?"),
        ("schedule.kind=cosin", "unknown schedule.kind 'cosin': did you mean 'cosine'?"),
        ("optimizer.lr=fast", r"optimizer.lr \(='fast'\) must be a finite number"),
        ("batch.size=2.5", r"batch.size \(=2.5\) must be a whole number"),
        ("batch.size=true", r"batch.size \(=True\) must be a whole number"),
        ("resume=maybe", r"resume \(='maybe'\) must be true or false"),
        ("optimizer.betas=[0.9]", "optimizer.betas .* must be a list of 2 float values"),
        ("data=foo", r"data \(='foo'\) must be a mapping"),
        ("student=null", r"student \(=None\) must be a string"),
        ("batch.size=0", r"batch.size \(=0\) must be >= 1"),
        ("optimizer.lr=-1", r"optimizer.lr \(=-1.0\) must be >= 0"),
        ("optimizer.lr=.nan", r"optimizer.lr \(=nan\) must be a finite number"),
        ("schedule.warmup=.inf", r"schedule.warmup \(=inf\) must be a finite number"),
        ("optimizer.betas=[0.9, 1]", r"optimizer.betas \(=1.0\) must be >= 0 and < 1"),
        ("optimizer.betas=[-0.1, 0.9]", r"optimizer.betas \(=-0.1\) must be >= 0 and < 1"),
        ("seed=-1", r"seed \(=-1\) must be >= 0 and < 4294967296"),
        ("seed=4294967296", r"seed \(=4294967296\) must be >= 0 and < 4294967296"),
        ("data.shuffle_seed=-1", r"data.shuffle_seed \(=-1\) must be >= 0"),
        ("lora.alpha=0", r"lora.alpha \(=0.0\) must be > 0"),
        ("lora.dropout=1", r"lora.dropout \(=1.0\) must be >= 0 and < 1"),
        ("data.eval_split=train", r"data.eval_split \(=train\) is the split that is trained on"),
        ("loss.temperature=0", r"loss.temperature \(=0.0\) must be > 0"),
        ("loss.kl=1", "needs a teacher"),
        ("teacher=t", "set loss.kl"),
        ("loss.next_token=0", "both 0"),
        ("budget.share=0.05", "exactly one of budget.tokens and budget.share"),
        ("budget.tokens=null", "exactly one of budget.tokens and budget.share"),
        ("budget={share: 0.05}", "set budget.teacher_tokens"),
        ("eval.every=10", "needs held-out text"),
        ("data={path: p, eval_path: a, eval_split: b}", "has one source"),
        ("seed", "not of the form a.b=c"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, override)


@pytest.mark.parametrize("missing", ["student", "out", "data"])
def test_required_keys(tmp_path, missing):
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    name = "data.path" if missing == "data" else missing
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(tmp_path, values=values)


def test_no_such_config_file(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        tree.load(UptrainConfig, tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [bytes(range(256)), b"seed: \xff"])
def test_a_config_that_is_no_text(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config.yaml is not valid YAML"):
        tree.load(UptrainConfig, tmp_path / "config.yaml")


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_parse(path):
    overrides = ["student=s", "data.path=p"]
    if "kl:" in path.read_text():
        overrides.append("teacher=t")
    tree.load(UptrainConfig, path, overrides)


@pytest.mark.parametrize("path", sorted((RECIPES / "launch").glob("*.yaml")), ids=lambda p: p.stem)
def test_launch_files_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).mixed_precision == "no"
