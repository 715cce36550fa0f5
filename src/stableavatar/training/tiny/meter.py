"""Trains the meter of the mouth that the evaluation reads with (`stableavatar.evaluation.meter`).

    python -m stableavatar.training.tiny.meter --autoencoder FOLDER

Puppets of training seeds, their mouths set at random so that every opening, width and smile is there as
often; a quarter of them as short clips through the autoencoder, where one is given; all of them bent towards
photographs: other places, sizes, lights, colours, blur, noise. It ends with the meter's correlation on
puppets it has never seen.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray

from stableavatar.data.puppets import EVALUATION_SEED, Articulation, Identity, Motion, Renderer, make_clip
from stableavatar.errors import InputError, with_status
from stableavatar.evaluation.lips import correlate
from stableavatar.evaluation.meter import METER_FILE, SIZE, MouthMeter
from stableavatar.training.tiny.autoencoder_model import reconstruct

logger = logging.getLogger(__name__)

FIRST_SEED = 200_000
"""Identities from here on: training seeds that no other part of `tiny` learns from."""
_CLIP = 9
_RENDERED = 128


@dataclass(frozen=True)
class MeterSettings:
    """Everything that a training depends on besides the autoencoder."""

    identities: int = 600
    frames_an_identity: int = 16
    decoded_share: float = 0.35
    steps: int = 1800
    batch: int = 48
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Pictures:
    """Training frames uint8 [N, 3, 64, 64] and what the meter should read in them, float32 [N, 5]: opening,
    width - 1, smile, and the mouth's place x, y in 0..1."""

    frames: torch.Tensor
    labels: torch.Tensor


def visible_width(articulation: Articulation) -> NDArray[np.float32]:
    """Width of the mouth against its width at rest [frames], the smile's own stretch left out: 1 at rest."""
    stretch = 0.2 * (articulation.width - 0.4) - 0.36 * articulation.rounding - 0.06 * articulation.opening
    return np.asarray(1 + stretch, dtype=np.float32)


def _waves(rng: np.random.Generator, frames: int, knots: int) -> NDArray[np.float64]:
    """A random track [frames], uniform in 0..1 at its knots, straight between them."""
    return np.interp(np.linspace(0, knots - 1, frames), np.arange(knots), rng.uniform(0, 1, knots))


