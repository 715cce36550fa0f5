"""What makes a module train with less memory or faster, applied from outside. Numbers change by rounding
alone."""

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from stableavatar.errors import InputError
from stableavatar.models.attention import KernelProcessor


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


# Pairs of a query and a key beyond which the fused kernel trains faster, and whose scores are large.
_MANY_PAIRS = 1 << 20


class ExplicitAttention(KernelProcessor):
    """Softmax attention written out, where that trains faster on a CPU: up to about a thousand tokens its
    backward pass takes half the time of the fused kernel's. Longer ones, and passes without gradients, are
    left to the kernel. The result is the same up to rounding."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or query.shape[1] * key.shape[1] > _MANY_PAIRS:
            return super().__call__(query, key, value)
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))  # [B, heads, N, d]
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def use_explicit_attention(module: nn.Module) -> None:
    """Attention that trains faster on a CPU, in all models of a module."""
    for part in module.modules():
        if isinstance(part, AttentionModuleMixin) and hasattr(part, "to_q"):
            part.set_processor(ExplicitAttention())
