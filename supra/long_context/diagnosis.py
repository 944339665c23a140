"""`supra diagnose`: reads one long text and says what becomes of loss and states beyond the length
that a model was trained on, and what cures it."""

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
from supra.checkpoint.loading import load_model, overflow
from supra.checkpoint.opening import Checkpoint
from supra.data.text import open_documents
from supra.errors import UserError, check_choice
from supra.evaluate.tasks.heat_map import need_matplotlib
from supra.long_context.cures import CONFIGURED, Fix, trials_of, try_cures, write_policy
from supra.long_context.examination import Examination, Plan
from supra.long_context.findings import Diagnosis
from supra.long_context.pictures import draw_loss, draw_states
from supra.long_context.statistics import RecurrentLayers
from supra.long_context.stream import TokenStream, begun
from supra.mixers.state_policy import StatePolicy
from supra.model.positions import check_positions

TO = 65536
FIX_LENGTHS = 8  # trained lengths that cures are tried on
# a threshold for heads whose state was empty throughout the trained length
LEAST_NORM = 1e-6


def diagnose(
    checkpoint: Checkpoint,
    text: str,
    *,
    text_field: str = "text",
    to: int = TO,
    trained_length: int | None = None,
    chunk: int = 1024,
    every: int | None = None,
    out: Path | None = None,
    fix: str | None = None,
    fix_text: str | None = None,
    fix_to: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Read `to` tokens of `text` as one stream, without a reset between its documents.

    Args:
        trained_length: tokens of a row in training; None is what the run that left the checkpoint
            says.
        chunk: tokens of one forward pass. It changes time and memory, and no result.
        every: tokens from one look at the states to the next, or more where those would be over
            256. None is 1024, or less where the text is short.
        out: folder to make, for diagnosis.json, loss.png and states.png.
        fix: "auto" tries the cures of `supra.long_context.cures` and writes the best one into the
            checkpoint's config.json.
        fix_text: what they are tried on. None is what follows in `text`; where that is too short,
            its beginning.
        fix_to: tokens of it; None is eight trained lengths.

    Raises UserError for a model without recurrent layers, and for lengths that do not fit.
    """
    trained = recorded_length(checkpoint) if trained_length is None else trained_length
    plan = Plan.of(to, trained, chunk, every)
    _check_fix(checkpoint, fix, fix_text, fix_to, trained)
    if out is not None:
        need_matplotlib("--out")
        check_vacant(out)
    tokenizer = checkpoint.tokenizer()
    stream = TokenStream(tokenizer, open_documents(text, text_field))
    other = None
    if fix_text is not None:
        other = TokenStream(tokenizer, open_documents(fix_text, text_field))
    model = load_model(checkpoint, dtype, may_overflow=True).eval()  # overflow is a finding here
    layers = RecurrentLayers.of(model)
    check_positions(model, "--to", to)
    if fix is not None:
        fix_to = fix_to or FIX_LENGTHS * trained
        check_positions(model, "--fix-to", fix_to)
    with tqdm(total=plan.steps, unit="token", unit_scale=True, disable=not progress) as bar:
        found = Examination(model, layers, plan, bar)
        found.read(stream)
    losses = found.losses()
    if not math.isfinite(losses.inside):
        raise overflow(model)
    result = Diagnosis(
        model=checkpoint.name,
        text=text,
        tokens=to,
        restarts=stream.restarts,
        trained_length=trained,
        policy=model.config.state_policy,
        kept_attention=layers.kept,
        losses=losses,
        probes=plan.probes,
        heads=found.heads(),
        remembrance=found.remembrance,
    )
    if fix is not None:
        if other is not None:
            tokens = other.take(fix_to)
            which = fix_text + (", read more than once" if other.restarts else "")
        else:
            again = TokenStream(tokenizer, open_documents(text, text_field))
            tokens, which = _what_follows(stream, again, fix_to, text)
        tokens = begun(tokens, stream.start)
        cures = _fix(model, checkpoint, result, tokens, which, chunk, progress)
        result = replace(result, fix=cures)
    if out is not None:
        _write(result, out)
    return result


def recorded_length(checkpoint: Checkpoint) -> int:
    """Tokens of a row in the run of `supra uptrain` whose folder the checkpoint lies in: the
    state's, so all segments of a row where it was passed on. Raises UserError where there is none.
    """
    folder = checkpoint.folder.absolute()
    path = folder.parent / "config.yaml"
    if folder.name != "final" or not path.is_file():
        raise UserError(
            f"--trained-length is missing: {checkpoint.name} lies in no folder of `supra uptrain` "
            "that would say how long its rows were in training"
        )
    try:
        config = yaml.safe_load(path.read_bytes())
        extended = config.get("extend") or {}
        return config["data"]["sequence_length"] * extended.get("state_passing", 1)
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not what `supra uptrain` wrote ({type(error).__name__}): give "
            "--trained-length"
        ) from error


def _check_fix(
    checkpoint: Checkpoint, fix: str | None, text: str | None, to: int | None, trained: int
) -> None:
    """Raise UserError for what would fail after all has been read."""
    if fix is None:
        for name, value in (("fix-text", text), ("fix-to", to)):
            if value is not None:
                raise UserError(f"--{name} is for --fix auto: give both")
        return
    check_choice("fix", fix, ("auto",))
    if checkpoint.hub_id is not None:
        raise UserError(
            f"--fix writes into the config.json of the model, and {checkpoint.name} is no folder "
            "here: save it into one first"
        )
    if to is not None and to < 2 * trained:
        raise UserError(
            f"--fix-to (={to}) must be at least twice the trained length (={trained}): cures act "
            "beyond that"
        )


def _what_follows(
    stream: TokenStream, again: TokenStream, count: int, text: str
) -> tuple[Tensor, str]:
    """The next tokens of the stream with their labels [2, count], and what they are. If the text
    ends, they come from `again`, the same text from its beginning."""
    before = stream.restarts
    tokens = stream.take(count)
    if stream.restarts == before:
        return tokens, f"{text}, those that follow"
    return again.take(count), f"{text}, its beginning again: too little follows"


def _fix(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    found: Diagnosis,
    tokens: Tensor,
    which: str,
    chunk: int,
    progress: bool,
) -> Fix:
    """Try the cures; write the best where it is not in the config already."""
    norms: list[list[float]] = [[] for _ in range(model.config.num_hidden_layers)]
    for head in found.heads:
        norms[head.layer].append(max(head.largest_norm, LEAST_NORM))
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
