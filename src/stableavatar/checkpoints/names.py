"""Names of tensors, both ways: published checkpoints on one side, the classes used here on the other.

The only file that knows published names of tensors; those of files are in `layout`. A table is a list of
rules, each a pair of templates in which ``{}`` stands for a block number; ``weight``, ``bias`` and ``gamma``
at the end go along. A name that no rule knows is passed on as it is, so that the loader can report it under
the name that the user sees in the file.

Published naming, and what it becomes (`spec/3-checkpoints.md`):

=============  ==========================================  ===============================================
part           published                                   here
=============  ==========================================  ===============================================
transformer    Wan 2.1 with StableAvatar's audio tensors   diffusers' ``WanTransformer3DModel``, and audio
vae            ``Wan2.1_VAE.pth``                          diffusers' ``AutoencoderKLWan``
text_encoder   ``models_t5_umt5-xxl-enc-bf16.pth``         transformers' ``UMT5EncoderModel``
image_encoder  ``models_clip_open-clip-...-huge-14.pth``   transformers' ``CLIPVisionModel``
=============  ==========================================  ===============================================

A speech encoder is a transformers folder; only the prefix and the head of a speech recogniser, and an older
spelling of its weight norm, are taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from stableavatar.errors import CheckpointError

Part = Literal["transformer", "vae", "text_encoder", "image_encoder", "speech_encoder"]
StateDict = dict[str, torch.Tensor]

# Wrappers that leave their mark on names: DDP, torch.compile, and files made for node editors.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.")

ADAPTER_WORD = "vocal"
"""In the names of all tensors of the audio adapter, and of no other."""
AUDIO_PREFIX = "vocal_projector."
AUDIO_PROJECTIONS = ("k_vocal", "v_vocal")

_TAIL = r"(?P<tail>(?:\.(?:weight|bias|gamma))?)"


@dataclass(frozen=True)
class NameTable:
    """Rules from published names to ours and back; every rule is a pair of templates of whole names."""

    rules: tuple[tuple[str, str], ...]

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compile(published), ours) for published, ours in self.rules]

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compile(ours), published) for published, ours in self.rules]

    def to_ours(self, name: str) -> str | None:
        """Our name of a published tensor or module; None where no rule knows the name."""
        return _apply(self._forward, name)

    def to_published(self, name: str) -> str | None:
        """The published name of one of our tensors or modules; None where no rule knows the name."""
        return _apply(self._backward, name)

    def is_published(self, names: Iterable[str]) -> bool:
        """Whether names are published ones: at least one of them has another name here."""
        return any((ours := self.to_ours(name)) is not None and ours != name for name in names)


def _compile(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)") + _TAIL)


def _apply(rules: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, target in rules:
        if match := pattern.fullmatch(name):
            numbers = match.groups()[:-1]
            return target.format(*numbers) + match["tail"]
    return None


def _transformer_rules() -> tuple[tuple[str, str], ...]:
    embedder = "condition_embedder"
    rules = [
        ("patch_embedding", "patch_embedding"),
        ("text_embedding.0", f"{embedder}.text_embedder.linear_1"),
        ("text_embedding.2", f"{embedder}.text_embedder.linear_2"),
        ("time_embedding.0", f"{embedder}.time_embedder.linear_1"),
        ("time_embedding.2", f"{embedder}.time_embedder.linear_2"),
        ("time_projection.1", f"{embedder}.time_proj"),
        ("img_emb.proj.0", f"{embedder}.image_embedder.norm1"),
        ("img_emb.proj.1", f"{embedder}.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", f"{embedder}.image_embedder.ff.net.2"),
        ("img_emb.proj.4", f"{embedder}.image_embedder.norm2"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
    ]
    attention = [
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    ]
    portrait_and_audio = [
        ("k_img", "add_k_proj"),
        ("v_img", "add_v_proj"),
        ("norm_k_img", "norm_added_k"),
        *((name, name) for name in AUDIO_PROJECTIONS),
    ]
    for prefix in ("blocks.{}", f"{AUDIO_PREFIX}blocks.{{}}"):
        rules += [
            (f"{prefix}.modulation", f"{prefix}.scale_shift_table"),
            (f"{prefix}.norm3", f"{prefix}.norm2"),
            (f"{prefix}.ffn.0", f"{prefix}.ffn.net.0.proj"),
            (f"{prefix}.ffn.2", f"{prefix}.ffn.net.2"),
        ]
        rules += [(f"{prefix}.cross_attn.{old}", f"{prefix}.attn2.{new}") for old, new in attention]
    rules += [(f"blocks.{{}}.self_attn.{old}", f"blocks.{{}}.attn1.{new}") for old, new in attention]
    rules += [
        (f"blocks.{{}}.cross_attn.{old}", f"blocks.{{}}.attn2.{new}") for old, new in portrait_and_audio
    ]
    projection = f"{AUDIO_PREFIX}proj_model"
    kept = [f"{projection}.{name}" for name in ("proj", "norm", "proj_1", "norm_1", "proj_2", "norm_2")]
    rules += [(name, name) for name in [*kept, f"{AUDIO_PREFIX}final_head.final_proj"]]
    rules += [(f"{AUDIO_PREFIX}final_head.modulation", f"{AUDIO_PREFIX}final_scale_shift_table")]
    return tuple(rules)


def _vae_rules() -> tuple[tuple[str, str], ...]:
    residual = [
        ("residual.0", "norm1"),
        ("residual.2", "conv1"),
        ("residual.3", "norm2"),
        ("residual.6", "conv2"),
        ("shortcut", "conv_shortcut"),
    ]
    resampling = [("resample.1", "resample.1"), ("time_conv", "time_conv")]
    rules = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rules += [
            (f"{side}.conv1", f"{side}.conv_in"),
            (f"{side}.head.0", f"{side}.norm_out"),
            (f"{side}.head.2", f"{side}.conv_out"),
        ]
        for place, resnet in ((0, 0), (2, 1)):
            rules += [
                (f"{side}.middle.{place}.{old}", f"{side}.mid_block.resnets.{resnet}.{new}")
                for old, new in residual
            ]
        attention = f"{side}.mid_block.attentions.0"
        rules += [(f"{side}.middle.1.{name}", f"{attention}.{name}") for name in ("norm", "to_qkv", "proj")]
    rules += [
        (f"encoder.downsamples.{{}}.{old}", f"encoder.down_blocks.{{}}.{new}")
        for old, new in residual + resampling
    ]
    # The decoder is one flat list in the file, but blocks of three residual layers and an upsampler here.
    residual_layers = 3
    for block in range(4):
        first = block * (residual_layers + 1)
        for layer in range(residual_layers):
            target = f"decoder.up_blocks.{block}.resnets.{layer}"
            rules += [
                (f"decoder.upsamples.{first + layer}.{old}", f"{target}.{new}") for old, new in residual
            ]
        upsampler = f"decoder.up_blocks.{block}.upsamplers.0"
        rules += [
            (f"decoder.upsamples.{first + residual_layers}.{old}", f"{upsampler}.{new}")
            for old, new in resampling
        ]
    return tuple(rules)


def _text_rules() -> tuple[tuple[str, str], ...]:
    attention, feed_forward = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    rules = [
        ("token_embedding", "shared"),
        ("norm", "encoder.final_layer_norm"),
        ("blocks.{}.norm1", f"{attention}.layer_norm"),
        ("blocks.{}.norm2", f"{feed_forward}.layer_norm"),
        ("blocks.{}.pos_embedding.embedding", f"{attention}.SelfAttention.relative_attention_bias"),
        ("blocks.{}.ffn.gate.0", f"{feed_forward}.DenseReluDense.wi_0"),
        ("blocks.{}.ffn.fc1", f"{feed_forward}.DenseReluDense.wi_1"),
        ("blocks.{}.ffn.fc2", f"{feed_forward}.DenseReluDense.wo"),
    ]
    rules += [(f"blocks.{{}}.attn.{name}", f"{attention}.SelfAttention.{name}") for name in "qkvo"]
    return tuple(rules)


def _image_rules() -> tuple[tuple[str, str], ...]:
    """Names without their prefix ``visual.``; the fused query, key and value are dealt with apart."""
    layer, source = "encoder.layers.{}", "transformer.{}"
    return (
        ("patch_embedding", "embeddings.patch_embedding"),
        ("pre_norm", "pre_layrnorm"),
        ("post_norm", "post_layernorm"),
        (f"{source}.norm1", f"{layer}.layer_norm1"),
        (f"{source}.norm2", f"{layer}.layer_norm2"),
        (f"{source}.attn.proj", f"{layer}.self_attn.out_proj"),
        (f"{source}.mlp.0", f"{layer}.mlp.fc1"),
        (f"{source}.mlp.2", f"{layer}.mlp.fc2"),
    )


TRANSFORMER = NameTable(_transformer_rules())
VAE = NameTable(_vae_rules())
TEXT_ENCODER = NameTable(_text_rules())
IMAGE_ENCODER = NameTable(_image_rules())

_TABLES = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT_ENCODER}

_VISUAL = "visual."
_TOWER, _PROJECTION = "vision_model.", "visual_projection."
# What the portrait encoder has no use for: named, so that any other surplus is reported.
_UNUSED_IMAGE_NAMES = re.compile(r"log_scale|textual\..+|(visual\.)?head")
_FUSED_ATTENTION = re.compile(r"transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)")
_SPLIT_ATTENTION = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")


def strip_wrappers(state: Mapping[str, torch.Tensor]) -> StateDict:
    """Take off prefixes that stand before *every* name (`WRAPPER_PREFIXES`), however many there are."""
    stripped = dict(state)
    while stripped:
        prefix = next((p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in stripped)), None)
        if prefix is None:
            break
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


def is_published(part: Part, names: Iterable[str]) -> bool:
    """Whether the tensors of a part carry published names; False for the library's own names."""
    if part == "image_encoder":
        return any(name.startswith(_VISUAL) or name in ("cls_embedding", "pos_embedding") for name in names)
    if part == "speech_encoder":
        return any(_speech_name(name) != name for name in names)
    return _TABLES[part].is_published(names)


