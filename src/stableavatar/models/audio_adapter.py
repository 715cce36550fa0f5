"""The time-step-aware audio adapter (paper section 3.2; spec 1, "Audio adapter").

Speech features become a few audio tokens for each latent frame, which look at the noisy video and at the
timestep before the blocks of the transformer attend to them.
"""

from collections.abc import Callable

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from stableavatar.models.attention import CrossAttention

SLOT_MARGIN = 4  # tokens by which a slot is widened on both sides


def slot_bounds(speech_tokens: int, latent_frames: int) -> list[tuple[int, int]]:
    """First and last speech token (both count, either may lie outside the speech) of each latent frame's
    slot.

    Args:
        speech_tokens: S, speech features of the window.
        latent_frames: F, for a clip of 4·(F-1)+1 frames.

    Returns:
        F pairs, all of the same length 2·int(2·S/T) + 9.
    """
    tokens_per_frame = speech_tokens / (4 * (latent_frames - 1) + 1)
    half = int(2 * tokens_per_frame)
    bounds = []
    for i in range(1, max(latent_frames, 2)):
        centre = int((tokens_per_frame * (4 * (i - 1) + 1) + tokens_per_frame * (4 * i + 1)) / 2) - 1
        bounds.append((centre - half, centre + half))
    start = bounds[0][0]
    bounds = [(start - 2 * half, start), *bounds][:latent_frames]
    return [(first - SLOT_MARGIN, last + SLOT_MARGIN) for first, last in bounds]


def slot_indices(speech_tokens: int, latent_frames: int) -> torch.Tensor:
    """Which speech token stands at each place of each slot: int64 `[F, n]`, where `speech_tokens` stands for
    a zero token.

    Tokens that lie outside the speech become zeros, all of them placed after the valid ones.
    """
    rows = []
    for first, last in slot_bounds(speech_tokens, latent_frames):
        valid = list(range(max(first, 0), min(last, speech_tokens - 1) + 1))
        rows.append(valid + [speech_tokens] * (last - first + 1 - len(valid)))
    return torch.tensor(rows)


class SpeechProjection(nn.Module):
    """Speech features to the model's width: a linear layer without bias and a LayerNorm, once (1.3B) or twice
    (14B)."""

    def __init__(self, audio_dim: int, hidden_dim: int | None, width: int) -> None:
        super().__init__()
        self.layers = 1 if hidden_dim is None else 2
        if hidden_dim is None:
            self.proj = nn.Linear(audio_dim, width, bias=False)
            self.norm = FP32LayerNorm(width, eps=1e-5)
        else:
            self.proj_1 = nn.Linear(audio_dim, hidden_dim, bias=False)
            self.norm_1 = FP32LayerNorm(hidden_dim, eps=1e-5)
            self.proj_2 = nn.Linear(hidden_dim, width, bias=False)
            self.norm_2 = FP32LayerNorm(width, eps=1e-5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.layers == 1:
            return self.norm(self.proj(features))
        return self.norm_2(self.proj_2(self.norm_1(self.proj_1(features))))


class AudioAdapterBlock(nn.Module):
    """A block of the adapter: like the transformer's, with the video's tokens in the prompt's place and no
    self-attention."""

    def __init__(self, width: int, heads: int, ffn_dim: int, eps: float) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(width, eps=eps, elementwise_affine=False)
        self.norm2 = FP32LayerNorm(width, eps=eps, elementwise_affine=True)
        self.attn2 = CrossAttention(width, heads, eps)
        self.norm3 = FP32LayerNorm(width, eps=eps, elementwise_affine=False)
        self.ffn = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(
        self, h_RFnD: torch.Tensor, video_RFND: torch.Tensor, timestep_R6D: torch.Tensor
    ) -> torch.Tensor:
        modulation = self.scale_shift_table.float() + timestep_R6D
        m0, m1, m2, m3, m4, m5 = (m[:, None, None, :] for m in modulation.unbind(1))
        dtype = h_RFnD.dtype
        rows, frames = h_RFnD.shape[:2]

        h = h_RFnD.float() + m2 * (self.norm1(h_RFnD.float()) * (1 + m1) + m0)
        h = h.to(dtype)
        context = self.attn2.context_key_value(video_RFND.flatten(0, 1))
        seen = self.attn2(self.norm2(h).flatten(0, 1), context)
        h = h + seen.unflatten(0, (rows, frames))
        out = self.ffn((self.norm3(h.float()) * (1 + m4) + m3).to(dtype))
        return (h.float() + m5 * out.float()).to(dtype)


class AudioAdapterHead(nn.Module):
    """The adapter's output projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.final_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_proj(x)


class AudioAdapter(nn.Module):
    """Speech features, the noisy video's tokens and the timestep to audio tokens for each latent frame."""

    _gradient_checkpointing_func: Callable[..., torch.Tensor]  # see `enable_gradient_checkpointing`

    def __init__(
        self,
        width: int,
        *,
        audio_dim: int,
        hidden_dim: int | None,
        layers: int,
        heads: int,
        ffn_dim: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.proj_model = SpeechProjection(audio_dim, hidden_dim, width)
        self.blocks = nn.ModuleList([AudioAdapterBlock(width, heads, ffn_dim, eps) for _ in range(layers)])
        self.norm_out = FP32LayerNorm(width, eps=eps, elementwise_affine=False)
        self.final_head = AudioAdapterHead(width)
        self.final_scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.gradient_checkpointing = False

    def forward(
        self,
        features_RSC: torch.Tensor,
        video_RFND: torch.Tensor,
        timestep_R6D: torch.Tensor,
        embedding_RD: torch.Tensor,
    ) -> torch.Tensor:
        """Audio tokens of the windows.

        Args:
            features_RSC: speech features `[R, S, audio_dim]`, a row a window.
            video_RFND: patch-embedded tokens of the noisy latents `[R, F, H·W/4, D]`.
            timestep_R6D: e0, float32 `[R, 6, D]`; `embedding_RD`: e, float32 `[R, D]`.

        Returns:
            `[R, F, n, D]`, n tokens for each latent frame.
        """
        h = self.proj_model(features_RSC)  # [R, S, D]
        index = slot_indices(h.shape[1], video_RFND.shape[1]).to(h.device)  # [F, n]
        h = torch.nn.functional.pad(h, (0, 0, 0, 1))[:, index]  # [R, F, n, D]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, video_RFND, timestep_R6D)
            else:
                h = block(h, video_RFND, timestep_R6D)
        modulation = self.final_scale_shift_table.float() + embedding_RD[:, None]
        shift, scale = (m[:, None, None, :] for m in modulation.unbind(1))
        return self.final_head((self.norm_out(h.float()) * (1 + scale) + shift).to(h.dtype))
