"""Published weights and own folders from the Hugging Face hub, or a mirror of it.

Where things come from and go to is set as everywhere: ``HF_ENDPOINT`` names a mirror, ``HF_TOKEN`` a token,
``HF_HOME`` the cache, ``HF_HUB_OFFLINE=1`` forbids the network. Only what a variant needs is fetched, the
free space is checked before, and the SHA-256 of large files after.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from stableavatar.checkpoints.hub_cache import fetch
from stableavatar.checkpoints.hub_files import (
    HubFile,
    check_space,
    endpoint_of_hub,
    list_files,
    literal,
    readable,
    sha256_of,
    translated,
)
from stableavatar.checkpoints.layout import MODEL_INDEX, OWN_PARTS, VARIANTS, VOCAL_SEPARATOR
from stableavatar.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

PUBLISHED_REPOSITORY = "FrancisRing/StableAvatar"
BASE_14B_REPOSITORY = "Wan-AI/Wan2.1-I2V-14B-480P"

Progress = Callable[[int, int], None]
"""Bytes that are there, and of how many."""

_BASE_1_3B = "Wan2.1-Fun-V1.1-1.3B-InP"
_BASE_14B = "Wan2.1-I2V-14B-480P"
_ENCODERS = (
    f"{_BASE_1_3B}/Wan2.1_VAE.pth",
    f"{_BASE_1_3B}/models_t5_umt5-xxl-enc-bf16.pth",
    f"{_BASE_1_3B}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    f"{_BASE_1_3B}/google/umt5-xxl/*",
    "wav2vec2-base-960h/*.json",
    "wav2vec2-base-960h/*.txt",
    "wav2vec2-base-960h/*.safetensors",
    "wav2vec2-base-960h/*.bin",
)
_TRANSFORMER_1_3B = (f"{_BASE_1_3B}/config.json", f"{_BASE_1_3B}/diffusion_pytorch_model*")
_TRANSFORMER_14B = ("config.json", "diffusion_pytorch_model*")
_OWN_PATTERNS = (MODEL_INDEX, *(f"{part}/*" for part in OWN_PARTS))

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# How the hub's library ends the names of files that are not whole.
# Where the hub's library has files of a folder that are on their way.
_DOWNLOADING, _ON_ITS_WAY = Path(".cache", "huggingface", "download"), ".incomplete"
_ABANDONED_SECONDS = 600.0  # without a byte; another download may be under way
_TELL_SECONDS = 0.5


def published_patterns(variant: str, size: str = "1.3b") -> list[str]:
    """Which files of `PUBLISHED_REPOSITORY` a model of this variant and size needs.

    Args:
        variant: ``square`` or ``rec-vec``.
        size: ``1.3b``, or ``14b``: the encoders alone, since its base lies in `BASE_14B_REPOSITORY`.

    Raises:
        InputError: unknown variant or size.
    """
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if size not in ("1.3b", "14b"):
        raise InputError(f"unknown model size {size!r}: choose 1.3b or 14b")
    patterns = list(_ENCODERS)
    if size == "1.3b":
        patterns += [*_TRANSFORMER_1_3B, f"StableAvatar-1.3B/transformer3d-{variant}.pt"]
    return patterns


def download(
    target: Path | str,
    variant: str = "square",
    size: str = "1.3b",
    *,
    repo_id: str = PUBLISHED_REPOSITORY,
    base_14b_repo_id: str = BASE_14B_REPOSITORY,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download what a published model needs into a folder, in the published layout.

    Files that are there already are kept; of an interrupted download those that were whole.

    Args:
        target: the folder, made if need be; for `layout.find_published` afterwards.
        variant, size: see `published_patterns`. For ``14b`` the Wan base comes from
            `base_14b_repo_id`; its transformer with audio was not published.
        repo_id: the repository of the published layout, or a copy of it.
        revision: branch, tag or commit of `repo_id`.
        progress: told, twice a second and by another thread, how many bytes are there of how many; once all
            are, they are compared with their SHA-256, which takes a while too.

    Returns:
        the target.

    Raises:
        InputError: unknown variant or size; too little free space; the target cannot be written.
        CheckpointError: no connection, no such repository or revision, no permission, or a damaged file.
    """
    target = Path(target).expanduser()
    jobs = [_Wanted(repo_id, revision, target, published_patterns(variant, size))]
    if size == "14b":
        jobs.append(_Wanted(base_14b_repo_id, None, target / _BASE_14B, list(_TRANSFORMER_14B)))
    _get(target, jobs, progress)
    return target


