"""Models out of checkpoints: published files, base models in diffusers layout, this project's own folders.

Every loader takes a file or a folder, reads it with `read_state_dict` (nothing in it is executed), gives its
tensors our names, builds the model without memory for its parameters, and puts the tensors in their places. A
tensor that is missing, surplus or misshapen is an error that names it. Sizes come from `config` if given,
else from a ``config.json`` in the folder or beside the file, else from shapes (`shapes`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from stableavatar.checkpoints import names, shapes
from stableavatar.checkpoints.files import FLOAT8_DTYPES, read_json, read_state_dict
from stableavatar.checkpoints.names import StateDict
from stableavatar.errors import CheckpointError
from stableavatar.models.transformer import StableAvatarTransformer3DModel

logger = logging.getLogger(__name__)

# Seed of an audio adapter that starts from nothing: training runs from the bare base start alike.
FRESH_ADAPTER_SEED = 20250808

ModelT = TypeVar("ModelT", bound=nn.Module)
Device = torch.device | str

# What 8-bit weights become where no dtype is asked for.
_EXPANDED_DTYPE = torch.bfloat16

# What constructors of models raise for settings of another type, out of range, or that contradict each other.
_SETTINGS_ERRORS = (
    StrictDataclassError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)

# How many tensors an error names before it only counts the rest.
_NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class _Tensors:
    """Tensors under our names, and the file that each of them came from."""

    state: StateDict
    sources: dict[str, Path]
    main: Path

    def overlaid(self, other: _Tensors) -> _Tensors:
        return _Tensors({**self.state, **other.state}, {**self.sources, **other.sources}, self.main)


def load_transformer(
    base: Path | str,
    overlay: Path | str | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: Device = "cpu",
    allow_missing_audio: bool = False,
) -> StableAvatarTransformer3DModel:
    """The audio-driven video transformer (`spec/3-checkpoints.md`).

    Args:
        base: the Wan base (a file, a folder with one file or shards; published or diffusers names), or a
            complete transformer in any of the layouts, this project's own folder included.
        overlay: a file of StableAvatar, ``transformer3d-*.pt`` for example, whose tensors replace or complete
            those of the base.
        config: constructor keywords, or a published ``config.json`` as a dict, where they are not to be read
            from files and shapes. Only what is given is fixed; the rest is still read.
        dtype: of the parameters; None for the one that most of them are stored in (bfloat16 where that is 8
            bits or GGUF). Timestep embedding, norms and modulation of the
            blocks stay in float32.
        device: where the parameters go.
        allow_missing_audio: let the audio side be absent, to train it from the plain video model: its keys
            and values in the blocks start at zero, the adapter from a fixed seed.

    Raises:
        CheckpointError: unreadable files; missing, surplus or misshapen tensors; a base without audio when
            `allow_missing_audio` is False.
    """
    tensors = _read("transformer", base, dtype)
    if overlay is not None:
        tensors = tensors.overlaid(_read("transformer", overlay, dtype))
    given = dict(config or {})
    with settings_of(tensors.main):
        if "dim" in given or "num_heads" in given:
            given = names.transformer_config_to_ours(given)
        known = {**_untold_settings(Path(base)), **given}
        settings = shapes.transformer_settings(tensors.state, tensors.main, known)
    model = _build(lambda: StableAvatarTransformer3DModel(**settings), tensors.main)
    if not any(names.is_audio_name(name) for name in tensors.state):
        if not allow_missing_audio:
            raise CheckpointError(
                f"{tensors.main}: is a plain video model without the audio tensors (vocal_projector, k_vocal,"
                " v_vocal): give StableAvatar's transformer3d-square.pt or transformer3d-rec-vec.pt as well"
            )
        fresh = _fresh_audio(model, settings, device)
        logger.info("%s: its %d audio tensors are absent and start anew", tensors.main, len(fresh))
        tensors = tensors.overlaid(_Tensors(fresh, dict.fromkeys(fresh, tensors.main), tensors.main))
    return _place(model, tensors, dtype, device)


def load_vae(
    path: Path | str,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: Device = "cpu",
) -> AutoencoderKLWan:
    """The video autoencoder from ``Wan2.1_VAE.pth``, a file of the same names, or a diffusers folder.

    Args:
        path: file or folder.
        config: keywords of ``AutoencoderKLWan``, where they are not to be read from ``config.json`` or
            shapes.

    Raises:
        CheckpointError: see `load_transformer`.
    """
    tensors = _read("vae", path, dtype)
    settings = _settings(path, config) or shapes.vae_settings(tensors.state, tensors.main)
    model = _build(lambda: AutoencoderKLWan.from_config(dict(settings)), tensors.main)
    return _place(model, tensors, dtype, device)


def load_text_encoder(
    path: Path | str,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: Device = "cpu",
) -> UMT5EncoderModel:
    """The prompt encoder from ``models_t5_umt5-xxl-enc-bf16.pth``, a file of the same names, or a folder.

    Args:
        path: file or folder.
        config: keywords of ``UMT5Config``, where they are not to be read from ``config.json`` or shapes.

    Raises:
        CheckpointError: see `load_transformer`.
    """
    tensors = _read("text_encoder", path, dtype)
    settings = _settings(path, config) or shapes.text_encoder_settings(tensors.state, tensors.main)
    model = _build(lambda: UMT5EncoderModel(UMT5Config.from_dict(dict(settings))), tensors.main)
    return _place(model, tensors, dtype, device)


def load_image_encoder(
    path: Path | str,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: Device = "cpu",
) -> CLIPVisionModel:
    """The portrait encoder from ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``, or a folder.

    Only the visual tower is kept, without its head.

    Args:
        path: file or folder.
        config: keywords of ``CLIPVisionConfig``, where they are not to be read from ``config.json`` or
            shapes.

    Raises:
        CheckpointError: see `load_transformer`.
    """
    tensors = _read("image_encoder", path, dtype)
    settings = _settings(path, config) or shapes.image_encoder_settings(tensors.state, tensors.main)
    model = _build(lambda: CLIPVisionModel(CLIPVisionConfig.from_dict(dict(settings))), tensors.main)
    return _place(model, tensors, dtype, device)


def load_speech_encoder(
    path: Path | str,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: Device = "cpu",
) -> Wav2Vec2Model:
    """The speech encoder from a transformers folder such as ``wav2vec2-base-960h``, without its head.

    Args:
        path: the folder, or a file of tensors.
        config: keywords of ``Wav2Vec2Config``; needed for a file without a ``config.json``.

    Raises:
        CheckpointError: no settings; see also `load_transformer`.
    """
    tensors = _read("speech_encoder", path, dtype)
    settings = _settings(path, config)
    if settings is None:
        raise CheckpointError(f"{path}: has no config.json, which a speech encoder needs")
    model = _build(lambda: Wav2Vec2Model(Wav2Vec2Config.from_dict(dict(settings))), tensors.main)
    # Used in pre-training only, and absent from the published folder.
    mask, width = "masked_spec_embed", model.config.hidden_size
    if mask in model.state_dict() and mask not in tensors.state:
        fill = {mask: torch.zeros(width)}
        tensors = tensors.overlaid(_Tensors(fill, {mask: tensors.main}, tensors.main))
    return _place(model, tensors, dtype, device)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of the prompt encoder: ``google/umt5-xxl`` as published, or any transformers folder.

    Raises:
        CheckpointError: the folder is missing or holds no tokenizer that can be read.
    """
    folder = Path(folder)
    check_tokenizer(folder)
    if (folder / "tokenizer_config.json").is_file():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ImportError, *_SETTINGS_ERRORS) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{folder}: the tokenizer cannot be read ({reason}); download it again"
            ) from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: holds no tokenizer (tokenizer.json); download google/umt5-xxl again"
        )
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def check_tokenizer(folder: Path) -> None:
    """Read a tokenizer's files of JSON, whose own library says of damaged ones only that it has failed.

    Raises:
        CheckpointError: one of those that are there is cut off, or holds something else; it is named.
    """
    if (folder / "tokenizer_config.json").is_file():
        read_json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    if file.is_file() and not isinstance(read_json(file).get("model"), dict):
        raise CheckpointError(f"{file}: holds no tokenizer; download it again")


