"""What is trained together for `tiny`: the video transformer, the prompt encoder and the portrait encoder.

The portrait encoder has half a million parameters and learns with the transformer instead of coming from
elsewhere; so does the prompt encoder, unless one that was trained before is given, which stays as it is.
Autoencoder and speech encoder are trained before and frozen; their results come from a latent cache.
"""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import ByT5Tokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from stableavatar.checkpoints.loading import load_transformer
from stableavatar.conditioning.image import portrait_pixels
from stableavatar.conditioning.text import encode_tokens
from stableavatar.data.encoding import EncodedBatch
from stableavatar.errors import CheckpointError, InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.avatar import Avatar, judged_frames
from stableavatar.training.objective import ModelInputs, ObjectiveSettings

TEXT_WIDTH = 128
IMAGE_WIDTH = 128
MASK_CHANNELS = 4
TEXT_LENGTH = 96  # bytes; the longest prompt of a puppet has 87


def build_transformer(
    heads: int, layers: int, audio_dim: int, latent_channels: int
) -> StableAvatarTransformer3DModel:
    """The untrained transformer of `tiny`: `heads` heads of 64 channels.

    Trained from scratch there is no plain video model to keep, so the audio keys and values start at random
    like every other layer. The gates of the blocks start half open instead of nearly shut, so that all blocks
    learn from the first step on (a choice, not yet compared with the published start).
    """
    model = StableAvatarTransformer3DModel(
        in_channels=2 * latent_channels + MASK_CHANNELS,
        out_channels=latent_channels,
        num_attention_heads=heads,
        attention_head_dim=64,
        text_dim=TEXT_WIDTH,
        text_length=TEXT_LENGTH,
        ffn_dim=4 * 64 * heads,
        num_layers=layers,
        image_dim=IMAGE_WIDTH,
        audio_dim=audio_dim,
        audio_layers=2,
        audio_heads=heads,
        audio_ffn_dim=2 * 64 * heads,
    )
    with torch.no_grad():
        for block in (*model.blocks, *model.vocal_projector.blocks):
            block.scale_shift_table[:, [2, 5]] += 0.5
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
    return model


@torch.no_grad()
def grow_transformer(model: StableAvatarTransformer3DModel, given: StableAvatarTransformer3DModel) -> None:
    """Take over the weights of a transformer that differs only in having fewer latent channels.

    Where the channels that it does not know are zero it does what it did. It hears them as an untrained model
    does, and of them makes nothing yet: were both silent, neither would learn for long.

    Raises:
        InputError: it differs in other things, or has more channels.
    """
    old, new = given.config.out_channels, model.config.out_channels
    if old > new:
        raise InputError(f"the transformer to start from has {old} latent channels, the model {new}")
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "audio_heads", "patch_size"):
        if given.config[name] != model.config[name]:
            raise InputError(
                f"the transformer to start from has {name} {given.config[name]}, "
                f"the model {model.config[name]}"
            )
    state = dict(given.state_dict())
    # Into the first layer go noisy latents, the mask, and the reference's latents.
    kernel = model.patch_embedding.weight.clone()
    kernel[:, :old] = given.patch_embedding.weight[:, :old]
    kernel[:, new : new + MASK_CHANNELS + old] = given.patch_embedding.weight[:, old:]
    state["patch_embedding.weight"] = kernel
    # The last layer gives all channels of a pixel of the patch, then those of the next.
    pixels = math.prod(model.config.patch_size)
    for name in ("proj_out.weight", "proj_out.bias"):
        head = torch.zeros_like(model.state_dict()[name]).unflatten(0, (pixels, new))
        head[:, :old] = state[name].unflatten(0, (pixels, old))
        state[name] = head.flatten(0, 1)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"the transformer to start from has other sizes: {first}") from error


def build_text_encoder() -> UMT5EncoderModel:
    """The untrained prompt encoder of `tiny`: bytes to `TEXT_WIDTH` features each."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=384,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


class TinyAvatar(Avatar):
    """Transformer, prompt encoder and portrait encoder; calling it gives the loss of a step."""

    def __init__(
        self,
        objective: ObjectiveSettings,
        *,
        heads: int = 3,
        layers: int = 6,
        audio_dim: int = 192,
        latent_channels: int = 32,
    ) -> None:
        super().__init__(build_transformer(heads, layers, audio_dim, latent_channels), objective)
        self.tokenizer = ByT5Tokenizer()
        self.text_encoder = build_text_encoder()
        # The portrait embeddings are the state before the last layer, so one layer of the three never acts.
        self.image_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=IMAGE_WIDTH,
                intermediate_size=2 * IMAGE_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=128,
                patch_size=16,
                projection_dim=IMAGE_WIDTH,
            )
        )
        for name, parameter in self.image_encoder.named_parameters():
            parameter.requires_grad_(not self.never_acts(f"image_encoder.{name}"))

    @staticmethod
    def never_acts(name: str) -> bool:
        """Whether a parameter has no part in any result: the portrait encoder's last layer."""
        return name.startswith("image_encoder.") and ("layers.2." in name or "post_layernorm" in name)

    def start_from(self, folder: Path) -> None:
        """Go on from the parts below `folder`, whose transformer may know fewer latent channels.

        Raises:
            CheckpointError: a part is missing or damaged. InputError: its sizes are others.
        """
        grow_transformer(self.transformer, load_transformer(folder / "transformer", dtype=torch.float32))
        for name in ("text_encoder", "image_encoder"):
            self._take(name, folder / name)

    def take_text_encoder(self, folder: Path) -> None:
        """Use a prompt encoder that was trained before, as it is.

        Raises:
            CheckpointError: there is none, it is damaged, or its sizes are others.
        """
        self._take("text_encoder", folder)
        self.text_encoder.requires_grad_(False)

    def _take(self, name: str, folder: Path) -> None:
        mine = getattr(self, name)
        try:
            given = type(mine).from_pretrained(folder, dtype=torch.float32)
            mine.load_state_dict(given.state_dict())
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be started from: {str(error).splitlines()[0]}") from error

    def encode_prompts(self, prompts: tuple[str, ...]) -> torch.Tensor:
        """Embeddings `[B, text_length, C]`; equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            distinct, padding="longest", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        tokens = tokens.to(self.text_encoder.device)
        embeddings = encode_tokens(self.text_encoder, tokens.input_ids, tokens.attention_mask, TEXT_LENGTH)
        return embeddings[[distinct.index(prompt) for prompt in prompts]]

    def encode_portraits(self, portraits: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, P, C]` of pictures uint8 `[B, H, W, 3]`."""
        pictures = portraits.permute(0, 3, 1, 2).float() / 127.5 - 1
        size = self.image_encoder.config.image_size
        pixels = torch.cat([portrait_pixels(picture, size) for picture in pictures])
        return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

    def inputs(self, batch: EncodedBatch) -> ModelInputs:
        """What the transformer takes."""
        prompts = self.encode_prompts(("", *batch.prompts))
        return ModelInputs(
            latents=batch.latents,
            condition=batch.condition,
            prompt=prompts[1:],
            empty_prompt=prompts[:1],
            portrait=self.encode_portraits(batch.portrait),
            speech=batch.speech,
            face_mask=batch.face_mask,
            lip_mask=batch.lip_mask,
            judged=judged_frames(batch),
        )
