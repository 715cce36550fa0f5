"""Who a puppet is: every visible trait that does not change while it talks, drawn from a seed.

Lengths are in head units: the face's half height is 1, x points right, y down, and the origin lies between
nose and mouth's upper third so that the chin is at y = 1, the eyes near y = -0.2 and the mouth near y = 0.55.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np

Colour = tuple[float, float, float]

EVALUATION_SEED = 1_000_000
"""Seeds from here on are for evaluation: their voices and recordings are never in training clips."""

HAIR_STYLES = ("bald", "buzz", "short", "parted", "fringe", "bob", "long", "curly", "bun", "cap")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
BACKGROUNDS = ("plain", "gradient", "vignette", "noise", "stripes", "blocks", "bokeh", "picture")
CLOTHES = ("crew", "vneck", "collar", "suit", "turtleneck", "stripes")
RENDERINGS = ("photo", "soft", "drawing", "grey")

_HAIR_COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.07, 0.06, 0.06),
    "dark brown": (0.18, 0.11, 0.07),
    "brown": (0.33, 0.20, 0.12),
    "blond": (0.78, 0.62, 0.36),
    "red": (0.62, 0.25, 0.10),
    "grey": (0.58, 0.58, 0.58),
    "white": (0.86, 0.85, 0.82),
    "blue": (0.20, 0.32, 0.70),
    "pink": (0.85, 0.42, 0.60),
}
_HAIR_SHARES = (0.23, 0.2, 0.18, 0.15, 0.09, 0.06, 0.04, 0.025, 0.025)
_SKINS: tuple[Colour, ...] = (
    (0.98, 0.84, 0.76),
    (0.95, 0.78, 0.67),
    (0.91, 0.72, 0.58),
    (0.85, 0.65, 0.49),
    (0.76, 0.56, 0.41),
    (0.64, 0.45, 0.32),
    (0.51, 0.35, 0.25),
    (0.39, 0.26, 0.19),
    (0.30, 0.20, 0.15),
)
_IRISES: tuple[Colour, ...] = (
    (0.22, 0.13, 0.07),
    (0.36, 0.22, 0.11),
    (0.42, 0.36, 0.18),
    (0.30, 0.42, 0.28),
    (0.30, 0.45, 0.60),
    (0.45, 0.50, 0.54),
)


@dataclass(frozen=True)
class Identity:
    """A puppet's fixed traits, by :meth:`from_seed`; lengths are in head units, colours in 0..1 RGB."""

    seed: int
    person: str
    rendering: str
    skin: Colour
    blush: float
    freckles: float
    wrinkles: float
    face_half_width: float
    jaw_power: float
    cheek_power: float
    crown: float
    ear_size: float
    hair_style: str
    hair_name: str
    hair: Colour
    hair_volume: float
    hairline: float
    hair_part: float
    hair_curl: float
    brow: Colour
    brow_thickness: float
    brow_arch: float
    brow_height: float
    eye_y: float
    eye_spacing: float
    eye_half_width: float
    eye_openness: float
    eye_tilt: float
    iris: Colour
    iris_radius: float
    lashes: float
    shadow: float
    nose_width: float
    nose_length: float
    nose_relief: float
    mouth_y: float
    mouth_half_width: float
    upper_lip: float
    lower_lip: float
    cupid_bow: float
    corner_lift: float
    rest_smile: float
    lip: Colour
    lip_gloss: float
    tooth: Colour
    mouth_dark: Colour
    beard: str
    beard_density: float
    glasses: str
    glasses_colour: Colour
    earrings: bool
    clothes: str
    cloth: Colour
    cloth_second: Colour
    shoulder_width: float
    background: str
    background_colours: tuple[Colour, Colour, Colour]
    background_blur: float
    scale: float
    centre: tuple[float, float]
    tilt: float
    turn: float
    light: tuple[float, float, float]
    light_colour: Colour
    ambient: float
    relief: float
    contrast: float
    vignette: float
    exposure: float
    saturation: float
    warmth: float
    blur: float
    grain: float
    outline: float
    lines: float
    marks: float

    @classmethod
    def from_seed(cls, seed: int) -> Identity:
        """The one identity that belongs to `seed` (any non-negative integer)."""
        return _draw_identity(seed)

    @classmethod
    def varied(cls, seed: int) -> Identity:
        """The same person with a nose of any relief, from none on, folds drawn faintly or strongly, and marks
        of any kind on the skin: less of the face is as all puppets' is, so that it has to be taken from the
        portrait. And taken darker or brighter, flatter or harder, as photographs are. For training; what is
        measured are the persons of `from_seed`."""
        rng = np.random.default_rng([seed, 404])
        usual = cls.from_seed(seed)
        return replace(
            usual,
            nose_relief=float(rng.uniform(0, 0.2)),
            lines=float(rng.uniform(0, 1.3)),
            marks=float(rng.uniform(0, 1)),
            exposure=usual.exposure * float(rng.uniform(0.8, 1.4)),
            contrast=usual.contrast * float(rng.uniform(0.85, 1.3)),
            warmth=usual.warmth + float(rng.normal(0, 0.05)),
        )

    def describe(self) -> str:
        """A few visible words, such as "woman with red hair and glasses"."""
        traits: list[str] = []
        if self.hair_style == "bald":
            traits.append("a bald head")
        elif self.hair_style == "cap":
            traits.append("a knitted cap")
        else:
            length = {"buzz": "short ", "short": "short ", "bob": "", "long": "long ", "curly": "curly "}
            colour = "" if self.rendering == "grey" else f"{self.hair_name} "
            traits.append(f"{length.get(self.hair_style, '')}{colour}hair")
        if self.glasses != "none":
            traits.append("glasses")
        if self.beard in ("moustache", "full", "goatee"):
            traits.append("a moustache" if self.beard == "moustache" else "a beard")
        joined = traits[0] if len(traits) == 1 else ", ".join(traits[:-1]) + " and " + traits[-1]
        return f"{self.person} with {joined}"


