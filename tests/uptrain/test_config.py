"""The YAML tree: every mistake is one line that names the key and the way out."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from supra.errors import UserError
from supra.settings.yaml_text import parse_yaml
from supra.uptrain import shipped, train, tree
from supra.uptrain.stage_settings import OptimizerConfig, TuneConfig
from supra.uptrain.stages import plan

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = {
    "student": "s",
    "out": "o",
    "data": {"path": "p"},
    "budget": {"tokens": 1000},
    "tune": {},
}

# tokens in a step
THIRTY = {"data": {"path": "p", "sequence_length": 10}, "batch": {"size": 3}}


def load(tmp_path, *overrides, values=MINIMAL):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return tree.load(file, overrides)


def test_values_reach_their_place(tmp_path):
    config = load(
        tmp_path,
        "tune.optimizer.lr=1e-4",  # a string to YAML 1.1
        "tune.optimizer.betas=[0.9, 0.98]",
        "budget.tokens=5e6",
        "lora.rank=4",
        "trackers=tensorboard",
        "data.shuffle_seed=null",
    )
    assert config.tune.optimizer.lr == 1e-4
    assert config.tune.optimizer.betas == (0.9, 0.98)
    assert config.budget.total == 5_000_000 and isinstance(config.budget.tokens, int)
    assert config.lora.rank == 4 and config.lora.alpha == 32.0
    assert config.trackers == ("tensorboard",)
    assert config.data.shuffle_seed is None
    assert config.batch.size == 8, "untouched defaults stay"


def test_an_override_reaches_one_place_of_an_alias():
    mohawk = RECIPES / "configs" / "mohawk.yaml"
    overrides = ["student=s", "teacher=t", "data.path=p", "align.optimizer.lr=0.5"]
    config = tree.load(mohawk, overrides)
    assert config.align.optimizer.lr == 0.5 and config.orient.optimizer.lr == 1e-4


def test_resolved_config_reads_back(tmp_path):
    config = load(tmp_path, "lora.rank=4", "tune.schedule.kind=wsd")
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert tree.build(yaml.safe_load(text)) == config


def test_each_stage_has_a_step():
    stages = {"budget": {"tokens": 3}, "align": {"share": 0.1}, "tune": {"share": 0.9}}
    stages = plan(tree.build(MINIMAL | THIRTY | stages), processes=1)
    assert [(stage.start, stage.end) for stage in stages] == [(0, 1), (1, 2)]


def test_share_of_the_teachers_tokens():
    budget = {"share": 0.05, "teacher_tokens": 2_000_000}
    assert tree.build(MINIMAL | {"budget": budget}).budget.total == 100_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.optimizer.lrr=1", "unknown key tune.optimizer.lrr: did you mean tune.optimizer.lr?"),
        ("tune.optimiser.lr=1", "unknown key tune.optimiser: did you mean tune.optimizer"),
        ("seqence_length=8", "did you mean data.sequence_length?"),
        ("tune.schedule.kind=cosin", "unknown tune.schedule.kind 'cosin': did you mean 'cosine'?"),
        ("tune.optimizer.lr=fast", r"tune.optimizer.lr \(='fast'\) must be a finite number"),
        ("batch.size=2.5", r"batch.size \(=2.5\) must be a whole number"),
        ("batch.size=true", r"batch.size \(=True\) must be a whole number"),
        ("resume=maybe", r"resume \(='maybe'\) must be true or false"),
        ("tune.optimizer.betas=[0.9]", "tune.optimizer.betas .* must be a list of 2 numbers"),
        ("data=foo", r"data \(='foo'\) must be a mapping"),
        ("student=null", r"student \(=None\) must be a string"),
        ("batch.size=0", r"batch.size \(=0\) must be a whole number from 1 to 4194304"),
        ("tune.optimizer.lr=-1", r"tune.optimizer.lr \(=-1\) must be a finite number >= 0"),
        ("tune.optimizer.lr=.nan", r"tune.optimizer.lr \(=nan\) must be a finite number"),
        ("tune.schedule.warmup=.inf", r"tune.schedule.warmup \(=inf\) must be a finite number"),
        (
            "tune.optimizer.betas=[0.9, 1]",
            r"tune.optimizer.betas\[1\] \(=1\) must be a finite number >= 0 and < 1",
        ),
        (
            "tune.optimizer.betas=[-0.1, 0.9]",
            r"tune.optimizer.betas\[0\] \(=-0.1\) must be a finite number >= 0 and < 1",
        ),
        ("seed=-1", r"seed \(=-1\) must be a whole number from 0 to 4294967295"),
        ("seed=4294967296", r"seed \(=4294967296\) must be a whole number from 0 to 4294967295"),
        (
            "data.shuffle_seed=-1",
            r"data.shuffle_seed \(=-1\) must be a whole number from 0 to 4294967295, or null",
        ),
        ("lora.alpha=0", r"lora.alpha \(=0\) must be a finite number > 0"),
        ("lora.dropout=1", r"lora.dropout \(=1\) must be a finite number >= 0 and < 1"),
        ("data.eval_split=train", r"data.eval_split \(=train\) is the split that is trained on"),
        ("tune=null", "there is no stage"),
        ("tune.optimizer.lr=0", "tune.optimizer.lr .=0. trains nothing"),
        (
            "tune.schedule.min_ratio=2",
            r"tune.schedule.min_ratio \(=2\) must be a finite number >= 0 and <= 1",
        ),
        ("distill={}", "distill needs a teacher"),
        ("teacher=t", "not used without the stage distill"),
        ("budget={tokens: 9, share: 0.05}", "budget.tokens and budget.share are both set"),
        ("budget={share: 0.05}", "set budget.teacher_tokens"),
        (
            "budget={share: 0}",
            r"budget.share \(=0\) must be a finite number > 0 and <= 1000, or null",
        ),
        ("budget.tokens=null", "tune.tokens is not set, and there is no budget"),
        ("tune={tokens: 10, share: 0.1}", "tune.tokens and tune.share are both set"),
        ("tune.share=1.5", r"tune.share \(=1.5\) must be a finite number > 0 and <= 1, or null"),
        ("tune.share=0", r"tune.share \(=0\) must be a finite number > 0 and <= 1"),
        ("tune.tokens=0", r"tune.tokens \(=0\) must be a whole number from 1 to 1000000000000000"),
        ("tune.tokens=1002", "the stages take 1002 tokens of the budget's 1000: raise"),
        ("align={}", "align and tune give neither tokens nor share"),
        ("align.share=1", "take 1000 tokens of the budget's 1000 and leave none to tune"),
        ("align.target=outputs", "unknown align.target 'outputs': did you mean 'output'"),
        ("tune.tokens=100", "the stages take 100 tokens of the budget's 1000: give one of them"),
        (
            "calibrate={tokens: 4096, projections: true}",
            r"calibrate.tokens \(=4096\) must be >= 4 x data.sequence_length \(=2048\)",
        ),
        ("eval.every=10", "needs held-out text"),
        ("checkpoint.best=keep", r"checkpoint.best \(=keep\) compares .* set eval.every"),
        ("checkpoint.best=kept", r"checkpoint.best \(='kept'\) must be keep or export, or null"),
        ("data={path: p, eval_path: a, eval_split: b}", "has one source"),
        ("seed", "not of the form a.b=c"),
        ("student=2024-13-01", "'student=2024-13-01' is not valid YAML: month must be in 1..12"),
        ("seed=1" + 5000 * "0", "is not valid YAML: Exceeds the limit"),
        ("batch={size: 1, size: 2}", "'size' stands in lines 1 and 1"),
        (
            "batch.size=1e15",
            r"batch.size \(=1000000000000000\) must be a whole number from 1 to 4194304",
        ),
        ("batch.size=10000", r"batch.size \(=10000\) x data.sequence_length \(=2048\) is 20480000"),
        (
            "batch.accumulation=1e15",
            r"batch.accumulation \(=1000000000000000\) must be a whole number from",
        ),
        ("batch.accumulation=10000", r"batch.accumulation \(=10000\) x batch.size \(=8\) x data"),
        (
            "data.sequence_length=1e12",
            r"data.sequence_length \(=1000000000000\) must be a whole number from",
        ),
        (
            "data.shuffle_buffer=1e30",
            r"data.shuffle_buffer \(=1e\+30\) must be a whole number from 1 to 10+",
        ),
        (
            "data.min_document_tokens=1e30",
            "data.min_document_tokens .* must be a whole number from",
        ),
        (
            "data.eval_documents=1e30",
            "data.eval_documents .* must be a whole number from",
        ),
        (
            "calibrate.tokens=1e12",
            "calibrate.tokens .* must be a whole number from",
        ),
        ("budget.tokens=1e30", "budget.tokens .* must be a whole number from"),
        (
            "budget={share: 1.0e+300, teacher_tokens: 10}",
            "budget.share .* must be a finite number > 0 and <= 1000",
        ),
        (
            "budget={share: 0.1, teacher_tokens: 1e30}",
            "budget.teacher_tokens .* must be a whole number from",
        ),
        ("tune.tokens=1e30", "tune.tokens .* must be a whole number from"),
        (
            "tune.schedule.warmup=1e300",
            r"tune.schedule.warmup \(=1e\+300\) must be a finite number >= 0 and <= 10+",
        ),
        ("eval.tokens=1e30", "eval.tokens .* must be a whole number from"),
        ("eval.every=1e30", "eval.every .* must be a whole number from"),
        (
            "checkpoint.keep=1e30",
            "checkpoint.keep .* must be a whole number from",
        ),
        (
            "checkpoint.every=1e30",
            "checkpoint.every .* must be a whole number from",
        ),
        ("lora.rank=1e12", "lora.rank .* must be a whole number from"),
        (
            "extend={state_passing: 1e12}",
            "extend.state_passing .* must be a whole number from",
        ),
        ("seed=[", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, override)


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"temperature": 0}, r"distill.temperature \(=0\) must be a finite number > 0"),
        ({"kl": 0}, "both 0"),
        ({"kl": 0, "next_token": 1}, r"distill.kl \(=0\) leaves the teacher unused"),
        ({"top_k": 0}, r"distill.top_k \(=0\) must be a whole number from 1 to 16777216"),
        ({"cache": "c"}, "set distill.top_k"),
        ({"share": 0.6}, r"distill.share \+ tune.share \(=1.1\) must be <= 1"),
    ],
)
def test_mistakes_in_distillation(distill, message):
    values = MINIMAL | {"teacher": "t", "distill": {"share": 0.5} | distill, "tune": {"share": 0.5}}
    with pytest.raises(UserError, match=message):
        tree.build(values)


def test_a_stage_has_tokens_a_share_or_the_rest():
    stages = {"orient": {"tokens": 50}, "align": {"share": 0.2}, "tune": {}}
    assert tree.build(MINIMAL | stages).stage_tokens == {
        "orient": 50,
        "align": 200,
        "tune": 750,
    }
    assert tree.build(MINIMAL).stage_tokens == {"tune": 1000}


def test_stages_with_tokens_need_no_budget():
    config = tree.build(MINIMAL | {"budget": {}, "tune": {"tokens": 7}})
    assert config.stage_tokens == {"tune": 7}


def test_stages_are_in_order_whatever_the_file_says():
    stages = {"tune": {"tokens": 750}, "orient": {"tokens": 50}, "align": {"share": 0.2}}
    stages = plan(tree.build(MINIMAL | THIRTY | stages), processes=1)
    assert [(stage.name, stage.start, stage.end) for stage in stages] == [
        ("orient", 0, 2),
        ("align", 2, 9),
        ("tune", 9, 34),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {}, "calibrate": {"tokens": 8192, "projections": True}}, "or lora=null"),
        ({"lora": {}, "tune": None, "align": {}}, "not in align: add one of them"),
        ({"gradient_checkpointing": True, "tune": None, "align": {}}, "align hold one layer"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        tree.build(MINIMAL | changes)


@pytest.mark.parametrize("missing", ["student", "out", "data"])
def test_required_keys(tmp_path, missing):
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    name = "data.path" if missing == "data" else missing
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(tmp_path, values=values)


REST = "student: s\nout: o\ndata: {path: p}\ntune: {tokens: 9}\n"
BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nout: o\nseed: 2", "not valid YAML: 'seed' stands in lines 1 and 3: keep one"),
        ("tune:\n  tokens: 1\n  tokens: 2", "'tokens' stands in lines 2 and 3"),
        ("tune: {share: 1, share: 1}", "'share' stands in lines 1 and 1"),
        ("student: 2024-13-01", "not valid YAML: month must be in 1..12"),
        (
            "student: 2024-01-01",
            r"student \(=datetime.date\(2024, 1, 1\)\) must be a string; in quo",
        ),
        ("student: 12", r"student \(=12\) must be a string; in quotes"),
        ("student: !!binary aGk=", r"student \(=b'hi'\) must be a string"),
        ("student: !!set {a}", r"student \(=\{'a'\}\) must be a string"),
        ("student: !!python/object:os.system a", "not valid YAML: could not determine a construc"),
        ("seed: 1" + 5000 * "0", "not valid YAML: Exceeds the limit"),
        (
            REST + "seed: 0x1" + 5000 * "0",
            r"seed \(=about 2\*\*20000\) must be a whole number from 0 to 4294967295",
        ),
        (
            REST + "batch: {size: [0x1" + 5000 * "0" + "]}",
            r"size \(=\[about 2\*\*20000\]\) must be a whole",
        ),
        (
            REST + "lora: {alpha: 1" + 400 * "0" + "}",
            r"lora.alpha \(=about 2.*\) must be a finite number",
        ),
        ("seed: " + 3000 * "[" + 3000 * "]", "not valid YAML here: lists in lists, too deep"),
        (
            REST + "seed: " + 50 * "[" + 50 * "]",
            r"seed \(=\[\[\[\[\.\.\.\]\]\]\]\) must be a whole number",
        ),
        (BILLION, "unknown key a"),
        (BILLION + "student: *j", "unknown key a"),
        (BILLION.replace("j:", "student:").replace("a: &a", "trackers: &a"), "unknown key b"),
        ("student: &s [*s]", r"student \(=\[\[\[\[\.\.\.\]\]\]\]\) must be a string"),
        ("tune: &t {optimizer: *t}", "unknown key tune.optimizer.optimizer"),
        ("\tseed: 1", "not valid YAML: .*cannot start any token"),
        ("seed: 1\n---\nseed: 2", "not valid YAML: .*expected a single document"),
        ("seed: !!int ''", "not valid YAML: string index out of range"),
        ("resume: !!bool maybe", "not valid YAML: 'maybe'"),
        ("[1]: 2", "not valid YAML: .*unhashable key"),
        ("2024-01-01: 2", "unknown key 2024-01-01"),
        ("null: 2", "unknown key None"),
        ("<<: 3", "not valid YAML: .*expected a mapping"),
        ("seed", "is not a mapping of settings"),
        ("- seed", "is not a mapping of settings"),
        ("", "student is missing"),
        ("# nothing", "student is missing"),
        ("k" * 900 + ": 1", "unknown key kkkk"),
        ("#" * 2_000_000, "is 2000000 bytes long, and settings take 1000000 at most"),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else None,
)
def test_every_kind_of_yaml_is_read_or_refused_in_a_short_line(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        tree.load(file)
    assert len(str(error.value)) < 1500


def test_a_merged_key_may_be_replaced(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: &a {lr: 1.0, clip: 2.0}\nb: {<<: *a, lr: 3.0}")
    assert parse_yaml(file.read_bytes(), "b")["b"] == {"lr": 3.0, "clip": 2.0}


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_go_by_their_names(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find_recipe(path.stem) == path


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert shipped.find_recipe("demo") == RECIPES / "configs" / "demo.yaml"
    (tmp_path / "smoke").write_text("student: mine")
    assert shipped.find_recipe("smoke") == Path("smoke")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("supr", r"unknown recipe 'supr': did you mean 'supra'\? \(known: demo, .*, t2r\)"),
        ("", "unknown recipe '' .known: demo"),
        (
            "supra.yaml",
            "no such config file: supra.yaml; the recipe of that name .* --config supra",
        ),
        ("none.yaml", "no such config file: none.yaml$"),
        ("./supra", "no such config file: supra; the recipe of that name"),
        ("folder/none", "no such config file: folder/none$"),
        ("folder/inner", "'folder/inner' is a folder: name a YAML file in it"),
    ],
)
def test_no_such_recipe(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        shipped.find_recipe(name)


def test_no_such_config_file(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        tree.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [bytes(range(256)), b"seed: \xff"])
def test_a_config_that_is_no_text(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config.yaml is not valid YAML"):
        tree.load(tmp_path / "config.yaml")


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_parse(path):
    overrides = ["student=s"]
    if "sources:" not in path.read_text():
        overrides.append("data.path=p")
    if "distill:" in path.read_text():
        overrides.append("teacher=t")
    tree.load(path, overrides)


@pytest.mark.parametrize("path", sorted((RECIPES / "launch").glob("*.yaml")), ids=lambda p: p.stem)
def test_launch_files_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).mixed_precision == "no"


def test_values_are_frozen_and_checked_from_python_too(tmp_path):
    config = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 7
    with pytest.raises(ValueError, match="greater_than_equal"):
        OptimizerConfig(lr=-1)
    with pytest.raises(UserError, match=r"tune.optimizer.lr \(=0\) trains nothing"):
        train(config.model_copy(update={"tune": TuneConfig(optimizer=OptimizerConfig(lr=0))}))


def test_limits_of_commands_import_no_pydantic():
    code = "import sys, supra.uptrain, supra.uptrain.limits; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
