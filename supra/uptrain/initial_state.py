"""The states that rows begin with in the stage extend: see `ExtendConfig`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from supra.errors import UserError
from supra.mixers import Mixer
from supra.mixers.base import current_name
from supra.model.cache import cache_length, cache_name
from supra.model.native.adapter import empty_cache
from supra.model.native.cache import NativeStateAndKeys
from supra.model.positions import learned_positions
from supra.model.recurrent import mixers_of
from supra.uptrain.config import UptrainConfig

# After this many tokens, carried rows begin with empty states again. Their positions keep counting,
# and at 2**20 a rotary angle in float32 has an error of 2**20 * 2**-24 = 0.06.
MAX_POSITIONS = 2**20
# The state tensors that noise can replace (sums, and the recent tokens of convolutions), and the
# axis along which each entry has its own size (heads, and channels). Noise cannot replace kept
# keys, lengths and sums of weights.
NOISY = {"memory": 1, "conv_state": 2}


class InitialState:
    """The states before the rows of one process, by micro-batch.

    passes: the numbers of its micro-batches among those of all processes. Noise and what is saved
        depend on these numbers, and not on the process.
    """

    def __init__(
        self, kind: str, model: PreTrainedModel, seed: int, passes: Sequence[int] = range(1)
    ):
        self.kind, self.mixers = kind, mixers_of(model)
        self.empty_cache = partial(empty_cache, model)
        self.positions, self.device = learned_positions(model) or MAX_POSITIONS, model.device
        self.passes = [] if kind == "zero" else list(passes)  # those with saved states
        generators = (torch.Generator(self.device).manual_seed(seed + n) for n in self.passes)
        self.generators = list(generators)
        # for noise: one cache of one row, with the standard deviation of each number; for carried:
        # the states after the last step's rows, one cache per micro-batch
        self.kept: list[Cache] = []

    def begin(self, index: int, rows: int, tokens: int) -> Cache:
        """The cache before the rows of a micro-batch; each row has `tokens` tokens."""
        if self.kind == "noise" and self.kept:
            return self._noise(self.generators[index], rows)
        if self.kind == "carried" and index < len(self.kept):
            cache = self.kept[index]
            if cache_length(cache) + tokens <= self.positions:
                return cache
        return self.empty_cache()

    def end(self, index: int, cache: Cache) -> None:
        """Keep the cache after the rows of a micro-batch, if states are carried."""
        if self.kind != "carried":
            return
        for mixer, layer in self._with_layers(cache):
            if mixer is None:
                layer.reset()  # it drops its keys and values
            elif not mixer.recurrent:
                layer.state = None
        self.kept[index : index + 1] = [cache]

    def drop_carried(self) -> None:
        """Let carried rows begin with empty states again, after a step whose states may not be
        finite."""
        if self.kind == "carried":
            self.kept = []

    def fit(self, cache: Cache, mean: Callable[[Tensor], Tensor]) -> None:
        """Set the size of the noise to that of these states.

        It is the root mean square per layer, tensor, and head or channel. `mean` averages over
        processes.
        """
        kept = self.empty_cache()
        layers = zip(self._with_layers(cache), kept.layers, strict=True)
        for (mixer, layer), new in layers:
            if mixer is not None and mixer.recurrent:
                found = layer.state._asdict().items()
                sizes = {name: _size(x, NOISY[name], mean) for name, x in found if x is not None}
                new.state = layer.state._replace(**sizes)
        self.kept = [kept]

    def _noise(self, generator: torch.Generator, rows: int) -> Cache:
        (sizes,), cache = self.kept, self.empty_cache()
        for layer, size in zip(cache.layers, sizes.layers, strict=True):
            if getattr(size, "state", None) is not None:
                drawn = (x if x is None else _normal(generator, rows, x) for x in size.state)
                layer.state = type(size.state)(*drawn)
        return cache

    def _with_layers(self, cache: Cache) -> Iterator[tuple[Mixer | None, CacheLayerMixin]]:
        return ((self.mixers.get(index), layer) for index, layer in enumerate(cache.layers))

    def state_dicts(self) -> dict[int, dict[str, Tensor]]:
        """By the number of a micro-batch: everything that its next rows depend on."""
        found = {}
        for index, number in enumerate(self.passes):
            caches = self.kept if self.kind == "noise" else self.kept[index : index + 1]
            found[number] = {"generator": self.generators[index].get_state()}
            for cache in caches:
                found[number] |= _tensors(cache)
        return found

    def load_state_dicts(self, found: dict[int, dict[str, Tensor]]) -> None:
        self.kept = []
        for number, generator in zip(self.passes, self.generators, strict=True):
            tensors = {current_name(name): x for name, x in found[number].items()}
            generator.set_state(tensors.pop("generator"))
            if tensors:
                self.kept.append(self._cache(tensors))
        if self.kind == "noise":
            del self.kept[1:]  # the same for all

    def _cache(self, tensors: dict[str, Tensor]) -> Cache:
        """The cache whose tensors `_tensors` has named."""
        cache = self.empty_cache()
        for number, (mixer, layer) in enumerate(self._with_layers(cache)):
            if mixer is None:
                continue
            names = {name: f"0.{number}.{name}" for name in mixer.state_type._fields}
            found = {name: tensors.get(key) for name, key in names.items()}
            layer.length = int(tensors["0.length"])
            if any(x is not None for x in found.values()):
                moved = {n: x if x is None else x.to(self.device) for n, x in found.items()}
                layer.state = mixer.state_type(**moved)
        return cache


def _tensors(cache: Cache) -> dict[str, Tensor]:
    """The tensors of a cache by name: `0.layer.tensor`. Earlier versions put the number of a
    micro-batch in the place of the 0."""
    tensors = {"0.length": torch.tensor(cache_length(cache))}
    for number, layer in enumerate(cache.layers):
        state = getattr(layer, "state", None)
        state = {} if state is None else state._asdict()
        tensors |= {
            f"0.{number}.{name}": x.clone(memory_format=torch.contiguous_format)
            for name, x in state.items()
            if x is not None
        }
    return tensors


def _normal(generator: torch.Generator, rows: int, size: Tensor) -> Tensor:
    """Gaussian numbers for `rows` rows; `size` [1, …] has their standard deviations."""
    like = {"dtype": size.dtype, "device": size.device}
    return size * torch.randn(rows, *size.shape[1:], generator=generator, **like)


def _size(x: Tensor, axis: int, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The root mean square of each entry along the axis, in the shape of one row of x, [1, …]."""
    others = [n for n in range(x.dim()) if n != axis]
    size = mean(x.float().square().mean(others, keepdim=True)).sqrt()
    return size.expand(1, *x.shape[1:]).to(x.dtype)


