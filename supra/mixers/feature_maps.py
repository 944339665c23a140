"""Feature maps φ: they turn query and key into the features whose dot product is taken.

A map with `after_rotary` reads rotated queries and keys, so that its features stay nonnegative.
The features of the other maps are rotated themselves.
"""

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor, nn

from supra.errors import UserError
from supra.mixers.base import Mixer
from supra.mixers.gates import linear_start
from supra.mixers.inputs import NORM_EPS, AttentionShape, MixerInputs

QUERY_SHARPNESSES = (0.05, 0.1, 0.25, 0.5, 1.0)  # candidates in calibration


class Identity(nn.Module):
    """φ(x) = x: the teacher's own queries and keys."""

    after_rotary = False
    widening = 1

    def __init__(self, shape: AttentionShape):
        super().__init__()

    def reset_parameters(self) -> None:
        pass

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


class _PerHead(nn.Module, ABC):
    """φ(x) = f(Wx + b) with a W of its own for each head, started at W = I, b = 0.

    expansion: how many times as wide as x is y = Wx + b. The further blocks of W start as random
    rotations, the same for queries and keys.
    """

    widening = 1  # how many times as wide as y the features are

    def __init__(self, shape: AttentionShape, expansion: int = 1):
        super().__init__()
        size, wide = shape.head_size, expansion * shape.head_size
        self.query_weight = nn.Parameter(torch.empty(shape.query_heads, wide, size))
        self.query_bias = nn.Parameter(torch.empty(shape.query_heads, wide))
        self.key_weight = nn.Parameter(torch.empty(shape.key_heads, wide, size))
        self.key_bias = nn.Parameter(torch.empty(shape.key_heads, wide))

    def reset_parameters(self) -> None:
        wide, size = self.key_weight.shape[1:]
        blocks = torch.eye(size).repeat(wide // size, 1, 1)
        for rotation in blocks[1:]:
            nn.init.orthogonal_(rotation)
        for weight in (self.query_weight, self.key_weight):
            weight.data.copy_(blocks.flatten(0, 1))
        for bias in (self.query_bias, self.key_bias):
            bias.data.zero_()

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.activate(_dense(query, self.query_weight, self.query_bias)),
            self.activate(_dense(key, self.key_weight, self.key_bias)),
        )

    @abstractmethod
    def activate(self, mapped: Tensor) -> Tensor:
        """f: features of y = Wx + b."""


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, T, H, K] times weight [H, out, in]: a dense layer per head."""
    batch, tokens, heads, size = x.shape
    rows = x.permute(2, 0, 1, 3).reshape(heads, batch * tokens, size)
    rows = torch.baddbmm(bias.to(x.dtype)[:, None], rows, weight.to(x.dtype).mT)
    return rows.view(heads, batch, tokens, -1).permute(1, 2, 0, 3)


class SignPair(_PerHead):
    """[relu(y), relu(−y)] of y = Wx + b. [B, T, H, K] to [B, T, H, 2K].

    One relu would lose the negative half of y; with both signs, φ(q)·φ(k) is the part of q·k from
    the features whose signs agree.
    """

    after_rotary = False
    widening = 2

    def activate(self, mapped: Tensor) -> Tensor:
        return torch.cat([mapped.relu(), (-mapped).relu()], dim=-1)


class ReLU(_PerHead):
    """relu(Wx + b): the feature map of T2R (Kasai et al. 2021, equation 5)."""

    after_rotary = True

    def activate(self, mapped: Tensor) -> Tensor:
        return mapped.relu()


class SharedReLU(nn.Module):
    """relu(Wx + b), one W of k rows for the queries and the keys of a head: T2R as published. Query
    heads that share a key share its map. [B, T, H, K] to [B, T, H, k].

    size: k; the paper takes 32, fewer than the head's channels. At most all of them are taken. W
    starts at the identity, or at the first k rows of a random rotation.
    """

    after_rotary = True

    def __init__(self, shape: AttentionShape, size: int):
        super().__init__()
        size = min(size, shape.head_size)
        self.groups = shape.query_heads // shape.key_heads
        self.weight = nn.Parameter(torch.empty(shape.key_heads, size, shape.head_size))
        self.bias = nn.Parameter(torch.empty(shape.key_heads, size))

    def reset_parameters(self) -> None:
        size, head_size = self.weight.shape[1:]
        rotation = torch.eye(head_size)
        if size < head_size:
            nn.init.orthogonal_(rotation)
        self.weight.data.copy_(rotation[:size])
        self.bias.data.zero_()

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = (x.repeat_interleave(self.groups, 0) for x in (self.weight, self.bias))
        return _dense(query, weight, bias).relu(), _dense(key, self.weight, self.bias).relu()


class Hedgehog(_PerHead):
    """softmax([y, −y]) of y = Wx + b (Hedgehog, Zhang et al. 2024, section 4.1): peaked, as
    softmax attention is. [B, T, H, K] to [B, T, H, 2K].

    Queries and keys of pretrained models are long. With W = I, nearly all the weight then falls on
    one feature, and most products are almost 0: see `choose_sharpness`.
    """

    after_rotary = True

    def activate(self, mapped: Tensor) -> Tensor:
        return torch.cat([mapped, -mapped], dim=-1).softmax(-1)

    def sharpen(self, weight: nn.Parameter, by: Tensor) -> None:
        """Give the rows of each head's W [H, out, in] the length `by` [H]. They start at 1."""
        weight.data.copy_(nn.functional.normalize(weight.data, dim=-1) * by[:, None, None])


