"""A mixer inside the attention module of any family.

The family's module runs its own projections and norms. It calls the attention function that the
config names, which is `supra_attention`; that function runs the mixer. A wrapper around the module
leaves its rotation out and hands it to the mixer. Every family passes
the argument `attention_mask` down unchanged, so it carries what the mixers need:

    None                        no padding, one document per row
    bool [B, 1, 1, T]           False where padded
    int  [1, 1, 1, N + 1]       packed: bounds of N documents in the flattened row B·T
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from supra.errors import UserError
from supra.mixers import AttentionShape, MixerInputs, Rotary, build_mixer
from supra.mixers.inputs import NORM_EPS
from supra.mixers.state_policy import StatePolicy
from supra.model.cache import MixerLayer
from supra.model.families import ROTATE_THEMSELVES, WINDOW_IN_MASK
from supra.model.qk_norm import drop_division


@dataclass(frozen=True)
class _Call:
    """What the wrapper around an attention module hands to `supra_attention`."""

    hidden_states: Tensor
    rotary: Rotary | None
    mask: Tensor | None
    layer: MixerLayer | None


def supra_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Takes query [B, Hq, T, K], key [B, Hkv, T, K] and value [B, Hkv, T, V]; returns the output
    [B, T, Hq, V] and no weights.
    """
    if kwargs.get("block_indices") is not None:
        raise UserError(
            "block_indices (attention over chosen blocks of tokens) mean nothing to a mixer: leave "
            "them out"
        )
    call = attention_mask
    query, key, value = (_tokens_first(x) for x in (query, key, value))
    if isinstance(call, _Probe):
        call.answer(query, key, value)
    packed = call.mask is not None and call.mask.dtype != torch.bool
    inputs = MixerInputs(
        hidden_states=call.hidden_states,
        query=query,
        key=key,
        value=value,
        rotary=call.rotary,
        scaling=kwargs["scaling"],
        sliding_window=kwargs.get("sliding_window", module.window),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        padding_mask=None if packed or call.mask is None else call.mask[:, 0, 0],
        cu_seqlens=call.mask[0, 0, 0] if packed else None,
        part=None if module.row_ranks is None else module.row_ranks.part,
    )
    if call.layer is not None:
        return call.layer.mix(module.mixer, inputs), None
    return module.mixer(inputs)[0], None


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H, D]."""
    if x.shape[2] == 1 and x.is_contiguous():
        return x.view(x.shape[0], 1, *x.shape[1::2])  # one operator in the place of two
    return x.transpose(1, 2)


AttentionInterface.register("supra", supra_attention)


class SupraAttention:
    """Mixed into the family's attention class; `mixer` is a submodule of the attention module."""

    rotates: bool  # whether the mixer applies the rotation; else the module does, or nobody
    window: int | None  # a sliding window that the attention function is not told about
    row_ranks: Any = None  # as in SupraModel

    def forward(self, *args, **kwargs):
        kwargs |= zip(self.forward_names, args, strict=False)
        cache = next((x for x in kwargs.values() if isinstance(x, Cache)), None)
        rotary, forward = None, super().forward
        if self.rotates and kwargs["position_embeddings"] is not None:
            cos, sin = kwargs["position_embeddings"]
            rotary = Rotary(cos, sin, self.rotate, cos.shape[-1] * self.features_per_angle)
            forward = functools.partial(self.without_rotation, self)
        kwargs["attention_mask"] = _Call(
            hidden_states=kwargs["hidden_states"],
            rotary=rotary,
            mask=kwargs.get("attention_mask"),
            layer=None if cache is None else cache.layers[self.layer_idx],
        )
        return forward(**kwargs)

    def __reduce__(self):  # the class is made at run time, so pickles name its base class
        return _bare_attention, (type(self).__mro__[2],), self.__dict__


def _bare_attention(base: type[nn.Module]) -> nn.Module:
    attention = attention_class(base)
    return attention.__new__(attention)


@functools.cache
def attention_class(base: type[nn.Module]) -> type[nn.Module]:
    """The family's attention class with the wrapper in front."""
    # some families rotate halves, others interleaved pairs
    rotate = getattr(sys.modules[base.__module__], "apply_rotary_pos_emb", None)
    fields = {
        "forward_names": tuple(inspect.signature(base.forward).parameters)[1:],
        "without_rotation": staticmethod(_without_rotation(base.forward)),
        "rotate": staticmethod(rotate),
        "features_per_angle": _features_per_angle(rotate),
        "__module__": __name__,
    }
    return type(f"Supra{base.__name__}", (SupraAttention, base), fields)


