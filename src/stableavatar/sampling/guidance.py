"""Guidance: plain functions over predictions of the branches (spec 2).

A branch is what the network is told: the prompt or the negative prompt, with or without audio. A rule names
the branches that it needs for given scales, and combines their predictions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from stableavatar.choices import GuidanceRule


class Branch(Enum):
    """What the network is told in one row of the batch: (the prompt?, the audio?)."""

    NEITHER = (False, False)
    AUDIO = (False, True)
    PROMPT = (True, False)
    BOTH = (True, True)

    @property
    def prompt(self) -> bool:
        """The prompt, rather than the negative prompt."""
        return self.value[0]

    @property
    def audio(self) -> bool:
        """The speech, rather than none: zeros after the audio adapter, or before it (`no_audio`)."""
        return self.value[1]


Predictions = Mapping[Branch, torch.Tensor]


@dataclass(frozen=True)
class Guidance:
    """Branches that must be predicted, in the order of the batch, and how their predictions become one."""

    branches: tuple[Branch, ...]
    combine: Callable[[Predictions], torch.Tensor]


def three_branch(text_scale: float, audio_scale: float, *, has_audio: bool = True) -> Guidance:
    """The published rule: u + s_audio·(a - u) + s_text·(f - a).

    u knows neither, a the audio, f audio and prompt. Branches whose weight is zero are not predicted: both
    scales at 1 leave f alone, an audio scale of 1 leaves u out, equal scales leave a out. Without audio the
    rule is u + s_text·(p - u).
    """
    u, a, f = Branch.NEITHER, Branch.AUDIO, Branch.BOTH
    if not has_audio:
        return _weighted({u: 1 - text_scale, Branch.PROMPT: text_scale})
    if 1 != audio_scale != text_scale != 0:
        return Guidance((u, a, f), lambda v: v[u] + audio_scale * (v[a] - v[u]) + text_scale * (v[f] - v[a]))
    return _weighted({u: 1 - audio_scale, a: audio_scale - text_scale, f: text_scale})


def audio_native(text_weight: float, audio_weight: float, *, has_audio: bool = True) -> Guidance:
    """Audio Native Guidance: (1 + w_text + w_audio)·f - w_text·a - w_audio·p.

    The paper's Eq. 10 is in no released code and its text could not be had; this is VideoJAM's Inner-Guidance
    (arXiv 2502.02492, section 4.3) with the motion replaced by the audio tokens that the adapter predicts. f
    knows audio and prompt, a the audio and the negative prompt, p the prompt and no audio. A weight of 0
    drops its branch. Without audio the rule is (1 + w_text)·p - w_text·u.
    """
    if not has_audio:
        return three_branch(1 + text_weight, 1, has_audio=False)
    return _weighted(
        {
            Branch.AUDIO: -text_weight,
            Branch.PROMPT: -audio_weight,
            Branch.BOTH: 1 + text_weight + audio_weight,
        }
    )


def _weighted(weights: Mapping[Branch, float]) -> Guidance:
    """The sum of predictions times weights; a branch of weight zero is not predicted."""
    needed = {branch: weight for branch, weight in weights.items() if weight != 0}

    def combine(v: Predictions) -> torch.Tensor:
        return torch.stack([weight * v[branch] for branch, weight in needed.items()]).sum(dim=0)

    return Guidance(tuple(needed), combine)


GUIDANCE_RULES: dict[GuidanceRule, Callable[..., Guidance]] = {
    "three-branch": three_branch,
    "audio-native": audio_native,
}
