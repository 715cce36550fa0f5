"""Which parameters of a model are trained."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stableavatar.checkpoints.names import TRANSFORMER
from stableavatar.errors import InputError

RECIPE_WORDS = ("vocal", "attn", "blocks")


def trained_by_recipe(name: str) -> bool:
    """Whether the published recipe trains a parameter of the transformer: its published name has `vocal`,
    `attn` or `blocks` (spec 4). So all blocks and the audio adapter are trained; patch, time, text and
    portrait embeddings and the head are not.

    Raises:
        InputError: the name is no transformer parameter's.
    """
    published = TRANSFORMER.to_published(name)
    if published is None:
        raise InputError(f"{name} is no parameter of the video transformer")
    return any(word in published for word in RECIPE_WORDS)


def freeze_others(module: nn.Module, trained: Callable[[str], bool]) -> None:
    """Let only those parameters need gradients whose names `trained` accepts."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained(name))


def frozen_digest(module: nn.Module, never_acts: Callable[[str], bool]) -> str:
    """A digest of the parameters that are not trained, save those whose names `never_acts` accepts: of names,
    shapes and some values of each, which tells one model from another without reading all of it."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad and not never_acts(name):
            values = parameter.detach().flatten()
            some = values[:: max(1, len(values) // 64)].float().cpu().numpy()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that need gradients, by name.

    Raises:
        InputError: there is none.
    """
    chosen = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not chosen:
        raise InputError("no parameter of the model is trained")
    return chosen


def frozen_state(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Everything of a module's state that is not trained, by name; a trained parameter's second name is left
    out."""
    own = {id(parameter) for parameter in trained.values()}
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if id(value) not in own}


def is_finite(value: torch.Tensor) -> bool:
    """Whether this process's part of a weight is."""
    if isinstance(value, DTensor):
        value = value.to_local()
    part = getattr(value, "ds_tensor", value)  # ZeRO-3's
    return bool(torch.isfinite(part).all())
