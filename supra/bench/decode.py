"""`supra bench decode`: teacher and student at growing lengths, in transformers, there with a
compiled step, and in llama.cpp.

Every model is measured at every length in a process of its own, so that its peak of memory is its
own. The context is random tokens, since time does not depend on what they say. Students read all of
them. A teacher would take hours for that: it reads a part, and the rest of its cache are copies of
the part's keys and values. Then tokens are decoded one by one, and the median of their times
counts.

Where batches and models are small, a step's time goes into starting operators. So torch's profiler
counts those of one step, each with the operators that it calls. A compiled step needs a static
cache, which has its own places for keys: there a teacher reads all tokens.
"""

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel, StaticCache

from supra.bench.compile import table
from supra.bench.timing import forget_peak_memory, peak_memory, processor
from supra.checkpoint.json_files import to_json
from supra.checkpoint.opening import Checkpoint, find_checkpoint, parse_dtype
from supra.errors import check_choice
from supra.export import llama_cpp
from supra.export.converted import KEPT
from supra.export.gguf import transformer
from supra.export.gguf.target import gguf_model, needs_attention
from supra.export.gguf.types import TYPES
from supra.export.gguf.vocabulary import vocabulary
from supra.export.gguf.writer import write_gguf
from supra.export.llama_cpp import LlamaCpp
from supra.export.targets import check_exportable
from supra.model.compiled_decoding import compiled_decoding

TRANSFORMERS, COMPILED, LLAMA_CPP = ENGINES = ("transformers", "compiled", "llama.cpp")
TEACHER, STUDENT = ROLES = ("teacher", "student")
PART = 1024  # tokens that a teacher reads, and that a student reads at once
WARM_UP = 3  # decoded tokens that do not count; the first of them compile
COLUMNS = ("engine", "dtype", "rows", "tokens", "teacher ms", "student ms", "times as fast")
COLUMNS += ("teacher tokens/s", "student tokens/s", "teacher state MB", "student state MB")
COLUMNS += ("teacher peak MB", "student peak MB", "teacher operators", "student operators")


class Job(NamedTuple):
    """One measurement: a model's folder, or its GGUF file for llama.cpp, which decodes one row on
    the CPU. "compiled" is transformers with a compiled step."""

    engine: str
    role: str
    source: str
    dtype: str
    length: int
    tokens: int
    threads: int
    batch: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Speed:
    """seconds: for one token of every row, the median. state: bytes of the cache after the context.
    peak: of the process on the device, in bytes. operators: of one step, in transformers."""

    engine: str
    role: str
    length: int
    seconds: float
    state: int
    peak: int
    dtype: str
    batch: int = 1
    operators: int | None = None

    @property
    def setting(self) -> tuple[str, str, int]:
        """All but the model and the length."""
        return self.engine, self.dtype, self.batch


def report(
    student: str,
    *,
    teacher: str,
    lengths: Sequence[int] = (2048, 8192, 32768),
    tokens: int = 32,
    engines: Sequence[str] = (TRANSFORMERS, LLAMA_CPP),
    type: str = "q8_0",
    dtypes: Sequence[str] = ("float32",),
    batches: Sequence[int] = (1,),
    as_json: bool = False,
) -> None:
    """Print a table, or JSON. dtypes and batches are those of transformers; llama.cpp decodes one
    row in `type`. Raises UserError for a student that llama.cpp cannot hold."""
    for engine in engines:
        check_choice("engines", engine, ENGINES)
    check_choice("type", type, TYPES)
    for dtype in dtypes:
        parse_dtype(dtype)
    models = {TEACHER: find_checkpoint(teacher), STUDENT: find_checkpoint(student)}
    if LLAMA_CPP in engines:
        llama_cpp.version()
        check_exportable(models[STUDENT], models[STUDENT].config(), "gguf")
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            (engine, role): model.name
            for engine in (TRANSFORMERS, COMPILED)
            for role, model in models.items()
        }
        if LLAMA_CPP in engines:
            for role, model in models.items():
                file = Path(folder) / f"{role}.gguf"
                _write(model, role, file, type)
                sources[LLAMA_CPP, role] = str(file)
        threads = torch.get_num_threads()
        given = [*itertools.product(dtypes, batches)]
        settings = {TRANSFORMERS: given, COMPILED: given, LLAMA_CPP: [(type, 1)]}
        jobs = [
            Job(engine, role, sources[engine, role], dtype, length, tokens, threads, batch)
            for engine in engines
            for dtype, batch in settings[engine]
            for length in lengths
            for role in ROLES
        ]
        speeds = [_said(_alone(job)) for job in jobs]
    versions = {"machine": processor("cpu"), "torch": torch.__version__}
    if LLAMA_CPP in engines:
        versions |= {"llama.cpp": llama_cpp.version()}
    if as_json:
        print(to_json(versions | {"speeds": [asdict(speed) for speed in speeds]}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in versions.items()) + "\n")
    print("\n".join(table(COLUMNS, rows(speeds))))
    print("\n" + "\n".join(growth(speeds)))


