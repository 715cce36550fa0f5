"""Which hosts a request names: browsers send what web pages of elsewhere ask of addresses of this machine,
and such a page's own name may point here too."""

import ipaddress
from collections.abc import Collection

from starlette.requests import HTTPConnection

_LOCAL_NAMES = {"localhost"}


def is_local(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    name = host.removeprefix("[").partition("]")[0] if host.startswith("[") else host
    if name.lower() in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_of(request: HTTPConnection) -> str:
    """By which name the server is asked, without the port."""
    return _without_port(request.headers.get("host", ""))


def origin_of(request: HTTPConnection) -> str | None:
    """The host of the web page that asks; None where none does, or it is one of this server's own."""
    origin = request.headers.get("origin")
    return None if origin is None else _without_port(origin.partition("://")[2])


def is_of_this_site(request: HTTPConnection, hosts: Collection[str] | None) -> bool:
    """Whether a request comes from a page of the server's own, or from none.

    Args:
        hosts: by which names it may be asked beside this machine's; None: by any, as it is in a network whose
            names nobody knows.
    """
    host, origin = host_of(request), origin_of(request)
    if hosts is not None:
        return all(name is None or is_local(name) or name in hosts for name in (host, origin))
    forwarded = _without_port(request.headers.get("x-forwarded-host", "").partition(",")[0].strip())
    return origin is None or (origin != "" and origin in (host, forwarded))


def _without_port(netloc: str) -> str:
    if netloc.startswith("["):
        return netloc.partition("]")[0] + "]"
    return netloc.partition(":")[0].lower()
