"""The objective against a calculation of its own in NumPy (spec 4, "Objective"; spec 5, fault 11)."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stableavatar.errors import InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.objective import (
    ModelInputs,
    ObjectiveSettings,
    StepDraws,
    draw_sigmas,
    draw_step,
    flow_matching_error,
    mask_weight,
    motion_error,
    step_loss,
    training_sigmas,
)

BATCH, FRAMES, SIDE, TOKENS = 3, 3, 4, 18


@pytest.fixture(scope="module")
def model() -> StableAvatarTransformer3DModel:
    torch.manual_seed(0)
    return StableAvatarTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=8,
        text_length=5,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        image_dim=8,
        audio_dim=6,
        audio_layers=1,
        audio_heads=2,
    )


@pytest.fixture(scope="module")
def inputs() -> ModelInputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    grid = (BATCH, FRAMES, SIDE, SIDE)
    return ModelInputs(
        latents=normal(BATCH, 16, FRAMES, SIDE, SIDE),
        condition=normal(BATCH, 20, FRAMES, SIDE, SIDE),
        prompt=normal(BATCH, 5, 8),
        empty_prompt=normal(1, 5, 8),
        portrait=normal(BATCH, 7, 8),
        speech=normal(BATCH, TOKENS, 6),
        face_mask=torch.rand(grid, generator=generator),
        lip_mask=torch.rand(grid, generator=generator),
    )


def draws(mask_draw: float, dropping: bool) -> StepDraws:
    generator = torch.Generator().manual_seed(2)
    none = (False,) * BATCH
    return StepDraws(
        sigma=torch.tensor([0.9, 0.4, 0.1]),
        noise=torch.randn((BATCH, 16, FRAMES, SIDE, SIDE), generator=generator),
        mask_draw=mask_draw,
        clip_level_audio=dropping,
        audio_dropped=(False, True, False) if dropping else none,
        audio_output_dropped=(True, False, False) if dropping else none,
        prompt_dropped=(False, False, True) if dropping else none,
    )


def by_hand(
    velocity: NDArray[np.float64], inputs: ModelInputs, step: StepDraws, mode: str, motion: float
) -> tuple[float, NDArray[np.float64]]:
    """The loss, and its derivative by the velocity, written out element by element."""
    target = (step.noise.double() - inputs.latents.double()).numpy()
    face, lip = (mask.double().numpy()[:, None] for mask in (inputs.face_mask, inputs.lip_mask))
    if mode == "none":
        weight = np.ones_like(face)
    elif mode == "expected":
        weight = 0.4 * (1 + face + lip) + 0.1 * face + 0.5 * lip
    elif step.mask_draw < 0.4:
        weight = 1 + face + lip
    elif step.mask_draw < 0.5:
        weight = face
    else:
        weight = lip
    error = velocity - target
    loss = (1 - motion) * (weight * error**2).sum() / error.size
    slope = (1 - motion) * 2 * weight * error / error.size
    if motion:
        for frame in range(FRAMES - 1):
            step_error = error[:, :, frame + 1] - error[:, :, frame]
            count = error[:, :, 1:].size
            loss += motion * (step_error**2).sum() / count
            slope[:, :, frame + 1] += motion * 2 * step_error / count
            slope[:, :, frame] -= motion * 2 * step_error / count
    return float(loss), slope


CASES = list(
    itertools.product(
        [("none", 0.0), ("drawn", 0.39), ("drawn", 0.4), ("drawn", 0.5), ("expected", 0.7)],
        [0.0, 0.25],
        [False, True],
    )
)


@pytest.mark.parametrize(("mask", "motion", "dropping"), CASES)
def test_loss_and_gradients_equal_a_calculation_by_hand(
    model: StableAvatarTransformer3DModel,
    inputs: ModelInputs,
    mask: tuple[str, float],
    motion: float,
    dropping: bool,
) -> None:
    mode, mask_draw = mask
    step = draws(mask_draw, dropping)
    settings = ObjectiveSettings(mask_loss=mode, motion_ratio=motion)  # type: ignore[arg-type]

    model.zero_grad()
    result = step_loss(model, inputs, step, settings)
    result.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    # The same step, row by row, from the formulae of the specification.
    sigma = step.sigma[:, None, None, None, None]
    rows = []
    for row in range(BATCH):
        speech = inputs.speech[row : row + 1]
        prompt = inputs.prompt[row : row + 1]
        if dropping and row == 1:
            speech = torch.zeros_like(speech)
        if dropping and row == 2:
            prompt = inputs.empty_prompt
        rows.append(
            model(
                ((1 - sigma) * inputs.latents + sigma * step.noise)[row : row + 1],
                inputs.condition[row : row + 1],
                1000 * step.sigma[row : row + 1],
                prompt,
                inputs.portrait[row : row + 1],
                None if dropping and row == 0 else speech,
                clip_level_audio=dropping,
            ).sample
        )
    velocity = torch.cat(rows)
    loss, slope = by_hand(velocity.detach().double().numpy(), inputs, step, mode, motion)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(velocity, parameters, torch.from_numpy(slope).float(), allow_unused=True)

    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert result.per_clip.mean().item() == pytest.approx(loss, rel=1e-5)
    for name, expected in zip(names, gradients, strict=True):
        if expected is None:
            assert name not in ours or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_expected_weight_is_the_mean_over_the_draw() -> None:
    face, lip = torch.rand(2, 1, 2, 3, 3).unbind(0)
    places = (torch.arange(1000) + 0.5) / 1000
    drawn = torch.stack([mask_weight("drawn", float(r), face, lip) for r in places])  # type: ignore[arg-type]
    torch.testing.assert_close(drawn.mean(0), mask_weight("expected", 0.0, face, lip), rtol=1e-4, atol=1e-5)


def test_motion_term_compares_latent_frames_not_channels() -> None:
    target = torch.zeros(1, 4, 3, 2, 2)
    across_channels = torch.arange(4.0).view(1, 4, 1, 1, 1).expand_as(target)
    across_frames = torch.arange(3.0).view(1, 1, 3, 1, 1).expand_as(target)
    assert motion_error(across_channels, target).item() == 0
    assert motion_error(across_frames, target).item() == 1


def test_a_mask_weighs_all_channels_of_its_place() -> None:
    velocity, target = torch.zeros(1, 16, 1, 2, 2), torch.ones(1, 16, 1, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert flow_matching_error(velocity, target, mask).item() == pytest.approx(0.25)


@pytest.mark.parametrize("mode", ["none", "expected"])
def test_latent_frames_that_are_not_judged_do_not_count(inputs: ModelInputs, mode: str) -> None:
    step = draws(0.7, dropping=False)
    velocity = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(4))
    judged = torch.ones(BATCH, FRAMES)
    judged[1, 0] = 0
    settings = ObjectiveSettings(mask_loss=mode)  # type: ignore[arg-type]
    result = step_loss(lambda *_, **__: (velocity,), replace(inputs, judged=judged), step, settings)
    wrong = velocity.clone()
    wrong[1, :, 0] += 100
    again = step_loss(lambda *_, **__: (wrong,), replace(inputs, judged=judged), step, settings)
    assert torch.equal(result.per_clip, again.per_clip)
    exact = velocity.double()
    exact[1, :, 0] = (step.noise - inputs.latents)[1, :, 0].double()
    loss, _ = by_hand(exact.numpy(), inputs, step, mode, 0.0)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)


def test_sigmas_are_the_schedulers_shifted_ones() -> None:
    plain = np.arange(1000, 0, -1) / 1000
    np.testing.assert_allclose(training_sigmas(3.0).numpy(), 3 * plain / (1 + 2 * plain), rtol=1e-6)
    np.testing.assert_allclose(training_sigmas(1.0).numpy(), plain, rtol=1e-6)


def quantiles(settings: ObjectiveSettings) -> NDArray[np.float64]:
    sigmas = draw_sigmas(40_000, settings, training_sigmas(1.0), torch.Generator().manual_seed(3))
    return np.quantile(sigmas.double().numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])


def test_uniform_timesteps_cover_all_sigmas_alike() -> None:
    np.testing.assert_allclose(quantiles(ObjectiveSettings()), [0.05, 0.25, 0.5, 0.75, 0.95], atol=0.01)


def test_logit_normal_timesteps_gather_in_the_middle() -> None:
    settings = ObjectiveSettings(timesteps="logit-normal", logit_mean=0.5, logit_std=0.8)
    normal = np.array([-1.6449, -0.6745, 0.0, 0.6745, 1.6449])
    # Sigmas fall along the schedule, so a place u on it has sigma 1 - u.
    expected = 1 / (1 + np.exp(0.5 + 0.8 * normal[::-1]))
    np.testing.assert_allclose(quantiles(settings), expected, atol=0.01)


def test_mode_timesteps_follow_their_formula() -> None:
    settings = ObjectiveSettings(timesteps="mode", mode_scale=0.8)
    u = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    place = 1 - u - 0.8 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    np.testing.assert_allclose(quantiles(settings), 1 - place, atol=0.012)


def test_draws_have_the_asked_probabilities_and_repeat() -> None:
    settings = ObjectiveSettings(
        audio_dropping=0.1, audio_output_dropping=0.3, clip_level_audio=0.25, prompt_dropping=0.2
    )
    sigmas, shape = training_sigmas(5.0), torch.Size((8, 1, 1, 1, 1))
    many = [draw_step(shape, settings, sigmas, torch.Generator().manual_seed(seed)) for seed in range(1500)]
    share = {
        "audio": np.mean([step.audio_dropped for step in many]),
        "output": np.mean([step.audio_output_dropped for step in many]),
        "prompt": np.mean([step.prompt_dropped for step in many]),
        "clip": np.mean([step.clip_level_audio for step in many]),
        "mask": np.mean([step.mask_draw for step in many]),
    }
    expected = {"audio": 0.1, "output": 0.3, "prompt": 0.2, "clip": 0.25, "mask": 0.5}
    assert share == pytest.approx(expected, abs=0.03)
    assert not any(
        a and b for step in many for a, b in zip(step.audio_dropped, step.audio_output_dropped, strict=True)
    )
    again = draw_step(shape, settings, sigmas, torch.Generator().manual_seed(7))
    assert torch.equal(again.noise, many[7].noise)
    assert torch.equal(again.sigma, many[7].sigma)
    assert again.prompt_dropped == many[7].prompt_dropped


@pytest.mark.parametrize(
    "values",
    [
        {"shift": 0},
        {"timesteps": "normal"},
        {"mask_loss": "lips"},
        {"audio_dropping": 1.5},
        {"audio_dropping": 0.6, "audio_output_dropping": 0.6},
        {"logit_std": 0},
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        ObjectiveSettings(**values)  # type: ignore[arg-type]
