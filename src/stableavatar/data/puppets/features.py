"""The parts of a puppet's face that are drawn anew for every frame: eyes and mouth."""

from __future__ import annotations

import numpy as np

from stableavatar.data.puppets.articulation import Articulation
from stableavatar.data.puppets.identity import Colour, Identity
from stableavatar.data.puppets.motion import Motion
from stableavatar.data.puppets.painting import Array, over, smoothstep

Box = tuple[slice, slice]


def _box(u: Array, v: Array, left: float, right: float, top: float, bottom: float) -> Box | None:
    """Slices of the pixels whose head coordinates lie in a rectangle (with what lies between them)."""
    inside = (u > left) & (u < right) & (v > top) & (v < bottom)
    rows = np.flatnonzero(inside.any(axis=1))
    columns = np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _below(curve: Array, v: Array, soft: float) -> Array:
    return smoothstep(-soft, soft, v - curve)


class Eyes:
    """Both eyes of an identity; `lid` and `level` are the skin's colour and light near them."""

    def __init__(self, identity: Identity, lid: Colour, level: Colour) -> None:
        self._identity = identity
        self._lid = np.asarray(lid, dtype=np.float32)
        self._level = np.asarray(level, dtype=np.float32)

    def draw(
        self, canvas: Array, face: Array, u: Array, v: Array, soft: float, motion: Motion, frame: int
    ) -> None:
        """Paint both eyes onto `canvas` [H, W, 3], in place."""
        for side in (-1.0, 1.0):
            self._draw_one(side, canvas, face, u, v, soft, motion, frame)

    def _draw_one(
        self,
        side: float,
        canvas: Array,
        face: Array,
        u: Array,
        v: Array,
        soft: float,
        motion: Motion,
        frame: int,
    ) -> None:
        who = self._identity
        cx = side * who.eye_spacing
        reach = who.eye_half_width + 0.07
        box = _box(u, v, cx - reach, cx + reach, who.eye_y - 0.17, who.eye_y + 0.15)
        if box is None:
            return
        part = canvas[box]
        seen = face[box]
        ex = side * u[box] - who.eye_spacing
        ey = v[box] - who.eye_y + who.eye_tilt * ex
        t = np.clip(ex / who.eye_half_width, -1, 1)
        profile = (1 - t * t) ** 0.8
        blink = float(motion.blink[frame])
        smile = max(0.0, float(motion.smile[frame]))
        wide = float(motion.wide[frame])
        height = who.eye_half_width * who.eye_openness * 1.25
        top = -height * (1 + 0.35 * wide) * profile
        bottom = height * (0.62 - 0.3 * smile + 0.1 * wide) * profile
        upper = top + (bottom - top) * blink
        inside = _below(upper, ey, soft) * (1 - _below(bottom, ey, soft))
        inside *= 1 - smoothstep(who.eye_half_width - soft, who.eye_half_width + soft, np.abs(ex))
        inside *= seen
        lid_zone = (
            _below(top - 0.02, ey, 2 * soft)
            * (1 - _below(bottom + 0.01, ey, soft))
            * (np.abs(ex) < who.eye_half_width)
        )
        over(part, self._lid, lid_zone * seen * min(1.0, blink * 3))
        cast = 1 - 0.4 * np.exp(-0.5 * ((ey - upper) / 0.03) ** 2)
        white = np.array([0.93, 0.91, 0.90], dtype=np.float32) * np.minimum(self._level, 1.05)
        over(part, white * cast[..., None] * (1 - 0.15 * t * t)[..., None], inside)
        gx = side * float(motion.gaze_x[frame]) * 0.06
        gy = float(motion.gaze_y[frame]) * 0.03 - 0.012
        radius = np.hypot(ex - gx, ey - gy)
        iris_cover = (1 - smoothstep(who.iris_radius - soft, who.iris_radius + soft, radius)) * inside
        ring = 0.55 + 0.5 * np.exp(-0.5 * ((radius - 0.55 * who.iris_radius) / (0.3 * who.iris_radius)) ** 2)
        lit = ring * (0.85 + 1.5 * np.clip(ey - gy, -0.05, 0.08)) * cast
        over(part, np.asarray(who.iris, dtype=np.float32) * lit[..., None], iris_cover)
        pupil = 1 - smoothstep(who.iris_radius * 0.45 - soft, who.iris_radius * 0.45 + soft, radius)
        over(part, (0.02, 0.02, 0.02), pupil * inside)
        spot = np.hypot(ex - gx - side * 0.03 * np.sign(who.light[0]), ey - gy + 0.03)
        over(part, (1.0, 1.0, 1.0), 0.9 * (1 - smoothstep(0.014, 0.014 + 2 * soft, spot)) * inside)
        ends = 1 - smoothstep(who.eye_half_width, who.eye_half_width + 0.025, np.abs(ex))
        lash = np.exp(-0.5 * ((ey - upper) / (0.010 + 0.011 * who.lashes + 0.25 * soft)) ** 2) * ends
        over(part, (0.07, 0.05, 0.05), np.clip((0.55 + 0.4 * who.lashes) * lash, 0, 0.97) * seen)
        rim = np.exp(-0.5 * ((ey - bottom) / (0.008 + 0.3 * soft)) ** 2) * ends
        over(part, self._lid * 0.6, 0.5 * rim * seen)
        crease = np.exp(-0.5 * ((ey - top * 1.25 + 0.035) / 0.012) ** 2) * ends
        over(part, self._lid * 0.6, 0.45 * crease * (1 - blink) * seen)


