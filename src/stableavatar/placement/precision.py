"""A pipeline's dtype, and what stays in float32 whatever it is: the parts whose rounding would be seen."""

import contextlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from stableavatar.checkpoints.loading import float32_names


@contextlib.contextmanager
def keeping_float32(parts: Mapping[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """While the body turns a pipeline's parts, by name, to `dtype`: what loading leaves in float32 is so
    afterwards too, on the device that it was brought to, and was not rounded between."""
    kept: list[tuple[nn.Module, str, torch.Tensor]] = []
    for part, model in parts.items():
        if not isinstance(model, nn.Module):
            continue
        names = float32_names(model, dtype)
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_floating_point() and (part == "speech_encoder" or names & set(name.split("."))):
                kept.append((model, name, tensor.data))
    yield
    for model, name, values in kept:
        owner, _, own = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), own)
        tensor.data = values.to(tensor.device, torch.float32)
