"""What a training starts from: the transformer or an embedded model, encoders, and clips or a cache of
them."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from stableavatar.checkpoints import loading
from stableavatar.checkpoints.files import read_json
from stableavatar.checkpoints.layout import find_published, is_own, model_folder
from stableavatar.config import SIZES
from stableavatar.data.cache import CachedWindows, LatentCache
from stableavatar.data.clips import find_clips, read_path_list
from stableavatar.data.dataset import ClipDataset, Item, Share
from stableavatar.data.encoding import Encoders
from stableavatar.data.puppets import ClipStore
from stableavatar.errors import InputError
from stableavatar.media.files import file_fingerprint
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.pipeline import AvatarPipeline
from stableavatar.placement.device import DTYPES
from stableavatar.placement.slow_kernels import avoid_slow_kernels
from stableavatar.training.avatar import Avatar
from stableavatar.training.devices import process_device
from stableavatar.training.lora import add_lora
from stableavatar.training.parameters import freeze_others, trained_by_recipe
from stableavatar.training.recipes import DataChoice, ModelChoice, Recipe
from stableavatar.training.tiny.avatar import TinyAvatar
from stableavatar.training.tiny.feature_memory import use_training_kernels

logger = logging.getLogger(__name__)

TRANSFORMER = "transformer"
ENCODERS = ("vae", "speech_encoder", "text_encoder", "image_encoder")
TEXT_ENCODER = "text_encoder"


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
    text_encoder = model_folder(recipe.model.source) / TEXT_ENCODER
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
    cache.check_files(encoder_files(recipe.model))
    if encoders is not None:
        cache.check_encoders(encoders)
    origin = cache.manifest["origin"]
    clips = asdict(recipe.data.clips)
    drawn = ("frames", "portrait", "any_frame", "seed")
    for name, stored, wanted in (
        *((f"clips.{name}", origin["dataset"][name], clips[name]) for name in drawn),
        ("window_frames", origin["window_frames"], recipe.data.window_frames),
    ):
        if stored != wanted:
            raise InputError(
                f"{cache.folder} was made with data.{name} {stored}, and the recipe has {wanted}"
            )
    sizes = recipe.data.pixel_sizes
    for width, height, _ in cache.groups:
        if sizes is not None and (int(width), int(height)) not in sizes:
            raise InputError(
                f"{cache.folder} holds clips of {width}x{height} pixels, none of the recipe's data.sizes"
            )
    if recipe.objective.mask_loss != "none" and not origin["dataset"]["masks"]:
        raise InputError(
            f"{cache.folder} was made without masks, which objective.mask_loss "
            f"{recipe.objective.mask_loss} needs"
        )
    return cache if recipe.data.window_frames is None else CachedWindows(cache, recipe.trainer.seed)


def start_device(recipe: Recipe, *, leads: bool) -> str:
    """Where a process reads the transformer to: of a spread one all get the first's (`shard_module`)."""
    return "meta" if recipe.trainer.sharding == "fsdp2" and not leads else "cpu"


def load_start(choice: ModelChoice, device: str = "cpu") -> StableAvatarTransformer3DModel:
    """The transformer that a training starts from, on a CPU unless told otherwise; on "meta" without its
    values. Raises CheckpointError."""
    dtype = DTYPES[choice.dtype]
    source = model_folder(choice.source)
    if is_own(source):
        if choice.variant is not None:
            raise InputError(f"{source} is one model: variant chooses among the published checkpoints")
        whole = choice.transformer or source / TRANSFORMER
        return loading.load_transformer(whole, dtype=dtype, device=device)
    found = find_published(source)
    base, overlay = _transformer_files(choice)
    adapter: dict[str, Any] = {}
    if overlay is None:  # no tensor tells the size of an adapter that starts anew
        found.require(None, choice.size, parts=["speech_encoder"])
        speech = read_json(_there(found.speech_encoder) / "config.json")
        adapter["audio_dim"] = speech["hidden_size"]
        adapter["audio_hidden_dim"] = SIZES[choice.size].transformer["audio_hidden_dim"]
    return loading.load_transformer(
        base, overlay, adapter, dtype=dtype, device=device, allow_missing_audio=overlay is None
    )