def draw_tracks(rng: np.random.Generator, frames: int, moving: bool) -> tuple[Articulation, Motion]:
    """A mouth and a bearing for `frames` frames: changing smoothly where `moving`, else each frame on its
    own."""

    def values() -> NDArray[np.float64]:
        return _waves(rng, frames, max(2, frames // 3)) if moving else rng.uniform(0, 1, frames)

    opening = np.clip(1.25 * values() ** 1.3 - 0.12, 0, 1)
    articulation = Articulation(
        *(
            track.astype(np.float32)
            for track in (
                opening,
                np.clip(0.4 + 0.5 * (values() - 0.5), 0, 1),
                np.clip(1.6 * values() - 0.9, 0, 1),
                np.clip(opening * (0.7 + 0.6 * values()), 0, 1),
                np.clip(values(), 0, 1),
                np.clip(1.5 * values() - 0.6, 0, 1),
            )
        )
    )
    ranges = {
        "shift_x": 0.04, "shift_y": 0.03, "roll": 0.16, "turn": 0.18, "nod": 0.1, "zoom": 0.05,
        "brow": 1.0, "smile": 1.0, "gaze_x": 0.8, "gaze_y": 0.5,
    }  # fmt: skip
    tracks = {name: reach * (2 * values() - 1) for name, reach in ranges.items()}
    tracks["zoom"] += 1
    tracks["blink"] = np.clip(4 * values() - 3, 0, 1)
    tracks["wide"] = np.clip(3 * values() - 2, 0, 1)
    return articulation, Motion(**{name: track.astype(np.float32) for name, track in tracks.items()})


def draw_pictures(settings: MeterSettings, vae: AutoencoderKLWan | None) -> Pictures:
    """Renders the training frames; a share of the identities as clips of 9 frames through `vae` (none without
    it)."""
    rng = np.random.default_rng(settings.seed)
    pictures: list[torch.Tensor] = []
    labels: list[NDArray[np.float32]] = []
    for index in range(settings.identities):
        through = vae is not None and rng.random() < settings.decoded_share
        count = 2 * _CLIP if through else settings.frames_an_identity
        articulation, motion = draw_tracks(rng, count, moving=through)
        renderer = Renderer(Identity.from_seed(FIRST_SEED + index), _RENDERED)
        drawn = [renderer.draw(articulation, motion, k) for k in range(count)]
        frames = torch.from_numpy(np.stack([picture for picture, _, _ in drawn])).permute(0, 3, 1, 2)
        if through and vae is not None:
            clips = (frames.float() / 127.5 - 1).unflatten(0, (2, _CLIP)).transpose(1, 2)
            made = reconstruct(vae, clips).transpose(1, 2).flatten(0, 1)
            frames = ((made + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        places = np.stack([_centroid(lips) for _, _, lips in drawn])
        width = visible_width(articulation) - 1
        read = np.stack([articulation.opening, width, motion.smile], axis=-1)
        seen = np.isfinite(places).all(axis=1)
        small = F.interpolate(frames.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        pictures.append(small[torch.from_numpy(seen)].round().to(torch.uint8))
        labels.append(np.concatenate([read, places], axis=1)[seen].astype(np.float32))
        if (index + 1) % 100 == 0:
            logger.info("%d of %d identities rendered", index + 1, settings.identities)
    return Pictures(torch.cat(pictures), torch.from_numpy(np.concatenate(labels)))


def _centroid(mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.full(2, np.nan, dtype=np.float32)
    return np.array(
        [(columns.mean() + 0.5) / mask.shape[1], (rows.mean() + 0.5) / mask.shape[0]], dtype=np.float32
    )


def bend(
    pictures: torch.Tensor, places: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves, turns, lights, blurs and grains pictures [B, 3, S, S] in -1..1; places [B, 2] move along.

    Opening, width and smile are in units of the face and stay what they are.
    """
    batch, _, size, _ = pictures.shape

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, shape or (batch,)).astype(np.float32))

    def sometimes(share: float) -> torch.Tensor:
        return (uniform(0, 1) < share).float()[:, None, None, None]

    angle = uniform(-0.15, 0.15)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zoom = torch.exp(uniform(-0.15, 0.28))
    stretch = torch.exp(uniform(-0.08, 0.08))
    shift = uniform(-0.12, 0.12, batch, 2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # Where each output pixel comes from: x_in = matrix @ x_out + shift, both in -1..1.
    matrix = torch.stack(
        [
            torch.stack([cos * zoom * mirror, -sin * zoom * stretch], dim=-1),
            torch.stack([sin * zoom * mirror, cos * zoom * stretch], dim=-1),
        ],
        dim=1,
    )
    theta = torch.cat([matrix, shift[..., None]], dim=2)
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    x = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    moved = torch.linalg.solve(matrix, ((2 * places - 1) - shift)[..., None])[..., 0]
    # A coarser camera: halved or thirded and brought back, for some of the batch.
    coarse = F.interpolate(x, scale_factor=float(rng.uniform(0.45, 0.9)), mode="bilinear", antialias=True)
    coarse = F.interpolate(coarse, (size, size), mode="bilinear")
    x = torch.lerp(x, coarse, sometimes(0.4))
    reach = int(rng.integers(1, 3))
    soft = F.avg_pool2d(F.pad(x, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    # A share above 1 sharpens, below it softens.
    x = torch.lerp(
        soft,
        x,
        torch.lerp(torch.ones(batch, 1, 1, 1), uniform(0.3, 1.5)[:, None, None, None], sometimes(0.3)),
    )
    light = torch.lerp(torch.ones(batch, 1, 3, 3), uniform(0.65, 1.35, batch, 1, 3, 3), sometimes(0.5))
    light = F.interpolate(
        light * uniform(0.85, 1.15, batch, 3, 1, 1), (size, size), mode="bilinear", align_corners=True
    )
    # Contrast by a curve through black and white, in place of a power: a third of the time.
    bow = uniform(-0.35, 0.35)[:, None, None, None]
    x = (x + bow * (1 - x * x) + 1) * light - (1 + uniform(-0.16, 0.16, batch, 1, 1, 1))
    grey = x.mean(dim=1, keepdim=True)
    x = torch.lerp(x, grey.expand_as(x), sometimes(0.2) * uniform(0.4, 1)[:, None, None, None])
    grain = torch.from_numpy(rng.standard_normal((batch, 1, size, size), dtype=np.float32))
    x = x + grain * sometimes(0.5) * uniform(0, 0.12, batch, 3, 1, 1)
    return x.clamp(-1, 1), (moved + 1) / 2


def meter_loss(
    values: torch.Tensor, centre: torch.Tensor, labels: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Squared errors of opening, width, smile [B, 3] and place [B, 2], each by the spread it has."""
    weights = torch.tensor([12.0, 30.0, 2.0])
    return (weights * (values - labels[:, :3]).square()).mean() + 20 * (centre - places).square().mean()


def train_meter(settings: MeterSettings, pictures: Pictures) -> MouthMeter:
    """AdamW, warm-up, then a cosine down to zero; averaged weights. About 4 minutes of one core."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng([settings.seed, 1])
    meter = MouthMeter()
    average = torch.optim.swa_utils.AveragedModel(
        meter, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(
        meter.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    total = 0.0
    for step in range(settings.steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        rate = settings.learning_rate * min(1.0, (step + 1) / 50) * fall
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.from_numpy(rng.integers(0, len(pictures.frames), settings.batch))
        labels = pictures.labels[chosen]
        clean = pictures.frames[chosen].float() / 127.5 - 1
        bent, places = bend(clean, labels[:, 3:], rng)
        inside = ((places > 0.05) & (places < 0.95)).all(dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            values, centre = meter(bent[inside])
        loss = meter_loss(values.float(), centre.float(), labels[inside], places[inside])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(meter.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(meter)
        total += loss.item()
        if (step + 1) % 200 == 0:
            logger.info("step %d of %d, loss %.4f", step + 1, settings.steps, total / 200)
            total = 0.0
    trained: MouthMeter = average.module  # type: ignore[assignment]
    return trained.eval().requires_grad_(False)


def check_meter(meter: MouthMeter, clips: int = 8, seconds: float = 4.0) -> float:
    """Median correlation of the opening read in true frames of unseen puppets with what was drawn."""
    scores = []
    for index in range(clips):
        clip = make_clip(EVALUATION_SEED + index, seconds)
        scores.append(correlate(meter.measure(clip.frames).opening, clip.articulation.opening))
    logger.info("opening on %d unseen puppets: r %s", clips, ", ".join(f"{score:.3f}" for score in scores))
    return float(np.median(scores))


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Trains the meter of the mouth.")
    parser.add_argument(
        "--out", type=Path, default=METER_FILE, help="the file to write (default: the package's own)"
    )
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of the trained autoencoder, in diffusers' layout"
    )
    for field in fields(MeterSettings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.autoencoder is not None and not options.autoencoder.is_dir():
        raise InputError(f"There is no autoencoder in {options.autoencoder}.")
    settings = MeterSettings(**{field.name: getattr(options, field.name) for field in fields(MeterSettings)})
    torch.set_num_threads(settings.threads)
    vae = None
    if options.autoencoder is not None:
        vae = AutoencoderKLWan.from_pretrained(options.autoencoder, low_cpu_mem_usage=False).eval()
    meter = train_meter(settings, draw_pictures(settings, vae))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    meter.save(options.out)
    logger.info(
        "median r %.3f; written to %s, %d bytes", check_meter(meter), options.out, options.out.stat().st_size
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
