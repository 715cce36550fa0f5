"""Every metric of the table of the embedded model, in the order of the table, by the clips it is measured
on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stableavatar.evaluation.expression import EXPRESSION
from stableavatar.evaluation.faces import FACES
from stableavatar.evaluation.identity import IDENTITY, LONG_IDENTITY, PHOTOGRAPH_IDENTITY
from stableavatar.evaluation.lips import LIPS, LONG_LIPS, PHOTOGRAPH_LIPS, SILENCE
from stableavatar.evaluation.movement import MOVEMENT
from stableavatar.evaluation.observation import Metric, Variant
from stableavatar.evaluation.reconstruction import RECONSTRUCTION
from stableavatar.evaluation.steadiness import (
    LONG_STEADINESS,
    PEOPLE_STEADINESS,
    PHOTOGRAPH_STEADINESS,
    STEADINESS,
)


@dataclass(frozen=True)
class Group:
    """Metrics measured on the same clips; `main` is the variant whose figure is the result, the others are
    its controls."""

    title: str
    metrics: tuple[Metric, ...]
    main: Variant = "made"


GROUPS: Mapping[str, Group] = {
    "autoencoder": Group("true clips through the autoencoder", RECONSTRUCTION, main="decoded"),
    "puppets": Group("unseen puppets, speech and voices", LIPS + IDENTITY + STEADINESS),
    "silence": Group("the same puppets, silence fed", SILENCE),
    "prompts": Group("the same puppets, two prompts", EXPRESSION),
    "moving": Group("the same puppets, asked to move their heads", MOVEMENT),
    "long": Group("an unseen puppet for minutes", LONG_LIPS + LONG_IDENTITY + LONG_STEADINESS),
    "people": Group("photographs, read by networks for faces", FACES + PEOPLE_STEADINESS),
    "photograph": Group("a photograph", PHOTOGRAPH_LIPS + PHOTOGRAPH_IDENTITY + PHOTOGRAPH_STEADINESS),
}


def find_metric(name: str) -> Metric:
    """A metric by its name. Raises KeyError when there is none."""
    for group in GROUPS.values():
        for metric in group.metrics:
            if metric.name == name:
                return metric
    raise KeyError(name)
