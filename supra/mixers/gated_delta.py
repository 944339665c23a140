"""`gated_delta`: the gated delta rule (Yang, Kautz & Hatamizadeh 2024, equation 10).

    Sᵢ = γᵢ (1 − βᵢ kᵢkᵢᵀ) Sᵢ₋₁ + βᵢ kᵢvᵢᵀ        v'ᵢ = s · qᵢSᵢ

The state maps keys to values. A token moves what is stored under its key towards the new value, by
the share β; linear attention would only add to it.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from supra.mixers.base import Mixer
from supra.mixers.feature_maps import FEATURE_MAPS, choose_sharpness, map_features
from supra.mixers.gates import DecayGate, HeadLogits
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.read_out import OutputGate
from supra.mixers.recurrence import GATED_DELTA_RULE, scan
from supra.settings.model import STRICT

HALF_LIVES = tuple(4**n for n in range(1, 7))  # tokens; candidates in calibration
STRENGTHS = (0.03, 0.06, 0.12, 0.25, 0.5)  # β; candidates in calibration
STRENGTH = 0.12  # β at the start
# Of Hedgehog features. With 1 for keys and queries, as published, products were so small that
# calibration gave scales of a thousand, and SmolLM2-135M's perplexity rose from 54,626 to 6e13.
# With this value it falls to 292.
KEY_SHARPNESS = 0.25


@dataclass(frozen=True, config=STRICT)
class GatedDeltaOptions:
    """feature_map: of queries and keys, whose features are then normalised to length 1; "hedgehog",
        "identity" or "sign_pair" (supra/mixers/feature_maps.py).
    scale: whether the output is multiplied by s, one factor per head and channel.
    output_gate: whether the output is multiplied by 2σ(Wx + b) of the hidden states.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    """

    feature_map: Literal["hedgehog", "identity", "sign_pair"] = "hedgehog"
    output_gate: bool = True
    scale: bool = True
    rotary: bool = True


class GatedDeltaState(NamedTuple):
    memory: Tensor  # [B, Hq, features, V], float32


class GatedDelta(Mixer):
    """The gated delta rule with a decay and a writing strength per token and query head."""

    name = "gated_delta"
    Options = GatedDeltaOptions
    State = GatedDeltaState
    refuses: ClassVar = {
        "window": "what the delta rule writes depends on what was stored before, so no token can "
        "be subtracted again; take decay_scale or norm",
        "insert_scale": "the delta rule erases as much as it writes; take decay_scale or norm",
    }

    def __init__(self, shape: AttentionShape, options: GatedDeltaOptions):
        super().__init__(
            shape,
            options,
            scale=options.scale,
            output_gate=OutputGate(shape) if options.output_gate else None,
            rotary=options.rotary,
        )
        self.feature_map = FEATURE_MAPS[options.feature_map](shape)
        self.decay_gate = DecayGate(shape)
        self.strength = HeadLogits(shape)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._set_strength(torch.full((self.shape.query_heads,), STRENGTH))

    def mix(
        self,
        inputs: MixerInputs,
        state: GatedDeltaState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, GatedDeltaState | None]:
        query, key = map_features(self.feature_map, inputs, inputs.query, inputs.key)
        query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
        # every query head has a memory of its own, since it has its own decay and strength
        groups = self.shape.query_heads // self.shape.key_heads
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, inputs.value))
        output, memory = scan(
            GATED_DELTA_RULE, inputs, query, key, value,
            self.strength(inputs.hidden_states).sigmoid(),
            log_decay=self.decay_gate(inputs.hidden_states),
            state=None if state is None else state.memory,
            return_state=return_state,
        )  # fmt: skip
        return output, None if memory is None else GatedDeltaState(memory)

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose per head, one after the other: the half-life, the sharpness of the query's
        features, the writing strength; and the scale with each."""
        if not self.options.scale:
            return
        self.choose(inputs, target, HALF_LIVES, self.decay_gate.set_half_life)
        choose_sharpness(self, inputs, target, KEY_SHARPNESS)
        self.choose(inputs, target, STRENGTHS, self._set_strength)
        self.choose(inputs, target, HALF_LIVES, self.decay_gate.set_half_life)

    def _set_strength(self, share: Tensor) -> None:
        self.strength.set(share.logit())
