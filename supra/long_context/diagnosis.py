"""`supra diagnose`: reads one long text, and shows how loss and states behave beyond the length
that a model was trained on, and which cure helps."""

import math
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from supra.checkpoint.files import check_vacant, staged_folder
from supra.checkpoint.json_files import to_json
from supra.checkpoint.opening import Checkpoint
from supra.data.text import open_documents
from supra.errors import UserError, check_choice
from supra.evaluate.tasks.heat_map import need_matplotlib
from supra.long_context.apply_policy import policy_of
from supra.long_context.cures import CONFIGURED, Fix, trials_of, try_cures, write_policy
from supra.long_context.examination import Examination, Plan
from supra.long_context.findings import Diagnosis
from supra.long_context.pictures import draw_loss, draw_states
from supra.long_context.statistics import RecurrentLayers
from supra.long_context.stream import TokenStream, begun
from supra.mixers.state_policy import StatePolicy
from supra.model.loading import load_model, overflow
from supra.model.positions import check_positions

STREAM_LENGTH = 65536  # default number of tokens to read
STAGES = ("orient", "align", "distill", "tune", "extend")  # of a run of `supra uptrain`
FIX_LENGTHS = 8  # default length of the text for cures, in trained lengths
# norm threshold for heads whose state was empty throughout the trained length
MIN_NORM = 1e-6


