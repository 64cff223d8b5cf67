"""The folder of this user's caches: compiled programs and downloaded weights."""

import os
from pathlib import Path

CACHE_VARIABLE = "H2A2_CACHE"
"""Environment variable with the folder of the caches; "off" keeps no compiled programs."""
OFF = "off"
_NAME = "h2a2_jax"


def user_cache() -> Path:
    """Folder of the caches of this user, which may be missing.

    That of the environment variable H2A2_CACHE, unless it is "off"; else "h2a2_jax" in XDG_CACHE_HOME, by default
    ~/.cache.
    """
    named = os.environ.get(CACHE_VARIABLE, "")
    if named and named != OFF:
        return Path(named)
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path(os.path.expanduser("~")) / ".cache") / _NAME
