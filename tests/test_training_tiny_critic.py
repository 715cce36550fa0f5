"""The critic of the embedded autoencoder's decoder, at sizes that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stableavatar.training.tiny import autoencoder
from stableavatar.training.tiny.autoencoder import AutoencoderTrainer
from stableavatar.training.tiny.autoencoder_batches import Batches
from stableavatar.training.tiny.autoencoder_settings import AutoencoderSettings
from stableavatar.training.tiny.critic import Critic, adversarial_loss, critic_loss
from stableavatar.training.tiny.pictures import PictureClips

Change = Callable[[torch.Tensor], torch.Tensor]


def blurred(clips: torch.Tensor) -> torch.Tensor:
    return F.avg_pool3d(F.pad(clips, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)


def flickering(clips: torch.Tensor) -> torch.Tensor:
    """Every picture is one that is also true: only the way from one to the next is not."""
    signs = torch.tensor([1.0, -1.0] * clips.shape[2])[: clips.shape[2]].view(1, 1, -1, 1, 1)
    return clips + 0.1 * signs


def true_clips(seed: int) -> torch.Tensor:
    """Grain of an unknown brightness that stands still, [4, 3, 4, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    grain = 0.4 * torch.randn(4, 3, 1, 32, 32, generator=generator)
    return (grain + torch.rand(4, 1, 1, 1, 1, generator=generator) - 0.5).expand(-1, -1, 4, -1, -1)


@pytest.mark.parametrize("change", [blurred, flickering])
def test_it_learns_what_made_frames_give_away(change: Change) -> None:
    torch.manual_seed(0)
    critic = Critic(width=8)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=4e-3, betas=(0.5, 0.99))
    for seed in range(60):
        true = true_clips(seed)
        optimizer.zero_grad()
        critic_loss(critic, change(true), true).backward()
        optimizer.step()
    with torch.no_grad():
        true = true_clips(1_000)
        told = critic(true) > critic(change(true))
    # A clip's first frame has none before it to differ from.
    later = told.unflatten(0, (4, 4))[:, 1:]
    assert later.float().mean() > 0.9


def test_the_decoder_is_pulled_by_its_share_and_the_critic_left_alone() -> None:
    torch.manual_seed(0)
    critic, true = Critic(width=8), true_clips(0)
    made = blurred(true).requires_grad_()
    reconstruction = (made - true).abs().mean()
    (rest,) = torch.autograd.grad(reconstruction, made, retain_graph=True)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    adversarial_loss(critic, made, true, reconstruction, share=0.5).backward()
    assert made.grad is not None
    torch.testing.assert_close(made.grad.norm(), 0.5 * rest.norm(), rtol=1e-3, atol=0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert critic.training


def test_the_decoder_comes_to_pass_for_true() -> None:
    torch.manual_seed(0)
    critic, true = Critic(width=8), true_clips(0)
    made = blurred(true).requires_grad_()
    (gradient,) = torch.autograd.grad(
        adversarial_loss(critic, made, true, (made - true).abs().mean(), share=1.0), made
    )
    with torch.no_grad():
        before, after = critic(made).mean(), critic(made - 100 * gradient).mean()
    assert after > before


def trainer(out: Path, **changes: float) -> AutoencoderTrainer:
    settings = AutoencoderSettings(
        base_channels=8,
        latent_channels=16,
        frames_a_step=10,
        clip_lengths=(5,),
        clip_weights=(1.0,),
        image_steps=0,
        whole_frames=0.0,
        warmup_steps=1,
        processes=1,
        **changes,  # type: ignore[arg-type]
    )
    begun = AutoencoderTrainer(settings, Batches(settings, PictureClips([]), None, frame_size=64), out)
    begun.freeze_encoder()
    return begun


def weights(of: AutoencoderTrainer) -> torch.Tensor:
    return torch.cat([value.flatten() for value in of.average.state_dict().values()])


def test_a_resumed_training_goes_on_with_its_critic(tmp_path: Path) -> None:
    first = trainer(tmp_path, critic_share=0.5, critic_start=0)
    first.train_step()
    first.save()
    first.train_step()
    second = trainer(tmp_path, critic_share=0.5, critic_start=0)
    second.load()
    second.train_step()
    assert first.critic is not None
    assert second.critic is not None
    torch.testing.assert_close(weights(second), weights(first))
    for name, value in first.critic.state_dict().items():
        torch.testing.assert_close(second.critic.state_dict()[name], value)


def test_a_critic_may_come_to_a_training_that_had_none(tmp_path: Path) -> None:
    """It learns alone at first, as one that was there from the start."""
    before = trainer(tmp_path)
    assert before.train_step()["critic"] == 0
    before.save()
    later = trainer(tmp_path, critic_share=0.5, critic_start=1)
    later.load()
    assert later.train_step()["critic"] > 0
    before.train_step()
    torch.testing.assert_close(weights(later), weights(before))
    later.train_step()
    before.train_step()
    assert not torch.equal(weights(later), weights(before))


def test_a_gradient_that_is_no_number_leaves_both_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = trainer(tmp_path, critic_share=0.5, critic_start=0)
    monkeypatch.setattr(autoencoder, "critic_loss", lambda *given: critic_loss(*given) * float("nan"))
    before = weights(judged)
    judged.train_step()
    assert torch.equal(weights(judged), before)
    assert judged.critic is not None
    assert all(parameter.isfinite().all() for parameter in judged.critic.parameters())
    assert judged.critic_steps == 0


def test_the_critic_is_heeded_from_its_start_on(tmp_path: Path) -> None:
    """Till then it learns alone, and the decoder learns what it learns without one."""
    alone, judged = trainer(tmp_path), trainer(tmp_path, critic_share=0.5, critic_start=1)
    assert judged.critic is not None
    before = judged.critic.layers[0].weight.clone()
    alone.train_step()
    judged.train_step()
    torch.testing.assert_close(weights(judged), weights(alone))
    assert not torch.equal(judged.critic.layers[0].weight, before)
    alone.train_step()
    judged.train_step()
    assert not torch.equal(weights(judged), weights(alone))
