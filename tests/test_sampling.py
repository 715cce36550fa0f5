import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from stableavatar.errors import InputError
from stableavatar.sampling.denoiser import Conditions, Denoiser, Schedule
from stableavatar.sampling.guidance import Branch, audio_native, three_branch
from stableavatar.sampling.noise import GivenNoise, PositionalNoise
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.windows import (
    Window,
    WindowPlan,
    latent_frames_for,
    overlap_ramp,
    plan_windows,
)
from toy import toy_pipeline, toy_transformer

plans = st.tuples(st.integers(1, 60), st.integers(3, 21)).flatmap(
    lambda lf: st.builds(plan_windows, st.just(lf[0]), st.just(lf[1]), st.integers(2, lf[1] - 1))
)


class TestPlan:
    @pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (81, 21), (84, 22)])
    def test_frames_are_rounded_up_to_latents(self, frames: int, latents: int) -> None:
        assert latent_frames_for(frames) == latents == math.ceil((frames - 1) / 4) + 1

    @given(plans)
    def test_every_window_is_full_and_the_video_is_covered(self, plan: WindowPlan) -> None:
        covered = 0
        for window in plan.windows:
            assert window.length == plan.window_latents
            assert 0 <= window.start <= window.write_start
            if window.index:
                before = plan.windows[window.index - 1]
                assert window.write_start == before.stop - plan.overlap
                assert window.start > before.start
                assert window.stop > before.stop
            else:
                assert window.write_start == 0
            covered = window.stop
        assert covered == plan.latent_frames

    def test_the_last_window_is_moved_back(self) -> None:
        plan = plan_windows(40, 21, 5)
        assert plan.windows == (Window(0, 0, 21, 0), Window(1, 16, 37, 16), Window(2, 19, 40, 32))

    def test_no_window_too_many(self) -> None:
        assert len(plan_windows(21, 21, 5).windows) == 1
        assert len(plan_windows(37, 21, 5).windows) == 2
        assert len(plan_windows(38, 21, 5).windows) == 3

    def test_upstream_plans_a_short_last_window(self) -> None:
        plan = plan_windows(47, 21, 10, compat="upstream")
        assert [(w.start, w.stop) for w in plan.windows] == [(0, 21), (11, 32), (22, 43), (33, 47)]

    @given(
        st.integers(3, 21).flatmap(lambda f: st.tuples(st.just(f), st.integers(2, f - 1))), st.integers(1, 60)
    )
    def test_upstream_tails_are_longer_than_the_overlap(self, sizes: tuple[int, int], more: int) -> None:
        plan = plan_windows(sizes[0] + more, *sizes, compat="upstream")
        assert plan.windows[-1].length > plan.overlap
        assert plan.windows[-1].stop == plan.latent_frames

    def test_upstream_refuses_what_fits_one_window(self) -> None:
        with pytest.raises(InputError, match="longer speech"):
            plan_windows(21, 21, 5, compat="upstream")

    @pytest.mark.parametrize("overlap", [1, 21, 30])
    def test_an_overlap_that_does_not_fit(self, overlap: int) -> None:
        with pytest.raises(InputError, match="choose 2 to 20"):
            plan_windows(50, 21, overlap)

    def test_ramps(self) -> None:
        assert overlap_ramp(5, "uniform").tolist() == [0, 0.25, 0.5, 0.75, 1]
        log = [math.log(1 + (math.e - 1) * j / 4) for j in range(5)]
        assert overlap_ramp(5, "log").tolist() == pytest.approx(log)


class TestNoise:
    def test_it_depends_on_seed_and_position_alone(self) -> None:
        noise = PositionalNoise(7, 2, 3, 3)
        long, short = noise.frames(0, 12), noise.frames(4, 6)
        assert torch.equal(long[:, 4:6], short)
        assert not torch.equal(PositionalNoise(8, 2, 3, 3).frames(4, 6), short)
        assert not torch.equal(long[:, 0], long[:, 1])

    def test_it_is_standard_normal(self) -> None:
        noise = PositionalNoise(0, 16, 16, 16).frames(0, 30)
        assert abs(noise.mean()) < 0.01
        assert abs(noise.std() - 1) < 0.01
        flat = noise.transpose(0, 1).flatten(1)
        correlation = torch.corrcoef(flat) - torch.eye(30)
        assert correlation.abs().max() < 0.08

    def test_given_noise_that_is_too_short(self) -> None:
        with pytest.raises(ValueError, match="5 latent frames, 6"):
            GivenNoise(torch.zeros(2, 5, 3, 3)).frames(2, 6)


def numbers(*values: float) -> dict[Branch, torch.Tensor]:
    branches = (Branch.NEITHER, Branch.AUDIO, Branch.PROMPT, Branch.BOTH)
    return {branch: torch.tensor(value) for branch, value in zip(branches, values, strict=True)}


