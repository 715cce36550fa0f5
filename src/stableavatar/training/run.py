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
from typing import Any, Literal

import torch
from accelerate import PartialState, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import broadcast_object_list
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.checkpoints import loading
from stableavatar.checkpoints.files import read_json
from stableavatar.checkpoints.layout import detect_layout, find_published
from stableavatar.checkpoints.published import sampling_defaults
from stableavatar.config import SIZES
from stableavatar.data.cache import CachedWindows, CacheWriter, LatentCache
from stableavatar.data.clips import FolderClip, TrainingClip, find_clips, read_path_list
from stableavatar.data.dataset import ClipDataset
from stableavatar.data.encoding import Encoders, stack_samples
from stableavatar.data.puppets import ClipStore
from stableavatar.errors import InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.pipeline import TINY, AvatarPipeline, check_options
from stableavatar.placement.device import DTYPES
from stableavatar.placement.slow_kernels import avoid_slow_kernels
from stableavatar.training.avatar import Avatar
from stableavatar.training.checkpoints import list_checkpoints
from stableavatar.training.devices import process_device
from stableavatar.training.efficiency import use_explicit_attention
from stableavatar.training.lora import add_lora, save_lora
from stableavatar.training.parameters import freeze_others, frozen_digest, trained_by_recipe
from stableavatar.training.recipes import DataChoice, ModelChoice, Recipe
from stableavatar.training.tiny.assemble import assemble, embedded_pipeline
from stableavatar.training.tiny.avatar import TinyAvatar
from stableavatar.training.tiny.feature_memory import use_training_kernels
from stableavatar.training.trainer import Trainer, TrainingResult

logger = logging.getLogger(__name__)

TRANSFORMER = "transformer"
LORA = "lora"
EMBEDDED = "model"
TEXT_ENCODER = "text_encoder"


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
        with _stopped_by_signals(self.trainer):
            result = self.trainer.train()
        made = self.export()
        self.trainer.close()
        return result, made

    def export(self) -> Path:
        """Write what was trained; called on every process."""
        trained = self.trainer.final_parameters()
        if isinstance(self.avatar, TinyAvatar):
            return self._export_embedded(self.avatar, trained)
        prefix = "transformer."
        trained = {name.removeprefix(prefix): value for name, value in trained.items()}
        leads = self.trainer.accelerator.is_main_process
        lora, output = self.recipe.lora, self.recipe.output
        if lora is not None:
            return save_lora(trained, lora, output / LORA) if leads else output / LORA
        frozen = {name.removeprefix(prefix): value for name, value in self.trainer.frozen_state().items()}
        if leads:
            _save_transformer(self.avatar.transformer, {**frozen, **trained}, output / TRANSFORMER)
        return output / TRANSFORMER

    def _export_embedded(self, avatar: TinyAvatar, trained: Mapping[str, torch.Tensor]) -> Path:
        folder = self.recipe.output / EMBEDDED
        frozen = self.trainer.frozen_state()
        if self.trainer.accelerator.is_main_process:
            encoders = load_encoders(self.recipe.model, torch.device("cpu"))
            with torch.device("meta"):
                written = embedded_avatar(self.recipe, avatar.transformer.config)
            # What has two names is there by one.
            written.load_state_dict({**frozen, **trained}, strict=False, assign=True)
            written.text_encoder.tie_weights()
            assemble(written, encoders.vae, encoders.speech_encoder, folder)
        return folder


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
    torch.manual_seed(recipe.trainer.seed)
    device = process_device(recipe.trainer)
    leads = PartialState().is_main_process
    encoders = None
    if recipe.model.embedded is None:
        transformer = load_start(recipe.model, start_device(recipe, leads=leads))
        if recipe.lora is not None:
            add_lora(transformer, recipe.lora)
        else:
            freeze_others(transformer, trained_by_recipe)
        avatar = Avatar(transformer, recipe.objective)
    else:
        encoders = load_encoders(recipe.model, device)
        avatar = start_embedded(recipe, encoders)
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
        videos = ValidationVideos(recipe, avatar, encoders)
        videos.check()
        callbacks.append(videos)
    frozen = [frozen_digest(avatar, avatar.never_acts) if leads else ""]
    identity = {"frozen weights": broadcast_object_list(frozen)[0]}
    if recipe.lora is not None:
        identity["lora"] = f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha or recipe.lora.rank}"
    trainer: Trainer[Any] = Trainer(
        avatar,
        source,
        collate,
        recipe.trainer,
        recipe.output,
        prepare=prepare,
        identity=identity,
        callbacks=callbacks,
    )
    if trainer.spread and recipe.objective.audio_output_dropping:
        raise InputError(
            "objective.audio_output_dropping leaves the audio adapter out of some steps on some processes, "
            "which those that hold its parts would wait for: use audio_dropping where a model is spread"
        )
    for callback in callbacks:
        callback.leads = trainer.accelerator.is_main_process
    if resume == "latest" and not list_checkpoints(recipe.output):
        logger.warning("%s holds no checkpoint yet: the training begins at step 0", recipe.output)
    elif resume is not None:
        trainer.resume(resume, new_data=new_data)
    return Training(recipe, avatar, trainer)