def diagnose(
    checkpoint: Checkpoint,
    text: str,
    *,
    text_field: str = "text",
    stream_length: int = STREAM_LENGTH,
    trained_length: int | None = None,
    chunk: int = 1024,
    every: int | None = None,
    out: Path | None = None,
    fix: str | None = None,
    fix_text: str | None = None,
    fix_length: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Read `stream_length` tokens of `text` as one stream; documents do not reset the state.

    Args:
        trained_length: tokens per row in training; None reads it from the config of the run that
            wrote the checkpoint.
        chunk: tokens per forward pass. It changes time and memory, but no result.
        every: tokens between two probes of the states; it is raised when there would be more than
            256 probes. None means 1024, or less for a short text.
        out: new folder for diagnosis.json, loss.png and states.png.
        fix: "auto" tries the cures of `supra.long_context.cures` and writes the best one into the
            checkpoint's config.json.
        fix_text: the text that cures are tried on. None continues in `text`, or starts it again if
            too little of it is left.
        fix_length: number of its tokens; None means eight trained lengths.

    Raises UserError for a model without recurrent layers, and for lengths that do not fit.
    """
    trained = recorded_length(checkpoint) if trained_length is None else trained_length
    plan = Plan.of(stream_length, trained, chunk, every)
    _check_fix(checkpoint, fix, fix_text, fix_length, trained)
    if out is not None:
        need_matplotlib("--out")
        check_vacant(out)

    tokenizer = checkpoint.tokenizer()

    def open_stream(path: str) -> TokenStream:
        return TokenStream(tokenizer, open_documents(path, text_field))

    stream = open_stream(text)
    other = None if fix_text is None else open_stream(fix_text)
    model = load_model(checkpoint, dtype, may_overflow=True).eval()  # overflow is a finding here
    layers = RecurrentLayers.of(model)
    check_positions(model, "--to", stream_length)
    if fix is not None:
        fix_length = fix_length or FIX_LENGTHS * trained
        check_positions(model, "--fix-to", fix_length)
    result = _examine(checkpoint, text, model, layers, plan, stream, progress)
    if fix is not None:
        if other is None:
            tokens, which = _following_tokens(stream, open_stream(text), fix_length, text)
        else:
            tokens = other.take(fix_length)
            which = fix_text + (", read more than once" if other.restarts else "")
        tokens = begun(tokens, stream.start)
        cures = _fix(model, checkpoint, result, tokens, which, chunk, progress)
        result = replace(result, fix=cures)
    if out is not None:
        _write(result, out)
    return result


def _examine(
    checkpoint: Checkpoint,
    text: str,
    model: PreTrainedModel,
    layers: RecurrentLayers,
    plan: Plan,
    stream: TokenStream,
    progress: bool,
) -> Diagnosis:
    """Read the stream. Raises UserError if the loss is not finite even within the trained
    length."""
    with tqdm(total=plan.steps, unit="token", unit_scale=True, disable=not progress) as bar:
        found = Examination(model, layers, plan, bar)
        found.read(stream)
    losses = found.losses()
    if not math.isfinite(losses.inside):
        raise overflow(model)
    return Diagnosis(
        model=checkpoint.name,
        text=text,
        tokens=plan.length,
        restarts=stream.restarts,
        trained_length=plan.trained,
        policy=policy_of(model),
        kept_attention=layers.kept,
        losses=losses,
        probes=plan.probes,
        heads=found.heads(),
        remembrance=found.remembrance,
    )


def recorded_length(checkpoint: Checkpoint) -> int:
    """The trained length in the config of the `supra uptrain` run that wrote the checkpoint.

    This is the longest row of its stages. If the run passed states from segment to segment, it is
    the length of all segments of a row.
    Raises UserError if the checkpoint lies in no such run.
    """
    folder = checkpoint.folder.absolute()
    path = folder.parent / "config.yaml"
    if folder.name != "final" or not path.is_file():
        raise UserError(
            f"--trained-length is missing: {checkpoint.name} does not lie in a folder of `supra "
            "uptrain`, whose config would give the length; give --trained-length"
        )
    try:
        config = yaml.safe_load(path.read_bytes())
        shared = config["data"]["sequence_length"]
        stages = [config[name] for name in STAGES if config.get(name)]
        lengths = [
            (stage.get("sequence_length") or shared) * stage.get("state_passing", 1)
            for stage in stages
        ]
        return max(lengths, default=shared)
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a config of `supra uptrain` ({type(error).__name__}): give "
            "--trained-length"
        ) from error


def _check_fix(
    checkpoint: Checkpoint, fix: str | None, text: str | None, length: int | None, trained: int
) -> None:
    """Raise UserError for mistakes that would otherwise show after the whole text has been read."""
    if fix is None:
        for name, value in (("fix-text", text), ("fix-to", length)):
            if value is not None:
                raise UserError(f"--{name} (={value}) is only for --fix auto: give both")
        return
    check_choice("fix", fix, ("auto",))
    if checkpoint.hub_id is not None:
        raise UserError(
            f"--fix writes into the config.json of the model, and {checkpoint.name} is not a local "
            "folder: save it into one first"
        )
    if length is not None and length < 2 * trained:
        raise UserError(
            f"--fix-to (={length}) must be at least twice the trained length (={trained}): cures "
            "act beyond the trained length"
        )


def _following_tokens(
    stream: TokenStream, again: TokenStream, count: int, text: str
) -> tuple[Tensor, str]:
    """The next tokens of the stream with their labels [2, count], and a description of them.

    If the text ends before that, they come from `again`, the same text from its beginning.
    """
    before = stream.restarts
    tokens = stream.take(count)
    if stream.restarts == before:
        return tokens, f"{text}, after the tokens read before"
    return again.take(count), f"{text}, from its beginning: too little text follows"


def _fix(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    found: Diagnosis,
    tokens: Tensor,
    which: str,
    chunk: int,
    progress: bool,
) -> Fix:
    """Try the cures, and write the best one into the config unless it is already there."""
    norms: list[list[float]] = [[] for _ in range(model.config.num_hidden_layers)]
    for head in found.heads:
        norms[head.layer].append(max(head.largest_norm, MIN_NORM))
    configured = None if found.policy is None else StatePolicy.from_dict(found.policy)
    ids, labels = tokens
    steps = trials_of(found.trained_length, configured) * len(ids)
    with tqdm(total=steps, unit="token", unit_scale=True, disable=not progress) as bar:
        bar.set_description("cures")
        trials, best = try_cures(
            model, ids, found.trained_length, norms,
            labels=labels, chunk=chunk, configured=configured, advance=bar.update,
        )  # fmt: skip
    fix = Fix(which, len(ids), found.trained_length, trials, best, written=None)
    if best in (None, CONFIGURED):
        return fix
    path = write_policy(checkpoint.folder, fix.trial(best).policy)
    return replace(fix, written=str(path))


def _write(found: Diagnosis, out: Path) -> None:
    with staged_folder(out) as folder:
        text = to_json(found.as_dict(), indent=1) + "\n"
        (folder / "diagnosis.json").write_text(text, encoding="utf-8")
        draw_loss(found, folder / "loss.png")
        draw_states(found, folder / "states.png")
