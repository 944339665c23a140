"""The reading that a diagnosis rests on: one stream, parts of it anew, and parts without their
beginnings."""

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

EVERY = 1024  # tokens
PROBES = 256  # at most; of 270 heads they are 4 MB
EIGHTHS = 8  # of the trained length: where states within it are looked at
SPANS = 16  # trained lengths of the stream that are read anew
TEXTS, ENDS = 2, 32  # of effective remembrance: texts of the trained length, last tokens of each


@dataclass(frozen=True)
class Plan:
    """What is read and where it is looked at, in tokens."""

    to: int
    trained: int
    chunk: int
    probes: list[int]
    spans: list[int] = field(init=False)  # where the parts begin that are read anew

    def __post_init__(self):
        rows = self.to // self.trained
        count = min(SPANS, rows)
        starts = [self.trained * (n * (rows - 1) // (count - 1)) for n in range(count)]
        object.__setattr__(self, "spans", starts)

    @classmethod
    def of(cls, to: int, trained: int, chunk: int, every: int | None) -> "Plan":
        """Raises UserError for lengths that leave nothing to be seen."""
        for name, value, least in (("trained-length", trained, EIGHTHS), ("chunk", chunk, 1)):
            if value < least:
                raise UserError(f"--{name} (={value}) must be at least {least}")
        if to < 2 * trained:
            raise UserError(
                f"--to (={to}) must be at least twice the trained length (={trained}): what there "
                "is to see lies beyond that"
            )
        most = (to - trained) // 4
        if every is not None and not 1 <= every <= most:
            raise UserError(
                f"--every (={every}) must be from 1 to {most}: states are looked at four times "
                "beyond the trained length at least"
            )
        every = max(every or min(EVERY, max(1, most // 4)), -(-to // PROBES))
        return cls(to, trained, chunk, sorted({*range(every, to, every), *eighths(trained), to}))

    @property
    def remembrance(self) -> dict[int, tuple[int, int]]:
        """Lengths of texts -> how many texts, and how many last tokens of each; as many predictions
        of every length, and all within the last quarter of the shortest rest."""
        wanted = {self.trained: (TEXTS, ENDS), 4 * self.trained: (1, TEXTS * ENDS)}
        return {
            length: (texts, min(ends, max(1, length // (4 * EIGHTHS))))
            for length, (texts, ends) in wanted.items()
            if length <= self.to
        }

    @property
    def steps(self) -> int:
        """Tokens that the model reads in all."""
        rests = {n: sum(n - start for start in (0, *eighths(n)[:-1])) for n in self.remembrance}
        remembered = sum(texts * rests[n] for n, (texts, _) in self.remembrance.items())
        return self.to + len(self.spans) * self.trained + remembered


def eighths(length: int) -> list[int]:
    return [length * n // EIGHTHS for n in range(1, EIGHTHS + 1)]


class Examination:
    """What one model does with one stream. `bar` hears of every token that it reads."""

    def __init__(self, model: PreTrainedModel, layers: RecurrentLayers, plan: Plan, bar: tqdm):
        self.model, self.layers, self.plan, self.bar = model, layers, plan, bar
        half, whole = plan.trained // 2, plan.trained
        self.by_position = Buckets(position_edges(plan.to))
        self.fine = Buckets(fine_edges(plan.to))
        self.parts = Buckets(sorted({0, whole, min(4 * whole, plan.to), plan.to}))
        edges = [start + x for start in plan.spans for x in (half, whole)]
        self.in_stream = Buckets(edges)  # every other bucket is the second half of a span
        self.anew = [Buckets([half, whole]) for _ in plan.spans]
        self.statistics: dict[int, list[Tensor]] = {layer: [] for layer in layers.mixers}
        self.largest: dict[int, Tensor] = {}  # norms, [H] a layer
        self.decays = DecaySums(layers)
        self.remembrance: list[Remembrance] = []
        self._tokens: dict[int, list[Tensor]] = {start: [] for start in plan.spans}
        self._beginning: list[Tensor] = []  # as much as remembrance asks for

    def read(self, stream: TokenStream) -> None:
        self._read_stream(stream)
        spans = {start: torch.cat(parts, dim=1) for start, parts in self._tokens.items()}
        for at, start in enumerate(self.plan.spans):
            self.bar.set_description("read anew")
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
        for start, end in cuts(plan.to, plan.chunk, plan.probes):
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
        parts, trained, to = self.parts.found(), self.plan.trained, self.plan.to
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
            beyond_four=mean_loss(parts, start=4 * trained) if to > 4 * trained else None,
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
        """From its statistics [probes, their number]."""
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
