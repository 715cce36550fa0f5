"""Puppets: the same from the same seed, a mouth that follows the sound, labels that fit, a clean split."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stableavatar.data.clips import FolderClip, TrainingClip
from stableavatar.data.puppets import (
    EVALUATION_SEED,
    EXPRESSIONS,
    Articulation,
    ClipStore,
    Identity,
    Motion,
    PuppetClip,
    Renderer,
    articulate,
    build_store,
    draw_expression,
    iter_clips,
    make_clip,
    make_motion,
    render_frames,
    write_clip,
)
from stableavatar.data.puppets import speech as voices
from stableavatar.data.puppets.__main__ import main
from stableavatar.data.puppets.clip import clip_speech
from stableavatar.data.puppets.recordings import EVALUATION_RECORDINGS, evaluation_recording
from stableavatar.data.puppets.sentences import draw_sentence
from stableavatar.errors import InputError

Float = NDArray[np.float32]


def _track(value: float, frames: int = 1) -> Float:
    return np.full(frames, value, dtype=np.float32)


def _mouth(opening: float = 0.0, width: float = 0.4, rounding: float = 0.0, jaw: float = 0.0) -> Articulation:
    return Articulation(
        _track(opening), _track(width), _track(rounding), _track(jaw), _track(0.0), _track(0.0)
    )


def _vowel(seconds: float, first: float = 700.0, second: float = 1200.0, pitch: float = 120.0) -> Float:
    """A buzz with two formants."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    sound = np.zeros_like(time)
    for harmonic in range(1, 60):
        f = harmonic * pitch
        strength = sum(1 / (1 + ((f - centre) / 90) ** 2) for centre in (first, second, 2600))
        sound += strength / (1 + f / 500) * np.sin(2 * np.pi * f * time + harmonic)
    return (0.3 * sound / np.abs(sound).max()).astype(np.float32)


@pytest.fixture(scope="module")
def clip() -> PuppetClip:
    """An evaluation clip: needs no synthesiser."""
    return make_clip(EVALUATION_SEED + 3, 3.0, size=64)


def test_a_seed_gives_the_same_clip_again_and_another_seed_another(clip: PuppetClip) -> None:
    again = make_clip(EVALUATION_SEED + 3, 3.0, size=64)
    assert np.array_equal(again.frames, clip.frames)
    assert np.array_equal(again.samples, clip.samples)
    assert np.array_equal(again.lip_masks, clip.lip_masks)
    assert again.prompt == clip.prompt
    other = make_clip(EVALUATION_SEED + 4, 1.0, size=64)
    assert np.abs(other.frames[0].astype(int) - clip.frames[0]).mean() > 10


