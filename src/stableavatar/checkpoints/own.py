"""Whether a folder of this project's own holds a whole model, told before diffusers loads it.

diffusers and transformers say of a folder that lacks a file, or holds another model's tensors, only what
failed inside of them; some of it they pass over.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

from stableavatar.checkpoints import loading
from stableavatar.checkpoints.defaults import check_defaults
from stableavatar.checkpoints.files import read_json
from stableavatar.checkpoints.layout import MODEL_INDEX, OWN_PARTS
from stableavatar.errors import CheckpointError

_LOADERS: Mapping[str, Callable[..., Any]] = {
    "transformer": loading.load_transformer,
    "vae": loading.load_vae,
    "text_encoder": loading.load_text_encoder,
    "image_encoder": loading.load_image_encoder,
    "speech_encoder": loading.load_speech_encoder,
}
_CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
# What the index names, the library imports: nothing else may stand there. Tokenizers have many classes.
_CLASSES: Mapping[str, tuple[str, str]] = {
    "transformer": ("stableavatar.models.transformer", "StableAvatarTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "speech_encoder": ("transformers", "Wav2Vec2Model"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


def check_own(folder: Path, parts: Iterable[str] = OWN_PARTS) -> None:
    """Check that every part is there and of its class, its tensors those of its settings, by name and shape.

    No tensor is read: the models are built on the meta device. Of parts that were saved quantised only the
    class is checked, their tensors have other names.

    Raises:
        CheckpointError: a part, a file or a tensor is missing, surplus, misshapen or damaged, or a setting
            cannot be; it is named.
    """
    index = read_json(folder / MODEL_INDEX)
    for part in parts:
        if part not in index or not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder}: is not a whole model, its {part.replace('_', ' ')} ({folder / part}) is missing; "
                "copy the folder again"
            )
        _check_class(folder / MODEL_INDEX, part, index[part])
        config = read_json(folder / part / _CONFIGS.get(part, "config.json"))
        if part == "scheduler":
            _check_scheduler(folder / part, config)
        elif part == "tokenizer":
            loading.check_tokenizer(folder / part)
        elif "quantization_config" not in config:
            settings = {key: value for key, value in config.items() if not key.startswith("_")}
            model = _LOADERS[part](folder / part, config=settings, dtype=None, device="meta")
            if isinstance(model, AutoencoderKLWan):
                _check_statistics(folder / part / "config.json", model)
    check_defaults(folder / MODEL_INDEX, index.get("sampling_defaults"))


def _check_class(file: Path, part: str, entry: Any) -> None:
    if part == "tokenizer":
        expected = "a tokenizer of transformers"
        kind = getattr(transformers, str(entry[-1]), None) if isinstance(entry, list) and entry else None
        right = (
            isinstance(kind, type)
            and issubclass(kind, transformers.PreTrainedTokenizerBase)
            and entry == ["transformers", kind.__name__]
        )
    else:
        expected = " ".join(reversed(_CLASSES[part])).replace(" ", " of ")
        right = entry == list(_CLASSES[part])
    if not right:
        raise CheckpointError(
            f"{file}: says that the {part.replace('_', ' ')} is {entry}, not {expected}; this is another "
            "model, or the file is damaged: copy the folder again"
        )


def _check_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    expected = _CLASSES["scheduler"][1]
    name = "scheduler_config.json"
    if config.get("_class_name", expected) != expected:
        raise CheckpointError(
            f"{folder / name}: describes a {config['_class_name']}, not the {expected} that the model is "
            "sampled with; copy the folder again"
        )
    with loading.settings_of(folder, name):
        FlowMatchEulerDiscreteScheduler.from_config(dict(config))


def _check_statistics(file: Path, vae: AutoencoderKLWan) -> None:
    """One mean and one deviation a latent channel: a single one would be broadcast, to a wrong video."""
    channels = vae.config["z_dim"]
    for name in ("latents_mean", "latents_std"):
        values = vae.config[name]
        if not isinstance(values, list | tuple) or len(values) != channels:
            count = len(values) if isinstance(values, list | tuple) else "no list of"
            raise CheckpointError(
                f"{file}: {name} has {count} values, not one for each of the {channels} channels of the "
                "latents; copy the folder again"
            )
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise CheckpointError(f"{file}: {name} has values that are no numbers; copy the folder again")
    if 0 in vae.config["latents_std"]:
        raise CheckpointError(f"{file}: latents_std has a zero; copy the folder again")
