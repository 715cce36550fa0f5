from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableavatar.conditioning.image import (
    picture_tensor,
    portrait_embeddings,
    portrait_pixels,
    reference_condition,
)
from stableavatar.conditioning.speech import Normalisation, WindowSpeech, speech_features
from stableavatar.conditioning.text import encode_prompts
from stableavatar.media.audio import Speech
from stableavatar.models.latents import normalise_latents
from stableavatar.pipeline import AvatarPipeline
from stableavatar.sampling.windows import WindowPlan, plan_windows
from toy import toy_pipeline, toy_speech_encoder, toy_vae


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return toy_pipeline()


def recording(seconds: float, seed: int = 0) -> Speech:
    generator = np.random.default_rng(seed)
    return Speech.from_array(
        generator.standard_normal(round(seconds * 16000)).astype(np.float32) * 0.1, 16000
    )


def window_speech(
    plan: WindowPlan, seconds: float, fps: Fraction = Fraction(25), **more: object
) -> WindowSpeech:
    return WindowSpeech(toy_speech_encoder(), recording(seconds), plan, fps, **more)


class TestText:
    def test_zeros_follow_the_prompt_and_padding_does_not_change_it(self, pipeline: AvatarPipeline) -> None:
        prompts = ["hello", "a much longer prompt"]
        both = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts, 48)
        alone = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts[:1], 48)
        tokens = len("hello") + 1  # bytes and the end
        assert both.shape == (2, 48, 16)
        assert (both[0, tokens:] == 0).all()
        assert (both[0, :tokens] != 0).any(dim=-1).all()
        torch.testing.assert_close(both[:1], alone, atol=1e-6, rtol=0)

    def test_a_long_prompt_is_cut_at_the_text_length(self, pipeline: AvatarPipeline) -> None:
        assert encode_prompts(pipeline.tokenizer, pipeline.text_encoder, ["x" * 500], 48).shape == (1, 48, 16)

    def test_what_is_not_read_of_a_prompt_is_said(
        self, pipeline: AvatarPipeline, caplog: pytest.LogCaptureFixture
    ) -> None:
        kept = "x" * 47  # and the end
        for prompts in ([kept, "short"], [f"{kept} and then", kept, kept + "y" * 100]):
            caplog.clear()
            encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts, 48)
            said = [record.getMessage() for record in caplog.records]
            if prompts[1] == "short":
                assert said == []
        assert [text.partition("not read: ")[2] for text in said] == ["and then", "y" * 80 + "..."]
        assert all(text.startswith("a prompt of ") and "than the 48 that" in text for text in said)

    def test_nothing_is_said_of_what_the_user_did_not_write(
        self, pipeline: AvatarPipeline, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The toy model reads less than its own negative prompt."""
        picture, options = np.zeros((32, 32, 3), np.uint8), {"duration": 0.1, "steps": 1}
        next(pipeline.stream(picture, None, prompt="short", **options))
        assert caplog.text == ""
        next(pipeline.stream(picture, None, prompt="short", negative_prompt="z" * 60, **options))
        assert "not read: zzz" in caplog.text


class TestImage:
    def test_pixels_are_normalised_as_for_clip(self) -> None:
        grey = torch.zeros(3, 50, 40)
        pixels = portrait_pixels(grey, 32)
        expected = [
            (0.5 - 0.48145466) / 0.26862954,
            (0.5 - 0.4578275) / 0.26130258,
            (0.5 - 0.40821073) / 0.27577711,
        ]
        assert pixels.shape == (1, 3, 32, 32)
        assert pixels.mean(dim=(0, 2, 3)).tolist() == pytest.approx(expected, abs=1e-5)

    def test_embeddings_are_all_tokens_before_the_last_block(self, pipeline: AvatarPipeline) -> None:
        picture = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
        embeddings = portrait_embeddings(pipeline.image_encoder, picture)
        assert embeddings.shape == (1, 5, 32)  # 2 x 2 patches and the class token
        seen: list[torch.Tensor] = []
        last = pipeline.image_encoder.encoder.layers[-1]
        hook = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        portrait_embeddings(pipeline.image_encoder, picture)
        hook.remove()
        assert torch.equal(embeddings, seen[0])

    def test_the_reference_is_the_picture_then_grey(self) -> None:
        vae = toy_vae()
        picture = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
        condition = reference_condition(vae, picture, 9)
        assert condition.shape == (1, 20, 3, 4, 6)
        assert (condition[:, :4, 0] == 1).all()
        assert (condition[:, :4, 1:] == 0).all()
        clip = torch.zeros(1, 3, 9, 32, 48)
        clip[0, :, 0] = picture
        with torch.no_grad():
            latents = normalise_latents(vae, vae.encode(clip).latent_dist.mode())
        torch.testing.assert_close(condition[:, 4:], latents)

    def test_pictures_become_tensors(self) -> None:
        picture = np.zeros((2, 3, 3), dtype=np.uint8)
        picture[1, 2] = (255, 0, 51)
        tensor = picture_tensor(picture)
        assert tensor.shape == (3, 2, 3)
        assert tensor[:, 1, 2].tolist() == pytest.approx([1, -1, -0.6])


class TestSpeech:
    @given(
        st.integers(1, 400),
        st.sampled_from([Fraction(20), Fraction(25), Fraction(30), Fraction(30000, 1001)]),
    )
    def test_a_window_hears_its_own_frames(self, frames: int, fps: Fraction) -> None:
        """Fault 1: a window of T frames is given the speech of T frames; fault 7: at exact positions."""
        plan = plan_windows((frames + 2) // 4 + 1, 21, 5)
        speech = WindowSpeech(None, None, plan, fps)  # type: ignore[arg-type]  # positions need neither
        for window in plan.windows:
            first, last = speech.stretch(window)
            assert abs(first - 4 * window.start * 16000 / fps) <= 0.5
            assert abs(last - (4 * window.start + 81) * 16000 / fps) <= 0.5

    def test_upstream_gives_84_frames_and_the_last_window_the_rest(self) -> None:
        plan = plan_windows(47, 21, 10, compat="upstream")
        speech = window_speech(plan, 118400 / 16000)
        lengths = [last - first for first, last in map(speech.stretch, plan.windows)]
        assert lengths == [84 * 640] * 3 + [118400 - 33 * 4 * 640]
        assert window_speech(plan, 2.0).stretch(plan.windows[-1]) == (33 * 4 * 640, (46 * 4 + 1) * 640)

    def test_features_are_computed_once_for_a_window(self) -> None:
        """Fault 8."""
        plan = plan_windows(12, 5, 2)
        speech = window_speech(plan, 2.0)
        calls: list[int] = []
        speech.speech_encoder.register_forward_hook(lambda *_: calls.append(1))
        first = [speech(window) for _step in range(3) for window in plan.windows]
        assert len(calls) == len(plan.windows)
        assert torch.equal(first[0], first[len(plan.windows)])

    def test_features_are_those_of_the_normalised_stretch(self) -> None:
        plan = plan_windows(12, 5, 2)
        speech = window_speech(plan, 2.0)
        window = plan.windows[1]
        samples = recording(2.0).samples(12 * 640, (12 + 17) * 640)
        normal = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        with torch.no_grad():
            expected = speech.speech_encoder(torch.from_numpy(normal)[None]).last_hidden_state
        torch.testing.assert_close(speech(window), expected, atol=1e-5, rtol=0)

    def test_silence_follows_where_the_recording_ends(self) -> None:
        plan = plan_windows(2, 5, 2)
        features = window_speech(plan, 0.1)(plan.windows[0])
        padded = np.zeros(17 * 640, dtype=np.float32)
        padded[:1600] = recording(0.1).samples(0, 1600)
        torch.testing.assert_close(features, speech_features(toy_speech_encoder(), padded), atol=1e-5, rtol=0)

    def test_digital_silence_gives_numbers(self) -> None:
        features = speech_features(toy_speech_encoder(), np.zeros(17 * 640, dtype=np.float32))
        assert torch.isfinite(features).all()

    def test_a_recording_without_a_sample_is_silence(self) -> None:
        whole = Speech.from_array(np.zeros(0, np.float32), 16000)
        assert Normalisation.of_recording(whole) == Normalisation(0.0, 0.0)

    def test_loudness_over_the_recording_keeps_a_pause_quiet(self) -> None:
        """Fault 17: normalised window by window, a pause is as loud as speech."""
        samples = np.random.default_rng(0).standard_normal(4 * 16000).astype(np.float32) * 0.1
        samples[2 * 16000 :] *= 0.001
        whole = Speech.from_array(samples, 16000)
        found = Normalisation.of_recording(whole, block=5000)
        assert found.mean == pytest.approx(samples.mean(), abs=1e-6)
        assert found.variance == pytest.approx(samples.var(), rel=1e-4)
        pause = samples[2 * 16000 :]
        assert found.normalise(pause).std() < 0.01
        assert Normalisation.of(pause).normalise(pause).std() > 0.3
        plan = plan_windows(24, 5, 2)
        by_window, by_recording = (
            WindowSpeech(toy_speech_encoder(), whole, plan, Fraction(25), normalisation=how)(plan.windows[-1])
            for how in ("window", "recording")
        )
        assert not torch.allclose(by_window, by_recording, atol=1e-3)
