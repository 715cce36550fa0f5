"""Prompts as people write them, for the prompt encoder of the embedded model.

They ask for the expressions that puppets' prompts name, in other words and among words that ask for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from stableavatar.data.puppets import EXPRESSIONS

_PEOPLE = {
    "she": (
        "woman",
        "girl",
        "young woman",
        "lady",
        "astronaut",
        "teacher",
        "doctor",
        "singer",
        "nurse",
        "mother",
    ),
    "he": (
        "man",
        "boy",
        "old man",
        "gentleman",
        "astronaut",
        "reporter",
        "speaker",
        "actor",
        "chef",
        "father",
    ),
    "it": ("person", "protagonist", "face", "character", "puppet", "cartoon figure", "statue", "portrait"),
}
_LOOKS = (
    "in a space suit",
    "in a red dress",
    "in a dark jacket",
    "with long blond hair",
    "with a beard",
    "with glasses",
    "in a blue shirt",
    "wearing a hat",
    "with curly hair",
    "with freckles",
    "in uniform",
    "with a scarf",
    "with earrings",
)
_PLACES = (
    "in front of a plain background",
    "in a garden",
    "at a desk",
    "in an office",
    "in front of a flag",
    "in a studio",
    "by the sea",
    "in a library",
    "on a stage",
    "at night",
    "in front of a green wall",
    "in the street",
    "at home",
    "before a bookshelf",
    "in a kitchen",
    "in soft light",
    "in the snow",
    "in a park",
    "on a sofa",
)
_THINGS = (
    "a plain background",
    "a flag",
    "a garden",
    "a bookshelf",
    "a white wall",
    "a blurred city",
    "trees",
    "the sea",
    "a dark room",
    "a studio",
    "soft light",
    "an office",
    "a stage",
    "a blue sky",
    "a window",
    "a mountain",
)
_TALKS = (
    "is talking",
    "talks",
    "is speaking",
    "speaks",
    "is talking to the camera",
    "speaks into a microphone",
    "is giving a speech",
    "sings",
    "is singing",
    "tells a story",
    "reads the news",
    "says a sentence",
    "explains something",
)
_ASIDES = (
    "The camera does not move",
    "The background is static",
    "High quality",
    "A portrait",
    "Close-up",
    "The lips move with the speech",
    "Realistic",
    "Looking at the camera",
    "The hands are not seen",
)

# As an adjective, as what somebody does, and as what somebody does it with.
_SAID: Mapping[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "neutral": (("calm", "neutral", "relaxed", "quiet"), (), ("with a neutral face", "calmly")),
    "smiling": (
        ("smiling", "happy", "cheerful", "friendly", "joyful", "laughing", "grinning"),
        ("smiles", "is smiling", "laughs", "grins", "is happy"),
        ("with a smile", "with a big smile", "happily", "with a friendly smile"),
    ),
    "serious": (
        ("serious", "sad", "stern", "grave", "unhappy", "angry", "earnest"),
        ("looks serious", "is serious", "frowns", "is frowning", "looks sad"),
        ("with a serious face", "seriously", "with a frown", "in earnest"),
    ),
    "surprised": (
        ("surprised", "astonished", "amazed", "startled"),
        ("looks surprised", "is surprised", "is astonished", "is amazed"),
        ("with a surprised face", "in surprise", "with raised eyebrows"),
    ),
    "nodding": (("nodding",), ("nods", "is nodding", "nods along"), ("with a nod", "while nodding")),
    "shaking the head": (
        ("shaking the head",),
        ("shakes the head", "shakes HIS head", "is shaking HIS head"),
        ("while shaking HIS head", "with a shake of the head"),
    ),
    "tilting the head": (
        ("tilting the head",),
        ("tilts the head", "tilts HIS head", "is tilting HIS head"),
        ("with HIS head tilted", "with a tilted head", "while tilting HIS head"),
    ),
}
_FORMS = (
    "A {adjective} {who} {place} {talks}.",
    "A {who} {look} {talks}, {adjective}.",
    "A {who} {place}. {he} {does} and {talks}.",
    "A {who} {place}. {he} {talks} {how}.",
    "A {who} {look} - {he} {does} and {talks} - {thing}",
    "A {who} {look} - {he} {talks} {how} - {thing}",
    "A {who} {talks} - {adjective} - {thing}",
    "{he} {talks} and {does} {place}",
    "The {who} {talks} {how}. {aside}.",
    "{aside}. A {adjective} {who} {talks} {place}.",
    "{adjective}, {thing}",
    "a {who} who {does}",
    "{does}",
    "{he} {does}",
)


def free_prompt(rng: np.random.Generator, expression: str) -> str:
    """A prompt in which one of `EXPRESSIONS` is asked for, in one of many ways; for "neutral" perhaps in
    none."""
    if expression not in EXPRESSIONS:
        raise ValueError(f"{expression!r} is none of {', '.join(EXPRESSIONS)}")

    def one(words: Sequence[str]) -> str:
        return str(rng.choice(words))

    he = one(list(_PEOPLE))
    adjectives, deeds, manners = _SAID[expression]
    adjective, form = one(adjectives), one(_FORMS)
    while " " in adjective and "{adjective} {who}" in form:  # a shaking the head woman
        form = one(_FORMS)
    if expression == "neutral":
        # It is asked for by saying nothing of it, mostly.
        if rng.random() < 0.7:
            form = (
                form.replace(", {adjective}.", ".").replace(" - {adjective}", "").replace("{adjective}, ", "")
            )
            form = form.replace("{adjective} ", "").replace(" {how}", "")
        form = form.replace("{does} and ", "").replace(" and {does}", "").replace("{does}", "{talks}")
    prompt = form.format(
        adjective=adjective,
        who=one(_PEOPLE[he]),
        look=one(_LOOKS),
        place=one(_PLACES),
        thing=one(_THINGS),
        talks=one(_TALKS),
        does=one(deeds) if deeds else "",
        how=one(manners),
        aside=one(_ASIDES),
        he=he,
    ).replace("HIS", {"she": "her", "he": "his", "it": "the"}[he])
    prompt = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", prompt)
    return re.sub(r"(^|\. )([a-z])", lambda found: found[1] + found[2].upper(), prompt)
