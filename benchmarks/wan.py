"""Our transformer and diffusers' Wan transformer of the released 1.3B widths, with the same weights, as calls
on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from torch import nn

from benchmarks.measuring import BenchmarkError
from benchmarks.sizes import Sizes
from stableavatar.config import SIZES
from stableavatar.models.attention import ContextCache
from stableavatar.models.transformer import StableAvatarTransformer3DModel

PEER = "diffusers"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rounding of a few blocks, relative to the largest velocity. Where the two differ by more, they do not
# compute the same.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}

_AUDIO_FIELDS = ("text_length", "audio_dim", "audio_layers", "audio_heads", "audio_hidden_dim")
_PORTRAIT_TOKENS = 257
_SPEECH_TOKENS_PER_FRAME = 2  # of video at 25 frames a second: wav2vec2 gives 50 tokens a second

Call = Callable[[], torch.Tensor]
Model = TypeVar("Model", bound=ModelMixin)


@dataclass(frozen=True)
class Pair:
    """Both models.

    Without audio they compute the same: a row that hears nothing adds the audio values' biases, and these
    are zero here.
    """

    ours: StableAvatarTransformer3DModel
    peer: WanTransformer3DModel

    @classmethod
    def of(cls, blocks: int, dtype: torch.dtype) -> "Pair":
        """Random weights, in the dtypes that each of the two libraries would load them in."""
        settings = {**SIZES["1.3b"].transformer, "num_layers": blocks}
        torch.manual_seed(0)
        ours = StableAvatarTransformer3DModel(**settings).eval()
        for block in ours.blocks:
            nn.init.zeros_(block.attn2.v_vocal.bias)
        width = settings["num_attention_heads"] * settings["attention_head_dim"]
        shared = {name: value for name, value in settings.items() if name not in _AUDIO_FIELDS}
        peer = WanTransformer3DModel(**shared, added_kv_proj_dim=width).eval()
        weights = ours.state_dict()
        peer.load_state_dict({name: weights[name] for name in peer.state_dict()})
        return cls(_as_loaded(ours, dtype), _as_loaded(peer, dtype))


def _as_loaded(model: Model, dtype: torch.dtype) -> Model:
    """In `dtype`, but for the modules that the model's class keeps in float32."""
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def calls(pair: Pair, sizes: Sizes, dtype: torch.dtype) -> dict[str, Call]:
    """The calls that are compared: diffusers', and ours without audio and with it, as a call alone (nothing
    kept) and as a sampler calls it (keys and values of prompt and portrait kept from call to call).

    Raises:
        BenchmarkError: diffusers' velocity is not ours.
    """
    config = pair.ours.config
    frames, side = sizes.latent_frames, sizes.latent_size
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    condition_channels = config.in_channels - config.out_channels
    latents = drawn(1, config.out_channels, frames, side, side)
    condition = drawn(1, condition_channels, frames, side, side)
    prompt = drawn(1, config.text_length, config.text_dim)
    portrait = drawn(1, _PORTRAIT_TOKENS, config.image_dim)
    speech = drawn(1, _SPEECH_TOKENS_PER_FRAME * (4 * (frames - 1) + 1), config.audio_dim)
    timestep = torch.tensor([500.0])

    @torch.no_grad()
    def ours(heard: torch.Tensor | None, cache: ContextCache | None) -> torch.Tensor:
        given = (latents, condition, timestep, prompt, portrait, heard)
        return pair.ours(*given, context_cache=cache, return_dict=False)[0]

    @torch.no_grad()
    def peer() -> torch.Tensor:
        joined = torch.cat([latents, condition], dim=1)
        return pair.peer(joined, timestep, prompt, portrait, return_dict=False)[0]

    silent, heard = ContextCache(), ContextCache()
    return {
        PEER: peer,
        "ours, no audio": lambda: ours(None, None),
        "ours, no audio, keys and values kept": lambda: ours(None, silent),
        "ours with audio": lambda: ours(speech, None),
        "ours with audio, keys and values kept": lambda: ours(speech, heard),
    }


def check_agreement(made: dict[str, Call], dtype: str) -> float:
    """The largest difference of our velocities without audio from diffusers', relative to its largest.

    Raises:
        BenchmarkError: it is more than rounding.
    """
    expected = made[PEER]().float()
    largest = 0.0
    for name, call in made.items():
        if name.startswith("ours, no audio"):
            call()  # the second call is the one that takes what is kept
            difference = (call().float() - expected).abs().max() / expected.abs().max()
            largest = max(largest, float(difference))
    if not largest <= TOLERANCES[dtype]:
        raise BenchmarkError(
            f"in {dtype} our velocity differs from diffusers' by {largest:.2g} of its largest value: the two "
            "do not compute the same"
        )
    return largest
