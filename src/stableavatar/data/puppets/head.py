"""The still parts of a puppet's head, painted once into textures that the renderer bends and moves.

The height of the face (nose, sockets, cheeks, chin) is modelled as a relief and lit from the identity's
light, so that the shading is that of a body, not of a flat drawing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stableavatar.data.puppets.identity import Colour, Identity
from stableavatar.data.puppets.painting import (
    Array,
    blob,
    noise_field,
    over,
    sample_tiled,
    signed_distance,
    smoothstep,
)

EXTENT = 1.5
"""Head textures cover x in [-EXTENT, EXTENT] and y in [TOP, TOP + 2 * EXTENT] head units."""
TOP = -1.62
_BELT = -0.1
"""Height at which the skull's half meets the jaw's half of the outline."""


@dataclass(frozen=True)
class HeadTextures:
    """Premultiplied RGBA layers [N, N, 4] in 0..1 and the face's coverage [N, N].

    `back` is hair behind neck and shoulders, `head` skin and ears, `front` hair, spectacles and ear-rings
    before the eyes. `lid` and `lip_shade` are colours the moving parts take over from the light.
    """

    back: Array
    head: Array
    front: Array
    face: Array
    lid: Colour
    lip_shade: Colour
    has_back: bool


@dataclass(frozen=True)
class _Grid:
    x: Array
    y: Array
    spacing: float


def _grid(resolution: int) -> _Grid:
    step = 2 * EXTENT / resolution
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) * step
    x, y = np.meshgrid(axis - EXTENT, axis + TOP)
    return _Grid(x.astype(np.float32), y.astype(np.float32), step)


def outline(identity: Identity, x: Array, y: Array, grow: float = 0.0) -> Array:
    """Implicit outline of skull and jaw: positive inside, 1 in the middle; `grow` widens it by head units."""
    half_width = identity.face_half_width + grow
    upper = (
        1
        - np.abs(x / half_width) ** 2
        - (np.clip(_BELT - y, 0, None) / (identity.crown + _BELT + grow)) ** 2.3
    )
    # The power changes slowly below the belt: a jump there would show as a crease in the light.
    power = 2 + (identity.cheek_power - 2) * smoothstep(_BELT, 0.55, y)
    lower = (
        1
        - np.abs(x / half_width) ** power
        - (np.clip(y - _BELT, 0, None) / (1 - _BELT + grow)) ** identity.jaw_power
    )
    return np.where(y < _BELT, upper, lower).astype(np.float32)


def nose_tip(identity: Identity) -> float:
    """Height of the tip of the nose in head units."""
    return min(identity.eye_y + 0.22 + identity.nose_length, identity.mouth_y - 0.22)


def _relief(identity: Identity, grid: _Grid, inside: Array) -> Array:
    x, y = grid.x, grid.y
    tip = nose_tip(identity)
    height = 0.75 * np.sqrt(np.clip(inside, 0, 1))
    along = smoothstep(identity.eye_y - 0.16, tip, y) * (1 - smoothstep(tip + 0.005, tip + 0.075, y))
    width = 0.045 + (identity.nose_width * 0.5 - 0.045) * smoothstep(identity.eye_y, tip, y)
    height += identity.nose_relief * along * np.exp(-0.5 * (x / width) ** 2)
    for side in (-1.0, 1.0):
        height += (
            0.3 * identity.nose_relief * blob(x, y, side * identity.nose_width * 0.7, tip + 0.015, 0.04, 0.04)
        )
        height -= 0.085 * blob(x, y, side * identity.eye_spacing, identity.eye_y, 0.14, 0.09)
        height += 0.035 * blob(
            x, y, side * identity.eye_spacing, identity.eye_y - identity.brow_height, 0.17, 0.05
        )
        height += 0.05 * blob(x, y, side * 0.45, 0.17, 0.17, 0.15)
    height += 0.05 * blob(x, y, 0, identity.mouth_y, 0.24, 0.13)
    height -= 0.03 * blob(x, y, 0, identity.mouth_y + 0.2, 0.16, 0.035)
    height += 0.05 * blob(x, y, 0, 0.87, 0.16, 0.08)
    return height.astype(np.float32)


def _light_relief(identity: Identity, grid: _Grid, height: Array, strength: float) -> tuple[Array, Array]:
    """Diffuse shade (about 0.4 to 1.2) and specular shine (0..1) of a relief under the identity's light."""
    slope_y, slope_x = np.gradient(height, grid.spacing)
    slope_x = np.clip(slope_x, -1.6, 1.6) * strength
    slope_y = np.clip(slope_y, -1.6, 1.6) * strength
    norm = 1.0 / np.sqrt(slope_x**2 + slope_y**2 + 1)
    lx, ly, lz = identity.light
    facing = (-slope_x * lx - slope_y * ly + lz) * norm
    diffuse = np.clip((facing + 0.3) / 1.3, 0, None)
    shade = identity.ambient + (1.12 - identity.ambient) * diffuse
    half = np.array([lx, ly, lz + 1.0])
    half /= np.linalg.norm(half)
    shine = np.clip((-slope_x * half[0] - slope_y * half[1] + half[2]) * norm, 0, 1) ** 28
    if identity.rendering == "drawing":
        middle = float(np.median(shade[grid.y.shape[0] // 3 : grid.y.shape[0] * 2 // 3]))
        shade = np.where(shade > middle * 0.93, 1.02, 0.84).astype(np.float32)
        shine = np.zeros_like(shine)
    return shade.astype(np.float32), shine.astype(np.float32)


def _lit(colour: Colour | Array, shade: Array, light: Colour) -> Array:
    """Colour under shade; shadows of skin and hair lean towards red, as light scatters inside."""
    base = np.asarray(colour, dtype=np.float32)
    if base.ndim == 1:
        base = np.broadcast_to(base, (*shade.shape, 3))
    darkness = np.clip(1 - shade, 0, 1)[..., None]
    return (
        base
        * shade[..., None]
        * np.asarray(light, dtype=np.float32)
        * (1 - darkness * np.array([0.0, 0.12, 0.16], dtype=np.float32))
    )


def _paint_skin(identity: Identity, grid: _Grid, rng: np.random.Generator) -> tuple[Array, Array, Colour]:
    x, y = grid.x, grid.y
    size = x.shape[0]
    inside = outline(identity, x, y)
    distance = signed_distance(inside, grid.spacing)
    face = smoothstep(-grid.spacing, grid.spacing, distance)
    shade, shine = _light_relief(identity, grid, _relief(identity, grid, inside), identity.relief)
    tip = nose_tip(identity)
    flesh = np.broadcast_to(np.asarray(identity.skin, dtype=np.float32), (size, size, 3)).copy()
    red = np.clip(np.asarray(identity.skin) * np.array([1.0, 0.62, 0.6]), 0, 1)
    for side in (-1.0, 1.0):
        over(flesh, red, 0.55 * identity.blush * blob(x, y, side * 0.42, 0.2, 0.17, 0.13))
    over(flesh, red, 0.35 * identity.blush * blob(x, y, 0, tip, 0.1, 0.09))
    mottle = noise_field(rng, size, size, 14, 4)
    plain = 0.35 if identity.rendering == "drawing" else 1.0
    flesh *= 1 + (0.014 * plain * mottle)[..., None]
    if identity.freckles > 0:
        spots = smoothstep(1.5, 2.1, noise_field(rng, size, size, 60, 2))
        zone = blob(x, y, 0, 0.1, 0.42, 0.17)
        over(
            flesh,
            np.asarray(identity.skin) * np.array([0.7, 0.52, 0.42]),
            0.6 * identity.freckles * spots * zone,
        )
    if identity.marks > 0:
        _paint_marks(identity, flesh)
    lines = np.zeros_like(x)
    if identity.wrinkles > 0.15:
        waves = 0.5 + 0.5 * np.sin((y + 0.02 * np.sin(7 * x) + 0.05 * x * x) * 55)
        lines += 0.1 * identity.wrinkles * smoothstep(0.7, 1.0, waves) * blob(x, y, 0, -0.58, 0.3, 0.09)
        for side in (-1.0, 1.0):
            lines += (
                0.16
                * identity.wrinkles
                * blob(x, y, side * identity.eye_spacing, identity.eye_y + 0.11, 0.11, 0.02)
            )
    fold = np.abs(x) - (identity.nose_width + 0.02 + 0.32 * (y - tip + 0.02))
    reach = smoothstep(tip - 0.05, tip + 0.06, y) * (
        1 - smoothstep(identity.mouth_y - 0.1, identity.mouth_y + 0.08, y)
    )
    lines += (0.06 + 0.16 * identity.wrinkles) * reach * np.exp(-0.5 * (fold / 0.025) ** 2)
    for side in (-1.0, 1.0):
        lines += (
            0.22
            * identity.shadow
            * blob(x, y, side * identity.eye_spacing * 0.97, identity.eye_y - 0.03, 0.16, 0.1)
        )
        lines += 0.2 * blob(x, y, side * identity.nose_width * 0.98, tip + 0.015, 0.018, 0.035)
    lines += 0.22 * blob(x, y, 0, tip + 0.075, identity.nose_width * 0.6, 0.018)
    lines += 0.12 * blob(x, y, 0, identity.mouth_y - 0.12, 0.03, 0.05)
    lines += 0.16 * blob(x, y, 0, identity.mouth_y + identity.lower_lip + 0.07, 0.14, 0.03)
    shade = shade * (1 - np.clip(identity.lines * lines, 0, 0.8))
    if identity.rendering != "drawing":
        shade *= 1 - 0.18 * (1 - smoothstep(0.0, 0.16, distance))
    skin = _lit(flesh, shade.astype(np.float32), identity.light_colour)
    skin += (0.13 * shine * (0.5 + 0.5 * plain))[..., None]
    for side in (-1.0, 1.0):
        hole = blob(x, y, side * identity.nose_width * 0.42, tip + 0.048, 0.027, 0.016)
        dark = 0.9 * min(identity.lines, 1.0) * smoothstep(0.3, 0.9, hole)
        over(skin, np.asarray(identity.skin) * np.array([0.28, 0.2, 0.2]), dark)
    _paint_brows(identity, grid, skin, rng)
    _paint_beard(identity, grid, skin, distance, rng)
    if identity.outline > 0:
        ink = np.exp(-0.5 * (distance / 0.016) ** 2) * identity.outline
        ink += 0.7 * identity.outline * np.exp(-0.5 * ((fold - 0.0) / 0.008) ** 2) * reach * identity.wrinkles
        over(skin, np.asarray(identity.skin) * 0.22, np.clip(ink, 0, 1).astype(np.float32))
    middle = blob(x, y, 0, 0.35, 0.3, 0.3)
    level = float((shade * middle).sum() / middle.sum())
    return skin, face, _tuple(np.asarray(identity.light_colour) * level)


def _paint_marks(identity: Identity, flesh: Array) -> None:
    """Light and dark of every size, as photographs have it of light that the puppets do not know, and as many
    colours; in place."""
    rng = np.random.default_rng([identity.seed, 405])
    size = flesh.shape[0]
    for cells, octaves, strength in ((4, 3, 0.14), (18, 3, 0.1)):
        flesh *= 1 + (strength * identity.marks * noise_field(rng, size, size, cells, octaves))[..., None]
    for channel in range(3):
        flesh[..., channel] *= 1 + 0.05 * identity.marks * noise_field(rng, size, size, 5, 2)
    np.clip(flesh, 0, 1, out=flesh)


def _tuple(values: Array) -> Colour:
    return float(values[0]), float(values[1]), float(values[2])


def _paint_brows(identity: Identity, grid: _Grid, skin: Array, rng: np.random.Generator) -> None:
    x, y = grid.x, grid.y
    hairs = noise_field(rng, x.shape[0], x.shape[0], 70, 2)
    along = (np.abs(x) - (identity.eye_spacing - 0.15)) / 0.36
    bend = identity.brow_arch * (1 - (along - 0.62) ** 2 / 0.38) - 0.035 * along * np.sign(
        identity.eye_tilt + 0.02
    )
    middle = identity.eye_y - identity.brow_height - bend
    thickness = identity.brow_thickness * (1 - 0.55 * np.clip(along, 0, 1)) * smoothstep(-0.06, 0.12, along)
    edge = np.abs(y - middle) - thickness
    cover = (
        (1 - smoothstep(-0.014, 0.016, edge))
        * (1 - smoothstep(0.86, 1.03, along))
        * smoothstep(-0.05, 0.05, along)
    )
    over(skin, identity.brow, np.clip(cover * (0.82 + 0.12 * hairs), 0, 0.95).astype(np.float32))


def _paint_beard(
    identity: Identity, grid: _Grid, skin: Array, distance: Array, rng: np.random.Generator
) -> None:
    if identity.beard == "none":
        return
    x, y = grid.x, grid.y
    size = x.shape[0]
    strands = noise_field(rng, size, size, 48, 3)
    patches = 0.03 * noise_field(rng, size, size, 9, 2)
    tip = nose_tip(identity)
    mouth = identity.mouth_y
    side = smoothstep(0.0, 0.12, y + patches - 0.62 + 0.62 * np.abs(x) ** 1.4 * 1.2)
    jaw = side * smoothstep(-0.02, 0.05, y - 0.05)
    moustache = (
        smoothstep(tip + 0.07, tip + 0.12, y + patches)
        * (1 - smoothstep(mouth + 0.02, mouth + 0.1, y))
        * (1 - smoothstep(0.26, 0.36, np.abs(x) + patches))
    )
    goatee = blob(x, y, 0, 0.9, 0.19, 0.17) + 0.7 * np.exp(-0.5 * ((np.abs(x) - 0.38) / 0.05) ** 2) * blob(
        x, y, 0, 0.68, 2.0, 0.14
    )
    goatee = smoothstep(0.25, 0.6, goatee + patches)
    region = {
        "stubble": np.maximum(jaw, moustache) * 0.42,
        "moustache": moustache,
        "goatee": np.maximum(goatee, moustache),
        "full": np.maximum(jaw, moustache),
    }[identity.beard]
    cover = np.clip(region * identity.beard_density * (0.9 + 0.12 * strands), 0, 0.96).astype(np.float32)
    hair = np.asarray(identity.hair) * 0.85
    shade = 0.75 + 0.16 * strands + 0.25 * smoothstep(0.0, 0.2, distance)
    over(skin, hair * np.clip(shade, 0.3, 1.3)[..., None] * np.asarray(identity.light_colour), cover)


def _paint_ears(identity: Identity, grid: _Grid, rgb: Array, alpha: Array, level: Colour) -> None:
    x, y = grid.x, grid.y
    for side in (-1.0, 1.0):
        cx = side * (identity.face_half_width + 0.02)
        radius = np.hypot(
            (x - cx) / (identity.ear_size * 0.62),
            (y - 0.0 + 0.1 * (x - cx) * side) / (identity.ear_size * 1.25),
        )
        cover = 1 - smoothstep(1 - 0.12, 1 + 0.06, radius)
        dent = 0.3 * np.exp(-0.5 * ((radius - 0.45) / 0.2) ** 2) + 0.25 * smoothstep(0.75, 1.05, radius)
        colour = np.asarray(identity.skin) * np.array([1.0, 0.9, 0.88]) * np.asarray(level)
        turned = 1.0 + 0.12 * side * identity.light[0]
        over(rgb, colour * (turned * (1 - dent))[..., None], cover)
        np.maximum(alpha, cover, out=alpha)


def _hair_texture(identity: Identity, grid: _Grid, rng: np.random.Generator) -> Array:
    """Colour of hair everywhere [N, N, 3]: strands that run from the parting, or curls."""
    x, y = grid.x, grid.y
    size = x.shape[0]
    field = noise_field(rng, 256, 256, 32, 3)
    root_x = identity.hair_part * 0.5
    angle = np.arctan2(x - root_x, y + identity.crown + 0.55)
    radius = np.hypot(x - root_x, y + identity.crown + 0.55)
    if identity.hair_style == "curly":
        strands = noise_field(rng, size, size, 26, 2)
    else:
        wave = 0.05 * identity.hair_curl * np.sin(9 * radius)
        strands = sample_tiled(field, (angle + wave) * 190, radius * 14)
    dome = np.sqrt(np.clip(outline(identity, x, np.minimum(y, _BELT), identity.hair_volume + 0.05), 0, 1))
    shade, _ = _light_relief(identity, grid, dome.astype(np.float32) * 0.7, identity.relief)
    band = np.exp(-0.5 * ((radius - 0.8 - 0.08 * strands) / 0.13) ** 2)
    gloss = 0.0 if identity.rendering == "drawing" else 0.16
    rough = 0.07 if identity.rendering == "drawing" else 0.17
    colour = _lit(identity.hair, (shade * (1 + rough * strands)).astype(np.float32), identity.light_colour)
    lift = np.asarray(identity.hair) * 0.6 + 0.25
    return np.clip(colour + (gloss * band * (0.7 + 0.5 * strands))[..., None] * lift, 0, 1).astype(np.float32)


def _hair_cover(identity: Identity, grid: _Grid, rng: np.random.Generator) -> tuple[Array, Array]:
    """Coverage of the hair before the face and of the hair behind the neck, both [N, N]."""
    x, y = grid.x, grid.y
    size = x.shape[0]
    style = identity.hair_style
    curly = style == "curly"
    none = np.zeros_like(x)
    if style == "bald":
        return none, none
    ragged = noise_field(rng, size, size, 10 if curly else 22, 3) * (0.035 if curly else 0.014)
    volume = {"buzz": 0.012, "short": 0.07, "curly": 0.16, "bun": 0.04}.get(style, 0.06) + (
        0.0 if style == "buzz" else identity.hair_volume * (1.4 if curly else 0.7)
    )
    half = identity.face_half_width
    shell = signed_distance(outline(identity, x, np.minimum(y, _BELT + 0.0), volume), grid.spacing) + ragged
    shell_cover = smoothstep(-1.6 * grid.spacing, 1.6 * grid.spacing, shell)
    shift = x - identity.hair_part * 0.35
    line = identity.hairline + 0.0 * x
    if style == "parted":
        line = identity.hairline - 0.02 + 0.42 * np.abs(shift) ** 1.5
    elif style in ("fringe", "bob"):
        fringe = identity.eye_y - identity.brow_height - 0.05
        line = fringe + 0.05 * np.sign(identity.hair_part) * shift + 0.03 * shift**2
    elif style == "long":
        line = identity.hairline + 0.55 * np.abs(shift) ** 1.6
    elif style == "curly":
        line = identity.hairline + 0.12 + 0.1 * shift**2
    temple = {"buzz": 0.9, "short": 0.9, "bun": 0.93, "bob": 0.8, "long": 0.84, "fringe": 0.86}.get(
        style, 0.88
    )
    line = line + 0.75 * np.clip(np.abs(x) / (half * temple), 0, 1.3) ** 9 + 2.2 * ragged
    above = 1 - smoothstep(-0.025, 0.025, y - line)
    ends = {"bob": 0.78, "long": 3.0, "curly": 0.45, "fringe": 0.22}.get(style, -0.02)
    lower = 1 - smoothstep(ends - 0.06, ends + 0.06, y + 3 * ragged)
    front = shell_cover * above * lower
    back = none
    if style in ("bob", "long", "curly"):
        spread = volume + 0.1 * smoothstep(0.0, 0.9, y) * (0.4 + identity.hair_curl)
        width = half + spread
        sides = smoothstep(-1.6 * grid.spacing, 1.6 * grid.spacing, width - np.abs(x) + ragged) * smoothstep(
            _BELT - 0.05, _BELT + 0.02, y
        )
        inner = half * temple + 0.03 * np.sin(5 * y) * identity.hair_curl - 0.05 * smoothstep(0.2, 1.0, y)
        lock = smoothstep(-0.02, 0.03, np.abs(x) - inner + 2 * ragged)
        front = np.maximum(front, sides * lock * lower)
        back = np.maximum(shell_cover * (y < _BELT), sides) * lower
    if style == "bun":
        knot = np.hypot(x - 0.1 * identity.hair_part, (y + identity.crown + 0.12) / 0.85)
        back = 1 - smoothstep(-1.6 * grid.spacing, 1.6 * grid.spacing, knot - 0.3 + ragged)
    if style == "buzz":
        front = front * 0.8
    return front.astype(np.float32), back.astype(np.float32)


def _paint_glasses(identity: Identity, grid: _Grid, rgb: Array, alpha: Array) -> None:
    x, y = grid.x, grid.y
    middle = identity.eye_y + 0.02
    ring_x = np.abs(x) - identity.eye_spacing - 0.005
    if identity.glasses == "round":
        edge = np.hypot(ring_x, (y - middle) * 1.06) - 0.225
    else:
        dx = np.abs(ring_x) - 0.17
        dy = np.abs(y - middle) - 0.12
        edge = np.hypot(np.clip(dx, 0, None), np.clip(dy, 0, None)) + np.minimum(np.maximum(dx, dy), 0) - 0.06
    lens = 1 - smoothstep(-0.01, 0.01, edge)
    glare = lens * smoothstep(0.0, 0.02, 0.05 - np.abs(ring_x + 0.6 * (y - middle) + 0.06))
    tint = 0.06 * lens + 0.14 * glare
    over(rgb, (0.95, 0.97, 1.0), tint / np.maximum(tint + alpha * (1 - tint), 1e-4))
    alpha += tint * (1 - alpha)
    frame = 1 - smoothstep(0.008, 0.024, np.abs(edge))
    bridge = (
        (1 - smoothstep(0.008, 0.024, np.abs(y - middle + 0.04 + 0.6 * x * x)))
        * (np.abs(ring_x + 0.0) > 0.2)
        * (np.abs(x) < 0.15)
    )
    temple = (
        (1 - smoothstep(0.008, 0.022, np.abs(y - middle + 0.02)))
        * (np.abs(x) > identity.eye_spacing + 0.2)
        * (np.abs(x) < identity.face_half_width + 0.02)
    )
    cover = np.clip(frame + bridge + temple, 0, 1).astype(np.float32)
    over(rgb, identity.glasses_colour, cover)
    np.maximum(alpha, cover, out=alpha)


def _paint_cap(identity: Identity, grid: _Grid, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y = grid.x, grid.y
    shell = signed_distance(outline(identity, x, np.minimum(y, _BELT), 0.09), grid.spacing)
    rim = identity.hairline + 0.1 + 0.16 * (x / identity.face_half_width) ** 2
    cover = smoothstep(-1.6 * grid.spacing, 1.6 * grid.spacing, shell) * (
        1 - smoothstep(-1.6 * grid.spacing, 1.6 * grid.spacing, y - rim)
    )
    knit = 0.06 * np.sin(x * 60) + 0.04 * noise_field(rng, x.shape[0], x.shape[0], 40, 2)
    dome = np.sqrt(np.clip(outline(identity, x, np.minimum(y, _BELT), 0.12), 0, 1)).astype(np.float32)
    shade, _ = _light_relief(identity, grid, dome * 0.7, identity.relief)
    fold = 0.3 * np.exp(-0.5 * ((y - rim + 0.2) / 0.018) ** 2)
    return _lit(
        identity.cloth_second, (shade * (1 + knit - fold)).astype(np.float32), identity.light_colour
    ), cover


def paint_head(identity: Identity, resolution: int) -> HeadTextures:
    """Paint the still layers of a head, `resolution` pixels a side; the same for the same identity."""
    rng = np.random.default_rng([identity.seed, 202])
    grid = _grid(resolution)
    skin, face, level = _paint_skin(identity, grid, rng)
    ears = np.zeros_like(skin)
    alpha = np.zeros_like(face)
    _paint_ears(identity, grid, ears, alpha, level)
    rgb = ears
    over(rgb, skin, face)
    alpha = np.maximum(alpha, face)
    head = np.concatenate([np.clip(rgb, 0, 1) * alpha[..., None], alpha[..., None]], axis=-1)

    colour = _hair_texture(identity, grid, rng)
    front_cover, back_cover = _hair_cover(identity, grid, rng)
    if identity.hair_style == "cap":
        colour, front_cover = _paint_cap(identity, grid, rng)
    if identity.outline > 0:
        for cover in (front_cover, back_cover):
            rim = np.clip(cover * (1 - cover) * 4, 0, 1)
            colour = colour * (1 - 0.7 * identity.outline * rim[..., None])
    front_rgb = colour.copy()
    front_alpha = front_cover.copy()
    if identity.glasses != "none":
        _paint_glasses(identity, grid, front_rgb, front_alpha)
    if identity.earrings:
        for side in (-1.0, 1.0):
            ring = blob(
                grid.x,
                grid.y,
                side * (identity.face_half_width + 0.03),
                identity.ear_size * 1.35,
                0.028,
                0.034,
            )
            cover = smoothstep(0.4, 0.7, ring)
            over(front_rgb, identity.glasses_colour, cover)
            np.maximum(front_alpha, cover, out=front_alpha)
    front = np.concatenate([front_rgb * front_alpha[..., None], front_alpha[..., None]], axis=-1)
    depth = 0.62 if identity.rendering != "drawing" else 0.8
    back = np.concatenate([colour * depth * back_cover[..., None], back_cover[..., None]], axis=-1)
    lid = _tuple(np.asarray(identity.skin) * np.asarray(level) * np.array([0.92, 0.86, 0.84]))
    return HeadTextures(
        back=back.astype(np.float32),
        head=head.astype(np.float32),
        front=front.astype(np.float32),
        face=face,
        lid=lid,
        lip_shade=level,
        has_back=bool(back_cover.max() > 0),
    )