def published_state_dict(transformer: StableAvatarTransformer3DModel) -> StateDict:
    """A transformer's tensors under published names, to be saved for the published code (no copies).

    Raises:
        CheckpointError: a tensor has no published name, as those of adapters that were not merged.
    """
    return names.to_published("transformer", transformer.state_dict())


def _read(part: names.Part, path: Path | str, dtype: torch.dtype | None) -> _Tensors:
    path = Path(path)
    state = names.to_ours(part, read_state_dict(path, dequantize_to=dtype or _EXPANDED_DTYPE))
    return _Tensors(state, dict.fromkeys(state, path), path)


def _settings(path: Path | str, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Settings as given, or from the ``config.json`` of a folder; None if they must be read from shapes."""
    if config is not None:
        return config
    file = Path(path) / "config.json"
    return read_json(file) if file.is_file() else None


def _untold_settings(base: Path) -> dict[str, Any]:
    """What the transformer's ``config.json`` says and no shape does: heads, eps, lengths."""
    file = (base if base.is_dir() else base.parent) / "config.json"
    if not file.is_file():
        return {}
    config = read_json(file)
    if "num_heads" in config:
        config = names.transformer_config_to_ours(config)
    untold = ("num_attention_heads", "eps", "text_length", "audio_heads")
    return {key: config[key] for key in untold if key in config}


def _build(make: Callable[[], ModelT], source: Path) -> ModelT:
    """Build a model whose parameters have no memory yet; buffers do, which checkpoints need not hold."""
    with settings_of(source), _own_random_state(), init_empty_weights(include_buffers=False):
        return make()


@contextmanager
def settings_of(source: Path, name: str = "config.json") -> Iterator[None]:
    """Raise what libraries raise for settings that cannot be as CheckpointError that names their file.

    That is `name` in the folder `source`, where it is there, and else the file `source`.
    """
    try:
        yield
    except _SETTINGS_ERRORS as error:
        file = source / name if (source / name).is_file() else source
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{file}: no model can be built with these settings ({reason}); correct them, or get the file"
            " again"
        ) from error


def _fresh_audio(
    model: StableAvatarTransformer3DModel, settings: Mapping[str, Any], device: Device
) -> StateDict:
    """Audio tensors to start training from: keys and values at zero, so that nothing is heard at first."""
    home = torch.device("meta" if torch.device(device).type == "meta" else "cpu")
    with _own_random_state(), home:
        torch.manual_seed(FRESH_ADAPTER_SEED)
        adapter = StableAvatarTransformer3DModel(**{**settings, "num_layers": 0}).vocal_projector
    fresh = {f"{names.AUDIO_PREFIX}{name}": tensor for name, tensor in adapter.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if names.is_audio_name(name) and name not in fresh:
            fresh[name] = torch.zeros(tensor.shape, device=home)
    return fresh


def _own_random_state() -> AbstractContextManager[None]:
    """Constructors draw numbers; the caller's random state is left as it was."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _place(model: ModelT, tensors: _Tensors, dtype: torch.dtype | None, device: Device) -> ModelT:
    """Check names and shapes, then hand the tensors to the model in their dtype and on their device."""
    _check(model.state_dict(), tensors)
    dtype = dtype or _stored_dtype(tensors.state)
    keeps = float32_names(model, dtype)
    moved: dict[int, torch.Tensor] = {}  # one copy of a tensor that has two names
    state: StateDict = {}
    for name, tensor in tensors.state.items():
        if id(tensor) not in moved:
            target = torch.float32 if keeps & set(name.split(".")) else dtype
            moved[id(tensor)] = tensor.to(
                device=device, dtype=target if tensor.is_floating_point() else tensor.dtype
            )
        state[name] = moved[id(tensor)]
    model.load_state_dict(state, assign=True)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.eval()


def _stored_dtype(state: StateDict) -> torch.dtype:
    """The dtype that most numbers of a checkpoint are stored in, if it is one to compute in."""
    numbers: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
    stored = max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)
    return _EXPANDED_DTYPE if stored in FLOAT8_DTYPES else stored


def float32_names(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parts of names whose parameters the model's class wants in float32 whatever the dtype."""
    if isinstance(model, PreTrainedModel):
        # transformers means float16 alone, whose range these weights leave, unless it says strict.
        half = (getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
        return {*half, *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def _check(expected: Mapping[str, torch.Tensor], tensors: _Tensors) -> None:
    missing = [
        f"{name} {tuple(tensor.shape)}" for name, tensor in expected.items() if name not in tensors.state
    ]
    surplus = [name for name in tensors.state if name not in expected]
    misshapen = [
        f"{name} is {tuple(tensor.shape)}, should be {tuple(expected[name].shape)}"
        for name, tensor in tensors.state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if surplus:
        described = [f"{name} {tuple(tensors.state[name].shape)}" for name in surplus]
        problems.append(f"{len(surplus)} are unknown: {_some(described)}")
    if misshapen:
        problems.append(f"{len(misshapen)} have another shape: {_some(misshapen)}")
    if problems:
        # The file of a tensor that should not be there says more than the base over which it was laid.
        wrong = next(
            (n for n, t in tensors.state.items() if n not in expected or t.shape != expected[n].shape), None
        )
        file = tensors.main if wrong is None else tensors.sources[wrong]
        raise CheckpointError(f"{file}: is not a checkpoint of this model; {'; '.join(problems)}")


def _some(items: Iterable[str]) -> str:
    items = list(items)
    more = len(items) - _NAMED_IN_ERRORS
    return ", ".join(items[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
