"""What `AvatarPipeline.from_pretrained` may be given by keyword beside its own arguments."""

from collections.abc import Iterable
from pathlib import Path

import torch

from stableavatar.checkpoints.layout import OWN_PARTS
from stableavatar.errors import InputError
from stableavatar.options import check_name

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
# Those that diffusers takes of a pipeline; what else it is given it passes over, with a word in the log.
_LOADING_ARGUMENTS = (
    *HUB_ARGUMENTS,
    "custom_pipeline",
    "custom_revision",
    "device_map",
    "disable_mmap",
    "force_download",
    "load_connected_pipeline",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "provider",
    "provider_options",
    "proxies",
    "quantization_config",
    "sess_options",
    "torch_dtype",
    "trust_remote_code",
    "use_flashpack",
    "use_onnx",
    "use_safetensors",
)
_OWN_ARGUMENTS = ("variant", "size", "dtype", "lora")


def check_arguments(given: Iterable[str]) -> None:
    """Raise InputError for a keyword that is none of loading, nor a part's name."""
    known = (*_OWN_ARGUMENTS, *OWN_PARTS, "sampling_defaults", *_LOADING_ARGUMENTS)
    for name in given:
        check_name(name, known, "argument of loading")


def chosen_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype:
    """Of the weights, by its name here or by diffusers' former one; float32 if by none.

    Raises:
        InputError: it was given by both.
    """
    if dtype is not None and torch_dtype is not None:
        raise InputError("torch_dtype is the former name of dtype: give one of them, not both")
    return dtype or torch_dtype or torch.float32


def unusable(names: Iterable[str], source: str | Path) -> InputError:
    """What to raise where arguments are given that published checkpoints do not take."""
    return InputError(f"{', '.join(names)} cannot be used with the published checkpoints in {source}")
