"""Files of a repository in the cache of the hub's library, with the checks that it does not make: whether
there is room before they are fetched, and whether large ones came whole.

What is fetched and not yet checked is written down beside the snapshots, so that a file that came damaged is
found also where the process ended in between; what was checked is not read again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from stableavatar.checkpoints.hub_files import (
    HubFile,
    check_space,
    endpoint_of_hub,
    list_files,
    sha256_of,
    translated,
)
from stableavatar.errors import CheckpointError

logger = logging.getLogger(__name__)

UNCHECKED = "stableavatar-unchecked.json"


def fetch(
    repo_id: str,
    patterns: list[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a commit with the files that match patterns, fetched as far as they are not there;
    without a connection, a cached copy.

    Raises:
        InputError: too little free space.
        CheckpointError: the repository cannot be had; a file came damaged, and was removed.
    """
    repository = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    repository /= repo_folder_name(repo_id=repo_id, repo_type="model")
    pending = _read(repository)
    if not local_files_only:
        commit, absent = _absent(repo_id, patterns, revision, token, cache_dir, repository)
        check_space(repository, sum(file.size for file in absent))
        fresh = {f"{commit}/{file.path}": file.sha256 for file in absent if file.sha256 is not None}
        if fresh:
            pending = {**pending, **fresh}
            _write(repository, pending)
    with translated(repo_id, revision):
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=patterns,
                endpoint=endpoint_of_hub(),
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    _check(repo_id, repository, pending)
    return folder


def _absent(
    repo_id: str,
    patterns: list[str],
    revision: str | None,
    token: str | bool | None,
    cache_dir: Path | str | None,
    repository: Path,
) -> tuple[str, list[HubFile]]:
    """A commit, and what of it has to be fetched; nothing where the hub does not say, which the fetching then
    meets with too."""
    try:
        commit, files = list_files(repo_id, patterns, revision=revision, token=token)
    except CheckpointError:
        return "", []
    return commit, [
        file
        for file in files
        if not isinstance(try_to_load_from_cache(repo_id, file.path, cache_dir, commit), str)
        and not (file.sha256 is not None and (repository / "blobs" / file.sha256).exists())
    ]


def _check(repo_id: str, repository: Path, pending: Mapping[str, str]) -> None:
    """Hold what is there of the files that were not checked against their SHA-256."""
    left = dict(pending)
    for place, sha256 in pending.items():
        file = repository / "snapshots" / place
        if not file.is_file():  # of another variant or commit, which was not fetched to its end
            continue
        blob = file.resolve()
        if sha256_of(blob) != sha256:
            file.unlink()
            blob.unlink(missing_ok=True)
            path = place.partition("/")[2]
            raise CheckpointError(f"{repo_id}: {path} came damaged on the way, and was removed; try again")
        logger.info("%s: %s is whole", repo_id, place)
        del left[place]
    if left != pending:
        _write(repository, left)


def _read(repository: Path) -> dict[str, str]:
    """Files that are not checked, COMMIT/PATH each, and their SHA-256."""
    try:
        known: Any = json.loads((repository / UNCHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(repository: Path, pending: Mapping[str, str]) -> None:
    with suppress(OSError):  # what cannot be written here, cannot be fetched either: that says why
        if pending:
            repository.mkdir(parents=True, exist_ok=True)
            (repository / UNCHECKED).write_text(json.dumps(pending), encoding="utf-8")
        else:
            (repository / UNCHECKED).unlink(missing_ok=True)
