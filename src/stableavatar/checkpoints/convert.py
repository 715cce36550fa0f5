"""From the published layout to this project's own folder, and the transformer back to published names.

An own folder is in diffusers layout: a ``model_index.json`` and a sub-folder a part with ``config.json`` and
safetensors. It is written beside its final name and renamed when complete.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import save_file

from stableavatar.checkpoints import loading
from stableavatar.checkpoints.defaults import sampling_defaults
from stableavatar.checkpoints.layout import (
    MODEL_INDEX,
    OWN_PARTS,
    PublishedLayout,
    find_published,
)
from stableavatar.config import SHIFT, TRAINING_STEPS
from stableavatar.errors import InputError
from stableavatar.media.files import cannot_write, replacing
from stableavatar.models.transformer import StableAvatarTransformer3DModel

logger = logging.getLogger(__name__)

# As diffusers and transformers understand it.
_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?(KB|MB|GB|TB)", re.IGNORECASE)


def convert(
    source: Path | str,
    target: Path | str,
    *,
    variant: str | None = None,
    size: str = "1.3b",
    overlay: Path | str | None = None,
    parts: Iterable[str] = OWN_PARTS,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Turn the published layout into an own folder. One part at a time is in memory.

    Args:
        source: a folder for `layout.find_published`.
        target: the folder to write.
        variant: which of the published transformers, None for ``square``; with an overlay, the one whose
            picture sizes it was trained at, None where that is not known.
        size: of the transformer.
        overlay: a transformer file in place of the variant's, such as a checkpoint of a training.
        parts: which of `layout.OWN_PARTS`.
        dtype: of the weights; None keeps the one that each part is stored in.
        max_shard_size: from which size on weights are split into several files.
        overwrite: replace a target that exists.

    Returns:
        the target.

    Raises:
        InputError: unknown parts; the target exists or cannot be written.
        CheckpointError: weights are missing or not those of the model.
    """
    parts = list(dict.fromkeys(parts))
    if unknown := [part for part in parts if part not in OWN_PARTS] or ([] if parts else ["none"]):
        raise InputError(f"unknown parts {', '.join(unknown)}: choose from {', '.join(OWN_PARTS)}")
    if not _SIZE.fullmatch(max_shard_size):
        raise InputError(f"shard size {max_shard_size!r}: give one such as 5GB or 500MB")
    found = find_published(source)
    if overlay is None:
        variant = variant or "square"
    found.require(variant if overlay is None else None, size, parts)
    savers = _savers(found, variant, size, overlay, dtype, max_shard_size)
    with _complete_or_nothing(Path(target), overwrite) as folder:
        folder.mkdir()
        classes = {}
        for part in parts:
            logger.info("converting the %s", part)
            classes[part] = savers[part](folder / part)
        defaults = sampling_defaults(variant, size) if "transformer" in parts else {}
        write_model_index(folder, classes, {"sampling_defaults": defaults} if defaults else None)
    return Path(target)


def write_model_index(
    folder: Path, classes: Mapping[str, type], extra: Mapping[str, Any] | None = None
) -> None:
    """Write ``model_index.json``: the class of each sub-folder, and what else a pipeline is to know."""
    index = {
        "_class_name": "AvatarPipeline",
        "_diffusers_version": diffusers.__version__,
        **{part: [_library(kind), kind.__name__] for part, kind in classes.items()},
        **(extra or {}),
    }
    (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _library(kind: type) -> str:
    """Where diffusers looks for a class: in a package that it knows, or else in the class's own module."""
    package = kind.__module__.partition(".")[0]
    return package if package in ("diffusers", "transformers") else kind.__module__


def export_transformer(
    transformer: StableAvatarTransformer3DModel | Path | str,
    target: Path | str,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a transformer under published names, for the published code or for those who have it on disk.

    Args:
        transformer: a model, or what `loading.load_transformer` reads, an own folder's ``transformer`` for
            example.
        target: a file that ends in ``.pt`` or ``.safetensors``.
        dtype: of the weights; None keeps each tensor's own.
        overwrite: replace a file that exists.

    Returns:
        the target.

    Raises:
        InputError: another suffix; the target exists or cannot be written.
        CheckpointError: the source is not such a transformer.
    """
    target = Path(target)
    if target.suffix not in (".pt", ".safetensors"):
        raise InputError(f"{target}: should end in .pt or .safetensors")
    if not isinstance(transformer, StableAvatarTransformer3DModel):
        transformer = loading.load_transformer(transformer, dtype=None)
    state = {
        name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in loading.published_state_dict(transformer).items()
    }
    with _complete_or_nothing(target, overwrite) as file:
        if target.suffix == ".pt":
            try:
                torch.save(state, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise cannot_write(target, error) from error
        else:
            save_file(state, file, metadata={"format": "pt"})
    return target


def _savers(
    found: PublishedLayout,
    variant: str | None,
    size: str,
    overlay: Path | str | None,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> dict[str, Callable[[Path], type]]:
    """How each part is read and written, which gives its class; nothing is read before its turn."""

    def transformer(folder: Path) -> type:
        base, published = found.transformer_files(variant if overlay is None else None, size)
        model = loading.load_transformer(base, overlay or published, dtype=dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return type(model)

    def encoder(
        load: Callable[..., Any], part: str, dtype: torch.dtype | None = dtype
    ) -> Callable[[Path], type]:
        def save(folder: Path) -> type:
            model = load(getattr(found, part), dtype=dtype)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            return type(model)

        return save

    def tokenizer(folder: Path) -> type:
        made = loading.load_tokenizer(found.tokenizer or found.root)
        made.save_pretrained(folder)
        return type(made)

    def scheduler(folder: Path) -> type:
        made = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAINING_STEPS, shift=SHIFT)
        made.save_pretrained(folder)
        return type(made)

    return {
        "transformer": transformer,
        "vae": encoder(loading.load_vae, "vae"),
        "text_encoder": encoder(loading.load_text_encoder, "text_encoder"),
        "tokenizer": tokenizer,
        "image_encoder": encoder(loading.load_image_encoder, "image_encoder"),
        "speech_encoder": encoder(loading.load_speech_encoder, "speech_encoder", torch.float32),
        "scheduler": scheduler,
    }


@contextmanager
def _complete_or_nothing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside the target to write to; takes the target's place if all goes well, else is removed."""
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists already; choose another name or ask to overwrite it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from error
