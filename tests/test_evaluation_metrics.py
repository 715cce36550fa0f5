"""Every metric of the registry on a clip that deserves its bar and on one that does not."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puppet_frames import blurred
from stableavatar.evaluation.observation import Bar, FaceTrack, Frames, MouthTrack, Observation, Variant
from stableavatar.evaluation.pictures import shifted
from stableavatar.evaluation.registry import GROUPS

FPS, SIDE = 5, 64
SECONDS = {"long": 150, "moving": 4}
"""By group; of the others 20. The lips of the long one stop for half of its last minute."""
OUTSIDE = np.zeros((SIDE, SIDE), dtype=bool)
OUTSIDE[:, :12] = True
MOUTH = np.zeros((SIDE, SIDE), dtype=bool)
MOUTH[20:44, 20:44] = True
AROUND_THE_MOUTH = np.zeros((SIDE, SIDE), dtype=bool)
AROUND_THE_MOUTH[15:49, 15:49] = True

Change = Callable[[Observation], Observation]


def texture(seed: int) -> Frames:
    """A face [1, H, W, 3], and beside it a wall of one colour."""
    drawn = np.random.default_rng(seed).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    picture = blurred(drawn, 0.8)
    picture[:, OUTSIDE] = 100
    return picture


def perfect(seconds: int) -> Observation:
    """What is called for, to the last frame; only the mouth, which pictures are not judged by, is another."""
    count = seconds * FPS
    rng = np.random.default_rng(0)
    steps = np.convolve(rng.standard_normal(count + 4), np.ones(5) / 5, "valid")
    called = ((steps - steps.min()) / np.ptp(steps)).astype(np.float32)
    reference = np.repeat(texture(1), count, axis=0)
    frames = reference.copy()
    frames[:, MOUTH] = rng.integers(0, 256, (count, int(MOUTH.sum()), 3))
    mouth = MouthTrack(called, np.ones_like(called), np.full_like(called, 0.5), np.full((count, 2), 0.5))
    faces = FaceTrack(np.full_like(called, 0.8), called)
    return Observation(
        frames, reference, called, mouth, ~AROUND_THE_MOUTH, OUTSIDE, "smiling", 0.1, FPS, faces
    )


def pictures(change: Callable[[Frames], Frames], part: slice = slice(None)) -> Change:
    """Frames of a part of the clip are changed."""

    def changed(clip: Observation) -> Observation:
        frames = clip.frames.copy()
        frames[part] = change(frames[part])
        return replace(clip, frames=frames)

    return changed


def opening(change: Callable[[np.ndarray], np.ndarray], part: slice = slice(None)) -> Change:
    """What the meter reads of the lips in a part of the clip is changed."""

    def changed(clip: Observation) -> Observation:
        track = clip.called.copy()
        track[part] = change(track[part])
        return replace(clip, mouth=replace(clip.mouth, opening=track))

    return changed


def landmarks(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """What the networks for faces read of the lips is changed."""
    return lambda clip: replace(clip, faces=FaceTrack(np.full_like(clip.called, 0.8), change(clip.called)))


def same(clip: Observation) -> Observation:
    return clip


def both(first: Change, second: Change) -> Change:
    return lambda clip: second(first(clip))


def coded(change: Callable[[Frames], Frames], part: slice = slice(None)) -> Change:
    """A part of the true frames is changed, mouth and all."""
    return lambda clip: pictures(change, part)(replace(clip, frames=clip.reference))


def swaying(clip: Observation) -> Observation:
    """A head that goes to and fro by a pixel."""
    frames = np.concatenate([shifted(texture(1), k // 2 % 3 - 1, 0) for k in range(len(clip.frames))])
    return replace(clip, frames=frames, reference=frames)


def swaying_a_second_late(clip: Observation) -> Observation:
    moved = swaying(clip)
    return replace(moved, frames=np.roll(moved.frames, FPS, axis=0))


def still_where_it_should_sway(clip: Observation) -> Observation:
    return replace(swaying(clip), frames=clip.reference)


def another_face(frames: Frames) -> Frames:
    return np.broadcast_to(texture(2), frames.shape)


def noisy(strength: float) -> Callable[[Frames], Frames]:
    def made(frames: Frames) -> Frames:
        noise = strength * np.random.default_rng(3).standard_normal(frames.shape)
        return (frames + noise).round().clip(0, 255).astype(np.uint8)

    return made


def alternating(frames: Frames) -> Frames:
    signs = np.resize([10, -10], len(frames))[:, None, None, None]
    return (frames.astype(int) + signs).clip(0, 255).astype(np.uint8)


def fading(frames: Frames) -> Frames:
    lift = np.linspace(0, 30, len(frames))[:, None, None, None]
    return (frames + lift).clip(0, 255).astype(np.uint8)


def of_the_face(change: Callable[[Frames], Frames]) -> Callable[[Frames], Frames]:
    """The wall stays as it is."""
    return lambda frames: np.where(OUTSIDE[..., None], frames, change(frames))


def shut(track: np.ndarray) -> np.ndarray:
    return np.zeros_like(track)


def others(track: np.ndarray) -> np.ndarray:
    return np.random.default_rng(4).permutation(track)


def smile(lift: float, asked: str, at_rest: float = 0.1) -> Change:
    def changed(clip: Observation) -> Observation:
        mouth = replace(clip.mouth, smile=np.full_like(clip.called, lift))
        return replace(clip, mouth=mouth, expression=asked, smile_at_rest=at_rest)

    return changed


def somebody_else_for_a_second(clip: Observation) -> Observation:
    likeness = np.full_like(clip.called, 0.8)
    likeness[40 : 40 + FPS] = 0.2
    return replace(clip, faces=FaceTrack(likeness, clip.called))


def rarely_open(share: int) -> Change:
    return opening(lambda track: np.where(np.arange(len(track)) % share, 0, 0.8).astype(np.float32))


SECOND, MIDDLE = slice(-FPS, None), slice(50, 50 + FPS)
LAST_TEN = slice(-10 * FPS, None)
FIRST_TWO = slice(2 * FPS)
BLURRED = pictures(lambda frames: blurred(frames, 1.5))
BLURRED_AT_THE_END = pictures(lambda frames: blurred(frames, 1.5), LAST_TEN)

# Metric, its variant, clips that pass and clips that do not; a bar of its own where the table shows none.
JUDGED: list[tuple[str, Variant, list[Change], list[Change], Bar | None]] = [
    ("autoencoder_noise", "decoded", [coded(noisy(4))], [coded(noisy(12))], None),
    ("autoencoder_steady", "decoded", [coded(noisy(12))], [coded(noisy(12), slice(-40, None))], None),
    ("lip_correlation", "made", [same], [opening(shut), opening(others)], None),
    ("lip_correlation", "decoded", [same], [opening(others)], None),
    ("lip_correlation", "wrong", [opening(others)], [same], None),
    ("lip_lag", "made", [opening(lambda track: np.roll(track, 1))], [opening(lambda track: np.roll(track, 2))], None),
    ("lip_amplitude", "made", [same], [opening(lambda track: track / 2), opening(lambda track: 2 * track)], None),
    ("lip_tail", "made", [opening(others, MIDDLE)], [opening(shut, slice(-3 * FPS, None))], None),
    ("similarity", "made", [same], [pictures(another_face), BLURRED], None),
    ("similarity_worst", "made", [same], [pictures(another_face), BLURRED], Bar(low=0.85)),
    ("sharpness", "made", [same], [BLURRED], None),
    ("detail", "made", [same], [BLURRED, pictures(noisy(60))], Bar(low=0.7)),
    ("similarity_drift", "made", [pictures(another_face, MIDDLE)], [pictures(another_face, SECOND)], Bar(low=-0.02)),
    ("flicker", "made", [pictures(fading), pictures(of_the_face(alternating))], [pictures(alternating)], None),
    ("colour_drift", "made", [pictures(alternating), pictures(of_the_face(fading))], [pictures(fading)], Bar(high=6)),
    ("silence_opening", "made", [rarely_open(25)], [rarely_open(10)], None),
    ("prompt_told", "made", [smile(0.4, "smiling"), smile(-0.4, "serious"), smile(0.2, "smiling", 0.25)],
     [smile(-0.4, "smiling"), smile(0.4, "serious"), smile(0.2, "smiling", 0.6)], None),
    ("moving_similarity", "made", [swaying, swaying_a_second_late], [pictures(another_face), BLURRED], Bar(low=0.9)),
    ("moving_movement", "made", [swaying, swaying_a_second_late], [still_where_it_should_sway], Bar(low=0.5)),
    ("long_lips", "made", [same], [opening(others)], None),
    ("long_lips_end", "made", [opening(others, slice(0, 60 * FPS))], [opening(shut, slice(-60 * FPS, -30 * FPS))], None),
    ("long_similarity", "made", [same, pictures(another_face, FIRST_TWO)],
     [pictures(another_face, LAST_TEN), both(pictures(another_face, FIRST_TWO), pictures(another_face, LAST_TEN))], None),
    ("long_sharpness", "made", [same, pictures(blurred, FIRST_TWO)],
     [BLURRED_AT_THE_END, both(pictures(blurred, FIRST_TWO), BLURRED_AT_THE_END)], Bar(low=0.7)),
    ("long_drift", "made", [pictures(alternating), pictures(of_the_face(fading))], [pictures(fading)], Bar(high=6)),
    ("face_identity", "made", [same], [somebody_else_for_a_second], None),
    ("face_lips", "made", [same], [landmarks(shut), landmarks(others)], None),
    ("face_lips", "wrong", [landmarks(others)], [same], None),
    ("face_lips_worst", "made", [same], [landmarks(shut), landmarks(others)], None),
    ("face_flicker", "made", [pictures(fading), pictures(of_the_face(alternating))], [pictures(alternating)], None),
    ("face_drift", "made", [pictures(alternating), pictures(of_the_face(fading))], [pictures(fading)], Bar(high=6)),
    ("photograph_lips", "made", [same], [opening(shut), opening(others)], None),
    ("photograph_lips", "wrong", [opening(others)], [same], None),
    ("photograph_likeness", "made", [swaying], [pictures(another_face, MIDDLE)], None),
    ("photograph_noise", "made", [same], [pictures(another_face, MIDDLE)], Bar(low=20)),
    ("photograph_sharpness", "made", [same], [BLURRED], Bar(low=0.7)),
    ("photograph_detail", "made", [same], [BLURRED], Bar(low=0.7)),
    ("photograph_flicker", "made", [pictures(fading), pictures(of_the_face(alternating))], [pictures(alternating)], None),
    ("photograph_drift", "made", [pictures(alternating), pictures(of_the_face(fading))], [pictures(fading)], None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "variant", "good", "bad", "bar"), JUDGED)
def test_a_metric_tells_what_passes_from_what_does_not(
    name: str, variant: Variant, good: list[Change], bad: list[Change], bar: Bar | None
) -> None:
    group, metric = next(
        (group, metric) for group, of in GROUPS.items() for metric in of.metrics if metric.name == name
    )
    clip = perfect(SECONDS.get(group, 20))
    bar = bar or metric.bars[variant]
    for wanted, changes in ((True, good), (False, bad)):
        values = [metric.gather([metric.measure(change(clip))]) for change in changes]
        assert [bar.passes(value) for value in values] == [wanted] * len(values), (str(bar), values)


def test_every_metric_and_every_bar_is_judged() -> None:
    metrics = [metric for group in GROUPS.values() for metric in group.metrics]
    assert {name for name, *_ in JUDGED} == {metric.name for metric in metrics}
    bars = {(metric.name, variant) for metric in metrics for variant in metric.bars}
    assert bars == {(name, variant) for name, variant, _good, _bad, bar in JUDGED if bar is None}
