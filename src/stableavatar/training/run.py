"""A recipe into a training: model and data are read, the trainer runs, the result is written.

recipe -> transformer and encoders -> clips (or a cache of them) -> trainer -> transformer or LoRA
"""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from stableavatar.data.cache import CacheWriter
from stableavatar.data.encoding import Encoders, stack_samples
from stableavatar.errors import InputError, StableAvatarError
from stableavatar.media.files import check_folder
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.avatar import Avatar
from stableavatar.training.devices import process_device
from stableavatar.training.efficiency import use_explicit_attention
from stableavatar.training.parameters import frozen_digest
from stableavatar.training.recipes import Recipe
from stableavatar.training.result import is_pure_lora, write_result
from stableavatar.training.start import (
    encoder_files,
    load_encoders,
    open_cache,
    open_clips,
    start_avatar,
    start_device,
    start_embedded,
)
from stableavatar.training.trainer import Trainer, TrainingResult
from stableavatar.training.validation import ValidationVideos

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """A training that is ready to run."""

    recipe: Recipe
    avatar: Avatar
    trainer: Trainer[Any]

    def run(self) -> tuple[TrainingResult, Path]:
        """Train until the end, a signal, or the recipe's minutes; then write the result.

        Returns:
            How it ended, and the folder of the transformer, or of the embedded model, or the LoRA's file,
            below `recipe.output`.
        """
        try:
            with self.trainer.run_folder.held():
                with _stopped_by_signals(self.trainer):
                    result = self.trainer.train()
                return result, self.export()
        except Exception as error:
            if self.trainer.accelerator.num_processes > 1:  # which closing may wait for
                logger.error("ends: %s", error, exc_info=not isinstance(error, StableAvatarError))
            raise
        finally:  # after an error too: a process that hung at its end would keep the others
            self.trainer.close()

    def export(self) -> Path:
        """Write what was trained; called on every process, of which the first learns where it is."""
        trained = self.trainer.final_parameters()
        # Of a LoRA alone they are not written, and may be tens of GiB.
        frozen = {} if is_pure_lora(self.recipe, self.trainer.parameters) else self.trainer.frozen_state()
        if self.trainer.accelerator.is_main_process:
            return write_result(self.recipe, self.avatar, trained, frozen)
        return self.recipe.output


def prepare_training(
    recipe: Recipe, *, resume: Path | Literal["latest"] | None = None, new_data: bool = False
) -> Training:
    """Read model and data.

    Args:
        resume: go on from a checkpoint; `latest`: from the newest one in `recipe.output`, and from the
            beginning where there is none.
        new_data: see `Trainer.resume`.

    Raises:
        InputError, CheckpointError: a file that is missing, damaged or does not fit.
    """
    check_folder(recipe.output)  # what would be found out after hours
    if recipe.validation is not None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise InputError(
            "validation: no videos can be made where accelerate's own FSDP spreads the model: use torchrun "
            "and --set trainer.sharding=fsdp2, or leave validation out"
        )
    torch.manual_seed(recipe.trainer.seed)
    device = process_device(recipe.trainer)
    leads = PartialState().is_main_process
    encoders = None
    if recipe.model.embedded is None:
        avatar = start_avatar(recipe, start_device(recipe, leads=leads))
    else:
        encoders = load_encoders(recipe.model, device)
        avatar = start_embedded(recipe, encoders)
    logger.info("trains %s", _in_words(avatar.transformer))
    if device.type == "cpu":
        use_explicit_attention(avatar)
    source: Any
    collate: Callable[[list[Any]], Any]
    prepare: Callable[[Any, torch.device], Any]
    if recipe.data.cache is not None:
        source, collate = open_cache(recipe, encoders), stack_samples
        prepare = _to_device
    else:
        if recipe.data.window_frames is not None:
            raise InputError("data: window_frames are of a cache: make one with stableavatar cache-latents")
        source, collate = open_clips(recipe.data), list
        encoders = encoders or load_encoders(recipe.model, device)
        prepare = _Encode(encoders)
    callbacks = []
    if recipe.validation is not None:
        sizes = [(int(width), int(height)) for width, height, _ in source.groups]
        videos = ValidationVideos(recipe, avatar, encoders, sizes)
        videos.check()
        callbacks.append(videos)
    frozen = [frozen_digest(avatar, avatar.never_acts) if leads else ""]
    identity = {"frozen weights": broadcast_object_list(frozen)[0]}
    if recipe.lora is not None:
        identity["lora"] = f"rank {recipe.lora.rank}, alpha {float(recipe.lora.alpha or recipe.lora.rank)}"
    trainer: Trainer[Any] = Trainer(
        avatar,
        source,
        collate,
        recipe.trainer,
        recipe.output,
        prepare=prepare,
        identity=identity,
        callbacks=callbacks,
        record=asdict(recipe),
    )
    if (trainer.spread or trainer.deepspeed) and recipe.objective.audio_output_dropping:
        raise InputError(
            "objective.audio_output_dropping leaves the audio adapter out of some steps on some processes, "
            "which the others would wait for: use audio_dropping with DeepSpeed, and where a model is spread"
        )
    for callback in callbacks:
        callback.leads = trainer.accelerator.is_main_process
    if resume == "latest" and not trainer.checkpoints():
        logger.warning("%s holds no checkpoint yet: the training begins at step 0", recipe.output)
    elif resume is not None:
        trainer.resume(resume, new_data=new_data)
    return Training(recipe, avatar, trainer)


