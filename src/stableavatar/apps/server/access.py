"""Who asks: API keys, each of an owner; without keys, programs on this machine alone."""

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from fastapi import Depends, HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from stableavatar.apps.arriving import Arriving, announced_bytes, counted
from stableavatar.apps.origins import host_of, is_local, origin_of
from stableavatar.apps.server.schemas import ApiError, answer_error, no_room
from stableavatar.errors import InputError
from stableavatar.jobs.intake import Limits
from stableavatar.jobs.store import JobStore
from stableavatar.media.files import reason_of

LOCAL = "local"
_SHORTEST_KEY = 16

bearer = HTTPBearer(auto_error=False, description="An API key, where the server has any.")


class Keys:
    """API keys and whose they are; only their hashes are kept.

    Args:
        owners: of each key; empty: there are none, and everybody is `LOCAL`.

    Raises:
        InputError: a key is too short to be safe, or a name is empty.
    """

    def __init__(self, owners: Mapping[str, str] | None = None) -> None:
        self._owners: dict[bytes, str] = {}
        for key, owner in (owners or {}).items():
            if len(key) < _SHORTEST_KEY:
                raise InputError(
                    f"the API key of {owner} is too short: {_SHORTEST_KEY} characters at least. "
                    "`openssl rand -hex 24` makes one."
                )
            self._owners[_hash(key)] = owner

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Keys of a file: a name and a key a line; `#` begins a comment. A name may have several keys.

        Raises:
            InputError: it cannot be read, or a line is something else.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"API keys {path}: cannot be read ({reason_of(error)})") from error
        owners: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2:
                raise InputError(f"API keys {path}, line {number}: give a name and a key")
            owner, key = words
            if key in owners:
                raise InputError(f"API keys {path}, line {number}: the key of {owners[key]} again")
            owners[key] = owner
        if not owners:
            raise InputError(f"API keys {path}: holds none")
        return cls(owners)

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, key: str | None) -> str | None:
        """Whose key it is, None if it is nobody's."""
        if not self._owners:
            return LOCAL
        if key is None:
            return None
        given, found = _hash(key), None
        for known, owner in self._owners.items():
            if hmac.compare_digest(given, known):
                found = owner
        return found


def check_host(host: str, keys: Keys) -> None:
    """Raise InputError where anybody in the network could use a server without keys."""
    if keys or is_local(host):
        return
    raise InputError(
        f"host {host}: without API keys a server answers this machine alone. Give --api-keys, or leave out "
        "--host."
    )


def refuse_foreign_pages(request: HTTPConnection) -> None:
    """Raise ApiError where a web page of elsewhere asks a server without keys: browsers send what pages ask
    of addresses of this machine, and a page's own name may point here."""
    if request.app.state.keys:
        return
    if not is_local(host_of(request)):
        raise ApiError(403, "this server answers to the names of this machine alone", code="wrong_host")
    origin = origin_of(request)
    if origin is not None and not is_local(origin):
        raise ApiError(403, "web pages of other hosts cannot use this server", code="wrong_origin")


def owner_of(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> str:
    """Whose request it is. Raises ApiError: nobody's."""
    refuse_foreign_pages(request)
    return owner_of_key(request.app.state.keys, None if given is None else given.credentials)


def owner_of_key(keys: Keys, key: str | None) -> str:
    """Whose key it is. Raises ApiError: nobody's."""
    owner = keys.owner(key)
    if owner is None:
        what = "an API key is needed: send Authorization: Bearer KEY" if key is None else "unknown API key"
        raise ApiError(401, what, kind="authentication_error", code="invalid_api_key")
    return owner


Owner = Annotated[str, Depends(owner_of)]


class Gate:
    """ASGI middleware before everything: who has no key, sends more bytes than are taken, whatever he says
    of their number, or sends files while as many of his as may wait are arriving, or while the disk is full,
    is answered before they are read.

    FastAPI reads a form before it asks whose it is, and its own `max_body_size` answers in another form than
    this server's other errors.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, store: JobStore) -> None:
        self.app = app
        self.keys = keys
        self.most = limits.upload_bytes
        self.most_arriving = limits.quotas.waiting_each
        self._arriving: Counter[str] = Counter()
        self._room = Arriving(store)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless nobody asks or too much is sent."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        owner = ""
        brings_files = (scope["method"], scope["path"].rstrip("/")) == ("POST", "/v1/videos")
        try:
            if scope["path"].startswith("/v1/"):
                refuse_foreign_pages(request)
                owner = owner_of_key(self.keys, bearer_of(request))
            comes = announced_bytes(request, self.most)
            if comes > self.most:
                raise self._too_much()
            if brings_files:
                self._check_arriving(owner, comes)
        except ApiError as error:
            await answer_error(error)(scope, receive, send)
            return
        receive = counted(receive, self.most, lambda: HTTPException(413, str(self._too_much())))
        if not brings_files:
            await self.app(scope, receive, send)
            return
        self._arriving[owner] += 1
        try:
            with self._room.kept(comes):
                await self.app(scope, receive, send)
        finally:
            self._arriving[owner] -= 1
            self._arriving += Counter()  # without those that have none

    def _check_arriving(self, owner: str, comes: int) -> None:
        """Raise ApiError where too many requests of an owner are read, or there is no room for another, of so
        many bytes, beside those."""
        if self._arriving[owner] >= self.most_arriving:
            message = "many requests of yours are being read: ask again in a moment"
            raise ApiError(429, message, kind="rate_limit_error", code="busy")
        if not self._room.has_room(comes):
            raise no_room()

    def _too_much(self) -> ApiError:
        return ApiError(413, f"more than {self.most / 1e6:g} MB were sent", code="too_large")


def bearer_of(request: HTTPConnection) -> str | None:
    """The key that a request bears."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
