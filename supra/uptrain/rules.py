"""What settings must fulfil together; a mistake is one line with the keys and the way out."""

from supra.errors import UserError, shown
from supra.uptrain.config import BudgetConfig, UptrainConfig
from supra.uptrain.data_settings import DataConfig, SourceConfig
from supra.uptrain.limits import PASS, STEP

END_TO_END = {"distill", "tune", "extend"}  # stages
# stage -> why it is not compiled
NOT_COMPILED = {
    "orient": "computes whole mixing matrices beside the layers",
    "extend": "hands states on between segments, and each would be compiled for",
}
PROJECTION_ROWS = 4  # of calibration: three to fit, one to choose by


def check(config: UptrainConfig) -> None:
    """Raises UserError."""
    if not config.stages:
        raise UserError(
            "there is no stage: give orient, align, distill, tune or extend, tune={} say"
        )
    _check_texts(config.data)
    for name in config.stages:
        _check_batch(config, name)
        _check_trains(config, name)
    _check_teacher(config)
    _check_calibrate(config)
    _check_lora(config)
    _check_gradient_checkpointing(config)
    _check_compile(config)
    _check_budget(config.budget)
    _check_stage_tokens(config)
    _check_held_out(config)


def _check_texts(data: DataConfig) -> None:
    if not data.sources:
        if data.path is None:
            raise UserError(
                "data.path is missing: set it, or data.sources for a mixture of several texts"
            )
        return
    if data.path is not None:
        raise UserError(
            f"data.path (={data.path}) and data.sources are both set: the training text is one of "
            "them; keep one"
        )
    for key, default in (("name", None), ("split", "train"), ("eval_split", None)):
        if (value := getattr(data, key)) != default:
            inside = "data.eval_path" if key == "eval_split" else f"{key} in a source"
            raise UserError(f"data.{key} (={value}) is for data.path: give {inside} instead")
    for number, text in enumerate(data.sources):
        _check_source(f"data.sources[{number}]", text)
    labels = [text.label for text in data.sources]
    if twice := next((x for x in labels if labels.count(x) > 1), None):
        raise UserError(f"data.sources has {shown(twice)} twice: keep one, with both weights added")


def _check_source(key: str, text: SourceConfig) -> None:
    if text.path is None and text.passkeys is None:
        raise UserError(f"{key}.path is missing: set it in the config, or passkeys")
    if text.passkeys is None:
        return
    for name in ("path", "name", "split", "text_field", "recall"):
        if (value := getattr(text, name)) != SourceConfig.model_fields[name].default:
            raise UserError(
                f"{key}.{name} (={value}) is for texts that are read, and passkeys make theirs: "
                "keep one of them"
            )


def _check_batch(config: UptrainConfig, name: str) -> None:
    """Of one stage."""
    rows, size = config.of_stage(name, "batch.size")
    row, length = config.of_stage(name, "sequence_length")
    tokens = size * length
    if tokens > PASS:
        raise UserError(
            f"{rows} (={size}) x {row} (={length}) is {tokens} tokens in one forward pass, more "
            f"than {PASS}: lower {rows}, and raise batch.accumulation"
        )
    passes, accumulation = config.of_stage(name, "batch.accumulation")
    if tokens * accumulation > STEP:
        raise UserError(
            f"{passes} (={accumulation}) x {rows} (={size}) x {row} (={length}) is "
            f"{tokens * accumulation} tokens in a step, more than {STEP}: lower one of them"
        )


def _check_trains(config: UptrainConfig, name: str) -> None:
    optimizer = config.stages[name].optimizer
    if not (optimizer.lr or optimizer.attention_lr or optimizer.new_lr):
        raise UserError(
            f"{name}.optimizer.lr (=0) trains nothing: set it or {name}.optimizer.new_lr above 0"
        )


def _check_teacher(config: UptrainConfig) -> None:
    distill = config.distill
    if distill is None:
        if config.teacher is not None:
            raise UserError(
                f"teacher (={config.teacher}) is not used without the stage distill: "
                "give distill, or teacher=null"
            )
        return
    if distill.next_token == 0 and distill.kl == 0:
        raise UserError(
            "distill.next_token and distill.kl are both 0: nothing would be learnt; set one"
        )
    if distill.kl == 0:
        raise UserError("distill.kl (=0) leaves the teacher unused: set it, or tune instead")
    if config.teacher is None:
        raise UserError("distill needs a teacher: set teacher, or distill=null")
    if distill.cache is not None and distill.top_k is None:
        raise UserError(
            f"distill.cache (={distill.cache}) keeps the teacher's likeliest tokens: "
            "set distill.top_k, 64 say"
        )


