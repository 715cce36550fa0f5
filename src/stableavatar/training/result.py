"""What a training has made, as others read it: a transformer, a LoRA or an embedded model; of its end, or of
one of its checkpoints."""

import importlib
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stableavatar.checkpoints.convert import export_transformer
from stableavatar.errors import CheckpointError, InputError
from stableavatar.media.files import check_folder, replacing
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.avatar import Avatar
from stableavatar.training.checkpoints import EMA_FILE, load_average, load_counters, load_weights, readable
from stableavatar.training.lora import is_factor, save_lora, without_lora
from stableavatar.training.parameters import frozen_digest, frozen_state, trained_parameters
from stableavatar.training.recipes import Recipe
from stableavatar.training.run_state import DeepSpeedState, ShardedState
from stableavatar.training.start import (
    TRANSFORMER,
    embedded_avatar,
    load_encoders,
    start_avatar,
    start_embedded,
)
from stableavatar.training.tiny.assemble import assemble
from stableavatar.training.tiny.avatar import TinyAvatar

LORA = "lora"
EMBEDDED = "model"
_PREFIX = "transformer."


def write_result(
    recipe: Recipe, avatar: Avatar, trained: Mapping[str, torch.Tensor], frozen: Mapping[str, torch.Tensor]
) -> Path:
    """Write what was trained below `recipe.output`.

    Args:
        avatar: what was trained, whose values are not read.
        trained, frozen: all of its values, by name; of a LoRA alone those that are frozen are not needed.

    Returns:
        The folder of the transformer, or of the embedded model, or the LoRA's file.
    """
    if isinstance(avatar, TinyAvatar):
        return _write_embedded(recipe, avatar, trained, frozen)
    lora, output = recipe.lora, recipe.output
    trained = {name.removeprefix(_PREFIX): value for name, value in trained.items()}
    if not is_pure_lora(recipe, trained):
        frozen = {name.removeprefix(_PREFIX): value for name, value in frozen.items()}
        _save_transformer(avatar.transformer, without_lora({**frozen, **trained}), output / TRANSFORMER)
    return output / TRANSFORMER if lora is None else save_lora(trained, lora, output / LORA)


def is_pure_lora(recipe: Recipe, trained: Iterable[str]) -> bool:
    """Whether a training's result is a LoRA, and no transformer beside it."""
    return recipe.lora is not None and recipe.model.embedded is None and all(map(is_factor, trained))


def export_checkpoint(
    checkpoint: Path, target: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """Write what a checkpoint of a training holds as the training's end would: the average of the weights,
    where it keeps one.

    The settings are those that it was trained with; what it started from has to lie where it did.

    Args:
        target: a folder, for the transformer, the LoRA or the embedded model; or a file that ends in ``.pt``
            or ``.safetensors``, for the transformer under published names.
        dtype: of such a file's weights; None keeps each tensor's own.
        overwrite: replace a file that exists. What a folder has of such a result is replaced in any case.

    Returns:
        what was written.

    Raises:
        InputError: a LoRA has no transformer of its own; the target cannot be written.
        CheckpointError: no such checkpoint, or it belongs to other weights than lie there now.
    """
    counters = load_counters(checkpoint, ("identity", "record"))
    record = counters["record"]
    if "model" not in record:
        raise CheckpointError(f"{checkpoint} is of no recipe, and says not what it was trained from")
    try:
        recipe = TypeAdapter(Recipe).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{checkpoint} was trained by another release: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    if target.suffix not in (".pt", ".safetensors"):
        if dtype is not None:
            raise InputError("a dtype is of a file: what goes into a folder is as it was trained")
        check_folder(target)
        return _export(checkpoint, replace(recipe, output=target), counters)
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists already; choose another name or ask to overwrite it")
    if recipe.lora is not None:
        raise InputError(f"{checkpoint} is of a LoRA: name a folder for it, not a file")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=_parent_of(target)) as folder:
        made = _export(checkpoint, replace(recipe, output=Path(folder)), counters)
        whole = made / TRANSFORMER if recipe.model.embedded is not None else made
        return export_transformer(whole, target, dtype=dtype, overwrite=overwrite)


def _parent_of(target: Path) -> Path:
    check_folder(target.absolute().parent)
    return target.absolute().parent


def _export(checkpoint: Path, recipe: Recipe, counters: Mapping[str, object]) -> Path:
    torch.manual_seed(recipe.trainer.seed)
    avatar: Avatar
    if recipe.model.embedded is None:
        avatar = start_avatar(recipe)
    else:
        avatar = start_embedded(recipe, load_encoders(recipe.model, torch.device("cpu")))
    identity = counters["identity"]
    assert isinstance(identity, dict)
    if identity.get("frozen weights") != frozen_digest(avatar, avatar.never_acts):
        raise CheckpointError(
            f"{checkpoint} was trained from other weights than {recipe.model.source} holds now"
        )
    parameters = trained_parameters(avatar)
    trained = _trained(checkpoint, parameters)
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    found = {name: tuple(value.shape) for name, value in trained.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
        raise CheckpointError(f"{checkpoint} belongs to another model: see {wrong[0]} {wrong[1]}")
    return write_result(recipe, avatar, trained, frozen_state(avatar, parameters))


def _trained(checkpoint: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Trained parameters by name, float32: their average, where there is one."""
    if (checkpoint / ShardedState.FOLDER).is_dir():
        found = _from_shards(checkpoint)
    elif (checkpoint / EMA_FILE).exists():
        found = load_average(checkpoint)
    elif (checkpoint / DeepSpeedState.TAG).is_dir():
        found = _from_deepspeed(checkpoint, names)
    else:
        found = load_weights(checkpoint)
    return {name: value.float() for name, value in found.items()}


def _from_shards(checkpoint: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint / ShardedState.FOLDER
    with readable(checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # one process is what is meant
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        kind = "ema." if any(name.startswith("ema.") for name in stored) else "model."
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(kind) and isinstance(entry, TensorStorageMetadata)
        }
        state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(kind): value for name, value in state.items()}


def _from_deepspeed(checkpoint: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    try:
        reader = importlib.import_module("deepspeed.utils.zero_to_fp32")
    except ImportError as error:
        raise InputError(f"{checkpoint} is DeepSpeed's: install deepspeed to export it") from error
    with readable(checkpoint):
        found: dict[str, torch.Tensor] = reader.get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), tag=DeepSpeedState.TAG, exclude_frozen_parameters=True
        )
    return {name: value for name, value in found.items() if name in names}  # not under second names


def _write_embedded(
    recipe: Recipe,
    avatar: TinyAvatar,
    trained: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
) -> Path:
    folder = recipe.output / EMBEDDED
    encoders = load_encoders(recipe.model, torch.device("cpu"))
    with torch.device("meta"):
        written = embedded_avatar(recipe, avatar.transformer.config)
    # What has two names is there by one.
    written.load_state_dict({**frozen, **trained}, strict=False, assign=True)
    written.text_encoder.tie_weights()
    assemble(written, encoders.vae, encoders.speech_encoder, folder)
    return folder


def _save_transformer(
    transformer: StableAvatarTransformer3DModel, state: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """In diffusers' layout; complete under its name, or not there."""
    with torch.device("meta"):
        written = StableAvatarTransformer3DModel.from_config(transformer.config)
    written.load_state_dict(state, assign=True)
    with replacing(folder, alone=True) as partial:
        written.save_pretrained(partial)
