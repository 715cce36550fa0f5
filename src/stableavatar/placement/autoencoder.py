"""Where the autoencoder computes, which may be another device than the transformer's."""

import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKLWan
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from stableavatar.errors import InputError
from stableavatar.placement.device import choose_device


def decoder_device(vae: AutoencoderKLWan, name: str | None) -> torch.device | None:
    """The device that the option `decoder_device` means, None where it is left open.

    Raises:
        InputError: there is no such device here, or offloading moves the autoencoder piece by piece.
    """
    if name is None:
        return None
    device = choose_device(name)
    if _in_pieces(vae):
        raise InputError(
            f"decoder device {name!r} cannot be used: the autoencoder is offloaded piece by piece, and that "
            "decides where it computes. Leave decoder-device out, or the autoencoder out of the offloading."
        )
    return device


def bring_autoencoder(vae: AutoencoderKLWan, device: torch.device) -> None:
    """Put the autoencoder on a device, in place, unless it is there or is offloaded piece by piece.

    The hook of diffusers' `enable_model_cpu_offload`, which moves it at every `encode`, is told of the
    device. It makes room by sending the transformer away; for an autoencoder that stays on the CPU it has
    nothing to do.
    """
    hook = getattr(vae, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        hook.execution_device = device
    if vae.device == device or _in_pieces(vae):
        return
    if isinstance(hook, CpuOffload):
        hook.pre_forward(vae)
    else:
        vae.to(device)


def _in_pieces(vae: AutoencoderKLWan) -> bool:
    """Whether hooks on its layers move them: sequential and group offloading."""
    layers = any(hasattr(module, "_hf_hook") for name, module in vae.named_modules() if name)
    return layers or bool(_is_group_offload_enabled(vae))
