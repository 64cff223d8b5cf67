"""Folders of this user: caches (compiled programs and downloaded weights), and data that is no cache (a key)."""

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

    Raises:
        RuntimeError: nothing names a folder, and the system knows no home folder of the user.
    """
    named = os.environ.get(CACHE_VARIABLE, "")
    if named and named != OFF:
        return Path(named)
    return (_absolute("XDG_CACHE_HOME") or _of_platform((".cache",), "Caches", ("LOCALAPPDATA", "Local"))) / _NAME


def user_data() -> Path:
    """Folder of this user's data that is no cache, which may be missing.

    It is "h2a2_jax" in XDG_DATA_HOME, by default in the folder for data of the platform: ~/.local/share,
    ~/Library/Application Support on macOS, %APPDATA% on Windows.

    Raises:
        RuntimeError: nothing names a folder, and the system knows no home folder of the user.
    """
    named = _absolute("XDG_DATA_HOME")
    return (named or _of_platform((".local", "share"), "Application Support", ("APPDATA", "Roaming"))) / _NAME


def _absolute(variable: str) -> Path | None:
    """The folder that an environment variable names; None unless it is absolute."""
    folder = Path(os.environ.get(variable, ""))
    return folder if folder.is_absolute() else None


def _of_platform(linux: tuple[str, ...], macos: str, windows: tuple[str, str]) -> Path:
    """A folder below the home folder, in ~/Library, or of an environment variable of Windows, else in ~/AppData."""
    if sys.platform == "win32":
        return _absolute(windows[0]) or Path.home() / "AppData" / windows[1]
    home = Path.home()
    return home / "Library" / macos if sys.platform == "darwin" else home.joinpath(*linux)