def download_vocal_separator(
    target: Path | str,
    *,
    repo_id: str = PUBLISHED_REPOSITORY,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download the network that takes music away, alone, into a folder; as `download`.

    Returns:
        its file.
    """
    target = Path(target).expanduser()
    _get(target, [_Wanted(repo_id, revision, target, [VOCAL_SEPARATOR])], progress)
    return target / VOCAL_SEPARATOR


class _Wanted(NamedTuple):
    repo_id: str
    revision: str | None
    folder: Path
    patterns: list[str]


def _get(target: Path, jobs: Sequence[_Wanted], progress: Progress | None) -> None:
    planned = []
    for repository, wanted_revision, folder, patterns in jobs:
        commit, files = list_files(repository, patterns, revision=wanted_revision)
        planned.append((repository, commit, folder, files))
    check_space(target, sum(file.size for _, _, folder, files in planned for file in _absent(folder, files)))
    wanted = {folder / file.path: file.size for _, _, folder, files in planned for file in files}
    on_their_way = [folder / _DOWNLOADING for _, _, folder, _ in planned]
    _sweep(on_their_way)
    with _watched(on_their_way, wanted, progress):
        for repository, commit, folder, files in planned:
            _fetch(repository, commit, folder, files)


def resolve(
    name: Path | str,
    *,
    variant: str = "square",
    size: str = "1.3b",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> Path:
    """A folder of weights by its path or by the id of a hub repository.

    A repository in this project's or in the published layout is fetched into the cache of the hub's library;
    without a connection, a cached copy is used.

    Args:
        name: a path, or an id such as ``FrancisRing/StableAvatar``.
        variant, size: which published transformer to fetch, if it is in the published layout; of ``14b``
            what is there: the official repository has the encoders alone.
        revision: branch, tag or commit.
        token: of the hub; None for that of the environment, False for none.
        cache_dir: in place of the cache of the hub's library.
        local_files_only: ask nobody; a cached copy is used.

    Raises:
        InputError: neither an existing path nor an id; unknown variant or size; too little free space.
        CheckpointError: the repository cannot be had, or holds no model; a damaged file.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    repo_id = str(name)
    if not is_id(name):
        raise InputError(f"{name}: no such file or folder, nor the id of a hub repository (owner/name)")
    patterns = [*_OWN_PATTERNS, *published_patterns(variant, size)]
    if size == "14b":
        patterns += [f"{_BASE_14B}/{pattern}" for pattern in _TRANSFORMER_14B]
        patterns.append(f"StableAvatar-14B/transformer3d-{variant}.*")
    folder = fetch(
        repo_id,
        patterns,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CheckpointError(f"{repo_id}: holds no model in this project's or in the published layout")
    return folder


def is_id(name: Path | str) -> bool:
    """Whether this can be the id of a repository, and is no path."""
    return not Path(name).expanduser().exists() and bool(_REPOSITORY_ID.fullmatch(str(name)))


def fetch_lora(repo_id: str, file: str, **places: Any) -> Path:
    """A file of a repository, in the cache of the hub's library, beside it what PEFT tells of it.

    Args:
        places: `revision`, `token`, `cache_dir` and `local_files_only`, see `resolve`.

    Raises:
        CheckpointError: the repository cannot be had, or has no such file; a damaged one.
    """
    beside = (PurePosixPath(file).parent / "adapter_config.json").as_posix()
    path = fetch(repo_id, [literal(file), literal(beside)], **places) / file
    if not path.is_file():
        raise CheckpointError(f"{repo_id}: has no file {file}; check the name")
    return path


def is_published(repo_id: str, **places: Any) -> bool:
    """Whether a repository is known not to be in this project's layout, so that it can only be in the
    published one; nothing but `model_index.json` is fetched.

    Args:
        places: `revision`, `token`, `cache_dir` and `local_files_only`, see `resolve`.

    Raises:
        CheckpointError: the repository cannot be had.
    """
    if not _REPOSITORY_ID.fullmatch(repo_id):
        return False
    with translated(repo_id, places.get("revision")):
        try:
            hf_hub_download(repo_id, MODEL_INDEX, endpoint=endpoint_of_hub(), **places)
        except LocalEntryNotFoundError:  # not known without a connection
            return False
        except EntryNotFoundError:
            return True
    return False


def model_index(repo_id: str) -> Path | None:
    """`model_index.json` of a repository in this project's layout; None where there is none, or it cannot be
    had."""
    if not _REPOSITORY_ID.fullmatch(repo_id):
        return None
    try:
        return Path(hf_hub_download(repo_id, MODEL_INDEX, endpoint=endpoint_of_hub()))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def _fetch(repo_id: str, commit: str, folder: Path, files: list[HubFile]) -> None:
    before = {file.path: _stamp(folder / file.path) for file in files}
    with translated(repo_id, commit):
        snapshot_download(
            repo_id,
            revision=commit,
            local_dir=folder,
            allow_patterns=[literal(file.path) for file in files],
            endpoint=endpoint_of_hub(),
        )
    for file in files:
        path = folder / file.path
        if _stamp(path) == before[file.path] and path.is_file():
            continue
        if not path.is_file():
            raise CheckpointError(f"{path}: was not downloaded; run the download again")
        if file.sha256 is not None and (found := sha256_of(path)) != file.sha256:
            path.unlink()
            raise CheckpointError(
                f"{path}: damaged on the way (SHA-256 {found[:12]}, should be {file.sha256[:12]}), removed;"
                " run the download again"
            )
        logger.info("%s: downloaded, %s", path, readable(file.size))


def _sweep(folders: Sequence[Path]) -> None:
    """Remove what a download that was killed had of a file: the hub's library begins each anew."""
    for path in _on_their_way(folders):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _on_their_way(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from folder.rglob(f"*{_ON_ITS_WAY}")


@contextmanager
def _watched(
    folders: Sequence[Path], wanted: Mapping[Path, int], progress: Progress | None
) -> Iterator[None]:
    """Tell `progress` what is there of the wanted files (bytes each), also of those that are on their way."""
    if progress is None:
        yield
        return
    total = sum(wanted.values())
    over = threading.Event()

    def watch() -> None:
        while True:
            sizes = (min(size, _size(path)) for path, size in wanted.items())
            progress(min(total, sum(sizes) + sum(map(_size, _on_their_way(folders)))), total)
            if over.wait(_TELL_SECONDS):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # not there yet, or moved to its place in this moment
        return 0


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _absent(folder: Path, files: list[HubFile]) -> list[HubFile]:
    return [f for f in files if not (folder / f.path).is_file() or (folder / f.path).stat().st_size != f.size]