def rows(speeds: Sequence[Speed]) -> list[list[str]]:
    """The cells of the table: a setting and a length in every row."""
    found = {(x.setting, x.length, x.role): x for x in speeds}
    lines = []
    for setting, length in dict.fromkeys((x.setting, x.length) for x in speeds):
        pair = [found[setting, length, role] for role in ROLES]
        engine, dtype, batch = setting
        times = [f"{1e3 * x.seconds:.1f}" for x in pair]
        ratio = f"{pair[0].seconds / pair[1].seconds:.2f}"
        rates = [f"{batch / x.seconds:,.1f}" for x in pair]
        memory = [f"{getattr(x, name) / 1e6:,.1f}" for name in ("state", "peak") for x in pair]
        counts = ["" if x.operators is None else f"{x.operators:,}" for x in pair]
        given = engine, dtype, str(batch), f"{length:,}"
        lines.append([*given, *times, ratio, *rates, *memory, *counts])
    return lines


def growth(speeds: Sequence[Speed]) -> list[str]:
    """How much longer a token takes at the last length than at the first."""
    lines = []
    for setting, role in dict.fromkeys((x.setting, x.role) for x in speeds):
        own = [x for x in speeds if (x.setting, x.role) == (setting, role)]
        first, last = own[0], own[-1]
        lines.append(
            f"{_named(first)}: a token at {last.length:,} takes "
            f"{last.seconds / first.seconds:.2f} times as long as at {first.length:,}"
        )
    return lines


def _said(speed: Speed) -> Speed:
    """The same measurement, printed to stderr: the whole table takes minutes."""
    where = f"{_named(speed)} at {speed.length:,} tokens"
    print(f"{where}: {1e3 * speed.seconds:.1f} ms a token", file=sys.stderr, flush=True)
    return speed


def _named(speed: Speed) -> str:
    rows = "" if speed.batch == 1 else f", {speed.batch} rows"
    return f"{speed.engine}, {speed.dtype}{rows}, {speed.role}"


def _write(model: Checkpoint, role: str, file: Path, type: str) -> None:
    if role == TEACHER:
        rewritten = transformer.gguf_model(model)
    else:
        config = model.config()
        idle = needs_attention(config) and KEPT not in config.supra["layers"]
        rewritten, _ = gguf_model(model, idle)
    write_gguf(rewritten, vocabulary(model.tokenizer(), rewritten.vocabulary_size), file, type)


def _alone(job: Job) -> Speed:
    """The measurement in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure, job).result()


def measure(job: Job) -> Speed:
    """Fill the context and decode. Raises UserError for a model that does not load."""
    torch.set_num_threads(job.threads)
    forget_peak_memory(job.device)
    forms = {LLAMA_CPP: _in_llama_cpp, COMPILED: _compiled, TRANSFORMERS: _in_transformers}
    measured = forms[job.engine]
    times, state, operators = measured(job)
    return Speed(
        job.engine, job.role, job.length, statistics.median(times[WARM_UP:]), state,
        peak_memory(job.device), job.dtype, job.batch, operators,
    )  # fmt: skip


def count_operators(call: Callable[[], object]) -> int:
    """How many operators of torch a call runs, with those that operators call."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    kinds = "aten::", "supra::"
    return sum(event.name.startswith(kinds) for event in found.events())


