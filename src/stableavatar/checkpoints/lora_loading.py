"""How a pipeline attaches a LoRA beside its transformer's weights, or merges it into them."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin

from stableavatar.checkpoints import hub
from stableavatar.checkpoints.arguments import HUB_ARGUMENTS
from stableavatar.checkpoints.lora import Lora, lora_from_state, merge_loras, read_lora
from stableavatar.errors import InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel


class AvatarLoraLoaderMixin(WanLoraLoaderMixin):
    """diffusers' LoRA loading, of every naming that `checkpoints.lora` knows."""

    transformer: StableAvatarTransformer3DModel
    origin: dict[str, Any]

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Attach a LoRA beside the transformer's weights, as in diffusers: `set_adapters` scales it and
        chooses among several, `fuse_lora` merges it, `unload_lora_weights` takes it off.

        Args:
            source: a file or a folder, of any naming that `checkpoints.lora` knows, its tensors, or a hub id.
            adapter_name: of the adapter. hotswap: put it in the place of the one of that name.
            kwargs: `weight_name`, of a file in the folder; a hub id needs it, and takes `revision`, `token`,
                `cache_dir` and `local_files_only`.

        Raises:
            CheckpointError: missing, damaged, or for another model; it changes what an adapter cannot hold.
            InputError: an argument that cannot be used.
        """
        found = self._read_lora(source, kwargs)
        with warnings.catch_warnings():
            # peft finds layers by the ends of their names: those of blocks in the audio adapter as well. What
            # it puts there in surplus is zero.
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)
            self.transformer.load_lora_adapter(
                found.peft_state(), prefix=None, adapter_name=adapter_name, hotswap=hotswap, _pipeline=self
            )

    def _read_lora(self, source: str | Path | Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> Lora:
        distant = isinstance(source, str | Path) and hub.is_id(source)
        known = ("weight_name", *(HUB_ARGUMENTS if distant else ()))
        if unknown := [name for name in given if name not in known]:
            raise InputError(f"{', '.join(unknown)} cannot be used with a LoRA: give a file or a folder")
        places, name = dict(given), given.get("weight_name")
        places.pop("weight_name", None)
        if isinstance(source, Mapping):
            return lora_from_state(source, self.transformer)
        if not distant:
            return read_lora(Path(source) / name if name else source, self.transformer)
        if not name:
            raise InputError(
                f"LoRA {source}: there is no such file or folder; of a hub repository name the file in it as "
                "weight_name"
            )
        return read_lora(hub.fetch_lora(str(source), name, **places), self.transformer)

    def _merge(self, chosen: Sequence[tuple[str | Path, float]]) -> None:
        if not chosen:  # there may be no transformer: a part is left out by giving None
            return
        merge_loras(self.transformer, [(read_lora(file, self.transformer), scale) for file, scale in chosen])
        self.origin["lora"] = [f"{file}:{scale:g}" for file, scale in chosen]
