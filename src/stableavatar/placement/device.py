"""Which device and which dtype a model runs with."""

import torch

from stableavatar.errors import InputError


def choose_device(device: str) -> torch.device:
    """The device that a name means, with its number where there are several: cuda is cuda:0.

    Raises:
        InputError: there is no such device here.
    """
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    try:
        place = torch.empty(0, device=device)
        place.cpu()  # fails on meta, which holds no numbers
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here ({reason}): choose cpu, or auto") from error
    return place.device


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a name means on a device.

    Raises:
        InputError: an unknown name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