def test_a_clip_has_the_promised_shapes(clip: PuppetClip) -> None:
    assert clip.frames.shape == (75, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.samples.shape == (48_000,)
    assert clip.samples.dtype == np.float32
    assert len(clip.articulation) == 75
    assert clip.articulation.as_array().dtype == np.float32
    assert clip.face_masks.shape == clip.lip_masks.shape == (75, 64, 64)
    assert set(np.unique(clip.lip_masks)) == {0, 255}
    assert clip.portrait.shape == (64, 64, 3)


def test_training_speech_is_repeatable_in_any_order() -> None:
    first = [voices.training_speech(seed, 2.0, "woman") for seed in (1, 2)]
    second = [voices.training_speech(seed, 2.0, "woman") for seed in (2, 1)]
    assert np.array_equal(first[0], second[1])
    assert np.array_equal(first[1], second[0])
    assert not np.array_equal(first[0], first[1])
    assert first[0].shape == (32_000,)
    assert np.abs(first[0]).max() > 0.02


def test_some_training_clips_are_silent_for_a_second() -> None:
    longest = []
    for seed in range(24):
        shut = articulate(voices.training_speech(seed, 4.0)).opening < 0.03
        runs = "".join("s" if quiet else " " for quiet in shut[8:]).split()
        longest.append(max((len(run) for run in runs), default=0) / 25)
    assert 2 <= sum(length >= 0.9 for length in longest) <= 14


def test_evaluation_shares_no_voice_and_no_word_with_training() -> None:
    training = {name for names in voices.TRAINING_VARIANTS.values() for name in names}
    unseen = {name for names in voices.UNSEEN_VARIANTS.values() for name in names}
    assert not training & unseen
    rng = np.random.default_rng(0)
    assert {voices.draw_voice(rng, "man").variant for _ in range(300)} <= training
    assert {voices.draw_voice(rng, "woman", unseen=True).variant for _ in range(100)} <= unseen
    shared = {draw_sentence(rng) for _ in range(500)} & {draw_sentence(rng, unseen=True) for _ in range(500)}
    assert all(sentence.count(", ") == 3 for sentence in shared), "only counting may be heard in both"
    with pytest.raises(InputError, match="evaluation"):
        voices.training_speech(EVALUATION_SEED, 1.0)


def test_evaluation_recordings_ship_and_differ() -> None:
    recordings = [evaluation_recording(index) for index in range(EVALUATION_RECORDINGS)]
    assert {len(samples) for samples in recordings} == {160_000}
    openings = np.stack([articulate(samples).opening for samples in recordings])
    assert (openings.mean(axis=1) > 0.15).all()
    likeness = np.corrcoef(openings) - np.eye(EVALUATION_RECORDINGS)
    assert likeness.max() < 0.6
    with pytest.raises(InputError, match="0 to 19"):
        evaluation_recording(EVALUATION_RECORDINGS)


def test_the_mouth_is_shut_in_silence_and_in_faint_noise() -> None:
    noise = 1e-4 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    for samples in (np.zeros(16_000, dtype=np.float32), noise):
        assert articulate(samples).opening.max() == 0
    vowel = np.concatenate(
        [np.zeros(16_000, dtype=np.float32), _vowel(1.0), np.zeros(16_000, dtype=np.float32)]
    )
    opening = articulate(vowel).opening
    assert opening[30:45].min() > 0.6
    assert opening[:22].max() < 0.02
    assert opening[53:].max() < 0.02


def test_opening_follows_loudness_and_the_vowel() -> None:
    swell = _vowel(2.0) * np.linspace(0.01, 1, 32_000, dtype=np.float32)
    opening = articulate(swell).opening
    assert opening[40] > opening[25] > opening[5]
    quiet = articulate((0.02 * swell).astype(np.float32)).opening
    np.testing.assert_allclose(quiet, opening, atol=0.02)
    words = np.concatenate([_vowel(1.0, 750, 1250), _vowel(1.0, 300, 2300), _vowel(1.0, 320, 800)])
    tracks = articulate(words)
    open_a, spread_i, round_u = 12, 37, 62
    assert tracks.opening[open_a] > tracks.opening[spread_i] + 0.2
    assert tracks.width[spread_i] > tracks.width[round_u] + 0.3
    assert tracks.rounding[round_u] > tracks.rounding[spread_i] + 0.2


def test_hiss_shows_teeth_and_closes_the_jaw() -> None:
    rng = np.random.default_rng(1)
    spectrum = np.fft.rfft(rng.standard_normal(16_000))
    spectrum[:4500] = 0
    hiss = np.fft.irfft(spectrum).astype(np.float32)
    tracks = articulate(np.concatenate([_vowel(1.0), 0.1 * hiss / np.abs(hiss).max(), _vowel(1.0)]))
    assert tracks.teeth[37] > tracks.teeth[12] + 0.3
    assert tracks.opening[37] < 0.3 * tracks.opening[12]


def test_articulation_counts_frames_exactly_and_refuses_nonsense() -> None:
    assert len(articulate(np.zeros(640 * 33, dtype=np.float32))) == 33
    assert len(articulate(np.zeros(16_000 * 10, dtype=np.float32), fps=30)) == 300
    with pytest.raises(InputError, match="finite"):
        articulate(np.full(16_000, np.nan, dtype=np.float32))
    with pytest.raises(InputError, match="one channel"):
        articulate(np.zeros((2, 16_000), dtype=np.float32))


def test_masks_lie_in_each_other_and_the_lips_open(clip: PuppetClip) -> None:
    assert not (clip.lip_masks & ~clip.face_masks).any()
    assert (clip.face_masks > 0).mean() > 0.15
    broad = Renderer(replace(Identity.from_seed(8), mouth_half_width=1.2), 64)
    _, face, lips = broad.draw(_mouth(), Motion.rest(1), 0)
    assert lips.any()
    assert not (lips & ~face).any()
    renderer = Renderer(Identity.from_seed(8), 128)
    shut, _, small = renderer.draw(_mouth(), Motion.rest(1), 0)
    wide, _, large = renderer.draw(_mouth(1.0, jaw=1.0), Motion.rest(1), 0)
    rows = [np.flatnonzero((mask > 0).any(axis=1)) for mask in (small, large)]
    assert rows[1][-1] - rows[0][-1] >= 8
    columns = np.flatnonzero((small > 0).any(axis=0))
    assert 24 <= columns[-1] - columns[0] <= 46
    changed = np.abs(shut.astype(int) - wide).sum(axis=-1) > 30
    assert changed.sum() > 200
    assert not changed[: rows[0][0] - 3].any()


def test_lip_height_follows_the_opening_in_a_clip(clip: PuppetClip) -> None:
    heights = (clip.lip_masks > 0).sum(axis=(1, 2)).astype(float)
    assert np.corrcoef(heights, clip.articulation.opening)[0, 1] > 0.7


def test_the_chin_drops_with_the_jaw() -> None:
    renderer = Renderer(Identity.from_seed(8), 128)
    bottoms = [
        np.flatnonzero((renderer.draw(_mouth(jaw=jaw), Motion.rest(1), 0)[1] > 0).any(axis=1))[-1]
        for jaw in (0.0, 1.0)
    ]
    assert bottoms[1] - bottoms[0] >= 4


@pytest.mark.parametrize("seed", [8, 9, 10])
def test_an_open_mouth_shows_its_upper_teeth_whatever_the_sound(seed: int) -> None:
    who = Identity.from_seed(seed)
    plain, toothless = (
        Renderer(identity, 128).draw(_mouth(opening=0.7, jaw=0.5), Motion.rest(1), 0)
        for identity in (who, replace(who, tooth=who.mouth_dark))
    )
    teeth = np.abs(plain[0].astype(int) - toothless[0]).max(axis=2) > 40
    inside = plain[2] > 0
    rows = np.flatnonzero(inside.any(axis=1))
    assert not (teeth & ~inside).any()
    assert teeth.sum() > 0.08 * inside.sum()
    assert np.flatnonzero(teeth.any(axis=1)).max() < rows.mean(), "the lower half is dark"


def test_the_portrait_is_the_first_frame_with_a_shut_mouth(clip: PuppetClip) -> None:
    renderer = Renderer(clip.identity, 64)
    at_rest, _, _ = renderer.draw(Articulation.rest(1), Motion.rest(1), 0)
    assert np.array_equal(clip.portrait, at_rest)
    if clip.articulation.opening[0] == 0:
        assert np.abs(clip.frames[0].astype(int) - clip.portrait).max() <= 2


def _corner_lift(expression: str, seed: int) -> float:
    """How much higher the mouth's corners lie than its middle, in pixels, at the end of a silent clip."""
    clip = make_clip(seed, 1.2, size=128, expression=expression, samples=np.zeros(19_200, dtype=np.float32))
    mask = clip.lip_masks[-1] > 0
    columns = np.flatnonzero(mask.any(axis=0))
    centre_of = [float(np.flatnonzero(mask[:, column]).mean()) for column in columns]
    edge = max(2, len(columns) // 8)
    middle = np.mean(centre_of[len(columns) // 2 - 3 : len(columns) // 2 + 3])
    return float(middle - 0.5 * (np.mean(centre_of[:edge]) + np.mean(centre_of[-edge:])))


@pytest.mark.parametrize("seed", [11, 12, 17])
def test_smiling_and_serious_differ_at_the_corners_of_the_mouth(seed: int) -> None:
    assert _corner_lift("smiling", seed) > _corner_lift("serious", seed) + 3


def test_every_expression_moves_what_it_says() -> None:
    speech = articulate(clip_speech(EVALUATION_SEED, 3.0, "woman"))
    neutral = make_motion(5, speech)
    moved = {
        "smiling": "smile",
        "serious": "smile",
        "surprised": "wide",
        "nodding": "nod",
        "shaking the head": "turn",
        "tilting the head": "roll",
    }
    assert set(moved) == set(EXPRESSIONS) - {"neutral"}
    for expression, track in moved.items():
        motion = make_motion(5, speech, expression)
        assert np.abs(getattr(motion, track) - getattr(neutral, track)).max() > 0.05, expression
        first = motion[:1]
        assert abs(float(first.smile[0])) < 1e-6
        assert abs(float(first.shift_x[0])) < 1e-6
    assert {draw_expression(seed) for seed in range(200)} == set(EXPRESSIONS)
    with pytest.raises(InputError, match="surprised"):
        make_motion(5, speech, "angry")


def test_prompts_name_the_expression_and_sometimes_the_person() -> None:
    clips = [make_clip(EVALUATION_SEED + i, 0.1, size=32, expression="smiling") for i in range(12)]
    assert all(clip.prompt.endswith(", smiling") for clip in clips)
    assert any("hair" in clip.prompt for clip in clips)
    assert len({clip.prompt for clip in clips}) > 4
    neutral = make_clip(EVALUATION_SEED, 0.1, size=32, expression="neutral").prompt
    assert not any(word in neutral for word in EXPRESSIONS)


def test_heads_go_with_the_speech_and_hardly_with_the_seed() -> None:
    speech, other = (articulate(clip_speech(EVALUATION_SEED + k, 10.0, "woman")) for k in (0, 1))
    for expression, tracks in (
        ("neutral", ("shift_x", "turn", "nod", "roll")),
        ("nodding", ("nod", "shift_y")),
        ("shaking the head", ("turn",)),
    ):
        one, again, elsewhere = (
            make_motion(seed, words, expression) for seed, words in ((5, speech), (50, speech), (5, other))
        )
        for track in tracks:
            moved = getattr(one, track)
            assert np.corrcoef(moved, getattr(again, track))[0, 1] > 0.75, (expression, track)
            assert abs(np.corrcoef(moved, getattr(elsewhere, track))[0, 1]) < 0.5, (expression, track)


def test_a_clip_moved_anew_keeps_its_mouth_and_most_of_its_head() -> None:
    clip = make_clip(EVALUATION_SEED, 2.0, expression="neutral")
    anew, other = (
        make_clip(EVALUATION_SEED, 2.0, expression="neutral", movement=movement)
        for movement in (EVALUATION_SEED + 1, EVALUATION_SEED)
    )
    assert np.array_equal(clip.frames, other.frames)
    assert not np.array_equal(clip.frames, anew.frames)
    assert np.array_equal(clip.portrait, anew.portrait)
    assert np.array_equal(clip.articulation.as_array(), anew.articulation.as_array())
    apart = [
        np.abs(clip.frames - frames.astype(np.float32)).mean() for frames in (anew.frames, clip.portrait)
    ]
    assert apart[0] < 0.6 * apart[1]


def test_heads_sway_modestly_and_eyes_blink() -> None:
    talking = articulate(clip_speech(EVALUATION_SEED, 10.0, "woman"))
    motions = [make_motion(seed, talking) for seed in range(8)]
    shifts = np.stack([np.hypot(motion.shift_x, motion.shift_y) for motion in motions]) * 128
    assert 0.5 < shifts.max() < 8
    assert all(motion.blink.max() == 1 for motion in motions)
    assert all((motion.blink > 0.5).mean() < 0.15 for motion in motions)


@pytest.mark.parametrize("size", [32, 96, 200])
def test_any_size_works(size: int) -> None:
    frames = list(render_frames(Identity.from_seed(2), Articulation.rest(2), Motion.rest(2), size))
    assert len(frames) == 2
    picture, face, lips = frames[1]
    assert picture.shape == (size, size, 3)
    assert face.shape == lips.shape == (size, size)
    reference = Renderer(Identity.from_seed(2), 128).draw(Articulation.rest(1), Motion.rest(1), 0)[1]
    assert (face > 0).mean() == pytest.approx((reference > 0).mean(), abs=0.02)


def test_wrong_sizes_and_tracks_are_refused() -> None:
    with pytest.raises(InputError, match="32"):
        Renderer(Identity.from_seed(0), 16)
    with pytest.raises(InputError, match="3 frames"):
        next(render_frames(Identity.from_seed(0), Articulation.rest(3), Motion.rest(2)))
    with pytest.raises(InputError, match="above 0"):
        make_clip(1, 0.0)


def test_a_blink_shuts_the_eyes_only() -> None:
    renderer = Renderer(Identity.from_seed(8), 128)
    calm = Motion.rest(1)
    shut = renderer.draw(_mouth(), replace(calm, blink=_track(1.0)), 0)[0]
    changed = np.flatnonzero((np.abs(shut.astype(int) - renderer.portrait()).sum(axis=-1) > 20).any(axis=1))
    eye_row = (renderer.identity.centre[1] + renderer.identity.eye_y * renderer.identity.scale) * 128
    assert len(changed) > 3
    assert np.abs(changed - eye_row).max() < 14


def test_a_store_is_resumed_and_reads_back_what_was_rendered(tmp_path: Path) -> None:
    seeds = [EVALUATION_SEED, EVALUATION_SEED + 1]
    build_store(tmp_path, seeds[:1], seconds=0.4, size=48, processes=1)
    marker = tmp_path / f"{seeds[0]:010d}" / "about.json"
    before = marker.stat().st_mtime_ns
    (tmp_path / f".{seeds[1]:010d}.1.partial").mkdir()
    store = build_store(tmp_path, seeds, seconds=0.4, size=48, processes=1)
    assert marker.stat().st_mtime_ns == before
    assert len(store) == 2
    for stored, made in zip(ClipStore(tmp_path), iter_clips(seeds, 0.4, size=48), strict=True):
        assert isinstance(stored.frames, np.memmap)
        assert np.array_equal(stored.frames, made.frames)
        assert np.array_equal(stored.samples, made.samples)
        assert np.array_equal(stored.lip_masks, made.lip_masks)
        assert np.array_equal(stored.face_masks, made.face_masks)
        assert np.array_equal(stored.portrait, made.portrait)
        assert np.array_equal(stored.articulation.as_array(), made.articulation.as_array())
        assert (stored.prompt, stored.expression) == (made.prompt, made.expression)
    with pytest.raises(InputError, match="no clip store"):
        ClipStore(tmp_path / "nowhere")


def test_a_person_acts_every_expression_of_a_store_with_the_same_words_and_movements(tmp_path: Path) -> None:
    arguments = ["store", "--folder", str(tmp_path), "--seed", str(EVALUATION_SEED), "--clips", "1"]
    arguments += ["--seconds", "0.6", "--size", "48", "--processes", "1"]
    assert main([*arguments, "--expressions", "smiling", "shaking the head"]) == 0
    shaking, smiling = ClipStore(tmp_path)
    made = make_clip(EVALUATION_SEED, 0.6, size=48, expression="smiling")
    assert smiling.folder.name == f"{EVALUATION_SEED}-smiling".rjust(18, "0")
    assert (smiling.expression, smiling.prompt) == ("smiling", made.prompt)
    assert (shaking.expression, shaking.folder.name[-17:]) == ("shaking the head", "-shaking-the-head")
    assert np.array_equal(smiling.frames, made.frames)
    assert not np.array_equal(smiling.frames[-1], shaking.frames[-1])
    for same in ("samples", "portrait"):
        assert np.array_equal(getattr(smiling, same), getattr(shaking, same))
    moved = [make_motion(EVALUATION_SEED, made.articulation, name) for name in ("smiling", "serious")]
    for same in ("blink", "gaze_x", "turn", "nod"):
        assert np.array_equal(*(getattr(motion, same) for motion in moved))
    build_store(tmp_path, [EVALUATION_SEED], seconds=0.6, size=48, processes=1)
    drawn = ClipStore(tmp_path)[0]
    assert len({drawn.mark(), smiling.mark(), shaking.mark()}) == 3
    assert drawn.mark() == str(EVALUATION_SEED)


def test_varied_persons_look_otherwise_and_move_alike(tmp_path: Path) -> None:
    seed = max(range(EVALUATION_SEED, EVALUATION_SEED + 8), key=lambda seed: Identity.varied(seed).marks)
    usual, varied = Identity.from_seed(seed), Identity.varied(seed)
    same = ("nose_relief", "lines", "marks", "exposure", "contrast", "warmth")
    assert replace(varied, **{name: getattr(usual, name) for name in same}) == usual
    assert all(getattr(varied, name) != getattr(usual, name) for name in same)
    arguments = [
        "store",
        "--folder",
        str(tmp_path),
        "--seed",
        str(seed),
        "--clips",
        "1",
        "--varied",
    ]
    arguments += ["--seconds", "0.2", "--size", "48", "--processes", "1"]
    assert main(arguments) == 0
    assert main([*arguments, "--expressions", "smiling"]) == 0
    smiling, drawn = ClipStore(tmp_path)
    assert (drawn.mark(), smiling.mark()) == (f"{seed} varied", f"{seed} smiling varied")
    plain = make_clip(seed, 0.2, size=48)
    assert np.array_equal(drawn.frames, make_clip(seed, 0.2, size=48, identity=varied).frames)
    light = {name: getattr(varied, name) for name in ("exposure", "contrast", "warmth")}
    as_bright = make_clip(seed, 0.2, size=48, identity=replace(usual, **light))
    difference = np.abs(drawn.frames.astype(int) - as_bright.frames).max(axis=-1)
    assert difference[plain.face_masks > 0].mean() > 4
    assert difference[:, :4].max() == 0  # but for the light only the face
    assert np.abs(as_bright.frames.astype(int) - plain.frames)[:, :4].mean() > 4
    assert np.array_equal(drawn.samples, plain.samples)
    assert np.array_equal(drawn.lip_masks, plain.lip_masks)


def test_clips_are_written_in_the_layout_the_data_set_reads(tmp_path: Path, clip: PuppetClip) -> None:
    seed = str(EVALUATION_SEED + 3)
    options = ["--clips", "2", "--seconds", "0.4", "--size", "64", "--folder", str(tmp_path)]
    assert main(["dataset", "--seed", seed, *options]) == 0
    folders = (tmp_path / "video_square_path.txt").read_text(encoding="utf-8").split()
    assert [Path(folder).parts[-3:] for folder in folders] == [
        ("square", "speech", "00001"),
        ("square", "speech", "00002"),
    ]
    made = make_clip(int(seed), 0.4, size=64)
    read = FolderClip.open(Path(folders[0]))
    assert (read.length, read.fps, read.size, read.prompt) == (10, 25, (64, 64), made.prompt)
    assert np.array_equal(read.read_frames(2, 3), made.frames[2:5])
    assert np.array_equal(read.read_masks("lip_masks", 0, 10) > 0.5, made.lip_masks > 0)
    assert np.array_equal(read.read_portrait(), made.portrait)
    np.testing.assert_allclose(read.read_speech(0, 10), made.samples, atol=1e-4)
    shutil.rmtree(Path(folders[0]) / "images")
    decoded = FolderClip.open(Path(folders[0])).read_frames(0, 10)
    assert np.abs(decoded.astype(int) - made.frames).mean() < 4
    with pytest.raises(InputError, match="exists already"):
        write_clip(folders[1], clip)


def test_a_stored_clip_is_a_training_clip(tmp_path: Path) -> None:
    made = make_clip(EVALUATION_SEED, 0.4, size=48)
    stored: TrainingClip = build_store(tmp_path, [made.seed], seconds=0.4, size=48, processes=1)[0]
    assert (stored.length, stored.fps, stored.size, stored.prompt) == (10, 25, (48, 48), made.prompt)
    assert np.array_equal(stored.read_frames(3, 4), made.frames[3:7])
    assert np.array_equal(
        stored.read_masks("face_masks", 3, 4), (made.face_masks[3:7] / 255).astype(np.float32)
    )
    assert np.array_equal(stored.read_portrait(), made.portrait)
    assert np.array_equal(stored.read_speech(1, 2), made.samples[640:1920])
    (tmp_path / f"{made.seed:010d}" / "labels.npz").write_bytes(b"PK broken")
    with pytest.raises(InputError, match=r"labels\.npz"):
        stored.read_portrait()


def test_the_preview_command_writes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    sheet = tmp_path / "sheet.png"
    options = ["--rows", "2", "--columns", "3", "--size", "40", "--out", str(sheet)]
    assert main(["preview", "--seed", "0", "--portraits", *options]) == 0
    with Image.open(sheet) as picture:
        assert picture.size == (120, 80)
    assert main(["preview", "--seed", str(EVALUATION_SEED), "--expression", "angry", *options]) == 2
