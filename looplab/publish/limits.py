"""Limits of `looped serve`: what one request may cost, and all requests together."""

from dataclasses import dataclass

LIMITS = {
    "max_loops": "loops that a request may ask for",
    "max_new_tokens": "tokens that a request may ask for",
    "max_prompt_tokens": "tokens of a prompt",
    "max_body_bytes": "bytes of a request's body",
    "max_seconds": "seconds until a request is answered, waiting included",
    "max_requests": "requests at work or waiting; more are refused",
    "max_rows": "requests that loop together; the others wait",
    "max_cache_bytes": "bytes of all KV caches together; a request waits until its own fits",
    "grace_seconds": "seconds that requests still have after SIGTERM",
}


@dataclass(frozen=True)
class Limits:
    """The limits that `LIMITS` explains. All are at least 1; the grace period may be 0."""

    max_loops: int = 64
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 4096
    max_body_bytes: int = 2**20
    max_seconds: int = 300
    max_requests: int = 128
    max_rows: int = 64
    max_cache_bytes: int = 2**32
    grace_seconds: int = 10


def option(name: str) -> str:
    """The option that sets a limit: --max-loops for max_loops."""
    return "--" + name.replace("_", "-")
