"""The states that rows begin with in the stage extend: see `ExtendConfig`."""

from collections.abc import Callable, Iterator
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
    """The states before the rows of one process, by micro-batch."""

    def __init__(self, kind: str, model: PreTrainedModel, seed: int):
        self.kind, self.mixers = kind, mixers_of(model)
        self.empty_cache = partial(empty_cache, model)
        self.positions, self.device = learned_positions(model) or MAX_POSITIONS, model.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # for noise: one cache of one row, with the standard deviation of each number; for carried:
        # the states after the last step's rows, one cache per micro-batch
        self.kept: list[Cache] = []

    def begin(self, index: int, rows: int, tokens: int) -> Cache:
        """The cache before the rows of a micro-batch; each row has `tokens` tokens."""
        if self.kind == "noise" and self.kept:
            return self._noise(rows)
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

    def _noise(self, rows: int) -> Cache:
        (sizes,), cache = self.kept, self.empty_cache()
        for layer, size in zip(cache.layers, sizes.layers, strict=True):
            if getattr(size, "state", None) is not None:
                drawn = (x if x is None else self._normal(rows, x) for x in size.state)
                layer.state = type(size.state)(*drawn)
        return cache

    def _with_layers(self, cache: Cache) -> Iterator[tuple[Mixer | None, CacheLayerMixin]]:
        return ((self.mixers.get(index), layer) for index, layer in enumerate(cache.layers))

    def _normal(self, rows: int, size: Tensor) -> Tensor:
        """Gaussian numbers for `rows` rows; `size` [1, …] has their standard deviations."""
        shape = rows, *size.shape[1:]
        like = {"dtype": size.dtype, "device": size.device}
        return size * torch.randn(shape, generator=self.generator, **like)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next rows depend on; tensors are named `micro-batch.layer.tensor`."""
        tensors = {"generator": self.generator.get_state()}
        for index, cache in enumerate(self.kept):
            tensors[f"{index}.length"] = torch.tensor(cache_length(cache))
            for number, layer in enumerate(cache.layers):
                state = getattr(layer, "state", None)
                state = {} if state is None else state._asdict()
                tensors |= {
                    f"{index}.{number}.{name}": x.clone(memory_format=torch.contiguous_format)
                    for name, x in state.items()
                    if x is not None
                }
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        tensors = {current_name(name): x for name, x in tensors.items()}
        self.generator.set_state(tensors["generator"])
        lengths = [name for name in tensors if name.endswith(".length") and name.count(".") == 1]
        self.kept = [self.empty_cache() for _ in lengths]
        for index, cache in enumerate(self.kept):
            for number, (mixer, layer) in enumerate(self._with_layers(cache)):
                if mixer is None:
                    continue
                names = {name: f"{index}.{number}.{name}" for name in mixer.state_type._fields}
                found = {name: tensors.get(key) for name, key in names.items()}
                layer.length = int(tensors[f"{index}.length"])
                if any(x is not None for x in found.values()):
                    moved = {n: x if x is None else x.to(self.device) for n, x in found.items()}
                    layer.state = mixer.state_type(**moved)


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
