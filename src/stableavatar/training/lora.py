"""LoRA: a few numbers beside the frozen weights are trained in their place (by peft)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig

from stableavatar.checkpoints.lora import LORA_FILES
from stableavatar.checkpoints.names import ADAPTER_WORD
from stableavatar.errors import InputError
from stableavatar.media.files import replacing
from stableavatar.models.transformer import StableAvatarTransformer3DModel

_ADAPTER = "default"  # peft's name of the first one


@dataclass(frozen=True)
class LoraSettings:
    """Which layers get factors, and how large they are.

    Attributes:
        rank: of the factors.
        alpha: what they add is multiplied by alpha / rank; None: the rank.
        targets: ends of the names of linear layers. The default is all that read the video, the prompt, the
            portrait or the speech in blocks and audio adapter.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "add_v_proj",
        "k_vocal",
        "v_vocal",
        "ffn.net.0.proj",
        "ffn.net.2",
    )

    def __post_init__(self) -> None:
        if not self.targets:
            raise InputError("a LoRA needs targets: ends of the names of linear layers")
        if self.rank < 1:
            raise InputError(f"a LoRA's rank must be at least 1, not {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"a LoRA's alpha must be above 0, not {self.alpha}")


def add_lora(
    transformer: StableAvatarTransformer3DModel, settings: LoraSettings, *, train_adapter: bool = False
) -> None:
    """Freeze a transformer and put factors beside its layers, of which the second starts at zero.

    Args:
        train_adapter: of a base model, whose audio adapter starts anew: that is trained as a whole, without
            factors.

    Raises:
        InputError: no layer of the model has such a name.
    """
    missing = [
        target
        for target in settings.targets
        if not any(f".{name}".endswith(f".{target}") for name, _ in transformer.named_modules())
    ]
    if missing:
        raise InputError(f"LoRA targets that are no layers of this model: {', '.join(missing)}")
    transformer.requires_grad_(False)
    try:
        transformer.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha or settings.rank,
                target_modules=list(settings.targets),
                exclude_modules=rf".*{ADAPTER_WORD}.*" if train_adapter else None,
            ),
            adapter_name=_ADAPTER,
        )
    except ValueError as error:
        raise InputError(f"LoRA targets {', '.join(settings.targets)}: {error}") from error
    for name, parameter in transformer.named_parameters():
        if train_adapter and ADAPTER_WORD in name:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def is_factor(name: str) -> bool:
    """Whether a parameter of a model with a LoRA is the LoRA's."""
    return ".lora_" in name


def without_lora(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own tensors out of those of a model with a LoRA, under the names that they have without."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if not is_factor(name)}


def save_lora(factors: Mapping[str, torch.Tensor], settings: LoraSettings, folder: Path) -> Path:
    """Write trained factors in diffusers' format, as `pytorch_lora_weights.safetensors` in a folder.

    The second is multiplied by alpha / rank, so that they act alike in programs that do not read alpha.

    Args:
        factors: by the transformer's parameter names; what is none is left out.

    Returns:
        The file, which is complete under its name or not there.
    """
    scale = (settings.alpha or settings.rank) / settings.rank
    state = {
        name.replace(f".{_ADAPTER}.", "."): (value * scale if ".lora_B." in name else value).contiguous()
        for name, value in factors.items()
        if is_factor(name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / LORA_FILES[0], alone=True) as partial:
        WanLoraLoaderMixin.save_lora_weights(
            folder,
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata={
                "r": settings.rank,
                "lora_alpha": settings.rank,
                "target_modules": list(settings.targets),
            },
            weight_name=partial.name,
        )
    return folder / LORA_FILES[0]
