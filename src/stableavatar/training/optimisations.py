"""What makes a module train with less memory or faster, applied from outside. Numbers change by rounding
alone."""

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from stableavatar.errors import InputError


def enable_gradient_checkpointing(module: nn.Module) -> None:
    """Activations are computed again in the backward pass. Raises InputError where no part can do that."""
    # Only diffusers' models: transformers' encoders are frozen or small.
    models = [part for part in module.modules() if isinstance(part, ModelMixin)]
    if not models:
        raise InputError("gradient_checkpointing was asked for, but no part of the model supports it")
    for model in models:
        model.enable_gradient_checkpointing()


def compile_blocks(module: nn.Module) -> None:
    """Repeated blocks are compiled, once for all of a kind. Raises InputError where there are none."""
    models = [
        part
        for part in module.modules()
        if isinstance(part, ModelMixin) and part._repeated_blocks is not None
    ]
    if not models:
        raise InputError("compile was asked for, but no part of the model has repeated blocks")
    # A block is smaller than a bucket of the gradients that processes share: nothing to split it for.
    torch._dynamo.config.optimize_ddp = False
    for model in models:
        model.compile_repeated_blocks()
