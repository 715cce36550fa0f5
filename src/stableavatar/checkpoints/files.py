"""Tensors out of files, without running code: safetensors (whole or sharded), PyTorch's .pt and .pth, GGUF.

What a file is, its first bytes say, not its suffix. Files are memory-mapped where their format allows it, so
that tensors which are replaced or dropped later are never read. `read_state_dict` is the only place where a
checkpoint is opened.
"""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stableavatar.checkpoints.names import StateDict, strip_wrappers
from stableavatar.errors import CheckpointError

logger = logging.getLogger(__name__)

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

# The weights of a folder, by the names that diffusers and transformers give them; an index comes before a
# file.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
)
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_ACTIVATION_SCALE_SUFFIXES = (".scale_input", ".input_scale")


def read_state_dict(path: Path | str, *, dequantize_to: torch.dtype = torch.bfloat16) -> StateDict:
    """Read every tensor of a checkpoint, on the CPU, under the names in the file (less those of wrappers).

    Args:
        path: a file, the index of a sharded checkpoint, or a folder that holds one of `WEIGHT_FILES`.
        dequantize_to: dtype of weights that are stored in 8 bits with scales or in GGUF's blocks. Plain
            float8 weights without scales are returned as they are.

    Raises:
        CheckpointError: the file is missing, empty, damaged, only a pointer to a file that was not
            downloaded, holds anything but tensors (it is not executed), or lacks a shard.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in_folder(path)
    if path.name.endswith(".index.json"):
        state = _read_index(path)
    elif path.exists() or not (shards := _shards_beside(path)):
        state = _read_file(path, dequantize_to)
    else:
        state = _read_shards(shards)
    return _apply_scales(strip_wrappers(state), dequantize_to, path)


def has_weights(path: Path) -> bool:
    """Whether a folder holds weights that `read_state_dict` would read."""
    return path.is_dir() and (
        any((path / name).is_file() for name in WEIGHT_FILES) or bool(_find_shards(path))
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: should hold a JSON object, holds a {type(content).__name__}")
    return content


def _weights_in_folder(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if shards := _find_shards(folder):
        # Without its index, a sharded checkpoint is named by the file that it would be in one piece.
        match = _SHARD.fullmatch(shards[0].name)
        if match is not None:
            return folder / f"{match['stem']}.safetensors"
    raise CheckpointError(f"{folder}: holds no weights; looked for {', '.join(WEIGHT_FILES)}")


def _find_shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))


def _shards_beside(path: Path) -> list[Path]:
    """The shards of a checkpoint that has no index, all of them; empty if there are none at all."""
    shards = [s for s in _find_shards(path.parent) if s.name.startswith(f"{path.stem}-")]
    if not shards:
        return []
    match = _SHARD.fullmatch(shards[0].name)
    total = int(match["total"]) if match is not None else 0
    expected = [path.parent / f"{path.stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    _require_shards(expected, path)
    return expected


def _require_shards(shards: list[Path], whole: Path) -> None:
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{whole}: {len(absent)} of {len(shards)} shards are missing ({', '.join(absent[:3])}); download"
            " them again"
        )


def _read_index(path: Path) -> StateDict:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map, so it is not the index of a sharded checkpoint")
    files = sorted(set(map(str, weight_map.values())))
    if outside := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{path}: names a shard outside its folder ({outside[0]})")
    shards = [path.parent / name for name in files]
    _require_shards(shards, path)
    state = _read_shards(shards)
    if absent := [name for name in weight_map if name not in state]:
        raise CheckpointError(
            f"{path}: the shards lack {len(absent)} of its tensors, the first is {absent[0]}"
        )
    return state


def _read_shards(shards: list[Path]) -> StateDict:
    state: StateDict = {}
    for shard in shards:
        state.update(_read_file(shard, torch.bfloat16))
    return state


def _read_file(path: Path, dequantize_to: torch.dtype) -> StateDict:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not head:
        raise CheckpointError(f"{path}: is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is only a Git LFS pointer, not the weights; run `git lfs pull` or download it"
        )
    if head.lstrip().startswith((b"<!", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: is a web page, not the weights; download it again")
    if head.startswith(b"GGUF"):
        return _read_gguf(path, dequantize_to)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    return _read_pickle(path)


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or incomplete safetensors file ({error}); download it again"
        ) from error


def _read_pickle(path: Path) -> StateDict:
    """A file of ``torch.save``: tensors and plain containers are built, all else is refused unexecuted."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNPICKLING_ERRORS as error:
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: refused, for it would run code when opened ({forbidden[1]}); only plain tensors are"
                " read: ask its maker for a safetensors file"
            ) from error
        raise CheckpointError(
            f"{path}: damaged, incomplete, or not a checkpoint; download it again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict of named tensors")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: its entry {name!r} is a {type(value).__name__}, not a tensor")
    return {str(name): tensor for name, tensor in content.items()}


def _read_gguf(path: Path, dequantize_to: torch.dtype) -> StateDict:
    """Tensors of a GGUF file; quantised ones are expanded, so that they need as much memory as any."""
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: to read GGUF files, install the package gguf (pip install gguf)"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged or incomplete GGUF file ({error}); download it again"
        ) from error
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    state: StateDict = {}
    for entry in reader.tensors:
        original = reader.get_field(f"comfy.gguf.orig_shape.{entry.name}")
        # GGUF counts dimensions from the fastest one.
        shape = entry.shape[::-1] if original is None else [original.parts[i][0] for i in original.data]
        try:
            values = torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
        except NotImplementedError as error:
            kind = entry.tensor_type.name
            raise CheckpointError(
                f"{path}: {entry.name} is quantised as {kind}, which cannot be expanded"
            ) from error
        if entry.tensor_type not in plain:
            values = values.to(dequantize_to)
        state[entry.name] = values.reshape([int(size) for size in shape])
    return state


def _apply_scales(state: StateDict, dtype: torch.dtype, path: Path) -> StateDict:
    """Multiply 8-bit weights by the scales stored beside them; drop what only scaled files have."""
    if not any(tensor.dtype in FLOAT8_DTYPES for tensor in state.values()):
        return state
    state = {
        n: t for n, t in state.items() if n != "scaled_fp8" and not n.endswith(_ACTIVATION_SCALE_SUFFIXES)
    }
    for name in [name for name in state if name.endswith(_SCALE_SUFFIXES)]:
        weight_name = name.rpartition(".")[0] + ".weight"
        scale = state.pop(name)
        weight = state.get(weight_name)
        if weight is None:
            raise CheckpointError(
                f"{path}: {name} is the scale of a tensor that is not there ({weight_name})"
            )
        if scale.numel() not in (1, weight.shape[0]):
            raise CheckpointError(
                f"{path}: {name} {tuple(scale.shape)} scales {weight_name} {tuple(weight.shape)} neither as a"
                " whole nor row by row"
            )
        factors = scale.float().reshape(-1, *[1] * (weight.dim() - 1))
        state[weight_name] = (weight.float() * factors).to(dtype)
    return state
