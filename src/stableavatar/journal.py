"""What an interrupted run goes on from: a folder beside the output, removed when the video is complete.

It holds the segments of video that are finished, and, saved every so often, the latents of the windows that
are alive, the decoder's memory and how far everything is. What is saved names what it belongs to: settings,
portrait, speech and model.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stableavatar.errors import InputError, StorageError
from stableavatar.media.audio import SPEECH_RATE, Speech
from stableavatar.media.files import cannot_write, locked, reason_of, to_disk
from stableavatar.media.segments import segment_name
from stableavatar.unfinished import journal_folder, journal_index, unfinished_video

FORMAT = 4
# Model and LoRAs are paths; the weights have a hash. Where a decoder ran out of memory, another device may
# go on.
_MAY_CHANGE = {"model", "lora", "decoder_device"}
# Values of a tensor that are hashed, evenly spaced over it.
_HASHED_VALUES = 4096
# What transformers writes into a config beside it.
_NO_CONFIG = {"architectures", "dtype", "torch_dtype", "transformers_version"}
# What an index holds, and of which type.
_INDEX: Mapping[str, Any] = {
    "identity": {"settings": dict},
    "count": int,
    "state": str,
    "rest": {
        "segments": int,
        "frames": int,
        "trajectory": {"given": int, "final": int, "end": int, "done": list},
        "decoder": {"taken": int, "marks": dict},
    },
}


class JournalError(InputError):
    """What was begun cannot be gone on with: it is damaged, or belongs to other inputs or another release."""


@dataclass(frozen=True)
class SavedState:
    """The state of a run: tensors, and the rest as JSON."""

    tensors: Mapping[str, torch.Tensor]
    rest: Mapping[str, Any]


class HeldError(InputError):
    """Another process is making this video."""


class Journal:
    """The journal of the video at `output`.

    Raises:
        HeldError: another process is making this video.
        InputError: the folder cannot be written.
    """

    def __init__(self, output: Path, *, anew: bool = False) -> None:
        """`anew`: what was begun there does not matter, damaged or not."""
        self.output = output
        self.folder = journal_folder(output)
        try:
            self.folder.mkdir(exist_ok=True)
            to_disk(output.parent)
            self._lock = locked(self.folder / "lock")
        except BlockingIOError:
            raise HeldError(f"output {output}: another process is making this video") from None
        except OSError as error:
            raise cannot_write(output, error) from error
        self._replaces = anew and journal_index(output).exists()  # what another run began
        try:
            self._index = None if anew else self._read_index()
        except JournalError:
            self._lock.close()
            raise

    @property
    def unfinished(self) -> Path:
        """Where an interrupted run puts what is finished."""
        return unfinished_video(self.output)

    def finish(self) -> None:
        """The video is complete: there is nothing to go on from."""
        if self._index is not None or self._replaces:
            self.unfinished.unlink(missing_ok=True)
        self.clear()
        self._index = None

    @property
    def has_state(self) -> bool:
        """Whether there is a state to go on from."""
        return self._index is not None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run whose state is there."""
        return {} if self._index is None else self._index["identity"]["settings"]

    def load(self, identity: Mapping[str, Any]) -> SavedState | None:
        """The state that was saved last, None if there is none.

        Raises:
            JournalError: it belongs to other inputs, settings or weights, or is damaged.
        """
        if self._index is None:
            self.clear()
            return None
        different = differences(self._index["identity"], json.loads(json.dumps(identity)))
        if different:
            raise JournalError(
                f"output {self.output}: what was begun there cannot be gone on with, since these differ: "
                f"{'; '.join(different)}. Give what was given then, or begin anew with --overwrite and "
                "without --resume."
            )
        try:
            for number in range(self._index["rest"]["segments"]):
                (self.folder / segment_name(number)).stat()
            tensors = load_file(self.folder / self._index["state"])
        except (OSError, SafetensorError) as error:
            raise JournalError(
                f"output {self.output}: its journal is damaged ({reason_of(error)}). Begin anew with "
                "--overwrite and without --resume."
            ) from error
        self._identity = dict(identity)
        self._count = self._index["count"]
        return SavedState(tensors, self._index["rest"])

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Begin anew: what was there is removed."""
        self.clear()
        self._index, self._identity, self._count = None, dict(identity), 0

    def save(self, saved: SavedState) -> None:
        """Put a state in the place of the one before; a kill at any moment leaves one of the two.

        Raises:
            StorageError: it cannot be written.
        """
        old = None if self._index is None else self._index["state"]
        self._count += 1
        state = f"state-{self._count}.safetensors"
        index = {
            "format": FORMAT,
            "identity": self._identity,
            "count": self._count,
            "state": state,
            "rest": saved.rest,
        }
        try:
            unfinished = self.folder / "unfinished-state"
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.tensors.items()}
            save_file(tensors, unfinished)
            to_disk(unfinished)
            unfinished.replace(self.folder / state)
            unfinished = self.folder / "unfinished-index"
            unfinished.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
            to_disk(unfinished)
            unfinished.replace(journal_index(self.output))
            to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"output {self.output}: its journal cannot be written ({reason_of(error)}). Make room, then "
                "go on with --resume."
            ) from error
        self._index = index
        if old is not None:
            (self.folder / old).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything that the folder holds, first what says that there is something to go on from."""
        try:
            journal_index(self.output).unlink(missing_ok=True)
            to_disk(self.folder)
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        except OSError as error:
            raise cannot_write(self.output, error) from error

    def close(self) -> None:
        """Let others have it; where there is nothing to go on from, it is removed. What another run began
        stays until this one has begun."""
        if not journal_index(self.output).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _read_index(self) -> dict[str, Any] | None:
        try:
            index = json.loads(journal_index(self.output).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        if not isinstance(index, dict):
            raise self._damaged()
        if index.get("format") != FORMAT:
            raise JournalError(
                f"output {self.output}: what was begun there belongs to another release; remove {self.folder}"
            )
        if not _holds(index, _INDEX):
            raise self._damaged()
        return index

    def _damaged(self) -> JournalError:
        return JournalError(f"output {self.output}: its journal {self.folder} is damaged; remove that folder")


def refuse_unfinished(output: Path) -> None:
    """Raise InputError where a run of this video was begun and has saved a state."""
    if journal_index(output).exists():
        raise InputError(
            f"output {output}: an unfinished run of this video is there. Add --resume to go on with it, or "
            "--overwrite to begin anew."
        )


def weights_fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """A hash of every tensor's name, shape, dtype and of some 4096 of its values, evenly spaced, and of how
    strongly adapters beside them act: other weights have another one, and billions of them take seconds. Of
    one that is spread over processes, the values that this process has."""
    digest = hashlib.blake2b(digest_size=16)
    for part, module in sorted(modules.items()):
        for name, layer in module.named_modules():
            if hasattr(layer, "active_adapters") and hasattr(layer, "scaling"):  # peft's
                acts = {it: layer.scaling.get(it) for it in layer.active_adapters}
                digest.update(f"{part}.{name} {acts} {layer.disable_adapters};".encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            if tensor.device.type == "meta":  # offloaded piece by piece
                continue
            own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            flat = own.detach().reshape(-1)
            step = max(1, flat.numel() // _HASHED_VALUES)
            digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def config_hash(modules: Mapping[str, nn.Module]) -> str:
    """A hash of how the parts of a model are configured, wherever they were loaded from and in whichever
    dtype."""
    configs = {}
    for part, module in modules.items():
        config: Any = getattr(module, "config", {})
        entries = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        configs[part] = {
            name: value
            for name, value in entries.items()
            if not name.startswith("_") and name not in _NO_CONFIG
        }
    return json_hash(configs)


def json_hash(value: Any) -> str:
    """A hash of what JSON can hold; of anything else, of its name."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tensor_hash(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape and values."""
    digest = hashlib.blake2b(str(tuple(tensor.shape)).encode(), digest_size=16)
    digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def speech_hash(speech: Speech | None) -> str | None:
    """A hash of a recording's samples."""
    if speech is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for block in speech.blocks(60 * SPEECH_RATE):
        digest.update(block.tobytes())
    return digest.hexdigest()


def _holds(value: Any, shape: Any) -> bool:
    """Whether JSON has at least what `shape` names, of these types."""
    if isinstance(shape, Mapping):
        return isinstance(value, dict) and all(_holds(value.get(name), part) for name, part in shape.items())
    return isinstance(value, shape)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    words = []
    for name in sorted({*before, *now} - {"settings"}):
        if before.get(name) != now.get(name):
            words.append(f"the {name}")
    old, new = before["settings"], now["settings"]
    for name in sorted({*old, *new} - _MAY_CHANGE):
        if old.get(name) != new.get(name):
            words.append(f"{name.replace('_', '-')} (was {old.get(name)!r}, is {new.get(name)!r})")
    return words
