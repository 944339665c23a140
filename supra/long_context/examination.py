"""The measurements of a diagnosis.

A model reads one long stream, then parts of it again from an empty state, and then texts without
their beginnings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from supra.errors import UserError
from supra.evaluate.text_perplexity import position_edges
from supra.long_context.findings import Head, Losses, Remembrance, Span
from supra.long_context.statistics import (
    DecaySums,
    RecurrentLayers,
    StateStatistics,
    effective_remembrance,
    half_life,
    state_statistics,
)
from supra.long_context.stream import (
    Buckets,
    Reader,
    TokenStream,
    begun,
    cuts,
    fine_edges,
    mean_loss,
)
from supra.long_context.words import departure, end_norm, harm, head_verdict

EVERY = 1024  # tokens between probes of the states
PROBES = 256  # maximum; for 270 heads this takes 4 MB
EIGHTHS = 8  # within the trained length, states are probed at every eighth
SPANS = 16  # number of spans of the trained length that are read again from an empty state
TEXTS, ENDS = 2, 32  # effective remembrance: texts of the trained length, and last tokens of each


@dataclass(frozen=True)
class Plan:
    """What is read, and where states are probed; all in tokens."""

    length: int
    trained: int
    chunk: int
    probes: list[int]
    spans: list[int] = field(init=False)  # where the spans begin that are read again

    def __post_init__(self):
        rows = self.length // self.trained
        count = min(SPANS, rows)
        starts = [self.trained * (n * (rows - 1) // (count - 1)) for n in range(count)]
        object.__setattr__(self, "spans", starts)

    @classmethod
    def of(cls, length: int, trained: int, chunk: int, every: int | None) -> "Plan":
        """Raises UserError for lengths that are too small to show anything."""
        for name, value, minimum in (("trained-length", trained, EIGHTHS), ("chunk", chunk, 1)):
            if value < minimum:
                raise UserError(f"--{name} (={value}) must be at least {minimum}")
        if length < 2 * trained:
            raise UserError(
                f"--to (={length}) must be at least twice the trained length (={trained}): a "
                "diagnosis is about tokens beyond the trained length"
            )
        maximum = (length - trained) // 4
        if every is not None and not 1 <= every <= maximum:
            raise UserError(
                f"--every (={every}) must be from 1 to {maximum}: states are probed at least four "
                "times beyond the trained length"
            )
        every = max(every or min(EVERY, max(1, maximum // 4)), -(-length // PROBES))
        probes = sorted({*range(every, length, every), *eighths(trained), length})
        return cls(length, trained, chunk, probes)

    @property
    def remembrance(self) -> dict[int, tuple[int, int]]:
        """Length of texts -> (number of texts, number of last tokens of each).

        Every length has equally many predictions, all within the last quarter of the shortest
        remaining text.
        """
        wanted = {self.trained: (TEXTS, ENDS), 4 * self.trained: (1, TEXTS * ENDS)}
        return {
            length: (texts, min(ends, max(1, length // (4 * EIGHTHS))))
            for length, (texts, ends) in wanted.items()
            if length <= self.length
        }

    @property
    def steps(self) -> int:
        """The number of tokens that the model reads in total."""
        rests = {n: sum(n - start for start in (0, *eighths(n)[:-1])) for n in self.remembrance}
        remembered = sum(texts * rests[n] for n, (texts, _) in self.remembrance.items())
        return self.length + len(self.spans) * self.trained + remembered


def eighths(length: int) -> list[int]:
    """1/8, 2/8, … 8/8 of a length."""
    return [length * n // EIGHTHS for n in range(1, EIGHTHS + 1)]


class Examination:
    """How one model reads one stream. Every token read moves the progress bar `bar`."""

    def __init__(self, model: PreTrainedModel, layers: RecurrentLayers, plan: Plan, bar: tqdm):
        self.model, self.layers, self.plan, self.bar = model, layers, plan, bar
        half, whole = plan.trained // 2, plan.trained
        self.by_position = Buckets(position_edges(plan.length))
        self.fine = Buckets(fine_edges(plan.length))
        self.parts = Buckets(sorted({0, whole, min(4 * whole, plan.length), plan.length}))
        edges = [start + x for start in plan.spans for x in (half, whole)]
        self.in_stream = Buckets(edges)  # every other bucket is the second half of a span
        self.anew = [Buckets([half, whole]) for _ in plan.spans]
        self.statistics: dict[int, list[Tensor]] = {layer: [] for layer in layers.mixers}
        self.largest: dict[int, Tensor] = {}  # largest norms, [H] per layer
        self.decays = DecaySums(layers)
        self.remembrance: list[Remembrance] = []
        self._tokens: dict[int, list[Tensor]] = {start: [] for start in plan.spans}
        self._beginning: list[Tensor] = []  # the tokens that remembrance needs

    def read(self, stream: TokenStream) -> None:
        self._read_stream(stream)
        spans = {start: torch.cat(parts, dim=1) for start, parts in self._tokens.items()}
        for at, start in enumerate(self.plan.spans):
            self.bar.set_description("read again")
            self._read_anew(begun(spans[start], stream.start), self.anew[at])
        self.bar.set_description("remembrance")
        first, last = self.plan.spans[0], self.plan.spans[-1]
        texts = {self.plan.trained: [spans[x][0] for x in (first, last)]}
        texts[4 * self.plan.trained] = [torch.cat(self._beginning, dim=1)[0]]
        for length, (_, ends) in self.plan.remembrance.items():
            self._remember(length, texts[length], ends, stream.start)

    def _read_stream(self, stream: TokenStream) -> None:
        self.bar.set_description("stream")
        plan, reader, probes = self.plan, Reader(self.model), set(self.plan.probes)
        for start, end in cuts(plan.length, plan.chunk, plan.probes):
            text = stream.take(end - start)
            positions, nats = reader.read(*text)
            for buckets in (self.by_position, self.fine, self.parts, self.in_stream):
                buckets.add(positions, nats)
            for begin, kept in self._tokens.items():
                if begin < end and start < begin + plan.trained:
                    kept.append(text[:, max(0, begin - start) : begin + plan.trained - start])
            if start < 4 * plan.trained:
                self._beginning.append(text[:, : 4 * plan.trained - start])
            if end in probes:
                for layer, memory in self.layers.states(reader).items():
                    self.statistics[layer].append(torch.stack(state_statistics(memory)).cpu())
            self.bar.update(end - start)
            self.bar.set_postfix_str(f"loss {nats.mean():.3f}", refresh=False)
        self.bar.set_postfix_str("")

    def _read_anew(self, text: Tensor, buckets: Buckets) -> None:
        reader, stops = Reader(self.model), set(eighths(self.plan.trained))
        for start, end in cuts(text.shape[1], self.plan.chunk, stops):
            with self.decays.watching(end - start):
                buckets.add(*reader.read(*text[:, start:end]))
            if end in stops:
                for layer, memory in self.layers.states(reader).items():
                    norm = memory.double().flatten(1).norm(dim=1).cpu()
                    self.largest[layer] = norm.maximum(self.largest.get(layer, norm))
            self.bar.update(end - start)

    def _remember(
        self, length: int, texts: list[Tensor], ends: int, start_tokens: Sequence[int]
    ) -> None:
        starts = eighths(length)[:-1]
        settings = {"ends": ends, "chunk": self.plan.chunk, "advance": self.bar.update}
        settings["start_tokens"] = start_tokens
        found = [effective_remembrance(self.model, x, starts, **settings) for x in texts]
        means = [sum(values) / len(values) for values in zip(*found, strict=True)]
        by_start = list(zip(starts, means, strict=True))
        self.remembrance.append(Remembrance(length, len(texts), ends * len(texts), by_start))

    def losses(self) -> Losses:
        parts, trained, length = self.parts.found(), self.plan.trained, self.plan.length
        whole = self.in_stream.found()[::2]
        spans = [
            Span(x.start, x.end, x.loss, mean_loss(anew.found()))
            for x, anew in zip(whole, self.anew, strict=True)
        ]
        later = spans[1:]
        harms = [harm(x.loss, x.anew) for x in later]
        loss, anew = (sum(getattr(x, name) for x in later) for name in ("loss", "anew"))
        return Losses(
            inside=mean_loss(parts, end=trained),
            beyond=mean_loss(parts, start=trained),
            beyond_four=mean_loss(parts, start=4 * trained) if length > 4 * trained else None,
            excess=(loss - anew) / len(later),
            ratio=loss / anew if anew > 0 else math.inf if loss > 0 else 1.0,
            falls_apart_from=departure(harms, [x.start for x in later], 0.0),
            spans=spans,
            by_position=self.by_position.found(),
            fine=self.fine.found(),
        )

    def heads(self) -> list[Head]:
        return [
            self._head(layer, head, torch.stack(self.statistics[layer])[:, :, head])
            for layer in self.layers.mixers
            for head in range(len(self.largest[layer]))
        ]

    def _head(self, layer: int, head: int, statistics: Tensor) -> Head:
        """One head's finding from its statistics [probes, number of statistics]."""
        columns = dict(zip(StateStatistics._fields, statistics.T.tolist(), strict=True))
        beyond = [place > self.plan.trained for place in self.plan.probes]
        norms, places = (
            [x for x, later in zip(values, beyond, strict=True) if later]
            for values in (columns["norm"], self.plan.probes)
        )
        decays = self.decays.sums[layer][head] / len(self.plan.spans)
        mean, slowest = decays.mean().item(), decays.max().item()
        largest, kept = self.largest[layer][head].item(), math.exp(slowest)
        end = end_norm(norms)
        verdict, since = head_verdict(norms, places, largest, kept)
        return Head(
            layer=layer,
            head=head,
            mixer=self.layers.mixers[layer].name,
            log_decay=mean,
            log_decay_slowest=slowest,
            kept=kept,
            half_life=half_life(mean, self.plan.trained),
            largest_norm=largest,
            growth=end / largest if largest > 0 else math.inf if end > 0 else 0.0,
            verdict=verdict,
            since=since,
            statistics=columns,
        )
