"""What the shapes of a checkpoint's tensors say about the sizes of its model.

Published weights come without settings, or with a few. All sizes but the number of attention heads can be
read from shapes, so that a model of any size loads without being told. Every function takes tensors under our
names and returns keywords for a constructor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stableavatar.checkpoints.names import AUDIO_PREFIX
from stableavatar.config import SIZES
from stableavatar.errors import CheckpointError

WAN_HEAD_WIDTH = 128
VIT_H_HEAD_WIDTH = 80


class _Shapes:
    """Shapes by name, with errors that name what a file lacks."""

    def __init__(self, state: Mapping[str, torch.Tensor], source: Path | str, what: str) -> None:
        self._state, self._source, self._what = state, source, what

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        tensor = self._state.get(name)
        if tensor is None:
            raise self.error(f"it lacks the tensor {name}")
        if tensor.dim() != dimensions:
            raise self.error(
                f"{name} has the shape {tuple(tensor.shape)}, not one of {dimensions} dimensions"
            )
        return tuple(tensor.shape)

    def layers(self, pattern: str) -> int:
        """Number of layers: one more than the largest number that a name has in the place of ``{}``."""
        numbered = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)") + r"\..+")
        numbers = [int(match[1]) for name in self._state if (match := numbered.fullmatch(name))]
        return max(numbers, default=-1) + 1

    def error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: is not a checkpoint of {self._what}: {why}")


def transformer_settings(
    state: Mapping[str, torch.Tensor], source: Path | str, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keywords of ``StableAvatarTransformer3DModel``.

    Args:
        state: all tensors of the model, ours by name; those of the audio side may be absent.
        source: the file, for errors.
        known: settings that are known otherwise. They win; the heads, which no shape tells, are taken from
            here and are else those of Wan 2.1 (128 wide).

    Raises:
        CheckpointError: tensors that tell a size are missing, or the width is no multiple of the head width.
    """
    shapes = _Shapes(state, source, "the video transformer")
    width, in_channels, *patch_size = shapes.of("patch_embedding.weight", 5)
    embedder = "condition_embedder"
    settings: dict[str, Any] = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "out_channels": shapes.of("proj_out.weight", 2)[0] // math.prod(patch_size),
        "text_dim": shapes.of(f"{embedder}.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shapes.of(f"{embedder}.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shapes.of("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": shapes.layers("blocks.{}"),
        "image_dim": shapes.of(f"{embedder}.image_embedder.norm1.weight", 1)[0],
        **_audio_settings(shapes, width),
        **(known or {}),
    }
    if "num_attention_heads" not in settings:
        head_width = settings.get("attention_head_dim", WAN_HEAD_WIDTH)
        if width % head_width:
            raise shapes.error(
                f"its width {width} is no multiple of {head_width}, the width of a head: it needs a"
                " config.json with num_heads beside it"
            )
        settings["num_attention_heads"] = width // head_width
    heads = int(settings["num_attention_heads"])
    if heads <= 0 or width % heads:
        raise shapes.error(f"its width {width} does not divide into {heads} heads")
    settings.setdefault("attention_head_dim", width // heads)
    return settings


def _audio_settings(shapes: _Shapes, width: int) -> dict[str, Any]:
    projection = f"{AUDIO_PREFIX}proj_model"
    if f"{projection}.proj_1.weight" in shapes:
        hidden, audio_dim = shapes.of(f"{projection}.proj_1.weight", 2)
    elif f"{projection}.proj.weight" in shapes:
        hidden, audio_dim = None, shapes.of(f"{projection}.proj.weight", 2)[1]
    else:
        # A video model without audio: the adapter of the published model of this width.
        published = {
            s.transformer["num_attention_heads"] * WAN_HEAD_WIDTH: s.transformer for s in SIZES.values()
        }
        return {"audio_hidden_dim": published[width]["audio_hidden_dim"]} if width in published else {}
    settings: dict[str, Any] = {
        "audio_dim": audio_dim,
        "audio_hidden_dim": hidden,
        "audio_layers": shapes.layers(f"{AUDIO_PREFIX}blocks.{{}}"),
    }
    feed_forward = f"{AUDIO_PREFIX}blocks.0.ffn.net.0.proj.weight"
    if feed_forward in shapes and shapes.of(feed_forward, 2)[0] != 2 * width:
        settings["audio_ffn_dim"] = shapes.of(feed_forward, 2)[0]
    return settings


def vae_settings(state: Mapping[str, torch.Tensor], source: Path | str) -> dict[str, Any]:
    """Keywords of diffusers' ``AutoencoderKLWan`` in the form that Wan 2.1 has, at any width.

    Raises:
        CheckpointError: the tensors are not those of such an autoencoder.
    """
    shapes = _Shapes(state, source, "the Wan 2.1 video autoencoder")
    base_dim, channels = shapes.of("encoder.conv_in.weight", 5)[:2]
    if channels != 3:
        raise shapes.error(
            f"it takes {channels} channels, not the 3 of a picture (Wan 2.2 has other autoencoders)"
        )
    return {"base_dim": base_dim, "z_dim": shapes.of("post_quant_conv.weight", 5)[0]}


def text_encoder_settings(state: Mapping[str, torch.Tensor], source: Path | str) -> dict[str, Any]:
    """Keywords of transformers' ``UMT5Config``.

    Raises:
        CheckpointError: the tensors are not those of a UMT5 encoder.
    """
    shapes = _Shapes(state, source, "a UMT5 text encoder")
    layer = "encoder.block.0.layer"
    vocabulary, width = shapes.of("shared.weight", 2)
    buckets, heads = shapes.of(f"{layer}.0.SelfAttention.relative_attention_bias.weight", 2)
    inner = shapes.of(f"{layer}.0.SelfAttention.q.weight", 2)[0]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shapes.of(f"{layer}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": shapes.layers("encoder.block.{}"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def image_encoder_settings(state: Mapping[str, torch.Tensor], source: Path | str) -> dict[str, Any]:
    """Keywords of transformers' ``CLIPVisionConfig``; heads are 80 wide, as in ViT-H.

    Raises:
        CheckpointError: the tensors are not those of a CLIP visual tower of that kind.
    """
    shapes = _Shapes(state, source, "the CLIP portrait encoder")
    width, _, patch, _ = shapes.of("embeddings.patch_embedding.weight", 4)
    if width % VIT_H_HEAD_WIDTH:
        raise shapes.error(
            f"its width {width} is no multiple of {VIT_H_HEAD_WIDTH}, the width of a head of ViT-H"
        )
    positions = shapes.of("embeddings.position_embedding.weight", 2)[0]
    side = math.isqrt(positions - 1)
    return {
        "hidden_size": width,
        "intermediate_size": shapes.of("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": shapes.layers("encoder.layers.{}"),
        "num_attention_heads": width // VIT_H_HEAD_WIDTH,
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }
