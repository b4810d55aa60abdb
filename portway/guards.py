"""Who may ask at all: the Host, Origin and key of a request's head. Pure.

Portway listens on a laptop on which a browser runs. Any page that it shows can send requests to
127.0.0.1, and by DNS rebinding can even have them look like its own; keys alone do not help where
none are configured. So a name that is not ours, and a page that was not listed, is refused before
anything else is looked at.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from portway.call import ENDPOINTS
from portway.errors import ClientError
from portway.keys import digest_of

if TYPE_CHECKING:
    from portway.config import Config
    from portway.keys import Key
    from portway.quotas import Quotas
    from portway.wire.http1 import RequestHead


class Guards:
    """Who may ask at all. A web page must not reach a model because its browser runs on this machine."""

    def __init__(self, config: Config) -> None:
        server = config.server
        self._hosts = frozenset((server.host.lower(), *server.allowed_hosts))
        self._anywhere = server.host.lower() not in _LOOPBACK  # then other machines may use an address of ours
        self._origins = frozenset(server.allowed_origins)
        self._keys = server.api_keys

    def check(self, head: RequestHead) -> dict[str, str]:
        """Raises ClientError if the request may not be served; else the CORS headers of its answer."""
        headers = head.headers
        if not self._is_own_host(headers.get("host", "")):
            raise ClientError(
                "The Host header names another machine (DNS rebinding?). If this name is right, "
                "list it in server.allowed_hosts.",
                status=403,
                code="host_not_allowed",
            )
        cors = self._cors(headers)
        if head.method == "POST" and not _is_json(headers) and _from_browser(headers):
            raise ClientError("Send Content-Type: application/json.", status=415, code="unsupported_media_type")
        return cors

    def check_key(self, head: RequestHead) -> Key | None:
        """The key that the request brings, None where none are configured. Raises ClientError 401."""
        if not self._keys:
            return None
        found = self._key_of(head)
        if found is None:
            raise ClientError(
                "A valid API key is needed: send Authorization: Bearer with one of server.api_keys.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    def admit(self, head: RequestHead, route: str, quotas: Quotas) -> Key | None:
        """The request's key, once it is seen to be good for the route of that name and counted; None where none is
        needed. Raises ClientError 401, 403, 429."""
        key = None if route in _OPEN else self.check_key(head)
        if key is not None:
            if route not in _FOR_MODELS:
                key.check_everything()
            if route in _COUNTED:
                quotas.admit(key)
        return key

    def may_know_all(self, head: RequestHead) -> bool:
        """Whether /health may tell this client more than that the server is well, without asking it for a key."""
        if not self._keys:
            return True
        found = self._key_of(head)
        return found is not None and not found.models

    def _key_of(self, head: RequestHead) -> Key | None:
        """The configured key that is given. All are compared, in a time that tells nothing of any of them."""
        scheme, _, rest = head.headers.get("authorization", "").partition(" ")
        given = rest.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        digest, found = digest_of(given), None
        for known in self._keys:
            if hmac.compare_digest(digest, known.digest):
                found = known
        return found if given else None

    def _is_own_host(self, host: str) -> bool:
        """Whether no name server could have led a browser here by this name."""
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found[1].strip("[]")
        if name in _LOOPBACK or name.endswith(".localhost") or name in self._hosts:
            return True
        return _is_address(name) and (self._anywhere or name.startswith("127."))

    def _cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        origin = headers.get("origin")
        if origin in self._origins:
            return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": "*"}
        is_own = origin is None or origin.lower() == f"http://{headers.get('host', '')}".lower()
        if is_own and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return {}
        raise ClientError(
            f"Web pages of {(origin or 'another site')[:128]!r} may not call this server; "
            "to let them, list the origin in server.allowed_origins.",
            status=403,
            code="origin_not_allowed",
        )


# routes by the names that the route table gives them
_OPEN = ("get_health", "options")
_COUNTED = ENDPOINTS  # against a key's rpm
_FOR_MODELS = (*_COUNTED, "get_models", "get_model")  # what a key for some models alone is good for

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


# a name or an address, an IPv6 one in brackets, and maybe a port
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_NUMBER = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{3}}")


def _is_address(name: str) -> bool:
    """Whether it is an IP literal: those can't be rebound, as no name is looked up."""
    return ":" in name or _IPV4.fullmatch(name) is not None


def _is_json(headers: Mapping[str, str]) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def _from_browser(headers: Mapping[str, str]) -> bool:
    """cron's `curl -d` sends a form's content type too, but neither of these."""
    return "origin" in headers or any(name.startswith("sec-fetch-") for name in headers)
