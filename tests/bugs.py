"""Bugs that peers of supra have had, to be put in on purpose: SUPRA_BUG=name pytest -p tests.bugs

tests/test_controls.py shows that each makes a test fail.
"""

import os

import torch

from supra.model import attention, modeling
from supra.model.cache import MixerLayer


def padding_mask_dropped():
    modeling.padding_mask = lambda attention_mask, tokens: None


def beams_not_reordered():
    MixerLayer.reorder_cache = lambda self, beam_idx: None


def past_forgotten_at_decode():
    mix = MixerLayer.mix

    def forgetful(self, mixer, inputs):
        if inputs.query.shape[1] == 1:
            self.state = None
        return mix(self, mixer, inputs)

    MixerLayer.mix = forgetful


def roll_back_does_nothing():
    def crop(self, tokens_to_remove):
        self.length -= abs(tokens_to_remove)
        self._calls.clear()

    MixerLayer.crop = crop


def rotary_twice():
    class Twice(attention.Rotary):
        def __call__(self, query, key):
            return super().__call__(*super().__call__(query, key))

    attention.Rotary = Twice


def documents_run_together():
    modeling.document_boundaries = lambda *_: None


def state_in_half_precision():
    mix = MixerLayer.mix

    def rounded(self, mixer, inputs):
        output = mix(self, mixer, inputs)
        parts = (x if x is None else x.to(torch.bfloat16).to(x.dtype) for x in self.state)
        self.state = type(self.state)(*parts)
        return output

    MixerLayer.mix = rounded


BUGS = {
    bug.__name__: bug
    for bug in (
        padding_mask_dropped,
        beams_not_reordered,
        past_forgotten_at_decode,
        roll_back_does_nothing,
        rotary_twice,
        documents_run_together,
        state_in_half_precision,
    )
}

if name := os.environ.get("SUPRA_BUG"):
    BUGS[name]()