def embedded_avatar(recipe: Recipe, sizes: Mapping[str, Any]) -> TinyAvatar:
    """The untrained parts of an embedded model for an autoencoder and a speech encoder of these sizes."""
    assert recipe.model.embedded is not None
    return TinyAvatar(
        recipe.objective,
        heads=recipe.model.embedded.heads,
        layers=recipe.model.embedded.layers,
        audio_dim=sizes["audio_dim"],
        latent_channels=sizes["out_channels"],
    )


def start_embedded(recipe: Recipe, encoders: Encoders) -> TinyAvatar:
    """The embedded model that a training starts from. Raises CheckpointError, InputError."""
    sizes = {
        "audio_dim": encoders.speech_encoder.config.hidden_size,
        "out_channels": encoders.vae.config.z_dim,
    }
    avatar = embedded_avatar(recipe, sizes)
    assert recipe.model.embedded is not None
    if recipe.model.embedded.start is not None:
        avatar.start_from(model_folder(recipe.model.embedded.start))
    text_encoder = recipe.model.source / TEXT_ENCODER
    if text_encoder.is_dir():
        avatar.take_text_encoder(text_encoder)
    return avatar


def open_cache(recipe: Recipe, encoders: Encoders | None) -> Any:
    """The cache of a recipe, or windows of its samples, checked against what of the encoders is there.

    Raises:
        InputError: there is none, or it was made otherwise.
    """
    assert recipe.data.cache is not None
    cache = LatentCache(recipe.data.cache)
    if encoders is not None:
        cache.check_encoders(encoders)
    origin = cache.manifest["origin"]
    for name, stored, wanted in (
        ("clips.frames", origin["dataset"]["frames"], recipe.data.clips.frames),
        ("window_frames", origin["window_frames"], recipe.data.window_frames),
    ):
        if stored != wanted:
            raise InputError(
                f"{cache.folder} was made with data.{name} {stored}, and the recipe has {wanted}"
            )
    if recipe.objective.mask_loss != "none" and not origin["dataset"]["masks"]:
        raise InputError(
            f"{cache.folder} was made without masks, which objective.mask_loss "
            f"{recipe.objective.mask_loss} needs"
        )
    return cache if recipe.data.window_frames is None else CachedWindows(cache, recipe.trainer.seed)


def model_folder(source: Path) -> Path:
    """The folder of a model; the embedded one's for `tiny`."""
    return TINY if str(source) == "tiny" else source


def start_device(recipe: Recipe, *, leads: bool) -> str:
    """Where a process reads the transformer to: of a spread one all get the first's (`shard_module`)."""
    return "meta" if recipe.trainer.sharding == "fsdp2" and not leads else "cpu"


def load_start(choice: ModelChoice, device: str = "cpu") -> StableAvatarTransformer3DModel:
    """The transformer that a training starts from, on a CPU unless told otherwise; on "meta" without its
    values. Raises CheckpointError."""
    dtype = DTYPES[choice.dtype]
    source = model_folder(choice.source)
    if detect_layout(source) == "own":
        if choice.variant is not None:
            raise InputError(f"{source} is one model: variant chooses among the published checkpoints")
        whole = choice.transformer or source / TRANSFORMER
        return loading.load_transformer(whole, dtype=dtype, device=device)
    found = find_published(source)
    base, overlay = found.transformer_files(choice.variant, choice.size)
    overlay = choice.transformer or overlay
    adapter: dict[str, Any] = {}
    if overlay is None:  # no tensor tells the size of an adapter that starts anew
        found.require(None, choice.size, parts=["speech_encoder"])
        speech = read_json(_there(found.speech_encoder) / "config.json")
        adapter["audio_dim"] = speech["hidden_size"]
        adapter["audio_hidden_dim"] = SIZES[choice.size].transformer["audio_hidden_dim"]
    return loading.load_transformer(
        base, overlay, adapter, dtype=dtype, device=device, allow_missing_audio=overlay is None
    )


def load_encoders(choice: ModelChoice, device: torch.device) -> Encoders:
    """The frozen encoders of a model; of an embedded one, whose others are trained, autoencoder and speech
    encoder. Raises CheckpointError."""
    dtype = DTYPES[choice.encoder_dtype]
    source = model_folder(choice.source)
    parts: dict[str, Any]
    if choice.embedded is not None:
        parts = {
            "vae": loading.load_vae(source / "vae", dtype=dtype),
            "speech_encoder": loading.load_speech_encoder(source / "speech_encoder", dtype=torch.float32),
        }
    elif detect_layout(source) == "own":
        pipeline = AvatarPipeline.from_pretrained(source, dtype=dtype, transformer=None)
        names = ("vae", "speech_encoder", "text_encoder", "tokenizer", "image_encoder")
        parts = {name: pipeline.components[name] for name in names}
    else:
        found = find_published(source)
        found.require(None, choice.size)
        parts = {
            "vae": loading.load_vae(_there(found.vae), dtype=dtype),
            "text_encoder": loading.load_text_encoder(_there(found.text_encoder), dtype=dtype),
            "tokenizer": loading.load_tokenizer(_there(found.tokenizer)),
            "image_encoder": loading.load_image_encoder(_there(found.image_encoder), dtype=dtype),
            "speech_encoder": loading.load_speech_encoder(_there(found.speech_encoder), dtype=torch.float32),
        }
    if device.type == "cpu":
        (avoid_slow_kernels if parts["vae"].dtype == torch.float32 else use_training_kernels)(parts["vae"])
    return Encoders(
        **parts,
        text_length=_text_length(choice),
        device=device,
        offload=choice.offload_encoders,
    )


