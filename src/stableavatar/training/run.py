"""A recipe into a training: model and data are read, the trainer runs, the result is written.

recipe -> transformer and encoders -> clips (or a cache of them) -> trainer -> transformer or LoRA
"""

import contextlib
import logging
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.checkpoints import loading
from stableavatar.checkpoints.files import read_json
from stableavatar.checkpoints.layout import detect_layout, find_published
from stableavatar.checkpoints.published import sampling_defaults
from stableavatar.config import SIZES
from stableavatar.data.cache import CacheWriter, LatentCache
from stableavatar.data.clips import find_clips, read_path_list
from stableavatar.data.dataset import ClipDataset
from stableavatar.data.encoding import Encoders, stack_samples
from stableavatar.errors import InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.pipeline import AvatarPipeline
from stableavatar.placement.device import DTYPES
from stableavatar.training.avatar import Avatar
from stableavatar.training.checkpoints import list_checkpoints
from stableavatar.training.lora import add_lora, save_lora
from stableavatar.training.parameters import freeze_others, trained_by_recipe
from stableavatar.training.recipes import DataChoice, ModelChoice, Recipe
from stableavatar.training.run_state import whole_tensor
from stableavatar.training.trainer import Trainer, TrainingResult, process_device

logger = logging.getLogger(__name__)

TRANSFORMER = "transformer"
LORA = "lora"


@dataclass(frozen=True)
class Training:
    """A training that is ready to run."""

    recipe: Recipe
    avatar: Avatar
    trainer: Trainer[Any]

    def run(self) -> tuple[TrainingResult, Path]:
        """Train until the end, a signal, or the recipe's minutes; then write the result.

        Returns:
            How it ended, and the transformer's folder or the LoRA's file below `recipe.output`.
        """
        with _stopped_by_signals(self.trainer):
            result = self.trainer.train()
        made = self.export()
        self.trainer.close()
        return result, made

    def export(self) -> Path:
        """Write what was trained; called on every process."""
        trained = self.trainer.final_parameters()
        prefix = "transformer."
        trained = {name.removeprefix(prefix): value for name, value in trained.items()}
        leads = self.trainer.accelerator.is_main_process
        lora, output = self.recipe.lora, self.recipe.output
        if lora is not None:
            return save_lora(trained, lora, output / LORA) if leads else output / LORA
        frozen = {
            name: whole_tensor(value).cpu()
            for name, value in self.avatar.transformer.state_dict().items()
            if name not in trained
        }
        if leads:
            _save_transformer(self.avatar.transformer, {**frozen, **trained}, output / TRANSFORMER)
        return output / TRANSFORMER


def prepare_training(recipe: Recipe, *, resume: bool = False, new_data: bool = False) -> Training:
    """Read model and data.

    Args:
        resume: go on from the newest checkpoint, where there is one.
        new_data: see `Trainer.resume`.

    Raises:
        InputError, CheckpointError: a file that is missing, damaged or does not fit.
    """
    torch.manual_seed(recipe.trainer.seed)
    transformer = load_start(recipe.model)
    if recipe.lora is not None:
        add_lora(transformer, recipe.lora)
    else:
        freeze_others(transformer, trained_by_recipe)
    avatar = Avatar(transformer, recipe.objective)
    device = process_device()
    encoders = None
    source: Any
    collate: Callable[[list[Any]], Any]
    prepare: Callable[[Any, torch.device], Any]
    if recipe.data.cache is not None:
        source, collate = LatentCache(recipe.data.cache), stack_samples
        prepare = _to_device
    else:
        source, collate = open_clips(recipe.data), list
        encoders = load_encoders(recipe.model, transformer, device)
        prepare = _Encode(encoders)
    callbacks = []
    if recipe.validation is not None:
        callbacks.append(ValidationVideos(recipe, avatar, encoders))
    trainer: Trainer[Any] = Trainer(
        avatar, source, collate, recipe.trainer, recipe.output, prepare=prepare, callbacks=callbacks
    )
    if trainer.spread and recipe.objective.audio_output_dropping:
        raise InputError(
            "objective.audio_output_dropping leaves the audio adapter out of some steps on some processes, "
            "which those that hold its parts would wait for: use audio_dropping where a model is spread"
        )
    for callback in callbacks:
        callback.leads = trainer.accelerator.is_main_process
    if resume and list_checkpoints(recipe.output):
        trainer.resume("latest", new_data=new_data)
    return Training(recipe, avatar, trainer)


def load_start(choice: ModelChoice) -> StableAvatarTransformer3DModel:
    """The transformer that a training starts from. Raises CheckpointError."""
    dtype = DTYPES[choice.dtype]
    if detect_layout(choice.source) == "own":
        if choice.variant is not None:
            raise InputError(f"{choice.source} is one model: variant chooses among the published checkpoints")
        return loading.load_transformer(choice.transformer or choice.source / TRANSFORMER, dtype=dtype)
    found = find_published(choice.source)
    base, overlay = found.transformer_files(choice.variant, choice.size)
    overlay = choice.transformer or overlay
    adapter: dict[str, Any] = {}
    if overlay is None:  # no tensor tells the size of an adapter that starts anew
        found.require(None, choice.size, parts=["speech_encoder"])
        speech = read_json(_there(found.speech_encoder) / "config.json")
        adapter["audio_dim"] = speech["hidden_size"]
        adapter["audio_hidden_dim"] = SIZES[choice.size].transformer["audio_hidden_dim"]
    return loading.load_transformer(base, overlay, adapter, dtype=dtype, allow_missing_audio=overlay is None)


