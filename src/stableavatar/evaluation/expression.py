"""Does the prompt show: is a face that was asked to smile told from one that was asked to be serious."""

from __future__ import annotations

import numpy as np

from stableavatar.evaluation.observation import Bar, Metric, MouthTrack, Observation, mean

_HALFWAY = 0.12
"""Smiling puppets lift the corners by about 0.85, serious ones drop them by 0.6: the middle."""
_SETTLING = 20
"""Frames at the start in which the expression is still rising from the portrait's."""


def corner_lift(mouth: MouthTrack) -> float:
    """Mean lift of the mouth's corners once the expression has settled, -1 to 1."""
    settled = mouth.smile[_SETTLING:] if len(mouth) > 2 * _SETTLING else mouth.smile
    return float(np.mean(settled))


def read_expression(mouth: MouthTrack) -> str:
    """ "smiling" or "serious", whichever is nearer to the mouth's corners."""
    return "smiling" if corner_lift(mouth) > _HALFWAY else "serious"


def _told(clip: Observation) -> float:
    if clip.expression not in ("smiling", "serious"):
        raise ValueError(f"a clip of expression {clip.expression!r}: only smiling and serious are told apart")
    return float(read_expression(clip.mouth) == clip.expression)


EXPRESSION = (
    Metric(
        "prompt_told",
        "prompt: smiling and serious told apart",
        "share",
        _told,
        mean,
        bars={"made": Bar(low=0.9)},
    ),
)
