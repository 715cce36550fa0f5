"""Does the prompt show: is a face that was asked to smile told from one that was asked to be serious."""

from __future__ import annotations

import numpy as np

from stableavatar.evaluation.observation import Bar, Metric, MouthTrack, Observation, mean

_HALFWAY = -0.1
"""Above their portrait's, the meter reads the corners of true puppets that smile at 0.43, of serious ones at
-0.64 (the means of 24 each, seeds from 940000): the middle."""
_SETTLING = 20
"""Frames at the start in which the expression is still rising from the portrait's."""


def corner_lift(mouth: MouthTrack, at_rest: float) -> float:
    """Mean lift of the mouth's corners once the expression has settled, above where they are at rest.

    Args:
        at_rest: what the meter reads in the person's portrait. People's corners lie differently at rest:
            over 24 true puppets the middle between smile and frown spreads by 0.19 without it, 0.14 with it.
    """
    settled = mouth.smile[_SETTLING:] if len(mouth) > 2 * _SETTLING else mouth.smile
    return float(np.mean(settled)) - at_rest


def read_expression(mouth: MouthTrack, at_rest: float) -> str:
    """ "smiling" or "serious", whichever is nearer to the corners' lift; see :func:`corner_lift`."""
    return "smiling" if corner_lift(mouth, at_rest) > _HALFWAY else "serious"


def _told(clip: Observation) -> float:
    if clip.expression not in ("smiling", "serious"):
        raise ValueError(f"a clip of expression {clip.expression!r}: only smiling and serious are told apart")
    if clip.smile_at_rest is None:
        raise ValueError("the portrait's smile was not read: a lift is told from it")
    return float(read_expression(clip.mouth, clip.smile_at_rest) == clip.expression)


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