def _text_length(choice: ModelChoice) -> int:
    """How many tokens of a prompt the transformer takes; embedded models encode their prompts themselves."""
    source = model_folder(choice.source)
    if choice.embedded is None and detect_layout(source) == "own":
        config = (choice.transformer or source / TRANSFORMER) / "config.json"
        if config.is_file():
            return int(read_json(config)["text_length"])
    return int(SIZES[choice.size].transformer["text_length"])


def open_clips(choice: DataChoice) -> ClipDataset:
    """The clips of a recipe. Raises InputError for what cannot be read."""
    folders = [folder for path in choice.lists for folder in read_path_list(path)]
    folders += [folder for root in choice.folders for folder in find_clips(root)]
    if not choice.puppets:
        return ClipDataset.from_folders(folders, choice.clips)
    clips: list[TrainingClip] = [clip for store in choice.puppets for clip in ClipStore(store)]
    return ClipDataset([*clips, *map(FolderClip.open, folders)], choice.clips)


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
    clips = open_clips(replace(recipe.data, cache=None))
    encoders = load_encoders(recipe.model, process_device(recipe.trainer))
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
        )
    state.wait_for_everyone()
    writer.write(keys)
    state.wait_for_everyone()
    writer.finish(keys)
    state.destroy_process_group()
    return len(keys) if state.is_main_process else None


class ValidationVideos:
    """Makes the recipe's validation videos, with sound, by the sampler that `generate` uses.

    They go to `validation/step-N/` in the output folder.

    Attributes:
        leads: whether this process writes; the others only take part, where the model is spread over them.
    """

    def __init__(self, recipe: Recipe, avatar: Avatar, encoders: Encoders | None) -> None:
        self.recipe, self.avatar, self.encoders = recipe, avatar, encoders
        self.leads = True

    def check(self) -> None:
        """Before a training that would come upon it hours later. Raises InputError: a portrait or a recording
        is not there, or `generate` has no such option or value."""
        assert self.recipe.validation is not None
        for case in self.recipe.validation.cases:
            for file in (case.portrait, case.speech):
                if not file.is_file():
                    raise InputError(f"validation: there is no file {file}")
        options = self.recipe.validation.options
        for name, place in (("prompt", "prompt"), ("duration", "seconds")):
            if name in options:
                raise InputError(f"validation: {name} belongs to a case, as its {place}, not to the options")
        check_options(options)

    def __call__(self, step: int) -> None:
        assert self.recipe.validation is not None
        folder = self.recipe.output / "validation" / f"step-{step:08d}"
        device = process_device()
        encoders = self.encoders or load_encoders(self.recipe.model, device)
        pipeline = self._pipeline(encoders)
        precision = self.recipe.trainer.precision
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"))
            stack.enter_context(_placed(encoders, device))
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
        logger.info("validation videos of step %d: %s", step, folder)

    def _pipeline(self, encoders: Encoders) -> AvatarPipeline:
        """The model as it stands, with the settings for sampling that belong to it."""
        model = self.recipe.model
        if isinstance(self.avatar, TinyAvatar):
            return embedded_pipeline(self.avatar, encoders.vae, encoders.speech_encoder)
        source = model_folder(model.source)
        if detect_layout(source) == "own":
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(source, subfolder="scheduler")
            defaults = AvatarPipeline.load_config(source).get("sampling_defaults")
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=self.recipe.objective.shift)
            defaults = sampling_defaults(model.variant or "square", model.size)
        return AvatarPipeline(
            transformer=self.avatar.transformer,
            vae=encoders.vae,
            text_encoder=encoders.text_encoder,
            tokenizer=encoders.tokenizer,
            image_encoder=encoders.image_encoder,
            speech_encoder=encoders.speech_encoder,
            scheduler=scheduler,
            sampling_defaults=defaults,
        )


@contextlib.contextmanager
def _placed(encoders: Encoders, device: torch.device) -> Iterator[None]:
    """The encoders where a pipeline needs them: on the device, or, if they are offloaded, one at a time."""
    parts = list(encoders.parts.values())
    if not encoders.offload:
        for part in parts:
            part.to(device)
        yield
        return
    before = None
    for part in parts:
        _, before = cpu_offload_with_hook(part, device, before)
    try:
        yield
    finally:
        for part in parts:
            remove_hook_from_module(part)
            part.to("cpu")


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
