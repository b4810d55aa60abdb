"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource

SPARE = 512  # beside the clients': connections to backends, the log, the cache
OPEN_MAX = 10_240  # what macOS grants at most, though it may call the limit infinite


def allow(connections: int) -> None:
    """Raise the process's own limit as far as so many clients need, or as far as it may. Many systems begin with
    256 or 1024: then connections that are only idle would be closed for want of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    for limit in (needed, hard, OPEN_MAX):
        if soft < limit and _is_granted(limit, hard):
            return


def _is_granted(limit: int, hard: int) -> bool:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (ValueError, OSError):
        return False
    return True