def cache_latents(recipe: Recipe, folder: Path, *, passes: int, dtype: torch.dtype) -> int | None:
    """Encode the clips of a recipe into a cache, or finish one that was begun; the number of samples. Several
    processes, as torchrun or accelerate starts them, share the work; None in all but the first.

    Args:
        passes: over the data, each with starts and references of its own; a training that goes over the data
            more often begins with the first again.
        dtype: in which latents and features are kept.

    Raises:
        InputError, CheckpointError: see `prepare_training` and `CacheWriter`.
    """
    check_folder(folder)
    device = process_device(recipe.trainer)
    clips = open_clips(replace(recipe.data, cache=None))
    encoders = load_encoders(recipe.model, device)
    keys = [(clip, epoch) for clip in range(len(clips)) for epoch in range(passes)]
    state = PartialState()
    with state.main_process_first():
        writer = CacheWriter(
            clips,
            folder,
            encoders,
            dtype,
            window_frames=recipe.data.window_frames,
            process=state.process_index,
            processes=state.num_processes,
            encoder_files=encoder_files(recipe.model),
        )
    with contextlib.closing(writer):
        state.wait_for_everyone()
        writer.write(keys)
        state.wait_for_everyone()
        writer.finish(keys)
    state.destroy_process_group()
    return len(keys) if state.is_main_process else None


def _in_words(transformer: StableAvatarTransformer3DModel) -> str:
    """What a transformer is: of a model's own folder the recipe's `model.size` does not say it."""
    config = transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    count = sum(parameter.numel() for parameter in transformer.parameters())
    return (
        f"a transformer of {config['num_layers']} layers, {width} wide, {count / 1e6:,.1f} million parameters"
    )


class _Encode:
    """Encodes a list of samples as they come from disk."""

    def __init__(self, encoders: Encoders) -> None:
        self.encoders = encoders

    def __call__(self, samples: list[Any], _device: torch.device) -> Any:
        return self.encoders.encode(samples)


def _to_device(batch: Any, device: torch.device) -> Any:
    return batch.to(device)


@contextlib.contextmanager
def _stopped_by_signals(trainer: Trainer[Any]) -> Iterator[None]:
    """SIGTERM and Ctrl-C end a training after its step, with a checkpoint."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    for name in before:
        signal.signal(name, lambda *_: trainer.request_stop())
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