class TestGuidance:
    scales = st.sampled_from([0.0, 0.5, 1.0, 3.0, 5.0])

    @given(scales, scales)
    def test_three_branches_and_what_is_dropped(self, text: float, audio: float) -> None:
        u, a, p, f = 0.3, -1.2, 0.7, 2.0
        rule = three_branch(text, audio)
        values = {b: v for b, v in numbers(u, a, p, f).items() if b in rule.branches}
        assert rule.combine(values).item() == pytest.approx(u + audio * (a - u) + text * (f - a), abs=1e-5)
        weights = {Branch.NEITHER: 1 - audio, Branch.AUDIO: audio - text, Branch.BOTH: text}
        assert set(rule.branches) == {branch for branch, weight in weights.items() if weight != 0}

    @given(scales)
    def test_without_audio(self, text: float) -> None:
        rule = three_branch(text, 5.0, has_audio=False)
        assert not any(branch.audio for branch in rule.branches)
        assert rule.combine(numbers(0.3, 9, 0.7, 9)).item() == pytest.approx(0.3 + text * 0.4)

    @given(scales, scales)
    def test_audio_native(self, text: float, audio: float) -> None:
        rule = audio_native(text, audio)
        values = {b: v for b, v in numbers(9.0, -1.2, 0.7, 2.0).items() if b in rule.branches}
        expected = (1 + text + audio) * 2.0 - text * -1.2 - audio * 0.7
        assert rule.combine(values).item() == pytest.approx(expected, abs=1e-5)
        assert (Branch.AUDIO in rule.branches) == (text != 0)
        assert (Branch.PROMPT in rule.branches) == (audio != 0)

    def test_audio_native_without_audio(self) -> None:
        rule = audio_native(2.0, 3.0, has_audio=False)
        assert rule.combine(numbers(0.3, 9, 0.7, 9)).item() == pytest.approx(3 * 0.7 - 2 * 0.3)


class TestSchedule:
    def test_sigmas_are_the_schedulers_own(self) -> None:
        schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=5.0), 50)
        assert len(schedule) == 50
        assert schedule.sigmas[0] == 1
        assert schedule.sigmas[-2].item() == pytest.approx(0.0244, abs=1e-4)  # shifted twice
        assert schedule.sigmas[-1] == 0

    @pytest.mark.parametrize(
        ("scheduler", "what"),
        [
            (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "UniPC"),
            (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeun"),
            (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
            (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        ],
    )
    def test_what_is_not_followed_is_refused(self, scheduler: SchedulerMixin, what: str) -> None:
        with pytest.raises(InputError, match=f"{what}.* is not followed here"):
            Schedule.from_scheduler(scheduler, 4)
        pipeline = toy_pipeline()
        pipeline.scheduler = scheduler
        with pytest.raises(InputError, match="is not followed here"):  # and before any work
            pipeline.stream(np.zeros((32, 32, 3), np.uint8), None, duration=0.2)

    def test_euler_steps_to_the_clean_video(self) -> None:
        schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=5.0), 7)
        clean, noise = torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        latents = noise
        for step in range(7):
            latents = schedule.euler_step(latents, noise - clean, step)
        torch.testing.assert_close(latents, clean, atol=1e-5, rtol=0)


class TestDenoiser:
    def denoiser(self, **changes: object) -> Denoiser:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        conditions = Conditions(draw(1, 48, 16), draw(1, 48, 16), draw(1, 5, 32), draw(1, 20, 5, 4, 4))
        features = draw(1, 20, 24)
        arguments = {
            "transformer": toy_transformer(),
            "schedule": Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=5.0), 3),
            "guidance": three_branch(3.0, 5.0),
            "conditions": conditions,
            "speech": lambda _window: features,
            "window_latents": 5,
        }
        return Denoiser(**{**arguments, **changes})

    def test_branches_get_their_prompt_and_audio(self) -> None:
        denoiser = self.denoiser()
        cell, latents = Cell(Window(0, 0, 5, 0), 1), PositionalNoise(0, 16, 4, 4).frames(0, 5)
        with torch.no_grad():
            ((u, a, f),) = denoiser.predict_branches([cell], [latents])
            shared = {
                "hidden_states": latents[None],
                "condition": denoiser.conditions.reference,
                "timestep": denoiser.schedule.timesteps[1:2],
                "encoder_hidden_states_image": denoiser.conditions.portrait,
            }
            features = denoiser.speech(cell.window)
            negative, prompt = denoiser.conditions.negative_prompt, denoiser.conditions.prompt
            model = denoiser.transformer
            for ours, text, speech in ((u, negative, None), (a, negative, features), (f, prompt, features)):
                alone = model(**shared, encoder_hidden_states=text, speech_features=speech).sample[0]
                torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)
            (guided,) = denoiser.predict([cell], [latents])
        torch.testing.assert_close(guided, u + 5 * (a - u) + 3 * (f - a))

    def test_no_audio_at_the_input_or_at_the_output_of_the_adapter(self) -> None:
        cell, latents = Cell(Window(0, 0, 5, 0), 0), PositionalNoise(0, 16, 4, 4).frames(0, 5)
        (output,) = self.denoiser()([cell], [latents])
        (at_input,) = self.denoiser(no_audio="input")([cell], [latents])
        assert not torch.allclose(output, at_input, atol=1e-3)
        unguided = [
            self.denoiser(no_audio=where, guidance=three_branch(1, 1))([cell], [latents])[0]
            for where in ("input", "output")
        ]
        assert torch.equal(*unguided)

    @pytest.mark.parametrize("no_audio", ["output", "input"])
    @pytest.mark.parametrize("lengths", [(20, 20, 20), (20, 21, 20)])
    def test_several_cells_at_once_are_each_on_its_own(self, no_audio: str, lengths: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(6)
        heard = [torch.randn(1, length, 24, generator=generator) for length in lengths]
        denoiser = self.denoiser(no_audio=no_audio, speech=lambda window: heard[window.index])
        cells = [Cell(Window(index, 3 * index, 3 * index + 5, 3 * index), 2 - index) for index in range(3)]
        latents = [PositionalNoise(index, 16, 4, 4).frames(0, 5) for index in range(3)]
        together = denoiser(cells, latents)
        for cell, before, after in zip(cells, latents, together, strict=True):
            (alone,) = denoiser([cell], [before])
            torch.testing.assert_close(after, alone, atol=1e-5, rtol=0)
