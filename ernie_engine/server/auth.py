"""Who may ask: the key of a request, and the Host it was sent to.

Keys are compared as digests, in constant time and all of them, so that timing tells nothing.
"""

import hashlib
import hmac
from collections.abc import Sequence

from ernie_engine.server.errors import ApiError
from ernie_engine.server.settings import is_loopback


def check_key(authorization: str, digests: Sequence[str]) -> None:
    """ApiError 401 unless `authorization` is "Bearer <one of the keys>". No keys: anything is."""
    if not digests:
        return
    scheme, _, key = authorization.partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    if scheme.lower() != "bearer" or not any(matches):
        found = "Incorrect API key provided." if key else "No API key provided."
        raise ApiError(401, found, headers={"WWW-Authenticate": "Bearer"})


def check_host(host: str, allowed: Sequence[str]) -> None:
    """ApiError 403 unless `host` is this machine or allowed: a web page may have any name made to
    mean 127.0.0.1 (DNS rebinding)."""
    name = host[: host.rfind("]") + 1] if host.startswith("[") else host.split(":")[0]
    if not (is_loopback(name) or name.lower() in [one.lower() for one in allowed]):
        raise ApiError(403, "This Host is not served; see --allowed-hosts.")