def _unchanged(query: Tensor, key: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    return query, key


def _without_rotation(forward: Callable) -> Callable:
    """A family's forward, in which `apply_rotary_pos_emb` returns queries and keys as they are."""
    forward = inspect.unwrap(forward)
    names = forward.__globals__ | {"apply_rotary_pos_emb": _unchanged}
    rest = forward.__name__, forward.__defaults__, forward.__closure__
    copied = types.FunctionType(forward.__code__, names, *rest)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _features_per_angle(rotate: Callable[..., tuple[Tensor, Tensor]] | None) -> int:
    """2 if the two features of a pair share one cosine and sine, as in gpt-oss; else 1."""
    if rotate is None:
        return 1
    heads, angles = torch.empty(1, 1, 1, 4, device="meta"), torch.empty(1, 1, 4, device="meta")
    try:
        rotate(heads, heads, angles, angles)
    except RuntimeError:  # sizes that do not fit
        return 2
    return 1


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The causal self-attention modules, converted or not.

    Modules that do not call transformers' attention interface are left out: no mixer could be put
    into them.
    """
    return [
        module
        for module in model.modules()
        if _calls_attention_interface(type(module))
        and getattr(module, "is_causal", False)
        and getattr(module, "layer_idx", None) is not None
    ]


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks: FSDP wraps each of them, and gradient checkpointing computes each again."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


@functools.cache
def _calls_attention_interface(module: type[nn.Module]) -> bool:
    forwards = (vars(base).get("forward") for base in module.__mro__)
    codes = (inspect.unwrap(f).__code__ for f in forwards if inspect.isfunction(f))
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def insert_mixer(
    attention: nn.Module, config: PreTrainedConfig, name: str, options: dict[str, Any] | None
) -> None:
    """Turn the family's attention module into one that calls a new mixer, in place."""
    shape, rotated = probe_attention(attention, config)
    attention.__class__ = attention_class(type(attention))
    attention.rotates = rotated and config.base_model_type not in ROTATE_THEMSELVES
    attention.window = None
    if config.base_model_type in WINDOW_IN_MASK:
        attention.window = config.sliding_window
    attention.mixer = build_mixer(name, shape, options)
    if attention.mixer.drops_qk_norm:
        drop_division(attention)
    if rotated and not attention.rotates and not attention.mixer.rotates:
        raise UserError(
            f"rotary (=False) of {name} cannot act: attention of model_type "
            f"{config.base_model_type!r} rotates queries and keys itself; set rotary to true"
        )
    if config.state_policy is not None:
        policy = StatePolicy.from_dict(config.state_policy)
        attention.mixer.set_policy(policy, attention.layer_idx)


def probe_attention(attention: nn.Module, config: PreTrainedConfig) -> tuple[AttentionShape, bool]:
    """The sizes of an attention module, and whether it rotates its queries and keys.

    Configs have many names for sizes, and in some families only some layers rotate. So the module
    runs on two tokens on the meta device, and the shapes that reach the attention function count.
    """
    failure = None
    for positions in _positions_to_try(attention):
        probe = _Probe()
        try:
            with torch.no_grad(), positions:
                _run_without_memory(attention, config.hidden_size, probe, positions)
        except _Answered:
            eps = getattr(config, "rms_norm_eps", NORM_EPS)
            return AttentionShape(*probe.sizes, config.hidden_size, eps), positions.used
        except Exception as error:  # of any kind, since it is raised in the family's code
            failure = error
    raise UserError(
        f"model_type {config.base_model_type!r} has attention that takes no mixer: run alone, its "
        f"module does not call the attention interface of transformers ({failure})"
    )


def _positions_to_try(attention: nn.Module) -> Iterator["_Positions"]:
    """Shapes of cosines and sines that families expect; their configs do not give them."""
    names = ("qk_rope_head_dim", "head_dim")
    sizes = [getattr(attention, name) for name in names if hasattr(attention, name)]
    for size in (*sizes, 1):  # 1 broadcasts to any part of a head that is not cut in halves
        yield _Positions(*(torch.empty(1, 2, size, device="meta") for _ in range(2)))
    for size in sizes:
        yield _Positions(torch.empty(1, 2, size // 2, device="meta", dtype=torch.complex64))


def _run_without_memory(
    attention: nn.Module, hidden_size: int, probe: "_Probe", positions: "_Positions"
) -> None:
    tensors = (*attention.named_parameters(), *attention.named_buffers())
    state = {name: torch.empty_like(x, device="meta") for name, x in tensors}
    dtype = next(x.dtype for x in state.values() if x.is_floating_point())
    given = {
        "hidden_states": torch.empty(1, 2, hidden_size, device="meta", dtype=dtype),
        "attention_mask": probe,
        "position_embeddings": positions.embeddings,
        "position_ids": torch.zeros(1, 2, dtype=torch.int64, device="meta"),
    }
    known = inspect.signature(attention.forward).parameters
    given = {name: x for name, x in given.items() if name in known}
    torch.func.functional_call(attention, state, (), given)


class _Answered(Exception):
    """Ends a probe: the attention function was called."""


class _Probe:
    """Passed as the mask, it records the sizes that reach the attention function."""

    sizes: tuple[int, int, int, int]

    def answer(self, query: Tensor, key: Tensor, value: Tensor) -> NoReturn:
        self.sizes = query.shape[2], key.shape[2], query.shape[3], value.shape[3]
        raise _Answered


class _Positions(TorchFunctionMode):
    """Position embeddings, a pair or one complex tensor, that record whether they are used."""

    def __init__(self, *embeddings: Tensor):
        super().__init__()
        self.embeddings = embeddings if len(embeddings) == 2 else embeddings[0]
        self._tensors, self.used = embeddings, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.used |= any(x is tensor for x in args for tensor in self._tensors)
        return function(*args, **(kwargs or {}))