def _vary(rng: np.random.Generator, colour: Colour, hue: float, saturation: float, value: float) -> Colour:
    h, s, v = colorsys.rgb_to_hsv(*colour)
    h = (h + rng.normal(0, hue)) % 1.0
    s = float(np.clip(s * (1 + rng.normal(0, saturation)), 0, 1))
    v = float(np.clip(v * (1 + rng.normal(0, value)), 0.02, 1))
    return colorsys.hsv_to_rgb(h, s, v)


def _any_colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> Colour:
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return (
        a[0] + (b[0] - a[0]) * share,
        a[1] + (b[1] - a[1]) * share,
        a[2] + (b[2] - a[2]) * share,
    )


def _pick(rng: np.random.Generator, values: tuple[str, ...], shares: tuple[float, ...]) -> str:
    weights = np.asarray(shares, dtype=np.float64)
    return values[int(rng.choice(len(values), p=weights / weights.sum()))]


def _draw_identity(seed: int) -> Identity:
    rng = np.random.default_rng([seed, 101])

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    woman = bool(rng.uniform() < 0.5)
    rendering = _pick(rng, RENDERINGS, (0.62, 0.2, 0.12, 0.06))
    skin = _vary(rng, _SKINS[int(rng.integers(len(_SKINS)))], 0.008, 0.12, 0.05)
    hair_name = _pick(rng, tuple(_HAIR_COLOURS), _HAIR_SHARES)
    hair = _vary(rng, _HAIR_COLOURS[hair_name], 0.01, 0.15, 0.12)
    style_shares = (
        (0.01, 0.02, 0.08, 0.12, 0.14, 0.2, 0.24, 0.1, 0.06, 0.03)
        if woman
        else (0.1, 0.14, 0.28, 0.2, 0.08, 0.02, 0.05, 0.08, 0.01, 0.04)
    )
    hair_style = _pick(rng, HAIR_STYLES, style_shares)
    beard = "none" if woman else _pick(rng, BEARDS, (0.48, 0.2, 0.1, 0.1, 0.12))
    glasses = _pick(rng, ("none", "round", "square"), (0.78, 0.11, 0.11))
    lip_red = uniform(0.25, 0.6) if not woman else uniform(0.35, 0.95)
    lip = _mix(_mix(skin, (0.72, 0.30, 0.30), lip_red), (0.35, 0.10, 0.12), uniform(0.0, 0.25))
    if woman and rng.uniform() < 0.25:
        lip = _mix(lip, _vary(rng, (0.75, 0.12, 0.2), 0.03, 0.2, 0.2), uniform(0.5, 0.9))
    angle = uniform(-1.2, 1.2)
    elevation = uniform(0.15, 0.9)
    light = (
        float(np.sin(angle) * np.cos(elevation)),
        float(-np.sin(elevation)),
        float(np.cos(angle) * np.cos(elevation)),
    )
    warm = uniform(-1, 1)
    drawn = rendering == "drawing"
    scale = uniform(0.385, 0.47) if rng.uniform() < 0.78 else uniform(0.335, 0.385)
    return Identity(
        seed=seed,
        person="woman" if woman else "man",
        rendering=rendering,
        skin=skin,
        blush=uniform(0, 0.5) * (1.2 if woman else 0.8),
        freckles=uniform(0.3, 1.0) if rng.uniform() < 0.15 else 0.0,
        wrinkles=uniform(0, 1) ** 2,
        face_half_width=uniform(0.67, 0.77) if woman else uniform(0.69, 0.82),
        jaw_power=uniform(1.9, 2.6) if woman else uniform(2.2, 3.4),
        cheek_power=uniform(1.8, 2.4) if woman else uniform(2.0, 3.0),
        crown=uniform(1.05, 1.18),
        ear_size=uniform(0.12, 0.18),
        hair_style=hair_style,
        hair_name=hair_name,
        hair=hair,
        hair_volume=uniform(0.06, 0.2),
        hairline=uniform(-0.78, -0.6),
        hair_part=uniform(-0.5, 0.5),
        hair_curl=uniform(0, 1),
        brow=_mix(hair, (0.08, 0.06, 0.05), uniform(0.2, 0.7)),
        brow_thickness=uniform(0.022, 0.045) if woman else uniform(0.035, 0.065),
        brow_arch=uniform(-0.01, 0.06) + (0.015 if woman else 0),
        brow_height=uniform(0.15, 0.21),
        eye_y=uniform(-0.24, -0.15),
        eye_spacing=uniform(0.31, 0.37),
        eye_half_width=uniform(0.135, 0.175),
        eye_openness=uniform(0.36, 0.58),
        eye_tilt=uniform(-0.06, 0.14),
        iris=_vary(rng, _IRISES[int(rng.integers(len(_IRISES)))], 0.02, 0.2, 0.2),
        iris_radius=uniform(0.068, 0.082),
        lashes=uniform(0.3, 0.6) + (0.4 if woman else 0.0),
        shadow=uniform(0.1, 0.5),
        nose_width=uniform(0.11, 0.17) if woman else uniform(0.13, 0.2),
        nose_length=uniform(0.17, 0.27),
        nose_relief=uniform(0.08, 0.18),
        mouth_y=uniform(0.51, 0.57),
        mouth_half_width=uniform(0.31, 0.38),
        upper_lip=uniform(0.05, 0.095),
        lower_lip=uniform(0.075, 0.13),
        cupid_bow=uniform(0.1, 0.45),
        corner_lift=uniform(-0.05, 0.005),
        rest_smile=uniform(-0.12, 0.2),
        lip=lip,
        lip_gloss=uniform(0.05, 0.5),
        tooth=_mix((0.97, 0.96, 0.93), (0.88, 0.82, 0.68), uniform(0, 0.6)),
        mouth_dark=(uniform(0.10, 0.25), uniform(0.02, 0.07), uniform(0.02, 0.08)),
        beard=beard,
        beard_density=uniform(0.5, 1.0),
        glasses=glasses,
        glasses_colour=_any_colour(rng, (0, 0.6), (0.05, 0.5)),
        earrings=woman and bool(rng.uniform() < 0.3),
        clothes=_pick(rng, CLOTHES, (0.3, 0.18, 0.2, 0.14, 0.08, 0.1)),
        cloth=_any_colour(rng, (0, 0.8), (0.08, 0.95)),
        cloth_second=_any_colour(rng, (0, 0.7), (0.1, 0.98)),
        shoulder_width=uniform(1.25, 1.6) if woman else uniform(1.45, 1.9),
        background=_pick(rng, BACKGROUNDS, (0.14, 0.18, 0.1, 0.12, 0.06, 0.1, 0.1, 0.2)),
        background_colours=(
            _any_colour(rng, (0, 0.7), (0.1, 1.0)),
            _any_colour(rng, (0, 0.7), (0.1, 1.0)),
            _any_colour(rng, (0, 0.7), (0.1, 1.0)),
        ),
        background_blur=uniform(0.0, 0.03),
        scale=scale,
        centre=(0.5 + uniform(-0.04, 0.04), 0.975 - scale - uniform(0.02, 0.10)),
        tilt=float(rng.normal(0, 0.04)),
        turn=float(np.clip(rng.normal(0, 0.12), -0.26, 0.26)),
        light=light,
        light_colour=(1.0 + 0.08 * warm, 1.0, 1.0 - 0.1 * warm),
        ambient=uniform(0.8, 0.92) if drawn else uniform(0.45, 0.76),
        relief=uniform(0.2, 0.5) if drawn else uniform(0.6, 1.0),
        contrast=uniform(0.85, 1.15),
        vignette=uniform(0.0, 0.5) if rng.uniform() < 0.4 else 0.0,
        exposure=uniform(0.9, 1.1),
        saturation=0.0 if rendering == "grey" else uniform(0.75, 1.15),
        warmth=float(rng.normal(0, 0.03)),
        blur=uniform(0, 0.004) if rng.uniform() < 0.4 else 0.0,
        grain=uniform(0.0, 0.02) if rng.uniform() < 0.5 else 0.0,
        outline=uniform(0.6, 1.0) if drawn else 0.0,
        lines=1.0,
        marks=0.0,
    )