def load_encoders(
    choice: ModelChoice, transformer: StableAvatarTransformer3DModel, device: torch.device
) -> Encoders:
    """The frozen encoders of a model. Raises CheckpointError."""
    dtype = DTYPES[choice.encoder_dtype]
    if detect_layout(choice.source) == "own":
        pipeline = AvatarPipeline.from_pretrained(choice.source, dtype=dtype, transformer=transformer)
        parts = pipeline.components
    else:
        found = find_published(choice.source)
        found.require(None, choice.size)
        parts = {
            "vae": loading.load_vae(_there(found.vae), dtype=dtype),
            "text_encoder": loading.load_text_encoder(_there(found.text_encoder), dtype=dtype),
            "tokenizer": loading.load_tokenizer(_there(found.tokenizer)),
            "image_encoder": loading.load_image_encoder(_there(found.image_encoder), dtype=dtype),
            "speech_encoder": loading.load_speech_encoder(_there(found.speech_encoder), dtype=torch.float32),
        }
    names = ("vae", "speech_encoder", "text_encoder", "tokenizer", "image_encoder")
    return Encoders(
        **{name: parts[name] for name in names},
        text_length=transformer.config.text_length,
        device=device,
        offload=choice.offload_encoders,
    )


def open_clips(choice: DataChoice) -> ClipDataset:
    """The clips of a recipe. Raises InputError for what cannot be read."""
    folders = [folder for path in choice.lists for folder in read_path_list(path)]
    folders += [folder for root in choice.folders for folder in find_clips(root)]
    return ClipDataset.from_folders(folders, choice.clips)


def cache_latents(recipe: Recipe, folder: Path, *, passes: int, dtype: torch.dtype) -> int:
    """Encode the clips of a recipe into a cache, or finish one that was begun; the number of samples.

    Args:
        passes: over the data, each with starts and references of its own; a training that goes over the data
            more often begins with the first again.
        dtype: in which latents and features are kept.

    Raises:
        InputError, CheckpointError: see `prepare_training` and `CacheWriter`.
    """
    clips = open_clips(replace(recipe.data, cache=None))
    transformer = load_start(recipe.model)
    encoders = load_encoders(recipe.model, transformer, process_device())
    keys = [(clip, epoch) for clip in range(len(clips)) for epoch in range(passes)]
    CacheWriter(clips, folder, encoders, dtype).write(keys)
    return len(keys)


class ValidationVideos:
    """Makes the recipe's validation videos, with sound, by the sampler that `generate` uses.

    They go to `validation/step-N/` in the output folder.

    Attributes:
        leads: whether this process writes; the others only take part, where the model is spread over them.
    """

    def __init__(self, recipe: Recipe, avatar: Avatar, encoders: Encoders | None) -> None:
        self.recipe, self.avatar, self.encoders = recipe, avatar, encoders
        self.leads = True

    def __call__(self, step: int) -> None:
        assert self.recipe.validation is not None
        folder = self.recipe.output / "validation" / f"step-{step:08d}"
        device = process_device()
        encoders = self.encoders or load_encoders(self.recipe.model, self.avatar.transformer, device)
        for part in encoders.parts.values():
            part.to(device)
        model = self.recipe.model
        pipeline = AvatarPipeline(
            transformer=self.avatar.transformer,
            vae=encoders.vae,
            text_encoder=encoders.text_encoder,
            tokenizer=encoders.tokenizer,
            image_encoder=encoders.image_encoder,
            speech_encoder=encoders.speech_encoder,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.recipe.objective.shift),
            sampling_defaults=sampling_defaults(model.variant or "square", model.size),
        )
        precision = self.recipe.trainer.precision
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"))
            if not self.leads:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            for number, case in enumerate(self.recipe.validation.cases):
                options = {"seed": 0, **self.recipe.validation.options}
                pipeline.generate(
                    case.portrait,
                    case.speech,
                    folder / f"{number:02d}-{case.portrait.stem}.mp4",
                    resume=False,
                    prompt=case.prompt,
                    duration=case.seconds,
                    **options,
                )
        if self.encoders is not None and self.encoders.offload:
            for part in self.encoders.parts.values():
                part.to("cpu")
        logger.info("validation videos of step %d: %s", step, folder)


class _Encode:
    """Encodes a list of samples as they come from disk."""

    def __init__(self, encoders: Encoders) -> None:
        self.encoders = encoders

    def __call__(self, samples: list[Any], _device: torch.device) -> Any:
        return self.encoders.encode(samples)


def _to_device(batch: Any, device: torch.device) -> Any:
    return batch.to(device)


def _save_transformer(
    transformer: StableAvatarTransformer3DModel, state: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """In diffusers' layout; complete under its name, or not there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with torch.device("meta"):
        written = StableAvatarTransformer3DModel.from_config(transformer.config)
    written.load_state_dict(state, assign=True)
    written.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


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


def _there(path: Path | None) -> Path:
    assert path is not None  # `require` has seen to it
    return path
