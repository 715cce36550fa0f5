"""Whether a folder of this project's own holds a whole model, told before diffusers loads it.

diffusers and transformers say of a folder that lacks a file, or holds another model's tensors, only what
failed inside of them; some of it they pass over.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stableavatar.checkpoints import loading
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


def check_own(folder: Path, parts: Iterable[str] = OWN_PARTS) -> None:
    """Check that every part is there, and that its tensors are those of its settings, by name and shape.

    No tensor is read: the models are built on the meta device. Parts that were saved quantised are not
    checked, their tensors have other names.

    Raises:
        CheckpointError: a part, a file or a tensor is missing, surplus, misshapen or damaged; it is named.
    """
    index = read_json(folder / MODEL_INDEX)
    for part in parts:
        if part not in index or not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder}: is not a whole model, its {part.replace('_', ' ')} ({folder / part}) is missing; "
                "copy the folder again"
            )
        config = read_json(folder / part / _CONFIGS.get(part, "config.json"))
        if part in _LOADERS and "quantization_config" not in config:
            settings = {key: value for key, value in config.items() if not key.startswith("_")}
            _LOADERS[part](folder / part, config=settings, dtype=None, device="meta")
