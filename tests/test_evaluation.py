"""Every metric with its controls: truths pass the bars; blurred, shifted, still and shuffled clips miss."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from puppet_frames import blurred, still, talking_photograph
from stableavatar.data.puppets import (
    EVALUATION_SEED,
    EXPRESSIONS,
    Identity,
    PuppetClip,
    articulate,
    make_clip,
    make_motion,
    render_frames,
)
from stableavatar.data.puppets.recordings import EVALUATION_RECORDINGS, evaluation_recording
from stableavatar.errors import InputError
from stableavatar.evaluation import cases, tiny
from stableavatar.evaluation.cases import Plan
from stableavatar.evaluation.embedded import Evaluation, Part, Person
from stableavatar.evaluation.faces import FaceReader
from stableavatar.evaluation.identity import (
    detail_agreement,
    sharpness_ratio,
    steadied_similarity,
    worst_second,
)
from stableavatar.evaluation.lips import lip_score, openness, tail_difference
from stableavatar.evaluation.meter import MouthMeter
from stableavatar.evaluation.movement import movement, nearest_similarity
from stableavatar.evaluation.observation import Bar, FaceTrack, Frames, MouthTrack, Observation
from stableavatar.evaluation.pictures import sharpness, shifted, signal_to_noise, structural_similarity
from stableavatar.evaluation.reconstruction import clip_signal_to_noise, end_against_start
from stableavatar.evaluation.regions import photograph_regions, puppet_regions
from stableavatar.evaluation.registry import GROUPS, find_metric
from stableavatar.evaluation.scores import COLUMNS, Scores, markdown_table
from stableavatar.evaluation.steadiness import colour_drift, flicker
from toy import toy_folder

SMALL = Plan(
    puppets=2, seconds=3.0, autoencoder_frames=77, wrong=2, silence=1, silence_seconds=1.0,
    prompts=1, prompt_seconds=1.8, moving=2, moving_seconds=2.0, photograph_seconds=3.0, long=1,
    long_seconds=24.0,
)  # fmt: skip


# Lips.


def test_lip_score_finds_lag_and_amplitude(clip: PuppetClip) -> None:
    called = clip.articulation.opening
    late = np.roll(called, 1) * np.float32(0.5)
    score = lip_score(late[2:], called[2:])
    assert score.lag == 1
    assert score.correlation > 0.999
    assert score.amplitude == pytest.approx(0.5, abs=0.02)
    assert lip_score(called, called).lag == 0
    assert lip_score(np.roll(called, -2)[:-2], called[:-2]).lag == -2


def test_lip_score_of_still_and_shuffled_tracks(clip: PuppetClip) -> None:
    called = clip.articulation.opening
    silent = lip_score(np.full_like(called, 0.3), called)
    assert (silent.correlation, silent.lag, silent.amplitude) == (0.0, 0, pytest.approx(0, abs=1e-6))
    rng = np.random.default_rng(0)
    shuffled = [lip_score(rng.permutation(called), called).correlation for _ in range(20)]
    assert np.median(shuffled) < 0.3
    assert not np.isfinite(lip_score(called, np.zeros_like(called)).amplitude)


def test_lip_score_refuses_tracks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one length"):
        lip_score(np.zeros(20, np.float32), np.zeros(21, np.float32))
    with pytest.raises(ValueError, match="too few"):
        lip_score(np.zeros(4, np.float32), np.zeros(4, np.float32))


def test_tail_difference_sees_lips_that_stop(clip: PuppetClip) -> None:
    called = np.tile(clip.articulation.opening, 3)
    stops = called.copy()
    stops[-75:] = 0.2
    assert tail_difference(called, called, 75) == pytest.approx(0, abs=1e-6)
    assert tail_difference(stops, called, 75) < -0.5
    assert openness(np.r_[np.zeros(90), np.full(10, 0.8)].astype(np.float32)) > 0.5


# Pictures.


def test_structural_similarity_is_the_usual_one(clip: PuppetClip) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    made, true = blurred(clip.frames[:2], 1.0), clip.frames[:2]
    _, expected = metrics.structural_similarity(
        made[1], true[1], channel_axis=-1, full=True, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255,
    )  # fmt: skip
    inner = np.zeros((128, 128), dtype=bool)
    inner[8:-8, 8:-8] = True
    ours = structural_similarity(made, true, inner)
    assert ours[1] == pytest.approx(expected[inner].mean(), abs=2e-4)
    assert structural_similarity(true, true) == pytest.approx(1)


def test_likeness_falls_with_blur_shift_and_another_face(clips: list[PuppetClip]) -> None:
    first, second = clips[0], clips[1]
    where = puppet_regions(first.identity, 128).surroundings
    blurry = blurred(first.frames)
    assert structural_similarity(first.frames, first.frames, where).mean() == pytest.approx(1)
    assert structural_similarity(second.frames, first.frames, where).mean() < 0.5
    assert structural_similarity(blurry, first.frames, where).mean() < 0.9
    assert sharpness_ratio(first.frames, first.frames, where) == pytest.approx(1)
    assert sharpness_ratio(blurry, first.frames, where) < 0.3
    assert sharpness(np.full((1, 16, 16, 3), 80, np.uint8)) == pytest.approx(0, abs=1e-3)


def test_a_moving_head_is_held_against_the_truths_nearest_frame() -> None:
    nods = make_clip(EVALUATION_SEED, 2.0, expression="nodding")
    later = nods.frames[::-1]
    where = puppet_regions(nods.identity, 128).surroundings
    assert nearest_similarity(later, nods.frames, where) == pytest.approx(1)
    order = np.argsort(make_motion(EVALUATION_SEED, nods.articulation, "nodding").nod)
    low, high = nods.frames[order[:4]], nods.frames[order[-4:]]
    twice = (low.astype(np.uint16) + high) // 2  # two heads over each other
    assert nearest_similarity(twice.astype(np.uint8), nods.frames, where) < 0.97
    assert movement(later, where) == pytest.approx(movement(nods.frames, where))
    calm = make_clip(EVALUATION_SEED, 2.0, expression="neutral")
    assert movement(calm.frames, where) < 0.7 * movement(nods.frames, where)
    assert movement(still(nods), where) == 0


def test_settings_are_chosen_on_other_puppets_than_the_evaluations() -> None:
    plan = cases.DEVELOPMENT
    assert plan.seed + plan.puppets <= EVALUATION_SEED
    clips = [cases.talking_case(plan, 1).truth, cases.prompted_case(plan, 1, "smiling")]
    clips += [cases.moving_case(plan, 1), cases.silent_case(plan, 1)]
    assert {clip.seed for clip in clips} == {plan.seed + 1}
    assert clips[2].expression == "shaking the head"
    recordings = [evaluation_recording(index) for index in range(EVALUATION_RECORDINGS)]
    other = cases.talking_case(plan, 1).other
    assert not any(np.array_equal(other[:1000], recording[:1000]) for recording in recordings)
    assert tiny.main(["--development", "--out", "tiny.md"]) == 2
    tasks = Evaluation(plan, lambda frames: frames, TruthfulSpeaker(), cast(MouthMeter, None)).tasks()
    assert not [task for task in tasks if task.kind in ("photograph", "long")]


@pytest.mark.parametrize("blur", [0.6, 2.0])
@pytest.mark.parametrize("pattern", ["chequered", "in blocks"])
def test_a_weave_of_pixels_makes_up_for_sharpness_and_not_for_detail(
    clips: list[PuppetClip], blur: float, pattern: str
) -> None:
    clip = clips[0]
    where = puppet_regions(clip.identity, 128).surroundings
    true = clip.frames[:4]
    blurry = blurred(true, blur)
    signs = (
        np.ones((64, 64)) if pattern == "chequered" else np.random.default_rng(0).choice([-1, 1], (64, 64))
    )
    weave = np.kron(signs, [[1, -1], [-1, 1]])[..., None]

    def woven(strength: float) -> np.ndarray:
        return np.clip(blurry + strength * weave, 0, 255).astype(np.uint8)

    # As strong as makes the sum of all detail the truth's.
    strength = min(np.arange(0.5, 10, 0.5), key=lambda s: abs(sharpness_ratio(woven(s), true, where) - 1))
    assert sharpness_ratio(blurry, true, where) < 0.7
    assert sharpness_ratio(woven(strength), true, where) == pytest.approx(1, abs=0.35)
    assert detail_agreement(true, true, where) == pytest.approx(1)
    assert detail_agreement(woven(strength), true, where) < 0.65
    assert detail_agreement(woven(3 * strength), true, where) < 0.3


def test_steadied_similarity_forgives_sway_and_nothing_else(clips: list[PuppetClip]) -> None:
    portrait = clips[0].portrait[None]
    where = puppet_regions(clips[0].identity, 128).surroundings
    moved = shifted(portrait, 2, -1)
    assert steadied_similarity(moved, portrait, where)[0] == pytest.approx(1)
    assert structural_similarity(moved, portrait, where)[0] < 0.9
    assert steadied_similarity(clips[1].portrait[None], portrait, where)[0] < 0.5


def test_worst_second_is_the_lowest_one() -> None:
    values = np.r_[np.full(25, 0.9), np.full(25, 0.4), np.full(25, 0.8), np.full(5, 0.1)]
    assert worst_second(values, 25) == pytest.approx(0.4)


def test_mask_keeps_mouth_and_eyes_out(clip: PuppetClip) -> None:
    regions = puppet_regions(clip.identity, 128)
    lips = clip.lip_masks > 0
    assert (lips & regions.surroundings).sum() < 0.02 * lips.sum()
    assert 0.6 < regions.surroundings.mean() < 0.95
    talking = clip.frames.copy()
    talking[:, ~regions.surroundings] = 0
    assert signal_to_noise(talking, clip.frames, regions.surroundings).min() == pytest.approx(100)
    assert regions.outside.any()
    assert not (regions.outside & ~regions.surroundings).any()
    assert photograph_regions(128).outside.any()


def test_signal_to_noise_and_its_decay(clip: PuppetClip) -> None:
    rng = np.random.default_rng(1)
    true = clip.frames.astype(np.float32)
    noise = rng.standard_normal(true.shape).astype(np.float32)
    made = (true * 0.8 + 20 + 5 * noise).round().clip(0, 255).astype(np.uint8)
    expected = 10 * np.log10(255**2 / np.square(made[0].astype(float) - clip.frames[0]).mean())
    assert signal_to_noise(made, clip.frames)[0] == pytest.approx(expected)
    assert clip_signal_to_noise(clip.frames, clip.frames) == pytest.approx(100)
    strength = np.linspace(2, 12, len(true))[:, None, None, None]
    decaying = (true + strength * noise).round().clip(0, 255).astype(np.uint8)
    assert end_against_start(decaying, clip.frames, 25) < -5
    assert find_metric("autoencoder_steady").bars["decoded"].passes(end_against_start(made, clip.frames, 25))
    with pytest.raises(ValueError, match="both must be"):
        signal_to_noise(made[:1], clip.frames)
    with pytest.raises(ValueError, match="empty"):
        structural_similarity(made, clip.frames, np.zeros((128, 128), dtype=bool))


def test_flicker_and_drift_are_in_levels(clip: PuppetClip) -> None:
    where = np.ones((128, 128), dtype=bool)
    base = np.full((60, 128, 128, 3), 100, dtype=np.float32)
    noise = np.random.default_rng(2).standard_normal(base.shape).astype(np.float32)
    trembling = (base + 3 * noise).round().astype(np.uint8)
    assert flicker(trembling, where) == pytest.approx(3 * np.sqrt(6), rel=0.03)
    assert flicker(still(clip), where) == 0
    ramp = (base + np.linspace(0, 30, 60, dtype=np.float32)[:, None, None, None]).round().astype(np.uint8)
    assert flicker(ramp, where) < 1.5  # rounding to levels
    assert colour_drift(ramp, where, 25) == pytest.approx(30 * 35 / 59, abs=0.5)
    assert colour_drift(trembling, where, 25) < 0.1
    with pytest.raises(ValueError, match="3 frames"):
        flicker(trembling[:2], where)


# The table.


class TruthfulSpeaker:
    """Says any speech with the puppet whose portrait it is given, as the renderer draws it."""

    def __init__(self, faithful: bool = True) -> None:
        self.faithful = faithful
        self.seeds = {
            make_clip(seed, 0.04).portrait.tobytes(): seed
            for seed in range(EVALUATION_SEED, EVALUATION_SEED + SMALL.puppets)
        }

    def __call__(self, portrait: np.ndarray, samples: np.ndarray, prompt: str, seed: int) -> Frames:
        articulation = articulate(samples)
        if portrait.tobytes() not in self.seeds:
            return talking_photograph(articulation.opening if self.faithful else articulation.opening[::-1])
        if not self.faithful:
            return np.broadcast_to(portrait, (len(articulation), *portrait.shape))
        puppet = self.seeds[portrait.tobytes()]
        expressions = [word for word in EXPRESSIONS if word in prompt]
        motion = make_motion(puppet, articulation, expressions[0] if expressions else "neutral")
        frames = render_frames(Identity.from_seed(puppet), articulation, motion)
        return np.stack([picture for picture, _, _ in frames])


def test_a_truthful_speaker_passes_every_bar(meter: MouthMeter) -> None:
    whole = Evaluation(SMALL, lambda frames: frames, TruthfulSpeaker(), meter).run()
    scores = whole.scores
    # Three seconds of two puppets: by chance a wrong track may come near; that bar is for the full plan.
    assert [line for line in scores.missed() if "wrong" not in line] == []
    lips = find_metric("lip_correlation")
    made = scores.figure("puppets", lips, "made")
    wrong = scores.figure("puppets", lips, "wrong")
    assert made is not None
    assert wrong is not None
    assert made > 0.95
    assert wrong < made - 0.5
    heard = {it: scores.values["photograph", "photograph_lips", it][0] for it in ("made", "wrong")}
    assert heard["wrong"] < heard["made"] - 0.3
    alike = {it: scores.values["puppets", "similarity", it] for it in ("true", "redrawn")}
    assert alike["true"] == pytest.approx([1, 1])
    assert max(alike["redrawn"]) < 0.99  # another sway
    for name, group in GROUPS.items():
        for metric in group.metrics:
            for variant in metric.bars:
                if not metric.name.startswith(("photograph", "face_")):
                    assert scores.figure(name, metric, variant) is not None, (metric.name, variant)
    assert whole.exhibits.puppet is not None
    assert set(whole.exhibits.puppet.rows) == {"truth", "decoded", "generated"}
    assert whole.exhibits.moving is not None
    assert scores.figure("moving", find_metric("moving_similarity"), "made") == pytest.approx(1)
    assert scores.figure("moving", find_metric("moving_movement"), "made") == pytest.approx(1)
    assert scores.figure("moving", find_metric("moving_movement"), "still") == 0
    assert whole.exhibits.photograph is not None


def test_a_bar_without_a_figure_is_not_passed() -> None:
    scores = Scores()
    metric = next(it for it in GROUPS["people"].metrics if "identity" in it.title and it.bars)
    line = next(line for line in scores.unmeasured() if line.startswith(metric.title))
    scores.values["people", metric.name, "made"] = [1.0]
    assert line not in scores.unmeasured()


def test_the_whole_evaluation_misses_what_it_has_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "measure", lambda *_: Part())
    assert tiny.main(["--quick"]) == 0
    assert tiny.main([]) == 1


def test_a_still_picture_and_a_blurring_coder_miss_their_bars(meter: MouthMeter) -> None:
    plan = replace(SMALL, puppets=1, wrong=0, silence=0, prompts=0, moving=0, long=0)
    speaker = TruthfulSpeaker(faithful=False)
    missed = Evaluation(plan, partial(blurred, sigma=8.0), speaker, meter).run().scores.missed()
    assert any(line.startswith("lip correlation: 0") for line in missed)
    assert any(line.startswith("autoencoder: PSNR") for line in missed)
    assert any(line.startswith("photograph: lip correlation") for line in missed)


def observation(value: float) -> Observation:
    count = 20
    frames = np.full((count, 16, 16, 3), 100, dtype=np.uint8)
    track = np.full(count, value, dtype=np.float32)
    where = np.ones((16, 16), dtype=bool)
    mouth = MouthTrack(track, track, track, np.zeros((count, 2), np.float32))
    return Observation(frames, frames, track, mouth, where, where)


def test_scores_judge_the_median_and_show_every_control() -> None:
    scores = Scores()
    for value in (0.0, 0.4, 0.1):
        scores.add("silence", "made", observation(value))
    metric = find_metric("silence_opening")
    assert scores.figure("silence", metric, "made") == pytest.approx(0.1)
    assert scores.figure("silence", metric, "true") is None
    assert markdown_table(scores).splitlines()[0].startswith("| figure | result | true frames |")
    (row,) = scores.rows()
    assert len(row) == len(COLUMNS)
    assert row[1:5] == ["0.10", "-", "-", "-"]
    with pytest.raises(ValueError, match="differ in length"):
        replace(observation(0.0), called=np.zeros(3, np.float32))


def test_bars_have_ends_and_never_pass_what_is_no_number() -> None:
    assert Bar(0.7, 1.2).passes(0.7)
    assert not Bar(0.7, 1.2).passes(1.3)
    assert not Bar(low=0.5).passes(float("nan"))
    assert [str(bar) for bar in (Bar(0.7, 1.2), Bar(low=0.5), Bar(high=0.25))] == [
        "0.7 to 1.2",
        ">= 0.5",
        "<= 0.25",
    ]


def test_the_bars_of_the_specification_are_in_the_registry() -> None:
    def bar(name: str, variant: str) -> Bar:
        return find_metric(name).bars[variant]  # type: ignore[index]

    assert bar("autoencoder_noise", "decoded") == Bar(low=30)
    assert bar("autoencoder_steady", "decoded") == Bar(low=-0.5)
    assert bar("lip_correlation", "made") == Bar(low=0.75)
    assert bar("lip_correlation", "decoded") == Bar(low=0.9)
    assert bar("lip_correlation", "wrong") == Bar(high=0.25)
    assert bar("lip_lag", "made") == Bar(-1, 1)
    assert bar("lip_amplitude", "made") == Bar(0.7, 1.2)
    assert bar("lip_tail", "made") == bar("long_lips_end", "made") == Bar(low=-0.05)
    assert bar("long_lips", "made") == Bar(low=0.75)
    assert bar("silence_opening", "made") == Bar(high=0.15)
    assert bar("similarity", "made") == Bar(low=0.85)
    assert bar("long_similarity", "made") == Bar(low=-0.02)
    assert bar("sharpness", "made") == Bar(low=0.7)
    assert bar("prompt_told", "made") == Bar(low=0.9)
    assert bar("face_identity", "made") == Bar(low=0.5)
    for name in ("face_lips", "photograph_lips"):
        assert bar(name, "made") == Bar(low=0.3)
        assert bar(name, "wrong") == Bar(high=0.15)
    assert bar("face_lips_worst", "made") == Bar(low=0.3)
    assert bar("photograph_likeness", "made") == Bar(low=0.6)
    assert bar("photograph_drift", "made") == Bar(high=6)
    for name in ("flicker", "face_flicker", "photograph_flicker"):
        assert bar(name, "made") == Bar(high=5)
    names = [metric.name for group in GROUPS.values() for metric in group.metrics]
    assert len(names) == len(set(names))
    with pytest.raises(KeyError):
        find_metric("none")


def test_plans_are_checked() -> None:
    with pytest.raises(InputError, match="speech for 1 to 20"):
        replace(SMALL, puppets=21)
    with pytest.raises(InputError, match="4n\\+1"):
        replace(SMALL, autoencoder_frames=78)
    with pytest.raises(InputError, match="cannot be more"):
        replace(SMALL, prompts=3)
    with pytest.raises(InputError, match="cannot be more"):
        replace(SMALL, moving=3)


def test_cases_feed_unseen_voices_and_other_words(clip: PuppetClip) -> None:
    first, second = (cases.talking_case(SMALL, index) for index in range(2))
    assert first.truth.seed == EVALUATION_SEED
    assert len(first.samples) == len(first.other) == 3 * 16_000
    assert len(first.frames) == len(first.called) == 75
    assert lip_score(first.called, cases.called_opening(first.other, 75)).correlation < 0.6
    assert not np.array_equal(first.samples, second.samples)
    own, other = cases.photograph_speech(25.0)
    assert len(own) == len(other) == 25 * 16_000
    assert np.array_equal(own[20 * 16_000 :], own[: 5 * 16_000])  # the readings last 20 s


class AstronautsFace:
    """Stands for the networks: what is told of a frame is whether it differs from the portrait."""

    def read(self, frames: Frames, portrait: np.ndarray) -> FaceTrack:
        differs = np.abs(frames.astype(np.float32) - portrait).mean(axis=(1, 2, 3))
        return FaceTrack(likeness=(1 - differs / 255).astype(np.float32), opening=differs)


def test_photographs_of_any_length_are_animated_and_judged_by_the_worst(meter: MouthMeter) -> None:
    portrait = cases.photograph()[0]
    plan = replace(SMALL, puppets=1, wrong=0, silence=0, prompts=0, moving=0, long=0, photograph_seconds=3.1)
    people = [Person(name, portrait, photograph_regions(cases.SIZE)) for name in ("a", "b")]
    reader = cast(FaceReader, AstronautsFace())
    scores = Evaluation(plan, lambda frames: frames, TruthfulSpeaker(), meter, reader, people).run().scores
    identity = find_metric("face_identity")
    assert len(scores.values["people", "face_identity", "made"]) == 3  # the astronaut's own, and two more
    assert scores.figure("people", identity, "decoded") == pytest.approx(1.0)
    made = scores.figure("people", find_metric("face_lips"), "made")
    assert made is not None
    assert made > 0.9


# The command.


@pytest.mark.usefixtures("meter")
def test_command_runs_a_model_and_fails_on_its_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(
        SMALL,
        puppets=1,
        seconds=1.0,
        autoencoder_frames=25,
        wrong=1,
        silence=0,
        prompts=0,
        moving=0,
        photograph_seconds=1.0,
        long=0,
    )
    monkeypatch.setattr(tiny, "QUICK", small)
    model = toy_folder(tmp_path / "toy")
    document = tmp_path / "tiny.md"
    assert tiny.main(["--quick", "--model", str(model), "--steps", "1", "--out", str(document)]) == 1
    assert "| MISS |" in document.read_text(encoding="utf-8")
    assert (tmp_path / "tiny" / "astronaut.png").exists()
    assert tiny.main(["--quick", "--gate", str(model / "vae")]) == 1
    assert tiny.main(["--quick", "--model", str(model), "--processes", "0"]) == 2
    assert "at least one process" in capsys.readouterr().err
    assert tiny.main(["--quick", "--model", str(tmp_path / "nothing")]) == 2
    assert tiny.main(["--quick", "--gate", str(tmp_path)]) == 2
    assert tiny.main(["--quick", "--gate", str(model / "vae"), "--portrait", "a.png"]) == 2
    said = capsys.readouterr().err
    assert "leave --portrait out" in said
    assert "config.json is missing" in said


@pytest.mark.usefixtures("meter")
def test_processes_share_an_evaluation_and_give_its_figures(tmp_path: Path) -> None:
    plan = replace(
        SMALL,
        seconds=1.0,
        autoencoder_frames=25,
        wrong=1,
        prompts=0,
        moving=1,
        moving_seconds=1.0,
        photograph_seconds=1.0,
        long=0,
    )
    setup = tiny.Setup(plan, str(toy_folder(tmp_path / "toy")), options={"steps": 1})
    alone, shared = tiny.measure(setup), tiny.measure(setup, processes=2)
    assert alone.scores.values.keys() == shared.scores.values.keys()
    for key, values in alone.scores.values.items():
        assert shared.scores.values[key] == pytest.approx(values, abs=1e-3), key
    assert len(shared.scores.values["puppets", "similarity", "made"]) == 2
    assert shared.exhibits.puppet is not None
    assert shared.exhibits.photograph is not None
    with pytest.raises(InputError, match="nothing"):
        tiny.measure(replace(setup, model=str(tmp_path / "nothing")), processes=2)
