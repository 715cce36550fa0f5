"""A network that tells frames that the autoencoder made from true ones: the critic of its decoder.

A loss of pixels, and one of how much detail there is (`detail.py`), leave open what detail looks like. The
critic learns that from the frames themselves, patch by patch, while the decoder learns to pass for true (a
GAN, as Wan's own autoencoder and others of latent diffusion were trained with).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class Critic(nn.Module):
    """Clips [B, 3, F, H, W] in [-1, 1], sides in fours, to a judgement of each patch, [B*F, 1, H/4, W/4]:
    high for true.

    A patch is about 26 pixels wide. Every frame is seen with how it differs from the one before it, so what
    flickers is told as well as what is smooth. Kernels are held to unit norm (spectral normalisation, Miyato
    et al., arXiv 1802.05957), which is what keeps the two trainings in step unattended.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(6, width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 3 * width, 3, 1, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(3 * width, 1, 3, 1, 1)),
        )

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        changes = F.pad(clips.diff(dim=2), (0, 0, 0, 0, 1, 0))
        judged: torch.Tensor = self.layers(torch.cat([clips, changes], dim=1).transpose(1, 2).flatten(0, 1))
        return judged


def critic_loss(critic: Critic, made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """What the critic learns from: of a true clip and the same one made, it is to say which is which.

    Both [B, 3, F, H, W] in about [-1, 1], sides in fours. The judgements of one place are compared (a
    relativistic loss, Jolicoeur-Martineau, arXiv 1807.00734), so what the place shows, bright or dark, plain
    or hair, tells nothing. `made` is trained by this no more than `true` is.
    """
    with torch.autocast("cpu", torch.bfloat16):
        judged_true, judged_made = critic(torch.cat([true, made.detach()])).float().chunk(2)
    return F.softplus(judged_made - judged_true).mean()


def adversarial_loss(
    critic: Critic, made: torch.Tensor, true: torch.Tensor, reconstruction: torch.Tensor, share: float
) -> torch.Tensor:
    """What the decoder learns from: `made` is to be judged the truer of the two, both as in
    :func:`critic_loss`. The critic learns nothing.

    It is scaled so that its gradient by the pixels of `made` has `share` of the norm that the gradient of
    `reconstruction`, the other losses of `made`, has there: whatever the critic has come to, the decoder
    cannot leave the truth for it.
    """
    # Spectral normalisation goes on with every pass in training; these two are judged by the same kernels.
    critic.requires_grad_(False).eval()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            judged_true = critic(true).float()
        judged_made = critic(made).float()
    critic.requires_grad_(True).train()
    loss = F.softplus(judged_true - judged_made).mean()
    first, second = (
        torch.autograd.grad(part, made, retain_graph=True)[0].norm() for part in (reconstruction, loss)
    )
    return loss * (share * first / second.clamp_min(1e-12))