def to_ours(part: Part, state: Mapping[str, torch.Tensor]) -> StateDict:
    """Give a part's tensors our names; a state dict that has them already comes back as it is.

    The text encoder's token table gets its second name, the image encoder's fused query, key and value are
    split in three (views, no copies), its class embedding flattened. Unknown names are kept, and shapes
    are not checked.
    """
    if part == "image_encoder" and all(name.startswith((_TOWER, _PROJECTION)) for name in state):
        # As transformers 4 saved it, alone or with the projection of a whole CLIP.
        renamed = {
            name.removeprefix(_TOWER): tensor
            for name, tensor in state.items()
            if not name.startswith(_PROJECTION)
        }
    elif not is_published(part, state):
        renamed = dict(state)
    elif part == "image_encoder":
        renamed = _image_encoder_to_ours(state)
    elif part == "speech_encoder":
        renamed = {ours: tensor for name, tensor in state.items() if (ours := _speech_name(name)) is not None}
    else:
        renamed = _rename(_TABLES[part], state)
    if part == "text_encoder" and "shared.weight" in renamed:
        renamed.setdefault("encoder.embed_tokens.weight", renamed["shared.weight"])
    return renamed


def to_published(part: Part, state: Mapping[str, torch.Tensor]) -> StateDict:
    """Give a part's tensors their published names, the inverse of `to_ours`.

    The image encoder gets the prefix ``visual.`` but neither the head nor the text tower back: both are
    dropped on loading.

    Raises:
        CheckpointError: a tensor has no published name (that of another architecture).
    """
    if part == "image_encoder":
        return _image_encoder_to_published(state)
    if part == "speech_encoder":
        return dict(state)
    table = _TABLES[part]
    renamed: StateDict = {}
    for name, tensor in state.items():
        if part == "text_encoder" and name == "encoder.embed_tokens.weight":
            continue
        renamed[_published_or_raise(table, name)] = tensor
    return renamed


