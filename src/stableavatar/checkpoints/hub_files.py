"""What a repository of the Hugging Face hub holds, and what comes of asking, in words that say what to do."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from stableavatar.errors import CheckpointError, InputError

# The HTTP client's own base error: of httpx, under whichever name the hub's library brings it.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: path, size in bytes, SHA-256 where the hub states one (large files)."""

    path: str
    size: int
    sha256: str | None


def list_files(
    repo_id: str,
    patterns: list[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[str, list[HubFile]]:
    """The commit that a revision stands for, and the files of a repository that match patterns.

    Raises:
        CheckpointError: no connection, no such repository or revision, no permission, or no file matches.
    """
    api = HfApi(endpoint=endpoint_of_hub(), token=token)
    with translated(repo_id, revision):
        commit = api.repo_info(repo_id, revision=revision).sha or revision or "main"
        entries = [
            entry
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)
            if isinstance(entry, RepoFile)
        ]
    files = [
        HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs is not None else None)
        for entry in entries
    ]
    wanted = [file for file in files if any(fnmatchcase(file.path, pattern) for pattern in patterns)]
    if not wanted:
        raise CheckpointError(
            f"{repo_id}: holds none of the files looked for ({', '.join(patterns[:3])}, ...)"
        )
    return commit, wanted


def endpoint_of_hub() -> str | None:
    """The mirror, read at every call: the hub's library reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def literal(path: str) -> str:
    """A pattern that matches this path alone."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def check_space(target: Path, needed: int) -> None:
    """Raise InputError unless so many bytes are free where a folder is, or is to be."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{target}: {readable(needed)} are needed, {readable(free)} are free; choose another folder or"
            " make room"
        )


def readable(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def translated(repo_id: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub's library as ours, in words that say what to do."""
    endpoint = endpoint_of_hub() or "https://huggingface.co"
    unreachable = (
        f"{repo_id}: {endpoint} cannot be reached, and there is no complete copy here; check the connection,"
        " or name a mirror in HF_ENDPOINT"
    )
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id}: access must be asked for at {endpoint}/{repo_id}; then set HF_TOKEN to your token"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: no such repository at {endpoint}, or a private one; check the name, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id}: has no revision {revision!r}") from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{repo_id}: HF_HUB_OFFLINE forbids the network, and there is no copy here"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(unreachable) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo_id}: a file is missing at {endpoint}; try again later") from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{repo_id}: {endpoint} answered {error.response.status_code}; try again later, or set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{repo_id}: is not the id of a hub repository (owner/name)") from error
    except _HTTP_ERROR as error:
        raise CheckpointError(unreachable) from error
    except OSError as error:
        raise InputError(
            f"{error.filename or repo_id}: cannot be written ({error.strerror or error})"
        ) from error