def _check_calibrate(config: UptrainConfig) -> None:
    calibrate, length = config.calibrate, config.data.sequence_length
    if not calibrate.projections:
        return
    if calibrate.tokens < PROJECTION_ROWS * length:
        raise UserError(
            f"calibrate.projections fits on three of four rows and tries on the fourth: "
            f"calibrate.tokens (={calibrate.tokens}) must be >= {PROJECTION_ROWS} x "
            f"data.sequence_length (={length})"
        )
    if config.lora is not None:
        raise UserError(
            "calibrate.projections changes weights that lora freezes, and its adapter would be of "
            "another student: set calibrate.projections=false, or lora=null"
        )


def _check_lora(config: UptrainConfig) -> None:
    if config.lora is not None and not END_TO_END & set(config.stages):
        raise UserError(
            f"lora trains in distill, tune and extend, not in {' and '.join(config.stages)}: "
            "add one of them, or set lora=null"
        )


def _check_gradient_checkpointing(config: UptrainConfig) -> None:
    if not config.gradient_checkpointing:
        return
    if not END_TO_END & set(config.stages):
        raise UserError(
            "gradient_checkpointing saves memory end to end, and "
            f"{' and '.join(config.stages)} hold one layer at a time: set it to false"
        )
    if config.extend is not None:
        raise UserError(
            "gradient_checkpointing computes layers again, and those of the stage extend would "
            "start from a state that is gone: set gradient_checkpointing=false; where memory is "
            "short, a lower extend.sequence_length with a higher extend.state_passing"
        )


def _check_compile(config: UptrainConfig) -> None:
    if not config.compile:
        return
    for name in config.stages:
        if name in NOT_COMPILED:
            raise UserError(
                f"compile (=True) does not go with the stage {name}, which {NOT_COMPILED[name]}: "
                f"run it separately, or set compile=false"
            )
    if config.lora is not None:
        raise UserError(
            "compile (=True) does not go with lora: with adapters it was never tested; set "
            "compile=false, or lora=null"
        )


def _check_budget(budget: BudgetConfig) -> None:
    if budget.tokens is not None and budget.share is not None:
        raise UserError("budget.tokens and budget.share are both set: keep one")
    if budget.share is not None and budget.teacher_tokens is None:
        raise UserError(
            f"budget.share (={budget.share}) is a share of the teacher's pretraining tokens: "
            "set budget.teacher_tokens"
        )


def _check_stage_tokens(config: UptrainConfig) -> None:
    stages, total = config.stages, config.budget.total
    for name, stage in stages.items():
        if stage.tokens is not None and stage.share is not None:
            raise UserError(f"{name}.tokens and {name}.share are both set: keep one")
        if stage.tokens is None and total is None:
            raise UserError(
                f"{name}.tokens is not set, and there is no budget to take a share of: "
                f"set {name}.tokens, or budget.tokens"
            )
    rest = [name for name, stage in stages.items() if stage.tokens is None and stage.share is None]
    if len(rest) > 1:
        raise UserError(
            f"{' and '.join(rest)} give neither tokens nor share, and only one stage can have "
            "what the others leave: give all but one of them a share"
        )
    shares = sum(stage.share or 0 for stage in stages.values())
    if shares > 1 + 1e-9:
        names = " + ".join(f"{name}.share" for name in stages if stages[name].share is not None)
        raise UserError(f"{names} (={shares:.4g}) must be <= 1")
    if total is None:
        return
    taken = sum(config.stage_tokens[name] for name in stages if name not in rest)
    # shares are rounded to whole tokens, one at least
    if taken > total + len(stages) or (rest and taken >= total):
        left = f" and leave none to {rest[0]}" if rest else ""
        raise UserError(
            f"the stages take {taken} tokens of the budget's {total}{left}: "
            "raise budget.tokens, or lower theirs"
        )
    if not rest and taken < total - len(stages):
        raise UserError(
            f"the stages take {taken} tokens of the budget's {total}: give one of them neither "
            "tokens nor share, and it takes what is left; or lower the budget"
        )


def _check_held_out(config: UptrainConfig) -> None:
    """Refuse two held-out texts, and measurements of one that is not there."""
    data = config.data
    sources = [key for key in ("eval_path", "eval_split", "eval_documents") if getattr(data, key)]
    if len(sources) > 1:
        names = " and ".join(f"data.{key}" for key in sources)
        raise UserError(f"{names} are both set: the held-out text has one source; keep one")
    if data.eval_split == data.split:
        raise UserError(
            f"data.eval_split (={data.eval_split}) is the split that is trained on: name another"
        )
    if config.eval.every and not sources:
        raise UserError(
            f"eval.every (={config.eval.every}) needs held-out text: "
            "set data.eval_documents, data.eval_split or data.eval_path"
        )
    if config.checkpoint.best and not config.eval.every:
        raise UserError(
            f"checkpoint.best (={config.checkpoint.best}) compares evaluations within stages: "
            "set eval.every, or checkpoint.best=null"
        )