def _rename(table: NameTable, state: Mapping[str, torch.Tensor]) -> StateDict:
    return {table.to_ours(name) or name: tensor for name, tensor in state.items()}


def _published_or_raise(table: NameTable, name: str) -> str:
    published = table.to_published(name)
    if published is None:
        raise CheckpointError(
            f"the tensor {name} has no name in the published format; keep this model in its own folder"
        )
    return published


def _speech_name(name: str) -> str | None:
    """The name of a speech encoder's tensor in a bare ``Wav2Vec2Model``; None for the recogniser's head."""
    if name.startswith("lm_head."):
        return None
    name = name.removeprefix("wav2vec2.")
    convolution = "encoder.pos_conv_embed.conv"
    older = {f"{convolution}.weight_{letter}": f"original{number}" for number, letter in enumerate("gv")}
    return f"{convolution}.parametrizations.weight.{older[name]}" if name in older else name


def _image_encoder_to_ours(state: Mapping[str, torch.Tensor]) -> StateDict:
    renamed: StateDict = {}
    for full_name, tensor in state.items():
        if _UNUSED_IMAGE_NAMES.fullmatch(full_name):
            continue
        name = full_name.removeprefix(_VISUAL)
        if name == "cls_embedding":
            renamed["embeddings.class_embedding"] = tensor.flatten()
        elif name == "pos_embedding":
            renamed["embeddings.position_embedding.weight"] = tensor[0]
        elif fused := _FUSED_ATTENTION.fullmatch(name):
            layer, kind = fused.groups()
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = third
        else:
            renamed[IMAGE_ENCODER.to_ours(name) or full_name] = tensor
    return renamed