def check_extends(model: PreTrainedModel, config: UptrainConfig) -> None:
    """Raise UserError for a student that the stage extend cannot train."""
    stage, mixers = config.extend, mixers_of(model)
    setting, length = config.of_stage("extend", "sequence_length")
    tokens = stage.state_passing * length
    if tokens > (maximum := learned_positions(model) or MAX_POSITIONS):
        raise UserError(
            f"extend.state_passing (={stage.state_passing}) x {setting} (={length}) is {tokens} "
            f"tokens, but the student has only {maximum} positions: lower one of them"
        )
    if stage.initial_state == "zero":
        return
    recurrent = {i: x for i, x in mixers.items() if x is not None and x.recurrent}
    if not recurrent:
        raise UserError(
            f"extend.initial_state (={stage.initial_state}) needs recurrent layers, but all layers "
            "of the student keep softmax attention: set it to zero"
        )
    if stage.initial_state == "noise":
        _check_noise(model, recurrent)
    elif any(isinstance(layer, NativeStateAndKeys) for layer in empty_cache(model).layers):
        raise UserError(
            "extend.initial_state (=carried) cannot carry the states of model_type "
            f"{model.config.model_type!r}, whose layers have attention beside them: set it to zero "
            "or noise"
        )


@torch.no_grad()
def _check_noise(model: PreTrainedModel, mixers: dict[int, Mixer]) -> None:
    cache, base = empty_cache(model), model.base_model
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    base(input_ids=tokens, use_cache=True, **{cache_name(base): cache})
    for number, mixer in mixers.items():
        for name, x in cache.layers[number].state._asdict().items():
            if x is not None and name not in NOISY:
                raise UserError(
                    f"extend.initial_state (=noise) cannot replace {name} in the state of layer "
                    f"{number} ({mixer.name}), only {' and '.join(NOISY)}: set it to carried"
                )
