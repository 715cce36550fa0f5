"""The audio-driven Wan video transformer (paper section 3; spec 1, "Transformer, one call").

Parameter names are those of diffusers' `WanTransformer3DModel`; what hears the speech keeps its published
names (`vocal_projector`, `k_vocal`, `v_vocal`). The model knows nothing of devices, files, processes, windows
or guidance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from stableavatar.models.attention import BlockContext, ContextCache, CrossAttention, KeyValue, SelfAttention
from stableavatar.models.audio_adapter import AudioAdapter
from stableavatar.models.rope import RotaryTable, float64_device, rotary_table


def timestep_features(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """`[cos, sin]` of t·10000^(-k/(channels/2)), angles in float64: `[B]` -> float32 `[B, channels]`."""
    half = channels // 2
    device = float64_device(timestep.device)
    exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    angle = torch.outer(timestep.to(device).double(), 10000.0**-exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float().to(timestep.device)


class PortraitEmbedding(nn.Module):
    """Portrait features to the model's width: LayerNorm, Linear, GELU, Linear, LayerNorm."""

    def __init__(self, image_dim: int, width: int) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(image_dim, eps=1e-5)
        self.ff = FeedForward(image_dim, width, mult=1, activation_fn="gelu")
        self.norm2 = FP32LayerNorm(width, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.ff(self.norm1(x)))


