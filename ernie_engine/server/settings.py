"""How the server presents itself and what it lets in: the flags beside EngineConfig's.

Owns every check of their values. Keys leave this class as digests only.
"""

import hashlib
import ipaddress
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ernie_engine.options import option

KEY_VARIABLE = "ERNIE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """ValueError on a bad value, naming the field."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(30000, "0 takes any free port")
    served_model_name: tuple[str, ...] = option((), "names for clients; default: --model as typed")
    api_key: tuple[str, ...] = option((), "keys; others see argv, so rather use the next one")
    api_key_file: str | None = option(None, f"file with one key a line; or set {KEY_VARIABLE}")
    metrics_without_key: bool = option(False, "let /metrics be read without a key")
    allowed_hosts: tuple[str, ...] = option((), "Host names accepted besides loopback ones")
    allowed_origins: tuple[str, ...] = option((), "web pages (CORS) that may call the server")
    shutdown_timeout: float = option(10.0, "seconds that running requests get after SIGTERM")
    stall_timeout: float = option(60.0, "seconds without a step until /health says 503")
    max_num_queued_reqs: int = option(4096, "requests in the server at once; n counts n")
    max_num_queued_tokens: int = option(4 << 20, "prompt tokens that wait to be read")
    strict_fields: bool = option(False, "refuse unknown request fields")
    usage_on_finish: bool = option(False, "with stream usage, also send it with finish_reason")
    sse_keep_alive: float = option(15.0, "seconds of silence until a stream gets a comment; 0: no")
    metrics_prefix: str = option("ernie", "of the names in /metrics")

    def __post_init__(self) -> None:
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a positive integer")
        for name in ("shutdown_timeout", "stall_timeout", "sse_keep_alive"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more seconds")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port={self.port}: must be from 0 to 65535")
        if not self.metrics_prefix.isidentifier() or not self.metrics_prefix.isascii():
            raise ValueError(f"metrics_prefix={self.metrics_prefix!r}: use letters, digits and _")
        if not all(self.served_model_name):
            raise ValueError("served_model_name: a name must not be empty")
        if "*" in self.allowed_origins:
            raise ValueError("allowed_origins: list the origins; '*' would open the server to all")

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    def keys(self, environment: Mapping[str, str]) -> list[str]:
        """All keys that are accepted; empty: no key is needed."""
        keys = [*self.api_key, environment.get(KEY_VARIABLE, "")]
        if self.api_key_file is not None:
            try:
                keys += Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"api_key_file={self.api_key_file!r}: {error}") from error
        keys = [key.strip() for key in keys if key.strip()]
        if not keys and (self.api_key or self.api_key_file is not None):
            raise ValueError("api_key, api_key_file: they hold no key")
        return keys


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the front end is told before the model is loaded; travels as JSON."""

    server: ServerConfig  # without keys
    model: str  # as typed
    port: int  # the one that is listened on
    key_digests: tuple[str, ...]  # SHA-256, hexadecimal

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.server.served_model_name or (self.model,)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Settings":
        server: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data["server"].items()
        }
        digests = tuple(data["key_digests"])
        return cls(**{**data, "server": ServerConfig(**server), "key_digests": digests})


def make_settings(
    server: ServerConfig, model: str, port: int, environment: Mapping[str, str]
) -> Settings:
    digests = tuple(hashlib.sha256(key.encode()).hexdigest() for key in server.keys(environment))
    shown = replace(server, api_key=(), api_key_file=None)
    return Settings(server=shown, model=model, port=port, key_digests=digests)


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine only; only names that need no look-up do."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
