"""Attention of the video transformer: the one entry to the kernels, and the two layers that use it.

The kernel is diffusers' choice (`dispatch_attention_fn`), so `set_attention_backend("flash")` and its kind
work on the model. Heads wider than kernels take, those of the published audio adapters, are PyTorch's own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

from stableavatar.models.rope import RotaryTable, rotate

# What every kernel takes: SageAttention ends here. The published adapters have 192 (1.3B) and 256 (14B).
WIDEST_HEAD = 128


class KernelProcessor:
    """Runs attention on projected heads, with the kernel that diffusers' `set_attention_backend` chose."""

    def __init__(self) -> None:
        self._attention_backend: Any = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of `[B, N, heads, d]` over `[B, M, heads, d]`, unmasked; returns `[B, N, heads, d]`."""
        wide = query.shape[-1] > WIDEST_HEAD
        backend = AttentionBackendName.NATIVE if wide else self._attention_backend
        return dispatch_attention_fn(query, key, value, backend=backend)


class _Attention(nn.Module, AttentionModuleMixin):
    """What self- and cross-attention share: projections, and RMSNorm of q and k over the whole width."""

    _default_processor_cls = KernelProcessor
    _available_processors: ClassVar = [KernelProcessor]
    _supports_qkv_fusion = False
    processor: KernelProcessor

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width, eps=eps)
        self.norm_k = nn.RMSNorm(width, eps=eps)
        self.processor = KernelProcessor()

    def split_heads(self, x_BND: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` -> `[B, N, heads, D / heads]`."""
        return x_BND.unflatten(-1, (self.heads, -1))


class SelfAttention(_Attention):
    """Self-attention over all tokens of a window, with rotary positions."""

    def forward(self, x_BND: torch.Tensor, table: RotaryTable) -> torch.Tensor:
        query = rotate(self.split_heads(self.norm_q(self.to_q(x_BND))), table)
        key = rotate(self.split_heads(self.norm_k(self.to_k(x_BND))), table)
        value = self.split_heads(self.to_v(x_BND))
        return self.to_out[0](self.processor(query, key, value).flatten(2))


class KeyValue(NamedTuple):
    """Keys and values `[B, M, heads, d]` that a cross-attention attends to."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass
class BlockContext:
    """Keys and values of prompts and portrait in one block; None before they are first made."""

    prompt: KeyValue | None = None
    portrait: KeyValue | None = None


class ContextCache:
    """What a caller keeps between calls of the transformer with the same prompts and the same portrait: every
    block's keys and values of them, and rotary tables. Filled by the first call; never part of the model.
    """

    def __init__(self) -> None:
        self.blocks: list[BlockContext] = []
        self.tables: dict[tuple[int, ...], RotaryTable] = {}
        self._owners: tuple[torch.Tensor, torch.Tensor] | None = None

    def open(self, prompt: torch.Tensor, portrait: torch.Tensor, blocks: int) -> None:
        """Begin a call of a model of so many blocks.

        Raises ValueError where these are not those of the first call, or gradients are on."""
        if torch.is_grad_enabled():
            raise ValueError("kept keys and values cannot be trained through: use torch.no_grad()")
        if self._owners is None:
            self._owners = prompt, portrait
            self.blocks = [BlockContext() for _ in range(blocks)]
        for first, now in zip(self._owners, (prompt, portrait), strict=True):
            if now is not first and not torch.equal(now, first):  # hooks of offloading may hand on copies
                raise ValueError("this context cache belongs to another prompt or portrait: make a new one")


class CrossAttention(_Attention):
    """Cross-attention with one query and up to three sets of keys and values, whose results are added.

    The first set (prompt; in the audio adapter, the video's tokens) is always there. `portrait` and `audio`
    add the two others, under
    the published names: `add_{k,v}_proj` with `norm_added_k`, and `{k,v}_vocal`, which have no norm.
    """

    def __init__(self, width: int, heads: int, eps: float, *, portrait: bool = False, audio: bool = False):
        super().__init__(width, heads, eps)
        if portrait:
            self.add_k_proj = nn.Linear(width, width)
            self.add_v_proj = nn.Linear(width, width)
            self.norm_added_k = nn.RMSNorm(width, eps=eps)
        if audio:
            self.k_vocal = nn.Linear(width, width)
            self.v_vocal = nn.Linear(width, width)

    def context_key_value(self, context_BMD: torch.Tensor) -> KeyValue:
        """Keys and values of the prompt (or, in the adapter, of the video's tokens)."""
        key = self.split_heads(self.norm_k(self.to_k(context_BMD)))
        return KeyValue(key, self.split_heads(self.to_v(context_BMD)))

    def portrait_key_value(self, portrait_BMD: torch.Tensor) -> KeyValue:
        """Keys and values of the portrait's tokens."""
        key = self.split_heads(self.norm_added_k(self.add_k_proj(portrait_BMD)))
        return KeyValue(key, self.split_heads(self.add_v_proj(portrait_BMD)))

    def audio_key_value(self, audio_BFnD: torch.Tensor) -> KeyValue:
        """Keys and values `[B, F, n, heads, d]` of the audio tokens."""
        return KeyValue(
            self.split_heads(self.k_vocal(audio_BFnD)), self.split_heads(self.v_vocal(audio_BFnD))
        )

    def forward(
        self,
        x_BND: torch.Tensor,
        context: KeyValue,
        portrait: KeyValue | None = None,
        audio: KeyValue | None = None,
        *,
        clip_level_audio: bool = False,
    ) -> torch.Tensor:
        """Attend to the sets that are given.

        Args:
            x_BND: tokens `[B, N, D]`, in frame order where `audio` is given.
            audio: keys and values `[B, F, n, heads, d]`: the N/F tokens of a latent frame see that frame's n
                audio tokens, or, with `clip_level_audio`, all tokens see all F·n.
        """
        query = self.split_heads(self.norm_q(self.to_q(x_BND)))  # [B, N, heads, d]
        out = self.processor(query, *context)
        if portrait is not None:
            out = out + self.processor(query, *portrait)
        if audio is not None:
            if clip_level_audio:
                heard = self.processor(query, audio.key.flatten(1, 2), audio.value.flatten(1, 2))
            else:
                frames = audio.key.shape[1]
                per_frame = query.unflatten(1, (frames, -1)).flatten(0, 1)  # [B·F, N/F, heads, d]
                heard = self.processor(per_frame, audio.key.flatten(0, 1), audio.value.flatten(0, 1))
                heard = heard.unflatten(0, (-1, frames)).flatten(1, 2)
            out = out + heard
        return self.to_out[0](out.flatten(2))
