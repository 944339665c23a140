"""From what the rows of the stage extend begin: see `ExtendConfig`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from supra.errors import UserError
from supra.mixers import Mixer
from supra.mixers.base import current_name
from supra.model.attention import attention_modules
from supra.model.cache import new_cache
from supra.model.families import no_mixer
from supra.model.positions import learned_positions
from supra.uptrain.config import UptrainConfig

# Tokens after which carried rows begin from nothing once more: their positions go on, and there an
# angle of a rotary embedding in float32 is wrong by 2**20 * 2**-24 = 0.06.
MOST_POSITIONS = 2**20
# What noise can stand for, sums and the tokens of convolutions, and the axis whose entries have a
# size each: the heads, and the channels. Kept keys, lengths and sums of weights it cannot.
NOISY = {"memory": 1, "conv_state": 2}


class InitialState:
    """The states before a process's rows, by micro-batch."""

    def __init__(self, kind: str, model: PreTrainedModel, seed: int):
        self.kind, self.mixers = kind, mixers_of(model)
        self.positions, self.device = learned_positions(model) or MOST_POSITIONS, model.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # noise: one cache, of one row, with the standard deviation of each number; carried: the
        # ends of the last step's rows, a cache for each of its micro-batches
        self.kept: list[Cache] = []

    def begin(self, index: int, rows: int, tokens: int) -> Cache:
        """The cache before the rows of a micro-batch, of so many tokens each."""
        if self.kind == "noise" and self.kept:
            return self._noise(rows)
        if self.kind == "carried" and index < len(self.kept):
            cache = self.kept[index]
            if cache.get_seq_length() + tokens <= self.positions:
                return cache
        return new_cache(len(self.mixers))

    def end(self, index: int, cache: Cache) -> None:
        """Take note of the cache after the rows of a micro-batch."""
        if self.kind != "carried":
            return
        for mixer, layer in zip(self.mixers, cache.layers, strict=True):
            if not mixer.recurrent:
                layer.state = None
        self.kept[index : index + 1] = [cache]

    def fit(self, cache: Cache, mean: Callable[[Tensor], Tensor]) -> None:
        """Noise of the size of these states: per layer, tensor and head, or channel, the square
        root of the mean square, over what `mean` sees of other processes too."""
        kept = new_cache(len(self.mixers))
        for mixer, new, layer in zip(self.mixers, kept.layers, cache.layers, strict=True):
            if mixer.recurrent:
                found = layer.state._asdict().items()
                sizes = {name: _size(x, NOISY[name], mean) for name, x in found if x is not None}
                new.state = layer.state._replace(**sizes)
        self.kept = [kept]

    def _noise(self, rows: int) -> Cache:
        (sizes,), cache = self.kept, new_cache(len(self.mixers))
        for layer, size in zip(cache.layers, sizes.layers, strict=True):
            if size.state is not None:
                drawn = (x if x is None else self._normal(rows, x) for x in size.state)
                layer.state = type(size.state)(*drawn)
        return cache

    def _normal(self, rows: int, size: Tensor) -> Tensor:
        """Gaussian numbers for so many rows, with these standard deviations of one [1, …]."""
        shape = rows, *size.shape[1:]
        like = {"dtype": size.dtype, "device": size.device}
        return size * torch.randn(shape, generator=self.generator, **like)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next rows depend on: what is kept, as `micro-batch.layer.tensor`."""
        tensors = {"generator": self.generator.get_state()}
        for index, cache in enumerate(self.kept):
            tensors[f"{index}.length"] = torch.tensor(cache.get_seq_length())
            for number, layer in enumerate(cache.layers):
                state = {} if layer.state is None else layer.state._asdict()
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
        self.kept = [new_cache(len(self.mixers)) for _ in lengths]
        for index, cache in enumerate(self.kept):
            for number, (mixer, layer) in enumerate(zip(self.mixers, cache.layers, strict=True)):
                names = {name: f"{index}.{number}.{name}" for name in mixer.state_type._fields}
                found = {name: tensors.get(key) for name, key in names.items()}
                layer.length = int(tensors[f"{index}.length"])
                if any(x is not None for x in found.values()):
                    moved = {n: x if x is None else x.to(self.device) for n, x in found.items()}
                    layer.state = mixer.state_type(**moved)


def _size(x: Tensor, axis: int, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The root mean square of each entry along the axis, for a row of x: [1, …]."""
    others = [n for n in range(x.dim()) if n != axis]
    size = mean(x.float().square().mean(others, keepdim=True)).sqrt()
    return size.expand(1, *x.shape[1:]).to(x.dtype)


def mixers_of(model: nn.Module) -> list[Mixer]:
    """By layer. Raises UserError for a model that is not converted."""
    attentions = sorted(attention_modules(model), key=lambda x: x.layer_idx)
    if not attentions or not all(hasattr(x, "mixer") for x in attentions):
        raise UserError(no_mixer(model.config.model_type))
    return [attention.mixer for attention in attentions]


def check_extends(model: PreTrainedModel, config: UptrainConfig) -> None:
    """Raises UserError for a student that this stage cannot train."""
    stage, mixers = config.extend, mixers_of(model)
    tokens = stage.state_passing * config.data.sequence_length
    if tokens > (most := learned_positions(model) or MOST_POSITIONS):
        raise UserError(
            f"extend.state_passing (={stage.state_passing}) x data.sequence_length "
            f"(={config.data.sequence_length}) is {tokens} tokens, and the student has positions "
            f"for {most}: lower either"
        )
    if stage.initial_state == "zero":
        return
    if not any(mixer.recurrent for mixer in mixers):
        raise UserError(
            f"extend.initial_state (={stage.initial_state}) is of recurrent layers, and all of the "
            "student's keep softmax attention: take zero"
        )
    if stage.initial_state == "noise":
        _check_noise(model, mixers)


@torch.no_grad()
def _check_noise(model: PreTrainedModel, mixers: list[Mixer]) -> None:
    cache = new_cache(len(mixers))
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    for number, (mixer, layer) in enumerate(zip(mixers, cache.layers, strict=True)):
        for name, x in layer.state._asdict().items():
            if mixer.recurrent and x is not None and name not in NOISY:
                raise UserError(
                    f"extend.initial_state (=noise) cannot stand for {name} in the state of layer "
                    f"{number} ({mixer.name}), only for {' and '.join(NOISY)}: take carried"
                )