def start_avatar(recipe: Recipe, device: str = "cpu") -> Avatar:
    """What a training of a transformer starts from, with what is trained marked so.

    Args:
        device: "meta": without its values.

    Raises:
        InputError, CheckpointError: a file that is missing, damaged or does not fit.
    """
    transformer = load_start(recipe.model, device)
    if recipe.lora is not None:
        add_lora(transformer, recipe.lora, train_adapter=starts_adapter(recipe.model))
    else:
        freeze_others(transformer, trained_by_recipe)
    return Avatar(transformer, recipe.objective)


def starts_adapter(choice: ModelChoice) -> bool:
    """Whether the training starts from a base model, which has no audio adapter yet."""
    if choice.embedded is not None or is_own(model_folder(choice.source)):
        return False
    return _transformer_files(choice)[1] is None


def _transformer_files(choice: ModelChoice) -> tuple[Path, Path | None]:
    """Of the published checkpoints the base model's, and those of a transformer that hears, or None."""
    base, overlay = find_published(choice.source).transformer_files(choice.variant, choice.size)
    return base, choice.transformer or overlay


def encoder_files(choice: ModelChoice) -> str | None:
    """A digest of the files of a model's frozen encoders, read in part; None where they are not all there."""
    source = model_folder(choice.source)
    names = ENCODERS[:2] if choice.embedded is not None else ENCODERS
    if choice.embedded is not None or is_own(source):
        parts = [source / name for name in names]
    else:
        found = find_published(source)
        parts = [path for name in names if (path := getattr(found, name)) is not None]
    if len(parts) < len(names) or not all(part.exists() for part in parts):
        return None
    digest = hashlib.sha256()
    for name, part in zip(names, parts, strict=True):
        for file in sorted(it for it in (part, *part.rglob("*")) if it.is_file()):
            digest.update(f"{name}/{file.relative_to(part).as_posix()} {file_fingerprint(file)}".encode())
    return digest.hexdigest()


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
    elif is_own(source):
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
    if choice.embedded is None and is_own(source):
        config = (choice.transformer or source / TRANSFORMER) / "config.json"
        if config.is_file():
            return int(read_json(config)["text_length"])
    return int(SIZES[choice.size].transformer["text_length"])


def open_clips(choice: DataChoice) -> ClipDataset:
    """The clips of a recipe. Raises InputError for what cannot be read."""
    folders = [folder for path in choice.lists for folder in read_path_list(path)]
    folders += [folder for root in choice.folders for folder in find_clips(root)]
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(folder.resolve(), folder)
    if len(once) < len(folders):
        logger.warning(
            "%d of %d clips are named more than once: each is taken once. (Caches and runs of versions that "
            "took it as often cannot be gone on with.)",
            len(folders) - len(once),
            len(folders),
        )
    puppets = (
        (str(folder), partial(store.__getitem__, index))
        for store in map(ClipStore, choice.puppets)
        for index, folder in enumerate(store.folders)
    )
    return ClipDataset.from_folders(
        once.values(), choice.clips, others=puppets, sizes=choice.pixel_sizes, share=_Processes()
    )


class _Processes(Share):
    """Those of this training, as accelerate knows them."""

    def __init__(self) -> None:
        process_device()  # where it was not asked for before: accelerate keeps what it is first told
        state = PartialState()
        self.process, self.processes = state.process_index, state.num_processes

    def gather(self, items: list[Item]) -> list[Item]:
        gathered: list[Item] = gather_object(items)
        return gathered


def _there(path: Path | None) -> Path:
    assert path is not None  # `require` has seen to it
    return path