class NormedFeatures(nn.Module):
    """LayerNorm over the features of all heads of a token together, with a gain and without a bias:
    the QK-norm of SUPRA's published code for 1B (`apply_qk_norm`), between φ and RoPE."""

    after_rotary = False

    def __init__(self, shape: AttentionShape, features: nn.Module, size: int):
        """size: of the features of a head."""
        super().__init__()
        self.features = features
        self.query_gain = nn.Parameter(torch.empty(shape.query_heads, size))
        self.key_gain = nn.Parameter(torch.empty(shape.key_heads, size))

    def reset_parameters(self) -> None:
        self.features.reset_parameters()
        self.query_gain.data.fill_(1)
        self.key_gain.data.fill_(1)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.features(query, key)
        return _all_heads_norm(query, self.query_gain), _all_heads_norm(key, self.key_gain)


def _all_heads_norm(x: Tensor, gain: Tensor) -> Tensor:
    """[B, T, H, K] with mean 0 and variance 1 over H and K, times the gain [H, K]."""
    normed = nn.functional.layer_norm(x.to(gain.dtype), gain.shape, gain, eps=NORM_EPS)
    return normed.to(x.dtype)


class MixedReLU(nn.Module):
    """φ(x) = relu(Wx + b) over all heads at once, W random: the kernel of the SUPRA paper, 3.1.

    One D×D matrix serves queries and keys. With grouped heads the keys are narrower and have a
    matrix of their own, as in the published code. Random weights discard what the teacher's queries
    and keys meant, and the published method trains on more than 10 billion tokens to recover. The
    map is here to reproduce that method.
    """

    after_rotary = False
    widening = 1

    def __init__(self, shape: AttentionShape):
        super().__init__()
        query_size = shape.query_heads * shape.head_size
        key_size = shape.key_heads * shape.head_size
        self.query_weight = nn.Parameter(torch.empty(query_size, query_size))
        self.query_bias = nn.Parameter(torch.empty(query_size))
        self.shared = query_size == key_size
        if not self.shared:
            self.key_weight = nn.Parameter(torch.empty(key_size, key_size))
            self.key_bias = nn.Parameter(torch.empty(key_size))

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            linear_start(parameter)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        key_weight, key_bias = (
            (self.query_weight, self.query_bias)
            if self.shared
            else (self.key_weight, self.key_bias)
        )
        return (
            self._features(query, self.query_weight, self.query_bias),
            self._features(key, key_weight, key_bias),
        )

    @staticmethod
    def _features(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mapped = nn.functional.linear(x.flatten(2), weight.to(x.dtype), bias.to(x.dtype))
        return mapped.relu().view_as(x)


FEATURE_MAPS = {
    "identity": Identity,
    "sign_pair": SignPair,
    "relu": ReLU,
    "shared_relu": SharedReLU,
    "hedgehog": Hedgehog,
    "mixed_relu": MixedReLU,
}


FEATURE_SIZE = 32  # of T2R
MAX_EXPANSION = 256  # the state is then as large as the keys and values of 16,000 tokens


def check_expansion(expansion: int, feature_map: str) -> None:
    """Raise UserError for an expansion that the feature map cannot have."""
    if expansion > 1 and not issubclass(FEATURE_MAPS[feature_map], _PerHead):
        raise UserError(
            f"expansion (={expansion}) needs a feature map with weights per head, and "
            f"feature_map (={feature_map!r}) has none: take hedgehog, relu or sign_pair"
        )


def check_qk_norm(feature_map: str) -> None:
    """Raise UserError for a feature map whose features QK-norm would make negative."""
    if FEATURE_MAPS[feature_map].after_rotary:
        raise UserError(
            f"qk_norm (=True) makes features negative, and feature_map (={feature_map!r}) is for "
            "features that are not: take mixed_relu, identity or sign_pair, or leave qk_norm out"
        )


def build_feature_map(
    name: str,
    shape: AttentionShape,
    expansion: int,
    *,
    feature_size: int = FEATURE_SIZE,
    qk_norm: bool = False,
) -> nn.Module:
    """The feature map of that name, with uninitialised parameters, and QK-norm after it."""
    if name == "shared_relu":
        return SharedReLU(shape, feature_size)
    wide = {"expansion": expansion} if expansion > 1 else {}
    features = FEATURE_MAPS[name](shape, **wide)
    if not qk_norm:
        return features
    return NormedFeatures(shape, features, features.widening * expansion * shape.head_size)


def choose_sharpness(mixer: Mixer, inputs: MixerInputs, target: Tensor, key: float) -> None:
    """If the mixer has Hedgehog features, set the sharpness of all keys to `key` and choose that of
    each head's queries by the smallest error. See `Mixer.choose`."""
    features = mixer.feature_map
    if isinstance(features, Hedgehog):
        features.sharpen(features.key_weight, torch.full_like(features.key_bias[:, 0], key))
        sharpen = partial(features.sharpen, features.query_weight)
        mixer.choose(inputs, target, QUERY_SHARPNESSES, sharpen)


def map_features(
    feature_map: nn.Module, inputs: MixerInputs, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Features of query and key at their positions. Maps without `after_rotary` are rotated in
    blocks of head_size, each as the head itself would be."""
    if inputs.rotary is None:
        return feature_map(query, key)
    if feature_map.after_rotary:
        return feature_map(*inputs.rotary(query, key))
    size = query.shape[-1]
    features = feature_map(query, key)
    blocks = [x.unflatten(-1, (-1, size)).flatten(2, 3) for x in features]
    rotated = inputs.rotary(*blocks)
    return tuple(
        turned.unflatten(2, (x.shape[2], -1)).flatten(3)
        for turned, x in zip(rotated, features, strict=True)
    )