class ConditionEmbedder(nn.Module):
    """Timestep, prompt and portrait to the model's width."""

    def __init__(self, width: int, freq_dim: int, text_dim: int, image_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimestepEmbedding(freq_dim, width)
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, width, act_fn="gelu_tanh")
        self.image_embedder = PortraitEmbedding(image_dim, width)

    def embed_timestep(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """e, float32 `[B, D]`, and e0, float32 `[B, 6, D]`.

        Computed in the dtype of these layers' weights, which loading keeps in float32, autocast or not.
        """
        features = timestep_features(timestep, self.freq_dim)
        with torch.autocast(timestep.device.type, enabled=False):
            embedding = self.time_embedder(features.to(self.time_proj.weight.dtype))
            projected = self.time_proj(nn.functional.silu(embedding)).unflatten(1, (6, -1))
        return embedding.float(), projected.float()


@dataclass
class Residual:
    """What the blocks add to their input, `[B, N, D]`: made by a call that is given one without a value, used
    in the blocks' place by a call that is given one with a value."""

    value: torch.Tensor | None = None


class StableAvatarTransformerBlock(nn.Module):
    """Self-attention; cross-attention to prompt, portrait and audio; feed-forward; modulated by the
    timestep."""

    def __init__(self, width: int, ffn_dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(width, eps=eps, elementwise_affine=False)
        self.attn1 = SelfAttention(width, heads, eps)
        self.norm2 = FP32LayerNorm(width, eps=eps, elementwise_affine=True)
        self.attn2 = CrossAttention(width, heads, eps, portrait=True, audio=True)
        self.norm3 = FP32LayerNorm(width, eps=eps, elementwise_affine=False)
        self.ffn = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(
        self,
        x_BND: torch.Tensor,
        timestep_B6D: torch.Tensor,
        prompt_BLD: torch.Tensor,
        portrait_BPD: torch.Tensor,
        audio_BFnD: torch.Tensor,
        table: RotaryTable,
        clip_level_audio: bool,
        prompt_rows: torch.Tensor | None = None,
        context: BlockContext | None = None,
    ) -> torch.Tensor:
        """`prompt_rows` [B] says which row of the prompts each row of the batch reads; keys and values are
        taken from `context`, or put there."""
        m0, m1, m2, m3, m4, m5 = (self.scale_shift_table.float() + timestep_B6D).chunk(6, dim=1)  # [B, 1, D]
        x, dtype = x_BND, x_BND.dtype

        attended = self.attn1((self.norm1(x.float()) * (1 + m1) + m0).to(dtype), table)
        x = (x.float() + m2 * attended.float()).to(dtype)

        prompt, portrait = (context.prompt, context.portrait) if context is not None else (None, None)
        if prompt is None or portrait is None:
            prompt = self.attn2.context_key_value(prompt_BLD)
            portrait = self.attn2.portrait_key_value(portrait_BPD)
            if context is not None:
                context.prompt, context.portrait = prompt, portrait
        if prompt_rows is not None:
            prompt = KeyValue(*(part[prompt_rows] for part in prompt))
        x = x + self.attn2(
            self.norm2(x),
            prompt,
            KeyValue(*(part.expand(x.shape[0], -1, -1, -1) for part in portrait)),
            self.attn2.audio_key_value(audio_BFnD),
            clip_level_audio=clip_level_audio,
        )

        out = self.ffn((self.norm3(x.float()) * (1 + m4) + m3).to(dtype))
        return (x.float() + m5 * out.float()).to(dtype)


class StableAvatarTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Predicts the flow-matching velocity of a window of video latents from prompt, portrait and speech.

    The defaults are the released 1.3B model. diffusers' context parallelism is not supported: it splits the
    sequence between tokens, and the audio attention goes by whole latent frames. Nor are diffusers' caches
    (`enable_cache`): their state lies on the model, where one window would get another's; the option
    `step_cache` keeps a window's with the window (spec 2, "Step caches").

    Args:
        patch_size: latent frames, rows and columns of a patch.
        num_attention_heads, attention_head_dim: heads and their width; the model's width D is their product.
        in_channels: noisy latents and condition together. out_channels: latents.
        text_dim, text_length: width and (padded) number of prompt embeddings.
        freq_dim: time frequencies. ffn_dim: width of the feed-forward layers. num_layers: blocks.
        image_dim: width of the portrait embeddings.
        audio_dim: width of the speech features. audio_hidden_dim: middle width of a two-layer speech
            projection (14B: 2048), or None for one layer (1.3B).
        audio_layers, audio_heads, audio_ffn_dim: blocks, heads and feed-forward width (default 2·D) of the
            audio adapter.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embedding", "condition_embedder", "norm"]
    _no_split_modules: ClassVar = ["StableAvatarTransformerBlock", "AudioAdapterBlock"]
    _keep_in_fp32_modules: ClassVar = [
        "time_embedder",
        "time_proj",
        "scale_shift_table",
        "norm1",
        "norm2",
        "norm3",
    ]
    _repeated_blocks: ClassVar = ["StableAvatarTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 36,
        out_channels: int = 16,
        text_dim: int = 4096,
        text_length: int = 512,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        eps: float = 1e-6,
        image_dim: int = 1280,
        audio_dim: int = 768,
        audio_hidden_dim: int | None = None,
        audio_layers: int = 2,
        audio_heads: int = 8,
        audio_ffn_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = ConditionEmbedder(width, freq_dim, text_dim, image_dim)
        self.vocal_projector = AudioAdapter(
            width,
            audio_dim=audio_dim,
            hidden_dim=audio_hidden_dim,
            layers=audio_layers,
            heads=audio_heads,
            ffn_dim=audio_ffn_dim or 2 * width,
            eps=eps,
        )
        self.blocks = nn.ModuleList(
            [
                StableAvatarTransformerBlock(width, ffn_dim, num_attention_heads, eps)
                for _ in range(num_layers)
            ]
        )
        self.norm_out = FP32LayerNorm(width, eps=eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor,
        speech_features: torch.Tensor | None = None,
        audio_rows: Sequence[int | None] | None = None,
        *,
        prompt_rows: Sequence[int] | None = None,
        context_cache: ContextCache | None = None,
        residual: Residual | None = None,
        clip_level_audio: bool = False,
        padded_latent_frames: int | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Velocity of noisy latents.

        Args:
            hidden_states: noisy latents `[B, C, F, H, W]`; C is `out_channels`, 16 of the published models.
            condition: mask and encoded reference clip `[B or 1, C + 4, F, H, W]`.
            timestep: `[B]`, 0 to 1000.
            encoder_hidden_states: prompt embeddings `[B or prompts, text_length, text_dim]`, zeros after the
                prompt (attended to, as trained).
            encoder_hidden_states_image: portrait embeddings `[B or 1, P, image_dim]`; P is 257 of the
                published ones.
            speech_features: `[R, S, audio_dim]`, a row a window of speech.
            audio_rows: for each row of the batch, the row of `speech_features` that it hears, or None for no
                audio (zeros in place of the adapter's output; the blocks' audio keys and values still act).
                By default row b hears row b, or nothing where there are no features. Rows that hear the same
                speech share one run of the adapter, on the last such row's latents.
            prompt_rows: for each row of the batch, the row of `encoder_hidden_states` that it reads; by
                default row b reads row b.
            context_cache: keeps keys and values of prompts and portrait, and rotary tables, from call to
                call; for inference with the same tensors every time.
            residual: with a value, the blocks and the audio adapter are left out and it is added in their
                place; without one, it is given what the blocks add.
            clip_level_audio: every token hears the audio of all latent frames.
            padded_latent_frames: pad the token sequence with zero tokens to this many latent frames (compat
                with the published code).

        Returns:
            velocity `[B, C, F, H, W]` in `sample`, or in a tuple if not `return_dict`.

        Raises:
            ValueError: the latent size is not a multiple of the patch size, `audio_rows` or `prompt_rows`
                does not fit, or `context_cache` belongs to another prompt or portrait.
        """
        batch, _, frames, height, width = hidden_states.shape
        pt, ph, pw = self.config.patch_size
        if frames % pt or height % ph or width % pw:
            raise ValueError(
                f"latents of {frames}x{height}x{width} do not divide into patches of {pt}x{ph}x{pw}"
            )
        rows = _audio_rows(audio_rows, speech_features, batch)
        grid = (frames // pt, height // ph, width // pw)
        per_frame = grid[1] * grid[2]
        sequence_frames = max(grid[0], padded_latent_frames or 0)

        x = torch.cat([hidden_states, condition.expand(batch, -1, -1, -1, -1)], dim=1)
        # [B, N, D]; in memory too, or every sum and norm of the blocks would go across the rows.
        x = self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        x = nn.functional.pad(x, (0, 0, 0, (sequence_frames - grid[0]) * per_frame))
        if context_cache is not None:
            context_cache.open(encoder_hidden_states, encoder_hidden_states_image, len(self.blocks))
        chosen = _prompt_rows(prompt_rows, encoder_hidden_states, batch)
        table = self._rotary_table(grid, x.shape[1], hidden_states.device, context_cache)

        embedding, projected = self.condition_embedder.embed_timestep(timestep)
        if residual is not None and residual.value is not None:
            x = x + residual.value.to(x.device)
        else:
            before = x
            prompt, portrait = encoder_hidden_states, encoder_hidden_states_image
            if context_cache is None or context_cache.blocks[-1].prompt is None:
                prompt = self.condition_embedder.text_embedder(encoder_hidden_states)
                portrait = self.condition_embedder.image_embedder(encoder_hidden_states_image)
            audio = self._audio_tokens(x, rows, speech_features, projected, embedding, sequence_frames)
            for index, block in enumerate(self.blocks):
                context = None if context_cache is None else context_cache.blocks[index]
                arguments = (x, projected, prompt, portrait, audio, table, clip_level_audio, chosen, context)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    x = self._gradient_checkpointing_func(block, *arguments)
                else:
                    x = block(*arguments)
            if residual is not None:
                residual.value = x - before

        shift, scale = (self.scale_shift_table.float() + embedding[:, None]).chunk(2, dim=1)
        x = self.proj_out((self.norm_out(x.float()) * (1 + scale) + shift).to(x.dtype))
        x = x[:, : grid[0] * per_frame].unflatten(1, grid).unflatten(-1, (pt, ph, pw, -1))
        sample = x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _rotary_table(
        self,
        grid: tuple[int, int, int],
        tokens: int,
        device: torch.device,
        context_cache: ContextCache | None,
    ) -> RotaryTable:
        tables = {} if context_cache is None else context_cache.tables
        key = (*grid, tokens)
        if key not in tables:
            head_dim = self.config.attention_head_dim
            tables[key] = rotary_table(*grid, head_dim, padded_tokens=tokens, device=device)
        return tables[key]

    def _audio_tokens(
        self,
        x_BND: torch.Tensor,
        rows: Sequence[int | None],
        speech_features: torch.Tensor | None,
        projected_B6D: torch.Tensor,
        embedding_BD: torch.Tensor,
        frames: int,
    ) -> torch.Tensor:
        """`[B, F, n, D]`: the adapter's tokens for rows that hear speech, zeros for the others."""
        heard = sorted({row for row in rows if row is not None})
        if speech_features is None or not heard:
            # One zero token acts like n of them: all keys are equal.
            return x_BND.new_zeros(x_BND.shape[0], frames, 1, x_BND.shape[2])
        listener = [max(b for b, row in enumerate(rows) if row == one) for one in heard]
        tokens = self.vocal_projector(
            speech_features[heard],
            x_BND[listener].unflatten(1, (frames, -1)),
            projected_B6D[listener],
            embedding_BD[listener],
        )
        silence = torch.zeros_like(tokens[0])
        return torch.stack([silence if row is None else tokens[heard.index(row)] for row in rows])


def _prompt_rows(prompt_rows: Sequence[int] | None, prompts: torch.Tensor, batch: int) -> torch.Tensor | None:
    if prompt_rows is None and prompts.shape[0] == batch:
        return None
    rows = list(prompt_rows or [])
    if len(rows) != batch or any(not 0 <= row < prompts.shape[0] for row in rows):
        raise ValueError(
            f"prompt_rows {rows} does not fit {batch} rows of latents and {len(prompts)} prompts"
        )
    return torch.tensor(rows, device=prompts.device)


def _audio_rows(
    audio_rows: Sequence[int | None] | None, speech_features: torch.Tensor | None, batch: int
) -> Sequence[int | None]:
    speech_rows = 0 if speech_features is None else speech_features.shape[0]
    if audio_rows is None:
        audio_rows = list(range(batch)) if speech_rows else [None] * batch
    if len(audio_rows) != batch or any(row is not None and not 0 <= row < speech_rows for row in audio_rows):
        raise ValueError(
            f"audio_rows {list(audio_rows)} does not fit {batch} rows of latents "
            f"and {speech_rows} of speech features"
        )
    return audio_rows