def _image_encoder_to_published(state: Mapping[str, torch.Tensor]) -> StateDict:
    renamed: StateDict = {}
    for name, tensor in state.items():
        if name == "embeddings.class_embedding":
            renamed[f"{_VISUAL}cls_embedding"] = tensor.reshape(1, 1, -1)
        elif name == "embeddings.position_embedding.weight":
            renamed[f"{_VISUAL}pos_embedding"] = tensor[None]
        elif split := _SPLIT_ATTENTION.fullmatch(name):
            layer, kind = split.groups()
            thirds = [state[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            renamed[f"{_VISUAL}transformer.{layer}.attn.to_qkv.{kind}"] = torch.cat(thirds)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            renamed[_VISUAL + _published_or_raise(IMAGE_ENCODER, name)] = tensor
    return renamed


def is_audio_name(name: str) -> bool:
    """Whether one of our transformer's tensors is of the audio side, absent from the plain video model."""
    return name.startswith(AUDIO_PREFIX) or any(f".{projection}." in name for projection in AUDIO_PROJECTIONS)


# Settings of a published transformer's config.json and our keywords for them.
_TRANSFORMER_SETTINGS = {
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "text_dim": "text_dim",
    "text_len": "text_length",
    "eps": "eps",
    "patch_size": "patch_size",
}
# Settings that published files only ever have at one value, the one this architecture is built for.
_FIXED_SETTINGS = {"qk_norm": True, "cross_attn_norm": True}


def transformer_config_to_ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a published transformer's ``config.json`` (``dim``, ``num_heads``, ...) to our keywords.

    Settings that say nothing about the architecture are left out.

    Raises:
        CheckpointError: the file describes an architecture that this project does not compute.
    """
    for key, value in _FIXED_SETTINGS.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"config.json says {key} = {config[key]}: only {value} is supported")
    ours = {new: config[old] for old, new in _TRANSFORMER_SETTINGS.items() if old in config}
    if "patch_size" in ours:
        ours["patch_size"] = tuple(ours["patch_size"])
    if "dim" in config and "num_heads" in config:
        width, heads = int(config["dim"]), int(config["num_heads"])
        if heads <= 0 or width % heads:
            raise CheckpointError(f"config.json says dim = {width} and num_heads = {heads}: not a multiple")
        ours["attention_head_dim"] = width // heads
    return ours