def _in_llama_cpp(job: Job) -> tuple[list[float], int, None]:
    room = job.length + job.tokens + WARM_UP
    with LlamaCpp(Path(job.source), context=room, exact=False, threads=job.threads) as engine:
        text = _random_tokens(engine.vocabulary_size, job.length).tolist()
        if engine.only_attends:
            part = _part(job.length)
            engine.read(text[:part], logits=False)
            engine.repeat(job.length // part)
        else:
            engine.read(text, logits=False)
        state = engine.state_bytes
        return _times(lambda token: int(engine.read([token]).argmax()), job.tokens), state, None


@torch.no_grad()
def _in_transformers(job: Job) -> tuple[list[float], int, int]:
    model = find_checkpoint(job.source).model(parse_dtype(job.dtype)).eval().to(job.device)
    tokens = _random_tokens(model.config.vocab_size, job.length)
    cache = _filled(model, tokens.to(job.device).expand(job.batch, -1))
    state = _state_bytes(cache)

    def step(token: int) -> int:
        given = torch.full((job.batch, 1), token, device=job.device)
        return int(model(given, past_key_values=cache, use_cache=True).logits[0, -1].argmax())

    times = _times(step, job.tokens)
    given = torch.ones(job.batch, 1, dtype=torch.int64, device=job.device)
    operators = count_operators(lambda: model(given, past_key_values=cache, use_cache=True))
    return times, state, operators


@torch.no_grad()
def _compiled(job: Job) -> tuple[list[float], int, None]:
    model = find_checkpoint(job.source).model(parse_dtype(job.dtype)).eval().to(job.device)
    places = job.length + WARM_UP + job.tokens
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=places)
    tokens = _random_tokens(model.config.vocab_size, job.length).to(job.device)
    for part in tokens.expand(job.batch, -1).split(PART, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    state, position = _state_bytes(cache), itertools.count(job.length)
    call = model.get_compiled_call(compiled_decoding()["compile_config"])

    def step(token: int) -> int:
        given, at = (
            torch.full((job.batch, 1), x, device=job.device) for x in (token, next(position))
        )
        output = call(input_ids=given, position_ids=at, past_key_values=cache, use_cache=True)
        return int(output.logits[0, -1].argmax())

    return _times(step, job.tokens), state, None


def _filled(model: PreTrainedModel, tokens: torch.Tensor) -> Cache:
    """A model's cache after tokens [B, T]. A teacher's keys and values are copies of a part's."""
    length = tokens.shape[1]
    if model.config.model_type == "supra":
        cache = None
        for part in tokens.split(PART, dim=1):
            output = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        return cache
    part = _part(length)
    cache = model(tokens[:, :part], use_cache=True, logits_to_keep=1).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = (
            x.repeat(1, 1, length // part, 1) for x in (layer.keys, layer.values)
        )
    return cache


def _state_bytes(cache: Cache) -> int:
    """Bytes of a cache's tensors."""
    states = [getattr(x, "state", None) or (x.keys, x.values) for x in cache.layers]
    return sum(x.nbytes for state in states for x in state if x is not None)


def _times(step: Callable[[int], int], tokens: int) -> list[float]:
    """Seconds of every step, each with the token that the one before returned."""
    token, times = 1, []
    for _ in range(tokens + WARM_UP):
        start = time.perf_counter()
        token = step(token)
        times.append(time.perf_counter() - start)
    return times


def _part(length: int) -> int:
    """The number of tokens that a teacher reads: the largest up to PART that divides the length."""
    return next(part for part in range(min(PART, length), 0, -1) if length % part == 0)


def _random_tokens(vocabulary_size: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size, (count,), generator=generator)
