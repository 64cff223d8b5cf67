"""The folder of this user's caches: compiled programs and downloaded weights."""

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "H2A2_CACHE"
"""Environment variable with the folder of the caches; "off" keeps no compiled programs."""
OFF = "off"
_NAME = "h2a2_jax"


def user_cache() -> Path:
    """Folder of the caches of this user, which may be missing.

    That of the environment variable H2A2_CACHE, unless it is "off"; else "h2a2_jax" in XDG_CACHE_HOME, by default in
    the folder for caches of the platform: ~/.cache, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    """
    named = os.environ.get(CACHE_VARIABLE, "")
    if named and named != OFF:
        return Path(named)
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else _platform_caches()) / _NAME


def _platform_caches() -> Path:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home / ".cache"