class Mouth:
    """The mouth of an identity; `level` is the light on it."""

    def __init__(self, identity: Identity, level: Colour) -> None:
        self._identity = identity
        self._level = np.asarray(level, dtype=np.float32)

    def draw(
        self,
        canvas: Array,
        face: Array,
        u: Array,
        v: Array,
        soft: float,
        articulation: Articulation,
        smile: float,
        frame: int,
    ) -> Array:
        """Paint the mouth onto `canvas` [H, W, 3] in place; returns the coverage [H, W] of lips and gap."""
        who = self._identity
        opening = float(articulation.opening[frame])
        rounding = float(articulation.rounding[frame])
        stretch = float(articulation.width[frame]) - 0.4
        teeth = float(articulation.teeth[frame])
        tongue = float(articulation.tongue[frame])
        half = who.mouth_half_width * (1 + 0.2 * stretch - 0.36 * rounding - 0.06 * opening + 0.13 * smile)
        lips = np.zeros_like(u)
        box = _box(u, v, -half - 0.12, half + 0.12, who.mouth_y - 0.24, who.mouth_y + 0.5)
        if box is None:
            return lips
        part = canvas[box]
        seen = face[box]
        x = u[box]
        y = v[box] - who.mouth_y
        t = np.clip(x / half, -1, 1)
        flat = np.clip(1 - t * t, 0, 1)
        bow = flat ** (0.62 + 0.25 * (1 - rounding))
        corner = (who.corner_lift - 0.085 * smile) * np.abs(t) ** 2.2 + 0.02 * max(0.0, smile)
        gap = 0.32 * opening * (1 - 0.12 * rounding) + 0.02 * max(0.0, teeth - 0.3) * (opening < 0.4)
        rise = 0.2 * gap
        drop = 0.8 * gap
        inner_top = corner - rise * bow
        inner_bottom = corner + drop * bow
        thin = 1 - 0.22 * max(0.0, stretch) - 0.12 * max(0.0, smile) + 0.3 * rounding
        upper = who.upper_lip * thin
        lower = who.lower_lip * thin * (1 - 0.12 * opening)
        cupid = (
            1
            - who.cupid_bow * np.exp(-0.5 * (x / (0.16 * half)) ** 2)
            + 0.1 * np.exp(-0.5 * ((np.abs(x) - 0.3 * half) / (0.2 * half)) ** 2)
        )
        outer_top = inner_top - upper * flat**0.75 * cupid
        outer_bottom = inner_bottom + lower * flat**0.6
        ends = 1 - smoothstep(half - soft, half + soft, np.abs(x))
        whole = _below(outer_top, y, soft) * (1 - _below(outer_bottom, y, soft)) * ends
        hollow = _below(inner_top, y, soft) * (1 - _below(inner_bottom, y, soft)) * ends

        # Folds and shadows the mouth throws on the skin round it.
        under = np.exp(-0.5 * ((y - outer_bottom - 0.045) / 0.03) ** 2) * flat
        over(part, np.asarray(who.skin, dtype=np.float32) * 0.45, 0.16 * under * (1 - whole) * seen)
        pinch = np.exp(-0.5 * (((np.abs(x) - half - 0.02) / 0.03) ** 2 + ((y - corner) / 0.035) ** 2))
        over(part, np.asarray(who.skin, dtype=np.float32) * 0.4, (0.22 + 0.2 * abs(smile)) * pinch * seen)

        span = np.maximum(outer_bottom - outer_top, 1e-3)
        height = np.clip((y - outer_top) / span, 0, 1)
        in_upper = y < inner_top
        lower_share = np.clip((y - inner_bottom) / np.maximum(outer_bottom - inner_bottom, 1e-3), 0, 1)
        shade = np.where(in_upper, 0.78 + 0.14 * (1 - height), 1.02 - 0.22 * lower_share)
        colour = np.asarray(who.lip, dtype=np.float32) * self._level * shade[..., None]
        gloss = np.exp(-0.5 * ((lower_share - 0.38) / 0.16) ** 2) * flat * (~in_upper)
        gloss = gloss * (0.6 + 0.4 * np.cos(4 * t + 2 * who.light[0]))
        if who.rendering == "drawing":
            gloss = gloss * 0.3
        colour = colour + (0.22 * who.lip_gloss * gloss)[..., None]
        over(part, colour.astype(np.float32), (whole * seen).astype(np.float32))

        if gap > 0.003:
            self._draw_inside(
                part, seen * hollow, x, y, t, half, gap, inner_top, inner_bottom, soft, teeth, tongue
            )
        seam = np.exp(-0.5 * ((y - 0.5 * (inner_top + inner_bottom)) / (0.008 + 0.35 * soft)) ** 2) * ends
        shut = 1 - float(np.clip(gap / 0.035, 0, 1))
        over(part, np.asarray(who.lip, dtype=np.float32) * 0.28, 0.85 * seam * shut * seen)
        edge = np.exp(-0.5 * ((y - inner_top) / (0.006 + 0.3 * soft)) ** 2) * ends
        over(part, np.asarray(who.lip, dtype=np.float32) * 0.4, 0.45 * edge * (1 - shut) * seen)
        if who.outline > 0:
            ink = np.exp(-0.5 * ((y - outer_bottom) / 0.012) ** 2) + np.exp(
                -0.5 * ((y - outer_top) / 0.01) ** 2
            )
            over(
                part,
                np.asarray(who.lip, dtype=np.float32) * 0.3,
                np.clip(0.6 * who.outline * ink * ends * seen, 0, 1),
            )
        lips[box] = whole
        return lips

    def _draw_inside(
        self,
        part: Array,
        cover: Array,
        x: Array,
        y: Array,
        t: Array,
        half: float,
        gap: float,
        inner_top: Array,
        inner_bottom: Array,
        soft: float,
        teeth: float,
        tongue: float,
    ) -> None:
        who = self._identity
        depth = np.clip((y - inner_top) / np.maximum(inner_bottom - inner_top, 1e-3), 0, 1)
        dark = np.asarray(who.mouth_dark, dtype=np.float32) * (0.55 + 0.8 * depth)[..., None]
        over(part, dark.astype(np.float32), cover)
        if tongue > 0.05:
            hump = (
                float(np.max(inner_bottom))
                - (0.025 + 0.35 * gap * tongue) * np.clip(1 - (x / (0.62 * half)) ** 2, 0, 1) ** 0.6
            )
            flesh = np.array([0.72, 0.33, 0.33], dtype=np.float32) * self._level * 0.82
            groove = 1 - 0.15 * np.exp(-0.5 * (x / 0.02) ** 2)
            over(
                part, flesh * groove[..., None], _below(hump, y, 2 * soft) * cover * (np.abs(x) < 0.62 * half)
            )
        # Of an open mouth the upper row is seen whatever the sound; hiss shows more of it.
        length = 0.06 + 0.035 * teeth
        row = float(np.min(inner_top)) + length - 0.05 * t * t
        shown = float(np.clip(0.75 + teeth, 0, 1))
        gaps = 1 - 0.12 * np.exp(-0.5 * (np.sin(x * np.pi / 0.075) / 0.3) ** 2)
        enamel = np.asarray(who.tooth, dtype=np.float32) * np.minimum(self._level, 1.0) * 0.96
        tint = (gaps * (1 - 0.45 * t * t))[..., None]
        over(part, enamel * tint, shown * (1 - _below(row, y, 1.2 * soft)) * cover)
        lower_row = float(np.max(inner_bottom)) - 0.035 - 0.02 * teeth + 0.03 * t * t
        over(
            part,
            enamel * tint * 0.85,
            0.75 * max(0.0, teeth - 0.35) * _below(lower_row, y, 1.2 * soft) * cover,
        )
